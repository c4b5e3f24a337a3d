"""Recognises the samples of a batch by their content, whatever order and padding they come in.

A row's digest covers what its boundary activations are computed from: token ids, token types and
position ids without their padding, pixel values, and every other tensor with one row per sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..model.call import INPUTS, MASK, NOT_ROWS, WANTS_ALL_BLOCKS, Call, UnknownContent

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
# Code looks at these as a whole to leave work out (a mask of ones, one sequence a row), and to no
# other effect.
READ_BY_BATCHES = frozenset({MASK, *_PER_TOKEN, *INPUTS})


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


def read_content(call: Call, consumed: Collection[str] = ()) -> None:
    """Have the host read what is looked at before the forward, all of it in one copy.

    That is what `digest_rows` hashes, and what packing asks for: masks and labels of one entry per
    token, of which there are no more bytes than of token ids.
    """
    call.host.read(
        value
        for name, value in call.tensors.items()
        if name not in READ_ABOVE
        or name in consumed
        or (value.ndim == 2 and not value.is_floating_point())
    )


def _bytes_by_row(tensor: torch.Tensor, rows: int) -> np.ndarray:
    """Of a tensor of the host: (rows, bytes of one row), uint8."""
    return tensor.contiguous().reshape(rows, -1).view(torch.uint8).numpy()


def signature(call: Call) -> tuple[Any, ...]:
    """What the path through the model can depend on: kinds of tensors, values of the rest."""
    kinds: list[tuple[Any, ...]] = []
    for name, value in sorted(call.named.items()):
        if name in call.tensors:
            kinds.append((name, value.ndim, value.dtype, call.has_rows(name)))
        elif isinstance(value, bool | int | float | str):
            # some are another number in every batch
            kinds.append((name, type(value) if name in NOT_ROWS else value))
        else:
            raise UnknownContent(f"the argument {name} is a {type(value).__name__}")
    return tuple(kinds)


def sample_shapes(call: Call, consumed: Collection[str] = ()) -> tuple[Any, ...]:
    """Shapes of one sample in every argument that `rows` would hash."""
    return tuple(
        (name, tuple(value.shape[1:]))
        for name, value in sorted(call.named.items())
        if call.has_rows(name) and (name not in READ_ABOVE or name in consumed)
    )


def digest_rows(call: Call, salt: bytes, *, unpadded: bool, consumed: Collection[str] = ()) -> Rows:
    """Digest every row.

    Args:
        salt: what else the activations depend on.
        unpadded: leave the padding out, but not the place where tokens start, on which absolute
            positions depend.
        consumed: arguments of `READ_ABOVE` that something below the boundary does read.
    """
    size, tokens, (spans, ones) = call.size, call.tokens, call.spans
    if not unpadded:
        spans, ones = [(0, tokens or 0)] * size, [False] * size
    base = hashlib.blake2b(salt, digest_size=16)
    per_token: list[tuple[np.ndarray, int]] = []
    per_row: list[np.ndarray] = []
    mask: np.ndarray | None = None
    for name, value in sorted(call.named.items()):
        if name in READ_ABOVE and name not in consumed:
            continue
        if not isinstance(value, torch.Tensor):
            base.update(f"{name}={value!r};".encode())
            continue
        shape = tuple(value.shape)
        if not call.has_rows(name):
            base.update(f"{name}:{value.dtype}{shape};".encode())
            base.update(_bytes_by_row(call.host.of(value), 1))
            continue
        content = _bytes_by_row(call.host.of(value), size)
        if name == MASK:
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
