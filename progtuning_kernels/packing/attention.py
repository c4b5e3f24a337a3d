"""Attention of packed tokens, by the implementation and with the mask that the model has.

transformers' models look their attention function up by a name in their config. Attention modules
inside packed blocks get a config that gives another name: the function found under it pads queries,
keys and values, calls the function that the model would have called, and packs what that returns.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.derived_classes import root_of
from .tokens import Group, PackedTokens, pad_heads, take_places

_NAME = "progtuning_packed"
_running: list[PackedBlock] = []  # blocks that run packed, the innermost last


class UnpackableError(RuntimeError):
    """Something cannot run on packed tokens; the message says what."""


@dataclass
class PackedBlock:
    """One block that runs packed.

    Attributes:
        cross: ids of attention modules whose keys and values come padded, from another stack.
        grouped: rows of like length attend in groups.
    """

    tokens: PackedTokens
    cross: frozenset[int] = frozenset()
    grouped: bool = False


@contextmanager
def running(block: PackedBlock) -> Iterator[None]:
    """Attention inside runs packed."""
    _running.append(block)
    try:
        yield
    finally:
        _running.pop()


def running_tokens() -> PackedTokens | None:
    """Those of the innermost packed block that is running."""
    return _running[-1].tokens if _running else None


@dataclass
class CallsSeen:
    """Attention modules that called an attention function, and which of them got keys and values
    of another length than its queries.
    """

    modules: dict[int, nn.Module] = field(default_factory=dict)
    cross: set[int] = field(default_factory=set)
    heads: int = 1


_seen: list[CallsSeen] = []


@contextmanager
def calls_noted() -> Iterator[CallsSeen]:
    _seen.append(CallsSeen())
    try:
        yield _seen[-1]
    finally:
        _seen.pop()


class _Name(str):
    """A name that is found as ours and compares as the model's own, by which code branches."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(_NAME)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (type(other) is str and other == _NAME)

    def __ne__(self, other: object) -> bool:
        return not self == other


class PackedConfig:
    """A config that names our attention function, and is the model's own in all else."""

    def __init__(self, own: Any) -> None:
        self.__dict__["own"] = own

    @property
    def _attn_implementation(self) -> str | None:
        name = self.own._attn_implementation
        # a padded forward that is compiled as a whole goes straight to the model's own function
        return _Name(name) if isinstance(name, str) and (_running or _seen) else name

    @property
    def _attn_implementation_internal(self) -> str | None:
        return self._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.own, memo)  # a copy of the model is an ordinary model

    def __reduce_ex__(self, protocol: int) -> Any:
        return (_itself, (self.own,))


def _itself(value: Any) -> Any:
    return value


def names_attention(module: nn.Module) -> bool:
    """Whether a module has a config that names an attention function."""
    config = module.__dict__.get("config")
    return isinstance(getattr(config, "_attn_implementation", None), str)


def own_name(module: nn.Module) -> str | None:
    """The name that the model's own config gives."""
    config = module.__dict__["config"]
    return (config.own if isinstance(config, PackedConfig) else config)._attn_implementation


def redirect(module: nn.Module) -> bool:
    """Have an attention module call our function; whether it can."""
    config, functions = module.__dict__["config"], _functions(module)
    if functions is None:
        return False
    if not isinstance(config, PackedConfig):
        functions.register(_NAME, _uncompiled())
        module.__dict__["config"] = PackedConfig(config)
    return True


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    """Attention between the graphs of a compiled block: sizes inside change with every batch."""
    return torch.compiler.disable(packed_attention)


def restore(module: nn.Module) -> None:
    config = module.__dict__.get("config")
    if isinstance(config, PackedConfig):
        module.__dict__["config"] = config.own


def _globals(module: nn.Module) -> dict[str, Any]:
    forward = inspect.unwrap(root_of(type(module)).forward)
    return getattr(forward, "__globals__", {})


def _functions(module: nn.Module) -> Any:
    """transformers' table of attention functions, as the module's own code finds it."""
    return _globals(module).get("ALL_ATTENTION_FUNCTIONS")


