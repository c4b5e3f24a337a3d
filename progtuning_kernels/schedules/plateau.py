"""The next stage begins when the validation score stalls."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from .blocks import BlockSet, FixedBlockSchedule
from .plan import (
    FreezePlan,
    Schedule,
    bind_length,
    check_choice,
    check_step,
    decides_in_training,
    stage_starts,
    steps_to_check,
    whole_number,
)
from .progressive import ProgressiveSchedule

Mode = Literal["min", "max"]


class PlateauSchedule:
    """Goes to its next stage when `patience` scores in a row have brought no better one.

    `PatchHandle.report_score`, or `ProgtuningCallback` after every evaluation, brings the scores.
    The best score counts on from stage to stage: with `restore_best`, a stage begins with the
    weights that had it, and ends with those that have it by then. After the last stage
    `handle.finished` is True, and the Trainer stops. NaN is no better score.

    `plan` is a pure function of the step and the scores so far, which `PatchHandle.state_dict`
    carries: a stage that ends by a score reported when s steps were done ends before step s. Scores
    reported after a return to an earlier step replace all from there on.

    Args:
        stages: a number, which stands for the stages of `ProgressiveSchedule`; a list of sets of
            blocks, one per stage, as `FixedBlockSchedule` takes them; or another schedule, whose
            stages come in their order (a random or cyclic one needs its `total_steps`).
        patience: scores in a row without a better one that end a stage.
        min_delta: by how much a score must be better than the best one to count as better.
        mode: "min" or "max" says which score is better; None is the Trainer's choice
            (`greater_is_better`), and "min" in a loop of your own.
        restore_best: keep a copy of the active tensors at the best score, in CPU memory, and put it
            back when the stage ends.
        max_steps_per_stage: the first score after so many steps ends the stage in any case.

    Raises:
        ValueError: a setting outside its range; from `plan`, stages that do not fit the model.
        TypeError: no number where one belongs, or a schedule that decides while it trains.

    Example:
        ```python
        schedule = PlateauSchedule(["-1", "-2--1", "embeddings,0--1"], patience=2)
        handle = patch_model(model, schedule)
        for score in (0.9, 0.7, 0.8, 0.75):  # of four evaluations: the last two are no better
            handle.report_score(score)
        assert handle.stage == 1
        ```
    """

    def __init__(
        self,
        stages: int | Sequence[BlockSet] | Schedule,
        *,
        patience: int = 2,
        min_delta: float = 0.0,
        mode: Mode | None = None,
        restore_best: bool = True,
        max_steps_per_stage: int | None = None,
    ) -> None:
        self.of_stages: Schedule = _of_stages(stages)
        total = self.of_stages.total_steps or max(steps_to_check(self.of_stages)) + 1
        self._starts = [*stage_starts(self.of_stages, total)]  # in the schedule of the stages
        self.patience = whole_number("patience", patience, 1)
        if isinstance(min_delta, bool) or not isinstance(min_delta, Real):
            raise TypeError(f"min_delta must be 0 or more, got {min_delta!r}: pass a number")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be 0 or more, got {min_delta}")
        self.min_delta = float(min_delta)
        if mode is not None:
            check_choice("mode", mode, Mode)
        self.mode: Mode | None = mode
        self.restore_best = bool(restore_best)
        self.max_steps_per_stage = (
            None
            if max_steps_per_stage is None
            else whole_number("max_steps_per_stage", max_steps_per_stage, 1)
        )
        self.total_steps: int | None = None
        self._scores: list[tuple[int, float]] = []  # (steps done, score), in their order
        self._ends: list[int] = []  # of stages: the first step after each
        self._best: tuple[int, float] | None = None
        self._stale = 0  # scores of this stage since the last better one

    def __repr__(self) -> str:
        return (
            f"PlateauSchedule({self.of_stages!r}, patience={self.patience}, "
            f"min_delta={self.min_delta}, mode={self.mode!r}, restore_best={self.restore_best}, "
            f"max_steps_per_stage={self.max_steps_per_stage})"
        )

    bind = bind_length

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self._starts)

    @property
    def scores(self) -> list[tuple[int, float]]:
        """(steps done, score), every one so far."""
        return [*self._scores]

    @property
    def best(self) -> tuple[int, float] | None:
        """(steps done, score) of the best score so far; None before the first."""
        return self._best

    @property
    def finished(self) -> bool:
        """Whether the last stage has ended."""
        return len(self._ends) == self.stages

    def report(self, step: int, score: float) -> bool:
        """Count a score, and end the stage if it is time to.

        Args:
            step: number of optimizer steps done.
            score: of the weights as they are then.

        Returns:
            Whether it is the best so far.

        Raises:
            ValueError: a negative step.
        """
        check_step(step)
        if any(s > step for s, _ in self._scores):
            before = [(s, known) for s, known in self._scores if s <= step]
            self._scores, self._ends, self._best, self._stale = [], [], None, 0
            for s, known in before:
                self._count(s, known)
        return self._count(step, float(score))

    def _count(self, step: int, score: float) -> bool:
        self._scores.append((step, score))
        sign = 1 if self.mode == "max" else -1
        better = score == score and (
            self._best is None or sign * (score - self._best[1]) > self.min_delta
        )
        if better:
            self._best = step, score
        self._stale = 0 if better else self._stale + 1
        start = self._ends[-1] if self._ends else 0
        most = self.max_steps_per_stage
        if not self.finished and (
            self._stale >= self.patience or (most is not None and step - start >= most)
        ):
            self._ends.append(step)
            self._stale = 0
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"scores": [list(scored) for scored in self._scores]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scores, self._ends, self._best, self._stale = [], [], None, 0
        for step, score in state["scores"]:
            self._count(step, score)

    def stage(self, step: int) -> int:
        check_step(step)
        return min(bisect_right(self._ends, step), self.stages - 1)

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        return self.of_stages.plan(self._starts[self.stage(step)], num_blocks)

    def plans(self, num_blocks: int) -> list[FreezePlan]:
        """The plan of every stage.

        Args:
            num_blocks: number of blocks of the model, L.
        """
        return [self.of_stages.plan(start, num_blocks) for start in self._starts]


def _of_stages(stages: int | Sequence[BlockSet] | Schedule) -> Schedule:
    if isinstance(stages, Schedule):
        if decides_in_training(stages):
            raise TypeError(f"{stages!r} decides by itself when a stage ends")
        schedule = copy.deepcopy(stages)
        if isinstance(schedule, ProgressiveSchedule) and schedule.total_steps is None:
            schedule.bind(schedule.stages)
        if schedule.total_steps is None and not hasattr(schedule, "milestones"):
            raise ValueError(f"{stages!r} has no last stage: pass it with .bind(total_steps)")
        return schedule
    if isinstance(stages, Sequence) and not isinstance(stages, str):
        return FixedBlockSchedule(dict(enumerate(stages)))
    number = whole_number("stages", stages, 1)  # pyright: ignore[reportArgumentType]
    return ProgressiveSchedule(number, number)
