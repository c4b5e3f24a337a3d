"""Two processes under `fully_shard` with a prefix cache, packing and ops train as one does."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from test_distributed import Collectives, assert_same_weights, batch, optimizer_of, shard
from tiny_models import tiny_model
from torch import nn

from progtuning_kernels import (
    CyclicBlockSchedule,
    PrefixCache,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
)
from progtuning_kernels.cache.break_even import BreakEven

EPOCHS, BATCHES = 3, 3  # batches that come again in every epoch
STEPS = 3 * EPOCHS * BATCHES
SCHEDULES = {
    "progressive": lambda: ProgressiveSchedule(3, STEPS),
    "lisa": lambda: RandomBlockSchedule(1, 9, seed=1, embeddings="never"),
    "cyclic": lambda: CyclicBlockSchedule(1, 9, order="descending"),
}


def train(called: nn.Module, handle, rank, *, on_step=None) -> None:
    optimizer, _ = optimizer_of(handle)
    while handle.step < STEPS:
        called(**batch(handle.step % BATCHES, rank)).loss.backward()
        if on_step is not None:
            on_step(handle)
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()


def check_schedules(rank: int) -> None:
    counted = Collectives()
    for name, make in SCHEDULES.items():
        expected = tiny_model("bert-sequence").train()
        train(expected, patch_model(expected, make()), None)
        model = tiny_model("bert-sequence").train()
        shard(model)
        handle = patch_model(model, make(), cache=PrefixCache(1 << 24), packing="on")
        lines = []

        def note(handle, lines=lines):
            report = handle.cache_report()
            lines.append(
                (
                    handle.step,
                    handle.boundary,
                    counted.gathers,
                    report.hits,
                    report.misses,
                    report.served_steps,
                )
            )
            counted.gathers = 0

        train(model, handle, rank, on_step=note)
        if rank == 0:
            for line in lines:
                print(name, *line)
            print(handle.cache_report(), handle.packing_report())
        assert_same_weights(model, expected, name)


CHECKS = {"schedules": check_schedules}


def run(rank: int, folder: str) -> None:
    os.chdir(folder)
    with process_group(rank, "store"), mock.patch.object(BreakEven, "verdict", lambda *_: None):
        for check in CHECKS.values():
            check(rank)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks(tmp_path):
    run_ranks(run, str(tmp_path))
