"""benchmarks/kernels.py: no number without a green gate; its GPU form runs on stand-ins."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def _case(kernels, title: str):
    (case,) = [c for c in kernels.cases(torch.device("cpu")) if str(c).startswith(title)]
    return case


def _measured(kernels, case, **changes):
    case = dataclasses.replace(case, operation=dataclasses.replace(case.operation, **changes))
    return kernels.measure(case, kernels.Machine(torch.device("cpu"), 1.0), rounds=1)


def test_the_cpu_form_as_a_command(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--only", "^rms_norm, (dx|all)"]
    command += ["--rounds", "2", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing here is a kernel's time" in done.stdout
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]
    assert {"commit", "dirty", "date", "device", "versions", "device_state"} <= content[
        "meta"
    ].keys()
    assert {"liger-kernel", "cut-cross-entropy", "torch"} <= content["meta"]["versions"].keys()
    assert content["copy_gb_per_s"] > 0 and content["matmul_tflop_per_s"] is None
    assert content["not_reached"] == [] and content["failed"] == {}
    assert [result["demand"] for result in content["results"]] == ["dx only", "all"]
    for result in content["results"]:
        assert set(result["providers"]) == {"eager", "compile", "liger", "ours"}
        for name in ("eager", "ours"):
            entry = result["providers"][name]
            assert 0 < entry["call_us_p20"] <= entry["call_us"] <= entry["call_us_p80"]
            assert entry["errors"].keys() == {"y", *(f"d{n}" for n in result["demanded"])}
            assert "kernel_us" not in entry
        assert "left out on the CPU" in result["providers"]["compile"]["reason"]
        assert "reason" in result["providers"]["liger"]
    assert all(verdict["met"] is None for verdict in content["verdicts"])
    assert done.stdout.count("not measured: ") == len(content["verdicts"])
    shown = subprocess.run([*command[:2], "--table", tmp_path], capture_output=True, text=True)
    assert len(shown.stdout.splitlines()) == 2 + len(content["results"]), shown.stderr


def test_a_budget_leaves_what_it_did_not_reach(kernels, tmp_path, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--only", "gelu", "--budget-s", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    monkeypatch.setattr(kernels, "copy_gb_per_s", lambda device: 1.0)
    kernels.main()
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert not content["results"] and len(content["not_reached"]) > 9
    assert "out of budget" in capsys.readouterr().out


def _off_by_a_percent(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6) * 1.01


def _without_gradient(x, weight):
    return F.rms_norm(x.detach(), weight.shape, weight.detach(), 1e-6)


def _gradient_of_half(x, weight):
    y = F.rms_norm(x, weight.shape, weight, 1e-6)
    return y.detach() + (y - y.detach()) / 2


class _Leaks(torch.autograd.Function):
    """Gives rows without an upstream gradient some."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy + 1e-3 * (dy == 0)


def _leaking(x, weight):
    return F.rms_norm(_Leaks.apply(x), weight.shape, weight, 1e-6)


def _raising(x, weight):
    raise NotImplementedError("not for this width")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_off_by_a_percent, "gate is red: y"),
        (_gradient_of_half, "gate is red: dx"),
        (_leaking, "gate is red: dx is inf off"),
        (_without_gradient, "its results have no gradient"),
        (_raising, "NotImplementedError: not for this width"),
    ],
)
def test_a_wrong_provider_gets_no_number(kernels, wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "GATE_ROWS", 4)  # of 8, so that others have no upstream gradient
    result = _measured(kernels, _case(kernels, "rms_norm, all"), ours=lambda implementation: wrong)
    assert result["providers"]["ours"].keys() == {"reason"}
    assert message in result["providers"]["ours"]["reason"]
    assert result["providers"]["eager"]["call_us"] > 0  # the others go on
    kernels.show(result)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "  ours " in line]
    assert f"no numbers: {result['providers']['ours']['reason']}" in line


def test_peers_may_round_more_but_ours_may_not(kernels):
    def coarse(x, weight):
        y = F.rms_norm(x, weight.shape, weight, 1e-6)
        return y + (y * 2**-7).detach()  # two roundings of bfloat16

    case, peer = _case(kernels, "rms_norm, dx only"), kernels.Peer(lambda: coarse)
    result = _measured(kernels, case, ours=lambda implementation: coarse, peers={"liger": peer})
    assert "gate is red: y" in result["providers"]["ours"]["reason"]
    assert result["providers"]["liger"]["call_us"] > 0


