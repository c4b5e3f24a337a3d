"""Looks at one row again where something may have changed that leaves no trace in the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.call import Call
from ..model.outputs import STORED_TOLERANCE, TOLERANCE, close_rows
from .keyed_rows import KeyedRows
from .prefix_weights import PrefixWeights
from .side_forwards import SideForwards
from .trial import Path, error_line

_PROBE_EVERY = 256  # served forwards; one row each


@dataclass(frozen=True)
class Sample:
    """A row with its boundary activations, to be computed again and compared."""

    path: Path
    context: tuple[Any, ...]  # precision, adapters and mode that it was computed with
    call: Call
    hidden: Tensor  # its boundary activations, (1, T, C)
    span: tuple[int, int]  # of its tokens


@dataclass
class RowCheck:
    """Decides in one stage whether stored rows are still what the prefix computes.

    Attributes:
        sample: a row that was computed in this stage.
        doubted: a setting of the model has changed since a row was looked at.
        on_any_rank: whether something holds on one of the ranks that look together.
        problem: why rows were dropped last.
    """

    weights: PrefixWeights
    side: SideForwards
    rows: KeyedRows
    dtype: torch.dtype | None  # of stored rows; None: that of the activations
    sample: Sample | None = None
    doubted: bool = False
    problem: str = ""
    on_any_rank: Callable[[bool], bool] = bool
    _level: int = 0
    _settings: list[tuple[str, Any]] | None = None  # after the last forward
    _grads_before: bool | None = None

    def begin_stage(self, level: int) -> None:
        """Begin a stage, before other modules are watched."""
        self.compare_settings()
        self._settings = None
        self._level = level
        self.sample = None

    def compare_settings(self) -> None:
        """Notice, before a forward, settings that have changed since the last one."""
        if self._settings not in (None, self.weights.settings()):
            self.doubted = True

    def note_settings(self) -> None:
        """Note the settings after a forward, as those that it sets itself are no change."""
        self._settings = self.weights.settings()

    def resolve_doubt(self, context: tuple[Any, ...]) -> bool | None:
        """Drop all rows if the prefix reads a setting that has changed.

        Returns whether rows of this level hold; None if the sample comes from another context.
        """
        sample = self.sample
        if sample is not None and sample.context != context:
            return None
        self.doubted = False
        if sample is None or not self._holds(sample, STORED_TOLERANCE[None]):
            self.drop_all_rows()
            return False
        for level in self.rows.store.levels():
            if level < self._level:  # those hold other things
                self.rows.forget_level(level)
        return True

    def probe(self, sample: Callable[[], Sample], *, grads: bool, served: int) -> bool:
        """Now and then compute a row again; False, and all rows are dropped, if it has changed.

        Writes through `tensor.data`, as some averages of weights make them between training and
        evaluation, leave no other trace; nor does another activation, or code that was edited, in
        a run that finds rows on disk.
        """
        first = self.rows.on_disk if self._grads_before is None else self._grads_before != grads
        self._grads_before = grads
        due = first or not (served + 1) % _PROBE_EVERY
        if not due:
            return True
        if not self.on_any_rank(not self._holds(sample(), STORED_TOLERANCE[self.dtype])):
            return True
        self.drop_all_rows()
        self.rows.bind_level(self._level)
        return False

    def drop_all_rows(self) -> None:
        for level in self.rows.store.levels():
            self.rows.forget_level(level)
        self.sample = None

    def _holds(self, sample: Sample, tolerance: float) -> bool:
        path, tolerance = sample.path, max(tolerance, TOLERANCE.get(sample.path.dtype, 0.0))
        try:
            computed = self.side.boundary_activations(
                path.levels, self._level, sample.call, draws=path.draws
            )
        except Exception as error:  # a setting under which it does not even run
            self.problem = (
                f"stored rows were dropped: computing one again raises {error_line(error)}"
            )
            return False
        self.problem = "stored rows did not fit the weights any more: dropped"
        return close_rows(computed, sample.hidden, [sample.span], tolerance)
