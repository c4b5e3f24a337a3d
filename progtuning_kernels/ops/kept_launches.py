"""Launches Triton's kernels for less CPU time than Triton does.

`kernel[grid](...)` finds out at every call which compiled kernel fits its arguments. That takes
9 us of CPU time, and the compiled kernel's own launcher takes less than 1. `launch` keeps compiled
kernels by all that Triton compiles for, and calls the launcher. Triton itself makes the first
launch with such arguments, and every launch for which a kept kernel could be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .. import backend

# `CompiledKernel.run` takes what `launch` gives it in 3.6 to 3.9; another version launches itself.
_KNOWN_TRITON = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)

_runtime, _compilation = knobs.runtime, knobs.compilation
# key -> launcher, function and metadata of a compiled kernel, and itself: it unloads the function
_kept: dict[Hashable, tuple[Callable[..., None], int, Any, CompiledKernel]] = {}


def launch(
    kernel: JITFunction,
    device: torch.device,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: tuple[int | float | None, ...],
    constants: tuple[Hashable, ...],
    options: Mapping[str, Hashable],
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)` on the current stream of `device`.

    Triton itself launches the first time, in its interpreter, and while a hook for launches or a
    setting of Triton is in force.

    Args:
        device: of the tensors.
        constants: of the kernel's parameters that are `tl.constexpr`, which come last.
    """
    if not _KNOWN_TRITON or type(kernel) is not JITFunction:  # or the interpreter has made it
        with backend.device_guard(device):
            kernel[grid](*tensors, *numbers, *constants, **options)
        return
    active = driver.active
    index = active.get_current_device()
    if device.index is not None and device.index != index:
        with backend.device_guard(device):
            launch(kernel, device, grid, tensors, numbers, constants, options)
        return
    key = (
        *(id(kernel), index, constants, tuple(options.items())),
        *(_number_kinds(numbers, tuple(map(type, numbers))), _tensor_kinds(tensors)),
    )
    by_triton = (
        # a setting, or a hook that is set and not added, is an entry of the instance
        _runtime.__dict__
        or _compilation.__dict__
        or _runtime.launch_enter_hook.calls
        or _runtime.launch_exit_hook.calls
        or kernel.pre_run_hooks
    )
    kept = None if by_triton else _kept.get(key)
    if kept is None:
        compiled = kernel[grid](*tensors, *numbers, *constants, **options)
        if not by_triton and isinstance(compiled, CompiledKernel):
            _kept[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled
        return
    run, function, metadata, _ = kept
    stream = active.get_current_stream(index)
    run(*grid, stream, function, metadata, None, None, None, *tensors, *numbers, *constants)


def forget() -> None:
    """Keep no compiled kernel any longer."""
    _kept.clear()


@functools.lru_cache(maxsize=4096)
def _number_kinds(numbers: tuple[int | float | None, ...], types: tuple[type, ...]) -> Hashable:
    """What Triton compiles for of numbers, or more. types: 1, 1.0 and True are equal keys."""
    return tuple(
        (number == 1, number % 16 == 0, -(2**31) <= number < 2**31, number < 2**63)
        if kind is int
        else kind
        for number, kind in zip(numbers, types, strict=True)
    )


def _kinds(tensors: Sequence[Tensor | None]) -> Hashable:
    """What Triton compiles for of tensors, or more."""
    return tuple([t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])


def _kinds_on_amd(tensors: Sequence[Tensor | None]) -> Hashable:
    """And whether 32 bits address the memory, for which AMD's GPUs have instructions."""
    sizes = [0 if t is None else t.untyped_storage().nbytes() >> 31 for t in tensors]
    return _kinds(tensors), tuple(sizes)


_tensor_kinds = _kinds if torch.version.hip is None else _kinds_on_amd
