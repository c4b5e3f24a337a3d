"""`PatchHandle`: the schedule's grip on one patched model.

`p.requires_grad` is the single source of truth for "trainable": the handle has it set, optimizers
read it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from ..cache import CacheReport, PrefixCache, PrefixServer
from ..distributed import put_shards_back, shards_of
from ..graphs import Graph, GraphReport
from ..model.layout import Layout, parameter_slots
from ..model.rows import TrainedRows, trained_by_rows
from ..packing import Packing, PackingReport
from ..schedules import FreezePlan, Schedule, decides_by_score, units_by_stage, whole_number
from ..sharding import fsdp_records
from ..swaps import KernelReport, Kernels
from ..text_table import Table, as_html
from .active_set import TiedPolicy
from .boundary import FrozenMode
from .decay_groups import decay_groups
from .forwards import Forwards
from .freezer import Freezer
from .missed_steps import MissedSteps
from .missed_updates import MissedUpdates
from .only import check_same_only
from .scores import Scores
from .truncation import TruncationReport, report_truncation

_HANDLE = "_progtuning_handle"
live_handles: weakref.WeakSet[PatchHandle] = weakref.WeakSet()  # of models that are patched now


def handle_of(model: nn.Module) -> PatchHandle | None:
    """The handle of a patched model, None if it is not patched."""
    return model.__dict__.get(_HANDLE)


def _before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook. It asks the model for the handle: a copy of the model has none."""
    handle = handle_of(model)
    if handle is None or torch.compiler.is_compiling():
        return None
    return handle.forwards.before_forward(args, kwargs)


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called after an exception too: `output` is None then."""
    handle = handle_of(model)
    if handle is not None and not torch.compiler.is_compiling():
        handle.forwards.after_forward(output)


def _drop_hooks_of_a_copy(model: nn.Module) -> None:
    """A copy of a patched model has its hooks, which would call the copy's own handle twice."""
    for hooks, flags in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, model._forward_hooks_always_called),
    ):
        for key in [k for k, hook in hooks.items() if hook in (_before_forward, _after_forward)]:
            del hooks[key]
            flags.pop(key, None)


