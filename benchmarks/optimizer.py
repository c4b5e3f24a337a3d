"""MaskedAdamW against torch's AdamW and FlashOptim: interleaved in one process, parity first.

    python benchmarks/optimizer.py [--output FOLDER]                 # CPU, MiniLM's tensors
    python benchmarks/optimizer.py --device cuda [--output FOLDER]   # BERT-base, 100 M, 1 G too
    python benchmarks/optimizer.py --table FOLDER                    # the table of the docs

A step is what a training loop pays for: clipping, update and `zero_grad`. `step_ms` is the time of
the call, the device waited for; on CUDA `kernel_ms` is the time of one of 20 steps replayed from a
graph, without the CPU. Bandwidth is shown beside that of a copy in the same process. Who moves
parameters elsewhere than the baseline, or cannot run here, gets a reason instead of times.

Prediction, bytes per parameter. fp32: an update reads p, g, m, v and writes p, m, v: 28. torch's
clipping adds 12 (the norm reads g, the scaling reads and writes it), ours 4: at most 40 / 32 =
1.25 x faster, or 36 / 32 against someone who gives torch's fused kernel the coefficient. Without
clipping 1.0, and 28 / 32 = 0.88 where non-finite gradients are looked for, which torch does not do.
An update takes 20 bytes with bf16 moments, 16.1 with 8-bit ones; with bf16 parameters 22, 14, 10.1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stored_results import WORDS, store
from torch import nn

from progtuning_kernels import MaskedAdamW, backend
from progtuning_kernels.cli.provenance import installed_version, provenance

ROUNDS, WARM_UP, GRAPH_STEPS = 30, 5, 20
PARITY_STEPS, PARITY_ELEMENTS = 3, 20_000_000
COPIED = {"cuda": 2**28, "cpu": 2**25}  # float32: 1 GiB, 128 MiB
HYPER = dict(lr=1e-3, weight_decay=0.1)
CLIP = 1e-2  # below the gradients' norm: it does clip


def transformer(vocabulary: int, width: int, blocks: int, positions: int) -> list[tuple[int, ...]]:
    attention = [(width, width), (width,)] * 4
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    embeddings = [(vocabulary, width), (positions, width), (2, width), (width,), (width,)]
    return [*embeddings, *[*attention, *mlp, *[(width,)] * 4] * blocks]


WORKLOADS = {
    "MiniLM, 101 tensors": transformer(30522, 384, 6, 512),
    "BERT-base, 199 tensors": [*transformer(30522, 768, 12, 512), (768, 768), (768,)],
    "100 M, 10 tensors": [(10_000_000,)] * 10,
    "1 G, 10 tensors": [(100_000_000,)] * 10,
}


@dataclass(frozen=True)
class Provider:
    """One way to make the step.

    Args:
        build: parameters, clip -> the step.
        bytes_per_parameter: without clipping; `clip_bytes` come on top with it.
        tolerance: of the movement, RMS, against the baseline's.
        most_parameters: what fits beside the others in a GPU's memory.
    """

    build: Callable[[list[nn.Parameter], float | None], Callable[[], None]]
    bytes_per_parameter: float
    clip_bytes: float
    tolerance: float = 1e-3
    most_parameters: float = math.inf


def _clipping_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None
) -> Callable[[], None]:
    """Clipping by torch, then the update."""

    def step() -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchs(**options: Any) -> Callable[..., Callable[[], None]]:
    def build(parameters: list[nn.Parameter], clip: float | None) -> Callable[[], None]:
        capturable = parameters[0].is_cuda  # else it could not be captured in a graph
        optimizer = torch.optim.AdamW(parameters, **HYPER, **options, capturable=capturable)
        return _clipping_step(optimizer, parameters, clip)

    return build


def torchs_with_coefficient(
    parameters: list[nn.Parameter], clip: float | None
) -> Callable[[], None]:
    """What someone writes who knows that the fused kernel divides by `grad_scale` on its way."""
    optimizer = torch.optim.AdamW(parameters, **HYPER, fused=True, capturable=parameters[0].is_cuda)
    optimizer.found_inf = None

    def step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def masked(**options: Any) -> Callable[..., Callable[[], None]]:
    def build(parameters: list[nn.Parameter], clip: float | None) -> Callable[[], None]:
        optimizer = MaskedAdamW(parameters, **HYPER, **options, max_grad_norm=clip)

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def masked_in_triton(**options: Any) -> Callable[..., Callable[[], None]]:
    """As where the extension has no CUDA kernels; raises if something else runs."""

    def build(parameters: list[nn.Parameter], clip: float | None) -> Callable[[], None]:
        step = masked(**options)(parameters, clip)

        def step_in_triton() -> None:
            backend.passed_over.pop("masked_update", None)  # of another device
            with mock.patch.dict(os.environ, {backend.ENVIRONMENT_VARIABLE: "triton"}):
                step()
            if (why := backend.passed_over.get("masked_update")) is not None:
                raise RuntimeError(f"Triton did not run: {why}")

        return step_in_triton

    return build


def flash(**options: Any) -> Callable[..., Callable[[], None]]:
    """FlashOptim's, moments of 8 bits in groups of 32; it launches a kernel per tensor."""

    def build(parameters: list[nn.Parameter], clip: float | None) -> Callable[[], None]:
        from flashoptim import FlashAdamW

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parameters without more bits are fragile
            optimizer = FlashAdamW(parameters, **HYPER, **options)
        return _clipping_step(optimizer, parameters, clip)

    return build


