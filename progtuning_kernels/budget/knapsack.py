"""The units that are worth most within a budget, exactly: a knapsack above every boundary."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ..model.layout import EMBEDDINGS
from ..schedules import FreezePlan

Cost = int | Fraction


@dataclass(frozen=True)
class StepCosts:
    """What a step costs under any plan, in operations or seconds.

    Backward runs down to the lowest unit that trains. A block above it adds its weight gradients
    and its update when it trains, whatever the boundary is.

    Attributes:
        base: by boundary (the embeddings' is -1) and by whether the head trains: a step in which,
            beside the head, the unit at the boundary alone trains. What cannot train is left out.
        added: by block, what it adds when it trains above the boundary.
        full: of a step in which everything trains.
    """

    base: Mapping[tuple[int, bool], Cost]
    added: Mapping[int, Cost]
    full: Cost

    def of(self, plan: FreezePlan) -> Cost:
        """Of a step under a plan of units that can train."""
        boundary = EMBEDDINGS if plan.embeddings else plan.boundary
        above = (i for i, on in enumerate(plan.trainable) if on and i > boundary)
        return self.base[boundary, plan.head] + sum(self.added[i] for i in above)


class _Set(NamedTuple):
    """A set of blocks: bit i of `blocks` is block i."""

    cost: int
    importance: int
    blocks: int


def _whole(values: Collection[Cost]) -> int:
    """What makes whole numbers of all values."""
    return math.lcm(*(Fraction(value).denominator for value in values))


def choose_units(
    costs: StepCosts,
    importance: Sequence[Fraction],
    limit: Fraction,
    *,
    embeddings: Collection[bool] = (True, False),
    head: Collection[bool] = (True, False),
) -> FreezePlan | None:
    """The plan of most importance among those that cost at most `limit`; None if there is none.

    Of plans that are worth the same the cheaper one is taken, then the one of the higher blocks.

    A block above the boundary adds the same for every boundary, so one pass from the top down finds
    them all. It keeps the sets that no other one beats in both cost and importance (Nemhauser and
    Ullmann, "Discrete dynamic programming and capital allocation", 1969): of blocks that cost the
    same, at most one set for every number of blocks. Numbers are exact.

    Args:
        importance: of the embeddings, the blocks and the head; none negative.
        embeddings: whether they may train, and may be frozen.
        head: the same of the head.
    """
    num_blocks = len(importance) - 2
    scale = _whole([*costs.base.values(), *costs.added.values()])
    worth = _whole(importance)
    in_whole = [int(value * worth) for value in importance]
    most = math.floor(limit * scale)
    best: tuple[int, int, int, int, bool] | None = None
    sets = [_Set(0, 0, 0)]  # by cost, and by importance at once
    for boundary in range(num_blocks, EMBEDDINGS - 1, -1):
        block = boundary if 0 <= boundary < num_blocks else None
        for trains in head:
            base = costs.base.get((boundary, trains))
            if base is None or (boundary == EMBEDDINGS) not in embeddings:
                continue
            cost = int(base * scale)
            fitting = [s for s in sets if cost + s.cost <= most]
            if not fitting:
                continue
            chosen = fitting[-1]
            own = in_whole[boundary + 1] if boundary < num_blocks else 0
            found = chosen.importance + own + trains * in_whole[-1]
            blocks = chosen.blocks if block is None else chosen.blocks | 1 << block
            candidate = (found, -cost - chosen.cost, blocks, boundary, trains)
            best = candidate if best is None else max(best, candidate)
        if block is not None and block in costs.added:
            sets = _with_block(sets, block, int(costs.added[block] * scale), in_whole[block + 1])
            sets = [s for s in sets if s.cost <= most]
    if best is None:
        return None
    *_, blocks, boundary, trains = best
    flags = tuple(bool(blocks >> i & 1) for i in range(num_blocks))
    return FreezePlan(flags, embeddings=boundary == EMBEDDINGS, head=trains)


def _with_block(sets: Sequence[_Set], block: int, cost: int, importance: int) -> list[_Set]:
    """These sets, and each with one block more, without those that another one beats."""
    more = (_Set(s.cost + cost, s.importance + importance, s.blocks | 1 << block) for s in sets)
    kept: list[_Set] = []
    for one in sorted((*sets, *more), key=lambda s: (s.cost, -s.importance, -s.blocks)):
        if not kept or one.importance > kept[-1].importance:
            kept.append(one)
    return kept
