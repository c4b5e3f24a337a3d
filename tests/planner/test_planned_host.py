"""State on the host: bytes that are kept and moved, as planned and as counted in a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.freezing.freezer import Freezer
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.optim.masked_adamw import STATE_DTYPES
from progtuning_kernels.planner.host_plan import HostRates
from progtuning_kernels.planner.meta_step import meta_copy
from progtuning_kernels.planner.stage_meter import Options, StageMeter

BFLOAT16 = torch.bfloat16


class Ledger:
    """Copies between a "device" and a "host" that are both this CPU, and their bytes.

    Args:
        takes_norms: norms are taken on the device, not of gradients that wait on the host.
    """

    def __init__(self, *, takes_norms: bool) -> None:
        self._takes_norms = takes_norms
        self._under_way: list[list[Tensor]] = []  # gradients that the device cannot give up yet
        self.most_under_way_bytes = 0
        self.to_host_bytes = self.to_device_bytes = 0
        self._memory: list[weakref.ref[Tensor]] = []

    def is_away(self, t: Tensor) -> bool:
        return isinstance(t, nn.Parameter) or (not t.ndim and self._takes_norms)

    def memory_like(self, t: Tensor) -> Tensor:
        memory = torch.empty_like(t, device="cpu")
        self._memory.append(weakref.ref(memory))
        return memory

    @property
    def memory_bytes(self) -> int:
        """Of what is alive, without numbers."""
        return sum(t.nbytes for ref in self._memory if (t := ref()) is not None and t.ndim)

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        self.to_host_bytes += self._copy(pairs)
        gradients = [t for _, t in pairs if t.ndim and not isinstance(t, nn.Parameter)]
        self._under_way.append(gradients)
        under_way = sum(t.nbytes for some in self._under_way for t in [*some])
        self.most_under_way_bytes = max(self.most_under_way_bytes, under_way)
        return gradients.clear  # another thread calls it

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.to_device_bytes += self._copy(pairs)

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> int:
        for target, source in pairs:
            target.copy_(source)
        return sum(source.nbytes for _, source in pairs)

    def follow_device(self) -> None:
        pass

    def join(self) -> None:
        pass


def model_of(dtype: torch.dtype) -> nn.Module:
    model = tiny_model("llama-causal-lm")
    # matrices of 4,832 elements, whose moments have 8 bits, and gradients of 302 bytes
    model.config.intermediate_size, model.config.mlp_bias = 151, True
    torch.manual_seed(0)
    return type(model)(model.config).to(dtype)


def planned_stages(dtype: torch.dtype, **options: Any) -> list[SimpleNamespace]:
    model, device = meta_copy(model_of(dtype), dtype), torch.device("cuda")
    layout = find_layout(model)
    freezer = Freezer(model, layout, tied="frozen", frozen_mode="eval")
    rates = HostRates(25e9, 40e9)
    planned = Options(cache=None, device=device, host=rates, **options)
    meter = StageMeter(model, layout, freezer, {}, planned)
    plans = (SCHEDULE.plan(step, layout.num_blocks) for step in range(0, 8, 2))
    return [SimpleNamespace(**meter.bytes_without_a_step(plan)) for plan in plans]


SCHEDULE = ProgressiveSchedule(4, 8)
PREVIOUS = {"in_backward": True, "max_grad_norm": 1.0, "clip_mode": "previous_norm"}
EXACT = {"max_grad_norm": 1.0}


@pytest.mark.parametrize(
    ("dtype", "moments", "options"),
    [
        (torch.float32, "fp32", {}),
        (torch.float32, "bf16", PREVIOUS),
        (BFLOAT16, "8bit", PREVIOUS),
        (BFLOAT16, "8bit", EXACT),
        (BFLOAT16, "8bit", EXACT | {"in_backward": True}),
        (BFLOAT16, "fp32", {"in_backward": True, "master_weights": True}),
        (BFLOAT16, "8bit", PREVIOUS | {"master_weights": True}),
        (BFLOAT16, "8bit", PREVIOUS | {"master_weights": "8bit"}),
    ],
)
def test_the_ledger_of_every_stage_is_that_of_the_plan(dtype, moments, options):
    in_backward, waits = "in_backward" in options, options == EXACT | {"in_backward": True}
    stages = planned_stages(
        dtype,
        optimizer={"fp32": "adamw"}.get(moments, f"adamw-{moments}"),
        master_weights=options.get("master_weights", False),
        in_backward=in_backward,
        clip_mode="exact" if waits else None,
    )
    model = model_of(dtype)
    handle = patch_model(model, SCHEDULE, kernels="off", packing="off")
    optimizer = MaskedAdamW(
        handle.param_groups(), state_dtype=STATE_DTYPES[moments], state_device="cpu", **options
    )
    optimizer._host.copies = ledger = Ledger(takes_norms=not waits)
    inputs = tiny_inputs("llama-causal-lm")
    for stage in stages:
        for _ in range(2):  # the first of a run sends the weights, too
            ledger.to_host_bytes = ledger.to_device_bytes = ledger.most_under_way_bytes = 0
            model(**inputs).loss.backward()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            counted = {
                "state_bytes": sum(t.nbytes for s in optimizer.state.values() for t in s.values()),
                "to_host_bytes": ledger.to_host_bytes,
                "to_device_bytes": ledger.to_device_bytes,
            }
            memory_bytes, report = ledger.memory_bytes, optimizer.host_report()
            handle.advance()
        host = stage.host
        assert counted == {name: getattr(host, name) for name in counted}
        assert memory_bytes == host.weight_bytes + host.staging_bytes
        assert (report.weight_bytes, report.staging_bytes) == (
            host.weight_bytes,
            host.staging_bytes,
        )
        assert gradients == (0 if in_backward else stage.gradient_bytes)
        assert 0 < ledger.most_under_way_bytes <= stage.gradient_bytes
        assert stage.weight_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert stage.state_bytes == 0
