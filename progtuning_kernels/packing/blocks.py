"""How blocks run packed: by members of the class that the boundary moves them to.

The first block of a stack that gets padded hidden states packs them, the last one unpacks. Which
tokens a call has travels with the call, as a keyword argument that the block itself takes out, so
that a recomputation in backward has those of its own forward, whatever ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..model.derived_classes import root_of
from .attention import PackedBlock, UnpackableError, running
from .tokens import PackedTokens

_KEY = "progtuning_packed_tokens"  # of the keyword argument
Place = tuple[int | str, ...]  # number or name of an argument, and number inside a tuple


@dataclass(frozen=True)
class BlockRole:
    """What a block is called with, and whether it is the last of its stack."""

    hidden: Place
    per_token: frozenset[Place]  # (1 or B, T, ...) besides the hidden states
    last: bool
    returned: frozenset[Place] = frozenset()  # per token, in what the last block returns
    cross: frozenset[int] = frozenset()  # see `PackedBlock`


@dataclass(frozen=True)
class PackedCall:
    """What a block's call needs to run packed."""

    role: BlockRole
    tokens: PackedTokens
    grouped: bool


Calls = Mapping[int, PackedCall]  # of the blocks of one forward, by their id
_forwards: list[tuple[object, Calls]] = []  # those under way, the innermost last
# Calls of the forward in which a tensor came to a block; none if that were two forwards.
_noted: MutableMapping[Tensor, Calls] = WeakTensorKeyDictionary()


def begin_forward(owner: object, calls: Calls) -> None:
    """Have the blocks in `calls` run packed until `end_forward`."""
    _forwards.append((owner, calls))


def end_forward(owner: object) -> None:
    """End the innermost forward, and what an interrupt has left above it."""
    for at in reversed(range(len(_forwards))):
        if _forwards[at][0] is owner:
            del _forwards[at:]
            return


@contextmanager
def padded() -> Iterator[None]:
    """Forwards in this context run padded."""
    begin_forward(padded, {})
    try:
        yield
    finally:
        end_forward(padded)


def inside_padded() -> bool:
    """Whether code runs in a context of `padded`."""
    return any(owner is padded for owner, _ in _forwards)


def unpacked(block: nn.Module, hidden: Tensor) -> Tensor:
    """(B, T, C) of hidden states from inside `block`, or from what it returns, in the forward under
    way: zeros at padding where they were packed, the same tensor where not.
    """
    call = _call_of(block)
    if call is None or not call.tokens.holds_packed(hidden):
        return hidden
    return call.tokens.unpack(hidden)


def _call_of(block: nn.Module) -> PackedCall | None:
    return _forwards[-1][1].get(id(block)) if _forwards else None


def tokens_of(module: nn.Module) -> PackedTokens | None:
    """Those that a module of the forward under way runs on, None where it runs padded."""
    call = _call_of(module)
    return None if call is None or torch.compiler.is_compiling() else call.tokens


def members(base: type, forward: Callable[..., Any]) -> dict[str, Any]:
    """`__call__` and `forward` of a subclass of `base` that runs `forward` packed."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls = _forwards[-1][1] if _forwards else {}
        if id(self) in calls and not torch.compiler.is_compiling():
            if self._compiled_call_impl is not None:  # graphs of packed tensors, of any length
                return _run_packed(self, base.__call__, calls, args, kwargs)
            kwargs[_KEY] = calls
        return base.__call__(self, *args, **kwargs)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls: Calls = kwargs.pop(_KEY, {})
        compiled = torch.compiler.is_compiling() or self._compiled_call_impl is not None
        recomputed = False
        if not (calls or compiled):
            # where `forward` is called alone, and where a checkpoint around it is recomputed
            # (in a backward, whatever an interrupted forward has left behind)
            recomputed = not _forwards or torch._C._current_graph_task_id() != -1
            calls = _calls_noted(args, kwargs) if recomputed else _forwards[-1][1]
        if id(self) not in calls:
            if not (compiled or recomputed):
                _forget(args, kwargs)
            return forward(self, *args, **kwargs)
        return _run_packed(self, forward, calls, args, kwargs)

    return {"__call__": call, "forward": run}


def checkpointed(made: type) -> None:
    """Have transformers put its checkpointing around the `forward` of a class made here.

    From 5.18 on it wraps the forward of every subclass when the class is made, which happens to
    none made by `derive`, and takes the outermost wrapper for the one to obey.
    """
    for cls in made.__mro__:
        if "gradient_checkpointing" in vars(cls) and "__init_subclass__" in vars(cls):
            vars(cls)["__init_subclass__"].__func__(made)
            return


def _note(calls: Calls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for _, value in places_of(args, kwargs):
        before = _noted.setdefault(value, calls)
        if before is not calls:
            _noted[value] = {}


def _forget(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Of a forward that runs padded: a tensor of a packed one too no longer says which."""
    for _, value in places_of(args, kwargs):
        if value in _noted:
            _noted[value] = {}


