"""The arguments of one forward, whatever way they are handed over."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..backend import sent
from .forward_hooks import forward_object
from .host_copies import HostCopies

# Arguments whose first dimension is the batch, most telling first.
INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
MASK = "attention_mask"
NOT_ROWS = {"cache_position", "num_items_in_batch"}
# Flags of a forward whose output holds something of every block.
WANTS_ALL_BLOCKS = frozenset({"output_hidden_states", "output_attentions", "output_router_logits"})


class UnknownContent(ValueError):
    """Samples cannot be recognised in these arguments; the message says why."""


@dataclass(frozen=True)
class Call:
    """The arguments of one forward.

    An argument that is a dict stands for its entries: sentence-transformers calls its model with
    one, and writes into it. Properties raise `UnknownContent` where they cannot tell.

    Attributes:
        host: what the host has read of the tensors.
    """

    names: tuple[str, ...]  # of the positional arguments
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    host: HostCopies = field(default_factory=HostCopies, compare=False, repr=False)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Every argument that is not None, by name."""
        pairs = (*zip(self.names, self.args, strict=False), *self.kwargs.items())
        named: dict[str, Any] = {}
        for name, value in pairs:
            for inner, item in value.items() if isinstance(value, Mapping) else ((name, value),):
                if item is None:
                    continue
                if inner in named:
                    raise UnknownContent(f"two arguments are called {inner!r}")
                named[inner] = item
        return named

    def changed(self, change: Callable[[str, Any], Any]) -> Call:
        """The same call with `change(name, value)` for every value, in dicts of its own."""

        def of(name: str, value: Any) -> Any:
            if not isinstance(value, Mapping):
                return change(name, value)
            made = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
            made.update({inner: change(inner, item) for inner, item in value.items()})
            return made

        names = (*self.names, *("" for _ in self.args[len(self.names) :]))
        return Call(
            self.names,
            tuple(of(n, v) for n, v in zip(names, self.args, strict=False)),
            {name: of(name, value) for name, value in self.kwargs.items()},
            self.host,
        )

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: v for n, v in self.named.items() if isinstance(v, torch.Tensor)}

    @cached_property
    def size(self) -> int:
        """B, rows of the batch."""
        for name in INPUTS:
            if name in self.tensors:
                return self.tensors[name].shape[0]
        for tensor in self.tensors.values():
            if tensor.ndim >= 2:
                return tensor.shape[0]
        raise UnknownContent("no argument is a tensor with one row per sample")

    def has_rows(self, name: str) -> bool:
        """Whether the argument is a tensor whose first dimension is the batch."""
        value = self.tensors.get(name)
        if value is None or not value.ndim or name in NOT_ROWS:
            return False
        return value.shape[0] == self.size

    @property
    def device(self) -> torch.device:
        if not self.tensors:
            raise UnknownContent("no argument is a tensor with one row per sample")
        return next(iter(self.tensors.values())).device

    @cached_property
    def tokens(self) -> int | None:
        """T of the padded batch; None where nothing has one entry per token."""
        for name in (MASK, "input_ids"):
            value = self.named.get(name)
            if self.has_rows(name) and value.ndim == 2:
                return value.shape[1]
        return None

    def take(self, rows: Sequence[int]) -> Call:
        """The same call for some of its rows."""
        index = torch.tensor(rows, dtype=torch.long, device="cpu")
        there = sent(index, self.device)

        def taken(name: str, value: Any) -> Any:
            if not self.has_rows(name):
                return value
            part = value.index_select(0, there)
            return self.host.made(part, value, lambda on_host: on_host.index_select(0, index))

        return self.changed(taken)

    def cloned(self) -> Call:
        """The same call with tensors of its own."""

        def clone(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return self.host.made(value.clone(), value, lambda on_host: on_host)

        return self.changed(clone)

    @cached_property
    def spans(self) -> tuple[list[tuple[int, int]], list[bool]]:
        """Each row's span, and whether its mask is ones there alone; if not, it spans all of it."""
        size, tokens, mask = self.size, self.tokens, self.named.get(MASK)
        if mask is None:
            return [(0, tokens or 0)] * size, [True] * size
        if not (self.has_rows(MASK) and mask.ndim == 2):
            raise UnknownContent(f"{MASK} is not of shape (B, T)")
        values = self.host.of(mask)
        on = values != 0
        count = on.sum(1).tolist()
        start = on.to(torch.uint8).argmax(1).tolist()
        last = on.flip(1).to(torch.uint8).argmax(1).tolist()
        plain = (values == on).all(1).tolist()  # 2 is a global token in Longformer
        spans, ones = [], []
        for s, n, back, p in zip(start, count, last, plain, strict=True):
            whole = n > 0 and tokens - back - s == n and p
            spans.append((s, s + n) if whole else (0, tokens))
            ones.append(whole)
        return spans, ones


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of its forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def wanted_of_all_blocks(model: nn.Module, named: Mapping[str, Any]) -> str | None:
    """Why the output holds something of every block, None if it does not."""
    configs = text_configs(getattr(model, "config", None))
    for name in sorted(WANTS_ALL_BLOCKS):
        if named.get(name, any(getattr(c, name, False) for c in configs)):
            return f"{name}=True: every block's are wanted"
    for path, child in model.named_children():
        if (own := forward_object(child)) is not None:
            # AdaptiveLayerLoss of sentence-transformers asks for hidden states of all blocks there
            return f"a {type(own).__name__} stands in the place of {path}.forward"
    return None


def text_configs(config: Any) -> list[Any]:
    """A model's config and that of its text part."""
    if config is None or isinstance(config, dict):
        return []
    text = getattr(config, "get_text_config", None)
    return [config] if text is None else [config, text()]
