"""Warns of blocks that the plan trains and no optimizer updates."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from ..model.layout import Layout, ParameterSlot
from ..schedules import FreezePlan
from ..sharding import local_of
from .active_set import ActiveSet

_STEPS = 16  # a gradient scaler leaves out up to ten in a row until it has found its scale
_VALUES = 256  # compared per tensor, up to twice as many


class MissedUpdates:
    """Looks at every block until it was updated once; warns once.

    An optimizer does not hold what was frozen when it was made of the parameters that require grad,
    nor weights that others have taken the place of since (`fully_shard`, a copy of the model).
    """

    def __init__(self, layout: Layout, active: ActiveSet) -> None:
        self._layout = layout
        self._active = active
        self._plan: FreezePlan | None = None  # in force at the last look
        self._blocks: dict[int, list[ParameterSlot]] = {}  # that it trains
        self._noted: dict[int, list[_Noted]] = {}  # after the first step in which a block trains
        self._steps: Counter[int] = Counter()  # in which it has trained since
        self._updated: set[int] = set()
        self._trained = self._warned = False

    def before_forward(self) -> None:
        """Note that a forward trains."""
        self._trained = True

    def end_step(self, plan: FreezePlan) -> None:
        """Look at the blocks after an optimizer step under `plan`."""
        trained, self._trained = self._trained, False
        if self._warned or not trained:
            return
        if plan is not self._plan:
            self._plan, self._blocks = plan, self._trained_blocks()
        for block in self._blocks.keys() - self._updated:
            if block not in self._noted:
                self._noted[block] = [_Noted(slot) for slot in self._blocks[block]]
                continue
            self._steps[block] += 1
            if self._steps[block] in (_STEPS // 2, _STEPS):
                if any(tensor.changed() for tensor in self._noted[block]):
                    self._updated.add(block)
                    del self._noted[block]
        if idle := sorted(b for b in self._noted if self._steps[b] == _STEPS):
            self._warn(idle)

    def _trained_blocks(self) -> dict[int, list[ParameterSlot]]:
        blocks = defaultdict(list)
        for slot in self._active.active_slots():
            there = slot.attribute in slot.owner._parameters  # not renamed or taken out since
            if there and 0 <= slot.units[0] < self._layout.head:
                blocks[slot.units[0]].append(slot)
        return blocks

    def _warn(self, blocks: Sequence[int]) -> None:
        self._warned = True
        self._noted.clear()
        more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
        warnings.warn(
            f"{self._layout.unit_label(blocks[0])}{more} should train, and {_STEPS} steps have "
            "changed nothing in there. Unless forwards leave them out, or gradients are not "
            "finite: make the optimizer of handle.param_groups(), which hold what trains later "
            "too, after fully_shard and whatever else replaces weights; and call handle.advance() "
            "once per optimizer step",
            stacklevel=5,  # where `advance` is called
        )


class _Noted:
    """A parameter as it was. Values are compared: fused optimizers of torch 2.13 write past the
    version counter, and some count a step that they have skipped.
    """

    def __init__(self, slot: ParameterSlot) -> None:
        self._slot = slot
        self._parameter = weakref.ref(slot.parameter)
        self._version = slot.parameter._version
        self._values = some_values(slot.parameter)

    def changed(self) -> bool:
        """Whether it was written, replaced or frozen since."""
        now = self._slot.owner._parameters.get(self._slot.attribute)
        if now is None or now is not self._parameter() or not now.requires_grad:
            return True
        values = some_values(now)
        if values is None or self._values is None:
            return now._version != self._version
        return not torch.equal(values, self._values)


def some_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """A copy of a few hundred values, evenly spaced, of this rank's shard; None where none can be
    read: of a class of tensors that may know no slices, and on the meta device.
    """
    own = local_of(parameter.detach())
    if type(own) is not torch.Tensor or own.is_meta:
        return None
    own = own.reshape(-1)
    return own[:: max(1, own.numel() // _VALUES)].clone()