@dataclass(frozen=True)
class Case:
    """Providers that are measured against each other, the first one the baseline."""

    title: str
    clip: float | None
    providers: dict[str, Provider]
    dtype: torch.dtype = torch.float32
    targets: dict[str, float] = field(default_factory=dict)  # provider: least baseline / provider


def cases(device: torch.device) -> list[Case]:
    gpu = device.type == "cuda"
    fused = Provider(torchs(fused=True), 28, 12)
    ignore = dict(nonfinite="ignore")
    ours = Provider(masked(**ignore), 28, 4)
    clipping = {
        "torch fused": fused,
        "torch fused, grad_scale": Provider(torchs_with_coefficient, 28, 8),
        "MaskedAdamW": Provider(masked(), 28, 4),
    }
    plain = {
        "torch fused": fused,
        "MaskedAdamW": ours,
        "MaskedAdamW, skips non-finite": Provider(masked(), 32, 0),
    }
    eight_bit = dict(state_dtype="8bit", **ignore)
    moments = {
        "fp32": ours,
        "bf16": Provider(masked(state_dtype=torch.bfloat16, **ignore), 20, 4, 0.05),
        "8-bit": Provider(masked(**eight_bit), 16.1, 4, 0.3),
    }
    low = dict(stochastic_rounding=True, **ignore)
    low_8_bit = dict(state_dtype="8bit", **low)
    low_moments = {
        "fp32": Provider(masked(**low), 22, 2, 0.3),
        "bf16": Provider(masked(state_dtype=torch.bfloat16, **low), 14, 2, 0.3),
        "8-bit": Provider(masked(**low_8_bit), 10.1, 2, 0.3),
    }
    if gpu:
        clipping["MaskedAdamW, Triton"] = Provider(masked_in_triton(), 28, 4)
        clipping["torch foreach"] = Provider(torchs(foreach=True), 52, 12, most_parameters=5e8)
        plain["MaskedAdamW, Triton"] = Provider(masked_in_triton(**ignore), 28, 4)
        moments["8-bit, Triton"] = Provider(masked_in_triton(**eight_bit), 16.1, 4, 0.3)
        # a scale of 16 bits for 32 elements of each moment is read and written
        moments["FlashOptim 8-bit"] = Provider(flash(master_weight_bits=None), 16.25, 12, 0.3)
        low_moments["8-bit, Triton"] = Provider(masked_in_triton(**low_8_bit), 10.1, 2, 0.3)
        nearest, more_bits = flash(master_weight_bits=None), flash(master_weight_bits=24)
        low_moments["FlashOptim 8-bit, rounded to nearest"] = Provider(nearest, 10.25, 6, 0.3)
        low_moments["FlashOptim 8-bit, 24-bit parameters"] = Provider(more_bits, 12.25, 6, 0.3)
    return [
        Case("with clipping", CLIP, clipping, targets={"MaskedAdamW": 1.15}),
        Case("without clipping", None, plain, targets={"MaskedAdamW": 1.0}),
        Case("moments of fp32 parameters", None, moments, targets={"bf16": 1.0, "8-bit": 1.0}),
        Case(
            "moments of bf16 parameters, rounded stochastically",
            None,
            low_moments,
            torch.bfloat16,
            {"8-bit": 1.6} if gpu else {},  # 2.18 by bytes, 2.0 predicted for an H200
        ),
    ]


