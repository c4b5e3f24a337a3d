"""What a schedule is: a pure function of (step, number of blocks) that gives a `FreezePlan`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from numbers import Real
from operator import index
from typing import Any, Protocol, SupportsInt, TypeGuard, TypeVar, cast, get_args, runtime_checkable

# A longer table of stages is no picture any more.
_MOST_STAGES = 32


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
        """Number of blocks, L."""
        return len(self.trainable)

    @property
    def boundary(self) -> int:
        """Lowest trainable block: 0 if the embeddings train, `num_blocks` if only the head does."""
        if self.embeddings:
            return 0
        return next((i for i, on in enumerate(self.trainable) if on), self.num_blocks)

    def units_in_words(self) -> str:
        """What trains, for example "embeddings, blocks 0-1, 3, head"."""
        runs: list[list[int]] = []
        for i in (i for i, on in enumerate(self.trainable) if on):
            if runs and runs[-1][1] == i - 1:
                runs[-1][1] = i
            else:
                runs.append([i, i])
        blocks = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        parts = ["embeddings"] * self.embeddings + [f"blocks {blocks}"] * bool(runs)
        return ", ".join(parts + ["head"] * self.head)

    def marks(self) -> list[str]:
        """One mark a unit, embeddings first, head last: ■ where it trains, □ where it is frozen."""
        return ["■" if on else "□" for on in (self.embeddings, *self.trainable, self.head)]

    def _repr_html_(self) -> str:
        from ..text_table import Table, as_html  # schedules import without the package around them

        trains = self.units_in_words() or "nothing"
        strip = Table([unit_names(self.num_blocks), self.marks()], left=())
        return as_html([f"trains: {trains}; boundary {self.boundary}", strip])

    @classmethod
    def from_boundary(cls, boundary: int, num_blocks: int, *, embeddings: bool) -> FreezePlan:
        """The plan that trains blocks `boundary..num_blocks-1` and the head.

        Args:
            boundary: lowest trainable block; `num_blocks` for the head alone.
            num_blocks: number of blocks, L.
            embeddings: whether the embeddings train as well.
        """
        return cls(tuple(i >= boundary for i in range(num_blocks)), embeddings=embeddings)


@runtime_checkable
class Schedule(Protocol):
    """What `patch_model` asks of a schedule. A resumed run compares its `repr`.

    Attributes:
        total_steps: length of the run in optimizer steps; None where it is not known.
    """

    total_steps: int | None

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        """The plan of one optimizer step.

        Args:
            step: 0 is the first.
            num_blocks: number of blocks of the model, L.

        Raises:
            ValueError: the step is negative, or the schedule does not fit the model, or has no plan
                before it knows the length of the run.
        """
        ...

    def stage(self, step: int) -> int:
        """Index of the stage that a step belongs to, from 0.

        Args:
            step: optimizer step, 0 is the first.

        Raises:
            ValueError: as `plan`, whatever the model.
        """
        ...

    def bind(self, total_steps: int) -> Schedule:
        """Set the length of the run.

        Args:
            total_steps: in optimizer steps, at least 1.

        Returns:
            The schedule itself.

        Raises:
            TypeError: no number.
            ValueError: no whole number, or fewer steps than the schedule needs.
        """
        ...


@runtime_checkable
class DecidingSchedule(Schedule, Protocol):
    """What `patch_model` asks, beyond a `Schedule`, of one that decides while it trains."""

    def state_dict(self) -> dict[str, Any]:
        """The decisions so far: numbers and lists only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the decisions of a saved run.

        Args:
            state: what `state_dict` has returned.
        """
        ...


@runtime_checkable
class ObservingSchedule(DecidingSchedule, Protocol):
    """What `patch_model` asks, beyond these, of a schedule that decides by gradient norms."""

    def observes(self, step: int) -> bool:
        """Whether the gradients of a step count.

        Args:
            step: optimizer step, 0 is the first.
        """
        ...

    def decides(self, step: int) -> bool:
        """Whether a decision falls after a step.

        Args:
            step: optimizer step, 0 is the first.
        """
        ...

    def observe(self, step: int, norms: Sequence[float], num_blocks: int) -> None:
        """Decide after a step.

        Args:
            step: one that `decides`.
            norms: one gradient norm per block, 0 where none trains.
            num_blocks: number of blocks of the model, L.
        """
        ...


@runtime_checkable
class ScoredSchedule(DecidingSchedule, Protocol):
    """What `PatchHandle.report_score` asks of a schedule that decides by a validation score.

    Attributes:
        restore_best: whether the weights of the best score are put back when a stage ends.
    """

    restore_best: bool

    @property
    def best(self) -> tuple[int, float] | None:
        """(steps done, score) of the best score so far; None before the first."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the last stage has ended."""
        ...

    def report(self, step: int, score: float) -> bool:
        """Count a score; whether it is the best so far.

        Args:
            step: number of optimizer steps done.
            score: of the weights as they are then.
        """
        ...

    def plans(self, num_blocks: int) -> list[FreezePlan]:
        """The plan of every stage.

        Args:
            num_blocks: number of blocks of the model, L.
        """
        ...


