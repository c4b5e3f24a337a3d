"""Counts what a forward leaves behind for backward, unit by unit."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..model.forward_hooks import ForwardHooks, state_kept, tensors_in
from ..model.layout import EMBEDDINGS, Layout, parameter_slots


@dataclass(frozen=True)
class UnitUse:
    """What one forward left behind for backward in one unit."""

    nodes: int = 0  # autograd nodes that backward would run, `AccumulateGrad` included
    # of every tensor handed to `saved_tensors_hooks`: one saved thrice counts thrice, weights count
    saved_bytes: int = 0
    # of distinct storages among them that belong to no parameter or buffer: the memory that the
    # forward really holds; a storage counts in the first unit that saves it
    activation_bytes: int = 0
    # paths of the modules of the unit, and of those inside it that carry a forward hook, whose
    # output required grad
    requiring_grad: tuple[str, ...] = ()


class _UnitClock:
    """Follows by hooks which unit a forward is in.

    What runs between two modules of the layout counts in the unit that ran last, and in the head as
    soon as the last stack, and every other that has begun, has ended.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self.marks: list[tuple[int, int]] = []  # (first autograd sequence number, unit)
        self.requiring_grad: dict[int, list[str]] = defaultdict(list)
        self._unfinished: set[int] = set()  # first blocks of the stacks that have begun
        self._through = False  # whether the last stack has ended
        self._mark(EMBEDDINGS)

    def _mark(self, unit: int) -> None:
        self.unit = unit
        self.marks.append((torch.autograd._get_sequence_nr(), unit))

    @contextmanager
    def watch(self) -> Iterator[None]:
        handles: list[Any] = []
        for unit in self._layout.units:
            for path in self._layout.module_paths(unit):
                module = self._model.get_submodule(path)
                leave = partial(self._leave, unit, path)
                handles.append(ForwardHooks(module, partial(self._enter, unit), leave))
                for name, inner in module.named_modules(prefix=path):
                    if inner is not module and inner._forward_hooks:
                        note = partial(self._note_output, unit, name)
                        handles.append(inner.register_forward_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, unit: int, *_: Any) -> None:
        self._unfinished |= {stack.first for stack in self._layout.stacks} & {unit}
        self._mark(unit)

    def _leave(self, unit: int, path: str, module: nn.Module, output: Any) -> None:
        layout = self._layout
        if path == layout.module_paths(unit)[-1]:
            ended = {stack.first for stack in layout.stacks if stack.blocks[-1] == unit}
            self._unfinished -= ended
            self._through |= unit == layout.head - 1
        self._mark(layout.head if self._through and not self._unfinished else unit)
        self._note_output(unit, path, module, (), output)

    def _note_output(self, unit: int, path: str, module: nn.Module, args: Any, output: Any) -> None:
        if path not in self.requiring_grad[unit] and any(
            t.requires_grad for t in tensors_in(output)
        ):
            self.requiring_grad[unit].append(path)

    def unit_at(self, sequence_number: int) -> int:
        after = bisect_right(self.marks, sequence_number, key=itemgetter(0))
        return self.marks[max(after - 1, 0)][1]


def _count_nodes(
    outputs: Any, clock: _UnitClock, units_by_parameter: Mapping[int, int], bare: Mapping[int, int]
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
    """The tensors that hold the data of a sparse one; any other itself."""
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
    model: nn.Module, layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, UnitUse]:
    """Run one forward with grad enabled and count what it leaves for backward, for every unit.

    The random state is put back afterwards and no gradient is computed. A checkpointed block hides
    what it will recompute; its bytes are those that it keeps.
    """
    slots = list(parameter_slots(model, layout))
    units_by_parameter = {id(slot.parameter): slot.home for slot in slots}
    # by identity: on the meta device, where plans are measured, no storage has an address
    owned = {
        storage._cdata
        for storage in _storages((*(slot.parameter for slot in slots), *model.buffers()))
    }
    saved: dict[int, int] = defaultdict(int)
    held: dict[int, int] = defaultdict(int)
    # alive until the end, so that no address is used twice
    kept: dict[int, torch.UntypedStorage] = {}
    clock = _UnitClock(model, layout)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[clock.unit] += sum(p.numel() * p.element_size() for p in _parts(tensor))
        for storage in _storages([tensor]):
            if storage._cdata not in owned and storage._cdata not in kept:
                kept[storage._cdata] = storage
                held[clock.unit] += storage.nbytes()
        return tensor.detach()  # returning the tensor itself would tie it to its own graph node

    devices = {slot.parameter.device for slot in slots}
    with (
        torch.random.fork_rng([d for d in devices if d.type == "cuda"]),
        torch.enable_grad(),
        state_kept(model),
        # compiled blocks would trace the counters, and recompile for them
        torch.compiler.set_stance("force_eager"),
        clock.watch(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        outputs = model(*args, **kwargs)
    bare = {id(p): layout.unit_of(name) for name, p in layout.unruled(model).items()}
    nodes = _count_nodes(outputs, clock, units_by_parameter, bare)
    return {
        unit: UnitUse(nodes[unit], saved[unit], held[unit], tuple(clock.requiring_grad[unit]))
        for unit in layout.units
    }
