"""The columns of a task, and their texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from reprlib import repr as short
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .errors import UserError

_COLUMN_OPTIONS = {"text": "--text-column", "pair": "--pair-column", "label": "--label-column"}


def find_columns(
    splits: Mapping[str, Dataset],
    given: Mapping[str, str],
    roles: Mapping[str, Sequence[str]],
    *,
    optional: Collection[str] = (),
    targets: Collection[str] = (),
) -> dict[str, str]:
    """The column of each role: the one `given`, else the first of its usual names that is there.

    The first split decides, the others must have the same columns.

    Args:
        roles: role -> usual names of its column, all roles of a task in one call.
        optional: roles that may be missing; they are left out of the result.
        targets: roles that rows to predict need not have.
    """
    (first, rows), *others = splits.items()
    if first == "predict":
        roles = {role: usual for role, usual in roles.items() if role not in targets}
        given = {role: name for role, name in given.items() if role not in targets}
    present = ", ".join(rows.column_names)
    for role in given.keys() - roles.keys():
        raise UserError(f"{_option(role)}: this task has no such column, only {', '.join(roles)}")
    found = {}
    for role, usual in roles.items():
        name = given.get(role) or next((n for n in usual if n in rows.column_names), None)
        if name is not None and name not in rows.column_names:
            raise UserError(f"{_option(role)}: no column {name!r}; the file has {present}")
        if name is not None:
            found[role] = name
        elif role not in optional:
            raise UserError(f"which column is the {role}? {_option(role)}; there are {present}")
    halves = {"instruction", "input"}  # of a prompt, in rows as Alpaca's
    used = {name for role, name in found.items() if role not in given} & halves
    unused = halves & {*rows.column_names} - {*found.values()}
    if used and unused and any(rows[unused.pop()]):
        raise UserError(
            "instruction and input are two parts of a prompt: join them into one column, or name "
            f"the column to read alone (--column {next(iter(roles))}=NAME)"
        )
    if len(set(found.values())) < len(found):
        listing = ", ".join(f"{role} is {name}" for role, name in found.items())
        raise UserError(f"columns of a task need columns of their own, got {listing}")
    for split, rows in others:
        for role, name in found.items():
            if name not in rows.column_names and not (split == "predict" and role in targets):
                there = ", ".join(rows.column_names)
                raise UserError(f"{split} row 1 has no value for column {name!r}, only for {there}")
    return found


def _option(role: str) -> str:
    return _COLUMN_OPTIONS.get(role, f"--column {role}=NAME")


def check_texts(rows: Dataset, column: str, split: str, *, empty: str = "error") -> None:
    """Refuse rows whose `column` is no text, and with empty="error" those without a text."""
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
        at = pc.index(blank, True).as_py() if empty == "error" else -1
        if at >= 0:
            raise UserError(f"{split} row {at + 1} has no value for column {column!r}")
        return
    for number, value in enumerate(rows[column], 1):
        if value is None or (isinstance(value, str) and not value.strip()):
            if empty == "error":
                raise UserError(f"{split} row {number} has no value for column {column!r}")
        elif not isinstance(value, str):
            raise UserError(
                f"{split} row {number}, column {column!r} holds {short(value)}, which is no text"
            )


def encode_rows(rows: Dataset, tokens: Callable[..., dict[str, Any]], **more: Any) -> Dataset:
    """What `tokens` makes of batches of rows, in place of their columns."""
    return rows.map(
        tokens, batched=True, remove_columns=rows.column_names, keep_in_memory=True, **more
    )
