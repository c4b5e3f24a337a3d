"""Warns of loops that call `advance()` never or too often, and of schedules that change nothing."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress

import torch
from torch import nn
from torch.optim import Optimizer

from ..model.call_stack import called_from
from ..model.layout import Layout
from ..schedules import Schedule, decides_in_training, stage_count
from .missed_updates import some_values


class MissedSteps:
    """Compares the steps of a handle with the updates of its model; gives each warning once."""

    def __init__(self, model: nn.Module, layout: Layout, schedule: Schedule) -> None:
        self._model = model
        self._layout = layout
        self._schedule = schedule
        self._watched: nn.Parameter | None = None  # a weight that trains at this step
        self._version = 0  # of it, at the last forward
        self._values: torch.Tensor | None = None  # some of it, at an earlier one
        self._forwards = 0  # at this step
        self._updates = 0  # how often it was found changed at this step
        self._warned_of_none = self._warned_of_end = False
        total = schedule.total_steps
        if (
            total
            and stage_count(schedule, total) == schedule.stage(0) + 1
            and self._comes_to_more()
        ):
            warnings.warn(
                f"{schedule!r} changes nothing within the {total} steps of the run: its first plan "
                "is in force to the end",
                stacklevel=4,
            )

    def told(self, step: int) -> None:
        """Note that the handle goes to `step`."""
        self._watched, self._values, self._forwards, self._updates = None, None, 0, 0
        total = self._schedule.total_steps
        if total is not None and step > total and not self._warned_of_end:
            self._warned_of_end = True
            warnings.warn(
                f"training goes on past total_steps={total}, in the schedule's last plan: call "
                "handle.advance() once per optimizer step, not once per batch, and give as many as "
                "total_steps",
                stacklevel=4,
            )

    def before_forward(self, step: int) -> None:
        """Look for updates before a training forward of `step`.

        One may be no optimizer step (weights are loaded, SAM perturbs them); two are.
        """
        if self._watched is None:
            top = self._model.get_submodule(self._layout.block_paths[-1])
            parameters = (*top.parameters(), *self._model.parameters())
            self._watched = next((p for p in parameters if p.requires_grad), None)
            self._version = getattr(self._watched, "_version", 0)
            return
        self._forwards += 1
        version, self._version = self._version, self._watched._version
        if self._version != version:
            self._values = None  # of before that write, which would count twice
        elif not self._other_values(self._watched):
            return
        # one step may run its closure, and with it the model, many times
        if not called_from(sys.modules[Optimizer.__module__].__file__):
            self._updates += 1
        if self._updates == 2 and not self._warned_of_none and self._comes_to_more():
            self._warned_of_none = True
            warnings.warn(
                f"the weights were updated twice, and the schedule is still at step {step}: call "
                "handle.advance() once per optimizer step, else no later stage comes",
                stacklevel=2,
            )

    def _other_values(self, watched: nn.Parameter) -> bool:
        """Fused optimizers write past the version counter; values are read, for which a GPU is
        waited for, at forward 16, 32, 64 and so on of a step.
        """
        if self._forwards < 16 or self._forwards & (self._forwards - 1):
            return False
        before, self._values = self._values, some_values(watched)
        if before is None or self._values is None:
            return False
        return not torch.equal(before, self._values)

    def _comes_to_more(self) -> bool:
        if not decides_in_training(self._schedule):
            with suppress(Exception):  # a schedule of the user's own may know no such step
                return self._schedule.stage(10**9) != self._schedule.stage(0)
        return True
