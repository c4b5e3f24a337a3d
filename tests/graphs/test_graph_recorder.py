"""The recorder that stands in for CUDA graphs: what it repeats, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from graph_recorder import CaptureError, RecorderPool
from torch import nn
from torch.nn import functional as F

from progtuning_kernels import backend

CPU = torch.device("cpu")


def _recorded(run):
    pool = RecorderPool(CPU)
    with pool.recording() as recording:
        found = run()
    return pool, recording, found


def test_a_replay_computes_the_same_on_new_values():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    _, recording, found = _recorded(lambda: F.gelu(x @ w.t())[1:].contiguous() * 2)
    for _ in range(2):
        x.copy_(torch.randn(3, 4))
        recording.replay()
        assert torch.equal(found, F.gelu(x @ w.t())[1:] * 2)


def test_a_backward_is_recorded_too():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    pool = RecorderPool(CPU)
    with pool.recording() as forward:
        loss = (x @ w.t()).tanh().sum()
    start = torch.ones_like(loss)
    with pool.recording() as backward:
        (found,) = torch.autograd.grad(loss, w, start)
    for scale in (1.0, 3.0):
        x.copy_(torch.randn(3, 4))
        start.fill_(scale)
        forward.replay()
        backward.replay()
        with torch.enable_grad():
            (expected,) = torch.autograd.grad((x @ w.t()).tanh().sum() * scale, w)
        assert torch.equal(found, expected)


def test_nothing_is_computed_while_it_records():
    x, mean = torch.randn(8, 3), torch.zeros(3)
    state, before = torch.get_rng_state(), mean.clone()

    def run():
        mean.add_(x.mean(0))
        return F.dropout(x, 0.5)

    _, recording, found = _recorded(run)
    assert found.isnan().all() and torch.equal(mean, before)
    assert torch.equal(torch.get_rng_state(), state)
    recording.replay()
    assert torch.equal(mean, x.mean(0))
    torch.set_rng_state(state)
    assert torch.equal(found, F.dropout(x, 0.5))
    recording.replay()
    assert not torch.equal(mean, x.mean(0))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x.sum().item(), "the host reads a value"),
        (lambda x: bool((x > 0).all()), "the host reads a value"),
        (lambda x: x[x > 0], "the host reads a value"),
        (lambda x: x.nonzero(), "the host reads a value"),
        (lambda x: torch.equal(x, x + 1), "the host reads a value"),
        (lambda x: x.int().unique_consecutive(), "the host reads a value"),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0]), "made from the host's data"),
        (lambda x: x.new_tensor([1.0]), "made from the host's data"),
        (
            lambda x: torch.rand(3, generator=torch.Generator()),
            "a generator of the program's own",
        ),
    ],
)
def test_what_a_capture_refuses(run, message):
    x, state = torch.randn(2, 3), torch.get_rng_state()
    with pytest.raises(CaptureError, match=message):
        _recorded(lambda: run(x))
    assert torch.equal(torch.get_rng_state(), state)
    _recorded(lambda: x + 1)  # nothing of it is left


def test_a_number_that_is_written_to_a_place_is_no_data_of_the_host():
    ids = torch.arange(6).view(2, 3)
    _, recording, found = _recorded(lambda: _with_first(ids.clone()))
    recording.replay()
    assert found[:, 0].eq(7).all() and torch.equal(found[:, 1:], ids[:, 1:])


def _with_first(ids):
    ids[:, 0] = 7
    return ids.masked_fill_(ids == -100, 0)


def test_native_launches_are_refused():
    if backend.native_extension() is None:
        pytest.skip("the extension is not built")
    with pytest.raises(CaptureError, match="a native launch on the CPU: dropout_cpu"):
        _recorded(lambda: backend.native_extension().dropout_cpu())
    assert callable(backend.native_extension().dropout_cpu)


def test_recordings_of_a_pool_write_over_what_nobody_held():
    x, pool = torch.randn(3), RecorderPool(CPU)
    with pool.recording() as first:
        kept = x + 1
        (x + 2).exp()
    with pool.recording() as second:
        other = x * 2
    first.replay()
    temporary = next(
        t for t in first.made.values() if t.untyped_storage() is not None and t is not kept
    )
    second.replay()
    assert torch.equal(kept, x + 1) and torch.equal(other, x * 2)
    del kept
    with pool.recording() as third:
        x.neg()
    first.replay()
    third.replay()
    assert all(t.isnan().all() for t in first.made.values())
    assert temporary.isnan().all()


@pytest.mark.parametrize("retained", [True, False])
def test_a_backward_takes_the_memory_that_it_frees(retained):
    x, w, pool = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), RecorderPool(CPU)
    with pool.recording() as forward:
        loss = (x @ w.t()).exp().exp().sum()
    start = torch.ones(())
    with pool.recording() as backward:
        (found,) = torch.autograd.grad(loss, w, start, retain_graph=retained)
    del loss
    for recording in (forward, backward):
        recording.replay()
    assert not found.isnan().any()
    backward.replay()
    assert found.isnan().all() != retained


def test_memory_that_is_gone_reads_as_nan():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        _, recording, found = _recorded(lambda: model(x))
    recording.replay()
    assert torch.equal(found, model(x))
    model.weight = nn.Parameter(torch.zeros(2, 3))
    recording.replay()
    assert found.isnan().all()


def test_numbers_that_are_baked_in_can_be_compared():
    p, g = torch.zeros(3), torch.ones(3)

    def numbers(lr):
        return _recorded(lambda: p.add_(g, alpha=-lr))[1].numbers()

    assert numbers(0.1) == numbers(0.1) != numbers(0.2)
    rate = torch.tensor(0.1)

    def as_tensor(lr):
        rate.fill_(lr)
        return _recorded(lambda: p.sub_(g * rate))[1].numbers()

    assert as_tensor(0.1) == as_tensor(0.2)


def test_a_replay_leaves_versions_alone():
    x, mean = torch.randn(8, 3), torch.zeros(3)
    _, recording, found = _recorded(lambda: (mean.add_(1), x + 1)[1])
    versions = mean._version, found._version
    recording.replay()
    assert (mean._version, found._version) == versions