class Run:
    """A provider with parameters of its own; the gradients' values are the same for all."""

    def __init__(self, provider: Provider, case: Case, gradients: list[torch.Tensor]) -> None:
        generator = torch.Generator(gradients[0].device).manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.empty_like(g).normal_(0, 0.02, generator=generator))
            for g in gradients
        ]
        self.gradients = gradients
        self.used = [g.clone() for g in gradients]  # clipping scales in place
        self.provider = provider
        self.step = provider.build(self.parameters, case.clip)
        self.times_ms: list[float] = []

    def give_gradients(self) -> None:
        torch._foreach_copy_(self.used, self.gradients)
        for p, gradient in zip(self.parameters, self.used, strict=True):
            p.grad = gradient

    def sample(self) -> torch.Tensor:
        """The first parameters, 20 M elements or one tensor, in fp32."""
        taken, count = [], 0
        for p in self.parameters:
            taken.append(p.detach().float().flatten())
            count += p.numel()
            if count >= PARITY_ELEMENTS:
                break
        return torch.cat(taken)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {backend.one_line(error)}"


def movement(run: Run) -> torch.Tensor:
    """Of the sample, in three steps."""
    before = run.sample()
    for _ in range(PARITY_STEPS):
        run.give_gradients()
        run.step()
    return run.sample() - before


