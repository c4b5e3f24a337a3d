"""Recognises the samples of a batch by their content, whatever order and padding they come in.

A row's digest covers what its boundary activations are computed from: token ids, token types and
position ids without their padding, pixel values, and every other tensor with one row per sample.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# Flags of a forward whose output holds something of every block.
WANTS_ALL_BLOCKS = frozenset({"output_hidden_states", "output_attentions", "output_router_logits"})
# What a loss, a decoder or the form of the output reads, as a rule: where a trial of the model has
# shown that nothing below the boundary reads them, two labels for one text share its row. Whatever
# has another name is hashed.
READ_ABOVE = WANTS_ALL_BLOCKS | frozenset(
    {
        "labels",
        "label",
        "label_ids",
        "class_labels",
        "start_positions",
        "end_positions",
        "next_sentence_label",
        "sentence_order_label",
        "return_loss",
        "num_items_in_batch",
        "return_dict",
        "use_cache",
        "logits_to_keep",
        "decoder_input_ids",
        "decoder_attention_mask",
    }
)
# One entry per token, none of which matters where the mask is 0.
_PER_TOKEN = ("input_ids", "token_type_ids", "position_ids")
# Arguments whose first dimension is the batch, most telling first.
_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
_MASK = "attention_mask"
# Code looks at these as a whole to leave work out (a mask of ones, one sequence a row), and to no
# other effect.
READ_BY_BATCHES = frozenset({_MASK, *_PER_TOKEN, *_INPUTS})
_NOT_ROWS = {"cache_position", "num_items_in_batch"}


class UnknownContent(ValueError):
    """Samples cannot be recognised in these arguments; the message says why."""


@dataclass(frozen=True)
class Rows:
    """The samples of one batch."""

    digests: tuple[bytes, ...]  # 16 bytes each
    spans: tuple[tuple[int, int], ...]  # (start, end) of each one's tokens in the padded batch

    def keys(self, token: bytes) -> list[bytes]:
        """The rows' keys (16 bytes each) under one state of the prefix's weights."""
        return [hashlib.blake2b(d, digest_size=16, key=token).digest() for d in self.digests]

    def take(self, rows: Sequence[int]) -> Rows:
        return Rows(tuple(self.digests[i] for i in rows), tuple(self.spans[i] for i in rows))


def _bytes_by_row(tensor: torch.Tensor, rows: int) -> np.ndarray:
    """(rows, bytes of one row), uint8."""
    return tensor.detach().cpu().contiguous().reshape(rows, -1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Call:
    """The arguments of one forward.

    An argument that is a dict stands for its entries: sentence-transformers calls its model with
    one, and writes into it. Properties raise `UnknownContent` where they cannot tell.
    """

    names: tuple[str, ...]  # of the positional arguments
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

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
        )

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: v for n, v in self.named.items() if isinstance(v, torch.Tensor)}

    @cached_property
    def size(self) -> int:
        """B, rows of the batch."""
        for name in _INPUTS:
            if name in self.tensors:
                return self.tensors[name].shape[0]
        for tensor in self.tensors.values():
            if tensor.ndim >= 2:
                return tensor.shape[0]
        raise UnknownContent("no argument is a tensor with one row per sample")

    def has_rows(self, name: str) -> bool:
        """Whether the argument is a tensor whose first dimension is the batch."""
        value = self.tensors.get(name)
        if value is None or not value.ndim or name in _NOT_ROWS:
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
        for name in (_MASK, "input_ids"):
            value = self.named.get(name)
            if self.has_rows(name) and value.ndim == 2:
                return value.shape[1]
        return None

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """What the path through the model can depend on: kinds of tensors, values of the rest."""
        kinds: list[tuple[Any, ...]] = []
        for name, value in sorted(self.named.items()):
            if name in self.tensors:
                kinds.append((name, value.ndim, value.dtype, self.has_rows(name)))
            elif isinstance(value, bool | int | float | str):
                # some are another number in every batch
                kinds.append((name, type(value) if name in _NOT_ROWS else value))
            else:
                raise UnknownContent(f"the argument {name} is a {type(value).__name__}")
        return tuple(kinds)

    def shapes(self, consumed: Collection[str] = ()) -> tuple[Any, ...]:
        """Shapes of one sample in every argument that `rows` would hash."""
        return tuple(
            (name, tuple(value.shape[1:]))
            for name, value in sorted(self.named.items())
            if self.has_rows(name) and (name not in READ_ABOVE or name in consumed)
        )

    def take(self, rows: Sequence[int]) -> Call:
        """The same call for some of its rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        return self.changed(lambda n, v: v.index_select(0, index) if self.has_rows(n) else v)

    @cached_property
    def spans(self) -> tuple[list[tuple[int, int]], list[bool]]:
        """Each row's span, and whether its mask is ones there alone; if not, it spans all of it."""
        size, tokens, mask = self.size, self.tokens, self.named.get(_MASK)
        if mask is None:
            return [(0, tokens or 0)] * size, [True] * size
        if not (self.has_rows(_MASK) and mask.ndim == 2):
            raise UnknownContent(f"{_MASK} is not of shape (B, T)")
        on = mask.detach().cpu() != 0
        count = on.sum(1).tolist()
        start = on.to(torch.uint8).argmax(1).tolist()
        last = on.flip(1).to(torch.uint8).argmax(1).tolist()
        plain = (mask.detach().cpu() == on).all(1).tolist()  # 2 is a global token in Longformer
        spans, ones = [], []
        for s, n, back, p in zip(start, count, last, plain, strict=True):
            whole = n > 0 and tokens - back - s == n and p
            spans.append((s, s + n) if whole else (0, tokens))
            ones.append(whole)
        return spans, ones

    def rows(self, salt: bytes, *, unpadded: bool, consumed: Collection[str] = ()) -> Rows:
        """Digest every row.

        Args:
            salt: what else the activations depend on.
            unpadded: leave the padding out, but not the place where tokens start, on which absolute
                positions depend.
            consumed: arguments of `READ_ABOVE` that something below the boundary does read.
        """
        size, tokens, (spans, ones) = self.size, self.tokens, self.spans
        if not unpadded:
            spans, ones = [(0, tokens or 0)] * size, [False] * size
        base = hashlib.blake2b(salt, digest_size=16)
        per_token: list[tuple[np.ndarray, int]] = []
        per_row: list[np.ndarray] = []
        mask: np.ndarray | None = None
        for name, value in sorted(self.named.items()):
            if name in READ_ABOVE and name not in consumed:
                continue
            if not isinstance(value, torch.Tensor):
                base.update(f"{name}={value!r};".encode())
                continue
            shape = tuple(value.shape)
            if not self.has_rows(name):
                base.update(f"{name}:{value.dtype}{shape};".encode())
                base.update(_bytes_by_row(value, 1))
                continue
            content = _bytes_by_row(value, size)
            if name == _MASK:
                mask = content  # a row without a mask is a row whose mask is all ones
            elif unpadded and name in _PER_TOKEN and shape[1:2] == (tokens,):
                base.update(f"{name}:{value.dtype}{shape[2:]};".encode())
                per_token.append((content, content.shape[1] // max(1, tokens)))
            else:
                base.update(f"{name}:{value.dtype}{shape[1:]};".encode())
                per_row.append(content)
        digests = []
        for row, ((start, end), plain) in enumerate(zip(spans, ones, strict=True)):
            digest = base.copy()
            digest.update(b"%d:%d;" % (start, end))
            for content, width in per_token:
                digest.update(content[row, start * width : end * width])
            for content in per_row:
                digest.update(content[row])
            if mask is not None and not plain:
                digest.update(mask[row])
            digests.append(digest.digest())
        return Rows(tuple(digests), tuple(spans))
