"""CPU time of forward and backward of ops, with kept launches and with Triton's own.

    python benchmarks/call_costs.py

Inputs are small, so that nothing waits for a GPU. Where there is none, kernels are compiled for
sm_90 and not launched, and tensors are of the CPU: the driver's time for a launch is missing. The
fastest of many repeats counts. Printed, not stored.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime import driver

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from unlaunched_kernels import StandInDriver  # noqa: E402 - a script's folders, above

from progtuning_kernels import backend  # noqa: E402 - a script's folders, above
from progtuning_kernels.ops import (  # noqa: E402 - a script's folders, above
    bias_gelu,
    geglu,
    gelu,
    kept_launches,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)
from progtuning_kernels.text_table import Table, as_text  # noqa: E402 - a script's folders, above

REPEATS, CALLS = 1000, 10
EPS, WIDTH, CLASSES = 1e-6, 64, 128


@contextlib.contextmanager
def _device() -> Iterator[torch.device]:
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
        return
    stand_in = StandInDriver(lambda source, metadata: lambda *arguments: None)
    with (
        mock.patch.object(driver, "_active" if "_active" in vars(driver) else "active", stand_in),
        mock.patch.object(backend, "triton_reason", lambda device, *dtypes: None),
    ):
        yield torch.device("cpu")


def _fastest_us(call: Callable[[], None]) -> float:
    fastest = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        fastest = min(fastest, (time.perf_counter() - start) / CALLS)
    return fastest * 1e6


def _forward_and_backward(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    upstream = torch.ones_like(run())

    def call() -> None:
        torch.autograd.backward(run(), upstream)
        for leaf in leaves:
            leaf.grad = None

    return call


def _cases(
    device: torch.device,
) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name, tensors that get gradients, the op, and what models compute."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    def own_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * normalised.to(x.dtype)

    x, other = draw(4, 16, WIDTH), draw(4, 16, WIDTH)
    weight, bias, head = draw(WIDTH), draw(WIDTH), draw(CLASSES, WIDTH)
    labels = torch.randint(CLASSES, (4, 16), device=device)
    for kind, w, b in (("", weight, bias), (", frozen", weight.detach(), bias.detach())):
        leaves = [t for t in (x, w, b) if t.requires_grad]
        yield (
            *(f"layer_norm{kind}", leaves, lambda w=w, b=b: layer_norm(x, w, b, EPS)),
            lambda w=w, b=b: F.layer_norm(x, (WIDTH,), w, b, EPS),
        )
        yield (
            *(f"layer_norm of a sum{kind}", [*leaves, other]),
            lambda w=w, b=b: layer_norm(x, w, b, EPS, residual=other),
            lambda w=w, b=b: F.layer_norm(x + other, (WIDTH,), w, b, EPS),
        )
        yield (
            *(f"rms_norm{kind}", leaves[:2], lambda w=w: rms_norm(x, w, EPS)),
            lambda w=w: own_rms_norm(x, w),
        )
    yield "gelu", [x], lambda: gelu(x), lambda: F.gelu(x)
    yield "bias_gelu", [x, bias], lambda: bias_gelu(x, bias), lambda: F.gelu(x + bias)
    yield "swiglu", [x, other], lambda: swiglu(x, other), lambda: F.silu(x) * other
    yield "geglu", [x, other], lambda: geglu(x, other), lambda: F.gelu(x) * other
    yield (
        *("linear_cross_entropy", [x, head], lambda: linear_cross_entropy(x, head, labels)),
        lambda: F.cross_entropy(F.linear(x, head).float().flatten(0, 1), labels.flatten()),
    )


def main() -> None:
    torch.set_num_threads(1)
    rows = [("CPU us, forward + backward", "op", "launched by Triton", "torch")]
    with _device() as device:
        for name, leaves, op, own in _cases(device):
            run_op, run_own = (_forward_and_backward(run, leaves) for run in (op, own))
            times = [_fastest_us(run_op)]
            with mock.patch.object(kept_launches, "_KNOWN_TRITON", False):
                kept_launches.forget()
                times.append(_fastest_us(run_op))
            kept_launches.forget()
            times.append(_fastest_us(run_own))
            rows.append((name, *(f"{us:.0f}" for us in times)))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU, nothing launched"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    print(as_text([Table(rows, left=[0]), f"{where}; {versions}"]))


if __name__ == "__main__":
    main()
