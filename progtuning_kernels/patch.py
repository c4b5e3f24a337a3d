"""`patch_model`: makes one model instance train what its schedule says, reversibly.

`p.requires_grad` is the single source of truth for "trainable": the handle sets it, optimizers read
it. Nothing here touches a class or a module of another library.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from torch import nn

from . import freeze_events
from .cache import CacheReport, PrefixCache, PrefixServer, automatic_cache
from .distributed import Wrapper, refuse_flat_parameters, shards_of, surrounding, unwrap
from .freezing.active_set import ActiveSet, TiedPolicy
from .freezing.boundary import Boundary, FrozenMode
from .freezing.checkpointing import drop_input_grads, make_nonreentrant
from .freezing.gradient_norms import GradientNorms
from .freezing.gradient_paths import GradientPaths
from .freezing.missed_steps import MissedSteps
from .freezing.truncation import TruncationReport, UnitReport, measure_forward
from .model.adapters import adapter_configs, check_adapters, rank_allocation_end
from .model.derived_classes import without_derived_ancestors
from .model.families import UnsupportedModelError
from .model.layout import EMBEDDINGS, Layout, find_layout, parameter_slots
from .model.structure import Structure
from .schedules import FreezePlan, ObservingSchedule, Schedule, check_schedule, whole_number
from .swaps import KernelReport, Kernels, KernelSwaps

_HANDLE = "_progtuning_handle"
_live: weakref.WeakSet[PatchHandle] = weakref.WeakSet()  # of models that are patched now


def _with_own_containers(value: Any, *, clone: bool = False) -> Any:
    """A copy that shares every tensor, unless they are cloned too: models write into the dict that
    they are called with, and some into its tensors.
    """
    if isinstance(value, torch.Tensor):
        return value.clone() if clone else value
    if isinstance(value, tuple):
        items = [_with_own_containers(item, clone=clone) for item in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, MutableMapping | list):
        pairs = list(value.items() if isinstance(value, MutableMapping) else enumerate(value))
        value = copy.copy(value)
        for key, item in pairs:
            value[key] = _with_own_containers(item, clone=clone)
    return value


@dataclass(frozen=True)
class _Forward:
    """The inputs of a training forward as they were before it, so that a report can repeat it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None  # device type and dtype, None where it was off

    def context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        device_type, dtype = self.autocast
        return torch.autocast(device_type, dtype=dtype)


def _before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook. It finds the handle through the model: a copy of the model has none."""
    handle = handle_of(model)
    if handle is None or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled():
        handle.follow_user()
    cache = handle.cache
    if cache is not None:
        kwargs = cache.before_forward(args, kwargs, proved=handle.proved)
        if cache.busy:
            return args, kwargs
    handle.end_proof()  # torch calls no hook after a KeyboardInterrupt
    if torch.is_grad_enabled():
        _before_training_forward(handle, args, kwargs)
    if cache is not None:
        cache.install()
    return args, kwargs


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called after an exception too: `output` is None then.

    There is one, for good: torch calls such hooks while it iterates over them, and one that took
    itself away there would hide the error of the forward behind one of its own.
    """
    handle = handle_of(model)
    if handle is None or torch.compiler.is_compiling():
        return
    if handle.cache is not None:
        if handle.cache.busy:
            return
        handle.cache.after_forward(raised=output is None)
    handle.end_proof(output)


