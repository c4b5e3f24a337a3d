"""The optimizer's update on the host: ours, DeepSpeed's CPUAdam, torch's fused AdamW.

    python benchmarks/host_update.py [--threads 2] [--output FOLDER]
    python benchmarks/host_update.py --table FOLDER       # the stored numbers in Markdown

Blocks of Llama-3-8B's proportions (grouped-query attention, gated MLP), scaled down by their width;
every way gets gradients of the same values. First the gate: three steps move the weights as AdamW
in float64 does, within what the way's formats allow; a way that does not gets no times. Then steps
in turn, with a copy of a large buffer before each round, in the same process and threads.
`share_of_copy`: the bytes that an update has to read and write over its time, of the bytes that the
copy reads and writes over its. Rivals that are not installed, or do not build, are listed with the
reason. CPUAdam compiles itself when it is first used, which needs g++ and ninja.

torchao's CPUOffloadOptimizer needs a GPU; on the host it runs torch.optim.AdamW(fused=True), one
for every tensor, in the dtype of the model: that is measured here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from stored_results import Verdict, store
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, backend
from progtuning_kernels.cli.provenance import installed_version, provenance
from progtuning_kernels.ops.masked_update.low_precision import with_residual

HYPER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
GATE_STEPS, SAMPLED = 3, 2**18
COPIED = 2**25  # float32
LEAST_SHARE, LEAST_SPEEDUP = 0.7, 1.5
OURS = "MaskedAdamW"
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Built(NamedTuple):
    """An optimizer of its own tensors."""

    gradients: list[Tensor]  # written before a step
    step: Callable[[], object]
    weights: Callable[[], Tensor]  # (SAMPLED,) of the first tensor, as exact as they are kept


@dataclass(frozen=True)
class Way:
    """One optimizer in one set of formats.

    Attributes:
        name: of the optimizer.
        formats: of weights, what is kept beside them, and moments.
        bytes_per_parameter: read and written by one update, gradients included.
        tolerance: of the movement in three steps, relative to that in float64.
        build: from starting values, bfloat16.
    """

    name: str
    formats: str
    bytes_per_parameter: float
    tolerance: float
    build: Callable[[list[Tensor]], Built]


def shapes_of(hidden: int, blocks: int) -> list[tuple[int, ...]]:
    """Of a Llama-3-8B block (4096 wide, keys and values 1024, MLP 14336), scaled to hidden."""
    kv, wide = hidden // 4, hidden * 7 // 2
    block = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    block += [(wide, hidden), (wide, hidden), (hidden, wide), (hidden,), (hidden,)]
    return block * blocks


def _parameters(start: list[Tensor], dtype: torch.dtype) -> list[nn.Parameter]:
    parameters = [nn.Parameter(t.to(dtype, copy=True)) for t in start]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


def _sample(t: Tensor) -> Tensor:
    return t.detach().flatten()[:SAMPLED].double()


def ours(dtype: torch.dtype, **options: Any) -> Callable[[list[Tensor]], Built]:
    def build(start: list[Tensor]) -> Built:
        parameters = _parameters(start, dtype)
        optimizer = MaskedAdamW(parameters, **HYPER, nonfinite="ignore", **options)

        def weights() -> Tensor:
            p, state = parameters[0], optimizer.state[parameters[0]]
            if "residual" in state:
                return _sample(with_residual(p.detach(), state["residual"]))
            return _sample(state.get("master", p))

        return Built([p.grad for p in parameters], optimizer.step, weights)

    return build


def fused(dtype: torch.dtype, *, one_per_tensor: bool = False) -> Callable[[list[Tensor]], Built]:
    def build(start: list[Tensor]) -> Built:
        parameters = _parameters(start, dtype)
        groups = [[p] for p in parameters] if one_per_tensor else [parameters]
        optimizers = [torch.optim.AdamW(group, **HYPER, fused=True) for group in groups]

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        return Built([p.grad for p in parameters], step, lambda: _sample(parameters[0]))

    return build


def cpu_adam(dtype: torch.dtype, *, as_offloaded: bool = False) -> Callable[[list[Tensor]], Built]:
    """`as_offloaded`: with ZeRO-Offload's conversions of gradients and weights."""

    def build(start: list[Tensor]) -> Built:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        # it may bring an OpenMP of its own beside torch's
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(torch.get_num_threads())
        parameters = _parameters(start, dtype)
        optimizer = DeepSpeedCPUAdam(parameters, **HYPER, fp32_optimizer_states=dtype == FLOAT32)
        inner = [p.grad for p in parameters]
        if not as_offloaded:
            return Built(inner, optimizer.step, lambda: _sample(parameters[0]))
        gradients = [torch.zeros_like(g, dtype=BFLOAT16) for g in inner]
        copies = [torch.empty_like(g) for g in gradients]

        def step() -> None:
            torch._foreach_copy_(inner, gradients)
            optimizer.step()
            torch._foreach_copy_(copies, [p.detach() for p in parameters])

        return Built(gradients, step, lambda: _sample(parameters[0]))

    return build


