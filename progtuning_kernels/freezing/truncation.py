"""The report that proves that backward stops at the boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..model.layout import parameter_slots
from ..model.rows import held_as_rows, trained_by_rows
from ..text_table import Table, as_html, as_text
from .freezer import Freezer
from .unit_use import UnitUse


class TruncationError(AssertionError):
    """Backward would run below the boundary; the message names the module and the cure."""


@dataclass(frozen=True)
class UnitReport:
    """One unit: its parameters, and what the last training forward left in it for backward.

    Attributes:
        label: "embeddings", "block 0" ..., or "head".
        params: number of parameter elements; what several units use counts once.
        active: how many of them are active.
        active_names: qualified names of the active parameters.
        nodes: autograd nodes that backward would run; None, as below, where nothing was measured.
        saved_bytes: of every tensor that is saved for backward; one saved thrice counts thrice, and
            weights count.
        activation_bytes: of distinct storages among them that belong to no parameter or buffer: the
            memory that the forward really holds.
        requiring_grad: paths of modules of the unit whose output required grad.
    """

    label: str
    params: int
    active: int
    active_names: tuple[str, ...] = ()
    nodes: int | None = None
    saved_bytes: int | None = None
    activation_bytes: int | None = None
    requiring_grad: tuple[str, ...] = ()


@dataclass(frozen=True)
class TruncationReport:
    """Per unit: parameters, active parameters, autograd nodes and bytes saved for backward.

    `print(report)` shows it as a table.

    Attributes:
        units: embeddings, blocks 0..L-1, head.
        boundary: the effective boundary.
        tied: which parameters several units use and what follows from it, a line each.
        kernels: how many modules run freeze-aware ops, in one line.
        cache: what the prefix cache does, in one line; None without one.
        only: what `only` freezes, in one line; None without it.
    """

    units: tuple[UnitReport, ...]
    boundary: int
    tied: tuple[str, ...] = ()
    kernels: str | None = None
    cache: str | None = None
    only: str | None = None

    @property
    def saved_bytes(self) -> int | None:
        """Sum over the units; None before the first training forward."""
        return self._total("saved_bytes")

    @property
    def activation_bytes(self) -> int | None:
        """Sum over the units; None before the first training forward."""
        return self._total("activation_bytes")

    @property
    def nodes(self) -> int | None:
        """Sum over the units; None before the first training forward."""
        return self._total("nodes")

    def _total(self, field: str) -> int | None:
        values = [getattr(unit, field) for unit in self.units]
        return None if None in values else sum(values)

    @property
    def prefix(self) -> tuple[UnitReport, ...]:
        """Embeddings and blocks below the boundary; empty under boundary 0."""
        return self.units[: self.boundary + 1] if self.boundary else ()

    def assert_truncated(self) -> None:
        """Prove that nothing below the boundary trains or is in the graph.

        Under boundary 0 there is nothing below.

        Raises:
            TruncationError: something is, or there was no training forward yet, so that nothing
                can be proved.
        """
        for unit in self.prefix:
            if unit.active:
                raise TruncationError(
                    f"{unit.label}: {_some(unit.active_names)} ({unit.active:,} parameters) "
                    f"requires grad below boundary {self.boundary}; it was switched on after the "
                    "plan was applied: call handle.advance() once per step, or freeze it with "
                    "requires_grad_(False)"
                )
            if unit.nodes is None:
                raise TruncationError("nothing to prove yet: run a forward with gradients first")
            if unit.nodes:
                where = _some(unit.requiring_grad) or "something in it"
                raise TruncationError(
                    f"{unit.label}: backward runs {unit.nodes} autograd nodes below boundary "
                    f"{self.boundary} ({where} requires grad); something replaced its forward "
                    "after patching: patch the model last, or look for hooks that call "
                    "requires_grad_() on its output"
                )
            if unit.requiring_grad:
                raise TruncationError(
                    f"{unit.label}: the output of {_some(unit.requiring_grad)} requires grad "
                    f"below boundary {self.boundary}, though nothing there trains; a hook calls "
                    "requires_grad_() on it, as enable_input_require_grads() makes them: call "
                    "model.disable_input_require_grads(), or remove the hook"
                )

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        def cell(value: int | None) -> str:
            return "-" if value is None else f"{value:,}"

        columns = ("params", "active", "nodes", "saved_bytes", "activation_bytes")
        rows: list[tuple[str, ...]] = [("unit", *columns)]
        for i, unit in enumerate(self.units):
            if i and i == self.boundary + 1:
                rows.append(("-- boundary", *[""] * len(columns)))
            rows.append((unit.label, *(cell(getattr(unit, column)) for column in columns)))
        rows.append(("total", *(cell(self._total(column)) for column in columns)))
        notes = filter(None, [self.only, self.kernels, self.cache])
        return [Table(rows, left=[0]), *self.tied, *notes]


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""


def report_truncation(freezer: Freezer, uses: Mapping[int, UnitUse]) -> TruncationReport:
    """The report on every unit; `uses` is what a forward left behind, {} where none has run."""
    layout, cache = freezer.layout, freezer.cache
    slots = list(parameter_slots(freezer.model, layout))
    units = []
    for unit in layout.units:
        own = [slot for slot in slots if slot.home == unit]  # once, however many units use it
        active = [slot for slot in own if slot.parameter.requires_grad]
        units.append(
            UnitReport(
                layout.unit_label(unit),
                sum(s.parameter.numel() for s in own if not held_as_rows(s.owner, s.attribute)),
                sum(slot.parameter.numel() for slot in active),
                tuple(slot.name for slot in active),
                **(vars(uses[unit]) if unit in uses else {}),
            )
        )
    return TruncationReport(
        tuple(units),
        freezer.boundary,
        tuple(
            freezer.active.explain(slot)
            for slot in slots
            if len(slot.units) > 1 and not trained_by_rows(slot.owner, slot.attribute)
        ),
        kernels=freezer.swaps.report.summary(),
        cache=None if cache is None else cache.report().summary(),
        only=freezer.active.explain_only(),
    )
