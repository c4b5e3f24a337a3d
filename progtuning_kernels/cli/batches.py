"""Examples to tensors: encoded once, shuffled by (seed, epoch), padded per batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .datasets import Example, TextData
from .errors import UserError

Encoded = dict[str, Any]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EncodedData:
    """Token ids of both splits; unpadded."""

    train: list[Encoded]
    validation: list[Encoded]


def encode_classification(data: TextData, tokenizer: Any, max_length: int) -> EncodedData:
    def encode(examples: Sequence[Example]) -> list[Encoded]:
        pairs = None if examples[0].pair is None else [e.pair for e in examples]
        columns = tokenizer(
            [e.text for e in examples], pairs, truncation=True, max_length=max_length
        )
        tokens = zip(*columns.values(), strict=True)
        rows = [dict(zip(columns, values, strict=True)) for values in tokens]
        return [row | {"labels": e.label} for row, e in zip(rows, examples, strict=True)]

    return EncodedData(encode(data.train), encode(data.validation))


def encode_causal_lm(data: TextData, tokenizer: Any, max_length: int) -> EncodedData:
    """Texts are joined by the end-of-text token and cut into rows of `max_length` tokens."""

    def encode(examples: Sequence[Example]) -> list[Encoded]:
        ids = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
        stream = list(chain.from_iterable([*i, tokenizer.eos_token_id] for i in ids))
        cuts = range(0, len(stream) - max_length + 1, max_length)
        return [{"input_ids": stream[c : c + max_length]} for c in cuts]

    if tokenizer.eos_token_id is None:
        raise UserError("causal LM training needs a tokenizer with an end-of-text token")
    encoded = EncodedData(encode(data.train), encode(data.validation))
    if not encoded.train or not encoded.validation:
        raise UserError(f"the text is shorter than one row of {max_length} tokens (--max-length)")
    return encoded


class Collator:
    """Pads to the longest row of the batch.

    Args:
        causal_lm: labels are the tokens themselves, padding ignored (-100).
    """

    def __init__(self, tokenizer: Any, *, causal_lm: bool) -> None:
        self._tokenizer = tokenizer
        self._causal_lm = causal_lm
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError("the tokenizer has neither a padding nor an end-of-text token")
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        labels = [row["labels"] for row in rows if "labels" in row]
        inputs = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
        batch = dict(self._tokenizer.pad(inputs, return_tensors="pt"))
        if self._causal_lm:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch


@dataclass(frozen=True)
class Order:
    """Which rows make up which optimizer step: a pure function of the seed and the step.

    A step is a window of up to `accumulate` micro-batches; the last window of an epoch may hold
    fewer, and its last micro-batch fewer rows.
    """

    num_rows: int
    batch_size: int
    accumulate: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.accumulate))

    def windows(self, first_step: int, last_step: int) -> Iterator[list[list[int]]]:
        """Row numbers of the micro-batches of steps `first_step` .. `last_step`-1, from 0."""
        permuted: tuple[int, list[int]] = (-1, [])
        rows_per_step = self.batch_size * self.accumulate
        for step in range(first_step, last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if permuted[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                permuted = epoch, torch.randperm(self.num_rows, generator=generator).tolist()
            rows = permuted[1][position * rows_per_step : (position + 1) * rows_per_step]
            yield [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
