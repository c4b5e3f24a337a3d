"""The optimizer's kernels and a training step, for comparing two commits with pytest-benchmark.

    make bench-compare ARGS="--benchmark-save=before"       # then change something, and
    make bench-compare ARGS="--benchmark-compare"           # against the last one saved

Not part of the test suite: nothing here can fail but by being wrong. MiniLM's shape, on the GPU if
there is one; a round waits for the device. Threads as torch has them (OMP_NUM_THREADS=1 for less
noise on a busy machine).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizer import CLIP, WORKLOADS, wait
from providers import PROVIDERS
from torch import nn
from training import Work

from progtuning_kernels import MaskedAdamW
from progtuning_kernels.ops import masked_norm

pytest.importorskip("pytest_benchmark")
# pytest has put this folder on the path: transformers, which is imported later, would take
# kernels.py here for a package that it knows
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8-bit": "8bit"}
OPTIMIZERS = {
    "MaskedAdamW": lambda p: MaskedAdamW(p, max_grad_norm=CLIP),
    **{
        f"MaskedAdamW, {name}, no clipping": lambda p, dtype=dtype: MaskedAdamW(
            p, state_dtype=dtype, nonfinite="ignore"
        )
        for name, dtype in STATE_DTYPES.items()
    },
    "torch fused, no clipping": lambda p: torch.optim.AdamW(p, fused=True),
}


def _waiting(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        function()
        wait(DEVICE)

    return call


@pytest.fixture(scope="module")
def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in WORKLOADS["MiniLM, 101 tensors"]:
        made.append(nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(DEVICE)))
        made[-1].grad = 1e-3 * torch.randn(shape, generator=generator).to(DEVICE)
    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_update(benchmark, parameters, name):
    optimizer = OPTIMIZERS[name](parameters)
    benchmark.pedantic(_waiting(optimizer.step), rounds=20, warmup_rounds=3)


def test_norm(benchmark, parameters):
    gradients = [p.grad for p in parameters]
    benchmark.pedantic(_waiting(lambda: masked_norm(gradients)), rounds=30, warmup_rounds=3)


@pytest.mark.parametrize(("name", "stage"), [("full", 0), ("ours", 0), ("ours", 1), ("ours", 2)])
def test_step(benchmark, name, stage):
    """`ours` at boundaries 0, 2 and 4 of 6 blocks."""
    work = Work("MiniLM", "fp32", 16, 32, stages=3, batches=1, epochs=1, device=DEVICE)
    session, (batch,) = PROVIDERS[name].session(work), work.epoch(0)
    for step in range(stage + 1):
        session.step(step, batch)

    def step() -> None:
        session.backward(batch)
        session.update()

    benchmark.pedantic(_waiting(step), rounds=8, warmup_rounds=1)
    session.close()
