"""MaskedAdamW on two ranks: FSDP2 shards train as one process does, DDP is refused in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy_runs import WORDS, Toy

from progtuning_kernels import (
    CyclicBlockSchedule,
    MaskedAdamW,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
)
from progtuning_kernels.ops.masked_update.grad_decision import norm_over_ranks
from progtuning_kernels.optim import state_bytes

OPTIONS = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
WORLD = 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    # 5 and 3 do not divide by two ranks: one shard is larger, one bias shard is empty
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: MaskedAdamW, rank: int | None, freeze_at: int = 2) -> None:
    blocks = [module for module in model if isinstance(module, nn.Linear)]
    for step in range(4):
        if step == freeze_at:
            blocks[0].requires_grad_(False)
        x = batch(step) if rank is None else batch(step)[rank * 4 : rank * 4 + 4]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(**options) -> tuple[list[torch.Tensor], MaskedAdamW]:
    model = make_model()
    options.pop("in_backward", None)  # refused without shards, and the same numbers
    optimizer = MaskedAdamW(model.named_parameters(), **OPTIONS, **options)
    train(model, optimizer, None)
    return [p.detach() for p in model.parameters()], optimizer


def check_fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    for options in (
        {"max_grad_norm": 0.05},
        {"nonfinite": "ignore"},
        {"nonfinite": "ignore", "in_backward": True},
        {"max_grad_norm": 0.05, "in_backward": True},
        {"max_grad_norm": 0.05, "state_dtype": torch.bfloat16},
    ):
        model = make_model()
        for module in model:
            if isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(model)
        optimizer = MaskedAdamW(model.named_parameters(), **OPTIONS, **options)
        train(model, optimizer, rank)
        plain, reference = expected(**options)
        # a moment in bfloat16 is rounded by the place of its element in the shard
        tolerance = 1e-5 if "state_dtype" not in options else 2e-2
        for p, q in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=tolerance, atol=tolerance)
        if optimizer.grad_norm is not None:
            norms = optimizer.grad_norm, reference.grad_norm
            torch.testing.assert_close(*norms, rtol=tolerance, atol=0)
        assert all(p in optimizer.state for p in model.parameters() if p.requires_grad)
        assert not any(p in optimizer.state for p in model.parameters() if not p.requires_grad)
        assert state_bytes(optimizer) < state_bytes(reference)

    # asked of the optimizer itself: a backward that breaks off would leave collectives under way
    model = nn.Linear(7, 5)
    fully_shard(model)
    early = MaskedAdamW(model.named_parameters(), **OPTIONS, in_backward=True)
    with pytest.raises(RuntimeError, match="nonfinite='ignore' without clipping"):
        early._begin_backward()
    host = MaskedAdamW(model.named_parameters(), **OPTIONS, state_device="cpu")
    assert not host._host.covers(host._table.members)  # of the host itself, as without
    host._host.copies.is_away = lambda t: True
    with pytest.raises(ValueError, match="not for shards on a GPU.*CPUOffloadPolicy"):
        host._begin_backward()
    with pytest.raises(ValueError, match="CPUOffloadPolicy"):
        host.step()
    columns = nn.Linear(80, 60)
    fully_shard(columns, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    with pytest.raises(ValueError, match="only rows.*use state_dtype=torch.bfloat16"):
        MaskedAdamW(columns.parameters(), state_dtype="8bit").init_state(columns.weight)


class OneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 70, 60) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight[0]


class Wide(Toy):
    """The second rank's shard begins at a multiple of 256 elements in the embeddings, in the blocks
    not, and in the head it is empty.
    """

    def __init__(self) -> None:
        super().__init__(blocks=3, width=70, dropout=0.0)
        self.embeddings = nn.Sequential(nn.Embedding(WORDS, 256), nn.Linear(256, 70))
        self.head = OneRow()


STEPS = 6
STAGES = {
    "progressive": lambda: ProgressiveSchedule(3, STEPS),
    "LISA": lambda: RandomBlockSchedule(1, 2, seed=1),
    "cyclic": lambda: CyclicBlockSchedule(1, 2),
}
EIGHT = {"state_dtype": "8bit"}
IN_BACKWARD = {"in_backward": True, "max_grad_norm": 0.5}
BFLOAT16 = {"dtype": torch.bfloat16}
RUNS = (
    *((name, EIGHT) for name in STAGES),
    ("cyclic", EIGHT | {"on_freeze": "keep"}),
    ("progressive", EIGHT | IN_BACKWARD),
    ("cyclic", IN_BACKWARD),
    ("cyclic", {"in_backward": True, "nonfinite": "ignore"}),
    ("cyclic", {"on_freeze": "offload"}),
    ("cyclic", BFLOAT16 | {"master_weights": True}),
    ("progressive", BFLOAT16 | {"stochastic_rounding": True}),
    ("cyclic", BFLOAT16 | EIGHT | {"stochastic_rounding": True}),
)


def planned_bytes(handle, optimizer: MaskedAdamW) -> int:
    """State of this rank: 8 bytes per element in float32, 2 and 8 per 256 elements in 8 bits."""
    total = 0
    for p in handle.model.parameters():
        if not (p.requires_grad or (optimizer.on_freeze != "release" and optimizer.state.get(p))):
            continue
        rows = -(-p.shape[0] // WORLD)
        here = p.to_local().numel()
        wide = optimizer.state_dtype != "8bit" or p.numel() < 4096
        total += 4 + (8 * here if wide else 2 * here + 8 * -(-rows * p[0].numel() // 256))
        total += 4 * here if optimizer.master_weights else 0
    return total


def trained(
    name: str, options: dict[str, Any], rank: int | None, *, sharded: bool = True
) -> torch.Tensor:
    """All weights after `STEPS` steps: of a rank's share of the rows, or of all on one process."""
    from torch.distributed.fsdp import fully_shard

    options = dict(options)
    torch.manual_seed(0)
    model = Wide().to(options.pop("dtype", torch.float32))
    sharded, called = sharded and rank is not None, model
    if sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif rank is not None:
        called = DistributedDataParallel(model)
    elif options.get("nonfinite") == "ignore":
        options.pop("in_backward")  # refused without shards, and the same numbers
    handle = patch_model(model, STAGES[name](), blocks="blocks")
    optimizer = MaskedAdamW(
        handle.param_groups(weight_decay=0.1), **OPTIONS | {"lr": 0.005}, **options
    )
    for step in range(STEPS):
        words = torch.randint(0, WORDS, (8, 5), generator=torch.Generator().manual_seed(step))
        called(words if rank is None else words[rank * 4 : rank * 4 + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if sharded:
            assert state_bytes(optimizer) == planned_bytes(handle, optimizer), (name, options, step)
        handle.advance()
    whole = [p.full_tensor() if sharded else p for p in model.parameters()]
    return torch.cat([p.detach().flatten().float() for p in whole])


def check_stages(rank: int) -> None:
    """What rounds at random, or gradients in bfloat16, does so elsewhere on two ranks: after three
    stages they are as near to float32 as one process is.
    """
    for name, options in RUNS:
        two, one = trained(name, options, rank), trained(name, options, None)
        kinds = options.keys() & {"state_dtype", "dtype", "stochastic_rounding", "master_weights"}
        if kinds:
            exact = trained(name, {k: v for k, v in options.items() if k not in kinds}, None)
            far, near = ((weights - exact).norm() for weights in (two, one))
            assert 0 < far < 1.2 * near, f"{name}, {options}: {far}, one process {near}"
        else:
            torch.testing.assert_close(two, one, rtol=1e-5, atol=2e-6)


def check_replicas(rank: int) -> None:
    """Under DDP every rank rounds as one process does; not so gradients in bfloat16."""
    for options in (EIGHT, EIGHT | {"on_freeze": "offload"}):
        two = trained("cyclic", options, rank, sharded=False)
        torch.testing.assert_close(two, trained("cyclic", options, None), rtol=1e-4, atol=1e-4)
    for more in ({"master_weights": True}, EIGHT | {"stochastic_rounding": True}):
        two, one, exact = (
            trained("cyclic", options, place, sharded=False)
            for options, place in ((BFLOAT16 | more, rank), (BFLOAT16 | more, None), ({}, None))
        )
        assert 0 < (two - exact).norm() < 1.2 * (one - exact).norm(), more
        first = two.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(first, two)


def check_norm(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    whole = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 8, 40)]
    tensors = [
        distribute_tensor(whole[0], mesh, [Shard(0)]),
        distribute_tensor(whole[1], mesh, [Shard(1)]),
        distribute_tensor(whole[2], mesh, [Replicate()]),
        whole[3],
        None,
    ]
    norm = norm_over_ranks(tensors)
    exact = torch.cat([x.flatten() for x in whole]).double().norm().float()
    torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


def check_ddp(rank: int) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = MaskedAdamW(model.module.named_parameters(), **OPTIONS, in_backward=True)
    with pytest.raises(RuntimeError, match="this rank's own.*fully_shard"):
        model(batch(0)).mean().backward()
    del optimizer
    check_replicas(rank)


CHECKS = {"fsdp2": check_fsdp2, "stages": check_stages, "norm": check_norm, "ddp": check_ddp}


def run(rank: int, name: str, store: str) -> None:
    with process_group(rank, store):
        CHECKS[name](rank)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, tmp_path):
    run_ranks(run, name, str(tmp_path / "store"), count=WORLD)
