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
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, PrefixCache, patch_model
from progtuning_kernels.cli.provenance import provenance

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]
ROUNDS, BATCHES = 24, 4
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """A model's shape and its batches.

    Attributes:
        frozen: blocks below the boundary.
        dtype: of the weights; activations under autocast where it is bfloat16.
    """

    name: str
    kind: str
    width: int
    blocks: int
    heads: int
    inside: int
    vocabulary: int
    rows: int
    tokens: int
    frozen: int
    dtype: torch.dtype = torch.float32

    def model(self, device: torch.device) -> nn.Module:
        """The same weights every time, in training mode."""
        import transformers as hf

        sizes = dict(
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            intermediate_size=self.inside,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(512, self.tokens),
        )
        if self.kind == "llama":
            config = hf.LlamaConfig(**sizes, num_key_value_heads=8, use_cache=False)
            make = hf.LlamaForCausalLM
        else:
            config, make = hf.BertConfig(**sizes), hf.BertForSequenceClassification
        torch.manual_seed(0)
        with device:  # a CPU takes a minute for 1 B random numbers in six models
            return make(config).to(self.dtype).train()

    def batches(self, device: torch.device) -> list[Batch]:
        """Right padding to between half and all of the tokens."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.rows, self.tokens)
        made = []
        for _ in range(BATCHES):
            ids = torch.randint(5, self.vocabulary, shape, generator=generator)
            lengths = torch.randint(self.tokens // 2, self.tokens + 1, (self.rows,))
            lengths[0] = self.tokens
            mask = (torch.arange(self.tokens) < lengths[:, None]).long()
            labels = torch.arange(self.rows) % 2
            if self.kind == "llama":
                labels = ids.masked_fill(mask == 0, -100)
            batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
            made.append({name: tensor.to(device) for name, tensor in batch.items()})
        return made


WORKLOADS = {
    "cpu": [Workload("MiniLM", "bert", 384, 6, 12, 1536, 30522, 32, 64, 4)],
    "cuda": [
        Workload("BERT-base", "bert", 768, 12, 12, 3072, 30522, 32, 128, 8, torch.bfloat16),
        Workload("Llama 1 B", "llama", 2048, 16, 32, 8192, 128256, 4, 2048, 11, torch.bfloat16),
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
    model = workload.model(device)
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
    model = workload.model(device)
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
    batches = workload.batches(device)
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
        } | {"dtype": str(workload.dtype), "rounds": arguments.rounds}
        content["rows"] += measure(workload, device, arguments.rounds)
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            path = arguments.output / "prefix_cache.json"
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
