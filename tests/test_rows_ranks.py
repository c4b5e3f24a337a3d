"""Rows of new tokens on two ranks: weights are those of one process, and no rank waits for another.

The truth is one process on the rows of both ranks, in fp64, with the dense gradient of the weights.
"""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, process_group, run_ranks
from test_rows_threads import (
    ADAM,
    NEW,
    OTHERS,
    VOCABULARY,
    embeddings,
    extended,
    head,
    only_embeddings,
    rows_alone,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, patch_model
from progtuning_kernels.model.families import UnsupportedModelError

STEPS = 3
EMBEDDINGS, BOTH = {"embed_tokens": NEW}, {"embed_tokens": NEW, "lm_head": NEW}


def batch(step: int, rank: int | None = None) -> dict[str, Tensor]:
    """Two rows of each rank; those of the second rank hold none of the new tokens."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (4, 11), generator=draw)
    ids[:2, 4] = torch.tensor(NEW[:2])
    ids = ids if rank is None else ids[2 * rank : 2 * rank + 2]
    return {"input_ids": ids, "labels": ids}


def model_of(tied: bool) -> nn.Module:
    """Embeddings require grad, as DDP takes no model that is frozen as a whole."""
    return only_embeddings(extended(tied=tied))


def sharded(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def truth_of(tied: bool, rows: dict) -> nn.Module:
    model = model_of(tied)
    weights = [embeddings(model)] + ([head(model)] if len(rows) > 1 else [])
    rows_alone(model, weights, batches=[batch(step) for step in range(STEPS)])
    return model


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def assert_trained_as(model: nn.Module, truth: nn.Module) -> None:
    start = model_of(truth.config.tie_word_embeddings)
    for of in (embeddings, head):
        found, right = whole(of(model)), of(truth)
        torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[OTHERS], of(start)[OTHERS])
    assert not torch.equal(whole(embeddings(model))[NEW], embeddings(start)[NEW])


def train(rank: int, wrap, *, tied: bool, rows: dict, patch_after: bool, **options) -> nn.Module:
    model = model_of(tied)
    patch = partial(patch_model, rows=rows, packing="off")
    schedule = MilestoneSchedule({}, embeddings="always")
    handle = None if patch_after else patch(model, schedule)
    wrapped = wrap(model)
    handle = handle or patch(model, schedule)
    groups = handle.param_groups(weight_decay=ADAM["weight_decay"])
    optimizer = MaskedAdamW(groups, **ADAM, **options)
    for step in range(STEPS):
        accumulates = isinstance(wrapped, DistributedDataParallel)
        halves = batch(step, rank)
        for i in (0, 1):  # of one row each: the first is accumulated, and not sent
            later = wrapped.no_sync() if accumulates and i == 0 else contextlib.nullcontext()
            if not accumulates and hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(i == 1)
            with later, optimizer.accumulate() if i == 0 else contextlib.nullcontext():
                (wrapped(**{k: v[i : i + 1] for k, v in halves.items()}).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    return model


def same_on_ranks(model: nn.Module) -> bool:
    own = whole(embeddings(model)).contiguous()
    each = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(each, own)
    return torch.equal(*each)


CASES = [
    (DistributedDataParallel, True, EMBEDDINGS, False),
    (DistributedDataParallel, False, BOTH, True),
    (sharded, True, EMBEDDINGS, False),
    (sharded, False, BOTH, False),
]


def ranks_train_rows(rank: int, folder: str) -> None:
    with process_group(rank, f"{folder}/store"):
        for wrap, tied, rows, patch_after in CASES:
            truth = truth_of(tied, rows)
            in_backward = {"in_backward": True, "nonfinite": "ignore"}
            for options in [{}] if wrap is DistributedDataParallel else [{}, in_backward]:
                model = train(rank, wrap, tied=tied, rows=rows, patch_after=patch_after, **options)
                assert same_on_ranks(model)
                assert_trained_as(model, truth)
        with pytest.raises(UnsupportedModelError, match="call patch_model before fully_shard"):
            train(rank, sharded, tied=True, rows=EMBEDDINGS, patch_after=True)


def test_two_ranks_train_the_rows_that_one_process_trains(tmp_path):
    run_ranks(ranks_train_rows, str(tmp_path))
