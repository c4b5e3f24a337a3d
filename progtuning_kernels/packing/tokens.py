"""Which tokens of a padded batch are kept, and where each one stands, padded and packed.

`B, T` are rows and columns of the padded batch, `N` the tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backend import sent
from ..model.host_copies import waits_for
from .padding_reads import padding_read

GROUPS = 4  # README.md: 2, 4, 8 of them leave 0.37, 0.24, 0.20 of the area of attention (RTE)
# What one more group costs, in scores of attention (places times places times heads). CPU: 0.7 ms
# of calls, forward and backward with dropout, against 3.4 ns a score (2 cores). GPU: 100 us of
# launches against 0.02 ns, predicted.
_SCORES_PER_GROUP = {"cpu": 2e5, "cuda": 5e6}


class _Take(torch.autograd.Function):
    """`x.index_select(dim, index)` for an index without repetition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None


class _Place(torch.autograd.Function):
    """`x.index_select(dim, slot)`, where `slot[index]` is 0, 1, ...; gradients of the places that
    repeat a token are dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return x.index_select(dim, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(ctx.dim, index), None, None, None


class _Unpack(torch.autograd.Function):
    """Rows (N, ...) at `index` of `padded` (B, T, ...), which is filled in place.

    What it returns is no view: FSDP2 loses its hooks on one that is written into.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        padded: Tensor,
        index: Tensor,
        watch: Callable[[bool | None], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(padded)
        ctx.watch = watch
        padded.view(-1, *padded.shape[2:]).index_copy_(0, index, packed)
        return padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        packed = grad.flatten(0, 1).index_select(0, index)
        if ctx.watch is not None:
            ctx.watch(padding_read(grad, packed))
        return packed, None, None, None


@dataclass(frozen=True)
class Group:
    """Rows of like length, which attend together.

    Their tokens are the packed ones from `first` to `last`; `slot` (rows * columns,) says which of
    these stands at every place of the group's own padded form, `index` where each one stands there.
    """

    first: int
    last: int
    rows: Tensor  # (rows,), their numbers in the batch
    columns: tuple[int, int]  # of the batch: from, to
    slot: Tensor
    index: Tensor


@dataclass(eq=False)
class PackedTokens:
    """The kept tokens of one batch. What runs packed holds (1, N, ...) instead of (B, T, ...).

    Attributes:
        index: (N,), the place of each packed token in the flattened batch.
        slot: (B, T), the packed token that stands at each place; where none does, another one of
            its row, so that a row with NaN spoils no other.
        groups: for attention; none where it runs ungrouped.
        noise: written in place of zeros where tokens are unpacked, for a trial.
        watch: told in a backward whether padding gets a gradient (`padding_read`).
    """

    index: Tensor
    slot: Tensor
    groups: tuple[Group, ...] = ()
    noise: torch.Generator | None = None
    watch: Callable[[bool | None], None] | None = None
    # packed tensors and parts of masks by what they were made from, which is kept with them
    made: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # (packed, padded) by id of the packed one
    origins: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def padded_shape(self) -> torch.Size:
        return self.slot.shape

    @property
    def count(self) -> int:
        """N."""
        return self.index.shape[0]

    def holds_padded(self, tensor: Any) -> bool:
        """Whether this is (B, T, ...)."""
        return isinstance(tensor, Tensor) and tensor.shape[:2] == self.slot.shape

    def holds_packed(self, tensor: Any) -> bool:
        """Whether this is (1, N, ...)."""
        return isinstance(tensor, Tensor) and tensor.shape[:2] == (1, self.index.shape[0])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...), or (1, T, ...) for all rows, to (1, N, ...)."""
        if padded.shape[0] == 1 != self.slot.shape[0]:
            padded = padded.expand(self.slot.shape[0], *padded.shape[1:])
        return _Take.apply(padded.flatten(0, 1), self.index, 0).unsqueeze(0)

    def pack_once(self, padded: Tensor) -> Tensor:
        """`pack`, for what every block is called with; the same tensor gives the same one again."""
        if padded.requires_grad and torch.is_grad_enabled():
            return self._remember(padded, self.pack(padded))  # recomputation repeats all of it
        key = id(padded)
        if key not in self.made:
            self.made[key] = padded, self._remember(padded, self.pack(padded))
        return self.made[key][1]

    def _remember(self, padded: Tensor, packed: Tensor) -> Tensor:
        self.origins[id(packed)] = packed, padded
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...), zeros at padding."""
        shape = *self.slot.shape, *packed.shape[2:]
        if self.noise is None:
            padded = packed.new_zeros(shape)
        else:
            padded = torch.randn(shape, generator=self.noise, dtype=torch.float32, device="cpu").to(
                packed
            )
        return _Unpack.apply(packed[0], padded, self.index, self.watch)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...); at padding stand other tokens of the same row."""
        padded = _Place.apply(packed[0], self.slot.flatten(), self.index, 0)
        return padded.view(*self.slot.shape, *packed.shape[2:])

    def forget(self) -> None:
        """Drop what was made for one forward; its recomputation makes it anew."""
        self.made.clear()
        self.origins.clear()


@dataclass(frozen=True)
class FedTokens:
    """Where the tokens of one forward stand; a `Feed` of captured graphs.

    Attributes:
        key: (B, T) and N of each stack, and what of it runs packed.
        tensors: index and slot of each.
        using: has the forward inside take others.
    """

    key: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    using: Callable[[Sequence[Tensor]], AbstractContextManager[None]]


def pad_heads(packed: Tensor, slot: Tensor, index: Tensor, rows: int) -> Tensor:
    """(1, heads, N, width) to (rows, heads, columns, width), in the layout that it is in."""
    tokens_first = packed[0].transpose(0, 1)  # (N, heads, width)
    if tokens_first.is_contiguous():
        padded = _Place.apply(tokens_first, slot, index, 0)
        return padded.view(rows, -1, *padded.shape[1:]).transpose(1, 2)
    padded = _Place.apply(packed[0], slot, index, 1)
    return padded.view(padded.shape[0], rows, -1, padded.shape[2]).transpose(0, 1)


def take_places(padded: Tensor, index: Tensor) -> Tensor:
    """(rows, columns, ...) to (1, tokens, ...)."""
    return _Take.apply(padded.flatten(0, 1), index, 0).unsqueeze(0)


def on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copies of bool tensors, by one read where all are on one device."""
    if len(tensors) < 2 or not waits_for(tensors[0].device) or len({t.device for t in tensors}) > 1:
        return [t.cpu().numpy() for t in tensors]
    whole = torch.cat([t.flatten() for t in tensors]).cpu()
    parts = whole.split([t.numel() for t in tensors])
    return [part.view(t.shape).numpy() for part, t in zip(parts, tensors, strict=True)]


