"""Questions with a text that holds the answer: rows as SQuAD's, with its unanswerable ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from reprlib import repr as short
from typing import Any

import numpy as np
from datasets import Dataset

from ..columns import check_texts, encode_rows, find_columns
from ..errors import UserError
from ..options import TrainOptions

_ROLES = {
    "question": ("question",),
    "context": ("context",),
    "answers": ("answers", "answer"),
    "answer_start": ("answer_start",),  # where the answer is a text of its own
}
_BEST = 20  # spans of a window that are compared
_LONGEST = 30  # tokens of an answer
_OUTSIDE = [-1, -1]  # offsets of a token that is not of the context
_ABOUT_WINDOWS = ["row", "offsets", "nowhere"]


class QuestionAnswering:
    """A long text is read in windows that overlap; the answer is the best of them all.

    Attributes:
        unanswerable: whether training rows without an answer taught the model to give none; kept
            in the model's config as `handle_impossible_answer`.
    """

    processor = "AutoTokenizer"
    trainer = "Trainer"
    metrics = ("f1", "exact_match")
    names = None

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.max_length, self.stride = options.max_length, options.doc_stride
        targets = ("answers", "answer_start")
        self.columns = find_columns(
            splits, options.columns, _ROLES, optional=targets[1:], targets=targets
        )
        self.unanswerable: bool | None = None
        self._windows: dict[str, Dataset] = {}  # by split, for all but "train"
        self._contexts: dict[str, Any] = {}
        self._answers: dict[str, list[list[tuple[str, int]]]] = {}
        for split, rows in splits.items():
            for role in ("question", "context"):
                check_texts(rows, self.columns[role], split)
            if split != "predict":
                self._answers[split] = _answers(rows, self.columns, split)
        if "train" in splits:
            self.unanswerable = not all(self._answers["train"])
            if not any(self._answers["train"]):
                raise UserError("no training row has an answer")
            if find_spec("torchmetrics") is None:
                raise UserError("question answering needs torchmetrics: pip install torchmetrics")

    def summary(self) -> str:
        if not self.unanswerable:
            return ""
        without = sum(not own for own in self._answers["train"])
        return f"{without:,} training rows without an answer"

    def configure(self, config: Any) -> None:
        config.num_labels = 2  # a start and an end
        if self.unanswerable is None:
            self.unanswerable = getattr(config, "handle_impossible_answer", False)
        config.handle_impossible_answer = self.unanswerable

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        """One or more windows a row, with "start_positions" and "end_positions" but for "predict".

        Both are at [CLS] in a window without the whole answer.
        """
        if not processor.is_fast:
            raise UserError("question answering needs a fast tokenizer, which has offsets")
        question, context = self.columns["question"], self.columns["context"]
        max_length, most, inputs = self.max_length, self.stride, processor.model_input_names
        special, cls = processor.num_special_tokens_to_add(pair=True), processor.cls_token_id
        answers = self._answers.get(split)

        def windows(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            found: list[dict[str, Any]] = []
            lengths = map(len, processor(batch[question], add_special_tokens=False)["input_ids"])
            for number, length, asked, text in zip(
                numbers, lengths, batch[question], batch[context], strict=True
            ):
                room = max_length - special - length  # tokens of the context in a window
                if room < 2:
                    raise UserError(
                        f"{split} row {number + 1}: a question of {length} tokens leaves no room "
                        f"for its context in {max_length} tokens (--max-length)"
                    )
                encoded = processor(
                    asked,
                    text,
                    truncation="only_second",
                    max_length=max_length,
                    stride=min(most, room // 2),  # tokens that two windows share
                    return_overflowing_tokens=True,
                    return_offsets_mapping=True,
                )
                for i, ids in enumerate(encoded["input_ids"]):
                    pairs = zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
                    offsets = [[*ends] if side == 1 else _OUTSIDE for ends, side in pairs]
                    nowhere = ids.index(cls) if cls in ids else 0
                    row = {name: encoded[name][i] for name in inputs if name in encoded}
                    if answers is not None:
                        start, end = _positions(offsets, answers[number]) or (nowhere, nowhere)
                        row |= {"start_positions": start, "end_positions": end}
                    found.append(row | {"row": number, "offsets": offsets, "nowhere": nowhere})
            return {name: [row[name] for row in found] for name in found[0]}

        encoded = encode_rows(rows, windows, with_indices=True)
        if split != "train":
            self._windows[split] = encoded.select_columns(_ABOUT_WINDOWS)
            self._contexts[split] = rows[context]
        return encoded.remove_columns(_ABOUT_WINDOWS)

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        from transformers import DataCollatorWithPadding

        processor.padding_side = "right"  # positions are counted from the left
        return DataCollatorWithPadding(processor)

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        return logits[:2]  # of starts and of ends, (B, T) each; BART gives hidden states, too

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Exact match and F1 as SQuAD's script has them, from 0 to 1; "" is right for no answer."""
        from torchmetrics.functional.text import squad

        found = self._best(predictions, "validation")
        given = [{"id": str(i), "prediction_text": text} for i, (text, _) in enumerate(found)]
        truth = [
            {"id": str(i), "answers": {"text": [text for text, _ in own] or [""]}}
            for i, own in enumerate(self._answers["validation"])
        ]
        percent = squad(given, truth)
        return {name: float(percent[name]) / 100 for name in self.metrics}

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        found = self._best(predictions, "predict")
        return [{"answer": text, "score": score} for text, score in found]

    def _best(self, predictions: Any, split: str) -> list[tuple[str, float]]:
        """Answer of each row, and its share of the probability of the likeliest spans."""
        contexts = [*self._contexts[split]]
        spans: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
        for start, end, window in zip(*predictions, self._windows[split], strict=True):
            own, offsets = spans[window["row"]], np.array(window["offsets"])  # (T, 2)
            inside = np.flatnonzero(offsets[:, 0] >= 0)
            # (inside, _LONGEST): from each token on, a span of every length
            beyond = np.append(end[inside], np.full(_LONGEST - 1, -np.inf))
            sums = start[inside, None] + np.lib.stride_tricks.sliding_window_view(beyond, _LONGEST)
            for place in np.argpartition(-sums, _BEST, axis=None)[:_BEST]:
                first, more = divmod(int(place), _LONGEST)
                if (score := float(sums[first, more])) > -np.inf:
                    ends = offsets[inside[first], 0], offsets[inside[first + more], 1]
                    own[ends] = max(score, own.get(ends, score))
            if self.unanswerable:  # no answer is as likely as in the window that sees one most
                score = float(start[window["nowhere"]] + end[window["nowhere"]])
                own[0, 0] = min(score, own.get((0, 0), score))
        best = []
        for text, own in zip(contexts, spans, strict=True):
            scores = sorted(own.values(), reverse=True)[:_BEST]
            (start, end), score = max(own.items(), key=lambda span: span[1])
            share = 1 / float(np.exp(np.array(scores) - score).sum())
            best.append((text[start:end].strip(), share))
        return best