class PatchHandle:
    """Takes one patched model from stage to stage; `patch_model` returns it.

    It is a context manager, too, which unpatches the model at its end.

    Attributes:
        model: the patched model, without the wrapper that `patch_model` was given.
        schedule: the schedule that plans its steps.
        layout: how the model is cut into units.
        freezer: puts the plan in force.
        forwards: what is done around the model's forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        layout: Layout,
        *,
        frozen_mode: FrozenMode,
        tied: TiedPolicy,
        only: str | None,
        kernels: Kernels,
        packing: Packing,
        graph: Graph,
        cache: PrefixCache | None,
        rows: Mapping[str, Any] | TrainedRows | None,
        step: int,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.layout = layout
        layout.guess_unruled(model)
        self._listeners: list[Callable[[PatchHandle], object]] = []
        self._missed_steps = MissedSteps(model, layout, schedule)
        options: dict[str, Any] = {"frozen_mode": frozen_mode, "tied": tied, "kernels": kernels}
        options |= {"packing": packing, "graph": graph, "only": only}
        trained = rows if isinstance(rows, TrainedRows) else TrainedRows(model, rows)
        try:
            self.freezer = Freezer(model, layout, schedule, **options, rows=trained, step=step)
            plan = schedule.plan(step, layout.num_blocks)
            self.freezer.check_known_plans()
        except BaseException:
            if not trained.outlives_patch:
                trained.remove()
            raise
        if cache is not None:
            fixed = frozen_mode == "eval"
            self.freezer.cache = PrefixServer(model, layout, cache, fixed=fixed)
            self.freezer.packer.on_padding_read = self.freezer.cache.stop_at_padding
        self._scores = Scores(self.freezer, schedule) if decides_by_score(schedule) else None
        self._missed_updates = MissedUpdates(layout, self.freezer.active)
        self.forwards = Forwards(self.freezer, self._missed_steps, self._missed_updates)
        # they stay to the end: one that removed itself while torch iterates over the hooks after an
        # exception would hide that exception behind one of its own
        _drop_hooks_of_a_copy(model)
        self._hooks = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, always_call=True),
        ]
        model.__dict__[_HANDLE] = self
        live_handles.add(self)
        try:
            put_shards_back(model)
            self.freezer.freeze(plan, step)
            if shards_of(model):
                self.attach(model)
        except BaseException:
            self.unpatch()
            raise

    def __repr__(self) -> str:
        return (
            f"PatchHandle({type(self.model).__name__}, step={self.step}, "
            f"boundary={self.boundary} of {self.num_blocks}, {self.schedule!r})"
        )

    def _repr_html_(self) -> str:
        stages = units_by_stage(self.schedule, self.num_blocks)
        return as_html([repr(self), *[Table(stages, left=())] * bool(stages)])

    def __reduce__(self) -> tuple:
        # a copy of the model is an ordinary model: it carries None where the handle was
        return (type(None), ())

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    @property
    def step(self) -> int:
        """Optimizer steps done; `plan` is the plan of the next one."""
        return self.freezer.step

    @property
    def plan(self) -> FreezePlan:
        """The plan in force."""
        return self.freezer.plan

    @property
    def boundary(self) -> int:
        """The effective boundary: lowest block that really holds an active tensor.

        0 if the embeddings do, `num_blocks` if only the head does. It lies above `plan.boundary`
        where the user had frozen more than the plan does.
        """
        return self.freezer.boundary

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return self.layout.num_blocks

    @property
    def stage(self) -> int:
        """Index of the stage that the next step belongs to, from 0.

        Whatever people read counts stages from 1: logs, progress bars, tables and pictures.
        """
        return self.schedule.stage(self.step)

    @property
    def active_params(self) -> int:
        """Number of parameter elements that the next step updates."""
        return self.freezer.state.trainable_params

    @property
    def trainable_params(self) -> int:
        """Number of parameter elements that were trainable when the model was patched."""
        return self.freezer.active.trainable_params

    @property
    def only(self) -> str | None:
        """The regular expression that says which parameters may train; None: all."""
        return self.freezer.active.only

    @property
    def cache(self) -> PrefixServer | None:
        """Serves forwards without their prefix; None without `cache=`."""
        return self.freezer.cache

    def advance(self) -> bool:
        """Count one optimizer step; move to its successor's plan.

        Call it once per optimizer step, after `optimizer.step()`. What something else switched on
        below the boundary in the meantime (PEFT does, on leaving `disable_adapter()`) is frozen
        again, above it already before the next training forward; what was switched on where the
        plan trains is the user's own choice, and trains. What was switched off stays off until the
        plan changes, and is then taken for such a choice.

        Returns:
            True when the plan changed.

        Raises:
            RuntimeError: the model is not patched any more, its blocks are others than they were,
                a schedule that decides by gradient norms has seen none, or ranks do not train the
                same.
            ValueError: the schedule has no plan for the step, nothing would train under it, or
                AdaLoRA still moves ranks between adapters of which it freezes some.
        """
        self.freezer.end_step()
        return self.seek(self.step + 1)

    def seek(self, step: int) -> bool:
        """Go to the plan of any optimizer step, as after a resume.

        Args:
            step: number of optimizer steps done.

        Returns:
            True when the plan changed.

        Raises:
            RuntimeError: as `advance`; gradient norms are not asked for.
            ValueError: as `advance`, or a `step` that is negative or not whole.
            TypeError: a `step` that is no number.
        """
        self._check_patched()
        step = whole_number("step", step, 0)
        if step == self.step + 1:
            self._missed_updates.end_step(self.plan)
        if step != self.step:
            self._missed_steps.told(step)
        plan, before = self.schedule.plan(step, self.num_blocks), self.plan
        if self.freezer.enter_step(step, plan):
            for listener in self._listeners:
                listener(self)
        return plan != before

    def report_score(self, score: float) -> bool:
        """Tell a schedule that decides by a validation score the one of the weights as they are.

        Call it between optimizer steps, after `advance()`, on all ranks; the score of the first
        rank counts. If it ends a stage, the weights of the best score are put back (unless the
        schedule has `restore_best=False`) and the plan of the next stage is in force at once: what
        freezes loses its optimizer state, what goes on training keeps its moments. After the last
        stage `finished` is True, and nothing more changes.

        Args:
            score: a number, such as the loss of an evaluation.

        Returns:
            True when the plan changed.

        Raises:
            RuntimeError: the schedule decides by no score; the weights to put back are not there,
                as a state without them was loaded; or as `advance`.
            ValueError: as `advance`.
        """
        if self._scores is None:
            raise RuntimeError(f"{self.schedule!r} decides by no score: pass a PlateauSchedule")
        self._check_patched()
        if not self._scores.report(score):
            return False
        changed = self.seek(self.step)
        self._scores.keep()  # a stage begins with the weights of the best score
        return changed

    @property
    def finished(self) -> bool:
        """Whether a schedule that decides by a score has ended its last stage."""
        return self._scores is not None and self._scores.schedule.finished

    def settle(self) -> None:
        """Call this before a checkpoint that is written between `optimizer.step()` and `advance`.

        A schedule that decides by gradient norms gets those of the step just made; what was
        switched on below the boundary is frozen again, and frozen parameters lose their gradients.
        `advance` does the same. Calling it again does nothing.

        Raises:
            RuntimeError: the model is not patched any more, or a schedule that decides by gradient
                norms has seen none.
        """
        self._check_patched()
        self.freezer.end_step()
        self.freezer.rows.end_step(written=True)
        self.freezer.freeze_again()

    def _check_patched(self) -> None:
        if handle_of(self.model) is not self:
            raise RuntimeError("the model is not patched any more: call patch_model again")

    def attach(self, wrapped: nn.Module, *, timeout: timedelta | None = None) -> PatchHandle:
        """Tell the handle what surrounds the model on several processes, after wrapping it.

        Every change of plan then keeps it right before the first forward of the stage: DDP's
        gradient buckets are built anew over the active tensors, FSDP2 stops gathering weights that
        backward does not reach, ZeRO partitions the active tensors, and ranks compare what they
        train. The first training forward finds a DDP, FSDP2 or DeepSpeed by itself; call this where
        that forward is compiled as a whole (`torch.compile` around DDP), or to set the timeout. All
        ranks call it at the same place.

        Args:
            wrapped: the `DistributedDataParallel` or `DeepSpeedEngine` around the model, the
                sharded model, any of them inside `torch.compile`; the model itself where there is
                one process.
            timeout: how long a rank waits for the others at a change of plan; None: as long as the
                process group waits in a collective.

        Returns:
            The handle itself.

        Raises:
            ValueError: `wrapped` does not hold the model.
            UnsupportedModelError: FSDP1, ZeRO-3 or DataParallel, what DeepSpeed has beside ZeRO-1
                and ZeRO-2.
            RuntimeError: the ranks do not train the same. So do `advance()` and `seek()` later.
        """
        self.freezer.attach(wrapped, timeout)
        return self

    def on_change(self, listener: Callable[[PatchHandle], object]) -> None:
        """Have `listener(handle)` called whenever `advance` or `seek` has set the flags anew.

        Args:
            listener: called after every change of plan, and after one of the model's modules.
        """
        self._listeners.append(listener)

    def param_groups(
        self,
        lr: float | None = None,
        weight_decay: float | None = None,
        *,
        by_unit: bool = False,
    ) -> list[dict[str, Any]]:
        """Two groups over all parameters, frozen ones included: they never change afterwards.

        `param_names` of a group tells an optimizer that updates inside backward what a block is.
        Of a tensor that `rows` names, the rows that train are in its place.

        Args:
            lr: learning rate to write into the groups; None leaves it to the optimizer.
            weight_decay: decay of the first group, which holds matrices; None leaves it to the
                optimizer. Biases and norm weights (one dimension or none) are in the second,
                without decay.
            by_unit: up to two groups per unit instead, each with its number in "unit" (-1 the
                embeddings, 0..L-1 the blocks, L the head), for rates that differ between units.
                What several units use is in the one that it freezes with. An update of more than 8
                groups takes more than one call.

        Returns:
            Groups with "params", "param_names", "weight_decay" and "lr" as far as they are set; a
            group without parameters is left out.
        """
        slots = [
            slot
            for slot in parameter_slots(self.model, self.layout)
            if not trained_by_rows(slot.owner, slot.attribute)
        ]
        records = fsdp_records(self.model)
        shards = {  # a forward, also one that has raised, may leave gathered weights in their place
            id(s.parameter): records[place].sharded_param
            for s in slots
            if (place := (id(s.owner._parameters), s.attribute)) in records
        }
        held = [shards.get(id(slot.parameter), slot.parameter) for slot in slots]
        names = {id(p): slot.name for p, slot in zip(held, slots, strict=True)}
        if by_unit:
            units = [self.freezer.active.freezes_with(slot) for slot in slots]
            groups = []
            for unit in self.layout.units:
                own = [p for p, freezes in zip(held, units, strict=True) if freezes == unit]
                groups += [{**group, "unit": unit} for group in decay_groups(own, weight_decay)]
        else:
            groups = decay_groups(held, weight_decay)
        self.freezer.give(held)
        for group in groups:
            group["param_names"] = [names[id(p)] for p in group["params"]]
            if lr is not None:
                group["lr"] = lr
        return groups

    def truncation_report(self) -> TruncationReport:
        """Per unit: parameters, active ones, autograd nodes and bytes saved by the last forward.

        The last training forward is run once more, on the same inputs, with counters attached:
        training itself is never slowed down by counting, and its random numbers stay as they were.

        Raises:
            RuntimeError: the blocks are others than they were when the model was patched.
        """
        self.freezer.check_structure()
        return report_truncation(self.freezer, self.forwards.count_last())

    def cache_report(self) -> CacheReport:
        """What the prefix cache did in the stage at hand, and why it did not do more.

        Raises:
            RuntimeError: the model was patched without a cache.
        """
        if self.cache is None:
            raise RuntimeError("there is no cache: patch_model(model, schedule, cache=...)")
        return self.cache.report()

    def kernel_report(self) -> KernelReport:
        """Which modules run freeze-aware ops, which keep their own forward, and why."""
        return self.freezer.swaps.report

    def packing_report(self) -> PackingReport:
        """The share of padding that forwards since patching have left out, and why not more."""
        return self.freezer.packer.report()

    def graph_report(self) -> GraphReport:
        """What was captured of the training forwards, and why not more."""
        return self.freezer.graphs.report()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the plan is a function of the step, and of the decisions
        of a schedule that makes any. Numbers, strings, lists and dicts only, and tensors under
        "best", the weights of the best score of one that puts them back.
        """
        state = {
            "format": 1,
            "step": self.step,
            "num_blocks": self.num_blocks,
            "schedule": repr(self.schedule),
        }
        if self.only is not None:
            state["only"] = self.only
        if padded := self.freezer.packer.state_dict():
            state["padded"] = padded
        if rows := self.freezer.rows.state_dict():
            state["rows"] = rows
        if costs := self.freezer.swaps.state_dict():
            state["call_costs"] = costs
        if (norms := self.freezer.norms) is not None:
            state["decisions"] = norms.schedule.state_dict()
            state["gradient_norms"] = norms.state_dict()
        if self._scores is not None:
            state["decisions"] = self._scores.schedule.state_dict()
            state |= self._scores.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the step of a saved run; weights and optimizer state are loaded on their own.

        Args:
            state: what `state_dict` has returned.

        Raises:
            ValueError: the state belongs to a model, a schedule or an `only` other than this one,
                or its step has no plan.
            RuntimeError: as `seek`.
        """
        if state.get("format") != 1:
            raise ValueError(f"not the state of a PatchHandle: format {state.get('format')!r}")
        if state["num_blocks"] != self.num_blocks:
            raise ValueError(
                f"saved for a model of {state['num_blocks']} blocks, this one has {self.num_blocks}"
            )
        if state["schedule"] != repr(self.schedule):
            raise ValueError(f"saved under {state['schedule']}, this run has {self.schedule!r}")
        check_same_only(state.get("only"), self.only)
        self.freezer.rows.load_state_dict(state.get("rows", {}))
        if self._scores is not None:
            self._scores.schedule.load_state_dict(state["decisions"])
            self._scores.best = state.get("best")
        if (norms := self.freezer.norms) is not None:
            norms.schedule.load_state_dict(state["decisions"])
        self.freezer.packer.load_state_dict(state.get("padded", {}))
        self.freezer.load_call_costs(state.get("call_costs", {}))
        self.seek(state["step"])
        if norms is not None:
            norms.load_state_dict(state["gradient_norms"])

    def unpatch(self) -> None:
        """Put the model back as it was found, but for what the user froze in the meantime.

        Calling it again does nothing.
        """
        if handle_of(self.model) is not self:
            return
        if sys.exc_info()[0] is None:  # else other ranks need not have come to an end
            self.freezer.rows.end_step()
            if self._scores is not None:
                self._scores.end()
        self.freezer.rows.synchronise()
        self.freezer.restore_model()
        for hook in self._hooks:
            hook.remove()
        self.forwards.end_proof()
        self.forwards.last = None
        self._listeners.clear()
        del self.model.__dict__[_HANDLE]
        live_handles.discard(self)
        self.freezer.release_wrapper()
