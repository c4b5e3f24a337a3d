"""State on the host: the same bits as on the device, by copies that are late, and counted."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW

OPTIONS = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


class LateCopies:
    """Copies between a "device" and a "host" that are both this CPU: each runs late, in the order
    of its way, in a thread of that way, and its bytes are counted.
    """

    def __init__(self, on_host: tuple[Tensor, ...] = ()) -> None:
        self.bytes: Counter[str] = Counter()
        self._on_host = set(map(id, on_host))
        self._random = random.Random(1)
        self._ways = {way: ThreadPoolExecutor(1) for way in ("to_host", "to_device")}
        self._returning: list[Future] = []

    def is_away(self, t: Tensor) -> bool:
        return isinstance(t, nn.Parameter) and id(t) not in self._on_host

    def memory_like(self, t: Tensor) -> Tensor:
        return torch.full_like(t, float("nan") if t.is_floating_point() else 255, device="cpu")

    def _later(self, way: str, pairs: list[tuple[Tensor, Tensor]]) -> Future:
        delay_s = self._random.random() * 1e-3

        @torch.no_grad()
        def run() -> None:
            time.sleep(delay_s)
            for target, source in pairs:
                target.copy_(source)
                self.bytes[way] += source.nbytes

        return self._ways[way].submit(run)

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        return self._later("to_host", pairs).result

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._returning.append(self._later("to_device", pairs))

    def follow_device(self) -> None:
        pass

    def join(self) -> None:
        while self._returning:
            self._returning.pop().result()


class Blocks(nn.Module):
    """Three blocks of 4,096 elements, which 8 bits are for, one tensor in another order of memory,
    an odd head, and a tensor without gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.layers[1].weight = nn.Parameter(self.layers[1].weight.detach().t().clone().t())
        self.head = nn.Linear(64, 3)
        self.unused = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    return model(x.to(dtype)).float().square().mean() * 3


def make(dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(1)
    return Blocks().to(dtype)


def on_host(model: nn.Module, parameters: Any = None, **options: Any) -> MaskedAdamW:
    parameters = model.named_parameters() if parameters is None else parameters
    optimizer = MaskedAdamW(parameters, **OPTIONS | options, state_device="cpu")
    optimizer._host.copies = LateCopies()
    return optimizer


def assert_same_state(a: MaskedAdamW, b: MaskedAdamW) -> None:
    saved, other = a.state_dict()["state"], b.state_dict()["state"]
    assert saved.keys() == other.keys()
    for i in saved:
        assert saved[i].keys() == other[i].keys()
        for key, value in saved[i].items():
            assert torch.equal(value, other[i][key]), (i, key)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


BFLOAT16 = torch.bfloat16
EXACT = {"max_grad_norm": 0.5}
PREVIOUS = {"max_grad_norm": 0.5, "clip_mode": "previous_norm", "in_backward": True}
RUNS = [
    (torch.float32, {}),
    (torch.float32, EXACT),
    (torch.float32, {"max_grad_norm": 1e6}),
    (torch.float32, {"nonfinite": "ignore", "zero_grads": True}),
    (torch.float32, {"in_backward": True}),
    (torch.float32, {"in_backward": True, "nonfinite": "ignore"}),
    (torch.float32, PREVIOUS),
    (torch.float32, PREVIOUS | {"clip_mode": "per_block"}),
    (torch.float32, EXACT | {"in_backward": True, "state_dtype": "8bit"}),
    (BFLOAT16, EXACT | {"master_weights": True}),
    (BFLOAT16, EXACT | {"in_backward": True, "state_dtype": "8bit", "stochastic_rounding": True}),
    (BFLOAT16, PREVIOUS | {"state_dtype": BFLOAT16, "stochastic_rounding": True}),
    (BFLOAT16, PREVIOUS | {"state_dtype": "8bit", "master_weights": True}),
    (torch.float64, EXACT),
]


@pytest.mark.parametrize(("dtype", "options"), RUNS)
def test_has_the_bits_of_an_update_on_the_device(dtype, options):
    model, twin = make(dtype), make(dtype)
    moved = on_host(model, seed=3, **options)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS | options, seed=3)
    for step in range(5):
        for m, optimizer in ((model, moved), (twin, stays)):
            m.layers[0].requires_grad_(step not in (2, 3))
            if step == 4:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
            loss_of(m, step).backward()
            optimizer.step()
            if not options.get("zero_grads"):
                optimizer.zero_grad()
        assert_same(model, twin)
        assert_same_state(moved, stays)
        assert (moved.grad_norm is None) == (stays.grad_norm is None)
        assert moved.grad_norm is None or torch.equal(moved.grad_norm, stays.grad_norm)
    assert moved._host.copies.bytes["to_device"] > 0
    assert model.unused.weight not in moved.state
