"""Rows of a text, or of two, in classes (one each or several), or with a number to predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from reprlib import repr as short
from typing import Any

from datasets import Dataset

from ..columns import check_texts, encode_rows, find_columns
from ..errors import UserError
from ..options import TrainOptions
from . import classes

_TEXTS = ("text", "text_a", "sentence", "sentence1", "premise", "question1")
# the second text of a pair, where the first has one of these names
_PARTNERS = {
    "text_a": "text_b",
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question1": "question2",
    "question": "sentence",  # of QNLI
}
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number"}
_LARGEST = 3.4e38  # of fp32


class TextClassification:
    processor = "AutoTokenizer"
    trainer = "Trainer"

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.problem_type = options.problem_type
        self.max_length = options.max_length
        self.names: list[str] | None = None
        first = next(iter(splits.values()))
        given, labelled = options.columns, "train" in splits
        # toxic,obscene: a column of 0 and 1 for each class
        self._one_hot = given.get("label", "").split(",") if "," in given.get("label", "") else []
        both = {"question", "sentence"} <= {*first.column_names}
        roles = {"text": ("text", "question") if both else _TEXTS}
        if labelled and not self._one_hot:
            roles["label"] = ("label", "labels")
        own = {role: name for role, name in given.items() if role in roles}
        self.columns = find_columns(splits, own, roles, targets=["label"])
        partner = _PARTNERS.get(self.columns["text"])
        if "pair" in given or partner in first.column_names:
            roles["pair"] = (partner,) if partner else ()
            own = own if self._one_hot else given
            self.columns = find_columns(splits, own, roles, targets=["label"])
        for split, rows in splits.items():
            for role in ("text", "pair"):
                if role in self.columns:
                    check_texts(rows, self.columns[role], split)
        if labelled:
            labels = {s: self._labels(rows, s) for s, rows in splits.items() if s != "predict"}
            self._targets = self._learn(labels, options)

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.problem_type == "regression":
            return ("pearson", "spearman")
        if self.problem_type == "multi_label":
            return ("f1", "f1_macro", "exact_match")
        return ("accuracy", "f1", "matthews")

    def summary(self) -> str:
        if self.names is None:
            low, high = min(self._targets["train"]), max(self._targets["train"])
            return f"a regression, labels from {low:g} to {high:g}"
        several = ", any number of them a row" if self.problem_type == "multi_label" else ""
        return f"{len(self.names)} classes{several}: {classes.shown(self.names)}"

    def _labels(self, rows: Dataset, split: str) -> list[Any]:
        if self._one_hot:
            if missing := [name for name in self._one_hot if name not in rows.column_names]:
                raise UserError(f"{split}: no column {missing[0]!r} of --label-column")
            cells = zip(*(rows[name] for name in self._one_hot), strict=True)
            marks = {"0": False, "1": True, "0.0": False, "1.0": True}
            marks |= {"False": False, "True": True}
            found = []
            for number, row in enumerate(cells, 1):
                if wrong := [cell for cell in row if str(cell) not in marks]:
                    raise UserError(f"{split} row {number}: {short(wrong[0])} is neither 0 nor 1")
                pairs = zip(self._one_hot, row, strict=True)
                found.append([name for name, cell in pairs if marks[str(cell)]])
            return found
        column = self.columns["label"]
        labels, feature = rows[column], rows.features[column]
        if (names := getattr(feature, "names", None)) is not None:  # of a hub data set
            labels = [None if label is None or label < 0 else names[label] for label in labels]
        for number, label in enumerate(labels, 1):
            if label is None or (isinstance(label, str) and not label.strip()):
                raise UserError(f"{split} row {number} has no value for column {column!r}")
        return [*labels]

    def _learn(self, labels: dict[str, list[Any]], options: TrainOptions) -> dict[str, list[Any]]:
        """Settle kind of problem and classes; what the loss is of, before a head numbers them."""
        if self.problem_type == "regression":
            return {split: _numbers(own, split) for split, own in labels.items()}
        if self.problem_type == "multi_label":
            found = {split: _lists(own, split) for split, own in labels.items()}
            rows, shown = found, chain.from_iterable(classes.learnt(found, options))
        else:
            for split, own in labels.items():
                _check_kinds(own, split)
            numbers = [_number(label) for label in classes.learnt(labels, options)]
            fractions = None not in numbers and not all(n.is_integer() for n in numbers)
            if fractions and self.problem_type is None:
                raise UserError(
                    "the labels are numbers with a fraction: give --problem-type regression to "
                    "predict them, or --problem-type single_label if each is the name of a class"
                )
            found = {split: [*map(_class_name, own)] for split, own in labels.items()}
            shown = classes.learnt(found, options)
            rows = {split: zip(own) for split, own in found.items()}
        self.problem_type = self.problem_type or "single_label"
        self.names = self._found = self._one_hot or sorted({*shown}, key=classes.order)
        classes.check(self.names, rows)
        return found

    def configure(self, config: Any) -> None:
        own = classes.own_classes(config)
        if self.names is None and self.problem_type is None:  # to predict: as the model says
            self.problem_type = {
                "multi_label_classification": "multi_label",
                "regression": "regression",
            }.get(config.problem_type, "regression" if len(own) == 1 else "single_label")
            self.names = None if self.problem_type == "regression" else own
            return
        if self.names is None:
            classes.set_classes(config, ["LABEL_0"], "regression")
        else:
            kind = f"{self.problem_type}_classification"
            self.names, self._places = classes.fit_head(config, self._found, kind)

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        text, pair = self.columns["text"], self.columns.get("pair")
        special = processor.num_special_tokens_to_add(pair=pair is not None)
        if special > self.max_length:  # then a tokenizer cuts nothing off
            raise UserError(f"--max-length {self.max_length} is below the {special} special tokens")

        def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = None if pair is None else batch[pair]
            return dict(processor(batch[text], pairs, truncation=True, max_length=self.max_length))

        encoded = encode_rows(rows, tokens)
        if split == "predict":
            return encoded
        return encoded.add_column("labels", [self._target(y) for y in self._targets[split]])

    def _target(self, label: Any) -> Any:
        if self.problem_type == "regression":
            return label
        if self.problem_type == "multi_label":
            on = {self._places[name] for name in label}
            return [float(i in on) for i in range(len(self.names))]
        return self._places[label]

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        return logits[0] if isinstance(logits, tuple) else logits  # BART gives hidden states, too

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """predictions (N, classes) logits, or (N, 1); labels (N,) or (N, classes)."""
        if self.problem_type == "single_label":
            return classes.figures_of(predictions.argmax(-1), labels, len(self.names))
        if self.problem_type == "multi_label":
            from sklearn import metrics

            on = predictions > 0
            return {
                "f1": float(metrics.f1_score(labels, on, average="micro", zero_division=0)),
                "f1_macro": float(metrics.f1_score(labels, on, average="macro", zero_division=0)),
                "exact_match": float(metrics.accuracy_score(labels, on)),
            }
        from scipy import stats

        x, y = predictions.squeeze(-1).astype(float), labels.astype(float)
        if (x == x[0]).all():  # a constant correlates with nothing
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(stats.pearsonr(x, y).statistic),
            "spearman": float(stats.spearmanr(x, y).statistic),
        }

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        if self.problem_type == "regression":
            return [{"score": float(value)} for value in predictions.squeeze(-1)]
        if self.problem_type == "multi_label":
            from scipy import special

            shares = special.expit(predictions)
            return [
                {
                    "labels": [name for name, s in zip(self.names, row, strict=True) if s > 0.5],
                    "scores": {n: float(s) for n, s in zip(self.names, row, strict=True)},
                }
                for row in shares
            ]
        return classes.likeliest(predictions, self.names)


def _number(label: Any) -> float | None:
    """The label as a number, also where a table without types holds it as text."""
    if isinstance(label, str):
        return float(label) if classes.DECIMAL.fullmatch(label.strip()) else None
    return None if isinstance(label, bool) or not isinstance(label, int | float) else float(label)


def _numbers(labels: list[Any], split: str) -> list[float]:
    numbers = [_number(label) for label in labels]
    for number, value in enumerate(numbers):
        if value is None or not -_LARGEST <= value <= _LARGEST:
            label = short(labels[number])
            raise UserError(f"{split} row {number + 1}: label {label} is not a number")
    if len(set(numbers)) < 2:
        raise UserError(f"the {split} rows have one label only: {labels[0]!r}")
    return numbers


def _lists(labels: list[Any], split: str) -> list[list[str]]:
    for number, label in enumerate(labels, 1):
        if not isinstance(label, list) or not all(isinstance(x, str | int) for x in label):
            raise UserError(f"{split} row {number}: {short(label)} is no list of labels")
    return [[*map(_class_name, row)] for row in labels]


def _class_name(label: Any) -> str:
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole else str(label)


def _check_kinds(labels: list[Any], split: str) -> None:
    """Refuse what cannot be a label, and labels of more than one type."""
    first = None
    for number, label in enumerate(labels, 1):
        kind = next((name for type_, name in _KINDS.items() if isinstance(label, type_)), None)
        if kind is None or (isinstance(label, float) and not math.isfinite(label)):
            raise UserError(f"{split} row {number}: {short(label)} cannot be a label")
        first = first or kind
        if kind != first:
            raise UserError(
                f"{split} row {number}: label {short(label)} is {kind}, that of row 1 is {first}"
            )
