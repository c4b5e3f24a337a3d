"""Proves that backward stops at the boundary: counts what a forward leaves behind, unit by unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.forward_hooks import ForwardHooks, buffers_kept, tensors_in
from ..model.layout import EMBEDDINGS, Layout, parameter_slots


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
        requiring_grad: paths of the modules that make up the unit, and of those inside it that
            carry a forward hook, whose output required grad.
    """

    nodes: int = 0
    saved_bytes: int = 0
    activation_bytes: int = 0
    requiring_grad: tuple[str, ...] = ()


class TruncationError(AssertionError):
    """Backward would run below the boundary; the message names the module and the cure."""


@dataclass(frozen=True)
class UnitReport:
    """One unit: its name, numbers of parameters, and what the forward left behind (if measured).

    `active_names` are the qualified names of its active parameters.
    """

    label: str
    params: int
    active: int
    use: UnitUse | None
    active_names: tuple[str, ...] = ()

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

    `print(report)` shows it as a table. Nodes and bytes are None before the first forward. `tied`
    says, a line each, which parameters several units use and what follows from it; `kernels`, in
    one line, how many modules run freeze-aware ops, and `cache` what the prefix cache does.
    """

    units: tuple[UnitReport, ...]
    boundary: int
    tied: tuple[str, ...] = ()
    kernels: str | None = None
    cache: str | None = None

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
                    f"{unit.label}: {_some(unit.active_names)} ({unit.active:,} parameters) "
                    f"requires grad below boundary {self.boundary}; it was switched on after the "
                    "plan was applied: call handle.advance() once per step, or freeze it with "
                    "requires_grad_(False)"
                )
            if unit.use is None:
                raise TruncationError("nothing to prove yet: run a forward with gradients first")
            if unit.nodes:
                where = _some(unit.use.requiring_grad) or "something in it"
                raise TruncationError(
                    f"{unit.label}: backward runs {unit.nodes} autograd nodes below boundary "
                    f"{self.boundary} ({where} requires grad); something replaced its forward "
                    "after patching: patch the model last, or look for hooks that call "
                    "requires_grad_() on its output"
                )
            if unit.use.requiring_grad:
                raise TruncationError(
                    f"{unit.label}: the output of {_some(unit.use.requiring_grad)} requires grad "
                    f"below boundary {self.boundary}, though nothing there trains; a hook calls "
                    "requires_grad_() on it, as enable_input_require_grads() makes them: call "
                    "model.disable_input_require_grads(), or remove the hook"
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
        return "\n".join([*lines, *self.tied, *filter(None, [self.kernels, self.cache])])


def _some(names: Sequence[str]) -> str:
    """The first of many names, with their number."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""


