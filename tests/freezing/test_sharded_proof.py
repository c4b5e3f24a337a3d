"""Under `fully_shard` the first forward shows the same as on one process, on every rank."""

from __future__ import annotations

import pytest
import torch
from ranks import process_group, run_ranks
from torch import nn
from toy_runs import Block

from progtuning_kernels import MilestoneSchedule, patch_model
from progtuning_kernels.model.families import UnsupportedModelError

WIDTH = 6


class Backwards(nn.Module):
    """Its encoder is registered after its decoder, and runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(2))
        self.encoder = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return x


class Late(nn.Module):
    """Its labels are registered before its blocks, and looked up after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(WIDTH, WIDTH)
        self.labels = nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(x)
        for block in self.blocks:
            x = block(x)
        return x @ self.labels(torch.arange(4)).T


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return x


class Bare(nn.Module):
    """A bare parameter before the blocks, in a module with shards of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.scale = nn.Parameter(torch.ones(()).view(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


class Foreign(nn.Module):
    """Its first block is computed from a parameter that another model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(3))
        self.given = [nn.Parameter(torch.ones(WIDTH))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.given[0]
        for block in self.blocks:
            x = block(x)
        return x


def shown(make: type[nn.Module], *, sharded: bool) -> str | list[str]:
    """What the first forward refuses, or else the parameters that train after it."""
    torch.manual_seed(0)
    model = make()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for module in reversed([*model.modules()]):
            if not isinstance(module, nn.ModuleList):  # norms and linear layers each alone
                fully_shard(module)
    blocks = ["decoder", "encoder"] if make is Backwards else None
    handle = patch_model(model, MilestoneSchedule({1: 1, 3: 2}), blocks=blocks)
    try:
        for _ in range(2):
            model(torch.ones(2, 3, WIDTH)).sum().backward()
            handle.advance()
    except UnsupportedModelError as error:
        return str(error).replace("FSDP", "")  # `fully_shard` makes a class of its own
    return [name for name, p in model.named_parameters() if p.requires_grad]


def run(rank: int, store: str) -> None:
    with process_group(rank, store):
        found = {}
        for make in (Backwards, Late, Bare, Foreign):
            found[make] = shown(make, sharded=True)
            assert found[make] == (one := shown(make, sharded=False)), f"{found[make]}; {one}"
        assert "whose gradient freezing block 0 would cut off" in found[Backwards]
        assert "no block is computed from labels.weight" in found[Late]
        assert "inner.shift" not in found[Bare] and "scale" in found[Bare]
        assert "none of the model's" in found[Foreign]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks(tmp_path):
    run_ranks(run, str(tmp_path / "store"))
