"""Finds out what boundary activations are computed from, by following tensors through a forward.

Names of arguments tell nothing: a classifier reads `labels` above the boundary, a class-conditional
model in its embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# These hand a tensor's values to code in which they cannot be followed.
_WAYS_OUT = (
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.__dlpack__,
)
_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_UNIFORM = (torch.ops.aten.rand, torch.ops.aten.rand_like, torch.ops.aten.uniform_)
_COINS = (torch.ops.aten.bernoulli, torch.ops.aten.bernoulli_)
_NONE: frozenset[str] = frozenset()

Place = tuple[MutableMapping[str, Any], str]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():  # no value leaves the tensor here
        return tensor.untyped_storage()._cdata


class _Exits(TorchFunctionMode):
    def __init__(self, follow: Follow) -> None:
        self._follow = follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAYS_OUT:
            self._follow.escape(args)
        return func(*args, **(kwargs or {}))


class Follow(TorchDispatchMode):
    """Knows, in one forward, which arguments every tensor is computed or written from.

    It names too many at times (zeros in an argument's shape count as computed from it), never too
    few. Tensors that are `known` are no arguments, and their changes are noticed anyway; those that
    are `gathered` are written from known ones, in one copy with others, within the forward.

    Attributes:
        escaped: names of the arguments whose values left the tensors, for a number, a branch or a
            shape: everything may come from them.
    """

    def __init__(
        self,
        arguments: Mapping[str, torch.Tensor],
        known: Iterable[torch.Tensor],
        gathered: Iterable[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        self._names: dict[int, frozenset[str]] = {}  # by storage
        gathered = list(gathered)
        self._gathered = {_storage(tensor) for tensor in gathered}
        for name, tensor in arguments.items():
            self._mark(tensor, self._names.get(_storage(tensor), _NONE) | {name})
        for tensor in (*known, *gathered):
            self._names.setdefault(_storage(tensor), _NONE)
        self.escaped: frozenset[str] = _NONE
        self._foreign: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self, _Exits(self):
            yield

    def read_by(self, tensor: torch.Tensor) -> frozenset[str]:
        """Names of the arguments that `tensor` was computed from."""
        return self._of([tensor]) | self.escaped

    def foreign_to(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What `tensor` was computed from beside arguments and what is known."""
        names = self.read_by(tensor)
        return [there for name, there in self._foreign.items() if name in names]

    def has_seen(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` was read, and is neither an argument nor known."""
        return any(_storage(there) == _storage(tensor) for there in self._foreign.values())

    def escape(self, values: Any) -> None:
        self.escaped |= self._of(_tensors(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        if func is not torch.ops.aten.lift_fresh.default:  # a tensor that was made this moment
            for tensor in read:
                if _storage(tensor) not in self._names:
                    name = f"\0{len(self._foreign)}"  # no argument is called so
                    self._foreign[name] = tensor
                    self._mark(tensor, frozenset({name}))
        names = self._of(read)
        before = {_storage(tensor) for tensor in read}
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            storage = _storage(tensor)  # an address may be that of a tensor that has gone
            held = self._of([tensor]) if storage in before else _NONE
            self._mark(tensor, names | held)
        if names:
            if func._schema.is_mutable:  # in place, or into `out`
                for tensor in read:
                    self._mark(tensor, self._of([tensor]) | names)
            if not _VALUE_TAGS.isdisjoint(func.tags) and not _picks_rows(func, read):
                self.escaped |= names
        return output

    def _mark(self, tensor: torch.Tensor, names: frozenset[str]) -> None:
        storage = _storage(tensor)
        self._names[storage] = _NONE if storage in self._gathered else names

    def _of(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        return _NONE.union(*(self._names.get(_storage(t), _NONE) for t in tensors))


def _picks_rows(func: Any, read: list[torch.Tensor]) -> bool:
    """Whether this is `table[numbers]`, whose shape depends on no value, as `x[mask]`'s does."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and all(t.dtype not in masks for t in read[1:])


class Extremes(TorchDispatchMode):
    """Makes random numbers come out at one end, so that what is rare happens in every forward."""

    def __init__(self, *, high: bool) -> None:
        super().__init__()
        self._high = high

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in _UNIFORM:
            output.fill_(1 - torch.finfo(output.dtype).eps if self._high else 0.0)
        elif func.overloadpacket in _COINS:
            share = args[-1] if isinstance(args[-1], torch.Tensor | float) else 0.5
            share = torch.as_tensor(share, dtype=torch.float64, device=output.device)
            output.copy_(share >= 1 if self._high else share > 0)
        return output


def place_of(tensor: torch.Tensor, model: nn.Module) -> Place | None:
    """Where a module of `model` holds `tensor`, as a dict and a key; None if none does."""
    storage = _storage(tensor)
    for module in model.modules():
        own = module.__dict__
        for held in (own["_parameters"], own["_buffers"], own):
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and _storage(value) == storage:
                    return held, key
    return None