def _before_training_forward(
    handle: PatchHandle, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    handle.before_training_forward((args, kwargs))
    device_type, autocast = handle.device_type, None
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        autocast = (device_type, torch.get_autocast_dtype(device_type))
    handle.last_forward = _Forward(*_with_own_containers((args, kwargs)), autocast)


class PatchHandle:
    """What `patch_model` returns: the schedule's grip on one model. Also a context manager.

    Attributes:
        model: the patched model, without the wrapper that `patch_model` was given.
        schedule: the schedule that plans its steps.
        layout: how the model is cut into units.
        step: optimizer steps done; `plan` is the plan of the next one.
        plan: the plan in force.
        boundary: the effective boundary: lowest block that really holds an active tensor (0 if the
            embeddings do, `num_blocks` if only the head does). It lies above `plan.boundary` where
            the user had frozen more than the plan does.
        device_type: where the model's parameters are, "cpu" or "cuda".
        last_forward: inputs of the last training forward, held for `truncation_report`.
        proved: whether a forward under the plan in force has shown that nothing is cut off.
        cache: serves forwards without their prefix; None without `cache=`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        layout: Layout,
        *,
        frozen_mode: FrozenMode,
        tied: TiedPolicy,
        kernels: Kernels,
        cache: PrefixCache | None,
        step: int,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.layout = layout
        self.step = step
        self.boundary = 0
        # head until a forward shows a unit that is computed from them: so nothing is cut off, and
        # no state of a resumed run is dropped, on a guess
        layout.found.update(dict.fromkeys(layout.unruled(model), layout.head))
        self._structure = Structure(model, layout)
        self._active = ActiveSet(model, layout, tied)
        self._boundary = Boundary(model, layout, frozen_mode)
        self._kernels = KernelSwaps(model, layout, kernels)
        self._listeners: list[Callable[[PatchHandle], None]] = []
        self._missed = MissedSteps(model, layout, schedule)
        self._frozen: set[int] = set()  # units that hold no active tensor
        self.proved = False
        self._paths: GradientPaths | None = None  # of the forward that proves
        # what was changed for checkpointing, to be put back: see freezing/checkpointing.py
        self._embeddings_frozen = False
        self._reentrant: list[tuple[nn.Module, Any, Any]] = []
        self._input_grads: list[nn.Module] = []
        self.last_forward: _Forward | None = None
        self._wrapper: Wrapper | None = None
        self._norms: GradientNorms | None = None
        if isinstance(schedule, ObservingSchedule):
            self._norms = GradientNorms(model, layout, schedule)
            self._norms.begin(step)

        self.plan = schedule.plan(step, layout.num_blocks)
        self._look_at_adapters()
        for step, plan in self._plans_to_check():
            self._check_plan(step, plan)
        self.device_type = self._active.device.type
        self.cache: PrefixServer | None = None
        if cache is not None:
            self.cache = PrefixServer(model, layout, cache, fixed=frozen_mode == "eval")
        self._hooks = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, always_call=True),
        ]
        model.__dict__[_HANDLE] = self
        _live.add(self)
        try:
            self._kernels.follow(self._active.device)
            self._apply()
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

    def __reduce__(self) -> tuple:
        # a copy of the model is an ordinary model: it carries None where the handle was
        return (type(None), ())

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks

    @property
    def stage(self) -> int:
        """Index of the stage that the next step belongs to."""
        return self.schedule.stage(self.step)

    @property
    def active_params(self) -> int:
        """Number of parameters that the next step updates."""
        return self._active.active_params(self.plan)

    @property
    def trainable_params(self) -> int:
        """Number of parameters that were trainable when the model was patched."""
        return self._active.trainable_params

    def advance(self) -> bool:
        """Count one optimizer step; move to its successor's plan.

        Call it once per optimizer step, after `optimizer.step()`. What something else switched on
        below the boundary in the meantime (PEFT does, on leaving `disable_adapter()`) is frozen
        again; what was switched on where the plan trains is the user's own choice, and trains. What
        was switched off stays off until the plan changes, and is then taken for such a choice.

        Returns:
            True when the plan changed.

        Raises:
            RuntimeError: the model is not patched any more, its blocks are others than they were,
                or a schedule that decides by gradient norms has seen none.
        """
        self.observe()
        return self.seek(self.step + 1)

    def observe(self) -> None:
        """Let a schedule that decides by gradient norms have those of the step just made.

        `advance` does it; a checkpoint written between `optimizer.step()` and `advance()`, or a
        loop that moves by `seek`, wants this call before it. Calling it again does nothing.
        """
        if self._norms is not None:
            self._norms.end()

    def seek(self, step: int) -> bool:
        """Jump to the plan of optimizer step `step`, as after a resume; True when it changed."""
        if handle_of(self.model) is not self:
            raise RuntimeError("the model is not patched any more: call patch_model again")
        step = whole_number("step", step, 0)
        self._missed.told(step)
        plan = self.schedule.plan(step, self.num_blocks)
        changed = plan != self.plan
        rebuilt = self._rebuilt
        if rebuilt:
            self._take_in_changes()
        if changed or rebuilt:
            self._check_plan(step, plan)
        self.step, self.plan = step, plan
        if self._norms is not None:
            self._norms.begin(step)
        if changed or rebuilt:
            self._apply()
            for listener in self._listeners:
                listener(self)
        else:
            self.reassert()
        return changed

    def settle(self) -> None:
        """Call this before a checkpoint that is written between `optimizer.step()` and `advance()`.

        A schedule that decides by gradient norms gets those of the step just made; what was
        switched on below the boundary is frozen again, and frozen parameters lose their gradients.
        `advance` does the same. Calling it again does nothing.

        Raises:
            RuntimeError: a schedule that decides by gradient norms has seen none.
        """
        self.observe()
        self.reassert()

    def reassert(self) -> None:
        """Put back what changed behind the plan; `advance` and `seek` do it.

        Freezes what was switched on below the boundary, drops gradients of frozen parameters, and
        restores the columns of frozen blocks in the table of prefix tuning, which momentum and
        decay of the whole table move. A checkpoint written between `optimizer.step()` and
        `advance()` wants this call before it.
        """
        if not self.follow_switches():
            self._active.reassert()

    def attach(self, wrapped: nn.Module, *, timeout: timedelta | None = None) -> PatchHandle:
        """Tell the handle what surrounds the model on several processes, after wrapping it.

        Every change of plan then keeps it right before the first forward of the stage: DDP's
        gradient buckets are built anew over the active tensors, FSDP2 stops gathering weights that
        backward does not reach, and ranks compare what they train. The first training forward
        finds a DDP or FSDP2 by itself; call this where that forward is compiled as a whole
        (`torch.compile` around DDP), or to set the timeout. All ranks call it at the same place.

        Args:
            wrapped: the `DistributedDataParallel` around the model, the sharded model, either
                inside `torch.compile`; the model itself where there is one process.
            timeout: how long a rank waits for the others at a change of plan; None: as long as the
                process group waits in a collective.

        Returns:
            The handle itself.

        Raises:
            ValueError: `wrapped` does not hold the model.
            UnsupportedModelError: FSDP1, DeepSpeed or DataParallel; FSDP2 with a prefix cache.
            RuntimeError: the ranks do not train the same. So do `advance()` and `seek()` later.
        """
        wrapper = Wrapper(self.model, self.layout, wrapped, timeout=timeout)
        if wrapper.sharded and self.cache is not None:
            raise UnsupportedModelError(
                "a prefix cache takes blocks out of the model, which fully_shard gathers all the "
                "same: patch without cache=, or use DistributedDataParallel"
            )
        self._wrapper = wrapper
        if self._norms is not None:
            self._norms.reduced_at_end = wrapper.ddp is not None
            self._norms.sharded = wrapper.sharded
        if self._wrapper.sharded:
            self._put_on_shards()
        self._wrapper.follow(step=self.step, boundary=self.boundary)
        return self

    def accept_weights(self) -> None:
        """Weights have been loaded: frozen columns are not put back over them.

        That concerns the table of prefix tuning alone, which `reassert` restores after every step.
        """
        self._active.hold_columns(self.plan)

    def on_change(self, listener: Callable[[PatchHandle], None]) -> None:
        """Call `listener(handle)` after every change of plan."""
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

        Args:
            lr: learning rate to write into the groups; None leaves it to the optimizer.
            weight_decay: decay of the first group, which holds matrices; None leaves it to the
                optimizer. Biases and norm weights (one dimension or none) are in the second,
                without decay.
            by_unit: up to two groups per unit instead, each with its number in "unit" (-1 the
                embeddings, 0..L-1 the blocks, L the head), for rates that differ between units.
                What several units use is in the one that it freezes with. An update of more than 8
                groups takes more than one call.
        """
        slots = list(parameter_slots(self.model, self.layout))
        names = {id(slot.parameter): slot.name for slot in slots}
        if by_unit:
            groups = []
            for unit in self.layout.units:
                own = [s.parameter for s in slots if self._active.freezes_with(s) == unit]
                groups += [{**g, "unit": unit} for g in decay_groups(own, weight_decay)]
        else:
            groups = decay_groups([slot.parameter for slot in slots], weight_decay)
        for group in groups:
            group["param_names"] = [names[id(p)] for p in group["params"]]
        if lr is not None:
            for group in groups:
                group["lr"] = lr
        return groups

    def truncation_report(self) -> TruncationReport:
        """Per unit: parameters, active ones, autograd nodes and bytes saved by the last forward.

        The last training forward is run once more, on the same inputs, with counters attached:
        training itself is never slowed down by counting, and its random numbers stay as they were.
        """
        if self._rebuilt:
            self._structure.check()
        uses = {}
        if (last := self.last_forward) is not None:
            with last.context(), nullcontext() if self.cache is None else self.cache.paused():
                paths = self._watch_paths(compiled=True)
                try:
                    args, kwargs = _with_own_containers((last.args, last.kwargs), clone=True)
                    uses = measure_forward(
                        self.model, self.layout, args, kwargs, boundary=self.boundary
                    )
                finally:
                    paths.remove()
                    self.last_forward = last  # not the clones
        params = dict.fromkeys(self.layout.units, 0)
        active = dict(params)
        names: dict[int, list[str]] = {unit: [] for unit in params}
        tied = []
        for slot in parameter_slots(self.model, self.layout):
            # counted once, however many units use it
            unit = max(slot.home, self.boundary) if slot.sliced else slot.home
            params[unit] += slot.parameter.numel()
            if slot.parameter.requires_grad:
                active[unit] += self._active.active_size(slot, self.plan)
                names[unit].append(slot.name)
            if len(slot.units) > 1:
                tied.append(self._active.explain(slot, self.plan))
        return TruncationReport(
            units=tuple(
                UnitReport(
                    self.layout.unit_label(u), params[u], active[u], uses.get(u), tuple(names[u])
                )
                for u in params
            ),
            boundary=self.boundary,
            tied=tuple(tied),
            kernels=self._kernels.report.summary(),
            cache=None if self.cache is None else self.cache.report().summary(),
        )

    def prefetch(self, **batch: Any) -> None:
        """Tell the prefix cache which batch comes next, where the loop knows: it starts reading.

        Call it under the autocast that the model will be called under. Without a cache, or where
        nothing of the batch is stored, it does nothing.

        Args:
            batch: the model's arguments, best still on the CPU.
        """
        if self.cache is not None:
            self.cache.prefetch(batch)

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
        return self._kernels.report

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the plan is a function of the step, and of the decisions
        of a schedule that makes any. Numbers, strings, lists and dicts only.
        """
        state = {
            "format": 1,
            "step": self.step,
            "num_blocks": self.num_blocks,
            "schedule": repr(self.schedule),
        }
        if self._norms is not None:
            state["decisions"] = self.schedule.state_dict()
            state["gradient_norms"] = self._norms.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the step of a saved run, whose weights have been loaded before.

        Raises:
            ValueError: the state belongs to a model or a schedule other than this one.
        """
        if state.get("format") != 1:
            raise ValueError(f"not the state of a PatchHandle: format {state.get('format')!r}")
        if state["num_blocks"] != self.num_blocks:
            raise ValueError(
                f"saved for a model of {state['num_blocks']} blocks, this one has {self.num_blocks}"
            )
        if state["schedule"] != repr(self.schedule):
            raise ValueError(f"saved under {state['schedule']}, this run has {self.schedule!r}")
        if self._norms is not None:
            self.schedule.load_state_dict(state["decisions"])
        self.accept_weights()
        self.seek(state["step"])
        if self._norms is not None:
            self._norms.load_state_dict(state["gradient_norms"])

    def unpatch(self) -> None:
        """Put the model back as it was found, but for what the user froze in the meantime.

        Calling it again does nothing.
        """
        if handle_of(self.model) is not self:
            return
        if self.cache is not None:
            self.cache.close()
            self.cache = None
        self._boundary.restore()
        self._kernels.restore()
        self._active.restore()
        for module, function, replaced in self._reentrant:
            if module._gradient_checkpointing_func is replaced:
                module._gradient_checkpointing_func = function
        for hook in self._hooks:
            hook.remove()
        self.end_proof()
        if self._norms is not None:
            self._norms.remove()
        self._listeners.clear()
        self.last_forward = None
        del self.model.__dict__[_HANDLE]
        _live.discard(self)
        for module in self._input_grads:
            module.enable_input_require_grads()
        if self._wrapper is not None:
            self._wrapper.release()
            self._wrapper = None
        freeze_events.announce()

    def follow_user(self) -> None:
        """Before a training forward: look at what was done, or not, to the model since the last.

        Warns of updates without `advance`. Applies the plan anew where flags were switched on, and
        where modules or parameters came or went before its first forward.

        Raises (from the forward):
            RuntimeError: the blocks are others than when the model was patched.
            UnsupportedModelError, ValueError: as `patch_model`, of adapters added since.
        """
        if self.cache is not None:
            self.cache.put_back()  # stand-ins that a forward left when it was interrupted
        self._structure.check_blocks()
        if self._wrapper is None or not self._wrapper.sharded:  # FSDP2 writes at every forward
            self._missed.before_forward(self.step)
        if self.follow_switches() or self.proved or not self._rebuilt:
            return
        self._take_in_changes()
        self._check_plan(self.step, self.plan)
        self._apply()

    def follow_switches(self) -> bool:
        """Train what was switched on since the last plan, wherever the plan in force trains it.

        PEFT switches flags when another adapter is chosen, and makes modules when one is added. A
        block that had nothing to train may train now.

        Returns:
            Whether anything changed.

        Raises:
            UnsupportedModelError, ValueError: as `patch_model`, of adapters added since.
        """
        switched = self._active.follow(self.plan)
        adapters = adapter_configs(self.model)
        if any(a is not b for a, b in zip_longest(self._adapters, adapters)):
            self._look_at_adapters()
            self._take_in_changes()
            self._reinstall()  # modules that are new, and those that adapters stand in now
        elif not switched:
            return False
        self._check_plan(self.step, self.plan)
        self._apply()
        return True

    def _look_at_adapters(self) -> None:
        check_adapters(self.model, self.layout)
        self._adapters = adapter_configs(self.model)
        self._allocation_end = rank_allocation_end(self.model)

    def before_training_forward(self, inputs: Any) -> None:
        """Keep checkpointing truncated; prove, once under every plan, that nothing is cut off.

        Args:
            inputs: the model's arguments.

        Raises (from the forward):
            UnsupportedModelError, RuntimeError: as `GradientPaths`.
        """
        if not self.proved:
            self._find_wrapper()
        if (device := self._active.device).type != self.device_type:
            self.device_type = device.type
            self._reinstall()
        if self._embeddings_frozen:
            # block 0 may train; its input does not require grad all the same
            self._input_grads += drop_input_grads(self.model, self.layout)
            self._reentrant += make_nonreentrant(self.model, self.layout)
        if not self.proved:
            self._paths = self._watch_paths(inputs=inputs)

    def end_proof(self, output: Any = None) -> None:
        """The forward that `GradientPaths` watches, if any, is over.

        Args:
            output: None: it has raised.
        """
        paths, self._paths = self._paths, None
        if paths is None:
            return
        paths.remove()
        if output is not None:
            if paths.finish(output):
                self._follow_moved()
            self.proved = True

    def _watch_paths(self, **options: Any) -> GradientPaths:
        no_grad = set(range(self.boundary))
        if self._embeddings_frozen:
            no_grad.add(EMBEDDINGS)
        return GradientPaths(
            self.model, self.layout, no_grad=no_grad, freezes=self._freezes(), **options
        )

    def _freezes(self) -> set[int]:
        """Units that are frozen now, or by a plan that is known already."""
        if isinstance(self.schedule, ObservingSchedule):
            return set(self.layout.units)
        units = set(self._frozen)
        for plan in (self.plan, *(plan for _, plan in self._plans_to_check())):
            units.update(u for u in self.layout.units if not self._active.trains(u, plan))
        return units

    @property
    def _rebuilt(self) -> bool:
        """Whether modules or parameters came or went, not counting a cache's stand-ins."""
        if self.cache is not None and self._structure.changed:
            self.cache.put_back()  # a forward that was interrupted leaves them
        return self._structure.changed

    def _take_in_changes(self) -> None:
        self._structure.check()
        for name in self.layout.unruled(self.model):
            self.layout.found.setdefault(name, self.layout.head)
        new = self._active.rescan()
        self._structure.note()
        if new and self.last_forward is not None:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            warnings.warn(
                f"{new[0]}{more} came into the model while it was trained: an optimizer that was "
                "made before does not hold it, and leaves it as it is",
                stacklevel=4,
            )

    def _find_wrapper(self) -> None:
        """Attach whatever runs this forward, if that is somebody new."""
        refuse_flat_parameters(self.model)
        found = surrounding(self.model)
        if found is not None and (self._wrapper is None or not self._wrapper.holds(found)):
            self.attach(found)

    def _put_on_shards(self) -> None:
        """`fully_shard` has replaced parameters, and made classes out of those it found."""
        self._boundary.restore()
        self._kernels.restore()
        for module in self.model.modules():
            cls = without_derived_ancestors(type(module))
            if cls is not type(module):
                module.__class__ = cls
        self._kernels.follow(self._active.device)
        self._boundary.move(self._frozen, self.boundary)
        if self._norms is not None:
            self._norms.install()

    def _reinstall(self) -> None:
        """The model has moved, or has other modules: kernels anew, below the boundary's classes."""
        self._boundary.restore()
        self._kernels.restore()
        self._kernels.follow(self._active.device)
        self._boundary.move(self._frozen, self.boundary)

    def _plans_to_check(self) -> Iterator[tuple[int, FreezePlan]]:
        """The first, this, every milestone, the last, and every plan before AdaLoRA has allocated
        its ranks.
        """
        steps = {0, self.step, *getattr(self.schedule, "milestones", ())}
        if total := self.schedule.total_steps:
            steps |= {total - 1}
            if self._allocation_end is not None:
                steps |= set(range(min(total, self._allocation_end + 1)))
        for step in sorted(steps):
            yield step, self.schedule.plan(step, self.num_blocks)

    def _check_plan(self, step: int, plan: FreezePlan) -> None:
        self._active.check(plan)
        if self._allocation_end is None or step > self._allocation_end:
            return
        if any(self._active.frozen_by(plan)):
            raise ValueError(
                f"AdaLoRA moves ranks between all adapters up to step {self._allocation_end} "
                f"(total_step - tfinal), and step {step} freezes some: raise tfinal until that "
                "comes first, or use LoRA"
            )

    def _apply(self) -> None:
        if self._wrapper is not None:
            self._wrapper.reshard()
        self._active.apply(self.plan)
        self._follow_flags()
        if self.cache is not None:
            self.cache.move(self.boundary)
        self.proved = False

    def _follow_moved(self) -> None:
        """A forward has shown that bare parameters belong elsewhere: before its backward."""
        moved = self._active.move(self.plan)
        for step, plan in self._plans_to_check():
            self._check_plan(step, plan)
        if not moved:
            return
        self._follow_flags()
        if self.cache is not None:  # what trained may have kept it from serving
            self.cache.move(self.boundary)

    def _follow_flags(self) -> None:
        """Everything else that hangs on which parameters are active."""
        self._frozen = set(self.layout.units) - self._active.units
        self._embeddings_frozen = EMBEDDINGS in self._frozen
        self.boundary = 0
        if self._embeddings_frozen:
            blocks = range(self.num_blocks)
            self.boundary = next((i for i in blocks if i not in self._frozen), self.num_blocks)
        self._boundary.move(self._frozen, self.boundary)
        if self._norms is not None:
            self._norms.install()
        if self._wrapper is not None:
            self._wrapper.follow(step=self.step, boundary=self.boundary)
        freeze_events.announce()


def decay_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float | None
) -> list[dict[str, Any]]:
    """Parameter groups with and without decay; an empty one is left out.

    Matrices decay, as the optimizer says where `weight_decay` is None; biases and norm weights,
    which have one dimension or none, do not.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]


def patch_model(
    model: nn.Module,
    schedule: Schedule,
    *,
    frozen_mode: FrozenMode = "eval",
    tied: TiedPolicy = "frozen",
    kernels: Kernels = "auto",
    cache: PrefixCache | Literal["auto"] | None = None,
    blocks: str | Sequence[str] | None = None,
    step: int = 0,
) -> PatchHandle:
    """Patch `model` in place so that it trains only what `schedule` says.

    Embeddings and blocks below the boundary run without autograd; gradients and optimizer state of
    frozen tensors are released when the plan changes.

    Args:
        model: a Hugging Face model, PEFT adapters included, or any module with lists of blocks.
            Inside `DistributedDataParallel` or `torch.compile`, what is inside is patched, and the
            wrapper attached.
        schedule: plans every optimizer step, e.g. `ProgressiveSchedule(3, total_steps)`.
        frozen_mode: "eval" makes a frozen unit a fixed function (no dropout); "train" leaves its
            mode alone.
        tied: what happens to a weight shared by embeddings and LM head once the embeddings are
            frozen: "frozen" freezes it, "head_only" goes on training it with the gradient of its
            use in the head (the lookup is then not differentiated).
        kernels: "auto" lets norms, gated MLPs, BERT's output layers and the head with its loss, on
            a CPU dropout instead, run freeze-aware ops where these are there and pay, which the
            size of every call decides; "on" takes them at any size; "off" leaves all modules
            alone. Each kind is compared with the original first; `handle.kernel_report()` says
            what became of it.
        cache: keeps what the frozen prefix computes for a sample and reads it in later epochs;
            "auto" takes a quarter of the CPU memory that is free. It switches itself off where it
            does not pay; `handle.cache_report()` says so.
        blocks: qualified name of the block list where discovery cannot choose; several, in the
            order in which they run, of lists or of single modules that are a block each.
        step: optimizer steps done; for an optimizer that has its state already, which would lose
            that of tensors that the plan of step 0 freezes.

    Returns:
        The handle; call `handle.advance()` once per optimizer step.

    Raises:
        TypeError: no model, or no schedule.
        UnsupportedModelError: no block list can be found, the blocks share weights, or the model
            has adapters that cannot freeze with their blocks, or is in a wrapper that does not
            follow changes of what trains; from the first training forward, if a unit turns out to
            be computed from a later one.
        ValueError: the model, a part of it or one that it is a part of is patched already, or the
            schedule does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model takes a model, an nn.Module, and a schedule, got {model!r}")
    check_schedule(schedule, "patch_model")
    _check_values(frozen_mode=frozen_mode, tied=tied, kernels=kernels, cache=cache)
    step = whole_number("step", step, 0)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a scripted or traced model runs no Python that could be "
            "patched: patch the model that it was made from"
        )
    inner = unwrap(model)
    _refuse_patched(inner)
    if isinstance(schedule, ObservingSchedule) and any(h.schedule is schedule for h in list(_live)):
        raise ValueError(
            f"{schedule!r} decides for a model that is patched already: give each model its own"
        )
    refuse_flat_parameters(inner)
    layout = find_layout(inner, blocks)
    handle = PatchHandle(
        inner,
        schedule,
        layout,
        frozen_mode=frozen_mode,
        tied=tied,
        kernels=kernels,
        cache=automatic_cache() if cache == "auto" else cache,
        step=step,
    )
    if inner is model:
        return handle
    try:
        return handle.attach(model)
    except BaseException:
        handle.unpatch()
        raise


