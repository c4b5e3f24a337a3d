"""Warns of blocks that the plan trains and no optimizer updates."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch

from ..model.layout import Layout, ParameterSlot
from ..schedules import FreezePlan
from ..sharding import local_of
from .active_set import ActiveSet

# That a block must stay as it is, by version counters and then by values. A gradient scaler leaves
# out up to ten steps in a row until it has found its scale.
_STEPS = 8
_VALUES = 256  # compared per tensor, up to twice as many


class MissedUpdates:
    """Looks in every stage, until each of its blocks was updated once; warns once.

    An optimizer does not hold what was frozen when it was made of the parameters that require grad,
    nor weights that others have taken the place of since (`fully_shard`, a copy of the model).
    """

    def __init__(self, layout: Layout, active: ActiveSet) -> None:
        self._layout = layout
        self._active = active
        self._plan: FreezePlan | None = None  # that is looked at
        self._trained = self._warned = False
        self._steps = 0  # done in training under that plan
        self._before: dict[int, list[_Noted]] = {}  # of blocks that were not updated yet

    def before_forward(self) -> None:
        """Note that a forward trains."""
        self._trained = True

    def end_step(self, plan: FreezePlan) -> None:
        """Look at the blocks after an optimizer step under `plan`."""
        trained, self._trained = self._trained, False
        if plan is not self._plan:
            self._plan, self._steps, self._before = plan, 0, {}
        if self._warned or not trained or self._steps > 2 * _STEPS:
            return
        if self._steps == 0:
            for slot in self._active.active_slots():
                there = slot.attribute in slot.owner._parameters  # not renamed or taken out since
                if there and 0 <= slot.units[0] < self._layout.head:
                    self._before.setdefault(slot.units[0], []).append(_Noted(slot))
        elif self._steps % _STEPS == 0:
            self._before = {
                block: noted
                for block, noted in self._before.items()
                if not any(tensor.changed() for tensor in noted)
            }
            if self._steps == 2 * _STEPS:
                self._warn([*self._before])
                self._before = {}
        self._steps += 1

    def _warn(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        self._warned = True
        more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
        warnings.warn(
            f"{self._layout.unit_label(blocks[0])}{more} should train, and {2 * _STEPS} steps have "
            "changed nothing in there. Unless forwards leave them out: make the optimizer of "
            "handle.param_groups(), which hold what trains later too, after fully_shard and "
            "whatever else replaces weights; and call handle.advance() once per optimizer step",
            stacklevel=5,  # where `advance` is called
        )


class _Noted:
    """A parameter as it was; its values are kept only if its version counter stands still: some
    optimizers write past the counter, fused ones of torch 2.13 among them.
    """

    def __init__(self, slot: ParameterSlot) -> None:
        self._slot = slot
        self._parameter = weakref.ref(slot.parameter)
        self._version = slot.parameter._version
        self._values: torch.Tensor | None = None

    def changed(self) -> bool:
        """Whether it was written, replaced or frozen since; the first call that finds nothing keeps
        values.
        """
        now = self._slot.owner._parameters.get(self._slot.attribute)
        if now is None or now is not self._parameter() or not now.requires_grad:
            return True
        if now._version != self._version:
            return True
        before, self._values = self._values, some_values(now)
        if self._values is None:
            return True
        return before is not None and not torch.equal(before, self._values)


def some_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """A copy of a few hundred values, evenly spaced, of this rank's shard; None where none can be
    read: of a class of tensors that may know no slices, and on the meta device.
    """
    own = local_of(parameter.detach())
    if type(own) is not torch.Tensor or own.is_meta:
        return None
    own = own.reshape(-1)
    return own[:: max(1, own.numel() // _VALUES)].clone()
