"""Progressive fine-tuning under Lightning's `Trainer`: one callback, nothing else changes."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
# the environment of the tests has no Lightning; on_train_start makes the handle before other hooks
from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..freezing.only import check_same_only
from ..model.rows import TrainedRows
from ..optim import MaskedOptimizer
from ..patch import PatchHandle, check_options, handle_of, patch_model
from ..schedules import Schedule, check_schedule, decides_by_score, decides_in_training
from .plan_numbers import (
    costs,
    plan_numbers,
    refuse_without_rows,
    release,
    saved_decisions,
    smaller_norm,
)

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError:
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.utilities.model_helpers import is_overridden
    except ImportError:
        raise ImportError(
            "progtuning_kernels.integrations.lightning needs Lightning 2: pip install lightning"
        ) from None

_DECISIONS = "progtuning"  # where a checkpoint has the decisions of an adaptive schedule
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class ProgtuningCallback(Callback):
    """Patches the model inside a LightningModule when training begins, applies each plan before the
    first batch of its first optimizer step, and unpatches the model when `fit` ends.

    The optimizer is the one of `configure_optimizers`, over all parameters; state of frozen
    parameters is released. The plan is a function of `trainer.global_step`, so a run resumed by
    `ckpt_path` is where it was; the decisions of a schedule that makes any are in the checkpoint.

    Logged with every batch: `stage` (counted from 1), `boundary`, `active_share`, `state_bytes`,
    `peak_memory_bytes` and, with a cache, `cache_rows`.

    Args:
        schedule: copied; one without `total_steps` is bound to the Trainer's number of steps.
        module: name of the module to patch in the LightningModule, whose `training_step` calls it;
            None takes its only child with parameters.
        monitor: name of the logged score by which a `PlateauSchedule` goes on after every
            validation; the Trainer stops when its last stage has ended.
        **patch_options: `frozen_mode`, `tied`, `only`, `kernels`, `packing`, `graph`, `cache`,
            `blocks` and `rows` of `patch_model`. With `rows` the module is there when `setup` is
            called.

    Attributes:
        handle: the `PatchHandle` of the run under way, and after it of the last one; None before.
        schedule: the copy that plans the run.

    Raises:
        ImportError: from the import, without Lightning.
        TypeError: no schedule, or an option that `patch_model` has not.
        ValueError: a value that `patch_model` does not take, a `PlateauSchedule` without `monitor`;
            when training begins, as from `patch_model`, no single module to patch, a number of
            steps that nobody knows, or another `only` than the checkpoint's; after a validation
            that has not logged `monitor`.
        UnsupportedModelError: when training begins, as from `patch_model`.
        RuntimeError: when training begins, as from `patch_model`; several optimizers, a strategy
            that is neither one device nor DDP, or `in_backward=True` in manual optimization, with
            clipping by value or with a `configure_gradient_clipping` of the module's own.

    Example:
        ```python
        callback = ProgtuningCallback(ProgressiveSchedule(3))
        trainer = Trainer(max_epochs=3, callbacks=[callback])
        ```
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        module: str | None = None,
        monitor: str | None = None,
        **patch_options: Any,
    ) -> None:
        check_schedule(schedule, "ProgtuningCallback")
        if decides_by_score(schedule) and monitor is None:
            raise ValueError(f"ProgtuningCallback: {schedule!r} goes on by a score: give monitor=")
        check_options(patch_options, "ProgtuningCallback")
        self._given = copy.deepcopy(schedule)
        self.schedule = copy.deepcopy(schedule)
        self.handle: PatchHandle | None = None
        self._module = module
        self._monitor = monitor
        self._rows = patch_options.pop("rows", None)
        self._held: TrainedRows | None = None
        self._patch_options = patch_options
        self._saved: dict[str, Any] | None = None  # the decisions that a checkpoint has
        self._clip: float | None = None  # at what the Trainer clips where it is not asked to

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._rows is not None:  # configure_optimizers comes after this
            self._held = TrainedRows(self._find_module(pl_module), self._rows, outlives_patch=True)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(_DECISIONS)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = _the_optimizer(trainer, pl_module)
        if self._held is not None:
            refuse_without_rows(optimizer, self._held)
        self.schedule = copy.deepcopy(self._given)
        if self.schedule.total_steps is None:
            total = trainer.estimated_stepping_batches
            if math.isinf(total):
                raise ValueError(
                    "ProgtuningCallback: the Trainer's number of steps is not known: give it "
                    "max_steps or max_epochs, or the schedule its total_steps"
                )
            self.schedule.bind(total)
        module = self._find_module(pl_module)
        # the optimizer of a resumed run has its state by now, and keeps what this plan trains
        self.handle = patch_model(
            module,
            self.schedule,
            step=trainer.global_step,
            rows=self._held,
            **self._patch_options,
        )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self.handle.attach(trainer.strategy.model)
        if trainer.global_step:
            check_same_only((self._saved or {}).get("only"), self.handle.only)
            decided = saved_decisions(self.schedule, self._saved)
            if decided is not None:
                self.handle.load_state_dict(decided)
        release(optimizer)
        if isinstance(optimizer, MaskedOptimizer):
            # an update inside backward waits for the last micro-batch of a window
            optimizer.accumulating = trainer.fit_loop._should_accumulate
            norm, by_value = trainer.gradient_clip_val, _by_value(trainer)
            # it clips in its own pass, and the Trainer must not do it again
            if norm and not by_value and not _clips_by_itself(pl_module):
                optimizer.max_grad_norm = smaller_norm(optimizer, norm)
                self._clip, trainer.gradient_clip_val = norm, None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        # global_step stands still within a window of accumulation
        if self.handle.seek(trainer.global_step):
            release(trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        # a checkpoint of this step may be written before the next begins
        if trainer.global_step > self.handle.step:
            self.handle.settle()
        shown = plan_numbers(self.handle) | costs(self.handle, trainer.optimizers[0])
        pl_module.log_dict({name: float(number) for name, number in shown.items()})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # before checkpoints, whose callbacks Lightning moves behind all others
        if self.handle is None or trainer.sanity_checking or not decides_by_score(self.schedule):
            return
        if self._monitor not in trainer.callback_metrics:
            raise ValueError(
                f"ProgtuningCallback: monitor={self._monitor!r} was not logged; there are "
                f"{', '.join(trainer.callback_metrics)}"
            )
        self.handle.seek(trainer.global_step)
        self.handle.report_score(float(trainer.callback_metrics[self._monitor]))
        release(trainer.optimizers[0])
        trainer.should_stop |= self.handle.finished

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        decides = decides_in_training(self.schedule) or "only" in self._patch_options
        if decides and self.handle is not None:
            if handle_of(self.handle.model) is self.handle:
                self._saved = self.handle.state_dict() | {"step": trainer.global_step}
            checkpoint[_DECISIONS] = self._saved

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._clean_up(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._clean_up(trainer)

    def _clean_up(self, trainer: Any) -> None:
        if self.handle is not None:
            self.handle.unpatch()
        if self._held is not None:
            self._held.remove()
            self._held = None
        if self._clip is not None:
            self._clip, trainer.gradient_clip_val = None, self._clip

    def _find_module(self, pl_module: nn.Module) -> nn.Module:
        children = {
            n: m for n, m in pl_module.named_children() if next(m.parameters(), None) is not None
        }
        if self._module is None and len(children) != 1:
            raise ValueError(
                f"ProgtuningCallback: {type(pl_module).__name__} has {', '.join(children) or 'no'} "
                "modules with parameters: name the one that has the blocks, as in "
                f"ProgtuningCallback(schedule, module={next(iter(children), 'model')!r})"
            )
        name = next(iter(children)) if self._module is None else self._module
        module = pl_module.get_submodule(name)
        # Lightning calls training_step, which nobody can hook
        if module is pl_module or isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"ProgtuningCallback: {name or type(pl_module).__name__} is never called: "
                "put the blocks into a module of their own, which training_step calls"
            )
        return module


def _the_optimizer(trainer: Any, pl_module: Any) -> Optimizer:
    """The Trainer's, or an error for what would train less than the plan says."""
    kinds = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    if not any(name in kinds for name in _STRATEGIES):
        raise RuntimeError(
            f"ProgtuningCallback does not follow {kinds[0]}: use one device, or strategy='ddp'"
        )
    if len(trainer.optimizers) != 1:
        raise RuntimeError(
            f"ProgtuningCallback: {len(trainer.optimizers)} optimizers, of which each counts as a "
            "step: give configure_optimizers one, with parameter groups in the place of the others"
        )
    (optimizer,) = trainer.optimizers
    if getattr(optimizer, "in_backward", False) and not pl_module.automatic_optimization:
        raise RuntimeError(
            "ProgtuningCallback: in manual optimization nobody says which backward is the last of "
            "a step: leave in_backward=True out"
        )
    if getattr(optimizer, "in_backward", False) and (
        _clips_by_itself(pl_module) or (trainer.gradient_clip_val and _by_value(trainer))
    ):
        raise RuntimeError(
            "ProgtuningCallback: clipping by value and configure_gradient_clipping come after "
            "backward, and find no gradients: leave in_backward=True out, or clip by norm with the "
            "Trainer's gradient_clip_val"
        )
    return optimizer


def _by_value(trainer: Any) -> bool:
    return trainer.gradient_clip_algorithm == "value"


def _clips_by_itself(pl_module: Any) -> bool:
    """Whether the module decides when and how gradients are clipped."""
    return is_overridden("configure_gradient_clipping", pl_module)
