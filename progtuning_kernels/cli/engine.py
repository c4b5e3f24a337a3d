"""One training run, from data to metrics.json, checkpoints and a model folder.

A run is a function of its settings: order of the rows, dropout and initial head come from the seed,
plan and learning rate from the step. A checkpoint holds the rest, so that a run killed at any
moment goes on from its newest checkpoint to the same bits (on CPU).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import PrefixCache
from ..checkpoints import load_checkpoint, save_checkpoint
from ..freezing.unit_use import measure_forward
from ..model.layout import EMBEDDINGS, find_layout, parameter_slots
from ..optim import state_bytes
from ..packing import PackingReport
from ..random_state import random_state_kept
from ..schedules import FreezePlan, annealed_lr, stage_count
from . import methods, metrics, models
from .batches import Batch, Collator, Order, encode_causal_lm, encode_classification
from .datasets import TextData
from .errors import UserError, as_user_error
from .output import RUN_FILES, empty_folder
from .progress import TrainProgress
from .provenance import provenance
from .settings import TrainSettings


@dataclass
class Records:
    """What metrics.json will say of steps and stages; every checkpoint keeps it."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0
    other_seconds: float = 0.0  # evaluation, measuring, saving

    @property
    def train_seconds(self) -> float:
        return sum(record["step_ms"] for record in self.steps) / 1e3


