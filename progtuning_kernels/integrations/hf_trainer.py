"""Progressive fine-tuning under the Hugging Face `Trainer`: one callback, nothing else changes."""

# pyright: reportOptionalMemberAccess=false
# the Trainer calls on_train_begin, which makes the handle, before the other hooks
from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..freezing.only import check_same_only
from ..model.call_stack import caller, caller_local
from ..model.rows import TrainedRows
from ..optim import MaskedOptimizer
from ..patch import PatchHandle, check_options, handle_of, patch_model
from ..schedules import (
    PlateauSchedule,
    Schedule,
    check_schedule,
    decides_by_score,
    decides_in_training,
    stage_count,
)
from ..zero import follow_loads
from .plan_numbers import (
    costs,
    device_of,
    inner_optimizer,
    plan_numbers,
    refuse_without_rows,
    release,
    saved_decisions,
    smaller_norm,
)
from .token_rate import TokenRate

# Where the Trainer's own clipping is kept while a masked optimizer clips in its place: on the
# arguments, so that a run that ended in an exception can be put right by the next one.
_PARKED = "_progtuning_max_grad_norm"
# Where the decisions of a schedule are in `state.stateful_callbacks`, which is saved. No name of a
# class: the Trainer would look for a callback of that class.
_DECISIONS = "progtuning"
_BEST = "progtuning_best.pt"  # in a checkpoint: the weights of the best score, which are no numbers
# Of handles that callbacks made, not the user.
_rates: weakref.WeakKeyDictionary[PatchHandle, TokenRate] = weakref.WeakKeyDictionary()
_give_norm_back: weakref.WeakKeyDictionary[PatchHandle, Callable[[], None]]
_give_norm_back = weakref.WeakKeyDictionary()
# By model: rows that callbacks have given parameters of their own, before an optimizer was made.
_held_rows: weakref.WeakKeyDictionary[nn.Module, TrainedRows] = weakref.WeakKeyDictionary()
# below transformers' root, so that its verbosity decides
logger = logging.get_logger("transformers.progtuning_kernels")


def _take_no_norm(accelerator: Accelerator) -> Callable[[], None]:
    """Leave the norm that is logged to a masked optimizer, which takes it anyway.

    A Trainer that does not clip clips at infinity for that number: a pass over all gradients more,
    4.8 of MiniLM's 240 ms per step. What is returned undoes it.
    """
    before, own = vars(accelerator).get("clip_grad_norm_"), accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        return None if max_norm == math.inf else own(parameters, max_norm, *args, **kwargs)

    def give_back() -> None:
        del accelerator.clip_grad_norm_
        if before is not None:
            accelerator.clip_grad_norm_ = before

    accelerator.clip_grad_norm_ = clip_grad_norm_
    return give_back


def _accumulates() -> bool:
    return not GradientState().sync_gradients


def _progress_bars() -> weakref.WeakSet[tqdm]:
    """All bars that are alive: the Trainer gives callbacks everything but its own."""
    return weakref.WeakSet(getattr(tqdm, "_instances", ()))


def _of_the_trainer(args: Any, given: dict[str, Any]) -> tuple[TrainingArguments, nn.Module]:
    """The arguments and the module that train; SetFit puts its own in their place."""
    args, model = given.get("st_args", args), given.get("st_model", given["model"])
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"ProgtuningCallback: this Trainer's model is a {type(model).__name__}, no nn.Module: "
            "give patch_model the module inside it, and call handle.seek(state.global_step) in "
            "on_step_begin of a callback of your own"
        )
    return args, model


def _refuse_missed_weights(trainer: Any, optimizer: Optimizer) -> None:
    """Raise for weights of a loss that got a gradient and are in no group of the optimizer."""
    loss = getattr(trainer, "loss", None)  # of a trainer of sentence-transformers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in loss.values() if isinstance(loss, dict) else [loss]:
        for name, weight in one.named_parameters() if isinstance(one, nn.Module) else ():
            if weight.grad is not None and id(weight) not in held:
                raise RuntimeError(
                    f"ProgtuningCallback: {name} of {type(one).__name__} would not train: "
                    "sentence-transformers gives optimizer_cls_and_kwargs the model's weights "
                    "alone; pass optimizers=(MaskedAdamW(loss.parameters(), ...), None) instead"
                )


def _score_of(args: TrainingArguments) -> tuple[str, Literal["min", "max"]]:
    """The name of the score, as evaluations have it, and which is better, as the Trainer does."""
    name = args.metric_for_best_model or "loss"
    greater = args.greater_is_better
    if greater is None:
        greater = not name.endswith("loss")
    return name if name.startswith("eval_") else f"eval_{name}", "max" if greater else "min"


