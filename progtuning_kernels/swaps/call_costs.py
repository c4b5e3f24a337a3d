"""CPU time of a call, which decides from which size of its input on a module runs an op.

In eager mode the CPU's time counts. If an op takes more of it than the module's own code, the op
has to save as much on the GPU: by three passes over the input, at the speed of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

_PASSES = 3  # passes over the input that an op saves in forward and backward
_REPEATS = 8  # the fastest of them counts; a norm takes 1 or 2 ms
_COPIED_BYTES = 128 * 2**20  # more than a GPU's cache holds


class CallCost(NamedTuple):
    """CPU time of one forward and backward of a module, in microseconds.

    Attributes:
        op_us: where the op runs it.
        own_us: of its own code.
    """

    op_us: float
    own_us: float


class CallCosts:
    """Measured once per kind of module, and kept for a resumed run, which then decides alike.

    Args:
        clock: seconds.
        copy_seconds: how long the device takes to copy that many bytes.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        copy_seconds: Callable[[torch.device, int], float] | None = None,
    ) -> None:
        self._clock = clock
        self._copy_seconds = copy_seconds or _seconds_of_copy
        self._calls: dict[str, CallCost] = {}
        self._bytes_per_us: float | None = None

    def cost(self, name: str, op: Callable[[], Any], own: Callable[[], Any]) -> CallCost:
        """The cost for modules of this name, measured at the first call.

        Args:
            op: runs forward and backward of the op. own: those of the module's own code.
        """
        if name not in self._calls:
            self._calls[name] = CallCost(self._fastest_us(op), self._fastest_us(own))
        return self._calls[name]

    def from_bytes(self, cost: CallCost, device: torch.device) -> int:
        """Bytes of its input from which on the op earns back what its calls cost."""
        lost_us = cost.op_us - cost.own_us
        if lost_us <= 0:
            return 0
        if self._bytes_per_us is None:
            moved = 2 * _COPIED_BYTES
            self._bytes_per_us = moved / self._copy_seconds(device, _COPIED_BYTES) / 1e6
        return int(lost_us * self._bytes_per_us / _PASSES)

    def state_dict(self) -> dict[str, Any]:
        """Empty where nothing was measured."""
        state: dict[str, Any] = {}
        if self._calls:
            state["calls"] = {name: list(cost) for name, cost in self._calls.items()}
        if self._bytes_per_us is not None:
            state["bytes_per_us"] = self._bytes_per_us
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another run, or another rank, has measured, and measure the rest."""
        self._calls |= {name: CallCost(*cost) for name, cost in state.get("calls", {}).items()}
        self._bytes_per_us = state.get("bytes_per_us", self._bytes_per_us)

    def _fastest_us(self, call: Callable[[], Any]) -> float:
        times = []
        for _ in range(_REPEATS):
            start = self._clock()
            call()
            times.append(self._clock() - start)
        return round(min(times) * 1e6, 1)


def _seconds_of_copy(device: torch.device, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    with torch.cuda.device(device):
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return min(times)
