"""A training step with the prefix cache against freezing without it and full training.

    python benchmarks/prefix_cache.py [--output FOLDER]                 # CPU, MiniLM's shape
    python benchmarks/prefix_cache.py --device cuda [--output FOLDER]   # BERT-base, Llama of 1 B
    python benchmarks/prefix_cache.py --table FOLDER                    # the table of the docs

Two thirds of the blocks and the embeddings are frozen, and every batch has come before: the second
epoch of a stage. `step_ms` is forward, backward, clipping, update and `zero_grad`, the device
waited for; `share` is that over full training. Everybody takes the same batch in turn, in one
process. Before any time, losses over an epoch with the cache are compared with those without it.

Prediction, per block FLOPs with a forward of 1, a backward of 2: full training 3, frozen share f
truncated 3 - 2 f = 1.67, cached 3 - 3 f = 1: 0.56 and 0.33 of it, and less than that where frozen
parameters save their part of the update (MiniLM: 18.9 of 22.7 M parameters).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stored_results import store
from torch import nn
from training import PRECISIONS, SHAPES, Work

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, PrefixCache, patch_model
from progtuning_kernels.bench import Batch
from progtuning_kernels.cli.provenance import provenance

Step = Callable[[Batch], float]
ROUNDS, BATCHES = 24, 4
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """A model of `training.SHAPES`, its batches, and how many blocks below the boundary freeze."""

    name: str
    precision: str
    rows: int
    tokens: int
    frozen: int

    @property
    def blocks(self) -> int:
        return SHAPES[self.name].blocks

    def on(self, device: torch.device) -> Work:
        sizes = {"shape": self.name, "rows": self.rows, "tokens": self.tokens}
        plan = {"stages": 1, "batches": BATCHES, "epochs": 2}
        return Work(precision=self.precision, device=device, **sizes, **plan)


WORKLOADS = {
    "cpu": [Workload("MiniLM", "fp32", 32, 64, 4)],
    "cuda": [
        Workload("BERT-base", "bf16", 32, 128, 8),
        Workload("Llama 1 B", "bf16", 4, 2048, 11),
    ],
}


def _caches(device_type: str, folder: str) -> dict[str, PrefixCache]:
    caches = {
        "cached": PrefixCache(4 * GIB, device="cpu"),
        "cached, bf16": PrefixCache(4 * GIB, device="cpu", dtype=torch.bfloat16),
        "cached on disk": PrefixCache(4 * GIB, device="disk", path=folder),
    }
    if device_type == "cuda":
        caches["cached on the GPU"] = PrefixCache(4 * GIB, device="cuda")
    return caches


def _full(workload: Workload, device: torch.device) -> Step:
    model = workload.on(device).model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch: Batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _frozen(workload: Workload, device: torch.device, cache: PrefixCache | None) -> Step:
    model = workload.on(device).model()
    handle = patch_model(model, MilestoneSchedule({0: workload.frozen}), cache=cache)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-5), max_grad_norm=1.0)

    def step(batch: Batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        return loss.item()

    step.handle = handle
    return step


@contextmanager
def _steps(workload: Workload, device: torch.device) -> Iterator[dict[str, Step]]:
    with tempfile.TemporaryDirectory() as folder:
        steps = {"full": _full(workload, device), "truncated": _frozen(workload, device, None)}
        for name, cache in _caches(device.type, folder).items():
            steps[name] = _frozen(workload, device, cache)
        yield steps
        for step in list(steps.values())[1:]:
            step.handle.unpatch()


def measure(workload: Workload, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    batches = workload.on(device).epoch(0)
    with _steps(workload, device) as steps:
        # without dropout above the boundary a second run of it would differ in nothing but this
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(2):  # the first epoch fills the caches, the second reads them
            for i, batch in enumerate(batches):
                for name, step in steps.items():
                    torch.manual_seed(i)
                    losses[name].append(step(batch))
        errors = {name: _largest_difference(losses, name) for name in steps}
        reasons = {}
        for name, step in steps.items():
            if name.startswith("cached"):
                report = step.handle.cache_report()
                limit = 1e-2 if "bf16" in name or device.type == "cuda" else 0.0
                if report.state != "on" or not report.hits or not errors[name] <= limit:
                    summary = f"{report.summary()}; losses differ by {errors[name]:.1e}"
                    reasons[name] = " ".join(summary.split())
        times: dict[str, list[float]] = {name: [] for name in steps if name not in reasons}
        for i in range(rounds):
            for name in times:
                torch.manual_seed(i)
                started = time.perf_counter()
                steps[name](batches[i % BATCHES])
                times[name].append((time.perf_counter() - started) * 1e3)
        rows = []
        for name, step in steps.items():
            rows.append({"workload": workload.name, "provider": name})
            if name in reasons:
                rows[-1]["reason"] = reasons[name]
                continue
            report = step.handle.cache_report() if name.startswith("cached") else None
            ordered = sorted(times[name])
            rows[-1] |= {
                "step_ms": statistics.median(ordered),
                "step_ms_p20": ordered[len(ordered) // 5],
                "step_ms_p80": ordered[4 * len(ordered) // 5],
                "share": statistics.median(ordered) / statistics.median(times["full"]),
                "largest_loss_difference": errors[name] if name != "full" else None,
                "stored_bytes": 0 if report is None else report.nbytes,
                "read_ms_per_row": None if report is None else report.read_ms,
                "prefix_ms_per_row": None if report is None else report.prefix_ms,
            }
    return rows


def _largest_difference(losses: Mapping[str, Sequence[float]], name: str) -> float:
    pairs = zip(losses[name], losses["truncated"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def table(content: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | step (ms) | / full | largest loss difference | stored (MiB) |",
        "|---|---:|---:|---:|---:|",
    ]
    workload = None
    for row in content["rows"]:
        if row["workload"] != workload:
            workload = row["workload"]
            w = content["workloads"][workload]
            lines.append(
                f"| **{workload}, {w['rows']} x {w['tokens']} tokens, {w['frozen']} of "
                f"{w['blocks']} blocks frozen** | | | | |"
            )
        if "reason" in row:
            lines.append(f"| {row['provider']}: {row['reason']} | | | | |")
            continue
        error = row["largest_loss_difference"]
        shown = "" if error is None else "0" if error == 0 else f"{error:.1e}"
        stored = f"{row['stored_bytes'] / 2**20:.1f}" if row["stored_bytes"] else ""
        cells = (row["provider"], f"{row['step_ms']:.0f}", f"{row['share']:.2f}", shown, stored)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", action="append", help="of that name; all without it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, help="write prefix_cache.json into this folder")
    parser.add_argument("--table", type=Path, help="print a stored result, measure nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "prefix_cache.json").read_text())))
        return
    device = torch.device(arguments.device)
    content: dict[str, Any] = {"meta": provenance(device), "workloads": {}, "rows": []}
    for workload in WORKLOADS[device.type]:
        if workload.name not in (arguments.workload or [workload.name]):
            continue
        content["workloads"][workload.name] = {
            name: getattr(workload, name) for name in ("rows", "tokens", "frozen", "blocks")
        } | {"dtype": str(PRECISIONS[workload.precision]), "rounds": arguments.rounds}
        content["rows"] += measure(workload, device, arguments.rounds)
        if arguments.output is not None:
            store(content, arguments.output / "prefix_cache.json")
    print(table(content))


if __name__ == "__main__":
    main()
