"""Rows of real lengths: of a task's file, or drawn from the lengths of one; and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from progtuning_kernels.cli.data import load_splits
from progtuning_kernels.cli.models import minilm_folder
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.tasks.text_classification import TextClassification

Row = dict[str, Any]  # input_ids and, of a tokenizer, token_type_ids: lists; labels: 0 or 1


def read(path: Path, *, most_tokens: int, most_rows: int) -> tuple[Row, ...]:
    """Random rows of a file, by MiniLM's tokenizer; in two classes, whatever its labels are."""
    from transformers import AutoTokenizer

    options = TrainOptions(
        train_file=(str(path),),
        validation_file=(str(path),),
        max_length=most_tokens,
        problem_type="single_label",
    )
    found = load_splits(options)["train"]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:most_rows]
    chosen = found.select(order.tolist())
    task = TextClassification(options, {"train": chosen})
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    task.configure(SimpleNamespace(id2label={}))
    rows = task.encode(chosen, tokenizer, None, "train")
    names = ("input_ids", "token_type_ids")
    return tuple(
        {name: row[name] for name in names} | {"labels": min(1, int(row["labels"]))} for row in rows
    )


def draw(
    quantiles: Sequence[float], lengths: Sequence[int], *, count: int, vocabulary: int
) -> tuple[Row, ...]:
    """Random tokens in rows whose lengths have these quantiles, linear between them."""
    generator = torch.Generator().manual_seed(0)
    at = torch.rand(count, generator=generator, dtype=torch.float64)
    steps = torch.tensor(quantiles, dtype=torch.float64)
    sizes = torch.tensor(lengths, dtype=torch.float64)
    above = torch.searchsorted(steps, at).clamp(1, len(steps) - 1)
    share = (at - steps[above - 1]) / (steps[above] - steps[above - 1])
    drawn = (sizes[above - 1] + share * (sizes[above] - sizes[above - 1])).round().int().tolist()
    return tuple(
        {
            "input_ids": torch.randint(5, vocabulary, (size,), generator=generator).tolist(),
            "labels": i % 2,
        }
        for i, size in enumerate(drawn)
    )


def padded(rows: Sequence[Row], vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """One batch, padded to its longest row. A tiny vocabulary takes ids as they come round."""
    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str) -> Tensor:
        lists = [row[name] + [0] * (width - len(row[name])) for row in rows]
        return torch.tensor(lists, device=device)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    batch = {name: column(name) % vocabulary for name in names}
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long().to(device)
    return batch | {"labels": torch.tensor([row["labels"] for row in rows], device=device)}


def random_batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """One epoch, without the rows that fill no batch."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return _cut(rows, order, size)


def grouped_batches(rows: Sequence[Row], size: int, seed: int) -> list[list[Row]]:
    """One epoch in the order of the Trainer's `group_by_length`."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = [len(row["input_ids"]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    return _cut(rows, get_length_grouped_indices(lengths, size, generator=generator), size)


def _cut(rows: Sequence[Row], order: Sequence[int], size: int) -> list[list[Row]]:
    starts = range(0, len(order) - size + 1, size)
    return [[rows[i] for i in order[start : start + size]] for start in starts]


def places_and_tokens(batches: Sequence[Sequence[Row]]) -> tuple[float, float]:
    """Means over batches: of rows times the longest, and of real tokens."""
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    places = sum(len(of_batch) * max(of_batch) for of_batch in lengths)
    return places / len(batches), sum(map(sum, lengths)) / len(batches)


def sample(batches: Sequence[list[Row]], count: int, seed: int) -> list[list[Row]]:
    """Batches that stand for an epoch: one of every stratum of like width.

    Of 200 such draws it is the one whose mean places and tokens are nearest to the epoch's: a few
    batches drawn freely are 10 % and more off, which would be taken for speed.
    """
    whole = places_and_tokens(batches)
    ordered = sorted(batches, key=lambda batch: max(len(row["input_ids"]) for row in batch))
    edges = [len(ordered) * i // count for i in range(count + 1)]
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> list[list[Row]]:
        chosen = [
            ordered[int(torch.randint(low, max(low + 1, high), (), generator=generator))]
            for low, high in pairwise(edges)
        ]
        return [chosen[i] for i in torch.randperm(count, generator=generator).tolist()]

    def off(chosen: Sequence[list[Row]]) -> float:
        found = places_and_tokens(chosen)
        return sum(abs(a / b - 1) for a, b in zip(found, whole, strict=True))

    return min((drawn() for _ in range(200)), key=off)
