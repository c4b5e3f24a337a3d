"""Rows of a source text and the text to be generated from it, for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from datasets import Dataset

from ..columns import check_texts, encode_rows, find_columns
from ..errors import UserError
from ..options import TrainOptions

_ROLES = {
    "source": ("source", "input", "document", "article", "dialogue", "text"),
    "target": ("target", "output", "summary", "highlights"),
}


class Seq2Seq:
    """A column may be inside another one: `--column source=translation.en`."""

    processor = "AutoTokenizer"
    trainer = "Seq2SeqTrainer"
    metrics = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")
    names = None

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.max_length = options.max_length
        self.max_new_tokens = options.max_new_tokens
        if not options.trainer.get("predict_with_generate", True):
            raise UserError("seq2seq evaluates generated texts: leave predict_with_generate on")
        if find_spec("torchmetrics") is None:
            raise UserError("seq2seq is evaluated with torchmetrics: pip install torchmetrics")
        flat = {split: rows.flatten() for split, rows in splits.items()}
        self.columns = find_columns(flat, options.columns, _ROLES, targets=["target"])
        for split, rows in flat.items():
            for role, column in self.columns.items():
                if role == "source" or split != "predict":
                    check_texts(rows, column, split)

    @property
    def trainer_options(self) -> dict[str, Any]:
        # one token more than is asked for: the decoder starts with one
        length = self.max_new_tokens + 1
        return {"predict_with_generate": True, "generation_max_length": length}

    def summary(self) -> str:
        return " to ".join(map(repr, self.columns.values()))

    def configure(self, config: Any) -> None:
        if not config.is_encoder_decoder:
            raise UserError(f"seq2seq needs an encoder-decoder model, not {config.model_type}")

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        rows, limit = rows.flatten(), self.max_new_tokens

        def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
            encoded = processor(
                batch[self.columns["source"]], truncation=True, max_length=self.max_length
            )
            if split != "predict":
                targets = batch[self.columns["target"]]
                encoded["labels"] = processor(
                    text_target=targets, truncation=True, max_length=limit
                )["input_ids"]
            return dict(encoded)

        return encode_rows(rows, tokens)

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        from transformers import DataCollatorForSeq2Seq

        self._tokenizer = processor
        return partial(_collate, DataCollatorForSeq2Seq(processor, model=model))

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        return logits  # tokens: Seq2SeqTrainer has generated them

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """predictions (N, T) and labels (N, T'): token ids, -100 where padded. All from 0 to 1."""
        from torchmetrics.functional import text

        generated, wanted = self._texts(predictions), self._texts(labels)
        several = [[target] for target in wanted]  # a text may have several right ones
        keys = ("rouge1", "rouge2", "rougeL")
        rouge = text.rouge_score(generated, wanted, rouge_keys=keys)
        return {
            "chrf": float(text.chrf_score(generated, several, n_word_order=0)),
            "bleu": float(text.sacre_bleu_score(generated, several)),
            **{key: float(rouge[f"{key}_fmeasure"]) for key in keys},
        }

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        return [{"output": text} for text in self._texts(predictions)]

    def _texts(self, ids: Any) -> list[str]:
        ids = np.where(ids == -100, self._tokenizer.pad_token_id, ids)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _collate(collate: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """A batch without the None that stands for labels: Seq2SeqTrainer takes it for some."""
    return {k: v for k, v in collate(rows).items() if v is not None}
