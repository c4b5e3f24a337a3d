"""Plain text as language models read it: joined, cut into rows, measured by its loss."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch.nn import functional as F

from ..columns import encode_rows
from ..errors import UserError


def join_and_cut(
    texts: Dataset, tokenizer: Any, max_length: int, *, column: str = "text"
) -> Dataset:
    """Texts joined by the end-of-text token and cut into rows of `max_length` tokens.

    Empty texts are left out, and so is the last row if it is not full. A tokenizer without an
    end-of-text token, as BERT's, has its separator between the texts.
    """
    between = tokenizer.eos_token_id
    if between is None:
        between = tokenizer.sep_token_id
    if between is None:
        raise UserError("the tokenizer has neither an end-of-text token nor a separator")
    rest: list[int] = []  # of one batch of texts, to begin the next one's first row

    def cut(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        found = [text for text in batch[column] if text and not text.isspace()]
        ids = tokenizer(found, add_special_tokens=False)["input_ids"] if found else []
        rest.extend(chain.from_iterable([*own, between] for own in ids))
        rows = [rest[i : i + max_length] for i in range(0, len(rest), max_length)]
        rest[:] = rows.pop() if rows and len(rows[-1]) < max_length else []
        return {"input_ids": rows}

    rows = encode_rows(texts, cut, features=Features({"input_ids": List(Value("int32"))}))
    if not len(rows):
        raise UserError(f"the text is shorter than one row of {max_length} tokens (--max-length)")
    return rows


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of every row, and of how many tokens it is the sum: (B, 2) fp32.

    logits (B, T, V); labels (B, T) long, -100 where there is no loss.
    """
    counted = labels != -100
    losses = torch.zeros(labels.shape, device=logits.device)  # (B, T)
    losses[counted] = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return torch.stack([losses.sum(1), counted.sum(1)], 1)


def perplexity(losses: Any) -> float:
    """Of all tokens together; losses (N, 2) as `row_losses` gives them, in numpy."""
    total, tokens = losses.astype(float).sum(0)
    return math.exp(min(total / tokens, 50.0))