class _UnitClock:
    """Knows which unit a forward is in, from hooks that live for one forward.

    What runs between two modules of the layout counts in the unit that ran last, and in the head as
    soon as the last stack, and every other that has begun, is through.
    """

    def __init__(self, model: nn.Module, layout: Layout, start: int) -> None:
        self._model = model
        self._layout = layout
        self.unit = start
        self.marks: list[tuple[int, int]] = []  # (first autograd sequence number, unit)
        self.requiring_grad: dict[int, list[str]] = defaultdict(list)
        self._unfinished: set[int] = set()  # first blocks of the stacks that have begun
        self._through = False  # whether the last stack has ended
        self._mark(start)

    def _mark(self, unit: int) -> None:
        self.unit = unit
        self.marks.append((torch.autograd._get_sequence_nr(), unit))

    def _note_output(self, unit: int, path: str, output: Any) -> None:
        if path not in self.requiring_grad[unit] and any(
            t.requires_grad for t in tensors_in(output)
        ):
            self.requiring_grad[unit].append(path)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Hooks on every module of the layout."""
        handles = []
        for unit in self._layout.units:
            for path in self._layout.module_paths(unit):
                module = self._model.get_submodule(path)
                handles.append(
                    ForwardHooks(module, self._entering(unit), self._leaving(unit, path))
                )
                for name, inner in module.named_modules(prefix=path):
                    if inner is not module and inner._forward_hooks:
                        handles.append(inner.register_forward_hook(self._noting(unit, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, unit: int) -> Callable[..., None]:
        first = {stack.first for stack in self._layout.stacks} & {unit}

        def enter(*_: Any) -> None:
            self._unfinished |= first
            self._mark(unit)

        return enter

    def _leaving(self, unit: int, path: str) -> Callable[..., None]:
        ended = [stack for stack in self._layout.stacks if stack.blocks[-1] == unit]
        is_end = bool(ended) and path == self._layout.module_paths(unit)[-1]

        def leave(module: nn.Module, output: Any) -> None:
            if is_end:
                self._unfinished.discard(ended[0].first)
                self._through |= unit == self._layout.head - 1
            done = self._through and not self._unfinished
            self._mark(self._layout.head if done else unit)
            self._note_output(unit, path, output)

        return leave

    def _noting(self, unit: int, path: str) -> Callable[..., None]:
        return lambda module, args, output: self._note_output(unit, path, output)

    def unit_at(self, sequence_number: int) -> int:
        unit = self.marks[0][1]
        for first, marked in self.marks:
            if first > sequence_number:
                break
            unit = marked
        return unit


def _count_nodes(
    outputs: Any,
    clock: _UnitClock,
    units_by_parameter: Mapping[int, int],
    bare: Mapping[int, int],
) -> dict[int, int]:
    pending = [t.grad_fn for t in tensors_in(outputs) if t.grad_fn is not None]
    found = set(pending)
    users: dict[Any, Any] = {}  # a node that goes on from each one
    while pending:
        node = pending.pop()
        for following, _ in node.next_functions:
            if following is not None and following not in found:
                found.add(following)
                users[following] = node
                pending.append(following)
    units: dict[Any, int] = {}
    leaves = [node for node in found if hasattr(node, "variable")]
    # numbers grow along the forward: what a node reads has its unit before the node has
    for node in sorted(found.difference(leaves), key=lambda node: node._sequence_nr()):
        # nothing runs earlier than what it reads: a decoder's code transposes the encoder's output
        # between its own embeddings and its first block
        inputs = [following for following, _ in node.next_functions]
        read = [units[following] for following in inputs if following in units]
        # between two blocks, what reads a bare parameter belongs where that does
        read += [
            bare.get(id(getattr(following, "variable", None)), EMBEDDINGS) for following in inputs
        ]
        units[node] = max(clock.unit_at(node._sequence_nr()), *read, EMBEDDINGS)
    for leaf in leaves:  # one that is no parameter of the model counts where it is used
        own = units_by_parameter.get(id(leaf.variable))
        units[leaf] = units.get(users.get(leaf), EMBEDDINGS) if own is None else own
    nodes: dict[int, int] = defaultdict(int)
    for unit in units.values():
        nodes[unit] += 1
    return nodes


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What holds the data of a sparse tensor; of any other, itself."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        for part in _parts(tensor):
            with suppress(NotImplementedError):  # oneDNN's own layouts show none
                yield part.untyped_storage()


def measure_forward(
    model: nn.Module,
    layout: Layout,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    boundary: int = 0,
) -> dict[int, UnitUse]:
    """Run one forward with grad enabled and count what it leaves for backward, per unit.

    The random state is put back afterwards and no gradient is computed. A checkpointed block hides
    what it will recompute; its bytes are those that it keeps.

    Args:
        boundary: the effective one; keys and values that prefix tuning makes before the first
            module runs count in this block, the lowest that trains them.

    Returns:
        unit number -> `UnitUse`, for every unit of the layout.
    """
    slots = list(parameter_slots(model, layout))
    sliced = any(slot.sliced for slot in slots)
    units_by_parameter = {
        id(slot.parameter): boundary if slot.sliced else slot.home for slot in slots
    }
    # by identity: on the meta device, where plans are measured, no storage has an address
    owned = {
        storage._cdata
        for storage in _storages((*(slot.parameter for slot in slots), *model.buffers()))
    }
    saved: dict[int, int] = defaultdict(int)
    held: dict[int, int] = defaultdict(int)
    # alive until the end, so that no address is used twice
    kept: dict[int, torch.UntypedStorage] = {}
    clock = _UnitClock(model, layout, boundary if sliced else EMBEDDINGS)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[clock.unit] += sum(p.numel() * p.element_size() for p in _parts(tensor))
        for storage in _storages([tensor]):
            if storage._cdata not in owned and storage._cdata not in kept:
                kept[storage._cdata] = storage
                held[clock.unit] += storage.nbytes()
        return tensor.detach()  # returning the tensor itself would tie it to its own graph node

    devices = {slot.parameter.device for slot in slots}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(buffers_kept(model))
        # compiled blocks would trace the counters, and recompile for them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(clock.watch())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        outputs = model(*args, **kwargs)
    bare = {id(p): layout.unit_of(name) for name, p in layout.unruled(model).items()}
    nodes = _count_nodes(outputs, clock, units_by_parameter, bare)
    return {
        unit: UnitUse(nodes[unit], saved[unit], held[unit], tuple(clock.requiring_grad[unit]))
        for unit in layout.units
    }
