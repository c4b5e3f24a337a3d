"""Plain text with masked tokens to guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset

from ..columns import check_texts, encode_rows, find_columns
from ..errors import UserError
from ..options import TrainOptions
from .plain_text import join_and_cut, perplexity, row_losses

_BEST = 5  # guesses for a mask
_SEED = 1  # of the masks of validation rows, which are the same in every evaluation


class MaskedLM:
    processor = "AutoTokenizer"
    trainer = "Trainer"
    metrics = ("perplexity",)
    names = None

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.max_length, self.share = options.max_length, options.mlm_probability
        if not 0 < self.share < 1:
            raise UserError(f"--mlm-probability is between 0 and 1, got {self.share}")
        self.columns = find_columns(splits, options.columns, {"text": ("text", "sentence")})
        for split, rows in splits.items():
            empty = "error" if split == "predict" else "left out"
            check_texts(rows, self.columns["text"], split, empty=empty)

    def summary(self) -> str:
        return f"{self.share:.0%} of the tokens masked"

    def configure(self, config: Any) -> None:
        pass

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        """Validation rows are masked here, training rows in the collator, anew every epoch."""
        mask, column = processor.mask_token, self.columns["text"]
        if mask is None:
            raise UserError("masked LM needs a tokenizer with a mask token")
        for number, text in enumerate(rows[column], 1):
            if (mask in (text or "")) != (split == "predict"):
                have = "has no" if split == "predict" else "holds a"
                why = "" if split == "predict" else ", which training puts in itself"
                raise UserError(f"{split} row {number} {have} {mask}{why}")
        if split == "predict":
            return self._encode_predict(rows, processor)
        cut = join_and_cut(rows, processor, self.max_length, column=column)
        if split == "train":
            return cut
        collate = self._masking(processor, seed=_SEED)

        def masked(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            tensors = collate([{"input_ids": ids} for ids in batch["input_ids"]])
            return {name: tensors[name].tolist() for name in ("input_ids", "labels")}

        cut = cut.map(masked, batched=True, keep_in_memory=True)
        if all(label == -100 for row in cut["labels"] for label in row):
            raise UserError(f"no token of the {split} text was masked: raise --mlm-probability")
        return cut

    def _encode_predict(self, rows: Dataset, processor: Any) -> Dataset:
        column, max_length = self.columns["text"], self.max_length

        def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
            return dict(processor(batch[column], truncation=True, max_length=max_length))

        encoded, mask = encode_rows(rows, tokens), processor.mask_token_id
        self._masks = [
            [place for place, token in enumerate(ids) if token == mask]
            for ids in encoded["input_ids"]
        ]
        for number, masks in enumerate(self._masks, 1):
            if not masks:
                raise UserError(f"predict row {number}: no mask within --max-length {max_length}")
        self._decode = processor.decode
        return encoded

    def _masking(self, processor: Any, seed: int | None = None) -> Callable[[list[dict]], dict]:
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(processor, mlm_probability=self.share, seed=seed)

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        processor.padding_side = "right"  # `answers` counts from the left
        masking, mask, epoch = self._masking(processor), processor.mask_token_id, 0

        def set_epoch(number: int) -> None:
            nonlocal epoch
            epoch = number

        def collate(rows: list[dict]) -> dict:
            if "labels" in rows[0] or mask in rows[0]["input_ids"]:  # masked already
                return processor.pad(rows, return_tensors="pt")
            # a function of epoch and batch: the batches that a loader makes ahead would otherwise
            # move the random numbers that a checkpoint has
            seed = crc32(repr((epoch, [row["input_ids"] for row in rows])).encode())
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return masking(rows)

        collate.set_epoch = set_epoch
        return collate

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        """Losses (B, 2) of `row_losses`; without labels (B, T, 5) probabilities and tokens."""
        logits = logits[0] if isinstance(logits, tuple) else logits  # (B, T, V)
        if labels is not None:
            return row_losses(logits, labels)
        best = logits.topk(min(_BEST, logits.shape[-1]))
        whole = logits.float().logsumexp(-1, keepdim=True)
        return (best.values.float() - whole).exp(), best.indices

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        return {"perplexity": perplexity(predictions)}

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        """For every mask of a row, from the left, the likeliest tokens and their probabilities."""
        return [
            {
                "masks": [
                    [
                        {"token": self._decode([token]).strip(), "score": float(score)}
                        for score, token in zip(scores[place], tokens[place], strict=True)
                    ]
                    for place in masks
                ]
            }
            for scores, tokens, masks in zip(*predictions, self._masks, strict=True)
        ]
