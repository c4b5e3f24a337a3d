"""MaskedAdamW with low-precision state: bytes, bits, resuming, exchange with torch, GradScaler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from progtuning_kernels import MaskedAdamW
from progtuning_kernels.ops.masked_update.low_precision import decode_exp_avg
from progtuning_kernels.optim import state_bytes

SHAPES = [(1,), (63,), (70, 61), (64, 64), (4095,), (257, 40)]
SEPARATING = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "fp32, 8-bit moments": (torch.float32, {"state_dtype": "8bit"}),
    "bf16": (torch.bfloat16, {}),
    "bf16, rounded stochastically": (
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    ),
    "bf16, 8-bit moments": (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "8bit"}),
    "bf16, master": (torch.bfloat16, {"master_weights": True}),
    "bf16, residual": (torch.bfloat16, {"master_weights": "8bit", "state_dtype": "8bit"}),
    "fp16, master, 8-bit moments": (
        torch.float16,
        {"master_weights": True, "state_dtype": "8bit"},
    ),
    "fp64": (torch.float64, {"state_dtype": "8bit"}),
}
every_precision = pytest.mark.parametrize(("dtype", "options"), PRECISIONS.values(), ids=PRECISIONS)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 5) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=generator) * scale
                p.grad = gradient.to(p.dtype) if p.requires_grad else None
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p) or {}
            found += [p.detach(), *(state[key] for key in sorted(state))]
    return found


@every_precision
def test_state_has_the_bytes_it_should(dtype, options):
    optimizer = MaskedAdamW(parameters(dtype), **SEPARATING, **options)
    train(optimizer, range(1))
    expected = 0
    for p in optimizer.param_groups[0]["params"]:
        n = p.numel()
        kind = options.get("state_dtype", torch.float32)
        if dtype == torch.float64:
            moments = 16 * n
        elif kind == "8bit" and n >= 4096:
            moments = 2 * n + 8 * -(-n // 256)
        else:
            moments = (4 if kind == torch.bfloat16 else 8) * n
        expected += moments + 4 + {True: 4, "8bit": 1}.get(options.get("master_weights"), 0) * n
    assert state_bytes(optimizer) == expected


@every_precision
def test_a_resumed_run_has_the_same_bits(dtype, options, tmp_path):
    straight = MaskedAdamW(parameters(dtype), **SEPARATING, seed=3, **options)
    train(straight, range(6))
    first = MaskedAdamW(parameters(dtype), **SEPARATING, seed=3, **options)
    train(first, range(3))
    torch.save([p.detach() for p in first.param_groups[0]["params"]], tmp_path / "model")
    torch.save(first.state_dict(), tmp_path / "optimizer")
    second_parameters = parameters(dtype, seed=6)
    for p, q in zip(second_parameters, torch.load(tmp_path / "model"), strict=True):
        p.data.copy_(q)
    second = MaskedAdamW(second_parameters, **SEPARATING, **options)  # the seed comes along
    second.load_state_dict(torch.load(tmp_path / "optimizer"))
    train(second, range(3, 6))
    assert all(map(torch.equal, tensors(straight), tensors(second)))
    twin = copy.deepcopy(second)
    for optimizer in (straight, second, twin):
        train(optimizer, range(6, 8))
    assert all(map(torch.equal, tensors(straight), tensors(second)))
    assert all(map(torch.equal, tensors(straight), tensors(twin)))


def test_the_seed_decides_and_frozen_tensors_do_not_shift_the_others():
    runs = []
    for seed, frozen in ((1, ()), (1, (0, 3)), (2, ())):
        own = parameters(torch.bfloat16)
        for i in frozen:
            own[i].requires_grad_(False)
        options = {"stochastic_rounding": True, "state_dtype": torch.bfloat16}
        train(MaskedAdamW(own, **SEPARATING, seed=seed, nonfinite="ignore", **options), range(3))
        runs.append(own)
    assert torch.equal(runs[0][4], runs[1][4])  # its number is its place among all parameters
    assert not torch.equal(runs[0][4], runs[2][4])


@every_precision
@pytest.mark.parametrize("frozen", [(), (2,)])
def test_torch_goes_on_from_any_precision_and_back(dtype, options, frozen):
    ours = MaskedAdamW(parameters(dtype), **SEPARATING, **options)
    for i in frozen:
        ours.param_groups[0]["params"][i].requires_grad_(False)
    train(ours, range(4))
    saved = ours.torch_state_dict()
    for i, p in enumerate(ours.param_groups[0]["params"]):
        if "exp_avg" in ours.state.get(p, {}):  # no bit of it is lost
            wide = saved["state"][i]["exp_avg"].double()
            assert torch.equal(wide, ours.state[p]["exp_avg"].double())
    copies = [nn.Parameter(p.detach().clone()) for p in ours.param_groups[0]["params"]]
    for i in frozen:
        copies[i].requires_grad_(False)
    theirs = torch.optim.AdamW(copies, **SEPARATING, foreach=False)
    theirs.load_state_dict(saved)
    for i, p in enumerate(copies):
        assert (not theirs.state.get(p)) == (i in frozen)
    train(theirs, range(4, 5))
    assert sum(bool(theirs.state[p]) for p in copies) == len(SHAPES) - len(frozen)

    back = MaskedAdamW([nn.Parameter(p.detach().clone()) for p in copies], **SEPARATING, **options)
    back.load_state_dict(theirs.state_dict())
    for i, p in enumerate(back.param_groups[0]["params"]):
        state, other = back.state.get(p), theirs.state.get(copies[i])
        assert bool(state) == bool(other)
        if not state:
            continue
        assert state["step"] == 5
        if "exp_avg" in state:
            torch.testing.assert_close(
                state["exp_avg"].float(), other["exp_avg"].float(), rtol=2**-8, atol=1e-7
            )
        else:
            decoded = decode_exp_avg(state["exp_avg_code"].view(-1), state["exp_avg_scale"])
            error = (decoded - other["exp_avg"].float().view(-1)).norm() / decoded.norm()
            assert error < 0.03
    train(back, range(5, 6))


def test_8bit_codes_are_not_taken_for_moments():
    ours = MaskedAdamW(parameters(), state_dtype="8bit")
    train(ours, range(1))
    theirs = torch.optim.AdamW(parameters())
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(KeyError):  # not trained on: the moments go by other names
        train(theirs, range(1, 2))


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"master_weights": True}])
def test_small_updates_are_not_lost_in_bfloat16(options):
    """An update of 1e-3 of p is below half a unit in bfloat16's last place."""
    results = {}
    for name, extra in (("plain", {}), ("ours", options)):
        p = nn.Parameter(torch.full((4096,), 1.0, dtype=torch.bfloat16))
        optimizer = MaskedAdamW([p], lr=1e-3, nonfinite="ignore", **extra)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results[name] = p.detach().double().mean().item()
    assert results["plain"] == 1.0
    assert results["ours"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(max_grad_norm, unscale_first):
    """Scaled gradients and their scale give what plain gradients give; a bad step is skipped."""
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        optimizer = MaskedAdamW(model.parameters(), **SEPARATING, max_grad_norm=max_grad_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        scales = []
        for step in range(5):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            if step == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if unscale_first and scaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        if scaled:
            assert scales == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0]
        assert optimizer.skipped_steps == 1
        assert all(state["step"] == 4 for state in optimizer.state.values())
        runs.append((list(model.parameters()), optimizer.grad_norm))
    for p, q in zip(*(run[0] for run in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=0)


def test_grad_scaler_without_a_norm():
    p, q = parameters(), parameters()
    ours = MaskedAdamW(p, **SEPARATING, nonfinite="ignore")
    plain = MaskedAdamW(q, **SEPARATING, nonfinite="ignore")
    ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    train(ours, range(1), scale=8.0)
    train(plain, range(1))
    for x, y in zip(p, q, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    before = [x.detach().clone() for x in p]
    ours.found_inf = torch.tensor(1.0)
    train(ours, range(1, 2))
    assert all(map(torch.equal, p, before)) and ours.skipped_steps == 1


def test_a_bad_gradient_that_grad_scaler_did_not_find_is_found():
    own = parameters()
    optimizer = MaskedAdamW(own, **SEPARATING)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    before = [p.detach().clone() for p in own]
    train(optimizer, range(1), scale=float("nan"))
    assert optimizer.skipped_steps == 1 and all(map(torch.equal, own, before))


def test_zero_grads_leaves_zeros_in_place():
    own = parameters()
    optimizer = MaskedAdamW(own, **SEPARATING, zero_grads=True)
    for p in own:
        p.grad = torch.ones_like(p)
    own[2].grad[3, 4] = float("nan")
    addresses = [p.grad.data_ptr() for p in own]
    for skipped in (1, 1):
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        assert [p.grad.data_ptr() for p in own] == addresses
        assert not any(p.grad.any() for p in own)


def test_many_groups_and_tensors_are_split_as_launches_need():
    own = [nn.Parameter(torch.ones(3)) for _ in range(4100)]
    groups = [{"params": own[i::20], "lr": 0.01 * (i + 1)} for i in range(20)]
    optimizer = MaskedAdamW(groups, weight_decay=0.0, eps=1e-12)
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [len(b.parameters) for b in optimizer.active_buckets()] == [1640, 1640, 820]
    for i in range(20):
        for p in own[i::20]:
            torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.01 * (i + 1)))
    single = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(20)]
    optimizer = MaskedAdamW(single)
    train(optimizer, range(1))
    assert [len(b.groups) for b in optimizer.active_buckets()] == [8, 8, 4]
    one = MaskedAdamW([nn.Parameter(torch.ones(1)) for _ in range(4033)])
    train(one, range(1))
    assert [len(b.parameters) for b in one.active_buckets()] == [4032, 1]


