"""`progtuning train`: from options to a trained model's folder, by transformers' Trainer.

The order of the rows, dropout and the initial head come from the seed, plan and learning rate from
the step, so that a run killed at any moment goes on from its newest checkpoint to the same bits (on
CPU).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy
from huggingface_hub import HfApi
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
)

from ..backend import one_line
from ..integrations.hf_trainer import ProgtuningCallback
from ..planner import TrainingPlan
from ..schedules import FixedBlockSchedule, decides_by_score
from . import methods
from .budget import BATCHES, choice_of, chosen_schedule, write_choice
from .config import build_schedule
from .errors import UserError, as_user_error, end_with
from .length_batches import EpochOfBatches, LengthBatches
from .new_tokens import read_tokens
from .options import TrainOptions
from .output import RUN_FILES, check_run_folder, empty_folder
from .plan_command import plan_run
from .predict import predict_rows
from .preparation import Rows, prepare, read_rows, trainer_classes
from .provenance import provenance
from .recorder import RECORD, Recorder
from .step_loss import mean_over_step

# What may differ between a checkpoint and the call that resumes it.
_FREE = {"resume", "overwrite", "device", "metric", "cache", "graph", "predict_file"}
_FREE |= {"early_stopping_patience", "schedule", "trainer"}
# Of the Trainer's, what may not.
_NUMBERS = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "seed", "optim")
_NUMBERS += ("gradient_accumulation_steps", "max_grad_norm", "warmup_steps", "weight_decay")
_NUMBERS += ("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "fp16")
_NUMBERS += ("neftune_noise_alpha", "lr_scheduler_kwargs")


# Of the Trainer's, by the names that metrics.json has for them.
_SHORT = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "warmup": "warmup_steps",
    "weight_decay": "weight_decay",
    "seed": "seed",
}
_USUAL = {
    "remove_unused_columns": False,  # encoded rows have the columns of the forward alone
    "logging_nan_inf_filter": False,  # a loss that is not finite is to be seen
    "push_to_hub": False,  # the finished model alone is pushed
    "disable_tqdm": not sys.stderr.isatty(),
}


class Run:
    """One run, from rows to files; `name` is shown in tables and plots."""

    def __init__(
        self,
        options: TrainOptions,
        rows: Rows,
        *,
        name: str,
        console: Console,
        dry_run: bool = False,
    ) -> None:
        self.options, self.rows, self.name, self.console = options, rows, name, console
        known = (*rows.task.metrics, "loss")
        self.metric_name = options.metric or known[0]
        best = options.of_trainer("metric_for_best_model") or "loss"
        for metric in (self.metric_name, best.removeprefix("eval_")):
            if metric not in known:
                raise UserError(f"metric {metric!r} does not fit; there is {', '.join(known)}")
        weighs = options.schedule == "budget"  # weights, to choose by
        self.prepared = prepare(options, rows, weights=weighs or not dry_run, **_USUAL)
        self.args = args = self.prepared.args
        self.output = Path(args.output_dir)
        self.batches = LengthBatches(
            self.prepared.lengths("train"),
            rows=None if options.tokens_per_batch else args.per_device_train_batch_size,
            tokens=options.tokens_per_batch,
            accumulate=args.gradient_accumulation_steps,
            ranks=args.world_size,
            seed=args.seed,
        )
        self._per_step = args.world_size * args.gradient_accumulation_steps
        self.total_steps = args.max_steps
        if args.max_steps <= 0:
            steps_per_epoch = -(-len(self.batches) // self._per_step)
            self.total_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
        self.num_params = sum(p.numel() for p in self.prepared.model.parameters())
        self.evaluates_stages = options.of_trainer("eval_strategy") == "stage"
        if options.uses_lora and not dry_run:
            self.prepared.adapt(options.lora_rank)
        if options.schedule != "budget":
            self._build_schedule()
        elif not dry_run:  # a plan chooses when the model has its adapters
            before = choice_of(self.output, self.total_steps) if options.resume else None
            self.schedule = before or self._choose(self.prepared.model)
        if dry_run:
            return
        self.trainer = self._make_trainer()
        self.recorder = Recorder(self, self.callback)
        self.trainer.add_callback(self.recorder)
        self.trainer.add_callback(EpochOfBatches(self.batches, self.prepared.collate))

    def _build_schedule(self) -> None:
        try:
            self.schedule = build_schedule(self.options, self.total_steps)
            with as_user_error():
                self.schedule.plan(0, self.prepared.layout.num_blocks)
        except UserError as error:
            if "total_steps" not in str(error):
                raise
            raise UserError(f"{error} (--stages, --epochs and --batch-size set them)") from error
        if decides_by_score(self.schedule) and self.evaluates_stages:
            raise UserError(
                "a plateau schedule ends its stages by evaluations: --eval-strategy epoch, or steps"
            )

    def _choose(self, model: nn.Module) -> FixedBlockSchedule:
        """What a budget lets train of the model as it is."""
        rows = self.prepared.encoded["train"]
        batches = [self.prepared.batch([rows[i] for i in b]) for b in islice(self.batches, BATCHES)]
        chosen = chosen_schedule(self.options, model, self.total_steps, batches=batches)
        trains = chosen.plan(0, self.prepared.layout.num_blocks).units_in_words()
        self.prepared.notes.append(f"within --rho {self.options.rho} train: {trains}")
        return chosen

    def _make_trainer(self) -> Trainer:
        options, args, prepared = self.options, self.args, self.prepared
        callbacks = []
        rows = None
        self.callback: ProgtuningCallback | None = None
        if options.is_scheduled:
            patch = methods.patch_options(options, prepared.layout)
            patch["rows"] = prepared.rows_to_train
            self.callback = ProgtuningCallback(self.schedule, **patch)
            rows = self.callback.hold_rows(prepared.model)
            callbacks.append(self.callback)
        self.initial_active_params = sum(
            p.numel() for p in prepared.model.parameters() if p.requires_grad
        )
        if options.early_stopping_patience is not None:
            callbacks.append(early := EarlyStoppingCallback(options.early_stopping_patience))
            # instead of a check, which knows no "stage"
            early.on_train_begin = lambda args, state, *_, **__: go_on_counting(early, state)
        if "logging_steps" not in options.trainer:
            args.logging_steps = max(1, self.total_steps // 200)  # points of a curve
        validation = prepared.lengths("validation")
        order = sorted(range(len(validation)), key=validation.__getitem__)
        self._places = numpy.argsort(order)  # of the rows among those sorted by length
        self._use_cache = getattr(prepared.model.config, "use_cache", None)
        optimizers = methods.optimizer_and_rates(
            prepared.model, options, args, self.schedule, prepared.layout, rows
        )
        # options that exclude each other, as padding_free of TRL; a tracker that is not installed
        with as_user_error(RuntimeError):
            trainer = trainer_classes(prepared.task)[0](
                model=prepared.model,
                args=args,
                train_dataset=prepared.encoded["train"],
                eval_dataset=prepared.encoded["validation"].select(order),
                data_collator=prepared.collate,
                processing_class=prepared.processor,
                compute_metrics=self._compute_metrics,
                preprocess_logits_for_metrics=prepared.task.preprocess_logits,
                callbacks=callbacks,
                optimizers=optimizers,
            )

        def train_batches() -> DataLoader:
            loader = DataLoader(
                trainer.train_dataset,
                batch_sampler=self.batches,
                collate_fn=trainer.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )
            trainer.accelerator.even_batches = False  # these differ in rows
            loader = trainer.accelerator.prepare(loader)
            trainer.accelerator.even_batches = True  # an evaluation gathers rows of all ranks
            return loader

        trainer.get_train_dataloader = train_batches
        if prepared.task.trainer != "SFTTrainer":  # whose own loss is that mean
            mean_over_step(trainer)
        trainer.remove_callback(PrinterCallback)  # the recorder prints, and less
        quiet_bar(trainer)
        return trainer

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        def in_order(values: Any) -> Any:
            if isinstance(values, tuple):
                return tuple(map(in_order, values))
            return values[self._places]

        return self.prepared.task.figures(
            in_order(prediction.predictions), in_order(prediction.label_ids)
        )

    def figures_of(self, metrics: dict[str, float]) -> dict[str, float]:
        """The figures of one evaluation, from the Trainer's names."""
        figures = {"loss": metrics["eval_loss"]}
        for key in self.prepared.task.metrics:
            # of NaN, argmax makes a class
            finite = math.isfinite(figures["loss"])
            figures[key] = float(metrics[f"eval_{key}"]) if finite else math.nan
        return {"metric": figures[self.metric_name], **figures}

    def tokens_by_step(self) -> list[int]:
        """Real tokens of every step, over all processes."""
        lengths, found = self.prepared.lengths("train"), []
        for epoch in range(-(-self.total_steps * self._per_step // len(self.batches))):
            self.batches.set_epoch(epoch)
            tokens = [sum(map(lengths.__getitem__, rows)) for rows in self.batches]
            starts = range(0, len(tokens), self._per_step)
            found += [sum(tokens[start : start + self._per_step]) for start in starts]
        self.batches.set_epoch(0)
        return found[: self.total_steps]

    def widest_rows(self) -> list[dict[str, Any]]:
        """A batch of the longest training rows."""
        lengths, rows = self.prepared.lengths("train"), self.prepared.encoded["train"]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = max(map(len, self.batches))
        if (budget := self.options.tokens_per_batch) is not None:
            size = max(1, budget // lengths[order[-1]])
        return [rows[i] for i in order[-size:]]

    def train(self, *, resumable: bool = True) -> dict[str, Any]:
        """Run to the end (from the newest checkpoint with `resume`), write and return metrics.json.

        Of a run that learnt nothing no model is written, and its checkpoints stay. SIGINT and
        SIGTERM end the process with a checkpoint, and, if the command is `resumable`, a line that
        says how to go on.
        """
        started = time.perf_counter()
        if self.options.overwrite and self.trainer.is_world_process_zero():
            empty_folder(self.output, RUN_FILES)
        if isinstance(self.schedule, FixedBlockSchedule) and self.options.schedule == "budget":
            if self.trainer.is_world_process_zero():
                write_choice(self.schedule, self.output)
        checkpoint = self._checkpoint() if self.options.resume else None
        with stopped_by_signals(self.recorder):
            try:
                self.trainer.train(resume_from_checkpoint=checkpoint)
            except ImportError as error:  # of an optimizer of --optim
                raise UserError(str(error)) from error
            except Exception as error:  # of pickle, safetensors, torch: no common class
                if checkpoint is None or self.recorder.stages:
                    raise
                raise UserError(f"{checkpoint} cannot be read: {one_line(error)}") from error
        state = self.trainer.state
        if self.recorder.signal is not None and state.global_step < state.max_steps:
            self.trainer.accelerator.wait_for_everyone()  # one saves for all
            instead = " in place of --overwrite" if self.options.overwrite else ""
            how = f"; the same command with --resume{instead} goes on" if resumable else ""
            end_with(
                f"stopped after step {state.global_step} of {state.max_steps}{how}",
                128 + self.recorder.signal,
            )
        last = self.recorder.evaluations[-1:]
        if not last or last[0]["step"] < state.global_step or self.args.load_best_model_at_end:
            self.trainer.evaluate()
        if self.failure() is None:
            self._save_model()
        result = self.metrics(time.perf_counter() - started)
        if self.trainer.is_world_process_zero():
            write_json(self.output / "metrics.json", result)
        return result

    def plan(self) -> TrainingPlan:
        """What the stages will cost: of the longest batch, with the real tokens of the rows."""
        widest = self.prepared.batch(self.widest_rows())
        lengths = self.prepared.lengths("train")
        places = 0
        for rows in self.batches:
            places += len(rows) * max(map(lengths.__getitem__, rows))
        shape = next(iter(widest.values())).shape
        return plan_run(
            self.options,
            self.prepared.model,
            steps=self.total_steps,
            device=self.args.device.type,
            rows=self.prepared.rows_to_train,
            batch_size=shape[0],
            seq_len=shape[1],
            inputs=widest,
            real_tokens=sum(lengths) / places,
            choose=self._choose if self.options.schedule == "budget" else None,
        )

    def skipped_steps(self) -> int:
        """Steps left out because of non-finite gradients; plain torch leaves out none."""
        optimizer = self.trainer.optimizer
        return getattr(getattr(optimizer, "optimizer", optimizer), "skipped_steps", 0)

    def failure(self) -> str | None:
        return self.recorder.failure(self.trainer.state, self.skipped_steps())

    def config(self) -> dict[str, Any]:
        """The options of the run, for its record; those of the Trainer by their short names."""
        own = dataclasses.asdict(self.options)
        trainer = own.pop("trainer").items()
        given = {k: str(v) for k, v in trainer if k not in (*_SHORT.values(), "output_dir")}
        short = {name: getattr(self.args, of_trainer) for name, of_trainer in _SHORT.items()}
        short["max_grad_norm"] = self.options.of_trainer("max_grad_norm")  # may have moved
        return own | given | short

    def data(self) -> dict[str, Any]:
        return {
            "train_rows": len(self.rows.splits["train"]),
            "validation_rows": len(self.rows.splits["validation"]),
            "label_names": self.rows.task.names,
            "description": self.rows.description,
            "digest": self.rows.digest,
        }

    def metrics(self, seconds: float) -> dict[str, Any]:
        """The content of metrics.json; `seconds` is the whole time of this call."""
        state, record, options, args = self.trainer.state, self.recorder, self.options, self.args
        handle = None if self.callback is None else self.callback.handle
        packing = None if handle is None else handle.packing_report()
        updates_full = self.num_params * state.global_step
        return {
            "format": 1,
            "name": self.name,
            "method": options.method,
            "seed": args.seed,
            "config": self.config(),
            "meta": provenance(args.device),
            "data": self.data(),
            "model": {
                "name": options.model,
                "num_blocks": self.prepared.layout.num_blocks,
                "num_params": self.num_params,
                "active_params": self.initial_active_params,
            },
            "metric_name": self.metric_name,
            "steps": [
                {
                    "step": log["step"],
                    "stage": record.schedule.stage(log["step"] - 1),
                    "loss": float(log["loss"]),
                    "lr": float(log["learning_rate"]),
                }
                for log in state.log_history
                if "loss" in log
            ],
            "evaluations": record.evaluations,
            "stages": record.stages,
            "summary": {
                "metric": record.evaluations[-1]["metric"],
                "metric_name": self.metric_name,
                "train_seconds": record.train_seconds,
                "total_seconds": seconds,
                "steps": state.global_step,
                "skipped_steps": self.skipped_steps(),
                "failure": self.failure(),
                "updates": record.updates,
                "updates_full": updates_full,
                "updates_saved_share": 1 - record.updates / updates_full,
                "peak_state_bytes": max(stage["state_bytes"] for stage in record.stages),
                "peak_activation_bytes": max(s["activation_bytes"] for s in record.stages),
                "padding_skipped_share": None if packing is None else packing.skipped_share,
                "packing": None if packing is None else str(packing),
                "mean_tokens_per_second": sum(s["tokens"] for s in record.stages)
                / record.train_seconds,
            },
        }

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run: a resumed run must have the same."""
        own = {k: v for k, v in dataclasses.asdict(self.options).items() if k not in _FREE}
        own["add_tokens"] = read_tokens(self.options.add_tokens)  # what a file names may change
        numbers = {name: str(self.options.of_trainer(name)) for name in _NUMBERS}
        schedule = re.sub(r"total_steps=\d+", "", repr(self.schedule))  # a run may be extended
        more = {"schedule": schedule, "data": self.rows.digest, "processes": self.args.world_size}
        return json.loads(json.dumps(own | numbers | more))

    def _checkpoint(self) -> str | None:
        """The newest whole checkpoint, of this run; None if there is none."""
        folders = sorted(self.output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]))
        for folder in reversed(folders):
            try:  # the file that a checkpoint ends with
                state = json.loads((folder / "trainer_state.json").read_text())
                record = state["stateful_callbacks"][RECORD]
            except (OSError, ValueError, KeyError):
                self.console.print(f"{folder}: not whole, left out", soft_wrap=True)
                continue
            for name, value in self.identity().items():
                if record["identity"].get(name) != value:
                    if name == "data":
                        raise UserError("the data has changed since the checkpoint was written")
                    raise UserError(
                        f"the checkpoint was written with {name}="
                        f"{record['identity'].get(name)!r}, this call has {name}={value!r}"
                    )
            if not any(folder.glob("optimizer*")):
                raise UserError(f"{folder} has no optimizer state to go on with: --save-only-model")
            if state["global_step"] >= self.total_steps:
                raise UserError(
                    f"the run in {self.output} is finished after {state['global_step']} steps; "
                    "more --epochs or --max-steps extend it"
                )
            if state["max_steps"] != self.total_steps:
                self.console.print(
                    f"{self.name}: planned for {state['max_steps']} steps, now for "
                    f"{self.total_steps}: plan and learning rate are those of the new length",
                    soft_wrap=True,
                )
            return str(folder)
        self.console.print(f"{self.name}: no checkpoint in {self.output}, starts anew")
        return None

    def _save_model(self) -> None:
        """Save a plain Hugging Face folder, LoRA merged into it and its adapter beside it."""
        output, trainer, options = self.output, self.trainer, self.options
        folder = output / "model"
        if self._use_cache is not None:  # the Trainer switches it off
            self.prepared.model.config.use_cache = self._use_cache
        if not options.uses_lora:
            trainer.save_model(str(folder))
        else:
            trainer.save_model(str(output / "adapter"))
            # merged into 4 bits, an adapter would lose its bits
            if not options.load_in_4bit and trainer.is_world_process_zero():
                merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
                merged.save_pretrained(folder)
                self.prepared.processor.save_pretrained(folder)

    def push(self) -> None:
        """Upload the saved model, or the adapter where there is nothing else."""
        hub, folder = HfApi(token=self.args.hub_token), self.output / "model"
        with as_user_error(Exception, said="the model is saved, but not pushed"):
            made = hub.create_repo(
                self.args.hub_model_id or self.output.name,
                private=self.args.hub_private_repo,
                exist_ok=True,
            )
            hub.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder if folder.exists() else self.output / "adapter",
            )
        self.console.print(f"pushed: {made}", soft_wrap=True)


def go_on_counting(early: EarlyStoppingCallback, state: TrainerState) -> None:
    """Take over the evaluations without a better one that a checkpoint has counted."""
    saved = state.stateful_callbacks.setdefault(type(early).__name__, early.state())
    for name, value in saved["attributes"].items():
        setattr(early, name, value)


def quiet_bar(trainer: Trainer) -> None:
    """Make the Trainer's bar show the loss; it would print every log as a line."""
    bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]

    def show(args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if bars[0].training_bar is not None and logs and "loss" in logs:
            bars[0].training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    if bars:
        bars[0].on_log = show


@contextmanager
def errors_of_writing(folder: Path) -> Iterator[None]:
    """Make a `UserError` of what safetensors and torch.save raise where a disk is full."""
    try:
        yield
    except Exception as error:  # torch has no class of it
        if type(error).__name__ != "SafetensorError" and "inline_container" not in str(error):
            raise
        raise UserError(f"cannot write to {folder}: {one_line(error)}") from error


@contextmanager
def stopped_by_signals(recorder: Recorder) -> Iterator[None]:
    """SIGINT and SIGTERM end the step under way and save; a second one ends the process."""
    before = {}

    def ask(number: int, _: Any) -> None:
        if recorder.signal is not None:
            raise KeyboardInterrupt
        recorder.signal = number

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(options: TrainOptions, *, dry_run: bool) -> None:
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(quiet=not first)
    output = options.output
    if not dry_run and first:
        check_run_folder(output, resume=options.resume, overwrite=options.overwrite)
    predict = ("predict",) if options.predict_file else ()
    rows = read_rows(options, ("train", "validation", *predict))
    console.print(rows.summary(), soft_wrap=True, markup=False)
    trained = Run(options, rows, name=output.name, console=console, dry_run=dry_run)
    # of a run that is resumed they were said, and its checkpoint has the weights
    for note in () if options.resume else trained.prepared.notes:
        console.print(note, soft_wrap=True, markup=False)
    if dry_run:
        console.print(str(trained.plan()), soft_wrap=True, markup=False, highlight=False)
        return
    with errors_of_writing(output):
        result = trained.train()
    summary = result["summary"]
    for line in (
        f"{result['metric_name']}: {summary['metric']:.4f}",
        f"training: {summary['train_seconds']:.1f} s",
        f"parameter updates saved: {summary['updates_saved_share']:.1%}",
        f"peak optimizer state: {summary['peak_state_bytes'] / 2**20:.1f} MiB",
        f"peak saved activations: {summary['peak_activation_bytes'] / 2**20:.1f} MiB",
        summary["packing"],
        options.graph != "off" and str(trained.callback.handle.graph_report()),
        summary["skipped_steps"]
        and f"{summary['skipped_steps']} of {summary['steps']} steps skipped: non-finite gradients",
        summary["failure"] is None
        and f"model: {output / ('adapter' if options.load_in_4bit else 'model')}",
        f"figures: {output / 'metrics.json'}",
    ):
        if line:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if summary["failure"] is not None:
        fail_learning([f"{summary['failure']}; no model was saved"])
    if options.predict_file:
        predict_rows(trained.trainer.model, trained.prepared, output / "predictions.jsonl")
        console.print(f"predictions: {output / 'predictions.jsonl'}", soft_wrap=True)
    if options.of_trainer("push_to_hub") and first:
        trained.push()


def fail_learning(reasons: Sequence[str]) -> NoReturn:
    """Exit with status 3: the training ran, and a model learnt nothing."""
    end_with(f"error: nothing was learnt: {'; '.join(reasons)}", 3)


def write_json(path: os.PathLike, content: Any) -> None:
    """Write the whole file or, if that fails, none; null stands for NaN and infinities."""
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=1, allow_nan=False, default=str)
    os.replace(partial, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
