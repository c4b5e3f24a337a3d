"""Rows of text from a local file or a hub data set, checked and turned into examples."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..backend import one_line
from .errors import UserError

Row = dict[str, Any]

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put in front

# float() takes "nan" (a language code), "1_000" and blanks as well
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Cell(str):
    """A cell of a CSV or TSV file, which says nothing of types."""

    __slots__ = ()


@dataclass(frozen=True)
class Example:
    """One row: text, second text of a pair if there is one, and label (None for causal LM)."""

    text: str
    pair: str | None = None
    label: int | float | None = None


@dataclass(frozen=True)
class TextData:
    """Examples of both splits; `description` is one line on where the text comes from."""

    train: Sequence[Example]
    validation: Sequence[Example]
    label_names: tuple[str, ...] | None  # by index; None for regression and causal LM
    description: str

    def summary(self) -> str:
        """One line: what was read, and what the labels were taken for."""
        line = f"{self.description}: {len(self.train):,} and {len(self.validation):,} rows"
        labels = [example.label for example in self.train]
        if self.label_names is not None:
            shown = ", ".join(map(repr, self.label_names[:10]))
            more = ", ..." if self.label_names[10:] else ""
            line += f"; {len(self.label_names)} classes: {shown}{more}"
        elif labels[0] is not None:
            line += f"; a regression, labels from {min(labels):g} to {max(labels):g}"
        return line

    def digest(self) -> str:
        """A digest of texts, labels and names, the same for every model and tokenizer."""
        digest = hashlib.sha256(repr(self.label_names and sorted(self.label_names)).encode())
        for e in (*self.train, *self.validation):
            label = e.label if self.label_names is None else self.label_names[e.label]
            digest.update(repr((e.text, e.pair, label)).encode())
        return digest.hexdigest()

    def with_classes(self, names: tuple[str, ...]) -> TextData:
        """The data with its classes in a head's order, or with other names in its own order."""
        if sorted(names) != sorted(self.label_names):
            return dataclasses.replace(self, label_names=names)

        def moved(examples: Sequence[Example]) -> list[Example]:
            places = [names.index(name) for name in self.label_names]
            return [dataclasses.replace(e, label=places[e.label]) for e in examples]

        return TextData(moved(self.train), moved(self.validation), names, self.description)


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
            row = _parse(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not an object")
            rows.append(row)
    return rows


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> Row:
        if len(row := dict(pairs)) < len(pairs):
            raise UserError(f"{where}: an object has one of its names twice")
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{at}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        raise UserError(f"{where}: {one_line(error)}") from error


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding=_ENCODING) as file:
        header = next((line for line in file if line.strip()), "")
    # Excel separates by semicolons where the comma is the decimal sign
    delimiter = next((d for d in ",;\t|" if d in header), ",")
    return _read_table(path, delimiter=delimiter, strict=True)  # strict: an open quotation mark


