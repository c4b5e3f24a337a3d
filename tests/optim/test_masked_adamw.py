"""MaskedAdamW: torch's numbers on active tensors, not one bit and not one byte on frozen ones."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    ProgressiveSchedule,
    RandomBlockSchedule,
    freeze_events,
    patch_model,
)
from progtuning_kernels.ops.masked_update.low_precision import with_residual
from progtuning_kernels.optim import release_frozen_state, state_bytes
from progtuning_kernels.schedules import Schedule

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


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_tiny_gradients_are_clipped_by_torchs_coefficient(in_backward, backend, monkeypatch):
    """Their norm is of the size of the 1e-6 that `clip_grad_norm_` adds to it."""
    monkeypatch.setenv("PROGTUNING_BACKEND", backend)
    mine, theirs = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    clip_mode = "per_block" if in_backward else "exact"
    optimizer = MaskedAdamW(
        [mine], max_grad_norm=5e-7, betas=(0.0, 0.0), in_backward=in_backward, clip_mode=clip_mode
    )
    gradient = torch.full((64, 64), 1e-6 / 64)
    (mine * gradient).sum().backward()
    optimizer.step()
    theirs.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_([theirs], 5e-7)
    coefficient = (optimizer.state[mine]["exp_avg"] / gradient).mean().item()
    assert coefficient == pytest.approx(5e-7 / (norm.item() + 1e-6), rel=1e-6)
    assert coefficient == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(optimizer.state[mine]["exp_avg"], theirs.grad, rtol=1e-6, atol=0)


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
    assert len(loaded.state) == len(SHAPES)  # the plan that it belongs to may be yet to come
    loaded.step()
    assert copies[0] not in loaded.state and len(loaded.state) == len(SHAPES) - 1
    copies[1].requires_grad_(False)
    freeze_events.announce()  # from now on at the change itself
    assert copies[1] not in loaded.state


def test_steps_skipped_before_a_checkpoint_are_counted_after_it():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters)
    loaded = MaskedAdamW(_parameters())
    _give_gradients(parameters, 0, scale=float("nan"))
    for skipped in (1, 2):  # what the first saving has done does not stay
        optimizer.step()
        loaded.load_state_dict(optimizer.state_dict())
        assert loaded.skipped_steps == optimizer.skipped_steps == skipped


def test_a_first_gradient_may_come_in_any_step():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters)
    for step in range(3):
        _give_gradients(parameters, step)
        if step == 0:
            parameters[1].grad = parameters[2].grad = None
        elif step == 1:
            parameters[2].grad = None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [3, 2, 1, 3, 3, 3]


THAWING = {
    "progressive": ProgressiveSchedule(2, 12),
    "milestones": MilestoneSchedule({0: 4, 3: 3, 6: 1, 9: 0}),
    "random": RandomBlockSchedule(1, 5, seed=3),
    "cyclic": CyclicBlockSchedule(1, 5),
}
SAVED_AFTER, STEPS = 7, 12


@dataclass
class _Run:
    """A patched model and an optimizer, built as for a new run."""

    schedule: Schedule
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.model = tiny_model("bert-sequence")
        self.optimizer = MaskedAdamW(self.model.named_parameters(), lr=1e-2, **self.options)
        self.handle: PatchHandle | None = None

    def patch(self) -> None:
        self.handle = patch_model(self.model, copy.deepcopy(self.schedule))

    def train(self, until: int) -> _Run:
        for step in range(self.handle.step, until):
            self.model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.handle.advance()
        return self


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_freeze": "keep"},
        {"on_freeze": "offload"},
        {"in_backward": True},
        {"in_backward": True, "max_grad_norm": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", THAWING)
def test_a_resumed_run_has_the_same_bits_whichever_is_loaded_first(name, options):
    run = _Run(THAWING[name], options)
    run.patch()
    run.train(SAVED_AFTER)
    saved = copy.deepcopy(
        {k: getattr(run, k).state_dict() for k in ("model", "optimizer", "handle")}
    )
    straight = run.train(STEPS)
    orders = ["patch optimizer handle", "patch handle optimizer"]
    if not options:
        orders.append("optimizer patch handle")
    for order in orders:
        resumed = _Run(THAWING[name], options)
        resumed.model.load_state_dict(saved["model"])
        for part in order.split():
            if part == "patch":
                resumed.patch()
            else:
                getattr(resumed, part).load_state_dict(copy.deepcopy(saved[part]))
        states = sum(map(bool, saved["optimizer"]["state"].values()))
        assert sum(map(bool, resumed.optimizer.state.values())) == states
        resumed.train(STEPS)
        for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q), order
        assert state_bytes(straight.optimizer) == state_bytes(resumed.optimizer), order


def test_another_models_change_of_plan_leaves_loaded_state_alone():
    first = _Run(THAWING["milestones"], {})
    first.patch()
    saved = copy.deepcopy(first.train(SAVED_AFTER).optimizer.state_dict())
    run = _Run(THAWING["milestones"], {})
    run.patch()
    run.optimizer.load_state_dict(saved)
    patch_model(tiny_model("bert-sequence"), MilestoneSchedule({1: 2})).advance()
    assert len(run.optimizer.state) == sum(map(bool, saved["state"].values()))


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
        ({"betas": (0.9,)}, "betas=.0.9,. is out of range"),
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


def test_a_replaced_tensor_is_trained_from_the_next_step_on():
    """As torch does: the old one keeps its state, the new one starts anew."""
    runs = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        parameters = _parameters()
        optimizer = kind(parameters, **SEPARATING)
        _give_gradients(parameters, 0)
        optimizer.step()
        old = parameters[1]
        parameters[1] = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(7, 9))
        _give_gradients([*parameters, old], 1)
        before = old.detach().clone()
        optimizer.step()
        assert torch.equal(old, before)
        assert optimizer.state[old]["step"] == 1 and optimizer.state[parameters[1]]["step"] == 1
        optimizer.param_groups[0]["params"][1] = old  # and it comes back
        optimizer.step()
        assert optimizer.state[old]["step"] == 2 and optimizer.state[parameters[1]]["step"] == 1
        runs.append([*parameters, old])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_state_that_a_state_dict_cannot_name_is_said():
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters)
    _give_gradients(parameters, 0)
    optimizer.step()
    old, new = parameters[1], nn.Parameter(torch.ones(7, 9))
    optimizer.param_groups[0]["params"][1] = new
    with pytest.warns(UserWarning, match=r"no group holds the tensors of shape \(7, 9\)") as found:
        saved = optimizer.state_dict()
    assert found[0].filename == __file__
    assert saved["state"][1] == {} and optimizer.state[old]["step"] == 1
    optimizer.state[new] = optimizer.state.pop(old)  # the cure of the message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.state_dict()["state"][1]["step"] == 1


def test_a_tensor_that_moves_to_another_group_takes_its_rate():
    runs = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        parameters = _parameters()
        groups = _groups(parameters)
        groups[1]["lr"] = 1e-4
        optimizer = kind(groups, **SEPARATING)
        for step in range(4):
            first, second = (group["params"] for group in optimizer.param_groups)
            if step == 1:
                second.append(first.pop(1))
            if step == 2:  # of the same sizes
                first[0], second[0] = second[0], first[0]
            if step == 3:  # in the same order
                second.insert(0, first.pop())
            _give_gradients(parameters, step)
            optimizer.step()
        runs.append(parameters)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_a_tensor_in_two_groups_is_refused():
    parameters = _parameters()
    optimizer = MaskedAdamW(_groups(parameters))
    optimizer.param_groups[1]["params"].append(parameters[1])
    _give_gradients(parameters, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tensor of shape \(7, 9\) is in the groups twice"):
            optimizer.step()
    with pytest.warns(UserWarning, match="duplicate parameters"):  # torch's
        with pytest.raises(ValueError, match="in the groups twice"):
            MaskedAdamW([parameters[0], parameters[0]])


def test_a_group_with_fewer_names_than_tensors_is_refused():
    model = nn.Linear(2, 3)
    optimizer = MaskedAdamW(model.named_parameters())
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="group 0 has 3 params and 2 param_names"):
        optimizer.step()


IGNORED = {
    "amsgrad": True,
    "maximize": True,
    "differentiable": True,
    "correct_bias": False,
    "bias_correction": False,
    "max_grad_norm": 1.0,
    "in_backward": True,
    "state_dtype": "8bit",
}


@pytest.mark.parametrize("option", IGNORED)
def test_options_that_would_be_ignored_are_refused_wherever_they_come_from(option):
    group = {"params": _parameters(), option: IGNORED[option]}
    with pytest.raises(ValueError, match=option):
        MaskedAdamW([group])
    parameters = _parameters()
    optimizer = MaskedAdamW(parameters)
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0][option] = IGNORED[option]
    with pytest.raises(ValueError, match=option):
        optimizer.load_state_dict(saved)
    _give_gradients(parameters, 0)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    optimizer.param_groups[0][option] = IGNORED[option]
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable", "label"])
def test_options_that_change_no_result_are_kept(option):
    parameters = _parameters()
    optimizer = MaskedAdamW([{"params": parameters, option: True}])
    _give_gradients(parameters, 0)
    optimizer.step()
    other = MaskedAdamW(_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][option] is True


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_hyper_parameters_of_a_group_have_their_range_too(name):
    with pytest.raises(ValueError, match=f"{name}=-1.0 is out of range"):
        MaskedAdamW([{"params": _parameters(), name: -1.0}])


def _stepped(optimizer: torch.optim.Optimizer) -> dict:
    _give_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
    optimizer.step()
    return optimizer.state_dict()


def test_decay_of_adam_is_not_taken_for_that_of_adamw():
    saved = _stepped(torch.optim.Adam(_parameters(), weight_decay=0.1))
    optimizer = MaskedAdamW(_parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1.*decoupled_weight_decay=True"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state
    saved["param_groups"][0]["decoupled_weight_decay"] = True  # the cure of the message
    optimizer.load_state_dict(saved)
    optimizer = MaskedAdamW(_parameters())
    optimizer.param_groups[0].update(weight_decay=0.1, decoupled_weight_decay=False)
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
        _stepped(optimizer)


def test_adam_without_decay_is_adamw():
    saved = _stepped(torch.optim.Adam(_parameters()))
    MaskedAdamW(_parameters()).load_state_dict(saved)


def test_a_state_that_does_not_say_whose_decay_it_has_is_taken_with_a_warning():
    saved = _stepped(torch.optim.AdamW(_parameters(), weight_decay=0.1))
    del saved["param_groups"][0]["decoupled_weight_decay"]  # of torch before 2.7
    optimizer = MaskedAdamW(_parameters())
    with pytest.warns(UserWarning, match="AdamW's is used") as found:
        optimizer.load_state_dict(saved)
    assert len(found) == 1 and found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _stepped(optimizer)


def test_state_of_another_optimizer_or_of_another_shape_is_refused_before_anything_changes():
    optimizer = MaskedAdamW(_parameters(), lr=0.5)
    adam = _stepped(torch.optim.Adam(_parameters()))
    foreign = copy.deepcopy(adam)
    for state in foreign["state"].values():
        state["momentum"] = state.pop("exp_avg")
    reshaped = copy.deepcopy(adam)
    reshaped["state"][1]["exp_avg_sq"] = torch.ones(1, 9)  # copy_ would spread it over the rows
    counted = copy.deepcopy(adam)
    counted["state"][1]["step"] = torch.ones(2)
    sgd = _stepped(torch.optim.SGD(_parameters(), momentum=0.9))
    for saved, message in (
        (sgd, "no betas"),
        (foreign, "parameter 0 has no exp_avg but"),
        (reshaped, r"exp_avg_sq of parameter 1 is of shape \(1, 9\), not \(7, 9\)"),
        (counted, r"saved step of parameter 1 is of shape \(2,\), not \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state
    counted["state"][1]["step"] = torch.ones(1)
    optimizer.load_state_dict(counted)
    assert optimizer.state[optimizer.param_groups[0]["params"][1]]["step"].shape == ()


def test_scales_of_another_number_of_blocks_are_refused_before_anything_changes():
    """One scale would be spread over all blocks."""
    coded, plain = ([nn.Parameter(torch.ones(20, 256))] for _ in range(2))
    saved = _stepped(MaskedAdamW(coded, state_dtype="8bit"))
    saved["state"][0]["exp_avg_scale"] = torch.ones(1)
    for options in ({"state_dtype": "8bit"}, {}):
        optimizer = MaskedAdamW(plain, lr=0.5, **options)
        with pytest.raises(ValueError, match=r"exp_avg_scale of parameter 0 is of shape \(1,\)"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state


def test_hooks_see_and_change_the_whole_state():
    optimizer, seen = MaskedAdamW(_parameters()), {}

    def before_saving(optimizer):
        optimizer.param_groups[0]["note"] = "kept"

    def after_saving(optimizer, saved):
        seen["saved"] = set(saved)
        saved["state"][1]["exp_avg"] = torch.full((7, 9), 3.0)
        return {**saved, "more": 1}

    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_state_dict_pre_hook(before_saving)
    saved = _stepped(optimizer)
    assert seen["saved"] == {"state", "param_groups", "masked"} and saved["more"] == 1
    assert saved["param_groups"][0]["note"] == "kept"

    def before_loading(optimizer, saved):
        seen["loaded"] = saved["state"][1]["exp_avg"].mean().item()
        state = {
            i: {**values, "exp_avg": -values["exp_avg"]} for i, values in saved["state"].items()
        }
        return {
            **saved,
            "state": state | {"run": "first"},
            "masked": {**saved["masked"], "seed": 8},
        }

    def after_loading(optimizer):
        p = optimizer.param_groups[0]["params"][1]
        seen["after"] = optimizer.state[p]["exp_avg"].mean().item()
        optimizer.state[p]["average"] = torch.ones(2)
        seen["seed"] = optimizer.seed

    twin = MaskedAdamW(_parameters())
    twin.register_load_state_dict_pre_hook(before_loading)
    twin.register_load_state_dict_post_hook(after_loading)
    twin.load_state_dict(saved)
    assert (seen["loaded"], seen["after"], seen["seed"], twin.seed) == (3.0, -3.0, 8, 8)
    assert twin.state["run"] == "first"  # as torch, which copies what belongs to no parameter
    other = MaskedAdamW(_parameters())
    other.load_state_dict(twin.state_dict())
    average = other.torch_state_dict()["state"][1]["average"]
    assert torch.equal(average, torch.ones(2)) and other.state["run"] == "first"
    assert state_bytes(other) == state_bytes(twin) == state_bytes(optimizer) + 8


def test_step_hooks_run_around_the_step():
    parameters, calls = _parameters(), []
    optimizer = MaskedAdamW(parameters)
    before = parameters[0].detach().clone()

    def pre(optimizer, args, kwargs):
        calls.append(torch.equal(parameters[0], before))
        parameters[1].grad.zero_()

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(
        lambda *_: calls.append(not torch.equal(parameters[0], before))
    )
    _give_gradients(parameters, 0)
    optimizer.step()
    assert calls == [True, True] and not optimizer.state[parameters[1]]["exp_avg"].any()


def test_complex_parameters_are_refused_unless_they_are_frozen():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex parameters \(torch.complex64, shape \(3,\)\)"):
        MaskedAdamW([p])
    p.requires_grad_(False)
    parameters = _parameters()
    optimizer = MaskedAdamW([p, *parameters])
    _give_gradients(parameters, 0)
    optimizer.step()
    p.requires_grad_(True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="complex parameters"):
        optimizer.step()


def test_unsupported_saved_options_and_sparse_gradients_are_refused():
    parameters = _parameters()
    amsgrad = torch.optim.AdamW(_parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        MaskedAdamW(parameters).load_state_dict(amsgrad.state_dict())
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        MaskedAdamW(table.parameters()).step()


@pytest.mark.parametrize(
    "move",
    [
        lambda state: setattr(state["exp_avg"], "data", torch.zeros(33, 125)),
        lambda state: state["exp_avg"].share_memory_(),
        lambda state: state.update(exp_avg=torch.zeros(33, 125)),
        lambda state: state.update(step=torch.tensor(0.0)),
    ],
)
def test_state_that_was_moved_or_replaced_counts_from_the_next_step(move):
    results = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        p = _parameters()[-1]
        optimizer = kind([p], **SEPARATING)
        for seed in range(3):
            _give_gradients([p], seed)
            optimizer.step()
            move(optimizer.state[p])
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_master_follows_weights_that_somebody_else_writes(in_backward):
    p = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([p], lr=1e-5, master_weights=True, in_backward=in_backward)

    def step() -> None:
        p.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()  # below bfloat16's last place: the master alone has moved
    assert (p == 1).all() and (optimizer.state[p]["master"] < 1 - 1.5e-5).all()
    with torch.no_grad():
        p[:10] = 5
    step()
    assert (p[:10] == 5).all() and (optimizer.state[p]["master"][:10] > 4.9).all()
    assert (optimizer.state[p]["master"][10:] < 1 - 2.5e-5).all()  # the others lost nothing


def test_24_bit_weights_forget_what_weights_from_outside_do_not_know():
    frozen, p = (nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MaskedAdamW([frozen, p], lr=1e-3, master_weights="8bit")

    def step(*parameters: nn.Parameter) -> None:
        sum(q.float().sum() for q in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(frozen, p)
    kept = optimizer.state[frozen]["residual"].clone()
    assert kept.any()
    step(p)  # a bucket's tensor without a gradient keeps what it has
    step(p)
    assert torch.equal(optimizer.state[frozen]["residual"], kept)
    with torch.no_grad():
        p.fill_(5)
    optimizer.param_groups[0]["lr"] = 0.0
    step(frozen, p)
    assert (p == 5).all() and not optimizer.state[p]["residual"].any()
    assert torch.equal(optimizer.state[frozen]["residual"], kept)
    half = MaskedAdamW([nn.Parameter(torch.ones(3).half())], master_weights="8bit")
    half.param_groups[0]["params"][0].grad = torch.ones(3).half()
    with pytest.raises(ValueError, match="one is float16: set master_weights=True"):
        half.step()
    number = cast(Any, 1)  # as a configuration may have it
    assert "master" in MaskedAdamW([p], master_weights=number).init_state(p)


def test_masters_and_residuals_become_each_other():
    torch.manual_seed(0)
    runs = {}
    for kind in (True, "8bit"):
        p = nn.Parameter(torch.linspace(-2, 2, 5000).bfloat16())
        optimizer = MaskedAdamW([p], lr=1e-4, master_weights=kind)
        for _ in range(3):
            p.grad = torch.randn(5000).bfloat16()
            optimizer.step()
        runs[kind] = p, optimizer
    for kind, other in ((True, "8bit"), ("8bit", True)):
        p, optimizer = runs[kind]
        q = nn.Parameter(p.detach().clone())
        moved = MaskedAdamW([q], lr=1e-4, master_weights=other)
        moved.load_state_dict(optimizer.state_dict())
        own, theirs = moved.state[q], optimizer.state[p]
        if kind is True:
            exact, found = theirs["master"], with_residual(q.detach(), own["residual"])
        else:
            exact, found = with_residual(p.detach(), theirs["residual"]), own["master"]
        assert (found - exact).abs().max() <= 2**-15 * 2
        assert not torch.equal(found, q.float())
        assert set(moved.torch_state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_state_of_a_relative_of_adam_is_refused(kind):
    p = _parameters()[-1]
    other = kind([p], weight_decay=0.1, decoupled_weight_decay=True)
    _give_gradients([p], 0)
    other.step()
    with pytest.raises(ValueError, match=f"those of {kind.__name__}"):
        MaskedAdamW([p]).load_state_dict(other.state_dict())


def test_a_gradient_of_before_its_parameter_was_replaced_is_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    p.data = torch.ones(4000)
    with pytest.raises(RuntimeError, match="gradient of shape .3,., of before it was replaced"):
        optimizer.step()
