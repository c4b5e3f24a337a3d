"""Dropout and attention with dropout on a CPU: torch against ours, forward and backward.

    python benchmarks/dropout.py [--output FOLDER]
    python benchmarks/dropout.py --table FOLDER       # the stored numbers in Markdown

First the gate: of dropout, the same elements are dropped from result and gradient, one in ten, and
the others scaled; of attention, results and gradients are torch's where both draw torch's mask.
Then calls in turn, torch's and ours; medians. `saved_bytes`: what a forward keeps for backward, all
of it, what the caller holds anyway included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.progress import track
from stored_results import store
from torch import Tensor

from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.ops import dropout
from progtuning_kernels.swaps import cpu_dropout

P = 0.1
Run = Callable[..., Tensor]


def _hidden(rows: int, tokens: int, width: int) -> tuple[list[Tensor], Run, Run]:
    x = torch.randn(rows, tokens, width, requires_grad=True)
    return [x], lambda x: F.dropout(x, P), lambda x: dropout(x, P)


def _attention(rows: int, heads: int, tokens: int, width: int) -> tuple[list[Tensor], Run, Run]:
    qkv = [torch.randn(rows, heads, tokens, width, requires_grad=True) for _ in range(3)]
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    mask[:, :, :, 3 * tokens // 4 :] = False
    theirs, ours = F.scaled_dot_product_attention, cpu_dropout.attention
    return (
        qkv,
        lambda *qkv: theirs(*qkv, attn_mask=mask, dropout_p=P),
        lambda *qkv: ours(*qkv, attn_mask=mask, dropout_p=P),
    )


WORKLOADS: dict[str, Callable[[], tuple[list[Tensor], Run, Run]]] = {
    "dropout of 32 x 64 x 384 (hidden states of MiniLM)": lambda: _hidden(32, 64, 384),
    "dropout of 16 x 128 x 768 (hidden states of BERT-base)": lambda: _hidden(16, 128, 768),
    "attention, 32 rows, 12 heads, 64 tokens, width 32 (MiniLM)": lambda: _attention(
        32, 12, 64, 32
    ),
    "attention, 16 rows, 12 heads, 128 tokens, width 64 (BERT-base)": lambda: _attention(
        16, 12, 128, 64
    ),
}


def results(run: Run, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    out = run(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def saved_bytes(run: Run, inputs: Sequence[Tensor]) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no address is given twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(*inputs)
    return sum(storages.values())


def _gate_of_dropout(_: Run, ours: Run, inputs: Sequence[Tensor], upstream: Tensor) -> None:
    (x,) = inputs
    out, gradient = results(ours, inputs, upstream)
    kept = out != 0
    spread = (P * (1 - P) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - P)) < 6 * spread, "another share is kept"
    for found, given in ((out, x), (gradient, upstream)):
        torch.testing.assert_close(found, given * kept / (1 - P), rtol=1e-4, atol=0)


def _gate_of_attention(theirs: Run, ours: Run, inputs: Sequence[Tensor], upstream: Tensor) -> None:
    found = []
    with mock.patch.object(cpu_dropout, "dropout", F.dropout):
        for run in (theirs, ours):
            torch.manual_seed(1)
            found.append(results(run, inputs, upstream))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs, theirs, ours = WORKLOADS[name]()
    upstream = torch.randn_like(theirs(*inputs))
    gate = _gate_of_dropout if len(inputs) == 1 else _gate_of_attention
    try:
        gate(theirs, ours, inputs, upstream)
    except AssertionError as error:
        return {"workload": name, "reason": f"gate is red: {error}".splitlines()[0]}
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    for _ in track(range(repeats + 2), description=name):
        for who, run in (("torch", theirs), ("ours", ours)):
            began = time.perf_counter()
            results(run, inputs, upstream)
            times[who].append(1e3 * (time.perf_counter() - began))
    row: dict[str, Any] = {"workload": name}
    for who, run in (("torch", theirs), ("ours", ours)):
        low, *_, high = statistics.quantiles(times[who][2:], n=5)
        row[who] = {
            "call_ms": statistics.median(times[who][2:]),
            "call_ms_p20": low,
            "call_ms_p80": high,
            "saved_bytes": saved_bytes(run, inputs),
        }
    return row


def table(content: dict[str, Any]) -> str:
    lines = ["| | torch (ms) | ours (ms) | speedup | torch saves (MiB) | ours saves (MiB) |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in content["rows"]:
        if "reason" in row:
            lines.append(f"| {row['workload']}: {row['reason']} | | | | | |")
            continue
        torch_ms, ours_ms = row["torch"]["call_ms"], row["ours"]["call_ms"]
        saved = [f"{row[who]['saved_bytes'] / 2**20:.1f}" for who in ("torch", "ours")]
        cells = [f"{torch_ms:.2f}", f"{ours_ms:.2f}", f"{torch_ms / ours_ms:.2f}", *saved]
        lines.append(f"| {row['workload']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write dropout.json into this folder")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="show stored numbers")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "dropout.json").read_text())))
        return
    if (why := cpu_dropout.reason_against()) is not None:
        raise SystemExit(f"nothing to compare: {why}")
    meta = provenance(torch.device("cpu"))
    rows = [measure(name, arguments.repeats) for name in WORKLOADS]
    content = {"meta": meta, "p": P, "rows": rows}
    print(table(content))
    if arguments.output is not None:
        store(content, arguments.output / "dropout.json")


if __name__ == "__main__":
    main()
