"""All random generators are read and set in one place, and what is read can be stored."""

from __future__ import annotations

import io
import random

import numpy
import torch
from torch import nn

from progtuning_kernels.random_state import (
    host_state,
    random_state,
    random_state_kept,
    same_torch_state,
    set_random_state,
    torch_state,
)


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self) -> list[float]:
        own = torch.rand(1, generator=self.generator).item()
        return [torch.rand(1).item(), random.random(), numpy.random.random(), own]


def test_a_state_that_was_stored_gives_the_same_draws():
    model = nn.Sequential(Drawing(), nn.Linear(1, 1))
    file = io.BytesIO()
    torch.save(random_state(model), file)
    drawn = model[0]()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert model[0]() != drawn
    set_random_state(state, model)
    assert model[0]() == drawn


def test_a_model_with_other_generators_of_its_own_keeps_them():
    state, model = random_state(nn.Linear(1, 1)), Drawing()
    before = model.generator.get_state()
    set_random_state(state, model)
    assert torch.equal(model.generator.get_state(), before)


def test_draws_inside_leave_no_trace():
    model = Drawing()
    of_torch, of_host = torch_state(), host_state()
    own = model.generator.get_state()
    try:
        with random_state_kept(model):
            model()
            assert not same_torch_state(torch_state(), of_torch) and host_state() != of_host
            raise KeyError
    except KeyError:
        pass
    assert same_torch_state(torch_state(), of_torch) and host_state() == of_host
    assert torch.equal(model.generator.get_state(), own)
