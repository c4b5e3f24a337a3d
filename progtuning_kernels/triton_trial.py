"""The first Triton kernel that a process runs on a GPU; `backend.py` says what follows from it.

Only a launch shows whether Triton works: it compiles C code against Python's headers and the GPU's
driver when it is first used, writes files, and needs a ptxas that knows the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def count_kernel(out, SIZE: tl.constexpr):
    positions = tl.arange(0, SIZE)
    tl.store(out + positions, (positions + 1).to(tl.float32))


def reason_against(out: Tensor) -> str | None:
    """Count in a small tensor, and wait for it: why that failed and what helps, or None.

    Args:
        out: (n,) float32 on the current device, n a power of two.
    """
    try:
        count_kernel[1,](out, out.numel(), num_warps=1, enable_fp_fusion=False)
        with _waiting_is_allowed(out):
            found = out.tolist()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _with_cure(error)
    right = found == [float(number) for number in range(1, out.numel() + 1)]
    return None if right else f"its numbers are wrong: {found}"


@contextmanager
def _waiting_is_allowed(out: Tensor) -> Iterator[None]:
    """Whoever has torch raise where the device is waited for means the steps, not this once."""
    if not out.is_cuda:
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _with_cure(error: Exception) -> str:
    """What failed in a first launch, and what helps where that is known, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    what = next((line.strip() for line in lines if "fatal" in line), lines[0])
    compiler = "install a C compiler (gcc)"
    if isinstance(error, subprocess.CalledProcessError):  # its text is the whole command
        program = Path(error.cmd[0]).name
        what = f"{program} ended with status {error.returncode}"
        if Path(sysconfig.get_path("include"), "Python.h").exists():
            cure = f"{program} has printed why"
        else:
            cure = "install Python's headers (python3-dev)"
    elif "C compiler" in what:
        what, cure = "no C compiler", compiler
    elif isinstance(error, FileNotFoundError) and error.filename == os.environ.get("CC"):
        what, cure = f"no C compiler CC={error.filename}", f"{compiler}, or unset CC"
    elif "libcuda.so" in what:
        cure = "run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
    elif "active drivers" in what:
        cure = "install the Triton that this torch names in its requirements"
    elif "gpu-name" in what:
        cure = "install a newer Triton: this one does not know the GPU"
    elif isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        cure = "set TRITON_CACHE_DIR to a folder with room that can be written to"
    else:
        return what
    return f"{what}; {cure}"
