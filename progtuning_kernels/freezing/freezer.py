"""Takes a plan and makes one model train what it says: flags, and all that hangs on them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import nn

from .. import freeze_events
from ..cache import PrefixServer
from ..distributed import Wrapper, refuse_flat_parameters, surrounding
from ..model.adapters import check_adapters
from ..model.derived_classes import without_derived_ancestors
from ..model.families import UnsupportedModelError
from ..model.layout import EMBEDDINGS, Layout
from ..schedules import FreezePlan
from ..swaps import Kernels, KernelSwaps
from .active_set import ActiveSet, TiedPolicy
from .boundary import Boundary, FrozenMode
from .checkpointing import Checkpointing
from .gradient_norms import GradientNorms


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


class Freezer:
    """Puts one plan after the other in force on one model.

    Args:
        model: the model that `layout` describes.
        frozen_mode, tied, kernels: as for `patch_model`.
        norms: watches the blocks that train, for a schedule that decides by gradient norms.

    Attributes:
        active: the flags.
        swaps: the modules that run freeze-aware ops.
        cache: serves forwards without their prefix; None without one.
        wrapper: what surrounds the model on several processes; None on one.
        plan: the plan in force, None before the first.
        step: the optimizer step that it is in force for.
        state: what it comes to.
        proved: whether a forward has shown, since the flags were set, that nothing is cut off.

    Raises:
        UnsupportedModelError: adapters that cannot freeze with their blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        *,
        frozen_mode: FrozenMode,
        tied: TiedPolicy,
        kernels: Kernels = "off",
        norms: GradientNorms | None = None,
    ) -> None:
        check_adapters(model)
        self.model = model
        self.layout = layout
        self.active = ActiveSet(model, layout, tied)
        self.swaps = KernelSwaps(model, layout, kernels)
        self.cache: PrefixServer | None = None
        self.wrapper: Wrapper | None = None
        self.plan: FreezePlan | None = None
        self.step = 0
        self.state = StageState(0, frozenset(layout.units), 0)
        self.proved = False
        self._boundary = Boundary(model, layout, frozen_mode)
        self._checkpointing = Checkpointing(model, layout)
        self._norms = norms
        self._device: torch.device | None = None  # that the swaps were chosen for

    @property
    def boundary(self) -> int:
        """The effective boundary."""
        return self.state.boundary

    @property
    def frozen(self) -> set[int]:
        """Units that hold no active tensor."""
        return set(self.layout.units) - self.state.active

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded by `fully_shard`."""
        return self.wrapper is not None and self.wrapper.sharded

    def freeze(self, plan: FreezePlan, step: int = 0) -> StageState:
        """Put `plan` in force for optimizer step `step`.

        Raises:
            RuntimeError: the ranks do not train the same.
        """
        self.plan, self.step = plan, step
        if self._device is None:
            self.reinstall_swaps()
        if self.wrapper is not None:
            self.wrapper.reshard()
        self.active.set_flags(plan)
        self._follow_flags()
        self.proved = False
        return self.state

    def freeze_moved(self) -> None:
        """A forward has shown that parameters belong to other units: before its backward."""
        if self.active.set_flags(self.plan):
            self._follow_flags()

    def follow_model(self) -> None:
        """Before a training forward: what the user may have changed without telling."""
        if not self.proved:
            self._attach_surrounding()
        if self.active.device.type != self._device.type:
            self.reinstall_swaps()
        self.truncate_checkpointing()

    def truncate_checkpointing(self) -> None:
        """Keep gradient checkpointing from undoing the truncation, whenever it is switched on."""
        if EMBEDDINGS not in self.state.active:
            self._checkpointing.keep_truncated()

    def attach(self, wrapped: nn.Module, timeout: timedelta | None = None) -> None:
        """See `PatchHandle.attach`."""
        wrapper = Wrapper(self.model, self.layout, wrapped, timeout=timeout)
        if wrapper.sharded and self.cache is not None:
            raise UnsupportedModelError(
                "a prefix cache takes blocks out of the model, which fully_shard gathers all the "
                "same: patch without cache=, or use DistributedDataParallel"
            )
        self.wrapper = wrapper
        if self._norms is not None:
            self._norms.reduced_at_end = wrapper.ddp is not None
            self._norms.sharded = wrapper.sharded
        if wrapper.sharded:  # `fully_shard` has replaced parameters
            self.reinstall_swaps()
            if self._norms is not None:
                self._norms.install_norm_hooks()
        wrapper.follow(step=self.step, boundary=self.boundary)

    def reinstall_swaps(self) -> None:
        """Swaps anew, below the boundary's classes: the model has moved, or has other modules."""
        self._boundary.restore_modules()
        self.swaps.remove_swaps()
        if self.sharded:  # `fully_shard` has made classes out of those that it found
            for module in self.model.modules():
                cls = without_derived_ancestors(type(module))
                if cls is not type(module):
                    module.__class__ = cls
        self._device = self.active.device
        self.swaps.install_swaps(self._device)
        self._boundary.place_modules(self.frozen, self.boundary)

    def restore_model(self) -> None:
        """Put the model back as it was found, but for what the user froze in the meantime."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None
        self._boundary.restore_modules()
        self.swaps.remove_swaps()
        self.active.restore_flags()
        self._checkpointing.restore_checkpointing()
        if self._norms is not None:
            self._norms.remove_norm_hooks()
        if self.wrapper is not None:
            self.wrapper.release()
            self.wrapper = None
        freeze_events.announce()

    def _attach_surrounding(self) -> None:
        """Attach the wrapper that runs this forward, unless it is attached."""
        refuse_flat_parameters(self.model)
        found = surrounding(self.model)
        if found is not None and (self.wrapper is None or not self.wrapper.holds(found)):
            self.attach(found)

    def _follow_flags(self) -> None:
        """Everything else that hangs on which parameters are active."""
        active, boundary = self.active.units, 0
        if EMBEDDINGS not in active:
            blocks = range(self.layout.num_blocks)
            boundary = next((i for i in blocks if i in active), self.layout.num_blocks)
        self.state = StageState(boundary, frozenset(active), self.active.active_params)
        self._boundary.place_modules(self.frozen, boundary)
        if self._norms is not None:
            self._norms.install_norm_hooks()
        if self.wrapper is not None:
            self.wrapper.follow(step=self.step, boundary=boundary)
        freeze_events.announce()
        if self.cache is not None:
            self.cache.move(boundary)