def ways() -> list[Way]:
    # bytes: gradient 2; weights bfloat16 4 (read and written), beside float32 2 + 8, beside
    # residuals 4 + 2; moments 8-bit 4 + 16 / 256, bfloat16 8, float32 16
    found = []
    for kind, moments, moment_bytes, error in (
        ("8bit", "8-bit moments", 4.0625, 0.1),
        (BFLOAT16, "bf16 moments", 8, 0.02),
        (FLOAT32, "fp32 moments", 16, 0.0),
    ):
        for master, weights, weight_bytes, own in (
            (True, "bf16 + fp32 master", 10, 1e-4),
            ("8bit", "bf16 + 8-bit residual", 6, 2e-3),
            (False, "bf16, rounded stochastically", 4, 0.05),
        ):
            options = dict(master_weights=master, stochastic_rounding=not master)
            build = ours(BFLOAT16, state_dtype=kind, **options)
            formats = f"{weights}, {moments}"
            found.append(Way(OURS, formats, 2 + weight_bytes + moment_bytes, error + own, build))
    float32 = "fp32, fp32 moments"
    found.append(Way(OURS, float32, 28, 1e-4, ours(FLOAT32)))
    offloaded = cpu_adam(FLOAT32, as_offloaded=True)
    found.append(Way("CPUAdam", float32, 28, 1e-4, cpu_adam(FLOAT32)))
    found.append(Way("CPUAdam, as ZeRO-Offload runs it", float32, 40, 1e-4, offloaded))
    found.append(Way("CPUAdam", "bf16, bf16 moments", 14, 0.1, cpu_adam(BFLOAT16)))
    found.append(Way("torch fused", float32, 28, 1e-4, fused(FLOAT32)))
    for dtype, formats, count, error in (
        (FLOAT32, float32, 28, 1e-4),
        (BFLOAT16, "bf16, bf16 moments", 14, 0.1),
    ):
        build = fused(dtype, one_per_tensor=True)
        found.append(Way("torchao's offload, host step", formats, count, error, build))
    return found


def exact_movement(start: Tensor, gradients: list[Tensor]) -> Tensor:
    """AdamW in float64, written out."""
    beta1, beta2 = HYPER["betas"]
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        denominator = (v / (1 - beta2**t)).sqrt() + HYPER["eps"]
        p = p * (1 - HYPER["lr"] * HYPER["weight_decay"])
        p -= HYPER["lr"] / (1 - beta1**t) * m / denominator
    return p - start


def gated(way: Way, start: list[Tensor], gradients: list[list[Tensor]]) -> Built:
    """The built optimizer, after the gate's steps; `AssertionError` where it is red."""
    built = way.build(start)
    for given in gradients:
        torch._foreach_copy_(built.gradients, given)
        built.step()
    expected = exact_movement(_sample(start[0]), [_sample(given[0]) for given in gradients])
    error = (built.weights() - _sample(start[0]) - expected).norm() / expected.norm()
    if not error <= way.tolerance:
        raise AssertionError(f"gate is red: moves {error:.1e} off, {way.tolerance:.0e} allowed")
    return built


