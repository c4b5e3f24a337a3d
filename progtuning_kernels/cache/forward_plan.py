"""Plans one forward: which rows to read, which to compute first, and which to store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .break_even import BreakEven, Stopwatch
from .content_keys import Call, Rows
from .keyed_rows import KeyedRows
from .side_forwards import SideForwards
from .stand_ins import Catch, Swaps
from .trial import Path


@dataclass
class ForwardPlan:
    """One forward of a model whose path is known.

    Attributes:
        level: the boundary.
        rows: the samples of `call`.
        hash_ms: what it took to recognise them.
        grads: it is a training forward; others read and store nothing.
        still_hold: asked whether rows (B, T, C) that were read are still what the prefix computes.
        taken: called with boundary activations (B, T, C) that a forward has computed and with the
            spans of their tokens.
        stand_ins: to install for the forward.
        served: it runs without the prefix, or without a part of it.
    """

    level: int
    call: Call
    path: Path
    rows: Rows
    hash_ms: float
    grads: bool
    side: SideForwards
    stored: KeyedRows
    counts: BreakEven
    watch: Stopwatch
    still_hold: Callable[[Tensor], bool]
    taken: Callable[[Tensor, Sequence[tuple[int, int]]], None]
    stand_ins: list[Swaps | Catch] = field(default_factory=list)
    served: bool = False
    _lower: set[int] = field(default_factory=set)  # levels below that hold some of the rows

    def make(self, *, proved: bool) -> None:
        """Decide, and compute what is to be computed before.

        Args:
            proved: the plan's first training forward, which must run the prefix, is over.
        """
        if self._length is None:  # a shape that was not seen yet
            self._take()
            return
        best = self._best_levels()
        self._lower = set(best) - {0, self.level}
        missing = best.count(0)
        if self.grads:
            self.counts.hits += self.call.size - missing
            self.counts.misses += missing
        levels = set(best)
        if not proved and self.grads:
            self._take()
        elif len(levels) == 1 and not missing:
            self._serve_one(levels.pop())
        elif 2 * missing > self.call.size or not self.grads:
            self._take()
        else:
            self._serve_mixed(best)

    @property
    def _length(self) -> int | None:
        return self.path.length(self.call)

    def _best_levels(self) -> list[int]:
        """For each row, the highest level that holds it; 0 where none does."""
        best = [0] * self.call.size
        for level in reversed(self.stored.known_levels()):
            if level in self.path.levels:
                there = self.stored.contains(level, self.rows)
                best = [b or (level if found else 0) for b, found in zip(best, there, strict=True)]
        return best

    def _read(self, level: int, rows: Rows) -> Tensor | None:
        """(rows, T, C); None where the store has lost one."""
        started, count = self.watch.now(), len(rows.digests)
        shape = (self._length, self.path.width)
        hidden = self.stored.read(level, rows, shape, self.call.device, self.path.dtype)
        if hidden is not None:
            hash_ms = self.hash_ms * count / self.call.size
            self.watch.stop(started, lambda ms: self.counts.add_read(ms + hash_ms, count))
        return hidden

    def _serve_one(self, level: int) -> None:
        """All rows from one level; those of a lower one move up on the way."""
        hidden = self._read(level, self.rows)
        if hidden is None or (level == self.level and not self.still_hold(hidden)):
            self._take()
            return
        self._feed(level, hidden)
        if level < self.level:
            self._take(whole=False)

    def _serve_mixed(self, best: Sequence[int]) -> None:
        """Missing rows by a forward of their own that ends at the boundary, the rest read."""
        whole: Tensor | None = None
        for level in sorted(set(best), reverse=True):
            chosen = [i for i, at in enumerate(best) if at == level]
            rows = self.rows.take(chosen)
            if level and (read := self._read(level, rows)) is None:
                self._take()
                return
            if level == self.level:
                hidden = read
            else:
                hidden = self.side.boundary_activations(
                    self.path.levels,
                    self.level,
                    self.call.take(chosen),
                    (level, read) if level else None,
                    draws=self.path.draws,
                )
                if level:
                    self.stored.drop(level, rows)
                self._store(rows, hidden)
                # as a read row is, so that a batch does not depend on what was stored
                for row, (start, end) in zip(hidden, rows.spans, strict=True):
                    row[:start] = 0
                    row[end:] = 0
            if whole is None:
                whole = hidden.new_empty((self.call.size, *hidden.shape[1:]))
            whole[torch.tensor(chosen, dtype=torch.long, device=whole.device)] = hidden
        self._feed(self.level, whole)

    def _feed(self, level: int, hidden: Tensor) -> None:
        self.stand_ins.append(self.path.levels[level].feed(hidden))
        self.served = True

    def _store(self, rows: Rows, hidden: Tensor) -> bool:
        """Whether there was room for all of them."""
        refused = self.stored.write(self.level, rows, hidden, hits=self.counts.hits)
        self.counts.refused += refused
        return not refused

    def _take(self, *, whole: bool = True) -> None:
        """Store what arrives at the boundary in a training forward; rows leave lower levels.

        Args:
            whole: it runs the whole prefix, and shows what that costs.
        """
        if not self.grads:
            return
        started = self.watch.now() if whole else None

        def receive(hidden: Tensor) -> None:
            size = hidden.shape[0]
            if started is not None:
                self.watch.stop(started, lambda ms: self.counts.add_prefix(ms, size))
            if self._length is None:
                self.path.lengths[self.call.shapes(self.path.consumed)] = hidden.shape[1]
                self.rows = Rows(self.rows.digests, ((0, hidden.shape[1]),) * size)
            self.taken(hidden, self.rows.spans)
            for level in self._lower:  # first: a full store has no room for a row twice
                self.stored.drop(level, self.rows)
            if self._store(self.rows, hidden) and self.counts.wants_reads:
                self._read(self.level, self.rows)

        self.stand_ins.append(self.path.levels[self.level].take(receive))