def _follow_score(schedule: PlateauSchedule, args: TrainingArguments) -> None:
    """Have the schedule and the Trainer agree on which score is better."""
    name, mode = _score_of(args)
    if args.eval_strategy == "no":
        raise ValueError(
            f"ProgtuningCallback: {schedule!r} goes on by {name}, and the Trainer never evaluates: "
            "give TrainingArguments eval_strategy='steps' and eval_steps, or 'epoch'"
        )
    if schedule.mode not in (None, mode):
        raise ValueError(
            f"ProgtuningCallback: mode={schedule.mode!r}, and the Trainer takes {mode!r} for "
            f"{name}: give both the same (metric_for_best_model, greater_is_better)"
        )
    schedule.mode = mode


def _found_score(args: TrainingArguments, given: dict[str, Any]) -> float | None:
    """The score among the metrics of an evaluation; None if that was of other rows than it is."""
    name, metrics = _score_of(args)[0], given["metrics"]
    if name in metrics:
        return metrics[name]
    rows = getattr(caller(Trainer), "eval_dataset", None)
    sets = [f"eval_{key}_" for key in rows] if isinstance(rows, dict) else []
    own = next((prefix for prefix in sets if name.startswith(prefix)), "eval_")
    if any(key.startswith(own) for key in metrics):
        raise ValueError(
            f"ProgtuningCallback: the evaluation has no {name}, by which the schedule goes on; it "
            f"has {', '.join(metrics)}: set metric_for_best_model to one of them"
        )
    return None


def _checkpoint_of(args: TrainingArguments, step: int) -> Path:
    """The folder of the checkpoint that this run goes on from, which no attribute says."""
    found = caller_local(Trainer, "resume_from_checkpoint")
    return Path(found if isinstance(found, str) else f"{args.output_dir}/checkpoint-{step}")