def test_parameters_that_move_are_found_again():
    own = parameters()
    optimizer = MaskedAdamW(own, **SEPARATING)
    train(optimizer, range(1))
    old = own[2].data
    kept = old.clone()
    own[2].data = old.clone()  # as .to(), FSDP and loading with assign=True do
    train(optimizer, range(1, 2))
    assert torch.equal(old, kept) and not torch.equal(own[2].data, kept)


def test_state_that_is_cleared_or_replaced_is_found_again():
    own = parameters()
    optimizer = MaskedAdamW(own, **SEPARATING)
    train(optimizer, range(2))
    optimizer.state.clear()
    train(optimizer, range(2, 3))
    assert all(optimizer.state[p]["step"] == 1 for p in own)
    replaced = {key: value.clone() for key, value in optimizer.state[own[1]].items()}
    optimizer.state[own[1]] = replaced
    train(optimizer, range(3, 4))
    assert replaced["step"] == 2


def test_groups_added_later_are_trained_and_tables_are_made_once():
    own = parameters()
    optimizer = MaskedAdamW(own[:4], **SEPARATING)
    train(optimizer, range(2))
    buckets = optimizer.active_buckets()
    train(optimizer, range(2, 4))
    assert optimizer.active_buckets() is buckets
    optimizer.add_param_group({"params": own[4:], "lr": 0.5})
    before = own[5].detach().clone()
    train(optimizer, range(4, 5))
    assert not torch.equal(own[5], before) and optimizer.state[own[5]]["step"] == 1