def _read_tsv(path: Path) -> list[Row]:
    # unquoted, as GLUE's own files: a cell that opens with a quotation mark is only that
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, **dialect: Any) -> list[Row]:
    rows: list[Row] = []
    limit = csv.field_size_limit(2**31 - 1)  # characters of a cell; 131,072 unless told
    try:
        with path.open(newline="", encoding=_ENCODING) as file:
            reader = csv.reader(file, **dialect)
            lines = filter(None, reader)
            header = next(lines, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: two columns are named {twice!r}")
            for cells in lines:
                if len(cells) > len(header):
                    raise UserError(f"{path}, line {reader.line_num}: more cells than columns")
                rows.append(dict(zip(header, map(Cell, cells), strict=False)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_json(path: Path) -> list[Row]:
    rows = _parse(path.read_text(encoding=_ENCODING), str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a list of objects")
    return rows


def read_hub(name: str) -> tuple[list[Row], list[Row]]:
    """Train and validation rows of a hub data set, "owner/name" or "owner/name:configuration"."""
    try:
        import datasets
    except ImportError:
        raise UserError("a hub data set needs datasets: pip install datasets") from None
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
    if not labelled and (columns.pair or columns.label):
        raise UserError("a language model has no pairs and no labels, only --text-column")
    present = list(dict.fromkeys(name for row in rows for name in row))

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
    pair = choose(columns.pair, [partner[text]] if labelled and text in partner else [])
    label = choose(columns.label, ("label", "labels")) if labelled else None
    if labelled and label is None:
        raise UserError(
            f"which column is the label? --label-column; there are {', '.join(present)}"
        )
    chosen = [name for name in (text, pair, label) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"text, pair and label need columns of their own, got {', '.join(chosen)}")
    return Columns(text, pair, label)


def _number(label: Any) -> float | None:
    """The label as a number; None where the type of its file says that it is none."""
    if isinstance(label, Cell):
        return float(label) if _DECIMAL.fullmatch(label) else None
    return None if isinstance(label, str | bool) else label


def _class_name(label: Any) -> str:
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole else str(label)


def _class_order(name: str) -> tuple[float, str]:
    """A key that sorts numbers first, 2 before 10."""
    return (float(name) if _DECIMAL.fullmatch(name) else math.inf, name)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where} holds {short(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character: {short(value)}") from None


def _check_labels(split: str, labels: Sequence[Any]) -> None:
    """Refuse what cannot be a label, and labels of more than one type."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    largest = 3.4e38  # of fp32
    first = None
    for number, label in enumerate(labels, 1):
        kind = next((name for type_, name in kinds.items() if isinstance(label, type_)), None)
        value = _number(label) if kind else None
        if kind is None or (value is not None and not -largest <= value <= largest):
            raise UserError(f"{split} row {number}: {short(label)} cannot be a label")
        first = first or kind
        if kind != first:
            raise UserError(
                f"{split} row {number}: label {short(label)} is {kind}, that of row 1 is {first}"
            )


def _as_numbers(split: str, labels: Sequence[Any]) -> list[float]:
    for number, label in enumerate(labels, 1):
        if _number(label) is None:
            raise UserError(f"{split} row {number}: label {short(label)} is not a number")
    if len(set(map(_number, labels))) < 2:
        raise UserError(f"the {split} rows have one label only: {labels[0]!r}")
    return [float(label) for label in labels]


def _as_places(split: str, labels: Sequence[Any], names: Sequence[str]) -> list[int]:
    places = {name: i for i, name in enumerate(names)}
    for number, label in enumerate(labels, 1):
        if _class_name(label) not in places:
            listing = ", ".join(map(short, names[:10])) + (", ..." if names[10:] else "")
            raise UserError(
                f"{split} row {number}: label {short(label)} is outside the set of the training "
                f"rows ({listing})"
            )
    return [places[_class_name(label)] for label in labels]


def build_data(
    train: Sequence[Row],
    validation: Sequence[Row],
    *,
    columns: Columns,
    labelled: bool,
    description: str,
) -> TextData:
    """Examples from rows.

    Text is a class as it stands, and so are whole numbers; numbers, one at least with a fraction,
    make the task a regression. What is a number the type of the file says; a table has no types,
    so there a column is numbers if every label reads as one and one has a fraction, else text.

    Raises:
        UserError: a missing column or value, a text that is none, labels of two types, or a
            validation label that training never shows.
    """
    columns = _resolve_columns(train, columns, labelled=labelled)
    splits = {"train": train, "validation": validation}
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            for column in filter(None, (columns.text, columns.pair, columns.label)):
                value = row.get(column)
                if value is None or (isinstance(value, str) and not value.strip()):
                    if labelled:
                        raise UserError(f"{split} row {number} has no value for column {column!r}")
                elif column != columns.label or isinstance(value, str):
                    _check_text(value, f"{split} row {number}, column {column!r}")

    if not labelled:
        for split, rows in splits.items():  # plain text has empty lines
            splits[split] = [row for row in rows if row.get(columns.text)]
            if not splits[split]:
                raise UserError(f"all {split} rows are empty in column {columns.text!r}")
            if left_out := len(rows) - len(splits[split]):
                description += f", {left_out:,} empty {split} rows left out"
        labels: dict[str, Sequence[Any]] = {k: [None] * len(rows) for k, rows in splits.items()}
        names = None
    else:
        labels = {split: [row[columns.label] for row in rows] for split, rows in splits.items()}
        for split in splits:
            _check_labels(split, labels[split])
        numbers = [_number(label) for label in labels["train"]]
        if None not in numbers and not all(float(number).is_integer() for number in numbers):
            names = None
            labels = {split: _as_numbers(split, labels[split]) for split in splits}
        else:
            names = tuple(sorted({_class_name(y) for y in labels["train"]}, key=_class_order))
            if len(names) < 2:
                raise UserError(f"the training rows have one label only: {names[0]!r}")
            labels = {split: _as_places(split, labels[split], names) for split in splits}

    def examples(split: str) -> list[Example]:
        texts = [str(row[columns.text]) for row in splits[split]]
        pairs = [None if columns.pair is None else str(row[columns.pair]) for row in splits[split]]
        return [*map(Example, texts, pairs, labels[split])]

    return TextData(examples("train"), examples("validation"), names, description)
