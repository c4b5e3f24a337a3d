"""A toy model, and a loop of one's own that trains, saves and loads it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from progtuning_kernels import MaskedAdamW, PatchHandle, ProgressiveSchedule, patch_model
from progtuning_kernels.checkpoints import load_checkpoint, save_checkpoint

BLOCKS, WIDTH, WORDS = 4, 6, 20


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(self.linear(self.norm(hidden)).tanh())


class Toy(nn.Module):
    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH, dropout: float = 0.2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1)).square().mean()


class Loop:
    """A loop of one's own; rows come by Python's random numbers, words by numpy's."""

    def __init__(
        self,
        schedule: Any,
        optimizer: Callable[[PatchHandle], torch.optim.Optimizer] | None = None,
        **model: Any,
    ) -> None:
        torch.manual_seed(0)
        self.handle = patch_model(Toy(**model), schedule)
        make = optimizer or masked_adamw
        self.optimizer = make(self.handle)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (1 + s))
        self.losses: list[float] = []

    def seed(self) -> Loop:
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(5)
        return self

    def train(self, steps: int) -> Loop:
        for _ in range(steps):
            words = numpy.random.randint(0, WORDS, (4, 5)) + random.randrange(2)
            loss = self.handle.model(torch.from_numpy(words % WORDS))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.handle.advance()
            self.losses.append(loss.item())
        return self

    def save(self, folder: Path, **options: Any) -> Path:
        extra = {"losses": self.losses}
        return save_checkpoint(
            folder, self.handle, self.optimizer, scheduler=self.scheduler, extra=extra, **options
        )

    def load(self, folder: Path, **options: Any) -> dict[str, Any] | None:
        extra = load_checkpoint(
            folder, self.handle, self.optimizer, scheduler=self.scheduler, **options
        )
        if extra is not None:
            self.losses = extra["losses"]
        return extra

    def all(self) -> dict[str, Any]:
        """Everything that a run ends with."""
        return {
            "weights": self.handle.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "losses": self.losses,
            "random": (torch.get_rng_state(), random.random(), numpy.random.random()),
        }


def masked_adamw(handle: PatchHandle, **options: Any) -> MaskedAdamW:
    groups = handle.param_groups(lr=0.02, weight_decay=0.1)
    return MaskedAdamW(groups, max_grad_norm=1.0, **options)


def progressive() -> ProgressiveSchedule:
    return ProgressiveSchedule(4, 12)


def stopped(folder: Path, steps: int = 5, **options: Any) -> Loop:
    """A run with a checkpoint of every step, two of which stay."""
    loop = Loop(progressive(), **options).seed()
    for _ in range(steps):
        loop.train(1).save(folder)
    return loop
