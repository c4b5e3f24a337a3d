"""What calls cost is measured once, on a GPU alone, and decides from which size on an op runs.

No test looks at a real clock: see pretend_cuda.py for the GPU that there is none of.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from pretend_cuda import PretendCuda
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import MilestoneSchedule, PatchHandle, patch_model
from progtuning_kernels.freezing import freezer
from progtuning_kernels.swaps import model_swaps
from progtuning_kernels.swaps.call_costs import CallCosts

GPU = torch.device("cuda", 0)


class Machine:
    """On which calls that are timed take as long as told: the op's, its own code's, and so on."""

    def __init__(self, *us: float, bytes_per_us: float = 3e6) -> None:
        self.bytes_per_us, self.reads, self.copies = bytes_per_us, 0, 0
        self._ticks = self._seconds(us)

    def _seconds(self, us: tuple[float, ...]) -> Iterator[float]:
        now = 0.0
        for fastest in itertools.cycle(us):
            for more in (900, 3, 1, 0, 7, 2, 5, 4):
                yield now
                now += (fastest + more) / 1e6
                yield now

    def clock(self) -> float:
        self.reads += 1
        return next(self._ticks)

    def copy_seconds(self, device: torch.device, size: int) -> float:
        self.copies += 1
        return 2 * size / self.bytes_per_us / 1e6

    def costs(self) -> CallCosts:
        return CallCosts(self.clock, self.copy_seconds)


def _nothing() -> None:
    pass


def test_what_an_op_costs_more_is_earned_back_by_three_passes():
    machine = Machine(60, 25, 40, 66, bytes_per_us=3e6)
    costs = machine.costs()
    dearer, cheaper = (costs.cost(name, _nothing, _nothing) for name in ("norm", "other"))
    assert dearer == (60, 25) and cheaper == (40, 66)  # the fastest call counts
    assert costs.from_bytes(cheaper, GPU) == 0 and machine.copies == 0
    assert costs.from_bytes(dearer, GPU) == 35e6
    assert costs.from_bytes(dearer, GPU) == 35e6 and machine.copies == 1
    reads = machine.reads
    assert costs.cost("norm", _nothing, _nothing) == dearer and machine.reads == reads


def test_another_run_decides_by_what_was_measured():
    machine = Machine(60, 25)
    costs = machine.costs()
    assert costs.state_dict() == {}
    size = costs.from_bytes(costs.cost("norm", _nothing, _nothing), GPU)
    state = json.loads(json.dumps(costs.state_dict()))
    other = Machine(10, 90)
    resumed = other.costs()
    resumed.load_state_dict(state)
    assert resumed.from_bytes(resumed.cost("norm", _nothing, _nothing), GPU) == size
    assert (other.reads, other.copies) == (0, 0) and resumed.state_dict() == state
    assert resumed.cost("not of that run", _nothing, _nothing) == (10, 90)
    resumed.load_state_dict({})
    assert resumed.state_dict()["bytes_per_us"] == machine.bytes_per_us


def _patched(model: nn.Module, machine: Machine, **options: Any) -> PatchHandle:
    with mock.patch.object(model_swaps, "CallCosts", machine.costs):
        return patch_model(model, MilestoneSchedule({0: 1}), packing="off", **options)


@contextlib.contextmanager
def _gpu() -> Iterator[PretendCuda]:
    pytest.importorskip("triton")
    from unlaunched_kernels import unlaunched

    with PretendCuda() as pretend, unlaunched(pretend, native=False):
        yield pretend


def _norms(handle: PatchHandle) -> list[str]:
    return [row.because for row in handle.kernel_report().rows if row.kind == "RMSNorm"]


def test_a_run_on_a_gpu_says_the_numbers_and_resumes_with_them():
    with _gpu() as pretend:
        first, second, third = (pretend.put(tiny_model("llama-causal-lm")) for _ in range(3))
        handle = _patched(first, Machine(60, 25))
        said = "from 35.0 MB of its input on: forward and backward take 60 us of CPU time, "
        assert _norms(handle) == [said + "its own code takes 25 us"]
        state = json.loads(json.dumps(handle.state_dict()))
        resumed = _patched(second, Machine(40, 66))
        before = _norms(resumed)
        assert "at any size: forward and backward take 40 us" in before[0]
        old = {name: value for name, value in resumed.state_dict().items() if name != "call_costs"}
        resumed.load_state_dict(old)
        assert _norms(resumed) == before
        resumed.load_state_dict(state)
        assert resumed.kernel_report() == handle.kernel_report()
        assert resumed.state_dict() == state
        batch = pretend.put(tiny_inputs("llama-causal-lm"))
        assert torch.equal(first(**batch).loss, second(**batch).loss)
        at_any_size = _patched(third, Machine(60, 25), kernels="on")
        assert _norms(at_any_size) == ["at any size"]
        assert "call_costs" not in at_any_size.state_dict()


def test_what_is_tried_calls_no_hook_of_the_user():
    class Hook:
        def __init__(self) -> None:
            self.calls, self.lock = 0, threading.Lock()  # which nobody can copy

        def __call__(self, *arguments: Any) -> None:
            self.calls += 1

    hook = Hook()
    with _gpu() as pretend:
        model = pretend.put(tiny_model("llama-causal-lm"))
        for name, module in model.named_modules():
            if name.endswith(("gate_proj", "input_layernorm")):
                module.register_forward_hook(hook)
                module.register_full_backward_hook(hook)
        handle = _patched(model, Machine(40, 66))
        assert hook.calls == 0
        assert all(row.swapped for row in handle.kernel_report().rows)
        model(**pretend.put(tiny_inputs("llama-causal-lm"))).loss.backward()
        assert hook.calls


def test_all_ranks_choose_by_what_the_first_one_has_measured(monkeypatch):
    sent: list[bytes] = []

    class Rank:
        """Of a rank that is not the first: what surrounds its model."""

        sharded, on_several_ranks, ddp, engine = False, True, None, None
        awaits_rebuild = False

        def __init__(self, *arguments: Any) -> None:
            pass

        def holds(self, found: nn.Module) -> bool:
            return True

        def follow(self, **step: int) -> None:
            pass

        def release(self) -> None:
            pass

        def share(self, value: bytes) -> bytes:
            sent.append(value)
            return first_rank

    monkeypatch.setattr(freezer, "Wrapper", Rank)
    with _gpu() as pretend:
        models = [pretend.put(tiny_model("llama-causal-lm")) for _ in range(2)]
        first, other = _patched(models[0], Machine(60, 25)), _patched(models[1], Machine(40, 66))
        first_rank = json.dumps(first.state_dict()["call_costs"]).encode()
        assert other.kernel_report() != first.kernel_report()
        other.attach(models[1])
        batch = pretend.put(tiny_inputs("llama-causal-lm"))
        for _ in range(2):
            models[1](**batch).loss.backward()
            assert other.kernel_report() == first.kernel_report()
        assert len(sent) == 1
    on_cpu = tiny_model("llama-causal-lm")
    handle = _patched(on_cpu, Machine(60, 25))
    handle.attach(on_cpu)
    on_cpu(**tiny_inputs("llama-causal-lm")).loss.backward()
    assert len(sent) == 1


@pytest.mark.parametrize("kernels", ["auto", "on"])
def test_on_a_cpu_nothing_is_measured(kernels):
    machine, model = Machine(60, 25), tiny_model("llama-causal-lm")
    handle = _patched(model, machine, kernels=kernels)
    model(**tiny_inputs("llama-causal-lm")).loss.backward()
    assert (machine.reads, machine.copies) == (0, 0)
    assert "call_costs" not in handle.state_dict()
