"""A kept kernel is the one that Triton would choose, and gets the arguments that Triton would pass.

Nothing is compiled or launched: what Triton would compile is known by its hash.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from progtuning_kernels import backend
from progtuning_kernels.ops import kept_launches
from progtuning_kernels.ops.kept_launches import launch

CPU, GRID = torch.device("cpu"), (3, 2, 1)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
CUDA, AMD = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)


@triton.jit(do_not_specialize=["rows"])
def kernel(x, y, stride, rows, scale, SIZE: tl.constexpr, FLAG: tl.constexpr):
    pass


class Compiled(CompiledKernel):
    """Of a source that Triton would compile."""

    def __init__(self, hash: str, run: Any) -> None:
        self.hash, self._run, self.name = hash, run, "kernel"
        self.src = self.module = self.function = self.packed_metadata = hash

    def __del__(self) -> None:
        pass


class Gpus:
    """Triton's driver of a machine with two GPUs, and what was launched there.

    Attributes:
        launches: grid, stream, hash of the kernel, whether a hook was handed over, arguments.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, 0
        self.launches: list[tuple[Any, ...]] = []

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 70 + device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def compile(self, source: Any, target: Any, options: Any) -> CompiledKernel:
        hash = f"{source.hash()} {options} on {self.device}"

        def run(x, y, z, stream, function, metadata, about, enter, leave, *arguments):
            assert function is metadata is hash
            hooked = [hook is not None for hook in (about, enter, leave)]
            self.launches.append(((x, y, z), stream, hash, any(hooked), arguments))

        return Compiled(hash, run)

    @contextlib.contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index or 0  # a tensor of the CPU's has none
        yield
        self.device = before


@contextlib.contextmanager
def _gpus(target: GPUTarget = CUDA) -> Iterator[Gpus]:
    gpus = Gpus(target)
    kinds = kept_launches._kinds if target is CUDA else kept_launches._kinds_on_amd
    with (
        # since Triton 3.6 at the latest `active` is a property
        mock.patch.object(driver, "_active" if "_active" in vars(driver) else "active", gpus),
        mock.patch.object(triton.compiler, "compile", gpus.compile),
        mock.patch.object(kept_launches, "_tensor_kinds", kinds),
        mock.patch.object(backend, "device_guard", gpus.guard),
    ):
        kernel.device_caches.clear()
        kept_launches.forget()
        try:
            yield gpus
        finally:
            kernel.device_caches.clear()
            kept_launches.forget()


def _both(gpus: Gpus, tensors: Any, numbers: Any, constants: Any) -> tuple[Any, Any]:
    """The launch by Triton, and the last two of ours, of which the second is of a kept kernel."""
    gpus.launches.clear()
    kernel[GRID](*tensors, *numbers, *constants, **OPTIONS)
    for _ in range(2):
        launch(kernel, CPU, GRID, tensors, numbers, constants, OPTIONS)
    by_triton, *ours = [(*about, arguments) for *about, _, arguments in gpus.launches]
    return [by_triton] * 2, ours


MEMORY = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
TENSORS = st.builds(
    lambda dtype, offset: MEMORY[dtype][offset:], st.sampled_from(list(MEMORY)), st.integers(0, 17)
)
EDGES = [sign * (2**bits + i) for bits in (31, 63) for i in (-16, -1, 0, 1, 16) for sign in (1, -1)]
INTEGERS = st.integers(-33, 33) | st.sampled_from([i for i in EDGES if -(2**63) <= i < 2**64])
FLOATS = st.sampled_from([0.0, 1.0, 16.0, 0.3])
CONSTANTS = st.tuples(
    st.sampled_from([16, 64]), st.sampled_from([True, False, "tanh", tl.float32, tl.bfloat16])
)


def test_the_kernel_is_the_one_that_triton_chooses():
    """Kernels of all examples before are kept, so that a wrong one would be found."""
    with _gpus() as gpus:

        @settings(max_examples=400, deadline=None, database=None)
        @given(
            st.tuples(TENSORS, TENSORS | st.none()),
            st.tuples(INTEGERS, INTEGERS, FLOATS | INTEGERS | st.none()),
            CONSTANTS,
        )
        def same(tensors, numbers, constants):
            by_triton, ours = _both(gpus, tensors, numbers, constants)
            assert ours == by_triton
            assert not gpus.launches[-1][3]

        same()
        tensors = (MEMORY[torch.float32], None)
        for equal in itertools.permutations([1, 1.0, True]):
            kept_launches.forget()
            kept_launches._number_kinds.cache_clear()
            for number in equal:
                by_triton, ours = _both(gpus, tensors, (number, 3, number), (16, True))
                assert ours == by_triton


@pytest.mark.unpoisoned
def test_on_amd_a_kernel_for_memory_of_2_gib_is_another():
    memory = torch.empty(2**31 + 64, dtype=torch.uint8)  # nothing is read or written there
    with _gpus(AMD) as gpus:
        hashes = set()
        for x in (torch.zeros(64, dtype=torch.uint8), memory[16:], memory[:64], memory[1:]):
            by_triton, ours = _both(gpus, (x, None), (16, 3, None), (16, True))
            assert ours == by_triton
            hashes.add(ours[0][2])
        assert len(hashes) == 3


def _launched(gpus: Gpus, device: torch.device = CPU) -> tuple[Any, ...]:
    launch(kernel, device, GRID, (MEMORY[torch.float32], None), (16, 3, 0.5), (16, True), OPTIONS)
    return gpus.launches[-1]


def test_a_hook_and_a_setting_of_triton_are_obeyed(monkeypatch):
    with _gpus() as gpus:
        first, kept = _launched(gpus), _launched(gpus)
        assert (first[3], kept[3]) == (True, False) and first[2] == kept[2]

        def hook(metadata):
            pass

        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(hook)
            assert _launched(gpus)[3]
            chain.remove(hook)
            assert not _launched(gpus)[3]
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, "launch_enter_hook", hook)
            assert _launched(gpus)[3]
        for settings_, name, value in (
            (knobs.runtime, "debug", True),
            (knobs.compilation, "instrumentation_mode", "mine"),
        ):
            before = dict(vars(settings_))
            setattr(settings_, name, value)
            assert _launched(gpus)[2] != kept[2], name
            vars(settings_).clear()
            vars(settings_).update(before)
            assert _launched(gpus) == kept
        monkeypatch.setattr(kept_launches, "_KNOWN_TRITON", False)
        kept_launches.forget()
        assert all(_launched(gpus)[3] for _ in range(2))


def test_a_tensor_of_another_gpu_is_launched_there():
    with _gpus() as gpus:
        for _ in range(2):
            for index in (1, 0):
                _, stream, hash, *_ = _launched(gpus, torch.device("cuda", index))
                assert stream == 70 + index and hash.endswith(f"on {index}")
                assert gpus.device == 0
        assert not any(hooked for *_, hooked, _ in gpus.launches[2:])