def test_options_that_exclude_each_other_are_named():
    for options, message in (
        ({"state_dtype": torch.float16}, "state_dtype must be one of"),
        ({"stochastic_rounding": True, "master_weights": True}, "exclude each other"),
        ({"seed": -1}, "seed must have 64 bits"),
        ({"seed": 2**64}, "seed must have 64 bits"),
        ({"on_freeze": "forget"}, "on_freeze must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedAdamW(parameters(), **options)


def test_gradients_of_another_dtype_are_read_as_what_they_are():
    p, q = (nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(2))
    p.grad_dtype = torch.float32  # gradients that are accumulated in float32
    p.grad = torch.linspace(-1, 1, 300)
    q.grad = p.grad.bfloat16()
    for parameter in (p, q):
        MaskedAdamW([parameter], **SEPARATING, max_grad_norm=0.5).step()
    assert torch.equal(p, q)


def test_distributed_checkpoints_flatten_and_load_it():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    twin = copy.deepcopy(model)
    optimizers = []
    for m in (model, twin):
        m[0].requires_grad_(False)  # no state: said, not left out
        optimizers.append(MaskedAdamW(m.named_parameters(), **SEPARATING))
    model(torch.randn(4, 8)).sum().backward()
    optimizers[0].step()
    saved = get_optimizer_state_dict(model, optimizers[0])
    set_optimizer_state_dict(twin, optimizers[1], saved)
    twin.load_state_dict(model.state_dict())
    for m, o in zip((model, twin), optimizers, strict=True):
        m.zero_grad()
        m(torch.ones(4, 8)).sum().backward()
        o.step()
    assert all(map(torch.equal, tensors(optimizers[0]), tensors(optimizers[1])))


def test_offload_keeps_the_state_for_the_thaw():
    own = parameters()
    optimizer = MaskedAdamW(own, **SEPARATING, on_freeze="offload")
    keeping = MaskedAdamW(parameters(), **SEPARATING, on_freeze="keep")
    for requires_grad in (True, False, True):
        for o in (optimizer, keeping):
            o.param_groups[0]["params"][3].requires_grad_(requires_grad)
            train(o, range(2))
    assert all(map(torch.equal, tensors(optimizer), tensors(keeping)))


@pytest.mark.gpu
def test_offload_frees_the_device_and_comes_back():
    own = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = MaskedAdamW(own, **SEPARATING, on_freeze="offload", state_dtype="8bit")
    keeping = MaskedAdamW(
        [nn.Parameter(p.detach().clone()) for p in own],
        **SEPARATING,
        on_freeze="keep",
        state_dtype="8bit",
    )
    for requires_grad in (True, False, True):
        for o in (optimizer, keeping):
            o.param_groups[0]["params"][5].requires_grad_(requires_grad)
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                for p in o.param_groups[0]["params"]:
                    p.grad = torch.randn(p.shape, generator=generator).to(p)
                o.step()
        on_device = [t.is_cuda for t in optimizer.state[own[5]].values()]
        assert all(on_device) == requires_grad and any(on_device) == requires_grad
    assert all(map(torch.equal, tensors(optimizer), tensors(keeping)))
