"""Brings validation scores to a schedule that decides by them, and its best weights back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..schedules import ScoredSchedule
from .freezer import Freezer


class Scores:
    """Attributes:
    best: the active tensors at the best score, on the CPU, by their names; None before the first.
    """

    def __init__(self, freezer: Freezer, schedule: ScoredSchedule) -> None:
        self._freezer = freezer
        self.schedule = schedule
        self.best: dict[str, Tensor] | None = None

    def report(self, score: float) -> bool:
        """Count a score, the same on all ranks; whether that has ended a stage."""
        schedule, step = self.schedule, self._freezer.step
        score = self._of_first_rank(float(score))
        before, best = (schedule.stage(step), schedule.finished), schedule.best
        if schedule.report(step, score):
            self.keep()
        elif schedule.best != best:  # back at an earlier step, whose weights are kept no more
            self.best = None
        ended = (schedule.stage(step), schedule.finished) != before
        if ended:
            self._put_back()
        return ended

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the active tensors, if the schedule wants them back."""
        if self.schedule.restore_best:
            active = self._freezer.active.active_slots()
            self.best = {s.name: s.parameter.detach().to("cpu", copy=True) for s in active}

    @torch.no_grad()
    def _put_back(self) -> None:
        if not self.schedule.restore_best or self.schedule.best is None:
            return
        if self.best is None:
            raise RuntimeError(
                f"{self.schedule!r}: the weights of step {self.schedule.best[0]} are to be put "
                "back, and are in no state that was loaded: load a whole handle.state_dict()"
            )
        for slot in self._freezer.active.active_slots():
            if slot.name in self.best:  # an adapter may have come since
                slot.parameter.copy_(self.best[slot.name])
        self._freezer.rows.synchronise()

    def end(self) -> None:
        """Warn if training ends and no score has come."""
        schedule, step = self.schedule, self._freezer.step
        if step and schedule.best is None and not schedule.stage(step):
            warnings.warn(
                f"{schedule!r} has had no score in {step} steps, and has stayed in its first "
                "stage: call handle.report_score(score) after every evaluation",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self.best}

    def _of_first_rank(self, score: float) -> float:
        """Ranks that evaluate rows of their own would part otherwise."""
        if (share := self._freezer.share) is not None:
            return float(share(repr(score).encode()))
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return score
        shared = torch.tensor(score, dtype=torch.float64, device=self._freezer.active.device)
        distributed.broadcast(shared, src=0)
        return shared.item()
