"""Runs the prefix without autograd, and proves it.

A block below the boundary is switched, per instance, to one fixed subclass of its own class whose
`forward` runs under `torch.no_grad()`. Block k then receives a tensor without `grad_fn`, so that
autograd has nothing below it whatever the caller did above or before. Of the ways to install this,
flipping `block.__class__` is the one that survives deepcopy and `torch.compile` per block (three
graphs for any number of stages, where a flag on the instance recompiles until the limit and then
runs eagerly); nothing is written into any `__dict__` but `training`.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .families import EMBEDDINGS, Layout, parameter_slots

FrozenMode = Literal["eval", "train"]

_frozen_classes: dict[tuple[type, bool, bool], type] = {}
# Mode last asked for by `.train(mode)` while the module was held in eval; read when it thaws.
_requested_mode: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def unfrozen_class(cls: type) -> type:
    """The class that `frozen_class` was derived from, or `cls` itself."""
    return getattr(cls, "_progtuning_base", cls)


def _new_instance(cls: type) -> Any:
    return cls.__new__(cls)


def frozen_class(base: type, *, no_grad: bool, hold_eval: bool) -> type:
    """One fixed subclass of `base` per combination of flags.

    Args:
        no_grad: `forward` runs under `torch.no_grad()`.
        hold_eval: `train(True)` leaves the module in eval mode: the Hugging Face Trainer calls
            `model.train()` before every step, which would switch dropout on again.
    """
    key = (base, no_grad, hold_eval)
    if key in _frozen_classes:
        return _frozen_classes[key]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return base.forward(self, *args, **kwargs)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        _requested_mode[self] = mode
        return base.train(self, False)

    def reduce_ex(self: nn.Module, protocol: int) -> tuple:
        # copies and pickles are plain modules: this class cannot be found by name
        _, _, *state = base.__reduce_ex__(self, protocol)
        return (_new_instance, (base,), *state)

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_progtuning_base": base,
    }
    if no_grad:
        members["forward"] = forward
    if hold_eval:
        members["train"] = train
    # the name stays: transformers' `_no_split_modules` and regional compilation go by it
    _frozen_classes[key] = type(base.__name__, (base,), members)
    return _frozen_classes[key]


def _drop_own_forward(module: nn.Module) -> None:
    """Remove an instance `forward` that is nothing but a class's own, bound.

    Early transformers 5 put `module.forward` back that way after capturing hidden states: it would
    then outlive every later change of class, so that a thawed block never trained again.
    """
    own = module.__dict__.get("forward")
    if getattr(own, "__self__", None) is module and any(
        vars(cls).get("forward") is own.__func__
        for cls in {*type(module).__mro__, *_frozen_classes.values()}
    ):
        del module.__dict__["forward"]


class Boundary:
    """Holds the modules of one model on their side of the boundary.

    Args:
        model: the model that `layout` describes.
        frozen_mode: "eval" keeps frozen modules in eval mode (a fixed function, no dropout),
            "train" leaves their mode alone.
    """

    def __init__(self, model: nn.Module, layout: Layout, frozen_mode: FrozenMode) -> None:
        self._model = model
        self._layout = layout
        self._hold_eval = frozen_mode == "eval"
        self._modes: dict[str, list[tuple[nn.Module, bool]]] = {}

    def move(self, frozen: Sequence[bool], boundary: int, *, embeddings_frozen: bool) -> None:
        """Put every module on its side.

        Args:
            frozen: per block, whether it holds no active tensor.
            boundary: blocks below this one run under `no_grad`.
            embeddings_frozen: whether the embedding lookups are cut off as well: they are if
                `boundary` > 0 or nothing upstream of block 0 is active.
        """
        for path in self._layout.upstream_paths:
            self._switch(path, no_grad=embeddings_frozen, frozen=embeddings_frozen)
        for i, path in enumerate(self._layout.block_paths):
            self._switch(path, no_grad=i < boundary, frozen=frozen[i])

    def restore(self) -> None:
        """Put every module back as it was found, but for modes asked for in the meantime."""
        for path in (*self._layout.upstream_paths, *self._layout.block_paths):
            self._switch(path, no_grad=False, frozen=False)

    def _switch(self, path: str, *, no_grad: bool, frozen: bool) -> None:
        module = self._model.get_submodule(path)
        base = unfrozen_class(type(module))
        hold_eval = frozen and self._hold_eval
        if hold_eval and path not in self._modes:
            self._modes[path] = [(m, m.training) for m in module.modules()]
            _requested_mode.pop(module, None)
            base.train(module, False)
        _drop_own_forward(module)
        plain = not (no_grad or hold_eval)
        target = base if plain else frozen_class(base, no_grad=no_grad, hold_eval=hold_eval)
        if type(module) is not target:
            module.__class__ = target
        if not hold_eval and path in self._modes:
            modes = self._modes.pop(path)
            requested = _requested_mode.pop(module, None)
            if requested is None:
                for m, mode in modes:
                    m.training = mode
            else:
                module.train(requested)


@dataclass(frozen=True)
class UnitUse:
    """What one forward left behind for backward in one unit.

    Attributes:
        nodes: autograd nodes that backward would run, `AccumulateGrad` included.
        saved_bytes: bytes of every tensor handed to `saved_tensors_hooks`; a tensor saved by three
            operations counts three times, and weights count.
        activation_bytes: bytes of distinct storages among them that belong to no parameter or
            buffer: the memory that the forward really holds. A storage counts in the first unit
            that saves it.
    """

    nodes: int = 0
    saved_bytes: int = 0
    activation_bytes: int = 0


class TruncationError(AssertionError):
    """Backward would run below the boundary; the message names the unit and the cure."""


@dataclass(frozen=True)
class UnitReport:
    """One unit: its name, numbers of parameters, and what the forward left behind (if measured)."""

    label: str
    params: int
    active: int
    use: UnitUse | None

    @property
    def nodes(self) -> int | None:
        return None if self.use is None else self.use.nodes

    @property
    def saved_bytes(self) -> int | None:
        return None if self.use is None else self.use.saved_bytes

    @property
    def activation_bytes(self) -> int | None:
        return None if self.use is None else self.use.activation_bytes


@dataclass(frozen=True)
class TruncationReport:
    """Per unit: parameters, active parameters, autograd nodes and bytes saved for backward.

    `print(report)` shows it as a table. Nodes and bytes are None before the first forward.
    """

    units: tuple[UnitReport, ...]
    boundary: int
    tied: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int | None:
        return self._total("saved_bytes")

    @property
    def activation_bytes(self) -> int | None:
        return self._total("activation_bytes")

    @property
    def nodes(self) -> int | None:
        return self._total("nodes")

    def _total(self, field: str) -> int | None:
        values = [getattr(unit, field) for unit in self.units]
        return None if None in values else sum(values)

    @property
    def prefix(self) -> tuple[UnitReport, ...]:
        """Embeddings and blocks below the boundary; empty under boundary 0."""
        return self.units[: self.boundary + 1] if self.boundary else ()

    def assert_truncated(self) -> None:
        """Raise `TruncationError` if anything below the boundary trains or is in the graph.

        Under boundary 0 there is nothing below. Before the first forward nothing can be proved,
        which is an error too.
        """
        for unit in self.prefix:
            if unit.active:
                raise TruncationError(
                    f"{unit.label}: {unit.active:,} parameters require grad below boundary "
                    f"{self.boundary}; they were switched on after the plan was applied: call "
                    "handle.advance() once per step, or freeze them with requires_grad_(False)"
                )
            if unit.nodes is None:
                raise TruncationError("nothing to prove yet: run a forward with gradients first")
            if unit.nodes:
                raise TruncationError(
                    f"{unit.label}: backward runs {unit.nodes} autograd nodes below boundary "
                    f"{self.boundary}; something replaced its forward after patching: patch the "
                    "model last, or look for hooks that call requires_grad_() on its output"
                )

    def __str__(self) -> str:
        def cell(value: int | None) -> str:
            return "-" if value is None else f"{value:,}"

        rows = [("unit", "params", "active", "nodes", "saved_bytes", "activation_bytes")]
        for i, unit in enumerate(self.units):
            if i and i == self.boundary + 1:
                rows.append(("-- boundary", "", "", "", "", ""))
            counts = (unit.params, unit.active, unit.nodes, unit.saved_bytes, unit.activation_bytes)
            rows.append((unit.label, *map(cell, counts)))
        totals = (
            sum(u.params for u in self.units),
            sum(u.active for u in self.units),
            self.nodes,
            self.saved_bytes,
            self.activation_bytes,
        )
        rows.append(("total", *map(cell, totals)))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = [
            "  ".join(
                text.ljust(w) if c == 0 else text.rjust(w)
                for c, (text, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.tied])


class _UnitClock:
    """Knows which unit a forward is in, from hooks on the blocks that live for one forward."""

    def __init__(self, layout: Layout) -> None:
        self._head = layout.head
        self.unit = EMBEDDINGS
        self.marks: list[tuple[int, int]] = []  # (first autograd sequence number, unit)
        self._mark(EMBEDDINGS)

    def _mark(self, unit: int) -> None:
        self.unit = unit
        self.marks.append((torch.autograd._get_sequence_nr(), unit))

    @contextmanager
    def watch(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        handles = []
        for i, block in enumerate(blocks):
            after = self._head if i + 1 == len(blocks) else i + 1
            handles.append(block.register_forward_pre_hook(lambda *_, i=i: self._mark(i)))
            handles.append(block.register_forward_hook(lambda *_, after=after: self._mark(after)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def unit_at(self, sequence_number: int) -> int:
        unit = EMBEDDINGS
        for first, marked in self.marks:
            if first > sequence_number:
                break
            unit = marked
        return unit


def _count_nodes(
    outputs: Any, clock: _UnitClock, units_by_parameter: Mapping[int, int]
) -> dict[int, int]:
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    pending = [(t.grad_fn, EMBEDDINGS) for t in tensors if t.grad_fn is not None]
    seen = {node for node, _ in pending}
    nodes: dict[int, int] = defaultdict(int)
    while pending:
        node, user = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is None:
            unit = clock.unit_at(node._sequence_nr())
        else:  # a leaf that is no parameter of the model counts where it is used
            unit = units_by_parameter.get(id(leaf), user)
        nodes[unit] += 1
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append((following, unit))
    return nodes


def measure_forward(
    model: nn.Module, layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, UnitUse]:
    """Run one forward with grad enabled and count what it leaves for backward, per unit.

    The random state is put back afterwards and no gradient is computed. A checkpointed block hides
    what it will recompute; its bytes are those that it keeps.

    Returns:
        unit number -> `UnitUse`, for every unit of the layout.
    """
    slots = list(parameter_slots(model, layout))
    # a tied parameter's AccumulateGrad belongs to the last unit that uses it (the head)
    units_by_parameter = {id(slot.parameter): slot.units[-1] for slot in slots}
    owned = {
        t.untyped_storage().data_ptr()
        for t in (*(slot.parameter for slot in slots), *model.buffers())
    }
    saved: dict[int, int] = defaultdict(int)
    held: dict[int, int] = defaultdict(int)
    kept: dict[int, torch.Tensor] = {}  # alive until the end, so that no address is used twice
    clock = _UnitClock(layout)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[clock.unit] += tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor.detach()
            held[clock.unit] += storage.nbytes()
        return tensor.detach()  # returning the tensor itself would tie it to its own graph node

    devices = {slot.parameter.device for slot in slots}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(torch.enable_grad())
        # compiled blocks would trace the counters, and recompile for them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(clock.watch([model.get_submodule(p) for p in layout.block_paths]))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        outputs = model(*args, **kwargs)
    nodes = _count_nodes(outputs, clock, units_by_parameter)
    return {
        unit: UnitUse(nodes[unit], saved[unit], held[unit])
        for unit in range(EMBEDDINGS, layout.head + 1)
    }
