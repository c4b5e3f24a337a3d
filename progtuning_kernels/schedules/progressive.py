"""Schedules that freeze from the input upwards, at given steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

from .blocks import FixedBlockSchedule
from .plan import FreezePlan, Schedule, bind_length, check_choice, check_step, whole_number

EmbeddingPolicy = Literal["first_stage", "always", "never"]


@dataclass(eq=False, repr=False)
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
        ValueError: on settings that no run can satisfy; the message names the setting. From `plan`
            and `stage`: more stages than blocks, another number of weights than of blocks, a
            negative step, or one after the first while `total_steps` is not known.
        TypeError: no number where one belongs.

    Example:
        ```python
        schedule = ProgressiveSchedule(stages=3, total_steps=900)
        assert schedule.boundaries(num_blocks=12) == (0, 4, 8)
        assert schedule.plan(300, num_blocks=12).boundary == 4
        ```
    """

    stages: int
    total_steps: int | None = None
    _: KW_ONLY
    embeddings: EmbeddingPolicy = "first_stage"
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_choice("embeddings", self.embeddings, EmbeddingPolicy)
        if self.weights is not None:
            self.weights = _weights(self.weights)
        self.stages = whole_number("stages", self.stages, 1)
        if self.total_steps is not None:
            self.bind(self.total_steps)

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
        check_step(step)
        if step == 0 or self.stages == 1:
            return 0
        if self.total_steps is None:
            raise ValueError(
                "the schedule does not know the length of the run: give total_steps or call "
                "schedule.bind(total_steps) before the first step"
            )
        return min(self.stages - 1, step * self.stages // self.total_steps)

    def boundaries(self, num_blocks: int) -> tuple[int, ...]:
        """First trainable block of every stage, e.g. (0, 4, 8) for 12 blocks in 3 stages.

        Args:
            num_blocks: number of blocks of the model, L.

        Raises:
            ValueError: more stages than blocks, or another number of weights.
        """
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

    `MilestoneSchedule({}, embeddings="always")` never freezes anything, and
    `MilestoneSchedule({0: 2, 10: 1, 20: 0, 30: -1})` thaws two blocks from the head down, the
    embeddings last.

    Args:
        milestones: {step: boundary}. A missing step 0 means boundary 0 from the start; a boundary
            equal to the number of blocks trains the head alone, one of -1 everything, the
            embeddings included. Boundaries may also fall again.
        embeddings: beside -1, "first_stage" (until the first milestone after step 0, and only under
            boundary 0), "always", or "never".

    Raises:
        ValueError: on milestones that no run can have; the message names the milestone. From
            `plan`: a boundary above the number of blocks.
        TypeError: no mapping, or a step or boundary that is no number.
    """

    def __init__(
        self, milestones: Mapping[int, int], *, embeddings: EmbeddingPolicy = "first_stage"
    ) -> None:
        check_choice("embeddings", embeddings, EmbeddingPolicy)
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

    bind = bind_length

    def stage(self, step: int) -> int:
        check_step(step)
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


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, weights))
    except (TypeError, ValueError):
        raise TypeError(f"weights must be numbers, one per block, got {weights!r}") from None
    if not (all(0 <= w < float("inf") for w in numbers) and any(numbers)):
        raise ValueError("weights must be finite, none negative and not all 0, one per block")
    return numbers


def scales_with_length(schedule: Schedule) -> bool:
    """Whether a run of any length has the same stages, in the same shares."""
    constant = isinstance(schedule, FixedBlockSchedule) and len(schedule.milestones) == 1
    return constant or isinstance(schedule, ProgressiveSchedule)
