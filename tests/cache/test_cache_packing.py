"""The prefix cache and packed tokens together: neither changes what the other gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from proofs import FixedPlan, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import FreezePlan, MaskedAdamW, MilestoneSchedule, PrefixCache, patch_model
from progtuning_kernels.cache import trial
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.freezing.handle import PatchHandle

BLOCKS, VOCABULARY = 4, 97
BUDGET = 1 << 26
FAMILIES = [
    "bert-sequence",
    "gpt2-causal-lm",
    "llama-causal-lm",
    "t5-seq2seq-lm",
    "distilbert-sequence",
]
# the lowest boundary that a cache serves: T5's block 1 gets the relative bias of block 0
LOWEST = {"t5-seq2seq-lm": 2}


@pytest.fixture(autouse=True)
def _always_on(monkeypatch):
    """Tiny blocks cost less than any cache."""
    monkeypatch.setattr(BreakEven, "verdict", lambda self, rows: None)


def _cache(**options: Any) -> PrefixCache:
    return PrefixCache(BUDGET, **{"device": "cpu", **options})


def _batch(
    name: str, lengths: Sequence[int], *, side: str = "right", seed: int = 1, columns: int = 0
) -> dict[str, Any]:
    """Rows of these lengths; a row's content follows from `seed`, its place and its length."""
    tokens = max(columns, *lengths)
    ids = torch.zeros(len(lengths), tokens, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + 50 * row + length)
        start = tokens - length if side == "left" else 0
        ids[row, start : start + length] = torch.randint(
            3, VOCABULARY, (length,), generator=generator
        )
        mask[row, start : start + length] = 1
    labels = torch.arange(len(lengths)) % 3
    if name.endswith("causal-lm"):
        labels = ids.masked_fill(mask == 0, -100)
    elif name.endswith("seq2seq-lm"):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, VOCABULARY, (len(lengths), 5), generator=generator)
        labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _plan(boundary: int) -> FixedPlan:
    return FixedPlan(FreezePlan.from_boundary(boundary, BLOCKS, embeddings=False))


def _assert_close(found: dict[str, Any], expected: dict[str, Any], error: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-2 * largest)
        assert float((found[name] - value).abs().max()) <= error * scale, name


@contextmanager
def _places_entering(block: nn.Module) -> Iterator[list[int]]:
    """Tokens on which the first linear of a block computes, padding included."""
    places: list[int] = []
    linear = next(m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    hook = linear.register_forward_pre_hook(
        lambda m, args: places.append(args[0].shape[:-1].numel())
    )
    try:
        yield places
    finally:
        hook.remove()


def _block(handle: PatchHandle, number: int) -> nn.Module:
    return handle.model.get_submodule(handle.layout.block_paths[number])


def _train(
    name: str, batches: Sequence[dict[str, Any]], *, packing: str, cache: PrefixCache | None
) -> tuple[list[float], dict[str, torch.Tensor], PatchHandle]:
    model = tiny_model(name)
    lowest = LOWEST.get(name, 1)
    schedule = MilestoneSchedule({0: lowest, len(batches): lowest + 1}, embeddings="never")
    handle = patch_model(model, schedule, packing=packing, cache=cache)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-3, weight_decay=0.1), max_grad_norm=1.0)
    losses = []
    for batch in (*batches, *batches) * 2:  # two epochs of each of two stages
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}, handle


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_runs_are_those_of_padded_models_without_a_cache(name, side):
    # the second batch has other rows beside the same ones, and the longest row changes
    batches = [
        _batch(name, (11, 4, 6, 2), side=side),
        _batch(name, (9, 4, 3, 2), side=side),
        _batch(name, (5, 4, 17, 2), side=side, columns=19),
    ]
    expected, weights, _ = _train(name, batches, packing="off", cache=None)
    found, own, handle = _train(name, batches, packing="auto", cache=_cache())
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for key, weight in weights.items():
        assert torch.allclose(own[key], weight, rtol=1e-5, atol=1e-5), key
    packed, cached = handle.packing_report(), handle.cache_report()
    assert packed.batches == 4 * len(batches) and packed.skipped_share > 0.3, packed
    assert cached.state == "on" and cached.served_steps >= 2 * len(batches), cached
    assert cached.hits >= 6 * 4
