"""The stand-in for a GPU says what a GPU would, and lists what the host waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretend_cuda import GPU, PretendCuda
from torch import nn


@pytest.fixture
def pretend():
    with PretendCuda() as pretend:
        yield pretend


READS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [0, 1][(x.sum() * 0).long()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "copy_": lambda x: torch.empty(2, 3).copy_(x),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.__setitem__(x > 0, x[0, :1].detach()),
    "contains": lambda x: 7 in x,
    "unique": lambda x: x.unique(),
    "tensor as a number": lambda x: torch.add(x, x, alpha=x[0, 0]),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
PAGEABLE = {
    "to": lambda x: torch.ones(2).to(x.device),
    "non_blocking": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "cuda": lambda x: torch.ones(2).cuda(),
    "other": lambda x: torch.ones(2).to(x),
    "copy_": lambda x: x.copy_(torch.ones(2, 3)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "list as index": lambda x: x[:, [0, 2]],
    "index of the host": lambda x: x[torch.tensor([0])],
}
NOTHING = {
    "device": lambda x: (x.device, x.is_cuda, x.shape),
    "computed": lambda x: (x @ x.T).relu().sum(),
    "number": lambda x: x.__setitem__(0, 3.0),
    "masked number": lambda x: x.__setitem__(x > 0, 3.0),
    "full": lambda x: x + torch.full((), 2.0, device=x.device),
    "scalar of the host": lambda x: x * torch.tensor(2.0),
    "gathered": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "made in backward": lambda x: x.requires_grad_()[x.argmin(1)].sum().backward(),
    "on the host": lambda x: torch.ones(3).sum().item(),
    "read before": lambda x: torch.ones(3).tolist(),
    "same place": lambda x: x.to(x.device).to("cuda:0").cuda(),
    "dtype": lambda x: x.to(torch.float64).double(),
}


@pytest.mark.parametrize("case", READS)
def test_reads_are_listed_with_their_line(pretend, case):
    x = pretend.put(torch.arange(6.0).view(2, 3))
    READS[case](x)
    (event,) = [event for event in pretend.events if event.kind != "pageable"]
    assert event.kind == "read" and event.owner == "user"
    file, _, number = event.line.rpartition(":")
    assert file == __file__
    assert f'"{case}": lambda' in Path(__file__).read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize("case", PAGEABLE)
def test_pageable_copies_are_listed(pretend, case):
    PAGEABLE[case](pretend.put(torch.arange(6.0).view(2, 3)))
    assert [event.kind for event in pretend.events] == ["pageable"]


@pytest.mark.parametrize("case", NOTHING)
def test_what_does_not_wait_is_not_listed(pretend, case):
    NOTHING[case](pretend.put(torch.arange(6.0).view(2, 3)))
    assert not pretend.events


def test_pinned_copies_wait_only_if_asked_to(pretend):
    pinned = torch.ones(2).pin_memory()
    assert pinned.is_pinned() and pinned.device.type == "cpu"
    assert pinned.to("cuda", non_blocking=True).is_cuda
    pretend.put(torch.zeros(2)).copy_(torch.ones(2, pin_memory=True), non_blocking=True)
    pinned.to("cuda")
    assert [event.kind for event in pretend.events] == ["pinned", "pinned", "awaited"]
    pretend.events.clear()
    on_gpu = torch.ones(2, device="cuda")
    pinned.copy_(on_gpu, non_blocking=True)
    pinned.copy_(on_gpu)
    torch.ones(2).copy_(on_gpu, non_blocking=True)
    assert [event.kind for event in pretend.events] == ["pinned", "read", "read"]


def test_places_follow_the_memory(pretend):
    x = pretend.put(torch.ones(2, 3))
    model = pretend.put(nn.Linear(3, 3))
    loss = model(x[:1]).square().mean()
    loss.backward()
    for t in (x.T, x.detach(), loss, model.weight.data, model.weight.grad, torch.empty_like(x)):
        assert t.device == GPU and t.is_cuda and not t.is_cpu
    assert not any(t.is_cuda for t in (torch.ones(2), torch.zeros_like(x, device="cpu"), x.cpu()))
    host = x.cpu()
    host += 1
    assert x.sum() == 6  # a copy, although both lie in the memory of the host
    moved = nn.Linear(3, 3).to("cuda")
    assert moved.weight.is_cuda and isinstance(moved.weight, nn.Parameter)


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        assert grad.device == GPU
        made = torch.full_like(grad, 2.0) * torch.ones((), device=grad.device)
        return made * grad.sum().item()


@pytest.mark.parametrize(
    "run",
    [torch.Tensor.backward, torch.autograd.backward, "grad"],
    ids=["method", "function", "grad"],
)
def test_backward_is_looked_into(pretend, run):
    x = pretend.put(torch.ones(3, requires_grad=True))
    loss = _Reads.apply(x).sum()
    if run == "grad":
        (gradient,) = torch.autograd.grad(loss, x)
    else:
        run(loss)
        gradient = x.grad
    assert gradient.is_cuda and gradient.device == GPU
    assert [event.kind for event in pretend.events] == ["read"]


def test_two_places_in_one_operation_raise(pretend):
    x = pretend.put(torch.ones(3))
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_it_ends_with_its_context():
    before = torch.cuda.is_available()
    with PretendCuda() as pretend:
        x = pretend.put(torch.ones(3))
        assert torch.cuda.is_available() and x.is_cuda
    assert x.device.type == "cpu" and x.tolist() == [1, 1, 1]
    assert torch.cuda.is_available() == before
    assert not pretend.events
