"""Triton is chosen on a GPU only after one of its kernels ran there; no GPU is needed for this.

A stand-in takes the place of Triton's driver: it has the kernel compiled for sm_90, and its
launcher counts in the tensor on the CPU as the kernel would, or fails as Triton's own does.
"""

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from progtuning_kernels import backend, ops
from progtuning_kernels.backend import Op, select
from progtuning_kernels.cli import doctor

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter asks no driver"
)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Launcher:
    """Counts in the tensor that a launch is handed."""

    launches = 0

    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        type(self).launches += 1
        (out,) = (argument for argument in arguments if isinstance(argument, torch.Tensor))
        out.copy_(torch.arange(1, out.numel() + 1))


class Utils:
    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, *arguments):
        pass


class Driver:
    utils = Utils()
    architecture = 90

    def __init__(self):
        self.launcher_cls = type("Counting", (Launcher,), {})

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)


class SaysCuda(torch.Tensor):
    """On the CPU, and says that it is on a GPU."""

    device = FIRST


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The stand-in, in a process that has tried nothing yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    monkeypatch.setattr(backend, "triton_trials", {})
    monkeypatch.setattr(backend, "passed_over", {})
    monkeypatch.setattr(backend, "device_guard", lambda device: nullcontext())
    monkeypatch.setattr(backend, "_small_tensor", lambda device: [torch.zeros(8)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    from progtuning_kernels import triton_trial

    triton_trial.count_kernel.device_caches.clear()
    stand_in = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    yield stand_in
    triton_trial.count_kernel.device_caches.clear()


def _gelu():
    return select(backend.OPS["gelu"], [torch.zeros(8).as_subclass(SaysCuda)])


def test_one_kernel_runs_for_each_gpu(driver):
    for _ in range(3):
        assert _gelu().name == "triton"
        assert backend.triton_reason(SECOND, torch.bfloat16) is None
    assert driver.launcher_cls.launches == 2
    assert backend.triton_trials == {0: None, 1: None}
    assert "float64" in backend.triton_reason(FIRST, torch.float64)


def without_a_compiler(*arguments):
    """What CudaUtils does in Triton 3.9, and every launcher in 3.6, where PATH has no compiler."""
    from triton.runtime import build

    if hasattr(build, "_find_compiler"):
        build._find_compiler.cache_clear()
    build.compile_module_from_src("int x;", "stand_in")


def test_without_a_c_compiler_the_reference_runs_and_everybody_says_why(driver, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    driver.launcher_cls.__call__ = without_a_compiler
    reason = "a first Triton kernel failed on cuda:0: no C compiler; install a C compiler (gcc)"
    assert backend.triton_reason(FIRST) == reason
    assert _gelu().name == "reference"
    x = torch.randn(8).as_subclass(SaysCuda)
    assert torch.equal(torch.Tensor(ops.gelu(x)), torch.nn.functional.gelu(torch.Tensor(x)))
    with pytest.raises(RuntimeError, match="implementation=triton cannot run: a first Triton"):
        ops.gelu(x, implementation="triton")
    monkeypatch.setenv("PROGTUNING_BACKEND", "triton")
    assert _gelu().name == "reference" and backend.passed_over == {"gelu": reason}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gelu = Op("gelu", backend.OPS["gelu"].implementations, lambda device: [x])
    monkeypatch.setattr(backend, "OPS", {"gelu": gelu})
    rows = {(r.device, r.implementation): r.reason for r in ops.backend_report().rows}
    assert rows["cuda", "triton"] == reason and rows["cuda", "reference"] is None
    assert doctor._triton_in_words(FIRST).endswith(reason)
    assert f"Triton: {reason}" in doctor._advice(FIRST)


def test_wrong_numbers_are_a_reason(driver):
    driver.launcher_cls.__call__ = lambda *arguments: None
    assert "its numbers are wrong: [0.0, 0.0" in backend.triton_reason(FIRST)


def test_a_gpu_that_ptxas_does_not_know_is_a_reason(driver, capfd):
    driver.architecture = 77
    reason = backend.triton_reason(FIRST)
    assert "sm_77" in reason and reason.endswith("a newer Triton: this one does not know the GPU")
    assert "\n" not in reason


def _failed(command):
    return subprocess.CalledProcessError(1, [command, "driver.c", "-O3", "-o", "cuda_utils.so"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "/no/cc"), "no C compiler CC=/no/cc; "),
        (_failed("/usr/bin/gcc"), "gcc ended with status 1; "),
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "found!; run ldconfig as"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "the Triton that this"),
        (PermissionError(13, "Permission denied", "/home/.triton"), "; set TRITON_CACHE_DIR"),
        (RuntimeError("Triton Error [CUDA]: invalid image\nlong"), "[CUDA]: invalid image"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_what_failed_is_one_line_with_what_helps(driver, monkeypatch, error, reason):
    def fail(*arguments):
        raise error

    monkeypatch.setenv("CC", "/no/cc")
    driver.launcher_cls.__call__ = fail
    found = backend.triton_reason(FIRST)
    assert reason in found and "\n" not in found
    assert found.startswith("a first Triton kernel failed on cuda:0: ")


def test_missing_headers_of_python_are_named(driver, monkeypatch):
    from progtuning_kernels import triton_trial

    monkeypatch.setattr(triton_trial.sysconfig, "get_path", lambda name: "/nonexistent")
    assert triton_trial._with_cure(_failed("cc")).endswith("Python's headers (python3-dev)")


def test_a_full_gpu_says_nothing_about_triton(driver, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patched:
        patched.setattr(backend, "_small_tensor", full)
        assert "out of memory" in backend.triton_reason(FIRST)
    assert backend.triton_reason(FIRST) is None


def test_nothing_is_launched_in_a_capture(driver, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert _gelu().name == "reference"
        assert "before this capture" in backend.triton_reason(FIRST)
    assert driver.launcher_cls.launches == 0
    assert _gelu().name == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _gelu().name == "triton" and driver.launcher_cls.launches == 1


def test_nothing_is_launched_where_code_is_compiled(driver, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _gelu().name == "reference" and driver.launcher_cls.launches == 0


def test_threads_that_ask_at_once_share_one_trial(driver):
    barrier = threading.Barrier(4)

    def ask(_):
        barrier.wait(10)
        return backend.triton_reason(FIRST)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [None] * 4
    assert driver.launcher_cls.launches == 1


def test_modes_of_the_caller_do_not_reach_the_trial(driver):
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} was called under the mode")

    with Refuses(), torch.inference_mode():
        assert backend.triton_reason(FIRST) is None


def test_backward_may_be_the_first_to_ask(driver):
    x = torch.zeros(3, requires_grad=True)
    x.register_hook(lambda grad: found.append(backend.triton_reason(FIRST)))
    found = []
    x.sum().backward()
    assert found == [None]