def measure(hidden: int, blocks: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(hidden, blocks)

    def drawn(scale: float) -> list[Tensor]:
        some = (torch.randn(s, generator=generator) * scale for s in shapes)
        return [t.to(BFLOAT16) for t in some]

    start, gradients = drawn(0.02), [drawn(1e-3) for _ in range(GATE_STEPS)]
    count = sum(t.numel() for t in start)
    built: list[Built | None] = []
    rows: list[dict[str, Any]] = []
    for way in ways():
        row = {"name": way.name, "formats": way.formats, "bytes": way.bytes_per_parameter}
        rows.append(row)
        try:
            built.append(gated(way, start, gradients))
            continue
        except ModuleNotFoundError as error:
            row["reason"] = f"{error.name} is not installed"
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {backend.one_line(error)}"
        built.append(None)
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    copies: list[float] = []
    times: list[list[float]] = [[] for _ in built]
    for _ in track(range(rounds + 1), description=f"{count / 1e6:.1f} M parameters"):
        copies.append(_seconds(lambda: target.copy_(source)))
        for own, seconds in zip(built, times, strict=True):
            if own is not None:
                seconds.append(_seconds(own.step))
    copy = 2 * source.nbytes / statistics.median(copies[1:]) / 1e9
    for row, seconds in zip(rows, times, strict=True):
        if not seconds:
            continue
        low, *_, high = (1e3 * x for x in statistics.quantiles(seconds[1:], n=5))
        row["step_ms"] = 1e3 * statistics.median(seconds[1:])
        row |= {"step_ms_p20": low, "step_ms_p80": high}
        row["gb_per_s"] = row["bytes"] * count / row["step_ms"] / 1e6
        row["share_of_copy"] = row["gb_per_s"] / copy
    return {"parameters": count, "copy_gb_per_s": copy, "rows": rows}


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    measured = [row for row in content["rows"] if "step_ms" in row]
    mine = [row for row in measured if row["name"] == OURS]
    narrow = [row for row in mine if row["formats"].endswith(("8-bit moments", "bf16 moments"))]
    least = min(narrow, key=lambda row: row["share_of_copy"])
    share = least["share_of_copy"]
    found = [
        Verdict(
            f"8-bit and bf16 moments: {LEAST_SHARE} of the copy",
            share >= LEAST_SHARE,
            f"{share:.2f} ({least['formats']})",
        )
    ]
    kept = next((r for r in mine if r["formats"] == "bf16 + 8-bit residual, 8-bit moments"), None)
    for name in ("CPUAdam", "CPUAdam, as ZeRO-Offload runs it", "torchao's offload, host step"):
        rival = [row["step_ms"] for row in measured if row["name"] == name]
        speedup = min(rival) / kept["step_ms"] if rival and kept else math.nan
        met = speedup >= LEAST_SPEEDUP if rival and kept else None
        found.append(Verdict(f"{LEAST_SPEEDUP} x {name}", met, f"{speedup:.2f}"))
    return found


def table(content: Mapping[str, Any]) -> str:
    """Markdown of a stored host_update.json."""
    head = "| | formats | bytes / parameter | step (ms) | GB/s | of the copy | speedup |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|"]
    base = next((r for r in content["rows"] if r["name"] == "CPUAdam" and "step_ms" in r), None)
    for row in content["rows"]:
        if "reason" in row:
            lines.append(f"| {row['name']}: {row['reason']} | {row['formats']} | | | | | |")
            continue
        speedup = "" if base is None else f"{base['step_ms'] / row['step_ms']:.2f}"
        cells = (row["name"], row["formats"], f"{row['bytes']:.4g}", f"{row['step_ms']:.1f}")
        cells += (f"{row['gb_per_s']:.1f}", f"{row['share_of_copy']:.2f}", speedup)
        lines.append(f"| {' | '.join(cells)} |")
    size, threads = content["parameters"] / 1e6, content["threads"]
    copy = f"a copy: {content['copy_gb_per_s']:.1f} GB/s"
    lines += [
        "",
        f"{size:.1f} M parameters, {threads} threads; {copy}; speedup: over CPUAdam in fp32",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width of a block (%(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="write host_update.json into this folder")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="show stored numbers")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "host_update.json").read_text())))
        return
    torch.set_num_threads(arguments.threads)
    meta = provenance(torch.device("cpu"))
    meta["versions"]["deepspeed"] = installed_version("deepspeed")
    found = measure(arguments.hidden, arguments.blocks, arguments.rounds)
    content: dict[str, Any] = {"meta": meta, "threads": arguments.threads, **found}
    print(table(content))
    for verdict in verdicts(content):
        print(verdict)
    if arguments.output is not None:
        store(content, arguments.output / "host_update.json")


if __name__ == "__main__":
    main()
