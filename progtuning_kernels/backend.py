"""Chooses the implementation that an op runs, and keeps the reasons against the others.

An op (`progtuning_kernels/ops/`, a folder each) registers its implementations; `select` asks them
in the order native, triton, reference and takes the first that gives no reason against running on
the tensors at hand. The environment variable PROGTUNING_BACKEND is asked first where the op has it.
`implementation=` forces one: if that cannot run, it raises with the reason.

Importing this module never fails and never prints: it looks for the extension and Triton when they
are first asked about, and keeps as text why they do not load. On a GPU Triton also has to have run
a kernel (`triton_trial.py`) before an op may choose it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Before `_C`, always: both then share the libgomp that torch brings, where the names match.
import torch
from torch import Tensor

PREFERENCE = ("native", "triton", "reference")
ENVIRONMENT_VARIABLE = "PROGTUNING_BACKEND"
# Why an implementation cannot run on an op's tensors, in one line; None if it can.
Reason = Callable[[Any], str | None]


@dataclass(frozen=True)
class Implementation:
    """One way to run an op, and what else it can do for it. Callers never ask for its name.

    Args:
        name: "native", "triton" or "reference".
        function: runs the op; may assume that the op's contract checks have passed.
        reason_against: why `function` cannot run on these tensors, in one line; None if it can.
            Asked once per call of the op, so it looks at as few tensors as it can.
        backward: the demanded gradients (activation).
        scale: multiplies gradients that are formed already (linear_cross_entropy).
        gradient_norm: of a bucket's gradients where they lie (masked_update).
        decide: clipping and skipping on the device, in two launches (masked_update).
    """

    name: str
    function: Callable[..., Any]
    reason_against: Reason = lambda tensors: None
    backward: Callable[..., Any] | None = None
    scale: Callable[..., Any] | None = None
    gradient_norm: Callable[..., Any] | None = None
    decide: Callable[..., Any] | None = None


def _small_tensor(device: torch.device) -> Sequence[Tensor]:
    return [torch.zeros(8, dtype=torch.float32, device=device)]


@dataclass(frozen=True)
class Op:
    """An op and its implementations in order of preference.

    Args:
        name: as in `torch.ops.progtuning`.
        implementations: at most one of each name, ordered as `PREFERENCE`.
        probe: tensors of the op's ordinary kind on a device, which `ops/report.py` asks about.
    """

    name: str
    implementations: tuple[Implementation, ...]
    probe: Callable[[torch.device], Any] = _small_tensor

    def __post_init__(self) -> None:
        names = [implementation.name for implementation in self.implementations]
        if names != [name for name in PREFERENCE if name in names]:
            raise ValueError(f"{self.name}: implementations {names} are not in order {PREFERENCE}")

    @property
    def reference(self) -> Implementation:
        """The last one: plain torch, which runs anywhere."""
        return self.implementations[-1]


OPS: dict[str, Op] = {}
passed_over: dict[str, str] = {}  # op -> why PROGTUNING_BACKEND's choice did not run it last
# index of a GPU -> why Triton's kernels do not run there; None where one has run in this process
triton_trials: dict[int, str | None] = {}
_trial_under_way = threading.Lock()


def register(op: Op) -> Op:
    """Make an op known to `ops/report.py`, and return it."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    OPS[op.name] = op
    return op


def select(op: Op, tensors: Any, implementation: str | None = None) -> Implementation:
    """The implementation that `op` uses for `tensors`; the reference in code that is compiled.

    Args:
        op: a registered op.
        tensors: what the op is about to run on, its contract already checked: a list of tensors,
            or what the op makes of them.
        implementation: force this one; None or "auto" leaves the choice to PROGTUNING_BACKEND,
            where that one can run, and else to the order of preference.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: the forced implementation, or every one, cannot run; says why.
    """
    forced = None if implementation in (None, "auto") else implementation
    if torch.compiler.is_compiling():  # which fuses plain torch, and cannot look into a kernel
        if forced not in (None, "reference"):
            raise RuntimeError(f"{op.name}: implementation={forced} cannot run in compiled code")
        return op.reference
    wanted = (os.environ.get(ENVIRONMENT_VARIABLE) or "auto") if forced is None else forced
    if wanted != "auto":
        if wanted not in PREFERENCE:
            who = ENVIRONMENT_VARIABLE if forced is None else "implementation"
            raise ValueError(f"{who}={wanted}: choose one of auto, {', '.join(PREFERENCE)}")
        candidate, reason = find(op, wanted, tensors)
        if reason is None:
            return candidate
        if forced is not None:
            raise RuntimeError(f"{op.name}: implementation={forced} cannot run: {reason}")
        passed_over[op.name] = reason
    reasons = []
    for candidate in op.implementations:
        reason = candidate.reason_against(tensors)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise RuntimeError(f"{op.name}: no implementation can run: {'; '.join(reasons)}")


