"""Which parameters are active under a plan, and keeping them so: plan ∧ trainable when patched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from .adapters import FrozenColumns
from .layout import EMBEDDINGS, Layout, ParameterSlot, parameter_slots
from .schedules import FreezePlan

TiedPolicy = Literal["frozen", "head_only"]


class ActiveSet:
    """Sets `requires_grad` of one model's parameters, and nothing else of the model.

    Args:
        model: the model that `layout` describes.
        tied: what a weight shared by embeddings and head does once the embeddings are frozen.
    """

    def __init__(self, model: nn.Module, layout: Layout, tied: TiedPolicy) -> None:
        self._model = model
        self._layout = layout
        self._tied = tied
        self._slots: list[ParameterSlot] = []
        self._flags: list[bool] = []  # of the plan in force, one a slot
        self._user_trainable: dict[str, bool] = {}
        self._frozen_columns: list[FrozenColumns] = []
        self._scan()

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self._slots[0].parameter.device

    @property
    def trainable_params(self) -> int:
        """Elements that were trainable when the model was patched."""
        return sum(s.parameter.numel() for s in self._slots if self._user_trainable[s.name])

    def active_params(self, plan: FreezePlan) -> int:
        """Elements that the plan in force trains."""
        flags = zip(self._slots, self._flags, strict=True)
        return sum(self.active_size(slot, plan) for slot, on in flags if on)

    def active_size(self, slot: ParameterSlot, plan: FreezePlan) -> int:
        """Elements of an active parameter that really train under `plan`."""
        size = slot.parameter.numel()
        if not slot.sliced:
            return size
        return size // len(slot.units) * len(self.active_units(slot, plan))

    def active_units(self, slot: ParameterSlot, plan: FreezePlan) -> tuple[int, ...]:
        """Units in which the parameter is active under `plan`; () when it is frozen."""
        if not self._user_trainable[slot.name]:
            return ()
        trained = tuple(unit for unit in slot.units if self._trains(unit, plan))
        if trained == slot.units or slot.sliced:
            return trained
        return trained if self._tied == "head_only" and trained == (self._layout.head,) else ()

    def freezes_with(self, slot: ParameterSlot) -> int:
        """The unit whose freezing is the parameter's, under a schedule that freezes upwards."""
        if slot.sliced:
            return slot.units[-1]  # trains while any of its columns does
        both = slot.units == (EMBEDDINGS, self._layout.head)
        return slot.units[-1] if both and self._tied == "head_only" else slot.units[0]

    def frozen_by(self, plan: FreezePlan) -> Iterator[ParameterSlot]:
        """Parameters that were trainable when the model was patched and that `plan` freezes."""
        for slot in self._slots:
            if self._user_trainable[slot.name] and not self.active_units(slot, plan):
                yield slot

    def check(self, plan: FreezePlan) -> None:
        """Raise `ValueError` if `plan` leaves nothing to train."""
        if not any(self.active_units(slot, plan) for slot in self._slots):
            raise ValueError(
                f"the plan with boundary {plan.boundary} of {self._layout.num_blocks} blocks "
                "freezes everything that was trainable when the model was patched"
            )

    def apply(self, plan: FreezePlan) -> set[int]:
        """Set every flag as `plan` says.

        Returns:
            The units that hold an active parameter.
        """
        self._note_user_choices()
        self._scan()
        units = [self.active_units(slot, plan) for slot in self._slots]
        self._flags = [bool(used) for used in units]
        for slot, on in zip(self._slots, self._flags, strict=True):
            slot.parameter.requires_grad_(on)
        self.reassert()  # with the columns that were frozen before
        self.hold_columns(plan)
        return {unit for used in units for unit in used}

    def hold_columns(self, plan: FreezePlan) -> None:
        """Frozen columns of a table are from now on what they are at this moment."""
        units = [(slot, self.active_units(slot, plan)) for slot in self._slots if slot.sliced]
        self._frozen_columns = [
            FrozenColumns.of(slot, [unit for unit in slot.units if unit not in used])
            for slot, used in units
            if used and used != slot.units
        ]

    def follow(self, plan: FreezePlan) -> bool:
        """Take what was switched on since the last plan for the user's own choice, as PEFT does it
        with another adapter.

        Returns:
            True where `plan` trains some of it and so wants to be applied anew.
        """
        chosen = [slot for slot, on in self._switched() if on]
        self._user_trainable.update((slot.name, True) for slot in chosen)
        return any(self.active_units(slot, plan) for slot in chosen)

    def reassert(self) -> None:
        """Freeze again what was switched on, drop its gradient, put frozen columns back."""
        for slot, on in zip(self._slots, self._flags, strict=True):
            if on or not self._user_trainable[slot.name]:
                continue
            parameter = slot.parameter
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                # a frozen tensor with a gradient would still be updated, and counted by clipping
                parameter.grad = None
        for columns in self._frozen_columns:
            columns.put_back()

    def restore(self) -> None:
        """Every flag as it was found, but for what the user switched in the meantime."""
        self._note_user_choices()
        if self._flags:
            self.reassert()
        for slot in self._slots:
            slot.parameter.requires_grad_(self._user_trainable[slot.name])

    def explain(self, slot: ParameterSlot, plan: FreezePlan) -> str:
        """What becomes of a parameter that several units use."""
        label = self._layout.unit_label
        if slot.sliced:
            trained = len(self.active_units(slot, plan))
            return (
                f"tied: {slot.name} holds columns of {label(slot.units[0])} to "
                f"{label(slot.units[-1])}; {trained} of {len(slot.units)} train, its state stays"
            )
        if EMBEDDINGS in slot.units:
            users = " and ".join(map(label, slot.units))
            why = self._tied
        else:
            users = f"{label(slot.units[0])} to {label(slot.units[-1])}"
            why = "trains only while all of them do"
        state = "trains" if slot.parameter.requires_grad else "is frozen"
        return f"tied: {slot.name} is used by {users}; it {state} ({why})"

    def _trains(self, unit: int, plan: FreezePlan) -> bool:
        if unit == EMBEDDINGS:
            return plan.embeddings
        return plan.head if unit == self._layout.head else plan.trainable[unit]

    def _scan(self) -> None:
        """List the parameters; one that appeared since the last plan keeps its own flag."""
        self._slots = list(parameter_slots(self._model, self._layout))
        known = self._user_trainable
        self._user_trainable = {
            slot.name: known.get(slot.name, slot.parameter.requires_grad) for slot in self._slots
        }

    def _switched(self) -> Iterator[tuple[ParameterSlot, bool]]:
        """Parameters whose flag is not the plan's any more, with the flag that they have now."""
        # before the first plan there are no flags, and nothing to compare with
        for slot, on in zip(self._slots, self._flags, strict=bool(self._flags)):
            parameter = slot.owner._parameters.get(slot.attribute)  # FSDP1 takes them away
            if parameter is not None and parameter.requires_grad != on:
                yield slot, not on

    def _note_user_choices(self) -> None:
        """What somebody switched since the last plan stays so wherever the next one trains it."""
        self._user_trainable.update((slot.name, on) for slot, on in self._switched())
