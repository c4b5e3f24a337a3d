"""Freezing schedules: pure functions of (step, number of blocks). Standard library only.

A schedule answers one question: which units (embeddings, blocks 0..L-1, head) train at an optimizer
step. It holds no model and no state beyond its settings, so every rank, and a resumed run, derives
the same plan from the same step. Random ones draw from (seed, number of the draw) and keep no
generator. `AdaptiveSchedule` alone has state: its plans are functions of the step and of the
decisions it has recorded, which travel with `PatchHandle.state_dict`.

To add a schedule: one class with `plan(step, num_blocks) -> FreezePlan`, `stage(step) -> int`,
`total_steps` and `bind(total_steps)`; one line in `schedule_files.py`; one test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate, count
from numbers import Real
from operator import index
from typing import Any, Literal, Protocol, get_args, runtime_checkable

EmbeddingPolicy = Literal["first_stage", "always", "never"]
UnitPolicy = Literal["always", "never"]
BlockOrder = Literal["ascending", "descending", "random"]


@dataclass(frozen=True)
class FreezePlan:
    """Which units train.

    Attributes:
        trainable: one flag per block, block 0 (at the input) first.
        embeddings: whether the embeddings train.
        head: whether the head (final norm, pooler, classifier, LM head) trains.
    """

    trainable: tuple[bool, ...]
    embeddings: bool = False
    head: bool = True

    @property
    def num_blocks(self) -> int:
        return len(self.trainable)

    @property
    def boundary(self) -> int:
        """Lowest trainable block: 0 if the embeddings train, `num_blocks` if only the head does."""
        if self.embeddings:
            return 0
        return next((i for i, on in enumerate(self.trainable) if on), self.num_blocks)

    @classmethod
    def from_boundary(cls, boundary: int, num_blocks: int, *, embeddings: bool) -> FreezePlan:
        """The plan that trains blocks `boundary..num_blocks-1` and the head."""
        return cls(tuple(i >= boundary for i in range(num_blocks)), embeddings=embeddings)


@runtime_checkable
class Schedule(Protocol):
    """What `patch_model` asks of a schedule; its `repr`, which a resumed run compares, shows all
    settings.
    """

    total_steps: int | None

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        """The plan of optimizer step `step` (0 is the first) for a model of `num_blocks` blocks."""
        ...

    def stage(self, step: int) -> int:
        """Index of the stage that `step` belongs to."""
        ...

    def bind(self, total_steps: int) -> Schedule:
        """Set the length of the run in optimizer steps; returns the schedule itself."""
        ...


@runtime_checkable
class ObservingSchedule(Protocol):
    """What `patch_model` asks, beside `Schedule`, of one that decides by gradient norms."""

    def observes(self, step: int) -> bool:
        """Whether the gradients of this step count."""
        ...

    def decides(self, step: int) -> bool:
        """Whether a decision falls after this step."""
        ...

    def observe(self, step: int, norms: Sequence[float], num_blocks: int) -> None:
        """Decide after step `step`, by one gradient norm per block (0 where none trains)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The decisions so far: numbers and lists only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the decisions of a saved run."""
        ...


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int of at least `least`: an int of any library, or a float that is whole.

    Raises:
        TypeError: no number.
        ValueError: a number that is not whole, or less than `least`.
    """
    wanted = f"{name} must be {'' if least is None else f'{least} or more, and '}whole"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{wanted}, got {value!r}: pass a number") from None
        if value != value // 1:
            raise ValueError(f"{wanted}, got {value!r}: pass an int") from None
        number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{wanted}, got {value!r}")
    return number


def check_schedule(schedule: Any, taker: str) -> None:
    """Raise `TypeError` if `schedule`, which was given to `taker`, is none."""
    if isinstance(schedule, type):
        raise TypeError(
            f"{taker} takes a schedule, not its class: pass {schedule.__name__}(...), "
            "e.g. ProgressiveSchedule(stages=3)"
        )
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"{taker} takes a schedule, e.g. ProgressiveSchedule(stages=3), got {schedule!r}"
        )


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        listing = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{name} must be one of {listing}, got {value!r}")


