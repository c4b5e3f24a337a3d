"""What is done to a patched model between two forwards: the plan in force follows it.

PEFT switches flags when another adapter is chosen, and makes modules when one is added; heads and
embeddings are replaced; weights are pruned, renamed and loaded.
"""

from __future__ import annotations

import warnings

from torch import nn

from ..model.layout import Layout
from ..model.structure import Structure
from .freezer import Freezer
from .known_plans import KnownPlans


class ModelChanges:
    """Notices changes of one model and has them frozen, or trained, as the plan in force says.

    Args:
        model: the model that `layout` describes.
        freezer: puts plans in force on it.
        plans: refuses those that the changed model cannot be trained under.

    Attributes:
        trained: whether a training forward has run.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, freezer: Freezer, plans: KnownPlans
    ) -> None:
        self._model = model
        self._layout = layout
        self._freezer = freezer
        self._plans = plans
        self._structure = Structure(model, layout)
        self.trained = False

    def check_structure(self) -> None:
        """Raise `RuntimeError` if the layout does not describe the model any more."""
        if self._rebuilt():
            self._structure.check()

    def note_rebuilt(self) -> bool:
        """Take in modules and parameters that came or went; whether any did.

        Raises:
            RuntimeError: the layout does not describe the model any more.
        """
        if not self._rebuilt():
            return False
        self._note_modules()
        return True

    def follow_before_forward(self) -> None:
        """Before a training forward, and before its first one under a plan look at every module.

        Raises:
            RuntimeError: the blocks are others than when the model was patched.
            UnsupportedModelError, ValueError: as `patch_model`, of adapters added since.
        """
        self._put_back_stand_ins()
        self._structure.check_blocks()
        if not self.follow_switches() and not self._freezer.proved and self.note_rebuilt():
            self._freeze_anew()
        self.trained = True

    def follow_switches(self) -> bool:
        """Train what was switched on since the last plan, wherever the plan in force trains it.

        A block that had nothing to train may train now.

        Returns:
            Whether anything changed.

        Raises:
            UnsupportedModelError, ValueError: as `patch_model`, of adapters added since.
        """
        switched = self._freezer.active.take_switched(self._freezer.plan)
        if self._plans.adapters_changed:
            self._plans.note_adapters()
            self._note_modules()
            self._freezer.reinstall_swaps()  # in new modules, and where adapters stand now
        elif not switched:
            return False
        self._freeze_anew()
        return True

    def freeze_again(self) -> None:
        """Freeze what was switched on behind the plan; drop gradients of frozen parameters."""
        if not self.follow_switches():
            self._freezer.active.freeze_again()

    def _freeze_anew(self) -> None:
        freezer = self._freezer
        self._plans.check_plan(freezer.step, freezer.plan)
        freezer.freeze(freezer.plan, freezer.step)

    def _put_back_stand_ins(self) -> None:
        if self._freezer.cache is not None:
            self._freezer.cache.put_back()  # a forward that was interrupted leaves them

    def _rebuilt(self) -> bool:
        """Whether modules or parameters came or went, not counting a cache's stand-ins."""
        if self._structure.changed:
            self._put_back_stand_ins()
        return self._structure.changed

    def _note_modules(self) -> None:
        self._structure.check()
        self._layout.guess_unruled(self._model)
        new = self._freezer.active.rescan_parameters()
        self._structure.note()
        if new and self.trained:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            warnings.warn(
                f"{new[0]}{more} came into the model while it was trained: an optimizer that was "
                "made before does not hold it, and leaves it as it is",
                stacklevel=5,
            )
