"""Which parameters are active under a plan, and keeping them so: plan ∧ trainable when patched."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from ..model.adapters import adapter_configs
from ..model.layout import EMBEDDINGS, Layout, ParameterSlot, parameter_slots
from ..model.rows import held_as_rows
from ..schedules import FreezePlan
from .only import check_only, compile_only, matches

TiedPolicy = Literal["frozen", "head_only"]


class ActiveSet:
    """Sets `requires_grad` of one model's parameters, and nothing else of the model."""

    def __init__(
        self, model: nn.Module, layout: Layout, tied: TiedPolicy, only: str | None = None
    ) -> None:
        self._model = model
        self._layout = layout
        self._tied = tied
        self._slots: list[ParameterSlot] = []
        self.units: set[int] = set()  # that hold an active parameter under the plan in force
        self._objects: list[weakref.ref[nn.Parameter]] = []  # one a slot
        self._flags: list[bool] = []  # of the plan in force, one a slot
        self._user_trainable: dict[str, bool] = {}
        self._adapted = bool(adapter_configs(model))
        self._only = None if only is None else compile_only(only)
        self._masked: set[str] = set()  # names of parameters that `only` leaves out
        self._scan()
        if self._only is not None:
            trainable = {name for name, on in self._user_trainable.items() if on}
            check_only(self._only, model, trainable - self._masked)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(p.device for slot in self._slots if (p := _current(slot)) is not None)

    @property
    def trainable_params(self) -> int:
        """Elements that were trainable when the model was patched."""
        return sum(s.parameter.numel() for s in self._slots if self._user_trainable[s.name])

    @property
    def active_params(self) -> int:
        """Elements that the plan in force trains."""
        flags = zip(self._slots, self._flags, strict=True)
        return sum(slot.parameter.numel() for slot, on in flags if on)

    @property
    def only(self) -> str | None:
        """The regular expression that says which parameters may train."""
        return None if self._only is None else self._only.pattern

    def active_units(self, slot: ParameterSlot, plan: FreezePlan) -> tuple[int, ...]:
        """Units in which the parameter is active under `plan`; () when it is frozen."""
        if not self._user_trainable[slot.name] or slot.name in self._masked:
            return ()
        trained = tuple(unit for unit in slot.units if self.trains(unit, plan))
        if trained == slot.units:
            return trained
        return trained if self._tied == "head_only" and trained == (self._layout.head,) else ()

    def freezes_with(self, slot: ParameterSlot) -> int:
        """The unit whose freezing is the parameter's, under a schedule that freezes upwards."""
        both = slot.units == (EMBEDDINGS, self._layout.head)
        return slot.units[-1] if both and self._tied == "head_only" else slot.units[0]

    def active_slots(self) -> list[ParameterSlot]:
        """Parameters that the plan in force trains."""
        return [slot for slot, on in zip(self._slots, self._flags, strict=True) if on]

    def frozen_by(self, plan: FreezePlan) -> Iterator[ParameterSlot]:
        """Parameters that were trainable when the model was patched and that `plan` freezes."""
        for slot in self._slots:
            if self._user_trainable[slot.name] and not self.active_units(slot, plan):
                yield slot

    def check_plan(self, plan: FreezePlan) -> None:
        """Raise `ValueError` if `plan` leaves nothing to train."""
        if not any(self.active_units(slot, plan) for slot in self._slots):
            raise ValueError(
                f"the plan with boundary {plan.boundary} of {self._layout.num_blocks} blocks "
                "freezes everything that was trainable when the model was patched"
                + (f" and that only={self.only!r} matches" if self._only else "")
            )

    def rescan_parameters(self) -> list[str]:
        """List the parameters anew; returns the names of those that are new."""
        self._note_user_choices()
        return self._scan()

    def set_flags(self, plan: FreezePlan) -> bool:
        """Set every flag as `plan` says; whether that changed one of the plan before."""
        before = self._flags
        self.rescan_parameters()
        units = [self.active_units(slot, plan) for slot in self._slots]
        self._flags = [bool(used) for used in units]
        for slot, on in zip(self._slots, self._flags, strict=True):
            slot.parameter.requires_grad_(on)
        self.freeze_again()
        self.units = {unit for used in units for unit in used}
        return self._flags != before

    def take_switched(self, plan: FreezePlan) -> bool:
        """Note what was switched on since the last plan; whether `plan` trains some of it.

        What it freezes in the lowest active unit or above is frozen again: autograd would reach it
        there.
        """
        chosen = [slot for slot, on in self._switched() if on]
        self._user_trainable.update((slot.name, True) for slot in chosen)
        if any(self.active_units(slot, plan) for slot in chosen):
            return True
        for slot in chosen:
            if slot.units[0] >= min(self.units):
                slot.parameter.requires_grad_(False)
        return False

    def freeze_again(self) -> None:
        """Freeze what was switched on since the last plan; drop gradients of what is frozen."""
        for slot, on in zip(self._slots, self._flags, strict=True):
            parameter = _current(slot)
            if on or parameter is None or not self._user_trainable[slot.name]:
                continue
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                # a frozen tensor with a gradient would still be updated, and counted by clipping
                parameter.grad = None

    def restore_flags(self) -> None:
        """Set every flag as it was found, but for what the user switched in the meantime."""
        self._note_user_choices()
        if self._flags:
            self.freeze_again()
        self._scan()
        for slot in self._slots:
            slot.parameter.requires_grad_(self._user_trainable[slot.name])

    def explain(self, slot: ParameterSlot) -> str:
        """One line of the report on a parameter that several units use."""
        label = self._layout.unit_label
        if EMBEDDINGS in slot.units:
            users = " and ".join(map(label, slot.units))
            why = self._tied
        else:
            users = f"{label(slot.units[0])} to {label(slot.units[-1])}"
            why = "trains only while all of them do"
        if slot.name in self._masked:
            why = f"only={self.only!r}"
        state = "trains" if slot.parameter.requires_grad else "is frozen"
        return f"tied: {slot.name} is used by {users}; it {state} ({why})"

    def explain_only(self) -> str | None:
        """One line of the report on what `only` freezes; None without it."""
        if self._only is None:
            return None
        own = [slot for slot in self._slots if self._user_trainable[slot.name]]
        out = [slot for slot in own if slot.name in self._masked]
        elements = sum(slot.parameter.numel() for slot in out)
        return (
            f"only={self.only!r}: freezes {len(out)} of {len(own)} trainable tensors, {elements:,} "
            "parameters, under every plan"
        )

    def trains(self, unit: int, plan: FreezePlan) -> bool:
        if unit == EMBEDDINGS:
            return plan.embeddings
        return plan.head if unit == self._layout.head else plan.trainable[unit]

    def _scan(self) -> list[str]:
        """List the parameters, and whether the user wants each to train; returns names of new ones.

        A parameter that was renamed keeps its wish. A new one's flag is its wish, unless it took
        the place of one that the plan had frozen (weight norm, FSDP2) and may have its flag.
        """
        flags = self._flags or [True] * len(self._slots)
        known: dict[int, bool] = {}
        withheld: dict[str, bool] = {}  # of those that are gone: whether the plan alone froze it
        slots = list(parameter_slots(self._model, self._layout))
        found = {id(slot.parameter) for slot in slots}
        for slot, ref, on in zip(self._slots, self._objects, flags, strict=True):
            wish, parameter = self._user_trainable[slot.name], ref()
            if id(parameter) in found:
                known[id(parameter)] = wish
                continue
            withheld[slot.name] = wish and not on
            if (left := _current(slot)) is not None and id(left) not in found:
                left.requires_grad_(wish)  # its module is in the model no more
        new = [slot.name for slot in slots if id(slot.parameter) not in known]
        owners = {name.rpartition(".")[0] for name, was in withheld.items() if was}
        adapted, self._adapted = self._adapted, bool(adapter_configs(self._model))
        peft_came = self._adapted and not adapted
        if peft_came:
            # PEFT has just frozen the whole base: every flag is its word
            known, withheld, owners = {}, {}, set()
        wishes = {}
        for slot in slots:
            wish = known.get(id(slot.parameter))
            if wish is None:
                inherited = withheld.get(slot.name)
                if inherited is None:
                    inherited = not owners.isdisjoint(_ancestors(slot.name))
                named = peft_came and held_as_rows(slot.owner, slot.attribute)
                wish = slot.parameter.requires_grad or inherited or named
            wishes[slot.name] = wish
        self._slots, self._user_trainable, self._flags = slots, wishes, []
        self._objects = [weakref.ref(slot.parameter) for slot in slots]
        if (only := self._only) is not None:
            self._masked = {
                slot.name
                for slot in slots
                if not (matches(only, slot.name) or held_as_rows(slot.owner, slot.attribute))
            }
        return new

    def _switched(self) -> Iterator[tuple[ParameterSlot, bool]]:
        """Parameters whose flag is no longer the plan's, with the flag that they have now."""
        # before the first plan there are no flags, and nothing to compare with
        slots = zip(self._slots, self._objects, self._flags, strict=bool(self._flags))
        for slot, ref, on in slots:
            parameter = _current(slot)
            if parameter is None or parameter.requires_grad == on:
                continue
            if on or parameter is ref():  # one that took its place has a flag of its own
                yield slot, not on

    def _note_user_choices(self) -> None:
        self._user_trainable.update((slot.name, on) for slot, on in self._switched())


def _current(slot: ParameterSlot) -> nn.Parameter | None:
    """The parameter that is there now; None where it was renamed or taken out."""
    return slot.owner._parameters.get(slot.attribute)


def _ancestors(name: str) -> Iterator[str]:
    """Paths of the modules that the parameter hangs in, without the model itself."""
    while name := name.rpartition(".")[0]:
        yield name
