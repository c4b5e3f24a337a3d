"""Has the ranks of a sharded model do the same in every forward: a block that one of them runs, all
of them have to gather.

Every rank says in one small vector what its batch needs, and the largest of every entry is what all
do. Nothing is sent in stages without a cache, where all know the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ANOTHER_RANK = "another rank's forward runs its prefix: its report says why"


class Ranks(Protocol):
    """The ranks that gather together."""

    @property
    def rank(self) -> int:
        """This one."""

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks, entry by entry; all come here."""

    def share(self, value: bytes, source: int) -> bytes:
        """What the rank `source` was called with; all come here."""


@dataclass
class Vote:
    """What one rank's forward needs, or all ranks' together, in a stage whose level is `level`.

    Attributes:
        off: the cache is switched off for the stage.
        bypass: the forward runs as without a cache.
        doubted: a setting has changed.
        changed: lowest unit whose weights have changed; None where none has.
        teacher: rank that meets arguments which no trial has shown; the last of several, or None.
        unbound: rows of some level have no token yet.
        levels: that the rows of the batch are at, `level` for those that are ready, 0 for new ones.
        lacking: levels from which no forward can start.
        stored: levels below `level` that have rows.
    """

    level: int
    off: bool = False
    bypass: bool = False
    doubted: bool = False
    changed: int | None = None
    teacher: int | None = None
    unbound: bool = False
    levels: set[int] = field(default_factory=set)
    lacking: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)

    def together(self, ranks: Ranks) -> Vote:
        """What all ranks do."""
        size = self.level + 1
        changed = 0 if self.changed is None else self.level - self.changed
        numbers = [self.off, self.bypass, self.doubted, self.unbound, changed]
        numbers.append(0 if self.teacher is None else self.teacher + 1)
        for chosen in (self.levels, self.lacking, self.stored):
            numbers += [level in chosen for level in range(size)]
        off, bypass, doubted, unbound, changed, teacher, *flags = ranks.largest(
            [int(number) for number in numbers]
        )
        sets = [{level for level in range(size) if flags[i * size + level]} for i in range(3)]
        return Vote(
            self.level,
            bool(off),
            bool(bypass),
            bool(doubted),
            self.level - changed if changed else None,
            teacher - 1 if teacher else None,
            bool(unbound),
            *sets,
        )


def any_rank(ranks: Ranks | None) -> Callable[[bool], bool]:
    """Whether something holds on any rank; with one process, whether it holds."""
    if ranks is None:
        return bool
    return lambda here: bool(ranks.largest([int(here)])[0])
