"""benchmarks/kernels.py: no number without a green gate; its GPU form runs on stand-ins."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from benchmark_scripts import BENCHMARKS, load_script

from progtuning_kernels import ops

# transformers would take a module of the script's own name for a package that it knows
kernels = load_script("kernels", "kernels_script")

import kernel_operations  # noqa: E402
import kernel_peers  # noqa: E402
import kernel_timing  # noqa: E402
from kernel_operations import DROPOUT, EPS  # noqa: E402
from kernel_peers import Peer  # noqa: E402

CPU = torch.device("cpu")


def _case(title: str):
    (case,) = [c for c in kernels.cases(CPU) if str(c).startswith(title)]
    return case


def _with(case, **changes):
    return dataclasses.replace(case, operation=dataclasses.replace(case.operation, **changes))


def _measured(case, **changes):
    machine = kernel_timing.Machine(CPU, 1.0)
    return kernels.measure(_with(case, **changes), machine, rounds=1)


def _peer(call, **options) -> Peer:
    return Peer(lambda: call, lambda function, **tensors: function(**tensors), **options)


def test_the_cpu_form_as_a_command(tmp_path):
    command = [sys.executable, BENCHMARKS / "kernels.py", "--device", "cpu"]
    command += ["--only", "^rms_norm, (dx|all)"]
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
        assert set(result["providers"]) == {"eager", "compile", "liger", "quack", "ours"}
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


def test_a_run_that_is_cut_off_has_seen_every_operation():
    every = [operation.name for operation in kernel_operations.operations()]
    for device in ("cpu", "cuda"):
        chosen = kernels.cases(torch.device(device))
        first = chosen[: len(every)]
        assert [case.operation.name for case in first] == every
        assert {case.demand for case in first} == {"all", "dx only"}
        assert len(set(map(str, chosen))) == len(chosen)
    # widths, rows and types of the activations and norms, and two heads
    demands = {o.name: len(o.demands) for o in kernel_operations.operations()}
    norms = sum(count for name, count in demands.items() if "norm" in name)
    rest = sum(demands.values()) - norms - demands["linear_cross_entropy"]
    assert len(chosen) == 2 * demands["linear_cross_entropy"] + 8 * rest + 16 * norms


def _binding(function):
    """In its place: arguments are bound to its signature, and nothing runs."""
    signature = inspect.signature(function)
    return lambda *args, **kwargs: signature.bind(*args, **kwargs)


@pytest.mark.parametrize("name", kernel_peers.PACKAGES)
def test_peers_have_the_arguments_that_they_are_called_with(name):
    peers = [
        (operation, operation.peers[name])
        for operation in kernel_operations.operations()
        if name in operation.peers
    ]
    assert peers
    for operation, peer in peers:
        try:
            found = peer.find()
        except ImportError as error:
            pytest.skip(f"{kernel_peers.PACKAGES[name]}: {error}")
        if inspect.ismodule(found):
            functions = vars(found).items()
            bound = SimpleNamespace(**{k: _binding(f) for k, f in functions if callable(f)})
        else:
            bound = _binding(found)
        sizes = (kernel_operations.Shape(8, 64, vocabulary) for vocabulary in (256, 30))
        for shape in sizes if operation.is_loss else [kernel_operations.Shape(8, 64)]:
            generator = torch.Generator().manual_seed(0)
            peer.arrange(bound, **operation.draw(shape, torch.bfloat16, generator))


def test_a_budget_leaves_what_it_did_not_reach(tmp_path, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--only", "gelu", "--budget-s", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    monkeypatch.setattr(kernel_timing, "copy_gb_per_s", lambda device: 1.0)
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
def test_a_wrong_provider_gets_no_number(wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(
        kernel_timing, "GATE_ROWS", 4
    )  # of 8, so that others have no upstream gradient
    result = _measured(_case("rms_norm, all"), ours=lambda implementation: wrong)
    assert result["providers"]["ours"].keys() == {"reason"}
    assert message in result["providers"]["ours"]["reason"]
    assert result["providers"]["eager"]["call_us"] > 0  # the others go on
    kernels.show(result)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "  ours " in line]
    assert f"no numbers: {result['providers']['ours']['reason']}" in line


def test_peers_may_round_more_but_ours_may_not():
    def coarse(x, weight):
        y = F.rms_norm(x, weight.shape, weight, 1e-6)
        return y + (y * 2**-7).detach()  # two roundings of bfloat16

    case, peers = _case("rms_norm, dx only"), {"liger": _peer(coarse)}
    result = _measured(case, ours=lambda implementation: coarse, peers=peers)
    assert "gate is red: y" in result["providers"]["ours"]["reason"]
    assert result["providers"]["liger"]["call_us"] > 0


@pytest.mark.parametrize("wrong", ["", "mask", "rate"])
def test_the_gate_follows_the_mask_of_a_dropout(wrong):
    def dropped(x, residual, weight, bias, return_sum=False):
        kept = torch.rand_like(x) >= (0.5 if wrong == "rate" else DROPOUT)
        other = torch.rand_like(x) >= DROPOUT if wrong == "mask" else kept
        scale = 1 / (1 - DROPOUT)
        forward, backward = x * kept * scale, x * other * scale
        h = (forward - backward).detach() + backward + residual
        y = F.layer_norm(h, weight.shape, weight, bias, EPS)
        return (y, h) if return_sum else y

    case = _case("layer_norm, dropout and residual, all")
    entry = _measured(case, ours=lambda implementation: dropped)["providers"]["ours"]
    red = {"mask": "gate is red: dx", "rate": "gate is red: dropout keeps"}
    assert "call_us" in entry if not wrong else red[wrong] in entry["reason"]


def test_floors():
    """In activations: what any implementation has to move."""
    by_name = {operation.name: operation for operation in kernel_operations.operations()}
    shape = kernel_operations.Shape(8, 64)

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
    loss = kernel_operations.Shape(8, 64, 16)
    assert kernel_operations.floor_flop(("hidden",), loss) == 2 * 2 * 8 * 64 * 16
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
def gpu(monkeypatch):
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
    monkeypatch.setattr(kernel_timing, "IMPLEMENTATION", "reference")
    monkeypatch.setattr(kernel_timing, "WARM_UP_S", 0.0)
    return kernel_timing.Machine(torch.device("cpu"), 10.0, 1.0, 2048, torch.ones(8)), cuda


def test_the_gpu_form_on_stand_ins(gpu, capsys):
    machine, cuda = gpu
    result = kernels.measure(_case("rms_norm, dx only"), machine, rounds=3)
    # x and its upstream gradient are 8 * 64 * 2 bytes each, four times L2 is 8 KiB
    assert (result["sets"], result["calls"]) == (4, kernel_timing.CALLS)
    for name in ("eager", "compile", "ours"):
        entry = result["providers"][name]
        assert entry["timed_by"] == "graph" and "not_captured" not in entry
        assert entry["kernel_us"] > 0 and entry["hot_us"] > 0 and entry["call_us"] > 0
        assert math.isclose(entry["gb_per_s"], result["floor_bytes"] / entry["kernel_us"] / 1e3)
        assert math.isclose(entry["share_of_ceiling"], entry["gb_per_s"] / 10)
    assert result["floor_bytes"] == 5 * 8 * 64 * 2
    replays = [call for call in cuda.mock_calls if call[0] == "CUDAGraph().replay"]
    assert len(replays) == 3 * 2 * 3  # providers, graphs, rounds

    result = kernels.measure(_case("linear_cross_entropy, all"), machine, rounds=3)
    entry = result["providers"]["ours"]
    assert entry["extra_bytes"] == 1000 and "hot_us" not in entry and result["sets"] == 1
    assert math.isclose(entry["tflop_per_s"], result["floor_flop"] / entry["kernel_us"] / 1e6)
    kernels.show(result)
    assert " of ceiling)  call " in capsys.readouterr().out
    head, _, row = kernels.table({"results": [result]}).splitlines()
    assert head == "| kernels (us) | eager | compile | ours | GB/s | of ceiling | call |"
    assert row.startswith("| linear_cross_entropy, all, 8 x 64 x 256 bfloat16 | ")


def test_what_waits_for_the_device_is_timed_by_events(gpu):
    machine, cuda = gpu

    def waiting(x, weight):
        modes = [call.args[0] for call in cuda.set_sync_debug_mode.call_args_list]
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return F.rms_norm(x, weight.shape, weight, EPS)

    case = _case("rms_norm, dx only")
    peers = {"liger": _peer(waiting, computes=("x", "weight"))}
    result = kernels.measure(_with(case, peers=peers), machine, rounds=1)
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


def test_what_a_backward_overwrites_is_put_back(gpu):
    machine, _ = gpu
    seen = set()

    def watching(x, weight):
        seen.add(x.detach().abs().sum().item())
        return ops.rms_norm(x, weight, EPS)

    case = _case("rms_norm, dx only")
    peers = {"liger": _peer(lambda x, weight: _Spoils.apply(x, weight), overwrites=True)}
    case = _with(case, peers=peers, ours=lambda implementation: watching)
    result = kernels.measure(case, machine, rounds=2)
    assert result["providers"]["liger"]["call_us"] > 0
    assert "errors" in result["providers"]["ours"]
    assert len(seen) == result["sets"] and 0 not in seen


def _result(times: dict[str, float], demand: str = "dx only", **more) -> dict:
    entries = {name: {"kernel_us": time} for name, time in times.items()}
    result = dict(operation="rms_norm", demand=demand, demanded=["x"], shape=[8, 64], dtype="bf16")
    return result | {"providers": entries} | more


def test_verdicts():
    good = _result({"eager": 20.0, "liger": 15.0, "ours": 10.0})
    good["providers"]["liger"]["undemanded"] = ["weight"]
    first, liger, *loss = kernels.verdicts([good])
    assert first.met and liger.met and "1.500 over 1 cases, +36.4%" in liger.found
    assert all(verdict.met is None for verdict in loss)
    slow = _result({"eager": 9.0, "ours": 10.0}, demand="all")
    first = kernels.verdicts([good, slow])[0]
    assert first.met is False and "0.900 (rms_norm, all, 8 x 64 bf16, eager)" in first.found
    assert "missed in 1 of 3" in first.found and str(first).startswith("NOT met")
    loss = _result({"eager": 12.0, "compile": 10.0, "ours": 10.0}, operation="linear_cross_entropy")
    loss["providers"]["eager"]["extra_bytes"], loss["providers"]["ours"]["extra_bytes"] = 70, 10
    *_, eager, compiled, memory, _ = kernels.verdicts([loss])
    assert eager.met and compiled.met and memory.met is False and "-12.5%" in memory.found