def _own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    if name == "eager":  # it is in no table: every file of models has one of its own
        function = _globals(module).get("eager_attention_forward")
        if function is None:
            raise UnpackableError(f"{type(module).__name__} has an eager attention of its own")
        return function
    return _functions(module)[name]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the attention module.
        query, key, value: (1, heads, N, width) where a packed block runs, else (B, heads, T, width)
            as in any model. Keys and values of another stack are (B, heads, S, width) always.
        attention_mask: what the model made for the padded batch.
        options: passed on to the model's own function.

    Returns:
        (1, N, heads, width), and no weights; elsewhere what the model's own function returns.
    """
    config = module.config
    name = config.own._attn_implementation
    function = _own_function(module, name)
    for seen in _seen:
        seen.modules[id(module)] = module
        seen.heads = query.shape[1]
        if key.shape[2] != query.shape[2]:
            seen.cross.add(id(module))
    if not _running:
        return _call(function, name, module, query, key, value, attention_mask, options)
    block = _running[-1]
    tokens = block.tokens
    rows, _ = tokens.padded_shape
    if query.shape[0] != 1 or query.shape[2] != tokens.count:
        raise UnpackableError(
            f"{type(module).__name__} hands queries of shape {tuple(query.shape)} to its attention "
            f"function, not (1, heads, {tokens.count}, width)"
        )
    cross = id(module) in block.cross
    for other in (key, value):
        if (cross and other.shape[0] != rows) or (not cross and other.shape[2] != tokens.count):
            raise UnpackableError(
                f"{type(module).__name__} hands keys of shape {tuple(other.shape)} to its "
                "attention function"
            )

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return _call(function, name, module, q, k, v, mask, options)[0]

    slot, index = tokens.slot.flatten(), tokens.index
    if cross:
        return take_places(
            attend(pad_heads(query, slot, index, rows), key, value, attention_mask), index
        ), None
    # others leave padding out themselves, and read lengths from the device in every call
    grouped = block.grouped and tokens.groups and name in ("sdpa", "eager")
    if not (grouped and _divides(attention_mask, tokens, options)):
        padded = [pad_heads(x, slot, index, rows) for x in (query, key, value)]
        return take_places(attend(*padded, attention_mask), index), None
    found = []
    for number, group in enumerate(tokens.groups):
        parts = [
            pad_heads(x[:, :, group.first : group.last], group.slot, group.index, len(group.rows))
            for x in (query, key, value)
        ]
        mask = _part_of(attention_mask, tokens, group, number)
        found.append(take_places(attend(*parts, mask), group.index))
    return torch.cat(found, 1), None


def _call(
    function: Callable[..., Any],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    if name in ("sdpa", "eager"):  # others read the name again
        return function(module, query, key, value, mask, **options)
    config = module.config
    module.config = config.own
    try:
        return function(module, query, key, value, mask, **options)
    finally:
        module.config = config


def _divides(mask: Any, tokens: PackedTokens, options: dict[str, Any]) -> bool:
    """Whether attention of a part of the rows can do with a part of the mask and nothing else."""
    if any(isinstance(option, Tensor) for option in options.values()):
        return False
    if mask is None:
        return True
    rows, columns = tokens.padded_shape
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, rows):
        return False
    if mask.ndim == 2:
        return mask.shape[1] == columns
    return mask.ndim == 4 and mask.shape[2] in (1, columns) and mask.shape[3] == columns


def _part_of(mask: Any, tokens: PackedTokens, group: Group, number: int) -> Tensor | None:
    """The mask (rows, ., columns or 1, columns) of one group."""
    if mask is None:
        return None
    key = id(mask), number
    if key not in tokens.made:
        part = mask if mask.shape[0] == 1 else mask.index_select(0, group.rows)
        start, stop = group.columns
        part = part[..., start:stop]
        if mask.ndim == 4 and mask.shape[2] != 1:
            part = part[:, :, start:stop]
        tokens.made[key] = mask, part
    return tokens.made[key][1]