def _answers(rows: Dataset, columns: dict[str, str], split: str) -> list[list[tuple[str, int]]]:
    """The answers of each row, without blanks at their ends, and where they start."""
    found = []
    starts = rows[columns["answer_start"]] if "answer_start" in columns else [None] * len(rows)
    cells = zip(rows[columns["answers"]], starts, rows[columns["context"]], strict=True)
    for number, (cell, start, context) in enumerate(cells, 1):
        where = f"{split} row {number}"
        if isinstance(cell, dict):
            texts, places = cell.get("text"), cell.get("answer_start")
        elif isinstance(cell, list) and all(isinstance(one, dict) for one in cell):
            texts = [one.get("text") for one in cell]
            places = [one.get("answer_start") for one in cell]
        else:
            texts, places = ([], []) if cell in (None, "") else ([cell], [start])
        found.append(own := [])
        if not isinstance(texts, list) or not isinstance(places, list) or len(texts) != len(places):
            raise UserError(f"{where}: {short(cell)} is no answers with text and answer_start")
        for text, place in zip(texts, places, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: {short(text)} is no text of an answer")
            place = int(place) if isinstance(place, str) and place.isdecimal() else place
            if not isinstance(place, int) or isinstance(place, bool):
                raise UserError(f"{where}: {short(place)} is no answer_start, a whole number")
            if place < 0 or context[place : place + len(text)] != text:
                raise UserError(
                    f"{where}: {short(text)} is not at character {place} of the context"
                )
            own.append((text.strip(), place + len(text) - len(text.lstrip())))
    return found


def _positions(offsets: list[list[int]], answers: list[tuple[str, int]]) -> tuple[int, int] | None:
    """First and last token of the first answer; None if the window has not all of it."""
    if not answers:
        return None
    text, start = answers[0]
    end = start + len(text)
    inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]