def kept_places(
    mask: Tensor, labels: Tensor | None = None, columns: Sequence[int] = ()
) -> np.ndarray:
    """(B, T), bool: the tokens that something reads. One read of a GPU."""
    read = on_host([mask != 0] if labels is None else [mask != 0, labels != -100])
    return kept_of(*read, columns=columns)


def kept_of(
    on: np.ndarray, counts: np.ndarray | None = None, *, columns: Sequence[int] = ()
) -> np.ndarray:
    """(B, T), bool: the tokens that something reads.

    These are the mask's; where a label counts, and the token before it, which predicts it in a
    language model; `columns`, which a head reads in every row; and whole rows of padding, whose
    tokens see each other.

    Args:
        on: (B, T), bool, the mask.
        counts: (B, T), bool, where a label counts.
    """
    kept = on.copy()
    if counts is not None:
        kept |= counts
        kept[:, :-1] |= counts[:, 1:]
    kept[:, list(columns)] = True
    kept[~on.any(1)] = True
    return kept


def rounded_up(kept: np.ndarray, sizes: int) -> np.ndarray:
    """(B, T) bool: `kept`, and some padding, first places first.

    The number of tokens becomes a multiple of B * T / sizes, so that there are at most `sizes`
    different numbers.
    """
    step = -(-kept.size // sizes)
    more = -kept.sum() % step
    flat = kept.flatten()
    flat[np.flatnonzero(~flat)[:more]] = True
    return flat.reshape(kept.shape)


def padding_follows(kept: np.ndarray) -> bool:
    """Whether padding follows the tokens in every row of (B, T), bool."""
    return bool((np.diff(kept.astype(np.int8), axis=1) <= 0).all())


def cost_of_group(device: torch.device, heads: int) -> float:
    """What one more group costs, in rows times columns squared of attention with `heads`."""
    return _SCORES_PER_GROUP.get(device.type, _SCORES_PER_GROUP["cuda"]) / heads


def pack_places(
    kept: np.ndarray, device: torch.device, *, groups: int, cost: float = 0.0
) -> PackedTokens:
    """Tokens packed row by row, rows of like length beside each other if `groups` is above 1.

    Args:
        kept: (B, T), bool.
        groups: most groups.
        cost: of one more group, see `cost_of_group`.
    """
    rows, columns = kept.shape
    counts = kept.sum(1)
    order = np.arange(rows) if groups == 1 else np.argsort(-counts, kind="stable")
    ordered = kept[order]
    row, column = np.nonzero(ordered)
    ends = np.concatenate(([0], np.cumsum(counts[order])))
    slot = np.full((rows, columns), -1, dtype=np.int64)
    slot[row, column] = np.arange(len(row))
    slot = np.maximum.accumulate(slot, axis=1)
    slot = np.where(slot < 0, ends[:-1, None], slot)
    arrays = [order[row] * columns + column, _in_batch_order(slot, order)]
    frames: list[tuple[int, int, tuple[int, int]]] = []
    for start, stop in _split(ordered, groups, cost):
        here = ordered[start:stop].any(0).nonzero()[0]
        frame = int(here[0]), int(here[-1]) + 1
        width = frame[1] - frame[0]
        first, last = int(ends[start]), int(ends[stop])
        frames.append((first, last, frame))
        arrays += [
            order[start:stop],
            slot[start:stop, frame[0] : frame[1]].ravel() - first,
            (row[first:last] - start) * width + column[first:last] - frame[0],
        ]
    index, whole, *parts = _to_device(arrays, device)
    made = [
        Group(first, last, parts[3 * i], frame, parts[3 * i + 1], parts[3 * i + 2])
        for i, (first, last, frame) in enumerate(frames)
    ]
    return PackedTokens(index, whole.view(rows, columns), tuple(made))


def _in_batch_order(slot: np.ndarray, order: np.ndarray) -> np.ndarray:
    placed = np.empty_like(slot)
    placed[order] = slot
    return placed.ravel()


def _to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tensors of int64, by one copy that the host does not wait for."""
    whole = torch.from_numpy(np.concatenate([a.astype(np.int64, copy=False) for a in arrays]))
    return list(sent(whole, device).split([len(a) for a in arrays]))


def _split(ordered: np.ndarray, groups: int, cost: float) -> list[tuple[int, int]]:
    """Ranges of rows, longest first, with the least area of attention (rows times columns squared)
    and `cost` for each; none where the whole batch is not dearer.
    """
    rows = ordered.shape[0]
    if groups == 1 or rows == 1:
        return []
    first = ordered.argmax(1)
    last = ordered.shape[1] - ordered[:, ::-1].argmax(1)
    # area[a, b]: of rows a to b (b included), from the columns that they span together
    starts = np.minimum.accumulate(np.where(np.tri(rows, dtype=bool).T, first, 2**30), 1)
    stops = np.maximum.accumulate(np.where(np.tri(rows, dtype=bool).T, last, 0), 1)
    height = np.arange(rows)[None, :] - np.arange(rows)[:, None] + 1
    area = np.where(height > 0, height * (stops - starts).astype(np.float64) ** 2 + cost, np.inf)
    best, cuts = area[0], []
    for _ in range(groups - 1):
        # whole[b]: rows up to b, the last group beginning at a + 1
        whole = best[:-1, None] + area[1:]
        at = whole.argmin(0)
        better = whole[at, np.arange(rows)]
        cuts.append(np.where(better < best, at, -1))
        best = np.minimum(best, better)
    if best[-1] >= rows * ordered.shape[1] ** 2 + cost:
        return []
    ranges, stop = [], rows
    for cut in reversed(cuts):
        at = int(cut[stop - 1])
        if at >= 0:
            ranges.append((at + 1, stop))
            stop = at + 1
    return [(0, stop), *reversed(ranges)]
