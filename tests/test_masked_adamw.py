"""MaskedAdamW: torch's numbers on active tensors, not one bit and not one byte on frozen ones."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, ProgressiveSchedule, patch_model
from progtuning_kernels.optim import release_frozen_state, state_bytes

SEPARATING = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
SHAPES = [(1,), (7, 9), (63,), (255,), (257,), (33, 125)]


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _give_gradients(parameters: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator) * scale
        p.grad = gradient.to(p.dtype) if p.requires_grad else None


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": parameters[:3], "weight_decay": 0.1},
        {"params": parameters[3:], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_equals_torch_with_its_clipping(max_grad_norm):
    mine, theirs = _parameters(), _parameters()
    ours = MaskedAdamW(_groups(mine), **SEPARATING, max_grad_norm=max_grad_norm)
    torchs = torch.optim.AdamW(_groups(theirs), **SEPARATING, fused=True)
    for step in range(5):
        frozen = 2 if step in (2, 3) else None  # one tensor freezes, and comes back
        for parameters in (mine, theirs):
            for i, p in enumerate(parameters):
                p.requires_grad_(i != frozen)
            _give_gradients(parameters, step, scale=3.0)
        if max_grad_norm:
            norm = nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        ours.step()
        torchs.step()
        if frozen is not None:
            torchs.state.pop(theirs[frozen], None)
        if max_grad_norm:
            torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_frozen_tensors_keep_every_bit_and_have_no_state():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, ProgressiveSchedule(4, 8))
    optimizer = MaskedAdamW(
        handle.param_groups(weight_decay=0.5), lr=0.05, eps=1e-3, max_grad_norm=0.1
    )
    sizes = []
    for _ in range(8):
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        active = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        model(**inputs).loss.backward()
        optimizer.step()
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
        assert not any(torch.equal(parameters[n], p) for n, p in active.items())
        assert state_bytes(optimizer) == sum(8 * p.numel() + 4 for p in active.values())
        sizes.append(state_bytes(optimizer))
        handle.advance()
        # released at the change itself, not at the next step
        stateful = {n for n, p in parameters.items() if p in optimizer.state}
        assert stateful == {n for n in active if parameters[n].requires_grad}
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] == sizes[5] > sizes[6]


def test_keep_holds_the_state_of_a_tensor_that_comes_back():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, on_freeze="keep")
    _give_gradients(parameters, 0)
    optimizer.step()
    moment = optimizer.state[parameters[1]]["exp_avg"].clone()
    parameters[1].requires_grad_(False)
    before = parameters[1].detach().clone()
    optimizer.step()  # with its stale gradient still there
    assert torch.equal(parameters[1], before)
    assert torch.equal(optimizer.state[parameters[1]]["exp_avg"], moment)
    parameters[1].requires_grad_(True)
    _give_gradients(parameters, 1)
    optimizer.step()
    assert optimizer.state[parameters[1]]["step"] == 2
    assert optimizer.state[parameters[0]]["step"] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_non_finite_gradients_is_skipped_whole_and_counted(bad):
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, **SEPARATING, max_grad_norm=1.0)
    _give_gradients(parameters, 0)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    _give_gradients(parameters, 1)
    parameters[3].grad[100] = bad
    optimizer.step()
    assert all(map(torch.equal, parameters, before))
    for p, moment in zip(parameters, moments, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
    assert optimizer.skipped_steps == 1
    assert all(optimizer.state[p]["step"] == 1 for p in parameters)
    _give_gradients(parameters, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not torch.equal(parameters[0], before[0])


def test_nonfinite_ignore_updates_anyway():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, nonfinite="ignore")
    _give_gradients(parameters, 0)
    parameters[3].grad[100] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 0 and optimizer.grad_norm is None
    assert parameters[3].isnan().sum() == 1 and not parameters[0].isnan().any()


@pytest.mark.parametrize("frozen", [(), (1, 4)])
def test_state_dicts_go_both_ways_with_torch(frozen):
    def train(optimizer, parameters, steps):
        for step in steps:
            _give_gradients(parameters, step)
            optimizer.step()

    def make(kind):
        parameters = _parameters()
        options = {"fused": True} if kind is torch.optim.AdamW else {}
        return parameters, kind(_groups(parameters), **SEPARATING, **options)

    for source, target in ((MaskedAdamW, torch.optim.AdamW), (torch.optim.AdamW, MaskedAdamW)):
        straight, straight_optimizer = make(source)
        for i in frozen:
            straight[i].requires_grad_(False)
        train(straight_optimizer, straight, range(6))

        first, first_optimizer = make(source)
        second, second_optimizer = make(target)
        for i in frozen:
            first[i].requires_grad_(False)
            second[i].requires_grad_(False)
        train(first_optimizer, first, range(3))
        with torch.no_grad():
            for p, q in zip(second, first, strict=True):
                p.copy_(q)
        second_optimizer.load_state_dict(first_optimizer.state_dict())
        train(second_optimizer, second, range(3, 6))
        for p, q in zip(straight, second, strict=True):  # torch may go on unfused: other roundings
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
        assert sum(map(bool, second_optimizer.state.values())) == len(SHAPES) - len(frozen)
        saved = first_optimizer.state_dict()["state"]
        if source is MaskedAdamW:  # no state is said, not left out
            assert [i for i in saved if not saved[i]] == list(frozen) and len(saved) == len(SHAPES)


def test_loading_keeps_fp32_moments_of_bf16_parameters():
    parameters = _parameters(torch.bfloat16)
    optimizer = MaskedAdamW(parameters)
    _give_gradients(parameters, 0)
    optimizer.step()
    copies = _parameters(torch.bfloat16)
    loaded = MaskedAdamW(copies)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(parameters, copies, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(loaded.state[q][key], value)
            assert loaded.state[q][key].dtype == torch.float32
            assert loaded.state[q][key].data_ptr() != value.data_ptr()


def test_loading_into_a_frozen_stage_releases_what_is_not_active():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters)
    _give_gradients(parameters, 0)
    optimizer.step()
    copies = _parameters()
    copies[0].requires_grad_(False)
    loaded = MaskedAdamW(copies)
    loaded.load_state_dict(optimizer.state_dict())
    assert copies[0] not in loaded.state and len(loaded.state) == len(SHAPES) - 1


def test_release_works_on_any_optimizer():
    parameters = _parameters()
    optimizer = torch.optim.Adam(parameters)
    _give_gradients(parameters, 0)
    optimizer.step()
    parameters[1].requires_grad_(False)
    assert release_frozen_state(optimizer) == 2 * 7 * 9 * 4 + 4
    assert parameters[1] not in optimizer.state and len(optimizer.state) == len(SHAPES) - 1
    assert release_frozen_state(optimizer) == 0


def test_works_with_schedulers_closures_and_tensor_lr():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, lr=1.0, weight_decay=0.0, eps=1e-12, nonfinite="ignore")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (1.0, 0.5):
        before = parameters[0].item()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = parameters[0].sum() * 2
            loss.backward()
            return loss

        assert optimizer.step(closure) == before * 2
        assert before - parameters[0].item() == pytest.approx(expected, rel=1e-5)
        scheduler.step()
    runs = []
    for lr in (0.1, torch.tensor(0.1)):
        parameters = _parameters()
        _give_gradients(parameters, 0)
        MaskedAdamW(parameters, lr=lr).step()
        runs.append(parameters)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_and_release(copied):
    from progtuning_kernels import freeze_events

    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, max_grad_norm=0.5, on_freeze="release")
    _give_gradients(parameters, 0)
    optimizer.step()
    twin = copied(optimizer)
    own = twin.param_groups[0]["params"]
    _give_gradients(own, 1)
    twin.step()
    _give_gradients(parameters, 1)
    optimizer.step()
    assert all(map(torch.equal, parameters, own))
    own[0].requires_grad_(False)
    freeze_events.announce()
    assert own[0] not in twin.state and parameters[0] in optimizer.state


def test_optimizer_of_another_model_keeps_its_state():
    parameters = _parameters()
    other = MaskedAdamW(parameters)
    _give_gradients(parameters, 0)
    other.step()
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    handle.advance()
    assert len(other.state) == len(SHAPES)


def test_a_dropped_optimizer_is_not_kept_alive():
    from progtuning_kernels import freeze_events

    optimizer = MaskedAdamW(_parameters())
    assert optimizer in freeze_events._listeners
    count = len(freeze_events._listeners)
    del optimizer
    gc.collect()
    assert len(freeze_events._listeners) < count


def test_no_active_tensor_is_a_step_that_does_nothing():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters, max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state and optimizer.grad_norm is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is out of range"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1e-8}, "eps="),
        ({"weight_decay": -0.1}, "weight_decay="),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"on_freeze": "drop"}, "on_freeze must be one of"),
        ({"nonfinite": "raise"}, "nonfinite must be one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(_parameters(), **options)


def test_unsupported_saved_options_and_sparse_gradients_are_refused():
    parameters = _parameters()
    amsgrad = torch.optim.AdamW(_parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        MaskedAdamW(parameters).load_state_dict(amsgrad.state_dict())
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        MaskedAdamW(table.parameters()).step()
