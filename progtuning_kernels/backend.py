"""THE place where an implementation is chosen, and where the reasons against the others are kept.

An op (`progtuning_kernels/ops/`, one file each) registers its implementations; `select` asks them
in the order native, triton, reference and takes the first that gives no reason against running on
the tensors at hand. `implementation=` or the environment variable PROGTUNING_BACKEND forces one; a
forced implementation that cannot run raises, with its reason.

Importing this module never fails and never prints: the extension and Triton are looked for when
first asked about, and what stands in their way is kept as text.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Before `_C`, always: both then share the libgomp that torch brings, where the names match.
import torch
from torch import Tensor

from .text_table import text_table

PREFERENCE = ("native", "triton", "reference")
ENVIRONMENT_VARIABLE = "PROGTUNING_BACKEND"


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Args:
        name: "native", "triton" or "reference".
        function: runs the op; may assume that the op's contract checks have passed.
        reason_against: why `function` cannot run on these tensors, in one line; None if it can.
            Asked once per call of the op, so it looks at as few tensors as it can.
    """

    name: str
    function: Callable[..., Any]
    reason_against: Callable[[Any], str | None]


def _small_tensor(device: torch.device) -> Sequence[Tensor]:
    return [torch.zeros(8, dtype=torch.float32, device=device)]


@dataclass(frozen=True)
class Op:
    """An op and its implementations in order of preference.

    Args:
        name: as in `torch.ops.progtuning`.
        implementations: at most one of each name, ordered as `PREFERENCE`.
        probe: tensors of the op's ordinary kind on a device, which `backend_report` asks about.
    """

    name: str
    implementations: tuple[Implementation, ...]
    probe: Callable[[torch.device], Any] = _small_tensor

    def __post_init__(self) -> None:
        names = [implementation.name for implementation in self.implementations]
        if names != [name for name in PREFERENCE if name in names]:
            raise ValueError(f"{self.name}: implementations {names} are not in order {PREFERENCE}")


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Makes an op known to `backend_report`; returns it."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    OPS[op.name] = op
    return op


def select(op: Op, tensors: Any, implementation: str | None = None) -> Implementation:
    """The implementation that `op` uses for `tensors`.

    Args:
        op: a registered op.
        tensors: what the op is about to run on, its contract already checked: a list of tensors,
            or what the op makes of them.
        implementation: force this one; None or "auto" leaves the choice to PROGTUNING_BACKEND, and
            without it to the order of preference.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: the forced implementation, or every one, cannot run; says why.
    """
    forced, who = implementation, "implementation"
    if forced in (None, "auto"):
        forced, who = os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    if forced in (None, "", "auto"):
        reasons = []
        for candidate in op.implementations:
            reason = candidate.reason_against(tensors)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        raise RuntimeError(f"{op.name}: no implementation can run: {'; '.join(reasons)}")
    if forced not in PREFERENCE:
        raise ValueError(f"{who}={forced}: choose one of auto, {', '.join(PREFERENCE)}")
    candidate, reason = _find(op, forced, tensors)
    if candidate is None or reason is not None:
        raise RuntimeError(f"{op.name}: {who}={forced} cannot run: {reason}")
    return candidate


def _find(op: Op, name: str, tensors: Any) -> tuple[Implementation | None, str | None]:
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
        return json.loads(Path(__file__).with_name("_build.json").read_text())
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
        return None, "the extension was not built: run `pip install -e .`"
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


def triton_reason(device: torch.device) -> str | None:
    """Why no Triton op can run on tensors of `device`; None if nothing speaks against it."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for {device.type} tensors"
    return _triton_import_reason()


@functools.cache
def _triton_import_reason() -> str | None:
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return f"Triton does not load: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def dtype_code(dtype: torch.dtype) -> int:
    """The code of `dtype` in csrc/launchers.h; KeyError for one that it does not know."""
    return _dtype_codes()[dtype]


@functools.cache
def _dtype_codes() -> dict[torch.dtype, int]:
    return {getattr(torch, name): code for name, code in native_extension().dtype_codes.items()}


def cuda_stream(device: torch.device) -> int:
    """The raw handle of the calling thread's current stream on `device`.

    Read inside the op body, never kept: under graph capture it is the capture stream, in a backward
    hook it is autograd's. 0.1 us, where `torch.cuda.current_stream()` takes about 1 us.
    """
    return torch._C._cuda_getCurrentRawStream(device.index)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes `device` the current one: a raw launch goes to the calling thread's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class ReportRow:
    op: str
    device: str
    implementation: str
    ok: bool
    reason: str | None  # None exactly where ok


@dataclass(frozen=True)
class BackendReport:
    """Every op, device and implementation on this machine; `print` it."""

    rows: tuple[ReportRow, ...]

    def __str__(self) -> str:
        cells = [("op", "device", "implementation", "runs", "because")]
        for row in self.rows:
            runs = "yes" if row.ok else "no"
            cells.append((row.op, row.device, row.implementation, runs, row.reason or ""))
        return "\n".join(text_table(cells, left=range(5)))


def backend_report() -> BackendReport:
    """Which implementations of which ops run here, and why the others do not."""
    rows = []
    for op in OPS.values():
        for device_type in ("cpu", "cuda"):
            for name in PREFERENCE:
                reason = _report_reason(op, torch.device(device_type), name)
                rows.append(ReportRow(op.name, device_type, name, reason is None, reason))
    return BackendReport(tuple(rows))


def _report_reason(op: Op, device: torch.device, name: str) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        return "no CUDA device" if built else "no CUDA device: this torch is a CPU-only build"
    try:
        return _find(op, name, op.probe(device))[1]
    except Exception as error:
        return one_line(error)
