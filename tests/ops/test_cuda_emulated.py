"""The CUDA kernels without a GPU: compiled by g++ against an emulation of the runtime.

support/cuda_emulation/cuda_runtime.h says what is emulated. The checks are the tests that the
kernels have on a GPU. One process has room for one `_C`, so the functions
named check_* run in one of their own, with the emulated `_C` in the place of the real one
(tests/support/own_process.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

EMULATED = "PROGTUNING_EMULATED"  # environment variable of the process of the check_*
if EMULATED in os.environ:  # before progtuning_kernels looks for its `_C`
    spec = importlib.util.spec_from_file_location("progtuning_kernels._C", os.environ[EMULATED])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

# E402: they import `_C`
import test_gpu_masked_update  # noqa: E402
import test_masked_norm  # noqa: E402

from progtuning_kernels import backend  # noqa: E402
from progtuning_kernels.ops.masked_update import grad_decision, native  # noqa: E402
from progtuning_kernels.ops.masked_update.bucket import (  # noqa: E402
    Bucket,
    Gradients,
    Hyper,
    Step,
    chunk_table,
)
from progtuning_kernels.optim import MaskedOptimizer  # noqa: E402

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "csrc"
LAUNCH = re.compile(r"(\w+(?:<[^;{}]*?>)?)<<<([^;]*?)>>>\(([^;]*?)\);")
# As setup.py where bits depend on it; a vector at an address that no GPU takes ends the process.
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-ffp-contract=off", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
FLAGS += ["-DPROGTUNING_ONE_ISA", "-DPROGTUNING_CUDA", '-DPROGTUNING_CUDA_ARCHS="emulated"']
# of the tests on a GPU: take too long
left_out = re.compile("1048579|several_blocks|graph.*449|449.*graph")


class EmulatedGpu:
    """Tensors stay on the CPU; kernels get their addresses."""

    name, implementation = "cpu", "native"

    def bucket(self, *args, **options) -> Bucket:
        bucket = Bucket(*args, implementation="native", **options)
        bucket.implementation = backend.Implementation("native", update, decide=native.decide)
        bucket.tables = native.tables_on_cuda(bucket)
        return bucket

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        extension = backend.native_extension()
        sizes = [t.numel() for t in tensors]
        partials = torch.full((extension.masked_norm_chunks(sizes),), math.nan)
        out = torch.full((), math.nan)
        extension.masked_norm_cuda(
            [t.data_ptr() for t in tensors],
            sizes,
            backend.dtype_code(tensors[0].dtype),
            partials.data_ptr(),
            len(partials),
            out.data_ptr(),
            0,
        )
        return out

    def chunks(self, bucket: Bucket) -> Tensor:
        return native.tables_of(bucket).norm_chunks

    def sums(self, *args) -> None:
        test_gpu_masked_update.sums("native", 0, *args)

    def decided(self, *args) -> None:
        test_gpu_masked_update.decided("native", 0, *args)

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        return step  # a capture runs nothing either


def update(bucket: Bucket, gradients: Gradients, hypers: Sequence[Hyper], step: Step) -> None:
    """As masked_update's own on cuda."""
    arguments = native.launch_arguments(bucket, hypers, step)
    backend.native_extension().masked_update_cuda(
        bucket.tables.for_update(), gradients.addresses, *arguments, 0
    )
    assert bucket.tables.ticket == 0