def checked_runs(
    case: Case, gradients: list[torch.Tensor]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Runs that have moved parameters where the baseline has; of the others the reasons."""
    runs, reasons, expected = {}, {}, None
    count = sum(g.numel() for g in gradients)
    for name, provider in case.providers.items():
        if count > provider.most_parameters:
            reasons[name] = "does not fit beside the others"
            continue
        try:
            run = Run(provider, case, gradients)
            moved = movement(run)
        except Exception as error:
            if expected is None:
                raise
            reasons[name] = reason(error)
            wait(gradients[0].device)  # raises if the device is lost
            continue
        expected = moved if expected is None else expected
        error = (moved - expected).norm() / expected.norm()
        if error <= provider.tolerance:
            runs[name] = run
        else:
            reasons[name] = f"parity is red: moves {error:.1e} off {next(iter(case.providers))}"
    return runs, reasons


def kernel_ms(run: Run, device: torch.device) -> float | None:
    """Time of one of 20 steps in a graph: the kernels without the CPU that launches them."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_STEPS):
            for p, gradient in zip(run.parameters, run.used, strict=True):
                p.grad = gradient
            run.step()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / GRAPH_STEPS)
    return statistics.median(times)


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by `copy_`."""
    count = COPIED[device.type]
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    best = float("inf")
    for _ in range(15):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 4 * count / best / 1e9


def measure(case: Case, workload: str, device: torch.device, copy: float) -> dict[str, Any]:
    shapes = WORKLOADS[workload]
    count = sum(torch.Size(s).numel() for s in shapes)
    generator = torch.Generator(device).manual_seed(1)
    gradients = [
        torch.empty(s, device=device, dtype=case.dtype).normal_(0, 1e-3, generator=generator)
        for s in shapes
    ]
    runs, reasons = checked_runs(case, gradients)
    baseline = next(iter(runs))
    for i in range(WARM_UP + ROUNDS):
        for run in runs.values():
            run.give_gradients()
            wait(device)
            started = time.perf_counter()
            run.step()
            wait(device)
            if i >= WARM_UP:
                run.times_ms.append((time.perf_counter() - started) * 1e3)
    result: dict[str, Any] = {
        "case": case.title,
        "workload": workload,
        "parameters": count,
        "dtype": str(case.dtype).removeprefix("torch."),
        "max_grad_norm": case.clip,
        "providers": {},
    }
    for name in case.providers:
        target = {"target_speedup": case.targets[name]} if name in case.targets else {}
        if name in reasons:
            result["providers"][name] = {"reason": reasons[name]} | target
            continue
        run = runs[name]
        low, *_, high = statistics.quantiles(run.times_ms, n=5)
        provider = run.provider
        per_parameter = provider.bytes_per_parameter
        per_parameter += 0 if case.clip is None else provider.clip_bytes
        entry = {
            "step_ms": statistics.median(run.times_ms),
            "step_ms_p20": low,
            "step_ms_p80": high,
            "bytes_per_parameter": per_parameter,
        }
        try:
            if (kernels := kernel_ms(run, device)) is not None:
                entry["kernel_ms"] = kernels
        except Exception as error:
            entry["not_captured"] = backend.one_line(error)
            wait(device)
        fastest = entry.get("kernel_ms", entry["step_ms"])
        entry["gb_per_s"] = per_parameter * count / fastest / 1e6
        entry["share_of_copy"] = entry["gb_per_s"] / copy
        entry["speedup"] = result["providers"].get(baseline, entry)["step_ms"] / entry["step_ms"]
        result["providers"][name] = entry | target
    return result


def show(result: dict[str, Any]) -> None:
    size = f"{result['parameters'] / 1e6:.1f} M {result['dtype']}"
    print(f"\n{result['workload']} ({size}), {result['case']}")
    for name, entry in result["providers"].items():
        if "reason" in entry:
            print(f"  {name:40} no times: {entry['reason']}")
            continue
        kernels = f"  kernels {entry['kernel_ms']:7.3f} ms" if "kernel_ms" in entry else ""
        target = ""
        if "target_speedup" in entry:
            verdict = WORDS[entry["speedup"] >= entry["target_speedup"]]
            target = f"  target {entry['target_speedup']:.2f}: {verdict}"
        print(
            f"  {name:40} {entry['step_ms']:8.3f} ms{kernels}  {entry['gb_per_s']:7.1f} GB/s "
            f"({entry['share_of_copy']:.2f} of copy)  x {entry['speedup']:.2f}{target}"
        )


def table(content: dict[str, Any]) -> str:
    """Markdown of a stored optimizer.json."""
    lines = ["| | step (ms) | bytes / parameter | GB/s | speedup |", "|---|---:|---:|---:|---:|"]
    for result in content["results"]:
        size = f"{result['parameters'] / 1e6:.1f} M {result['dtype']}"
        lines.append(f"| **{result['workload']}, {size}, {result['case']}** | | | | |")
        for name, entry in result["providers"].items():
            if "reason" in entry:
                lines.append(f"| {name}: {entry['reason']} | | | | |")
                continue
            cells = (
                f"{entry['step_ms']:.2f}",
                f"{entry['bytes_per_parameter']:.4g}",
                f"{entry['gb_per_s']:.0f}",
                f"{entry['speedup']:.2f}",
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def workloads_of(device: torch.device) -> list[str]:
    """In order of importance, for runs on a budget; on a CPU one."""
    smallest, *others = WORKLOADS
    return [*others, smallest] if device.type == "cuda" else [smallest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no case after it")
    parser.add_argument("--output", type=Path, help="write optimizer.json into this folder")
    parser.add_argument("--table", type=Path, help="print the table of this folder's results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "optimizer.json").read_text())))
        return
    began, device = time.monotonic(), torch.device(arguments.device)
    chosen = [
        (workload, case)
        for workload in arguments.workload or workloads_of(device)
        for case in cases(device)
    ]
    copy = copy_gb_per_s(device)
    print(f"copy: {copy:.1f} GB/s")
    meta = provenance(device)
    if device.type == "cuda":
        meta["versions"]["flashoptim"] = installed_version("flashoptim")
    content: dict[str, Any] = {"meta": meta, "copy_gb_per_s": copy, "results": []}
    content |= {"failed": {}, "not_reached": []}
    for workload, case in chosen:
        title = f"{workload}, {case.title}"
        if time.monotonic() - began > arguments.budget_s:
            content["not_reached"].append(title)
            continue
        try:
            content["results"].append(measure(case, workload, device, copy))
            show(content["results"][-1])
        except Exception as error:  # of the tensors, or of the baseline
            content["failed"][title] = reason(error)
            print(f"\n{title}: {content['failed'][title]}")
            wait(device)  # raises if the device is lost
        if arguments.output is not None:  # as it goes: a run cut short leaves what it has
            store(content, arguments.output / "optimizer.json")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if content["not_reached"]:
        print(f"\nout of budget: {len(content['not_reached'])} of {len(chosen)} cases not reached")
    if content["failed"]:
        raise SystemExit(f"{len(content['failed'])} of {len(chosen)} cases have no times")


if __name__ == "__main__":
    main()
