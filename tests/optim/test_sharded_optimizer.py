"""MaskedAdamW on two ranks: FSDP2 shards train as one process does, DDP is refused in backward."""

from __future__ import annotations

import pytest
import torch
from ranks import process_group, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from progtuning_kernels import MaskedAdamW
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
    model = nn.Linear(7, 600)  # 4,200 elements: enough for 8 bits
    fully_shard(model)
    early = MaskedAdamW(model.named_parameters(), **OPTIONS, in_backward=True)
    with pytest.raises(RuntimeError, match="nonfinite='ignore' without clipping"):
        early._begin_backward()
    with pytest.raises(ValueError, match="use torch.bfloat16"):
        MaskedAdamW(model.parameters(), **OPTIONS, state_dtype="8bit").init_state(model.weight)


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


CHECKS = {"fsdp2": check_fsdp2, "norm": check_norm, "ddp": check_ddp}


def run(rank: int, name: str, store: str) -> None:
    with process_group(rank, store):
        CHECKS[name](rank)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, tmp_path):
    run_ranks(run, name, str(tmp_path / "store"), count=WORLD)
