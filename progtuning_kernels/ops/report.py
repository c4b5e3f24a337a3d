"""`backend_report`: which implementations of the ops run on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import backend
from ..text_table import Table, as_html, as_text


@dataclass(frozen=True)
class ReportRow:
    """Whether one implementation of an op runs on a kind of device.

    Attributes:
        op: name of the op.
        device: "cpu" or "cuda".
        implementation: "native", "triton" or "reference".
        ok: whether it runs.
        reason: why it does not; None exactly where it does.
    """

    op: str
    device: str
    implementation: str
    ok: bool
    reason: str | None


@dataclass(frozen=True)
class BackendReport:
    """Every op, device and implementation on this machine; `print` it.

    Attributes:
        rows: one per op, device and implementation.
        passed_over: op -> why PROGTUNING_BACKEND's choice did not run it when it was called last.
    """

    rows: tuple[ReportRow, ...]
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        cells = [("op", "device", "implementation", "runs", "because")]
        for row in self.rows:
            runs = "yes" if row.ok else "no"
            cells.append((row.op, row.device, row.implementation, runs, row.reason or ""))
        passed_over = (
            f"{op}: not what {backend.ENVIRONMENT_VARIABLE} prefers: {reason}"
            for op, reason in self.passed_over.items()
        )
        return [Table(cells, left=range(5)), *passed_over]


def backend_report() -> BackendReport:
    """Which implementations of which ops run here, and why the others do not."""
    rows = []
    for op in backend.OPS.values():
        for device_type in ("cpu", "cuda"):
            for name in backend.PREFERENCE:
                reason = _report_reason(op, torch.device(device_type), name)
                rows.append(ReportRow(op.name, device_type, name, reason is None, reason))
    return BackendReport(tuple(rows), dict(backend.passed_over))


def _report_reason(op: backend.Op, device: torch.device, name: str) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        return "no CUDA device" if built else "no CUDA device: this torch is a CPU-only build"
    try:
        return backend.find(op, name, op.probe(device))[1]
    except Exception as error:
        return backend.one_line(error)
