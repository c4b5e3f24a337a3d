"""Progressive fine-tuning under the Hugging Face `Trainer`: one callback, nothing else changes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from accelerate.state import GradientState
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import MaskedOptimizer, release_frozen_state
from ..patch import PatchHandle, handle_of, patch_model
from ..schedules import AnnealedSchedule, ObservingSchedule, Schedule

# Where the Trainer's own clipping is kept while a masked optimizer clips in its place: on the
# arguments, so that a run that ended in an exception can be put right by the next one.
_PARKED = "_progtuning_max_grad_norm"
# Where the decisions of an adaptive schedule are in `state.stateful_callbacks`, which is saved. No
# name of a class: the Trainer would look for a callback of that class.
_DECISIONS = "progtuning"
_handles: weakref.WeakSet[PatchHandle] = weakref.WeakSet()  # made by callbacks, not by the user


def _inner(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _accumulates() -> bool:
    return not GradientState().sync_gradients


class ProgtuningCallback(TrainerCallback):
    """Patches the model when training begins, applies the plan before every step, unpatches.

    The optimizer is built by the Trainer over all parameters and keeps its groups; state of frozen
    parameters is released from whichever optimizer it is. The plan is a function of
    `state.global_step`, so a resumed run is where it was without anything saved; the decisions of a
    schedule that makes any are in the Trainer's own state.

        trainer = Trainer(model, args, ..., callbacks=[ProgtuningCallback(ProgressiveSchedule(3))])

    Args:
        schedule: copied; one without `total_steps` is bound to the Trainer's number of steps.
        patch_options: `frozen_mode`, `tied`, `kernels`, `cache`, `blocks` of `patch_model`.

    Raises (when training begins):
        UnsupportedModelError, ValueError: as `patch_model`.
        RuntimeError: more than one process or GPU, which this version does not support.
    """

    def __init__(self, schedule: Schedule, **patch_options: Any) -> None:
        self._given = copy.deepcopy(schedule)
        self.schedule = copy.deepcopy(schedule)
        self.handle: PatchHandle | None = None
        self._patch_options = patch_options
        self._binds = schedule.total_steps is None

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
        if args.n_gpu > 1:
            raise RuntimeError(
                f"ProgtuningCallback: the Trainer would split batches over {args.n_gpu} GPUs in "
                "one process (DataParallel), which is not supported: show it one GPU only"
            )
        self.schedule = copy.deepcopy(self._given)  # without the decisions of an earlier train()
        if self._binds:
            self.schedule.bind(state.max_steps)
        if isinstance(self.schedule, AnnealedSchedule) and not all(
            "unit" in group for group in optimizer.param_groups
        ):
            raise ValueError(
                "AnnealedSchedule needs an optimizer with a group per unit; make it first: with "
                "patch_model(model, schedule) as handle: groups = handle.param_groups(by_unit=True)"
                ", and give it to the Trainer together with its LambdaLR (optimizers=)"
            )
        self._clean_up(args, model)  # after an earlier train() that ended in an exception
        saved = state.stateful_callbacks.get(_DECISIONS) if state.global_step else None
        if isinstance(self.schedule, ObservingSchedule) and saved is not None:
            self.schedule.load_state_dict(saved["decisions"])
        # the optimizer of a resumed run has its state by now, and keeps what this plan trains
        self.handle = patch_model(
            model, self.schedule, step=state.global_step, **self._patch_options
        )
        _handles.add(self.handle)
        if isinstance(self.schedule, ObservingSchedule) and saved is not None:
            self.handle.load_state_dict(saved)
        self._release(optimizer)  # a checkpoint is older than the plan of the step that follows it
        if isinstance(_inner(optimizer), MaskedOptimizer):
            # an update inside backward waits for the last micro-batch of a window
            _inner(optimizer).accumulating = _accumulates
        if isinstance(_inner(optimizer), MaskedOptimizer) and args.max_grad_norm:
            # it clips in its own pass; the Trainer must not do it again
            _inner(optimizer).max_grad_norm = args.max_grad_norm
            setattr(args, _PARKED, args.max_grad_norm)
            args.max_grad_norm = 0.0

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
            self._release(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a checkpoint of this step may be written before the next begins
        self.handle.observe()
        self.handle.reassert()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(self.schedule, ObservingSchedule):
            saved = self.handle.state_dict()
            state.stateful_callbacks[_DECISIONS] = saved | {"step": state.global_step}

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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self._clean_up(args, model)

    @staticmethod
    def _release(optimizer: Optimizer) -> None:
        if not isinstance(_inner(optimizer), MaskedOptimizer):  # that one does as it was told
            release_frozen_state(optimizer)

    @staticmethod
    def _clean_up(args: TrainingArguments, model: nn.Module) -> None:
        handle = handle_of(model)
        if handle in _handles:
            handle.unpatch()
        if hasattr(args, _PARKED):
            args.max_grad_norm = getattr(args, _PARKED)
            delattr(args, _PARKED)
