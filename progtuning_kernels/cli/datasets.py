"""Rows of text from a local file or a hub data set, checked and turned into examples."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._backend import one_line
from .errors import UserError

Row = dict[str, Any]

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put in front


@dataclass(frozen=True)
class Example:
    """One row: text, second text of a pair if there is one, and label (None for causal LM)."""

    text: str
    pair: str | None = None
    label: int | float | None = None


@dataclass(frozen=True)
class TextData:
    """Examples of both splits.

    Attributes:
        label_names: names of the classes by index; None for regression and causal LM.
        description: one line on where the text comes from.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    label_names: tuple[str, ...] | None
    description: str


@dataclass(frozen=True)
class Columns:
    """Column names; None is filled in from what the rows have."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .json (a list of objects), .csv or .tsv file.

    Raises:
        UserError: no such file, another suffix, or a line that cannot be read (named).
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path}: unknown suffix {suffix!r}; use {', '.join(readers)}")
    try:
        rows = readers[suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from error
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not an object")
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    return _read_table(path, delimiter=",")


def _read_tsv(path: Path) -> list[Row]:
    # unquoted, as GLUE's own files: a cell that opens with a quotation mark is only that
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, **dialect: Any) -> list[Row]:
    rows = []
    with path.open(newline="", encoding=_ENCODING) as file:
        reader = csv.DictReader(file, **dialect)
        try:
            for row in reader:
                if None in row:
                    raise UserError(f"{path}, line {reader.line_num}: more cells than columns")
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding=_ENCODING))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a list of objects")
    return rows


def read_hub(name: str) -> tuple[list[Row], list[Row]]:
    """Train and validation rows of a hub data set, "owner/name" or "owner/name:configuration"."""
    try:
        import datasets
    except ImportError:
        raise UserError('a hub data set needs: pip install "progtuning_kernels[hub]"') from None
    path, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the hub's errors have no common class
        raise UserError(f"cannot load data set {name!r}: {one_line(error)}") from error
    held_out = next((s for s in ("validation", "validation_matched", "test") if s in splits), None)
    if "train" not in splits or held_out is None:
        raise UserError(f"data set {name!r} has splits {list(splits)}; train and validation needed")
    return list(splits["train"]), list(splits[held_out])


def _resolve_columns(rows: Sequence[Row], columns: Columns, *, labelled: bool) -> Columns:
    present = list(rows[0])

    def choose(wanted: str | None, usual: Iterable[str]) -> str | None:
        if wanted is not None:
            if wanted not in present:
                raise UserError(f"no column {wanted!r}; the file has {', '.join(present)}")
            return wanted
        return next((name for name in usual if name in present), None)

    text = choose(columns.text, ("text", "text_a", "sentence", "sentence1", "premise", "question1"))
    if text is None:
        raise UserError(f"which column is the text? --text-column; there are {', '.join(present)}")
    partner = {
        "text_a": "text_b",
        "sentence1": "sentence2",
        "premise": "hypothesis",
        "question1": "question2",
    }
    pair = choose(columns.pair, [partner[text]] if text in partner else [])
    label = choose(columns.label, ("label", "labels")) if labelled else None
    if labelled and label is None:
        raise UserError(
            f"which column is the label? --label-column; there are {', '.join(present)}"
        )
    return Columns(text, pair, label)


def _typed(value: Any) -> Any:
    """Numbers of a CSV file arrive as text."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def build_data(
    train: Sequence[Row],
    validation: Sequence[Row],
    *,
    columns: Columns,
    labelled: bool,
    description: str,
) -> TextData:
    """Examples from rows.

    Integer and text labels are classes (sorted, then numbered); labels with a fraction make the
    task a regression.

    Raises:
        UserError: a missing column or value, or a validation label that training never shows.
    """
    columns = _resolve_columns(train, columns, labelled=labelled)
    if not labelled:  # plain text has empty lines
        train = [row for row in train if row.get(columns.text)]
        validation = [row for row in validation if row.get(columns.text)]
    for needed in filter(None, (columns.text, columns.pair, columns.label)):
        for split, rows in (("train", train), ("validation", validation)):
            for number, row in enumerate(rows, 1):
                if row.get(needed) in (None, ""):
                    raise UserError(f"{split} row {number} has no value for column {needed!r}")

    def example(row: Row, label: int | float | None) -> Example:
        pair = None if columns.pair is None else str(row[columns.pair])
        return Example(str(row[columns.text]), pair, label)

    if not labelled:
        return TextData(
            [example(row, None) for row in train],
            [example(row, None) for row in validation],
            None,
            description,
        )

    def labels_of(split: str, rows: Sequence[Row]) -> list[Any]:
        labels = [_typed(row[columns.label]) for row in rows]
        for number, label in enumerate(labels, 1):
            if not isinstance(label, str) and not (
                isinstance(label, int | float) and math.isfinite(label)
            ):
                raise UserError(f"{split} row {number}: {label!r} cannot be a label")
        return labels

    train_labels, validation_labels = labels_of("train", train), labels_of("validation", validation)
    numbers = all(isinstance(label, int | float) for label in train_labels)
    if numbers and any(label != int(label) for label in train_labels):
        for split, labels in (("train", train_labels), ("validation", validation_labels)):
            for number, label in enumerate(labels, 1):
                if not isinstance(label, int | float):
                    raise UserError(f"{split} row {number}: label {label!r} is not a number")
        names, index = None, float
    else:
        classes = sorted(set(train_labels), key=lambda label: (isinstance(label, str), label))
        if len(classes) < 2:
            raise UserError(f"the training rows have one label only: {classes[0]!r}")
        for number, label in enumerate(validation_labels, 1):
            if label not in classes:
                listing = ", ".join(map(repr, classes[:10])) + (", ..." if classes[10:] else "")
                raise UserError(
                    f"validation row {number}: label {label!r} is outside the set of the training "
                    f"rows ({listing})"
                )
        names = tuple(str(label) for label in classes)
        index = {label: i for i, label in enumerate(classes)}.__getitem__
    return TextData(
        [example(r, index(y)) for r, y in zip(train, train_labels, strict=True)],
        [example(r, index(y)) for r, y in zip(validation, validation_labels, strict=True)],
        names,
        description,
    )
