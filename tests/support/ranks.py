"""Processes that start in no time: forked from one that has imported what tests of ranks need.

That process is started once for all tests of a session. It has computed nothing, so that every fork
of it may train; each sees nothing of what an earlier one has done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any
from unittest import mock

import torch
from tiny_models import tiny_inputs

WORLD, ROWS = 2, 4
PRELOADED = [
    "accelerate",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "tiny_models",
    "progtuning_kernels.integrations.hf_trainer",
]


def batch(step: int, rank: int | None = None) -> dict[str, torch.Tensor]:
    """`ROWS` rows of a step: all of them, or those of a rank."""
    inputs = [tiny_inputs("bert-sequence", seed=10 * step + i) for i in range(2)]
    rows = {k: torch.cat([x[k] for x in inputs])[:ROWS] for k in inputs[0]}
    if rank is None:
        return rows
    share = ROWS // WORLD
    return {k: v[rank * share : (rank + 1) * share] for k, v in rows.items()}


def forks() -> BaseContext:
    """A context of multiprocessing; its processes have the environment of the first call."""
    forkserver.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return torch.multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """`function(rank, *arguments)` in `count` processes; raises what one of them raises."""
    forks()
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=count, start_method="forkserver"
    )


@contextmanager
def process_group(rank: int, store: str, *, count: int = 2) -> Iterator[None]:
    """The group of a rank, and the environment that torchrun would give it, in one thread."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    try:
        yield
        torch.distributed.barrier()  # nobody leaves while another still talks to it
    finally:
        torch.distributed.destroy_process_group()