def _check_fits(blocks: int, num_blocks: int) -> None:
    if blocks > num_blocks:
        raise ValueError(f"blocks={blocks} is more than the {num_blocks} blocks there are")


def _uniform_64_bits(purpose: str, seed: int, draw: int) -> Iterator[int]:
    """Integers in [0, 2^64): BLAKE2b (RFC 7693) of "purpose:seed:draw:i", eight from every i.

    A counter instead of a generator: draw number n needs no history, and is the same on every
    machine, Python and rank.
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


class ProgressiveSchedule:
    """Progtuning (arXiv 2506.21119): T stages of equal length, the lowest part dropped at each.

    The L blocks are cut into T consecutive parts; stage t trains parts t..T-1 and the head. Equal
    parts have floor(L/T) blocks, left-over blocks go to the top part, which trains longest.

    Args:
        stages: T, at least 1 and at most the number of blocks.
        total_steps: optimizer steps of the run; stage t covers the steps s with
            floor(s*T/total_steps) == t. None: bound later by `bind` or by the Trainer callback;
            until then only step 0 has a plan.
        embeddings: "first_stage" (train in stage 0 only), "always" (backward can then never be
            truncated: a step costs 1 - f/3 instead of 1 - 2f/3), or "never".
        weights: contribution per block, finite, none negative, not all 0. Parts then have equal
            cumulative contribution instead of an equal count: part t begins where the blocks below
            hold nearest to t/T of the whole, at the lower of two places that are equally near,
            and no part is left empty. Compared exactly, so the same on every machine. None is the
            paper's rule.

    Raises:
        ValueError: on settings that no run can satisfy; the message names the setting.
    """

    def __init__(
        self,
        stages: int,
        total_steps: int | None = None,
        *,
        embeddings: EmbeddingPolicy = "first_stage",
        weights: Sequence[float] | None = None,
    ) -> None:
        _check_choice("embeddings", embeddings, EmbeddingPolicy)
        self.weights = None if weights is None else _weights(weights)
        self.stages = whole_number("stages", stages, 1)
        self.embeddings: EmbeddingPolicy = embeddings
        self.total_steps: int | None = None
        if total_steps is not None:
            self.bind(total_steps)

    def __repr__(self) -> str:
        weights = "" if self.weights is None else f", weights={self.weights}"
        return (
            f"ProgressiveSchedule(stages={self.stages}, total_steps={self.total_steps}, "
            f"embeddings={self.embeddings!r}{weights})"
        )

    def bind(self, total_steps: int) -> ProgressiveSchedule:
        total_steps = whole_number("total_steps", total_steps, 1)
        if total_steps < self.stages:
            raise ValueError(
                f"total_steps={total_steps} is fewer than stages={self.stages}: "
                "every stage needs at least one step"
            )
        self.total_steps = total_steps
        return self

    def stage(self, step: int) -> int:
        _check_step(step)
        if step == 0 or self.stages == 1:
            return 0
        if self.total_steps is None:
            raise ValueError(
                "the schedule does not know the length of the run: give total_steps or call "
                "schedule.bind(total_steps) before the first step"
            )
        return min(self.stages - 1, step * self.stages // self.total_steps)

    def boundaries(self, num_blocks: int) -> tuple[int, ...]:
        """First trainable block of every stage, e.g. (0, 4, 8) for 12 blocks in 3 stages."""
        if self.stages > num_blocks:
            raise ValueError(f"stages={self.stages} is more than the {num_blocks} blocks there are")
        if self.weights is None:
            return tuple(t * (num_blocks // self.stages) for t in range(self.stages))
        if len(self.weights) != num_blocks:
            raise ValueError(f"{len(self.weights)} weights for a model of {num_blocks} blocks")
        # contribution of the blocks below each cut
        below = [Fraction(0), *accumulate(map(Fraction, self.weights))]
        cuts = [0]
        for t in range(1, self.stages):
            target = below[-1] * t / self.stages
            # each part keeps at least one block, so the cut lies between these two
            allowed = range(cuts[-1] + 1, num_blocks - (self.stages - t) + 1)
            cuts.append(min(allowed, key=lambda cut: abs(below[cut] - target)))
        return tuple(cuts)

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        boundaries = self.boundaries(num_blocks)
        stage = self.stage(step)
        embeddings = self.embeddings == "always" or (self.embeddings == "first_stage" and not stage)
        return FreezePlan.from_boundary(boundaries[stage], num_blocks, embeddings=embeddings)


class MilestoneSchedule:
    """Explicit boundaries: from step s on, the blocks from `milestones[s]` and the head train.

    Args:
        milestones: {step: boundary}. A missing step 0 means boundary 0 from the start; a boundary
            equal to the number of blocks trains the head alone, one of -1 everything, the
            embeddings included. Boundaries may also fall again.
        embeddings: beside -1, "first_stage" (until the first milestone after step 0, and only under
            boundary 0), "always", or "never".

    `MilestoneSchedule({}, embeddings="always")` never freezes anything, and
    `MilestoneSchedule({0: 2, 10: 1, 20: 0, 30: -1})` thaws two blocks from the head down, the
    embeddings last.

    Raises:
        ValueError: on milestones that no run can have; the message names the milestone.
    """

    def __init__(
        self, milestones: Mapping[int, int], *, embeddings: EmbeddingPolicy = "first_stage"
    ) -> None:
        _check_choice("embeddings", embeddings, EmbeddingPolicy)
        if not isinstance(milestones, Mapping):
            raise TypeError(f"milestones must be {{step: boundary}}, got {milestones!r}")
        given = {
            whole_number("a milestone's step", step, 0): whole_number(
                f"the boundary of milestone {step}", boundary, -1
            )
            for step, boundary in milestones.items()
        }
        if embeddings == "never" and -1 in given.values():
            raise ValueError('a boundary of -1 trains the embeddings, and embeddings is "never"')
        self.milestones = dict(sorted({0: 0, **given}.items()))
        self.embeddings: EmbeddingPolicy = embeddings
        self.total_steps: int | None = None

    def __repr__(self) -> str:
        return f"MilestoneSchedule({self.milestones}, embeddings={self.embeddings!r})"

    def bind(self, total_steps: int) -> MilestoneSchedule:
        """Note the length of the run; milestones are absolute steps and do not depend on it."""
        self.total_steps = whole_number("total_steps", total_steps, 1)
        return self

    def stage(self, step: int) -> int:
        _check_step(step)
        return sum(milestone <= step for milestone in self.milestones) - 1

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        for milestone, boundary in self.milestones.items():
            if boundary > num_blocks:
                raise ValueError(
                    f"milestone {milestone}: boundary {boundary} is above the {num_blocks} blocks "
                    f"there are ({num_blocks} trains the head alone)"
                )
        stage = self.stage(step)
        boundary = list(self.milestones.values())[stage]
        first = self.embeddings == "first_stage" and stage == 0 and boundary == 0
        embeddings = boundary == -1 or first or self.embeddings == "always"
        return FreezePlan.from_boundary(boundary, num_blocks, embeddings=embeddings)


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
    """

    def __init__(
        self,
        blocks: int,
        period: int,
        *,
        seed: int = 0,
        embeddings: UnitPolicy = "always",
        head: UnitPolicy = "always",
    ) -> None:
        self.blocks, self.period = (
            whole_number("blocks", blocks, 1),
            whole_number("period", period, 1),
        )
        self.seed = whole_number("seed", seed)
        _check_choice("embeddings", embeddings, UnitPolicy)
        _check_choice("head", head, UnitPolicy)
        self.embeddings: UnitPolicy = embeddings
        self.head: UnitPolicy = head
        self.total_steps: int | None = None

    def __repr__(self) -> str:
        return (
            f"RandomBlockSchedule(blocks={self.blocks}, period={self.period}, seed={self.seed}, "
            f"embeddings={self.embeddings!r}, head={self.head!r})"
        )

    def bind(self, total_steps: int) -> RandomBlockSchedule:
        """Note the length of the run, on which no draw depends."""
        self.total_steps = whole_number("total_steps", total_steps, 1)
        return self

    def stage(self, step: int) -> int:
        _check_step(step)
        return step // self.period

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        _check_fits(self.blocks, num_blocks)
        drawn = set(_sample("blocks", self.seed, self.stage(step), self.blocks, num_blocks))
        return FreezePlan(
            tuple(i in drawn for i in range(num_blocks)),
            embeddings=self.embeddings == "always",
            head=self.head == "always",
        )


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
    """

    def __init__(
        self,
        blocks: int,
        period: int,
        *,
        order: BlockOrder = "ascending",
        seed: int = 0,
        embeddings: UnitPolicy = "never",
        head: UnitPolicy = "always",
    ) -> None:
        self.blocks, self.period = (
            whole_number("blocks", blocks, 1),
            whole_number("period", period, 1),
        )
        self.seed = whole_number("seed", seed)
        _check_choice("order", order, BlockOrder)
        _check_choice("embeddings", embeddings, UnitPolicy)
        _check_choice("head", head, UnitPolicy)
        self.order: BlockOrder = order
        self.embeddings: UnitPolicy = embeddings
        self.head: UnitPolicy = head
        self.total_steps: int | None = None

    def __repr__(self) -> str:
        return (
            f"CyclicBlockSchedule(blocks={self.blocks}, period={self.period}, "
            f"order={self.order!r}, seed={self.seed}, embeddings={self.embeddings!r}, "
            f"head={self.head!r})"
        )

    def bind(self, total_steps: int) -> CyclicBlockSchedule:
        """Note the length of the run, on which no plan depends."""
        self.total_steps = whole_number("total_steps", total_steps, 1)
        return self

    def stage(self, step: int) -> int:
        _check_step(step)
        return step // self.period

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        _check_fits(self.blocks, num_blocks)
        cycle, turn = divmod(self.stage(step), -(-num_blocks // self.blocks))
        in_order = list(range(num_blocks))
        if self.order == "descending":
            in_order.reverse()
        elif self.order == "random":
            in_order = _sample("cycle", self.seed, cycle, num_blocks, num_blocks)
        group = in_order[turn * self.blocks : (turn + 1) * self.blocks]
        return FreezePlan(
            tuple(i in group for i in range(num_blocks)),
            embeddings=self.embeddings == "always",
            head=self.head == "always",
        )


class AdaptiveSchedule:
    """AutoFreeze (arXiv 2102.01386): freezes from the bottom what has stopped changing.

    After every `interval` steps each active block's gradient norm n is compared with n' of the
    interval before: its change is |n' - n| / n'. Blocks freeze up to the first one whose change is
    at or above the given percentile of all of them; that one always exists, so that the top never
    freezes. Nothing thaws. n is the root mean square of the block's gradient norm over the last
    `window` steps of its interval (the published code takes the norm of a sum of gradients, which
    would need a second set of them).

    `PatchHandle` brings the norms, equal on all ranks, and carries the decisions in its state dict.
    `plan` is a pure function of the step and these decisions: a decision after step s holds from
    step s + 1 on, and one that is made again (after a return to an earlier step) replaces all from
    there on.

    Args:
        interval: optimizer steps between decisions; the second one is the first that can freeze.
        percentile: 0 freezes nothing, 100 all but what follows the block that changes most;
            interpolated linearly between the blocks, as numpy does.
        window: steps at the end of an interval whose norms count, 1 to `interval`; None: the last
            10, or all of a shorter interval.
        embeddings: "first_stage" (until the first block freezes), "always", or "never".

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        interval: int,
        *,
        percentile: float = 50.0,
        window: int | None = None,
        embeddings: EmbeddingPolicy = "first_stage",
    ) -> None:
        self.interval = whole_number("interval", interval, 1)
        if isinstance(percentile, bool) or not isinstance(percentile, Real):
            raise TypeError(f"percentile must be 0 to 100, got {percentile!r}: pass a number")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be 0 to 100, got {percentile}")
        self.percentile = float(percentile)
        self.window = whole_number(
            "window", min(10, self.interval) if window is None else window, 1
        )
        if self.window > self.interval:
            raise ValueError(f"window={window} is more than interval={interval}")
        _check_choice("embeddings", embeddings, EmbeddingPolicy)
        self.embeddings: EmbeddingPolicy = embeddings
        self.total_steps: int | None = None
        # (step, norm per block, boundary from the next step on), in the order of the steps
        self._decisions: list[tuple[int, tuple[float, ...], int]] = []

    def __repr__(self) -> str:
        return (
            f"AdaptiveSchedule(interval={self.interval}, percentile={self.percentile}, "
            f"window={self.window}, embeddings={self.embeddings!r})"
        )

    def bind(self, total_steps: int) -> AdaptiveSchedule:
        """Note the length of the run, on which no decision depends."""
        self.total_steps = whole_number("total_steps", total_steps, 1)
        return self

    @property
    def decisions(self) -> dict[int, int]:
        """{step: boundary from the next step on}, every decision so far."""
        return {step: boundary for step, _, boundary in self._decisions}

    def observes(self, step: int) -> bool:
        return step % self.interval >= self.interval - self.window

    def decides(self, step: int) -> bool:
        return step % self.interval == self.interval - 1

    def observe(self, step: int, norms: Sequence[float], num_blocks: int) -> None:
        """Record the norms of the interval that ends with `step`, and what follows from them.

        Raises:
            ValueError: not one finite norm per block, or a step that no interval ends with.
        """
        if not self.decides(step):
            raise ValueError(f"no interval of {self.interval} steps ends with step {step}")
        if len(norms) != num_blocks or not all(0 <= n < float("inf") for n in norms):
            raise ValueError(f"expected {num_blocks} finite norms, got {list(norms)}")
        self._decisions = self._before(step)
        boundary = 0
        if self._decisions:
            _, before, boundary = self._decisions[-1]
            active = range(boundary, num_blocks)
            changes = [_relative_change(before[i], norms[i]) for i in active]
            least = _percentile(changes, self.percentile)
            boundary += next(i for i, change in enumerate(changes) if change >= least)
        self._decisions.append((step, tuple(map(float, norms)), boundary))

    def state_dict(self) -> dict[str, Any]:
        return {"decisions": [[step, list(norms), b] for step, norms, b in self._decisions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._decisions = [(step, tuple(norms), b) for step, norms, b in state["decisions"]]

    def stage(self, step: int) -> int:
        """Number of decisions before `step` that froze something."""
        _check_step(step)
        return len({0} | {boundary for *_, boundary in self._before(step)}) - 1

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        _check_step(step)
        before = self._before(step)
        boundary = before[-1][2] if before else 0
        embeddings = self.embeddings == "always" or (
            self.embeddings == "first_stage" and boundary == 0
        )
        return FreezePlan.from_boundary(boundary, num_blocks, embeddings=embeddings)

    def _before(self, step: int) -> list[tuple[int, tuple[float, ...], int]]:
        return [decision for decision in self._decisions if decision[0] < step]


class AnnealedSchedule:
    """FreezeOut's learning rates (arXiv 1706.04983) for any schedule that only ever freezes.

    Every unit's rate falls from its full value to 0 at the step at which it freezes, along its own
    cosine, so that a freeze is no jump:

        scale(s) = a * (1 + cos(pi * s / s_u)) / 2      0 from s_u on

    with s_u the first step at which the plan leaves unit u out (the length of the run where it
    never does), and a = 1, or S / s_u (S steps in all) if `scaled`, which gives every unit the same
    sum of rates. FreezeOut itself, with its linear spacing, is `ProgressiveSchedule(L)` within.

    Plans are those of the schedule within. The scales take effect through groups of one unit each
    and any scheduler that takes factors:

        schedule = AnnealedSchedule(ProgressiveSchedule(12, total_steps))
        handle = patch_model(model, schedule)
        optimizer = MaskedAdamW(handle.param_groups(lr=5e-5, by_unit=True))
        factors = schedule.lr_factors(optimizer.param_groups, handle.num_blocks, base=warm_up)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)

    Args:
        schedule: of known length (`total_steps`) before the first scale is asked for.
        scaled: FreezeOut's "scaled" variant, with larger rates where they fall earlier.

    Raises:
        ValueError: a schedule that decides while it trains; from `lr_scales`, one that thaws.
    """

    def __init__(self, schedule: Schedule, *, scaled: bool = False) -> None:
        check_schedule(schedule, "AnnealedSchedule")
        if isinstance(schedule, ObservingSchedule):
            raise ValueError(
                f"{schedule!r} does not know its freezing steps in advance: nothing can be annealed"
            )
        self.schedule = schedule
        self.scaled = bool(scaled)
        self._ends: tuple[tuple[int | None, int], tuple[int, ...]] | None = None

    def __repr__(self) -> str:
        return f"AnnealedSchedule({self.schedule!r}, scaled={self.scaled})"

    @property
    def total_steps(self) -> int | None:
        return self.schedule.total_steps

    def bind(self, total_steps: int) -> AnnealedSchedule:
        self.schedule.bind(total_steps)
        return self

    def stage(self, step: int) -> int:
        return self.schedule.stage(step)

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        return self.schedule.plan(step, num_blocks)

    def freezing_steps(self, num_blocks: int) -> tuple[int, ...]:
        """First step without each unit (embeddings, blocks, head); `total_steps` where none is.

        Raises:
            ValueError: the length of the run is unknown, or a unit thaws.
        """
        total = self.total_steps
        if total is None:
            raise ValueError(
                "annealing needs the length of the run: call schedule.bind(total_steps) first"
            )
        if self._ends is None or self._ends[0] != (total, num_blocks):
            ends = [total] * (num_blocks + 2)
            before, stage = None, -1
            for step in range(total):
                if self.stage(step) == stage:
                    continue
                stage = self.stage(step)
                flags = _unit_flags(self.plan(step, num_blocks))
                for i, on in enumerate(flags):
                    if before is not None and on and not before[i]:
                        raise ValueError(f"{self.schedule!r} thaws at step {step}: nothing anneals")
                    if not on and ends[i] == total:
                        ends[i] = step
                before = flags
            self._ends = ((total, num_blocks), tuple(ends))
        return self._ends[1]

    def lr_scales(self, step: int, num_blocks: int) -> tuple[float, ...]:
        """Factor of the learning rate per unit: embeddings, blocks 0..L-1, head."""
        _check_step(step)
        total = self.total_steps
        return tuple(
            (total / end if self.scaled else 1.0) * (1 + math.cos(math.pi * step / end)) / 2
            if step < end
            else 0.0
            for end in self.freezing_steps(num_blocks)
        )

    def lr_factors(
        self,
        groups: Sequence[Mapping[str, Any]],
        num_blocks: int,
        base: Callable[[int], float] = lambda step: 1.0,
    ) -> list[Callable[[int], float]]:
        """One function of the step per group, as `torch.optim.lr_scheduler.LambdaLR` takes them.

        Args:
            groups: of `handle.param_groups(by_unit=True)`, also through an optimizer.
            base: factor for all units, e.g. of a warm-up.

        Raises:
            ValueError: groups that do not say their unit, or a schedule that thaws.
        """
        if not all("unit" in group for group in groups):
            raise ValueError("the groups do not say their unit: handle.param_groups(by_unit=True)")
        self.freezing_steps(num_blocks)

        def factor(unit: int) -> Callable[[int], float]:
            # unit numbers begin with the embeddings' -1
            return lambda step: base(step) * self.lr_scales(step, num_blocks)[unit + 1]

        return [factor(group["unit"]) for group in groups]


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, weights))
    except (TypeError, ValueError):
        raise TypeError(f"weights must be numbers, one per block, got {weights!r}") from None
    if not (all(0 <= w < float("inf") for w in numbers) and any(numbers)):
        raise ValueError("weights must be finite, none negative and not all 0, one per block")
    return numbers


def _relative_change(before: float, now: float) -> float:
    if before:
        return abs(before - now) / before
    return float("inf") if now else 0.0


def _percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated linearly between the two values around it, as numpy does."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    # equal ones first, for infinities have no difference; rounding must not pass the larger one
    return low if low == high else min(high, low + (high - low) * (at - math.floor(at)))


def _unit_flags(plan: FreezePlan) -> tuple[bool, ...]:
    return (plan.embeddings, *plan.trainable, plan.head)
