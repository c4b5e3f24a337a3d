"""Puts a plan on an unpatched copy of a model, as `patch_model` would on the model itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from ..freezing.active_set import ActiveSet, TiedPolicy
from ..freezing.boundary import Boundary, FrozenMode
from ..freezing.checkpointing import drop_input_grads, make_nonreentrant
from ..model.layout import EMBEDDINGS, Layout
from ..schedules import FreezePlan


@dataclass(frozen=True)
class StageState:
    """What a plan comes to.

    Attributes:
        boundary: the effective one.
        active: units that hold an active tensor.
        trainable_params: elements that train.
    """

    boundary: int
    active: frozenset[int]
    trainable_params: int


class StageFlags:
    """Sets one copy's flags, plan after plan.

    Args:
        model: a copy that nobody else uses.
        tied, frozen_mode: as for `patch_model`.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, tied: TiedPolicy, frozen_mode: FrozenMode
    ) -> None:
        self._model = model
        self._layout = layout
        self._active = ActiveSet(model, layout, tied)
        self._boundary = Boundary(model, layout, frozen_mode)

    def put(self, plan: FreezePlan) -> StageState:
        """Set the flags of `plan`.

        Raises:
            ValueError: it leaves nothing to train.
        """
        self._active.check(plan)
        self._active.apply(plan)
        active = self._active.units
        boundary = 0
        if EMBEDDINGS not in active:
            blocks = range(self._layout.num_blocks)
            boundary = next((i for i in blocks if i in active), self._layout.num_blocks)
            drop_input_grads(self._model, self._layout)
            with warnings.catch_warnings():  # training says it
                warnings.simplefilter("ignore")
                make_nonreentrant(self._model, self._layout)
        self._boundary.move(set(self._layout.units) - active, boundary)
        return StageState(boundary, frozenset(active), self._active.active_params(plan))
