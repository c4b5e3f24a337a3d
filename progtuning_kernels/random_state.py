"""Reads and sets the random generators that a model may draw from.

They are those of torch (the CPU's and one for each GPU), Python's, numpy's (wav2vec2 draws its
masks there), and those that modules keep as attributes. `torch.load(weights_only=True)` reads their
states back, and `==` compares those of Python and numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def gpus_of(model: nn.Module) -> list[torch.device]:
    """CUDA devices that hold parameters of `model`, in the order of their index."""
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=lambda d: d.index)


def torch_state(gpus: Sequence[torch.device] = ()) -> list[Tensor]:
    """States of torch's generators, the CPU's first."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)]


def set_torch_state(state: Sequence[Tensor], gpus: Sequence[torch.device] = ()) -> None:
    """Set the CPU's generator, and those of the GPUs if `state` is of as many."""
    torch.set_rng_state(state[0])
    if len(state) == 1 + len(gpus):
        for one, device in zip(state[1:], gpus, strict=True):
            torch.cuda.set_rng_state(one, device)


def same_torch_state(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def host_state() -> dict[str, Any]:
    """States of Python's and numpy's global generators."""
    kind, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": (str(kind), keys.tolist(), *rest)}


def set_host_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])


def random_state(model: nn.Module) -> dict[str, Any]:
    """States of all generators: `torch`, `cuda` (a list), `python`, `numpy`, `own` (a list)."""
    cpu, *cuda = torch_state(gpus_of(model))
    own = [(g.device.type, g.get_state()) for g in _own_generators(model)]
    return {"torch": cpu, "cuda": cuda, **host_state(), "own": own}


def set_random_state(state: dict[str, Any], model: nn.Module) -> None:
    """Set what `random_state` read; GPUs and own generators where the model has as many."""
    set_torch_state([state["torch"], *state["cuda"]], gpus_of(model))
    set_host_state(state)
    own, saved = [*_own_generators(model)], state.get("own", ())
    if [g.device.type for g in own] == [kind for kind, _ in saved]:
        for generator, (_, one) in zip(own, saved, strict=True):
            generator.set_state(one)


def seed_generators(*numbers: int) -> None:
    """Seed the generators of torch, Python and numpy from non-negative integers."""
    state = numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)
    seed = int(state[0]) >> 1
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leave all generators as they were before."""
    state = random_state(model)
    try:
        yield
    finally:
        set_random_state(state, model)


def _own_generators(model: nn.Module) -> Iterator[torch.Generator]:
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, torch.Generator))