GPU = EmulatedGpu()


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch):
    """In the place of the GPU, for the tests of other files."""
    random_list = test_masked_norm.random_list

    def norm(tensors: Sequence[Tensor], *, implementation: str) -> Tensor:
        assert implementation == "native"
        return GPU.norm(tensors)

    def list_on_gpu(sizes, dtype=torch.float32, device=GPU.name) -> list[Tensor]:
        return random_list(sizes, dtype, GPU.name)

    def tables_of(bucket: Bucket) -> native.Tables:
        if bucket.tables is None or bucket.tables.chunks is None:
            bucket.tables = native.tables_on_cuda(bucket)
        return bucket.tables

    def control_on(optimizer: MaskedOptimizer, device: torch.device) -> Tensor:
        if optimizer._control is None:
            optimizer._control = torch.zeros(4)
        return optimizer._control

    monkeypatch.setattr(backend, "cuda_stream", lambda device: 0)
    monkeypatch.setattr(grad_decision, "_decided_on_device", lambda buckets: True)
    monkeypatch.setattr(native, "tables_of", tables_of)
    monkeypatch.setattr(MaskedOptimizer, "_control_on", control_on)
    monkeypatch.setattr(test_gpu_masked_update, "GPU", GPU)
    monkeypatch.setattr(test_masked_norm, "masked_norm", norm)
    monkeypatch.setattr(test_masked_norm, "random_list", list_on_gpu)


globals().update(
    (name.replace("test_", "check_", 1), test)
    for name, test in vars(test_gpu_masked_update).items()
    if name.startswith("test_") and name != "test_runs_on_the_current_stream"
)


@pytest.mark.parametrize("dtype", test_masked_norm.KERNEL_DTYPES, ids=str)
def check_norm(dtype):
    test_masked_norm.test_cuda_accuracy("native", dtype)
    test_masked_norm.test_cuda_alignment_does_not_change_the_bits("native", dtype)


@pytest.mark.parametrize("count", [1, 447, 448, 449, 897])
def check_norm_of_lists_longer_than_one_launch(count):
    test_masked_norm.test_cuda_lists_longer_than_one_launch("native", count)


@pytest.mark.parametrize("moments", [torch.float32, torch.int8], ids=str)
def check_the_size_of_a_chunk_does_not_change_the_bits(moments):
    state, hypers = test_gpu_masked_update.State, test_gpu_masked_update.HYPERS
    before = state.random((torch.float32, moments, ""), [9001, 16_385])
    expected = before.on_gpu()
    expected.bucket().update(expected.grads, hypers)
    for elements in (1024, 3072, 16_384):
        found = before.on_gpu()
        bucket = found.bucket()
        chunks = chunk_table(bucket, elements)
        bucket.tables = bucket.tables._replace(chunks=chunks, chunk_elements=elements)
        bucket.update(found.grads, hypers)
        test_gpu_masked_update.assert_same(expected, found)


def source_for_the_cpu(path: Path) -> str:
    text = path.read_text()
    launches = text.count("<<<")
    text, found = LAUNCH.subn(r"emulation::launch(\2, [&] { \1(\3); });", text)
    assert found == launches, f"{path.name}: {launches} launches, {found} of them understood"
    return text


def own_process(folder: Path) -> dict[str, str]:
    """Builds `_C` with the emulated kernels; the environment that puts it in."""
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("no g++")
    sanitizer = subprocess.run(
        [cxx, "-print-file-name=libubsan.so"], capture_output=True, text=True
    )
    if not Path(sanitizer.stdout.strip()).is_absolute():
        pytest.skip("g++ without its sanitizers (libubsan)")
    pybind11 = pytest.importorskip("pybind11")
    kernels = []
    for path in CSRC.glob("*.cu"):
        kernels.append(folder / f"{path.name}.cpp")
        kernels[-1].write_text(source_for_the_cpu(path))
    sources = [*CSRC.glob("*.cpp"), TESTS / "support" / "cuda_emulation" / "emulator.cpp", *kernels]
    sources.sort(key=lambda source: source.name != "module.cpp")  # first what takes longest
    included = [TESTS / "support" / "cuda_emulation", CSRC, pybind11.get_include()]
    included += [sysconfig.get_path("include")]
    includes = [f"-I{include}" for include in included]

    def run(*command: str | Path) -> None:
        done = subprocess.run([cxx, *FLAGS, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compiled(source: Path) -> Path:
        run(*includes, "-c", source, "-o", folder / f"{source.stem}.o")
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "_C.so"
    run("-shared", *objects, "-o", library)
    return {EMULATED: str(library)}