@pytest.mark.parametrize("wrong", ["", "mask", "rate"])
def test_the_gate_follows_the_mask_of_a_dropout(kernels, wrong):
    def dropped(x, residual, weight, bias, return_sum=False):
        kept = torch.rand_like(x) >= (0.5 if wrong == "rate" else kernels.DROPOUT)
        other = torch.rand_like(x) >= kernels.DROPOUT if wrong == "mask" else kept
        scale = 1 / (1 - kernels.DROPOUT)
        forward, backward = x * kept * scale, x * other * scale
        h = (forward - backward).detach() + backward + residual
        y = F.layer_norm(h, weight.shape, weight, bias, kernels.EPS)
        return (y, h) if return_sum else y

    case = _case(kernels, "layer_norm, dropout and residual, all")
    entry = _measured(kernels, case, ours=lambda implementation: dropped)["providers"]["ours"]
    red = {"mask": "gate is red: dx", "rate": "gate is red: dropout keeps"}
    assert "call_us" in entry if not wrong else red[wrong] in entry["reason"]


def test_floors(kernels):
    """In activations: what any implementation has to move."""
    by_name = {operation.name: operation for operation in kernels.operations()}
    shape = kernels.Shape(8, 64)

    def units(name: str, *demanded: str) -> float:
        return by_name[name].units(demanded, shape)

    assert [units("rms_norm"), units("rms_norm", "x")] == [2, 2 + 3]
    assert units("rms_norm", "x", "weight") == units("rms_norm", "x")
    assert units("rms_norm", "weight") == 2 + 2 and units("layer_norm", "bias") == 2 + 1
    assert [units("rms_norm, residual"), units("rms_norm, residual", "x", "residual")] == [4, 8]
    assert units("layer_norm, residual", "x") == 3 + 4
    both = ("x", "residual")
    assert (
        units("layer_norm, dropout and residual", *both) == units("layer_norm, residual", *both) + 1
    )
    assert [units("swiglu"), units("swiglu", "gate", "up"), units("swiglu", "up")] == [3, 8, 6]
    assert units("swiglu", "gate") == 3 + 4 and units("bias_gelu, erf", "bias") == 2 + 2
    loss = kernels.Shape(8, 64, 16)
    assert kernels.floor_flop(("hidden",), loss) == 2 * 2 * 8 * 64 * 16
    assert by_name["linear_cross_entropy"].units(("weight",), loss) == 1 + 2 + 2


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(kernels, monkeypatch):
    """A machine whose kernels run on the CPU; what it is asked for is in its mock."""
    cuda = MagicMock()
    cuda.Event = _Event
    cuda.stream.side_effect = cuda.graph.side_effect = lambda *a, **k: nullcontext()
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 1100
    for name in ("Event", "Stream", "stream", "CUDAGraph", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for name in ("synchronize", "current_stream", "set_sync_debug_mode", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(kernels, "IMPLEMENTATION", "reference")
    monkeypatch.setattr(kernels, "WARM_UP_S", 0.0)
    return kernels.Machine(torch.device("cpu"), 10.0, 1.0, 2048, torch.ones(8)), cuda


def test_the_gpu_form_on_stand_ins(kernels, gpu, capsys):
    machine, cuda = gpu
    result = kernels.measure(_case(kernels, "rms_norm, dx only"), machine, rounds=3)
    # x and its upstream gradient are 8 * 64 * 2 bytes each, four times L2 is 8 KiB
    assert (result["sets"], result["calls"]) == (4, kernels.CALLS)
    for name in ("eager", "compile", "ours"):
        entry = result["providers"][name]
        assert entry["timed_by"] == "graph" and "not_captured" not in entry
        assert entry["kernel_us"] > 0 and entry["hot_us"] > 0 and entry["call_us"] > 0
        assert math.isclose(entry["gb_per_s"], result["floor_bytes"] / entry["kernel_us"] / 1e3)
        assert math.isclose(entry["share_of_ceiling"], entry["gb_per_s"] / 10)
    assert result["floor_bytes"] == 5 * 8 * 64 * 2
    replays = [call for call in cuda.mock_calls if call[0] == "CUDAGraph().replay"]
    assert len(replays) == 3 * 2 * 3  # providers, graphs, rounds

    result = kernels.measure(_case(kernels, "linear_cross_entropy, all"), machine, rounds=3)
    entry = result["providers"]["ours"]
    assert entry["extra_bytes"] == 1000 and "hot_us" not in entry and result["sets"] == 1
    assert math.isclose(entry["tflop_per_s"], result["floor_flop"] / entry["kernel_us"] / 1e6)
    kernels.show(result)
    assert " of ceiling)  call " in capsys.readouterr().out
    head, _, row = kernels.table({"results": [result]}).splitlines()
    assert head == "| kernels (us) | eager | compile | ours | GB/s | of ceiling | call |"
    assert row.startswith("| linear_cross_entropy, all, 8 x 64 x 256 bfloat16 | ")


def test_what_waits_for_the_device_is_timed_by_events(kernels, gpu):
    machine, cuda = gpu

    def waiting(x, weight):
        modes = [call.args[0] for call in cuda.set_sync_debug_mode.call_args_list]
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return F.rms_norm(x, weight.shape, weight, kernels.EPS)

    case = _case(kernels, "rms_norm, dx only")
    peers = {"liger": kernels.Peer(lambda: waiting, computes=("x", "weight"))}
    case = dataclasses.replace(case, operation=dataclasses.replace(case.operation, peers=peers))
    result = kernels.measure(case, machine, rounds=1)
    entry = result["providers"]["liger"]
    assert entry["timed_by"] == "events" and entry["kernel_us"] > 0
    assert "synchronizing" in entry["not_captured"] and entry["undemanded"] == ["weight"]
    assert cuda.set_sync_debug_mode.call_args.args == ("default",)


class _Spoils(torch.autograd.Function):
    """Right, and then nothing is left of its input and upstream gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.x, ctx.weight = x, weight
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            y = F.rms_norm(x, ctx.weight.shape, ctx.weight, 1e-6)
            (dx,) = torch.autograd.grad(y, x, dy)
        for spoilt in (ctx.x.data, dy):
            spoilt.zero_()
        return dx, None


def test_what_a_backward_overwrites_is_put_back(kernels, gpu):
    machine, _ = gpu
    seen = set()

    def watching(x, weight):
        seen.add(x.detach().abs().sum().item())
        return kernels.ops.rms_norm(x, weight, kernels.EPS)

    case = _case(kernels, "rms_norm, dx only")
    spoiling = kernels.Peer(lambda: lambda x, weight: _Spoils.apply(x, weight), overwrites=True)
    operation = dataclasses.replace(
        case.operation, peers={"liger": spoiling}, ours=lambda implementation: watching
    )
    result = kernels.measure(dataclasses.replace(case, operation=operation), machine, rounds=2)
    assert result["providers"]["liger"]["call_us"] > 0
    assert "errors" in result["providers"]["ours"]
    assert len(seen) == result["sets"] and 0 not in seen


def _result(times: dict[str, float], demand: str = "dx only", **more) -> dict:
    entries = {name: {"kernel_us": time} for name, time in times.items()}
    result = dict(operation="rms_norm", demand=demand, demanded=["x"], shape=[8, 64], dtype="bf16")
    return result | {"providers": entries} | more


def test_verdicts(kernels):
    good = _result({"eager": 20.0, "liger": 15.0, "ours": 10.0})
    good["providers"]["liger"]["undemanded"] = ["weight"]
    first, liger, *loss = kernels.verdicts([good])
    assert first.met and liger.met and "1.500 over 1 cases, +25.0%" in liger.found
    assert all(verdict.met is None for verdict in loss)
    slow = _result({"eager": 9.0, "ours": 10.0}, demand="all")
    first = kernels.verdicts([good, slow])[0]
    assert first.met is False and "0.900 (rms_norm, all, 8 x 64 bf16, eager)" in first.found
    assert "missed in 1 of 3" in first.found and str(first).startswith("NOT met")
    loss = _result({"eager": 12.0, "compile": 10.0, "ours": 10.0}, operation="linear_cross_entropy")
    loss["providers"]["eager"]["extra_bytes"], loss["providers"]["ours"]["extra_bytes"] = 70, 10
    *_, eager, compiled, memory, _ = kernels.verdicts([loss])
    assert eager.met and compiled.met and memory.met is False and "-12.5%" in memory.found
