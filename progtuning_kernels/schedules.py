"""Freezing schedules: pure functions of (step, number of blocks). Standard library only.

A schedule answers one question: which units (embeddings, blocks 0..L-1, head) train at an optimizer
step. It holds no model and no state beyond its settings, so every rank, and a resumed run, derives
the same plan from the same step.

To add a schedule: one class with `plan(step, num_blocks) -> FreezePlan`, `stage(step) -> int`,
`total_steps` and `bind(total_steps)`; one test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, get_args, runtime_checkable

EmbeddingPolicy = Literal["first_stage", "always", "never"]


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


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")


def _check_embedding_policy(embeddings: str) -> None:
    if embeddings not in get_args(EmbeddingPolicy):
        choices = ", ".join(map(repr, get_args(EmbeddingPolicy)))
        raise ValueError(f"embeddings must be one of {choices}, got {embeddings!r}")


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
        weights: contribution per block, all positive. Parts then have equal cumulative
            contribution instead of an equal count; None is the paper's rule.

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
        if stages < 1:
            raise ValueError(f"stages must be 1 or more, got {stages}")
        _check_embedding_policy(embeddings)
        if weights is not None and not all(0 < w < float("inf") for w in weights):
            raise ValueError("weights must be positive finite numbers, one per block")
        self.stages = stages
        self.embeddings: EmbeddingPolicy = embeddings
        self.weights = None if weights is None else tuple(float(w) for w in weights)
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
        below = [0.0, *accumulate(self.weights)]  # contribution of the blocks below each cut
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
            equal to the number of blocks trains the head alone. Boundaries may also fall again.
        embeddings: "first_stage" (until the first milestone after step 0, and only under boundary
            0), "always", or "never".

    `MilestoneSchedule({}, embeddings="always")` never freezes anything.
    """

    def __init__(
        self, milestones: Mapping[int, int], *, embeddings: EmbeddingPolicy = "first_stage"
    ) -> None:
        _check_embedding_policy(embeddings)
        for step, boundary in milestones.items():
            if step < 0 or boundary < 0:
                raise ValueError(f"milestone {step}: {boundary} has a negative number")
        self.milestones = dict(sorted({0: 0, **milestones}.items()))
        self.embeddings: EmbeddingPolicy = embeddings
        self.total_steps: int | None = None

    def __repr__(self) -> str:
        return f"MilestoneSchedule({self.milestones}, embeddings={self.embeddings!r})"

    def bind(self, total_steps: int) -> MilestoneSchedule:
        """Note the length of the run; milestones are absolute steps and do not depend on it."""
        self.total_steps = total_steps
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
        embeddings = self.embeddings == "always" or (
            self.embeddings == "first_stage" and stage == 0 and boundary == 0
        )
        return FreezePlan.from_boundary(boundary, num_blocks, embeddings=embeddings)