def check_options(options: Mapping[str, Any], taker: str) -> None:
    """Check keyword arguments that `taker` was given for a `patch_model` to come.

    Raises:
        TypeError: one that it has not; `step` is for `taker` to know.
        ValueError: a value that it does not take.
    """
    parameters = signature(patch_model).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "step"]
    for name in options:
        if name not in known:
            raise TypeError(f"{taker} has no option {name!r}; it has {', '.join(known)}")
    _check_values(**options)


def _check_values(
    *,
    frozen_mode: FrozenMode = "eval",
    tied: TiedPolicy = "frozen",
    kernels: Kernels = "auto",
    cache: PrefixCache | Literal["auto"] | None = None,
    **others: Any,
) -> None:
    if frozen_mode not in get_args(FrozenMode):
        raise ValueError(f"frozen_mode must be 'eval' or 'train', got {frozen_mode!r}")
    if tied not in get_args(TiedPolicy):
        raise ValueError(f"tied must be 'frozen' or 'head_only', got {tied!r}")
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels must be 'auto', 'on' or 'off', got {kernels!r}")
    if not (cache is None or cache == "auto" or isinstance(cache, PrefixCache)):
        raise ValueError(f"cache must be a PrefixCache, 'auto' or None, got {cache!r}")


def _refuse_patched(model: nn.Module) -> None:
    """Two plans over one parameter would each undo the other's flags, and keep them."""
    names = {id(p): name for name, p in model.named_parameters()}
    for handle in list(_live):
        if handle.model is model:
            raise ValueError("the model is patched already: call handle.unpatch() first")
        shared = next((names[id(p)] for p in handle.model.parameters() if id(p) in names), None)
        if shared is not None:
            raise ValueError(
                f"{shared} is in a {type(handle.model).__name__} that is patched already: call "
                "unpatch() of its handle first, then patch the model that is called in training"
            )


def handle_of(model: nn.Module) -> PatchHandle | None:
    """The handle of a patched model, None if it is not patched."""
    return model.__dict__.get(_HANDLE)
