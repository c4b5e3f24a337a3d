"""Plans one forward: which rows to read, and which to compute before and store.

Missing rows are computed by a forward of their own, which starts from the highest level that has
them and ends at the boundary; then the model runs on from the activations of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backend import sent
from ..model.call import Call
from .break_even import BreakEven, Stopwatch
from .content_keys import Rows, sample_shapes
from .keyed_rows import KeyedRows
from .side_forwards import SideForwards
from .stand_ins import Swaps
from .trial import Path


@dataclass
class ForwardPlan:
    """One forward of a model whose path is known."""

    level: int  # the boundary
    call: Call
    path: Path
    rows: Rows  # the samples of `call`
    hash_ms: float  # what it took to recognise them
    side: SideForwards
    stored: KeyedRows
    counts: BreakEven
    watch: Stopwatch
    # whether rows of the whole batch that were read, (B, T, C), are still what the prefix computes;
    # where they are not, all rows have been dropped
    still_hold: Callable[[Tensor], bool]
    served: bool = False  # some rows were there
    # a row that was not: its place, boundary activations (1, T, C) and span
    computed: tuple[int, Tensor, tuple[int, int]] | None = None
    _best: list[int] = field(default_factory=list)  # for each row, the level that it is at
    _found: dict[int, Tensor] = field(default_factory=dict)  # (rows, T, C), read at each level

    def look_up(self) -> set[int]:
        """Read what is stored of the rows; the levels that they are at, 0 for new ones."""
        self._best = self._best_levels()
        for level in sorted(set(self._best) - {0}):
            chosen = self._rows_at(level)
            hidden = self._read(level, self.rows.take(chosen))
            if hidden is None:
                self._best = [0 if at == level else at for at in self._best]
            else:
                self._found[level] = hidden
        return set(self._best)

    def compute_again(self, levels: Collection[int]) -> None:
        """Take the rows at these levels for new ones."""
        for level in levels:
            if chosen := self._rows_at(level):
                self.stored.drop(level, self.rows.take(chosen))
        self._best = [0 if at in levels else at for at in self._best]

    def stand_ins_of_read(self, levels: Collection[int]) -> Swaps | None:
        """Stand-ins of a forward without gradients: one level has all rows, or the prefix runs.

        Args:
            levels: that rows are at, on any rank.
        """
        level, *others = levels
        if others or not level:
            return None
        hidden = self._found[level]
        if level == self.level and not self.still_hold(hidden):
            return None
        self.served = True
        return self.path.levels[level].feed(hidden)

    def stand_ins_of_training(
        self, levels: Collection[int], *, proved: bool, together: bool
    ) -> Swaps | None:
        """Stand-ins of a training forward; the first of a plan, until `proved`, gets none.

        Args:
            levels: that rows are at, on any rank.
            together: there are other ranks, whose forwards run the blocks that ours run.
        """
        best, size = self._best, self.call.size
        missing = best.count(0)
        self.counts.hits += size - missing
        self.counts.misses += missing
        if set(levels) == {self.level} and not self.still_hold(self._found[self.level]):
            self._best = best = [0] * size
            levels = [0]
        whole: Tensor | None = None
        for level in sorted(levels):
            chosen = self._rows_at(level)
            if not chosen:
                self._run_for_others(level)
                continue
            hidden = self._found.pop(level) if level == self.level else self._compute(level, chosen)
            if whole is None:
                whole = hidden if len(chosen) == size else hidden.new_empty(size, *hidden.shape[1:])
            if hidden is not whole:
                index = torch.tensor(chosen, dtype=torch.long, device="cpu")
                whole.index_copy_(0, sent(index, whole.device), hidden)
        if not proved:
            return None
        self.served = set(levels) == {self.level} if together else missing < size
        return self.path.levels[self.level].feed(whole)

    def _rows_at(self, level: int) -> list[int]:
        return [i for i, at in enumerate(self._best) if at == level]

    def _best_levels(self) -> list[int]:
        """For each row, the highest level that holds it; 0 where none does."""
        best = [0] * self.call.size
        if self.path.length(self.call) is None:  # a shape that was not seen yet
            return best
        for level in reversed(self.stored.known_levels()):
            if level in self.path.levels:
                there = self.stored.contains(level, self.rows)
                best = [b or (level if found else 0) for b, found in zip(best, there, strict=True)]
        return best

    def _read(self, level: int, rows: Rows) -> Tensor | None:
        """(rows, T, C); None where the store has lost one."""
        started, count = self.watch.now(), len(rows.digests)
        shape = (self.path.length(self.call), self.path.width)
        hidden = self.stored.read(level, rows, shape, self.call.device, self.path.dtype)
        if hidden is not None:
            hash_ms = self.hash_ms * count / self.call.size
            self.watch.stop(started, lambda ms: self.counts.add_read(ms + hash_ms, count))
        return hidden

    def _run_for_others(self, level: int) -> None:
        """Have one row run from `level` as rows of other ranks do, whose gathers wait for ours."""
        if level == self.level:
            return
        call, source = self.call.take([0]), None
        if level:
            shape = (1, self.path.length(call), self.path.width)
            source = level, torch.zeros(shape, dtype=self.path.dtype, device=call.device)
        self.side.boundary_activations(
            self.path.levels, self.level, call, source, draws=self.path.draws
        )

    def _compute(self, level: int, chosen: Sequence[int]) -> Tensor:
        """Boundary activations (rows, T, C) of some rows, which are at a lower `level`."""
        path, rows, whole = self.path, self.rows.take(chosen), len(chosen) == self.call.size
        read = self._found.pop(level) if level else None
        call = self.call if whole else self.call.take(chosen)
        started = self.watch.now()
        hidden = self.side.boundary_activations(
            path.levels,
            self.level,
            call,
            None if read is None else (level, read),
            draws=path.draws,
            # what a packed forward leaves at padding, and in holes of a mask, is not what a padded
            # one does
            packed=path.unpadded and path.per_token and all(call.spans[1]),
        )
        if read is None:
            self.watch.stop(started, lambda ms: self.counts.add_prefix(ms, len(chosen)))
        else:  # before the write: a full store has no room for a row twice
            self.stored.drop(level, rows)
        if path.length(call) is None:
            path.lengths[sample_shapes(call, path.consumed)] = hidden.shape[1]
            rows = Rows(rows.digests, ((0, hidden.shape[1]),) * len(chosen))
        refused = self.stored.write(self.level, rows, hidden, hits=self.counts.hits)
        self.counts.refused += refused
        if self.counts.wants_reads and not refused:
            self._read(self.level, rows)
        if self.computed is None:
            self.computed = chosen[0], hidden[:1].clone(), rows.spans[0]
        # zeros, as around a row that was read: a batch does not depend on what was stored
        for row, (start, end) in zip(hidden, rows.spans, strict=True):
            row[:start] = 0
            row[end:] = 0
        return hidden
