"""The plans of a schedule that are known ahead: refuses those that cannot be trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from torch import nn

from ..model.adapters import adapter_configs, check_adapters, rank_allocation_end
from ..model.layout import Layout
from ..schedules import FreezePlan, Schedule, decides_by_gradients, steps_to_check
from .active_set import ActiveSet


class KnownPlans:
    """Looks ahead through one schedule, for one model with its adapters.

    Args:
        model: the model that `layout` describes.
        active: what is trainable in it.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, schedule: Schedule, active: ActiveSet
    ) -> None:
        self._model = model
        self._layout = layout
        self._schedule = schedule
        self._active = active
        self.note_adapters()

    @property
    def adapters_changed(self) -> bool:
        """Whether adapters came or went since `note_adapters`."""
        now = adapter_configs(self._model)
        return any(a is not b for a, b in zip_longest(self._adapters, now))

    def note_adapters(self) -> None:
        """Look at the adapters that there are now.

        Raises:
            UnsupportedModelError: some of them cannot freeze with their blocks.
        """
        check_adapters(self._model)
        self._adapters = adapter_configs(self._model)
        self._allocation_end = rank_allocation_end(self._model)

    def check_plan(self, step: int, plan: FreezePlan) -> None:
        """Raise `ValueError` if nothing would train, or AdaLoRA would miss gradients."""
        self._active.check_plan(plan)
        if self._allocation_end is None or step > self._allocation_end:
            return
        if any(self._active.frozen_by(plan)):
            raise ValueError(
                f"AdaLoRA moves ranks between all adapters up to step {self._allocation_end} "
                f"(total_step - tfinal), and step {step} freezes some: raise tfinal until that "
                "comes first, or use LoRA"
            )

    def check_known(self, step: int) -> None:
        """Check the plans that show whether the schedule fits the model, that of `step` too."""
        for known, plan in self._known(step):
            self.check_plan(known, plan)

    def frozen_sometime(self, step: int) -> set[int]:
        """Units that are frozen at `step`, or by a plan that is known already."""
        if decides_by_gradients(self._schedule):
            return set(self._layout.units)
        plans = [plan for _, plan in self._known(step)]
        trains = self._active.trains
        return {u for u in self._layout.units if not all(trains(u, plan) for plan in plans)}

    def _known(self, step: int) -> Iterator[tuple[int, FreezePlan]]:
        steps = {step, *steps_to_check(self._schedule)}
        if self._allocation_end is not None and (total := self._schedule.total_steps):
            # before AdaLoRA has allocated its ranks every plan counts
            steps |= set(range(min(total, self._allocation_end + 1)))
        for known in sorted(steps):
            yield known, self._schedule.plan(known, self._layout.num_blocks)