_Schedule = TypeVar("_Schedule", bound=Schedule)


def decides_in_training(schedule: Schedule) -> TypeGuard[DecidingSchedule]:
    """Whether it decides while it trains; any other schedule's plans are known from the start."""
    return isinstance(schedule, DecidingSchedule)


def decides_by_gradients(schedule: Schedule) -> TypeGuard[ObservingSchedule]:
    return isinstance(schedule, ObservingSchedule)


def decides_by_score(schedule: Schedule) -> TypeGuard[ScoredSchedule]:
    return isinstance(schedule, ScoredSchedule)


def bind_length(schedule: _Schedule, total_steps: int) -> _Schedule:
    """Note the length of the run in optimizer steps, on which none of its plans depends."""
    schedule.total_steps = whole_number("total_steps", total_steps, 1)
    return schedule


def stage_count(schedule: Schedule, total_steps: int) -> int | None:
    """Stages of a run of this length; None where they are decided while it trains."""
    return None if decides_in_training(schedule) else schedule.stage(total_steps - 1) + 1


def stage_starts(schedule: Schedule, total_steps: int) -> Iterator[int]:
    """First steps of the stages, found by bisection: stage numbers grow with the step."""
    start = 0
    while start < total_steps:
        yield start
        following = schedule.stage(start) + 1
        start = bisect_left(range(total_steps), following, lo=start, key=schedule.stage)


def unit_names(num_blocks: int) -> list[str]:
    """What `FreezePlan.marks` stand for."""
    return ["embeddings", *map(str, range(num_blocks)), "head"]


def units_by_stage(schedule: Schedule, num_blocks: int) -> list[list[str]]:
    """Which unit trains in which stage, as rows of a table, the names of its columns first.

    Empty where that is not known yet: the schedule has no length, or decides while it trains.
    """
    total = schedule.total_steps
    if total is None or decides_in_training(schedule):
        return []
    starts = list(islice(stage_starts(schedule, total), _MOST_STAGES + 1))
    rows = [["stage", "steps", *unit_names(num_blocks)]]
    for i, (first, end) in enumerate(pairwise([*starts, total][: _MOST_STAGES + 1])):
        plan = schedule.plan(first, num_blocks)
        rows.append([str(i + 1), f"{first}-{end - 1}", *plan.marks()])
    if len(starts) > _MOST_STAGES:
        rows.append(["...", f"{starts[-1]}-{total - 1}", *[""] * (num_blocks + 2)])
    return rows


def steps_to_check(schedule: Schedule) -> set[int]:
    """Steps whose plans show whether the schedule fits a model: the first, milestones, the last."""
    last = {schedule.total_steps - 1} if schedule.total_steps else set()
    return {0, *getattr(schedule, "milestones", ()), *last}


def check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value`, an int of any library or a float that is whole, as an int of at least `least`.

    Raises `TypeError` for what is no number, `ValueError` for another number.
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
        number = int(cast(SupportsInt, value))
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


def check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        listing = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{name} must be one of {listing}, got {value!r}")