def _calls_noted(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Those of the forward that has called a block with these tensors."""
    found = (_noted.get(value) for _, value in places_of(args, kwargs))
    return next(filter(None, found), {})


def _run_packed(
    block: nn.Module,
    forward: Callable[..., Any],
    calls: Calls,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    packed = calls[id(block)]
    _note(calls, args, kwargs)
    role, tokens = packed.role, packed.tokens
    hidden = value_at(role.hidden, args, kwargs)
    name = root_of(type(block)).__name__
    if tokens.holds_padded(hidden):
        made = tokens.pack(hidden)
    elif tokens.holds_packed(hidden):
        made = hidden
    else:
        raise UnpackableError(f"{name} got no hidden states of {tokens.count} packed tokens")
    changes = {role.hidden: made}
    for place in role.per_token:
        value = value_at(place, args, kwargs)
        if isinstance(value, Tensor) and value.shape[1:2] == tokens.padded_shape[1:]:
            changes[place] = tokens.pack_once(value)
        elif value is not None:
            raise UnpackableError(f"{name} got another {place[0]} than in the first forward")
    args, kwargs = with_values(changes, args, kwargs)
    with running(PackedBlock(tokens, role.cross, packed.grouped)):
        output = forward(block, *args, **kwargs)
    if not role.last:
        return output
    found = {
        place: tokens.unpack(value)
        for place in role.returned
        if tokens.holds_packed(value := output_at(place, output))
    }
    return with_outputs(found, output)


def value_at(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument at a place, None if there is none."""
    first, *inner = place
    if isinstance(first, str):
        value = kwargs.get(first)
    else:
        value = args[first] if first < len(args) else None
    for i in inner:
        value = value[i] if isinstance(value, tuple | list) and i < len(value) else None
    return value


def with_values(
    changes: Mapping[Place, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with others at some places."""
    positional, named = list(args), dict(kwargs)
    for (first, *inner), made in changes.items():
        held = named if isinstance(first, str) else positional
        value = made
        if inner:
            items = list(held[first])
            items[inner[0]] = made
            value = type(held[first])(items)
        held[first] = value
    return tuple(positional), named


def places_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor among the arguments of a call, and those in tuples and lists."""
    for first, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            yield (first,), value
        elif type(value) in (tuple, list):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield (first, i), item


def output_at(place: Place, output: Any) -> Any:
    """The value at a place of what a module returns; the empty place is all of it."""
    if not place:
        return output
    if isinstance(place[0], str):
        return output.get(place[0]) if isinstance(output, Mapping) else None
    return output[place[0]] if place[0] < len(output) else None


def with_outputs(changes: Mapping[Place, Any], output: Any) -> Any:
    """The same output with others at some places."""
    if () in changes:
        return changes[()]
    if not changes:
        return output
    if isinstance(output, Mapping):
        made = type(output)(output)
        for (name,), value in changes.items():
            made[name] = value
        return made
    items = list(output)
    for (at,), value in changes.items():
        items[at] = value
    return type(output)(items)


def output_places(output: Any) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in what a module returns, one level deep."""
    if isinstance(output, Tensor):
        yield (), output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, Tensor):
                yield (name,), value
    elif type(output) in (tuple, list):
        for i, value in enumerate(output):
            if isinstance(value, Tensor):
                yield (i,), value