class Run:
    """One run, from settings and data to files; `name` is shown in tables and plots."""

    def __init__(self, settings: TrainSettings, data: TextData, *, name: str) -> None:
        self.settings = s = settings
        self.name = name
        self.causal_lm = s.task == "causal-lm"
        kind = "regression" if data.label_names is None else "classification"
        self.figures = metrics.FIGURES["causal-lm" if self.causal_lm else kind]
        self.metric_name = s.metric or self.figures[0]
        if self.metric_name not in self.figures:
            raise UserError(f"metric {s.metric!r} does not fit; there is {', '.join(self.figures)}")
        metrics.check_installed()
        self.device = models.choose_device(s.device)
        self.autocast_dtype = models.autocast_dtype(s.precision, self.device)
        torch.manual_seed(s.seed)
        random.seed(s.seed)
        base, self.tokenizer, self.notes = models.load_model_and_tokenizer(
            s.model, s.task, data.label_names
        )
        if data.label_names is not None:
            data = data.with_classes(tuple(base.config.id2label.values()))
        self.data = data
        models.check_length(base, s.max_length, "--max-length", self.tokenizer)
        self.collate = Collator(self.tokenizer, causal_lm=self.causal_lm)
        encode = encode_causal_lm if self.causal_lm else encode_classification
        self.encoded = encode(data, self.tokenizer, s.max_length)
        splits = {"train": self.encoded.train, "validation": self.encoded.validation}
        self.notes += models.check_rows(base, self.tokenizer, splits, s.task)
        lengths = [len(row["input_ids"]) for row in self.encoded.train]
        self.order = Order(lengths, batch_size=s.batch_size, accumulate=s.accumulate, seed=s.seed)
        self.total_steps = s.max_steps or s.epochs * self.order.steps_per_epoch
        with as_user_error():
            self.schedule = methods.build_schedule(s, self.total_steps)
            self.layout = find_layout(base, s.block_lists)
            self.schedule.plan(0, self.layout.num_blocks)
        self.num_params = sum(p.numel() for p in base.parameters())
        self._use_cache = getattr(base.config, "use_cache", None)
        if self._use_cache:
            base.config.use_cache = False  # keys and values of every block would stay in the output
        base.to(self.device).train()
        # the longest row, and one that has to be padded
        rows = sorted(
            self.encoded.train + self.encoded.validation, key=lambda r: len(r["input_ids"])
        )
        models.try_forward(base, self.batch([rows[-1], rows[0]]), s.task)
        model = base
        if s.uses_lora:
            model = models.wrap_lora(base, s.task, s.lora_rank)
            paths = [f"base_model.model.{stack.path}" for stack in self.layout.stacks]
            self.layout = find_layout(model, paths)
        if s.method.startswith("progressive"):
            self.trained = methods.progressive(model, s, self.schedule, self.layout, base)
        else:
            self.trained = methods.plain(model, s, base)
        self.initial_active_params = self.trained.active_params()
        self.scheduler = self._lr_scheduler()
        self.records = Records()
        self.step = 0
        self.packing: PackingReport | None = None  # of the whole run, at its end
        self._packed_before = 0, 0  # places and tokens of the stages before, and of side forwards

    def train(self, progress: TrainProgress) -> dict[str, Any]:
        """Run to the end (from the newest checkpoint with `resume`), write and return metrics.json.

        Of a run that learnt nothing no model is written, and its checkpoints stay.
        """
        started = time.perf_counter()
        output = self.settings.output
        if self.settings.overwrite:
            empty_folder(output, RUN_FILES)
        output.mkdir(parents=True, exist_ok=True)
        if self.settings.resume and not self._resume(progress):
            progress.note(f"{self.name}: no checkpoint in {output}, starts from the beginning")
        trained_before = self.records.train_seconds
        stages = stage_count(self.schedule, self.total_steps)
        with progress.running(self.name, self.step, self.total_steps, stages):
            self._train_steps(progress)
        self.packing = self._packing_report()
        failure = self.failure()
        if failure is None:
            self._save_model()
        trained = self.records.train_seconds - trained_before
        self.records.other_seconds += time.perf_counter() - started - trained
        result = self.metrics()
        write_json(output / "metrics.json", result)
        if failure is None:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
        return result

    def _lr_scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        """Warm-up and linear decay; with --anneal each unit's own cosine decays."""
        warmup, optimizer = round(self.settings.warmup * self.total_steps), self.trained.optimizer
        if self.settings.anneal and self.trained.handle is not None:
            with as_user_error():
                factors = annealed_lr(
                    self.schedule,
                    optimizer.param_groups,
                    self.layout.num_blocks,
                    base=lambda step: min(1.0, step / max(1, warmup)) if warmup else 1.0,
                )
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        from transformers import get_linear_schedule_with_warmup

        return get_linear_schedule_with_warmup(optimizer, warmup, self.total_steps)

    def _train_steps(self, progress: TrainProgress) -> None:
        """Do all steps that are left."""
        here = self.schedule.stage(self.step)
        stage_steps = [r for r in self.records.steps if r["stage"] == here]
        for window in self.order.windows(self.step, self.total_steps):
            stage = self.schedule.stage(self.step)
            first_of_stage = len(self.records.stages) <= stage
            if first_of_stage:
                stage_steps = []
                self.records.stages.append(self._describe_stage(stage))
                if (report := self._packing_report()) is not None:
                    self._packed_before = report.places, report.tokens
            record = self._train_step(window, stage, measure=first_of_stage)
            stage_steps.append(record)
            recent = stage_steps[-20:]
            recent_seconds = sum(r["step_ms"] for r in recent) / 1e3
            progress.update(stage, record, sum(r["tokens"] for r in recent) / recent_seconds)
            if self.step == self.total_steps or self.schedule.stage(self.step) != stage:
                if self._finish_stage(stage, stage_steps):
                    progress.evaluated(stage, self.records.evaluations[-1])
            every = self.settings.checkpoint_every
            if every and self.step % every == 0 and self.step < self.total_steps:
                self._save_checkpoint()

    @property
    def _cache(self) -> PrefixCache | None:
        return None if self.trained.handle is None else self.trained.handle.cache

    def _packing_report(self) -> PackingReport | None:
        return None if self.trained.handle is None else self.trained.handle.packing_report()

    def autocast(self) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def batch(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {k: v.to(self.device) for k, v in self.collate(rows).items()}

    def _train_step(self, window: list[list[int]], stage: int, *, measure: bool) -> dict[str, Any]:
        """One optimizer step over a window of micro-batches."""
        started = time.perf_counter()
        active = self.trained.active_params()
        loss_sum = torch.zeros((), device=self.device)
        tokens = [sum(self.order.lengths[i] for i in rows) for rows in window]
        # a micro-batch's share of the loss: its predicted tokens, or its rows
        counts = [
            n - len(rows) if self.causal_lm else len(rows)
            for n, rows in zip(tokens, window, strict=True)
        ]
        for rows, count in zip(window, counts, strict=True):
            batch = self.batch([self.encoded.train[i] for i in rows])
            with self.autocast():
                loss = self.trained.model(**batch).loss * (count / sum(counts))
            loss.backward()
            loss_sum += loss.detach()
        lr = self.scheduler.get_last_lr()[-1]  # of the head, where units have rates of their own
        if measure:
            grads = [p.grad for p in self.trained.model.parameters() if p.grad is not None]
            self.records.stages[-1]["gradient_bytes"] = sum(g.nbytes for g in grads)
        self.trained.update()
        if measure:
            self.records.stages[-1]["state_bytes"] = state_bytes(self.trained.optimizer)
        if self._cache is not None:
            # of the stage so far: with the next plan its counts begin anew
            report = self.trained.handle.cache_report()
            self.records.stages[-1]["cache"] = dataclasses.asdict(report)
        if self.trained.handle is not None:
            self.trained.handle.advance()
        self.scheduler.step()
        self.step += 1
        value = float(loss_sum)  # the one wait for the device in a step
        self.records.updates += active
        record = {
            "step": self.step,
            "stage": stage,
            "loss": value,
            "lr": lr,
            "tokens": sum(tokens),
            "step_ms": (time.perf_counter() - started) * 1e3,
        }
        self.records.steps.append(record)
        return record

    def _describe_stage(self, stage: int) -> dict[str, Any]:
        """The record of a stage that begins; its widest batch shows what a forward saves."""
        longest = sorted(self.encoded.train, key=lambda row: len(row["input_ids"]))
        batch = self.batch(longest[-self.settings.batch_size :])
        handle, cache = self.trained.handle, self._cache
        everything = FreezePlan.from_boundary(0, self.layout.num_blocks, embeddings=True)
        plan = everything if handle is None else handle.plan
        with self.autocast(), nullcontext() if cache is None else cache.paused():
            if handle is not None and not handle.forwards.last:  # which tries packing, uncounted
                with random_state_kept(self.trained.model):
                    self.trained.model(**batch)
            uses = measure_forward(self.trained.model, self.layout, (), batch).values()
        # LoRA leaves the embeddings and most of the head frozen, whatever the plan says of them
        active = {
            unit
            for slot in parameter_slots(self.trained.model, self.layout)
            if slot.parameter.requires_grad
            for unit in slot.units
        }
        return {
            "stage": stage,
            "boundary": plan.boundary if handle is None else handle.boundary,
            "embeddings": plan.embeddings and EMBEDDINGS in active,
            "trainable": [on and i in active for i, on in enumerate(plan.trainable)],
            "head": plan.head and self.layout.head in active,
            "first_step": self.step + 1,
            "active_params": self.trained.active_params(),
            "saved_bytes": sum(use.saved_bytes for use in uses),
            "activation_bytes": sum(use.activation_bytes for use in uses),
        }

    def _finish_stage(self, stage: int, steps: list[dict[str, Any]]) -> bool:
        """Close the stage's record; True if it was evaluated: of many stages, two dozen are."""
        seconds = sum(r["step_ms"] for r in steps) / 1e3
        self.records.stages[-1] |= {
            "last_step": self.step,
            "train_seconds": seconds,
            "step_ms_median": statistics.median(r["step_ms"] for r in steps),
            "tokens_per_second": sum(r["tokens"] for r in steps) / seconds,
        }
        if (report := self._packing_report()) is not None:
            places, tokens = (
                now - before
                for now, before in zip(
                    (report.places, report.tokens), self._packed_before, strict=True
                )
            )
            # of the places of the stage's packed batches; 0 where none was packed
            self.records.stages[-1]["padding_skipped_share"] = (
                1 - tokens / places if places else 0.0
            )
        evaluations = self.records.evaluations
        since = self.step - (evaluations[-1]["step"] if evaluations else 0)
        if self.step < self.total_steps and since < self.total_steps // 24:
            return False
        evaluation = {
            "step": self.step,
            "stage": stage,
            **self.evaluate(),
            "train_seconds": self.records.train_seconds,
        }
        evaluations.append(evaluation)
        self.records.stages[-1] |= {key: evaluation[key] for key in ("metric", "loss")}
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and figures over the validation rows; rows of similar length go together."""
        model = self.trained.model.eval()
        rows = sorted(self.encoded.validation, key=lambda row: len(row["input_ids"]))
        size = 2 * self.settings.batch_size
        loss_sum, weight_sum, logits, labels = 0.0, 0, [], []
        for i in range(0, len(rows), size):
            batch = self.batch(rows[i : i + size])
            with self.autocast():
                output = model(**batch)
            if self.causal_lm:
                weight = int((batch["labels"][:, 1:] != -100).sum())
            else:
                weight = len(batch["labels"])
                logits.append(output.logits.float().cpu())
                labels.append(batch["labels"].cpu())
            loss_sum += float(output.loss) * weight
            weight_sum += weight
        model.train()
        loss = loss_sum / weight_sum
        if not math.isfinite(loss):  # of NaN, argmax makes a class
            figures = dict.fromkeys(self.figures, math.nan)
        elif self.causal_lm:
            figures = metrics.language_model_figures(loss)
        elif self.data.label_names is None:
            figures = metrics.regression_figures(torch.cat(logits).squeeze(-1), torch.cat(labels))
        else:
            figures = metrics.classification_figures(torch.cat(logits), torch.cat(labels))
        return {"metric": figures[self.metric_name], "loss": loss, **figures}

    def failure(self) -> str | None:
        """Why the run learnt nothing, in words; None if it learnt something."""
        loss = self.records.evaluations[-1]["loss"]
        if not math.isfinite(loss):
            return f"the validation loss is {loss} after the last step"
        infinite = sum(not math.isfinite(record["loss"]) for record in self.records.steps)
        lost = max(infinite, self.trained.skipped_steps())
        if 2 * lost >= self.step:
            return f"in {lost} of {self.step} steps the loss or its gradients were not finite"
        return None

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        records, s, packing = self.records, self.settings, self.packing
        updates_full = self.num_params * self.step
        return {
            "format": 1,
            "name": self.name,
            "method": s.method,
            "seed": s.seed,
            "config": s.flat(),
            "meta": provenance(self.device),
            "data": {
                "train_rows": len(self.encoded.train),
                "validation_rows": len(self.encoded.validation),
                "label_names": None if self.data.label_names is None else [*self.data.label_names],
                "description": self.data.description,
                "digest": self.data.digest(),
            },
            "model": {
                "name": s.model,
                "num_blocks": self.layout.num_blocks,
                "num_params": self.num_params,
                "active_params": self.initial_active_params,
            },
            "metric_name": self.metric_name,
            "steps": records.steps,
            "evaluations": records.evaluations,
            "stages": records.stages,
            "summary": {
                "metric": records.evaluations[-1]["metric"],
                "metric_name": self.metric_name,
                "train_seconds": records.train_seconds,
                "total_seconds": records.train_seconds + records.other_seconds,
                "steps": self.step,
                "skipped_steps": self.trained.skipped_steps(),
                "failure": self.failure(),
                "updates": records.updates,
                "updates_full": updates_full,
                "updates_saved_share": 1 - records.updates / updates_full,
                "peak_state_bytes": max(stage["state_bytes"] for stage in records.stages),
                "peak_activation_bytes": max(stage["activation_bytes"] for stage in records.stages),
                "padding_skipped_share": None if packing is None else packing.skipped_share,
                "packing": None if packing is None else str(packing),
                "mean_tokens_per_second": sum(r["tokens"] for r in records.steps)
                / records.train_seconds,
            },
        }

    def _same_run(self) -> dict[str, Any]:
        """Settings and digest of the data, which a checkpoint must share with this run."""
        settings = {"autocast": str(self.autocast_dtype), "schedule": repr(self.schedule)}
        digest = hashlib.sha256()
        for row in (*self.encoded.train, *self.encoded.validation):
            digest.update(repr((row["input_ids"], row.get("labels"))).encode())
        return {"settings": self.settings.identity() | settings, "data": digest.hexdigest()}

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        """Raise `UserError` with the first setting that differs from a checkpoint's."""
        current = self._same_run()
        for name, value in current["settings"].items():
            if saved["settings"].get(name) != value:
                raise UserError(
                    f"the checkpoint was written with {name}={saved['settings'].get(name)!r}, "
                    f"this call has {name}={value!r}"
                )
        if saved["data"] != current["data"]:
            raise UserError("the data has changed since the checkpoint was written")

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.settings.output / "checkpoints",
            self.trained.handle or self.trained.model,
            self.trained.optimizer,
            scheduler=self.scheduler,
            extra={**self._same_run(), "step": self.step, "records": vars(self.records)},
            keep=self.settings.keep_checkpoints,
            step=self.step,
        )

    def _resume(self, progress: TrainProgress) -> bool:
        """Go on from the newest checkpoint; False if there is none."""
        with as_user_error(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = load_checkpoint(
                self.settings.output / "checkpoints",
                self.trained.handle or self.trained.model,
                self.trained.optimizer,
                scheduler=self.scheduler,
                check=self._check_same_run,
            )
        for warning in caught:  # of a damaged checkpoint
            progress.note(f"{self.name}: {warning.message}")
        if state is None:
            if (self.settings.output / "metrics.json").exists():
                raise UserError(f"the run in {self.settings.output} is finished")
            return False
        self.records, self.step = Records(**state["records"]), state["step"]
        return True

    def _save_model(self) -> None:
        """Save a plain Hugging Face folder, LoRA merged into it and its adapter beside it."""
        if self.trained.handle is not None:
            self.trained.handle.unpatch()
        model, output = self.trained.base, self.settings.output
        if self.settings.uses_lora:
            self.trained.model.save_pretrained(output / "adapter")
            model = self.trained.model.merge_and_unload()
        if self._use_cache:
            model.config.use_cache = self._use_cache
        model.save_pretrained(output / "model")
        self.tokenizer.save_pretrained(output / "model")


def write_json(path: os.PathLike, content: Any) -> None:
    """Write the whole file or, if that fails, none; null stands for NaN and infinities."""
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=1, allow_nan=False)
    os.replace(partial, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
