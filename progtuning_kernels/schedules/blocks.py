"""Schedules that train some of the blocks: sets given in advance, LISA and BAdam."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import KW_ONLY, dataclass, field
from hashlib import blake2b
from itertools import count
from typing import Any, Literal

from .plan import FreezePlan, bind_length, check_choice, check_step, whole_number

UnitPolicy = Literal["always", "never"]
BlockOrder = Literal["ascending", "descending", "random"]
BlockSet = str | int | Collection[int | str]
_PART = re.compile(r"(-?\d+)(?:-(-?\d+))?|embeddings|head")
_SPACES = re.compile(r"^\s+|\s+$|(?<=[,-])\s+|\s+(?=,)|(?<=\d)\s+(?=-\s)")


@dataclass(eq=False)
class FixedBlockSchedule:
    """Sets of blocks that are given in advance: one for the whole run, or one from each of some
    steps on. Blocks may thaw and freeze in any order.

    A set is a text like "0-3,8,-1" or a list like [0, 1, 8, -1]. A range includes both ends, and
    a negative number counts from the top: -1 is the last block, "4--1" is from block 4 to the last.
    The words "embeddings" and "head" in a set stand for these units. An empty set is the head
    alone.

    `FixedBlockSchedule("0-3")` trains the lowest four blocks, with the head; gradients run through
    the frozen ones above them. `FixedBlockSchedule({0: "-1", 100: "-2--1", 200: "-3--1"})` thaws
    from the top down, as ULMFiT does (arXiv 1801.06146).

    Args:
        blocks: a set, or {step: set}, from step 0 on.
        embeddings: "never", except in sets that name them, or "always".
        head: "always", or "never", except in sets that name it.

    Raises:
        ValueError: no such set, no set from step 0 on; from `plan`, a block that the model has not.
        TypeError: no number where one belongs.

    Example:
        ```python
        schedule = FixedBlockSchedule({0: "8-11", 100: "0-11,embeddings"})
        assert schedule.plan(99, num_blocks=12).boundary == 8
        assert schedule.plan(100, num_blocks=12).embeddings
        ```
    """

    blocks: BlockSet | Mapping[int, BlockSet]
    _: KW_ONLY
    embeddings: UnitPolicy = "never"
    head: UnitPolicy = "always"
    total_steps: int | None = field(default=None, init=False, repr=False)
    milestones: dict[int, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("embeddings", self.embeddings, UnitPolicy)
        check_choice("head", self.head, UnitPolicy)
        given = self.blocks if isinstance(self.blocks, Mapping) else {0: self.blocks}
        sets = {
            whole_number("a milestone's step", step, 0): text_of(s) for step, s in given.items()
        }
        if 0 not in sets:
            raise ValueError(f"blocks must say what trains from step 0 on, got {self.blocks!r}")
        self.milestones = dict(sorted(sets.items()))
        self.blocks = sets[0] if len(sets) == 1 else self.milestones

    bind = bind_length

    def stage(self, step: int) -> int:
        check_step(step)
        return bisect_right([*self.milestones], step) - 1

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        chosen = [*self.milestones.values()][self.stage(step)]
        return _plan(self, units_in(chosen, num_blocks), num_blocks)


def is_block_set(text: str) -> bool:
    return all(map(_PART.fullmatch, text.split(",")))


def text_of(blocks: BlockSet) -> str:
    """A set of blocks as a text without spaces; "" for none."""
    if not isinstance(blocks, str):
        to_list: Any = getattr(blocks, "tolist", None)
        if to_list is not None:
            blocks = to_list()  # of an array or tensor: a mask would pass for numbers 0 and 1
        items = blocks if isinstance(blocks, Collection) else [blocks]
        if isinstance(items, Set):  # all ranks, and a resumed run, must write it alike
            items = sorted(items, key=str)
        blocks = ",".join(
            i if isinstance(i, str) else str(whole_number("a block", i)) for i in items
        )
    text = _SPACES.sub("", blocks)  # not those of "1 0", which is no block 10
    if text and not is_block_set(text):
        raise ValueError(f"blocks must be like '0-3,8,-1' or [0, 1, 8], got {blocks!r}")
    return text


def units_in(text: str, num_blocks: int) -> set[int | str]:
    """The blocks of a set, counted from the input, and the words in it."""
    units: set[int | str] = set()
    for part in filter(None, text.split(",")):
        first, last = _PART.fullmatch(part).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if first is None:
            units.add(part)
            continue
        ends = [int(first), int(last or first)]
        if not all(-num_blocks <= end < num_blocks for end in ends):
            raise ValueError(f"block {part} is none of the {num_blocks} blocks there are")
        low, high = (end % num_blocks for end in ends)
        if low > high:
            raise ValueError(f"blocks {part} of {num_blocks} are none: write the lower one first")
        units.update(range(low, high + 1))
    return units


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
    schedule: RandomBlockSchedule | CyclicBlockSchedule | FixedBlockSchedule,
    group: Collection[int | str],
    num_blocks: int,
) -> FreezePlan:
    return FreezePlan(
        tuple(i in group for i in range(num_blocks)),
        embeddings=schedule.embeddings == "always" or "embeddings" in group,
        head=schedule.head == "always" or "head" in group,
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
