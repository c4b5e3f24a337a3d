"""Progressive fine-tuning under the Hugging Face `Trainer`: one callback, nothing else changes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import MaskedOptimizer, release_frozen_state
from ..patch import PatchHandle, handle_of, patch_model
from ..schedules import Schedule


class ProgtuningCallback(TrainerCallback):
    """Patches the model when training begins, applies the plan before every step, unpatches.

    The optimizer is built by the Trainer over all parameters and keeps its groups; state of frozen
    parameters is released from whichever optimizer it is. The plan is a function of
    `state.global_step`, so a resumed run is where it was without anything saved.

        trainer = Trainer(model, args, ..., callbacks=[ProgtuningCallback(ProgressiveSchedule(3))])

    Args:
        schedule: one without `total_steps` is bound to the Trainer's number of steps.
        patch_options: `frozen_mode`, `tied`, `blocks` of `patch_model`.

    Raises (when training begins):
        UnsupportedModelError, ValueError: as `patch_model`.
        RuntimeError: more than one process, which this version does not support.
    """

    def __init__(self, schedule: Schedule, **patch_options: Any) -> None:
        self.schedule = schedule
        self.handle: PatchHandle | None = None
        self._patch_options = patch_options
        self._binds = schedule.total_steps is None
        self._max_grad_norm: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1:
            raise RuntimeError(
                f"ProgtuningCallback: {args.world_size} processes; this version trains in one "
                "process only (gradient buckets are not rebuilt when the plan changes)"
            )
        if self._binds:
            self.schedule.bind(state.max_steps)
        if self.handle is not None and handle_of(model) is self.handle:
            self.handle.unpatch()  # an earlier train() ended in an exception
        self.handle = patch_model(model, self.schedule, **self._patch_options)
        self.handle.seek(state.global_step)
        release_frozen_state(optimizer)
        self._take_over_clipping(args, optimizer)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        # before the first micro-batch of a window: a change in its middle would leave gradients of
        # both plans
        if self.handle.seek(state.global_step):
            release_frozen_state(optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and self.handle is not None:
            logs["stage"] = self.schedule.stage(max(0, state.global_step - 1))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None
        self.handle.unpatch()

    def _take_over_clipping(self, args: TrainingArguments, optimizer: Optimizer) -> None:
        """Let a masked optimizer clip in its own pass, and keep the Trainer from doing it again."""
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if isinstance(inner, MaskedOptimizer) and args.max_grad_norm:
            inner.max_grad_norm = self._max_grad_norm = args.max_grad_norm
            args.max_grad_norm = 0.0
