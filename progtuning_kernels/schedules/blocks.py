"""Schedules that train a few blocks at a time: LISA and BAdam."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import KW_ONLY, dataclass, field
from hashlib import blake2b
from itertools import count
from typing import Literal

from .plan import FreezePlan, bind_length, check_choice, check_step, whole_number

UnitPolicy = Literal["always", "never"]
BlockOrder = Literal["ascending", "descending", "random"]


def _stage(schedule: RandomBlockSchedule | CyclicBlockSchedule, step: int) -> int:
    check_step(step)
    return step // schedule.period


@dataclass(eq=False)
class RandomBlockSchedule:
    """LISA (arXiv 2403.17919, algorithm 1): a few random blocks, drawn anew every `period` steps.

    The blocks of a draw are a uniform sample without replacement, and draws are independent. Draw
    number step // period depends on it and the seed alone: ranks cannot differ, and a resumed run
    needs nothing.

    Args:
        blocks: how many train at a time (LISA's gamma).
        period: optimizer steps between draws (LISA's K).
        seed: any integer.
        embeddings: "always" is LISA's rule, under which backward always runs to the bottom (a step
            costs 1 - f/3, f the frozen share); under "never" it stops at the lowest drawn block.
        head: "always" is LISA's rule; "never" leaves it as it is.

    Raises:
        ValueError: on settings that no run can satisfy; from `plan`, more blocks than there are.
        TypeError: no number where one belongs.
    """

    blocks: int
    period: int
    _: KW_ONLY
    seed: int = 0
    embeddings: UnitPolicy = "always"
    head: UnitPolicy = "always"
    total_steps: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_settings(self)

    bind = bind_length
    stage = _stage

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        _check_fits(self.blocks, num_blocks)
        drawn = _sample("blocks", self.seed, self.stage(step), self.blocks, num_blocks)
        return _plan(self, drawn, num_blocks)


@dataclass(eq=False)
class CyclicBlockSchedule:
    """BAdam (arXiv 2404.02827): block coordinate descent, a few blocks at a time, in turn.

    A cycle is the blocks in `order`, cut into groups of `blocks`, of which the last may be smaller;
    each group trains for `period` steps, so that a cycle trains every block once. It takes
    ceil(L / blocks) * period steps.

    Args:
        blocks: how many train at a time (BAdam: 1).
        period: optimizer steps per group (BAdam's K).
        order: "ascending" (from the input), "descending", or "random": another permutation in
            every cycle, a function of its number and the seed.
        seed: of "random"; any integer.
        embeddings: "never" as in BAdam, whose default leaves them frozen, or "always".
        head: "always" (what BAdam's `active_modules` do for the new head of a classifier), or
            "never" (its default for the LM head, which is pretrained).

    Raises:
        ValueError: on settings that no run can satisfy; from `plan`, more blocks than there are.
        TypeError: no number where one belongs.
    """

    blocks: int
    period: int
    _: KW_ONLY
    order: BlockOrder = "ascending"
    seed: int = 0
    embeddings: UnitPolicy = "never"
    head: UnitPolicy = "always"
    total_steps: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_settings(self)
        check_choice("order", self.order, BlockOrder)

    bind = bind_length
    stage = _stage

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        _check_fits(self.blocks, num_blocks)
        cycle, turn = divmod(self.stage(step), -(-num_blocks // self.blocks))
        in_order = list(range(num_blocks))
        if self.order == "descending":
            in_order.reverse()
        elif self.order == "random":
            in_order = _sample("cycle", self.seed, cycle, num_blocks, num_blocks)
        group = in_order[turn * self.blocks : (turn + 1) * self.blocks]
        return _plan(self, group, num_blocks)


def _check_settings(schedule: RandomBlockSchedule | CyclicBlockSchedule) -> None:
    schedule.blocks = whole_number("blocks", schedule.blocks, 1)
    schedule.period = whole_number("period", schedule.period, 1)
    schedule.seed = whole_number("seed", schedule.seed)
    check_choice("embeddings", schedule.embeddings, UnitPolicy)
    check_choice("head", schedule.head, UnitPolicy)


def _check_fits(blocks: int, num_blocks: int) -> None:
    if blocks > num_blocks:
        raise ValueError(f"blocks={blocks} is more than the {num_blocks} blocks there are")


def _plan(
    schedule: RandomBlockSchedule | CyclicBlockSchedule, group: Collection[int], num_blocks: int
) -> FreezePlan:
    return FreezePlan(
        tuple(i in group for i in range(num_blocks)),
        embeddings=schedule.embeddings == "always",
        head=schedule.head == "always",
    )


def _uniform_64_bits(purpose: str, seed: int, draw: int) -> Iterator[int]:
    """Integers in [0, 2^64): BLAKE2b (RFC 7693) of "purpose:seed:draw:i", eight from every i.

    Draw number n needs no history, and is the same on every machine, Python and rank.
    """
    for i in count():
        digest = blake2b(f"{purpose}:{seed}:{draw}:{i}".encode()).digest()
        for at in range(0, len(digest), 8):
            yield int.from_bytes(digest[at : at + 8], "little")


def _sample(purpose: str, seed: int, draw: int, size: int, out_of: int) -> list[int]:
    """`size` of the numbers 0..out_of-1 in random order: a Fisher-Yates shuffle, stopped early."""
    numbers = list(range(out_of))
    bits = _uniform_64_bits(purpose, seed, draw)
    for i in range(size):
        left = out_of - i
        fair = 2**64 - 2**64 % left  # what lies above would favour the low numbers
        j = i + next(b for b in bits if b < fair) % left
        numbers[i], numbers[j] = numbers[j], numbers[i]
    return numbers[:size]