class ProgtuningCallback(TrainerCallback):
    """Patches the model when training begins, applies each plan in time, unpatches it at the end.

    The optimizer is built by the Trainer over all parameters and keeps its groups; state of frozen
    parameters is released from whichever optimizer it is. The plan is a function of
    `state.global_step`, so a resumed run is where it was without anything saved; the decisions of a
    schedule that makes any are in the Trainer's own state.

    A `PlateauSchedule` gets the `metric_for_best_model` (the loss unless given) of every
    evaluation, and the Trainer stops when its last stage has ended. The weights of the best score
    are in the checkpoint folder, in `progtuning_best.pt`.

    Every log of a training loss gets `stage` (counted from 1), `boundary`, `active_share` (of what
    was trainable when training began), `state_bytes`, `peak_memory_bytes`, `real_tokens_per_second`
    and, with a cache, `cache_rows`. Trackers see them too: the callback moves before all others.
    The Trainer's progress bar says the stage, and a change of stage is one line at transformers'
    verbosity "info".

    Args:
        schedule: copied; one without `total_steps` is bound to the Trainer's number of steps.
        **patch_options: `frozen_mode`, `tied`, `only`, `kernels`, `packing`, `graph`, `cache`,
            `blocks` and `rows` of `patch_model`. The Trainer's constructor gives `rows` parameters
            of their own, which an optimizer that is made before does not hold: call `hold_rows`
            before that.

    Attributes:
        handle: the `PatchHandle` of the run under way, and after it of the last one, whose
            `packing_report()` says what packing left out; None before the first.
        schedule: the copy that plans the run.

    Raises:
        TypeError: no schedule, or an option that `patch_model` has not; when training begins, a
            model that is no `nn.Module`.
        ValueError: a value that `patch_model` does not take; when training begins, as from it, or
            another `only` than the checkpoint's, or a `PlateauSchedule` without evaluations, or
            with another `mode` than the Trainer's.
        UnsupportedModelError: when training begins, as from `patch_model`.
        RuntimeError: when training begins, as from `patch_model`, with several GPUs in one process,
            or with `torch_compile` on several processes without `attach`.

    Example:
        ```python
        trainer = Trainer(
            model,
            args,
            train_dataset=rows,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(3))],
        )
        ```
    """

    def __init__(self, schedule: Schedule, **patch_options: Any) -> None:
        check_schedule(schedule, "ProgtuningCallback")
        check_options(patch_options, "ProgtuningCallback")
        self._rows = patch_options.pop("rows", None)
        self._held: TrainedRows | None = None
        self._given = copy.deepcopy(schedule)
        self.schedule = copy.deepcopy(schedule)
        self.handle: PatchHandle | None = None
        self._patch_options = patch_options
        self._binds = schedule.total_steps is None
        self._trainer: weakref.ref[Trainer] | None = None
        self._bars_of_others = weakref.WeakSet[tqdm]()
        self._shown: int | None = None  # the stage that the progress bar shows
        self._missed_none = False  # the optimizer has all that the first backward has reached

    def attach(self, trainer: Trainer) -> None:
        """Give the callback its Trainer, which `torch_compile` on several processes needs.

        Args:
            trainer: the one that the callback was given to.
        """
        self._trainer = weakref.ref(trainer)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a model left patched by a train() that ended in an exception: put right before this
        # Trainer makes an optimizer, which is over what requires grad
        args, model = _of_the_trainer(args, kwargs)
        self._clean_up(args, model)
        self.hold_rows(model)
        if "deepspeed" in sys.modules:  # the Trainer has it load before training begins
            follow_loads(model)

    def hold_rows(self, model: nn.Module) -> TrainedRows | None:
        """Give the rows of `rows=` parameters of their own, for an optimizer that is made later.

        The Trainer's constructor calls this. Call it yourself where the optimizer is made before,
        or where the callback joins a Trainer later.

        Args:
            model: the Trainer's, without a wrapper.

        Returns:
            What `patch_model` takes as its `rows`, until the end of training.

        Raises:
            TypeError, ValueError, UnsupportedModelError: as `patch_model`.
        """
        held = _held_rows.get(model)
        if held is not None and held is not self._held:  # of a callback that trained nothing
            _held_rows.pop(model).remove()
            held = None
        if held is None and self._rows is not None:
            held = TrainedRows(model, self._rows, outlives_patch=True)
            _held_rows[model] = self._held = held
        return held

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args, model = _of_the_trainer(args, kwargs)
        optimizer = kwargs["optimizer"]
        handler = caller(CallbackHandler)
        if handler is not None and self in handler.callbacks:
            # before the trackers of `report_to`, which would send logs without what `on_log` adds;
            # the loop over the list that is under way goes on behind this place all the same
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        trainer = None if self._trainer is None else self._trainer()
        if args.world_size > 1 and args.torch_compile and trainer is None:
            raise RuntimeError(
                "ProgtuningCallback: with torch_compile on several processes it cannot find what "
                "surrounds the model: call callback.attach(trainer) after making the Trainer"
            )
        if args.n_gpu > 1:
            raise RuntimeError(
                f"ProgtuningCallback: the Trainer would split batches over {args.n_gpu} GPUs in "
                "one process (DataParallel), which is not supported: show it one GPU only"
            )
        self.schedule = copy.deepcopy(self._given)  # without the decisions of an earlier train()
        if self._binds:
            self.schedule.bind(state.max_steps)
        if isinstance(self.schedule, PlateauSchedule):
            _follow_score(self.schedule, args)
        self._clean_up(args, model)  # after an earlier train() that ended in an exception
        rows = self.hold_rows(model)
        if rows is not None:
            refuse_without_rows(optimizer, rows)
        # the optimizer of a resumed run has its state by now, and keeps what this plan trains
        self.handle = patch_model(
            model, self.schedule, step=state.global_step, rows=rows, **self._patch_options
        )
        _rates[self.handle] = TokenRate(trainer or caller(Trainer))
        if trainer is not None and trainer.model_wrapped is not None and args.world_size > 1:
            self.handle.attach(trainer.model_wrapped)
        decisions: Any = state.stateful_callbacks  # a dict by now, typed as the list it was
        saved = decisions.get(_DECISIONS) if state.global_step else None
        if state.global_step:
            check_same_only((saved or {}).get("only"), self.handle.only)
            self.handle.freezer.rows.load_state_dict((saved or {}).get("rows", {}))
        decided = saved_decisions(self.schedule, saved) if state.global_step else None
        if decided is not None:
            if decided.get("kept_best"):
                best = _checkpoint_of(args, state.global_step) / _BEST
                decided["best"] = torch.load(best, map_location="cpu", weights_only=True)
            self.handle.load_state_dict(decided)
        release(optimizer)  # a checkpoint is older than the plan of the step that follows it
        masked = inner_optimizer(optimizer)
        if isinstance(masked, MaskedOptimizer):
            # an update inside backward waits for the last micro-batch of a window
            masked.accumulating = _accumulates
            if args.max_grad_norm:
                # it clips in its own pass; the Trainer must not do it again
                masked.max_grad_norm = smaller_norm(masked, args.max_grad_norm)
                setattr(args, _PARKED, args.max_grad_norm)
                args.max_grad_norm = 0.0
            if masked.takes_norm and (trainer := trainer or caller(Trainer)) is not None:
                _give_norm_back[self.handle] = _take_no_norm(trainer.accelerator)
        self._bars_of_others = _progress_bars()  # the Trainer's is made after this
        self._shown = None
        self._missed_none = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # before the first micro-batch of a window: a change in its middle would leave gradients of
        # both plans
        if self.handle.seek(state.global_step):
            release(kwargs["optimizer"])
        if self._shown != self.handle.stage:
            self._show_stage(state)
        self._rate.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._missed_none:
            _refuse_missed_weights(caller(Trainer), kwargs["optimizer"])
            self._missed_none = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a checkpoint of this step may be written before the next begins
        self.handle.settle()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rate.trained()
        self._note_decisions(state)

    def _note_decisions(self, state: TrainerState) -> None:
        decisions: Any = state.stateful_callbacks
        if decides_in_training(self.schedule):
            saved = self.handle.state_dict() | {"step": state.global_step}
            kept = saved.pop("best", None) is not None
            decisions[_DECISIONS] = saved | ({"kept_best": True} if kept else {})
        else:  # what trains, which a resumed run is held to
            known = self.handle.state_dict()
            if chosen := {key: known[key] for key in ("only", "rows") if key in known}:
                decisions[_DECISIONS] = chosen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # SetFit gives the loss another name
        if self.handle in _rates and logs and {"loss", "learning_rate"} & logs.keys():
            optimizer = kwargs.get("optimizer")
            shown = plan_numbers(self.handle) | costs(self.handle, optimizer)
            norm = getattr(inner_optimizer(optimizer), "grad_norm", None)
            if self.handle in _give_norm_back and norm is not None:
                shown["grad_norm"] = float(norm)
            if "learning_rate" in logs:  # the Trainer's own, which all ranks make
                rate = self._rate.read(device_of(self.handle))
                shown |= {} if rate is None else {"real_tokens_per_second": round(rate, 1)}
            logs |= shown
            state.log_history[-1] |= shown  # the Trainer has copied the logs already

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle not in _rates:
            return
        own, _ = _of_the_trainer(args, kwargs)
        if decides_by_score(self.schedule) and (score := _found_score(own, kwargs)) is not None:
            self.handle.seek(state.global_step)
            self.handle.report_score(score)
            release(kwargs["optimizer"])
            self._note_decisions(state)  # a checkpoint may be written before another step
            control.should_training_stop |= self.handle.finished
        self._rate.did_not_train()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle not in _rates:
            return
        folder = Path(f"{args.output_dir}/checkpoint-{state.global_step}")
        best = self.handle.state_dict().get("best") if decides_by_score(self.schedule) else None
        if best is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(best, folder / _BEST)
        self._rate.did_not_train()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clean_up(*_of_the_trainer(args, kwargs))

    @property
    def _rate(self) -> TokenRate:
        handle: Any = self.handle
        return _rates[handle]

    def _show_stage(self, state: TrainerState) -> None:
        """Show the stage in the Trainer's progress bar, and log it as "info"."""
        self._shown = self.handle.stage
        count = stage_count(self.schedule, self.schedule.total_steps or state.max_steps)
        text = f"stage {self._shown + 1}" + (f"/{count}" if count else "")
        for bar in _progress_bars():
            if bar not in self._bars_of_others and bar.total == state.max_steps:
                bar.set_description(text)
        numbers = plan_numbers(self.handle)
        logger.info(
            f"  {text} from step {state.global_step}: boundary {numbers['boundary']} of "
            f"{self.handle.num_blocks} blocks, {numbers['active_share']:.1%} of the trainable "
            "parameters active"
        )

    @staticmethod
    def _clean_up(args: TrainingArguments, model: nn.Module) -> None:
        handle = handle_of(model)
        rate = None if handle is None else _rates.pop(handle, None)
        if handle is not None and rate is not None:
            rate.remove()
            _give_norm_back.pop(handle, lambda: None)()
            logger.info(str(handle.packing_report()))
            handle.unpatch()
            if (rows := _held_rows.pop(model, None)) is not None:
                rows.remove()
        if hasattr(args, _PARKED):
            args.max_grad_norm = getattr(args, _PARKED)
            delattr(args, _PARKED)
