"""What metrics.json says of a run: noted by a callback while the Trainer trains."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..freezing.unit_use import measure_forward
from ..integrations.hf_trainer import ProgtuningCallback
from ..model.layout import EMBEDDINGS, parameter_slots
from ..optim import state_bytes
from ..random_state import random_state_kept
from ..schedules import FreezePlan, Schedule, stage_count

if TYPE_CHECKING:
    from .train import Run

# of `state.stateful_callbacks`, which every checkpoint keeps
RECORD = "progtuning_run"


class Recorder(TrainerCallback):
    """Notes stages and evaluations, asks for one at the end of a stage, and says what it saw."""

    def __init__(self, run: Run, callback: ProgtuningCallback | None) -> None:
        self.stages: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.updates = 0
        self.signal: int | None = None  # that asked the run to stop
        self._run, self._callback = run, callback
        self._tokens = run.tokens_by_step()
        self._step_ms: list[float] = []  # of the stage
        self._mark = 0.0  # when the last step ended, or what is no training after it
        self._packed_before = 0, 0  # places and tokens of the stages before
        self._next_line = 0
        self._rate = 0.0

    @property
    def schedule(self) -> Schedule:
        """The one with the decisions of the run, if it makes any."""
        return self._run.schedule if self._callback is None else self._callback.schedule

    @property
    def train_seconds(self) -> float:
        return sum(stage["train_seconds"] for stage in self.stages)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved: Any = state.stateful_callbacks
        if state.global_step and RECORD in saved:
            stored = saved[RECORD]
            self.stages, self.evaluations = stored["stages"], stored["evaluations"]
            self.updates = stored["updates"]
            self._say(state, f"goes on after step {state.global_step} of {state.max_steps}")
        self._next_line = state.global_step
        self._mark = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # of the head, where units have rates of their own; the Trainer logs that of the first
        self._rate = kwargs["lr_scheduler"].get_last_lr()[-1]
        stage = self.schedule.stage(state.global_step)
        if self.stages and self.stages[-1]["stage"] == stage:
            return
        started = time.perf_counter()
        self._step_ms = []
        self.stages.append(self._describe(stage, state.global_step + 1))
        if (handle := self._handle) is not None:
            report = handle.packing_report()
            self._packed_before = report.places, report.tokens
        self._mark += time.perf_counter() - started

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._step_ms and "gradient_bytes" not in self.stages[-1]:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self.stages[-1]["gradient_bytes"] = sum(g.nbytes for g in grads)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage, step = self.stages[-1], state.global_step
        last = step == state.max_steps or control.should_training_stop
        ends = last or self.schedule.stage(step) != stage["stage"]
        if ends and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)  # the stage's seconds are the device's
        elapsed = time.perf_counter() - self._mark
        self._step_ms.append(elapsed * 1e3)
        self.updates += stage["active_params"]
        stage["train_seconds"] += elapsed
        stage["tokens"] += self._tokens[step - 1]
        if len(self._step_ms) == 1:
            stage["state_bytes"] = state_bytes(kwargs["optimizer"])
        if ends:
            self._finish(step)
            since = step - (self.evaluations[-1]["step"] if self.evaluations else 0)
            if self._run.evaluates_stages and (last or since >= state.max_steps // 24):
                control.should_evaluate = True
                # the best can be loaded in the end if it was saved
                control.should_save |= args.load_best_model_at_end
        if self._stop_asked(args, step):
            control.should_save = control.should_training_stop = True
        saved: Any = state.stateful_callbacks
        saved[RECORD] = {
            "stages": self.stages,
            "evaluations": self.evaluations,
            "updates": self.updates,
            "identity": self._run.identity(),
        }
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "learning_rate" in logs:
            state.log_history[-1]["learning_rate"] = self._rate
        if logs and "loss" in logs and state.global_step >= self._next_line:
            self._next_line = state.global_step + max(1, state.max_steps // 10)
            if not self._run.console.is_terminal:  # a terminal has a bar
                speed = logs.get("real_tokens_per_second")
                shown = f", {speed:,.0f} tokens/s" if speed else ""
                self._say(
                    state,
                    f"step {state.global_step}/{state.max_steps}{self._stage_text()}, "
                    f"loss {float(logs['loss']):.4f}{shown}",
                )
        self._mark = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        if self.stages and state.global_step:
            figures = self._run.figures_of(metrics)
            self.evaluations.append(
                {
                    "step": state.global_step,
                    "stage": self.stages[-1]["stage"],
                    **figures,
                    "train_seconds": self.train_seconds,
                }
            )
            self.stages[-1] |= {key: figures[key] for key in ("metric", "loss")}
            ends = self.schedule.stage(state.global_step) != self.stages[-1]["stage"]
            ends |= control.should_training_stop  # early
            if ends and self.stages[-1].get("last_step") != state.global_step:
                self._finish(state.global_step)
            shown = ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if k != "metric")
            self._say(state, f"step {state.global_step}{self._stage_text()}: {shown}")
        self._mark = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stages and "last_step" not in self.stages[-1]:  # stopped early
            self._finish(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    @property
    def _handle(self) -> Any:
        return None if self._callback is None else self._callback.handle

    def _say(self, state: TrainerState, text: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(f"{self._run.name}: {text}")  # above a bar

    def _stage_text(self) -> str:
        if self._callback is None:
            return ""
        count = stage_count(self.schedule, self.schedule.total_steps)
        return f", stage {self.stages[-1]['stage'] + 1}" + (f"/{count}" if count else "")

    def _stop_asked(self, args: TrainingArguments, step: int) -> bool:
        """Whether a signal came; several processes agree on it every tenth step."""
        if args.world_size == 1:
            return self.signal is not None
        if step % 10:
            return False
        flag = torch.tensor([self.signal or 0], device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self.signal = int(flag) or None
        return self.signal is not None

    def _describe(self, stage: int, first_step: int) -> dict[str, Any]:
        """The record of a stage that begins; its widest batch shows what a forward saves."""
        prepared, handle = self._run.prepared, self._handle
        batch = prepared.batch(self._run.widest_rows())
        layout = prepared.layout
        model = self._run.trainer.model
        model.train()  # an evaluation may have gone before
        plan = FreezePlan.from_boundary(0, layout.num_blocks, embeddings=True)
        plan = plan if handle is None else handle.plan
        cache = None if handle is None else handle.cache
        dtype = torch.bfloat16 if prepared.args.bf16 else torch.float16
        autocast = torch.autocast(
            prepared.args.device.type, dtype, enabled=prepared.args.bf16 or prepared.args.fp16
        )
        with autocast, nullcontext() if cache is None else cache.paused():
            if handle is not None and not handle.forwards.last:  # which tries packing, uncounted
                with random_state_kept(model):
                    model(**batch)
            uses = measure_forward(model, layout, (), batch).values()
        # LoRA leaves the embeddings and most of the head frozen, whatever the plan says of them
        trained = [s for s in parameter_slots(model, layout) if s.parameter.requires_grad]
        active = {unit for slot in trained for unit in slot.units}
        return {
            "stage": stage,
            "boundary": plan.boundary if handle is None else handle.boundary,
            "embeddings": plan.embeddings and EMBEDDINGS in active,
            "trainable": [on and i in active for i, on in enumerate(plan.trainable)],
            "head": plan.head and layout.head in active,
            "first_step": first_step,
            "active_params": sum(slot.parameter.numel() for slot in trained),
            "saved_bytes": sum(use.saved_bytes for use in uses),
            "activation_bytes": sum(use.activation_bytes for use in uses),
            "train_seconds": 0.0,
            "tokens": 0,
        }

    def _finish(self, step: int) -> None:
        stage, handle = self.stages[-1], self._handle
        stage |= {
            "last_step": step,
            "step_ms_median": statistics.median(self._step_ms),
            "tokens_per_second": stage["tokens"] / stage["train_seconds"],
        }
        if handle is None:
            return
        if handle.cache is not None:
            stage["cache"] = dataclasses.asdict(handle.cache_report())
        report = handle.packing_report()
        places, tokens = (
            now - before
            for now, before in zip((report.places, report.tokens), self._packed_before, strict=True)
        )
        # of the places of the stage's packed batches; 0 where none was packed
        stage["padding_skipped_share"] = 1 - tokens / places if places else 0.0

    def failure(self, state: TrainerState, skipped_steps: int) -> str | None:
        """Why the run learnt nothing, in words; None if it learnt something."""
        loss = self.evaluations[-1]["loss"] if self.evaluations else 0.0
        if not math.isfinite(loss):
            return f"the validation loss is {loss} after the last step"
        logged = [float(log["loss"]) for log in state.log_history if "loss" in log]
        infinite = sum(not math.isfinite(value) for value in logged) / max(1, len(logged))
        lost = max(round(infinite * state.global_step), skipped_steps)
        if 2 * lost >= state.global_step:
            return (
                f"in {lost} of {state.global_step} steps the loss or its gradients were not finite"
            )
        return None