def find(op: Op, name: str, tensors: Any) -> tuple[Implementation | None, str | None]:
    """The implementation of that name, if there is one, and why it cannot run, or None."""
    for candidate in op.implementations:
        if candidate.name == name:
            return candidate, candidate.reason_against(tensors)
    return None, f"{op.name} has no {name} implementation"


def native_extension() -> ModuleType | None:
    """`progtuning_kernels._C`, or None; `native_reason` says why."""
    return _load_native()[0]


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build of `_C`; empty where it never ran."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@functools.cache
def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
    except Exception as error:
        record = build_record()
        if record.get("native"):
            return None, f"the extension does not load: {one_line(error)}"
        if "reason" in record:
            return None, f"the extension was not built: {record['reason']}"
        return None, "the extension was not built: run `pip install -e .` in the clone"
    return _C, None


def native_reason(device: torch.device) -> str | None:
    """Why no native op can run on tensors of `device`; None if nothing speaks against it."""
    extension, reason = _load_native()
    if extension is None:
        return reason
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _native_cuda_reason(device.index or 0)
    return f"no native kernels for {device.type} tensors"


@functools.cache
def _native_cuda_reason(index: int) -> str | None:
    extension, _ = _load_native()
    if torch.version.hip is not None:
        return "no native kernels for AMD GPUs"
    if not extension.cuda_built:
        why = build_record().get("cuda_reason") or "no record of the reason"
        return f"the extension was built without CUDA: {why}"
    try:
        # torch may drive the GPU through an older runtime than ours, which needs a newer driver.
        extension.cuda_device_count()
        capability = torch.cuda.get_device_capability(index)
    except Exception as error:
        return one_line(error)
    oldest = min(int(arch.partition("_")[2]) for arch in extension.cuda_archs.split())
    if capability[0] * 10 + capability[1] < oldest:
        return f"the kernels need sm_{oldest}, this GPU is sm_{capability[0]}{capability[1]}"
    return None


def triton_reason(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why no Triton op can run on tensors of `device` and dtypes; None if nothing is against it."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for {device.type} tensors"
    if torch.float64 in dtypes:
        return "no Triton kernel for torch.float64"
    reason = _triton_import_reason()
    if reason is None and device.type == "cuda":
        return _triton_launch_reason(device)
    return reason


def _triton_launch_reason(device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index in triton_trials:
        return triton_trials[index]
    # A trial allocates and waits for the device, which would end the capture.
    with device_guard(torch.device("cuda", index)):
        if torch.cuda.is_current_stream_capturing():
            return f"no Triton kernel has run on cuda:{index} before this capture of a CUDA graph"
    with _trial_under_way:
        if index not in triton_trials:
            # A thread of its own has none of the caller's modes, streams, autocast or autograd.
            with ThreadPoolExecutor(1) as thread:
                trial = thread.submit(_run_trial, index)
            try:
                triton_trials[index] = trial.result()
            except torch.OutOfMemoryError as error:  # says nothing about Triton: tried again
                return one_line(error)
    return triton_trials[index]


def _run_trial(index: int) -> str | None:
    device = torch.device("cuda", index)
    try:
        trial = importlib.import_module("progtuning_kernels.triton_trial")
        with device_guard(device):
            reason = trial.reason_against(*_small_tensor(device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = one_line(error)
    return reason and f"a first Triton kernel failed on cuda:{index}: {reason}"


@functools.cache
def _triton_import_reason() -> str | None:
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"Triton does not load: {one_line(error)}"
    return None


def triton_function(package: str, name: str) -> Callable[..., Any]:
    """A function of an op's triton.py, imported when it is called: triton need not be there."""

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{package}.triton"), name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        return found()(*arguments, **keywords)

    return call


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The code of `dtype` in csrc/launchers.h; KeyError for one that it does not know."""
    return native_extension().dtype_codes[str(dtype).removeprefix("torch.")]


def cuda_stream(device: torch.device) -> int:
    """The raw handle of the calling thread's current stream on `device`.

    Read inside the op body, never kept: under graph capture it is the capture stream, in a backward
    hook it is autograd's. 0.1 us, where `torch.cuda.current_stream()` takes about 1 us.
    """
    return torch._C._cuda_getCurrentRawStream(device.index)


def sent(values: Tensor, device: torch.device, kept: list[Tensor] | None = None) -> Tensor:
    """A tensor of the host on `device`, by a copy that the host does not wait for.

    Args:
        kept: while a graph is captured, the host's tensor is added here, because every replay
            copies from it.
    """
    if device.type != "cuda":
        return values.to(device)
    pinned = values.pin_memory()
    if kept is not None and torch.cuda.is_current_stream_capturing():
        kept.append(pinned)
    return pinned.to(device, non_blocking=True)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make `device` the current one: a raw launch goes to the calling thread's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
