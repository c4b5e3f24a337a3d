"""A captured and an eager model that are trained alike, for the tests of captured graphs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    MaskedAdamW,
    ProgressiveSchedule,
    patch_model,
)

STEPS, STAGES = 15, 3


def patched(model: nn.Module, graph: str, **options: Any) -> Any:
    schedule = options.pop("schedule", None) or ProgressiveSchedule(STAGES, STEPS)
    options = {"kernels": "off", "packing": "off", **options}
    return patch_model(model, schedule, graph=graph, **options)


def optimizer_of(handle: Any, masked: bool = True, **options: Any) -> torch.optim.Optimizer:
    groups = handle.param_groups(lr=1e-3)
    if masked:
        return MaskedAdamW(groups, **{"max_grad_norm": 1.0, **options})
    return torch.optim.AdamW([p for group in groups for p in group["params"]], lr=1e-3)


def bert_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {k: v[:rows] for k, v in tiny_inputs("bert-sequence", seed=seed).items()}


class Pair:
    """A captured and an eager model, which are trained alike."""

    def __init__(self, name: str = "bert-sequence", model: nn.Module | None = None, **options: Any):
        self.name = name
        model = tiny_model(name) if model is None else model
        self.models = [model.train(), copy.deepcopy(model).train()]
        optimizer = options.pop("optimizer", {})
        options = {"schedule": ProgressiveSchedule(1, 1000), **options}
        self.handles = [
            patched(m, graph, **options)
            for m, graph in zip(self.models, ("on", "off"), strict=True)
        ]
        self.optimizers = [optimizer_of(handle, **optimizer) for handle in self.handles]
        self.states = [torch.get_rng_state()] * 2

    def both(self, do: Any) -> list[Any]:
        """What `do(model, optimizer, handle)` gives, under one random state for each."""
        found = []
        for i, parts in enumerate(zip(self.models, self.optimizers, self.handles, strict=True)):
            torch.set_rng_state(self.states[i])
            found.append(do(*parts))
            self.states[i] = torch.get_rng_state()
        return found

    def step(self, seed: int = 0, rows: int = 3) -> None:
        batch = {k: v[:rows] for k, v in tiny_inputs(self.name, seed=seed).items()}

        def do(model, optimizer, handle):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
            return loss.item()

        first, second = self.both(do)
        assert first == second

    def steps(self, count: int = 3) -> None:
        for seed in range(count):
            self.step(seed)

    @property
    def report(self) -> Any:
        return self.handles[0].graph_report()

    def check(self) -> None:
        own, other = (dict(m.named_parameters()) for m in self.models)
        assert all(torch.equal(own[name], other[name]) for name in other)
        own, other = (dict(m.named_buffers()) for m in self.models)
        assert all(torch.equal(own[name], other[name]) for name in other)
        assert torch.equal(*self.states)


class Normed(nn.Module):
    """A model of blocks with batch norm, whose forward writes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


class Reads(nn.Module):
    """A head with a line that a capture refuses."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * (1 if x.sum().item() < 1e9 else 0)
