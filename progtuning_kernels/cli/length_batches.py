"""Micro-batches of rows of like length, for the `DataLoader` of a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch
from transformers import TrainerCallback

# Of batches of `rows`: windows whose rows are sorted by length together, enough to save most of
# the padding (docstrings, 32 rows a window: 2.7 padded tokens per token without, 1.07 with), and
# never more than a quarter of an epoch, so that rows meet other rows in the next one.
_WINDOWS_SORTED = 16
# Of batches of `tokens`: windows over which rows of one band of lengths are spread, never more
# than an eighth of an epoch. Real tokens take 85 to 95 % of the budget (GLUE, 1,024 and 4,096
# tokens, 20 and more windows an epoch), with 16 windows 75 to 92 %.
_WINDOWS_SPREAD = 8


class LengthBatches:
    """Row numbers of every micro-batch of one epoch: a pure function of seed, epoch and lengths.

    A window is what one optimizer step takes: `accumulate` micro-batches on each of `ranks` ranks,
    of rows of like length. Every row is in one micro-batch of an epoch; where their number is no
    multiple of `ranks`, the first ones come once more at the end. Every epoch has as many, because
    the Trainer asks once: with `tokens`, each epoch only deals the rows of a band of lengths anew.

    Args:
        lengths: tokens of every row.
        rows: rows of a micro-batch; the last one of an epoch may hold fewer.
        tokens: instead of `rows`, a micro-batch's rows times its longest row are at most that many;
            a row that is longer is alone.
        accumulate: micro-batches of a rank in one optimizer step.
        ranks: processes; micro-batch i of an epoch is for rank i % ranks.
        seed: with the epoch, it seeds the order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows: int | None = None,
        tokens: int | None = None,
        accumulate: int = 1,
        ranks: int = 1,
        seed: int = 0,
    ) -> None:
        if (rows is None) == (tokens is None):
            raise ValueError("LengthBatches: give either rows or tokens of a micro-batch")
        self._lengths, self._rows, self._ranks = lengths, rows, ranks
        self._window = accumulate * ranks  # in micro-batches
        self._seed, self._epoch = seed, 0
        self._bands = [] if tokens is None else self._banded(tokens)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        bands = self._bands or [(range(len(self._lengths)), self._rows)]
        count = sum(-(-len(band) // rows) for band, rows in bands)
        return -(-count // self._ranks) * self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        batches = list(chain.from_iterable(self._windows(random)))
        # ranks take turns, and all make as many steps
        return islice(cycle(batches), len(self))

    def _banded(self, tokens: int) -> list[tuple[list[int], int]]:
        """Bands of rows of like length, and how many of a band's rows a micro-batch takes."""
        window = tokens * self._window
        together = max(2, min(_WINDOWS_SPREAD, sum(self._lengths) // window // 8)) * self._window
        by_length = sorted(range(len(self._lengths)), key=self._lengths.__getitem__, reverse=True)
        bands, start = [], 0
        while start < len(by_length):
            rows = max(1, tokens // max(1, self._lengths[by_length[start]]))
            bands.append((by_length[start : start + together * rows], rows))
            start += together * rows
        return bands

    def _windows(self, random: torch.Generator) -> list[list[list[int]]]:
        """Micro-batches of every window of one epoch."""
        if self._bands:
            # all but the last band hold whole windows
            dealt = [_cut(_shuffled(band, random), rows) for band, rows in self._bands]
            windows = list(chain.from_iterable(_cut(part, self._window) for part in dealt))
            short = [w for w in windows if len(w) < self._window]
            return _shuffled([w for w in windows if len(w) == self._window], random) + short
        size = self._rows * self._window
        per_epoch = -(-len(self._lengths) // size)
        together = size * max(1, min(_WINDOWS_SORTED, per_epoch // 4))
        windows = []
        for part in _cut(_shuffled(range(len(self._lengths)), random), together):
            part.sort(key=self._lengths.__getitem__, reverse=True)
            cut, whole = _cut(_cut(part, self._rows), self._window), len(part) // size
            windows += _shuffled(cut[:whole], random) + cut[whole:]  # a shorter window stays last
        return windows


class EpochOfBatches(TrainerCallback):
    """Tells `own`, the batches and perhaps a collator, which epoch begins.

    The Trainer does not reach a batch sampler below two others, as in an epoch that several ranks
    resume.
    """

    def __init__(self, *own: Any) -> None:
        self._own = [one for one in own if hasattr(one, "set_epoch")]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self._own:
            one.set_epoch(int(state.epoch or 0))


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _shuffled(items: Sequence[Any], random: torch.Generator) -> list[Any]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]
