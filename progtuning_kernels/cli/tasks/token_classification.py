"""Rows of words with a label each, such as the names of persons and places in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from reprlib import repr as short
from typing import Any

from datasets import Dataset

from ..columns import encode_rows, find_columns
from ..errors import UserError
from ..options import TrainOptions
from .classes import check, fit_head, learnt, order, own_classes, shown

_ROLES = {"tokens": ("tokens", "words"), "label": ("ner_tags", "tags", "labels")}


class TokenClassification:
    """The first piece of a word has its label; a word that the tokenizer drops has none."""

    processor = "AutoTokenizer"
    trainer = "Trainer"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro")

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.max_length = options.max_length
        self.names: list[str] | None = None
        self.columns = find_columns(splits, options.columns, _ROLES, targets=["label"])
        labels = {}
        for split, rows in splits.items():
            words = _words(rows, self.columns["tokens"], split)
            if split != "predict":
                labels[split] = _labels(rows, self.columns["label"], split, words)
        if not labels:
            return
        self.names = _class_names(splits["train"], self.columns["label"]) or sorted(
            {name for row in learnt(labels, options) for name in row},
            key=order,
        )
        self._places = {name: i for i, name in enumerate(self.names)}
        entities = [name for name in self.names if name != "O"]
        if all(name[:2] in ("B-", "I-", "E-", "S-") for name in entities):
            self.metrics = ("f1", "precision", "recall", "accuracy")
            if find_spec("seqeval") is None:
                raise UserError("figures of entities need seqeval: pip install seqeval")
        check(self.names, labels)

    def summary(self) -> str:
        if self.names is None:
            return ""
        return f"{len(self.names)} classes of words: {shown(self.names)}"

    def configure(self, config: Any) -> None:
        if self.names is None:
            self.names = own_classes(config)
            return
        self.names, self._places = fit_head(config, self.names)

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        if not processor.is_fast:
            raise UserError("token classification needs a fast tokenizer, which tells words apart")
        labelled, max_length = split != "predict", self.max_length
        column, label = self.columns["tokens"], self.columns.get("label")
        names = _class_names(rows, label) if labelled else None
        places = self._places if labelled else {}
        # RoBERTa's takes the space before a word for its first character: words get one each
        spaced = _ids(processor, ["a", "a"], True) != _ids(processor, "a a", False)

        def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
            words = batch[column]
            if spaced:
                words = [[own[0], *(f" {word}" for word in own[1:])] for own in words]
            encoded = processor(
                words, is_split_into_words=True, truncation=True, max_length=max_length
            )
            first = [_first_pieces(encoded.word_ids(i)) for i in range(len(words))]
            if not labelled:
                return {**encoded, "words": first}
            classes = ([places[_name(label, names)] for label in row] for row in batch[label])
            labels = [
                [-100 if word is None else row[word] for word in of_row]
                for of_row, row in zip(first, classes, strict=True)
            ]
            return {**encoded, "labels": labels}

        encoded = encode_rows(rows, tokens)
        if labelled:
            return encoded
        self._first_pieces = [*encoded["words"]]
        return encoded.remove_columns("words")

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        from transformers import DataCollatorForTokenClassification

        processor.padding_side = "right"  # `answers` counts from the left
        return DataCollatorForTokenClassification(processor)

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        """The likeliest class of every token: (B, T)."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Of entities by seqeval where labels are B- and I-, else of words by scikit-learn.

        predictions and labels (N, T); -100: no word begins there.
        """
        counted = labels != -100
        if "f1" not in self.metrics:
            from sklearn import metrics

            predicted, truth = predictions[counted], labels[counted]
            macro = metrics.f1_score(truth, predicted, average="macro", zero_division=0)
            accuracy = metrics.accuracy_score(truth, predicted)
            return {"accuracy": float(accuracy), "f1_macro": float(macro)}
        from seqeval import metrics

        predicted, truth = (
            [[self.names[i] for i in row[own]] for row, own in zip(of, counted, strict=True)]
            for of in (predictions, labels)
        )
        scores = (metrics.f1_score, metrics.precision_score, metrics.recall_score)
        values = [score(truth, predicted, zero_division=0) for score in scores]
        values.append(metrics.accuracy_score(truth, predicted))
        return dict(zip(self.metrics, map(float, values), strict=True))

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        """A class for every word; None for one behind `max_length`, or dropped."""
        found = []
        for classes, first, words in zip(
            predictions, self._first_pieces, rows[self.columns["tokens"]], strict=True
        ):
            # predictions are as long as the longest row's
            tagged = {
                w: self.names[c] for w, c in zip(first, classes, strict=False) if w is not None
            }
            found.append({"tags": [tagged.get(number) for number in range(len(words))]})
        return found


def _words(rows: Dataset, column: str, split: str) -> list[list[str]]:
    found = [*rows[column]]
    for number, words in enumerate(found, 1):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{split} row {number}: {column} {short(words)} is no list of words")
        if not any(word.strip() for word in words):
            raise UserError(f"{split} row {number} has no words in column {column!r}")
    return found


def _labels(rows: Dataset, column: str, split: str, words: list[list[str]]) -> list[list[str]]:
    names, found = _class_names(rows, column), []
    for number, (own, labels) in enumerate(zip(words, rows[column], strict=True), 1):
        where = f"{split} row {number}"
        if not isinstance(labels, list):
            raise UserError(f"{where}: {short(labels)} is no list of labels")
        for label in labels:
            is_label = isinstance(label, str | int) and not isinstance(label, bool)
            if not is_label or (names is not None and not 0 <= label < len(names)):
                raise UserError(f"{where}: {short(label)} cannot be a label")
        if len(labels) != len(own):
            raise UserError(f"{where} has {len(own)} words and {len(labels)} labels")
        found.append([_name(label, names) for label in labels])
    return found


def _class_names(rows: Dataset, column: str) -> list[str] | None:
    """What the numbers of a hub data set's column stand for."""
    return getattr(getattr(rows.features[column], "feature", None), "names", None)


def _name(label: str | int, names: list[str] | None) -> str:
    return str(label) if names is None else names[label]


def _ids(processor: Any, text: str | list[str], is_split: bool) -> list[int]:
    return processor(text, is_split_into_words=is_split, add_special_tokens=False)["input_ids"]


def _first_pieces(words: list[int | None]) -> list[int | None]:
    """The word of each token that begins one; None for other tokens."""
    previous = [None, *words[:-1]]
    return [word if word != last else None for word, last in zip(words, previous, strict=True)]
