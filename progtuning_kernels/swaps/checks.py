"""Compares a swapped forward with the original on random input, and counts the original's cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backend
from .kinds import GATED_MLP, HEAD, Swap, without_hooks

# Of the largest element of the original's result. Ours round once where the original rounds at
# every step, up to eight times, so that the two may differ by a few units of the last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_HEAD_ROWS = 1000  # of a head's vocabulary; the whole may be gigabytes
_ROWS = (3, 11)  # 33 rows divide no block of rows


class _CountKernels(TorchDispatchMode):
    """Counts operations that launch a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func.__name__:
            self.count += 1
        return func(*args, **(kwargs or {}))


def difference(
    module: nn.Module, swap: Swap, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What differs by more than `TOLERANCE` between module and swap, in one line; None: nothing.

    Both run without dropout; gradients of inputs and weights are compared as well.
    """
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        subject = _subject(module, swap)
        inputs = _inputs(swap, device, dtype)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            expected = _results(swap, type(module).forward, subject, inputs)
            found = _results(swap, swap.forward, subject, inputs)
    except Exception as error:
        return f"the check failed: {backend.one_line(error)}"
    finally:
        for m, mode in modes:
            m.training = mode
    for name, original in expected.items():
        swapped = found[name]
        if swapped.dtype != original.dtype or swapped.shape != original.shape:
            return f"{name} is {swapped.dtype} {tuple(swapped.shape)}"
        scale = original.abs().max().double().clamp(min=1e-30)
        error = ((swapped.double() - original.double()).abs().max() / scale).item()
        if not error <= TOLERANCE[dtype]:
            return f"{name} differs by {error:.1e} of its largest element"
    return None


def kernel_calls(module: nn.Module, swap: Swap, device: torch.device, dtype: torch.dtype) -> int:
    """Kernels that the original launches in a forward."""
    subject, inputs = _subject(module, swap).train(), _inputs(swap, device, dtype)
    with apart(device), torch.no_grad(), _CountKernels() as counter:
        type(module).forward(subject, *inputs)
    return counter.count


def calls(
    module: nn.Module, swap: Swap, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of the op, and of the original, in training, to be called `apart`."""
    subject, inputs = _subject(module, swap), _inputs(swap, device, dtype)
    leaves = list(inputs)
    if swap.kind != GATED_MLP:  # whose weights may be gigabytes, and are of no op's gradients
        subject.train()
        leaves += [p for p in subject.parameters() if p.requires_grad]
    upstream = None

    def call(forward: Callable[..., Tensor]) -> None:
        nonlocal upstream
        output = forward(subject, *inputs)
        upstream = torch.ones_like(output) if upstream is None else upstream
        torch.autograd.grad(output, leaves, upstream)

    return lambda: call(swap.forward), lambda: call(type(module).forward)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """With autograd, without autocast, and with random numbers that nobody else misses."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        with torch.autocast(device.type, enabled=False):
            yield


def _subject(module: nn.Module, swap: Swap) -> nn.Module:
    """A copy with random weights, or of an MLP with its own, because they may be gigabytes."""
    if swap.kind == GATED_MLP:
        return without_hooks(module)
    if swap.kind == HEAD:
        rows = min(module.out_features, _HEAD_ROWS)
        bias = module.bias is not None
        # nn.Linear itself would draw weights from the caller's random numbers
        like = {"device": module.weight.device, "dtype": module.weight.dtype}
        twin = nn.utils.skip_init(nn.Linear, module.in_features, rows, bias, **like)
    else:
        shallow = without_hooks(module)  # which are not copied either: a hook may hold a model
        shallow._modules |= {name: nn.Identity() for name in swap.stand_ins}
        twin = copy.deepcopy(shallow)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            draw = torch.rand(
                parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            parameter.copy_(draw - 0.5 if swap.kind == HEAD else draw + 0.5)
            parameter.requires_grad_(True)
    return twin.eval()


def _inputs(swap: Swap, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    draws = [
        torch.randn(*_ROWS, swap.width, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(swap.inputs)
    ]
    return [draw.to(device, dtype).requires_grad_(True) for draw in draws]


def _results(
    swap: Swap, forward: Callable[..., Tensor], subject: nn.Module, inputs: list[Tensor]
) -> dict[str, Tensor]:
    output = forward(subject, *inputs)
    if swap.kind == HEAD:
        rows = output.shape[:-1].numel()
        labels = torch.arange(rows, device=output.device) % output.shape[-1]
        output = F.cross_entropy(output.float().view(rows, -1), labels)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu")
    upstream = upstream.to(output)
    leaves = {f"the gradient of input {i}": x for i, x in enumerate(inputs)}
    for name, parameter in subject.named_parameters():
        if parameter.requires_grad:
            leaves[f"the gradient of {name}"] = parameter
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"the result": output.detach(), **dict(zip(leaves, gradients, strict=True))}
