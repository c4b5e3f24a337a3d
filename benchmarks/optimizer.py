"""MaskedAdamW against torch's fused AdamW: interleaved in one process, parity before any time.

    python benchmarks/optimizer.py [--output FOLDER]

Prediction, bytes per fp32 parameter: update 28, norm 4, in-place clip 8. With clipping torch moves
40 and a masked step 28 + 4 + 4 (torch's fused kernel writes the divided gradient back) = 36, so at
most 1.11 x faster; without clipping both move 28 and the ratio is 1; with the default
nonfinite="skip" and no clipping the norm pass makes it 28 / 32 = 0.88.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from progtuning_kernels import MaskedAdamW
from progtuning_kernels.cli.provenance import provenance

ROUNDS, WARM_UP = 30, 5
HYPER = dict(lr=1e-3, weight_decay=0.1)
# MiniLM: embeddings, and 6 blocks of 4 + 2 matrices with biases and norms: 22.7 M in 101 tensors
ATTENTION, MLP = [(384, 384), (384,)] * 4, [(1536, 384), (1536,), (384, 1536), (384,)]
BLOCK = [*ATTENTION, *MLP, *[(384,)] * 4]
SHAPES = [(30522, 384), (512, 384), (2, 384), (384,), (384,), *BLOCK * 6]


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return parameters


def make_steps(
    max_grad_norm: float | None, nonfinite: str
) -> tuple[dict[str, tuple[Callable[[], None], list[nn.Parameter]]], Callable[[], float]]:
    """Step and parameters of both providers, and the largest relative difference between them."""
    theirs, ours = make_parameters(), make_parameters()
    fused = torch.optim.AdamW(theirs, fused=True, **HYPER)
    masked = MaskedAdamW(ours, max_grad_norm=max_grad_norm, nonfinite=nonfinite, **HYPER)

    def torch_step() -> None:
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        fused.step()

    def difference() -> float:
        pairs = zip(theirs, ours, strict=True)
        return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in pairs)

    return {"torch": (torch_step, theirs), "progtuning": (masked.step, ours)}, difference


def measure(max_grad_norm: float | None, nonfinite: str) -> dict:
    steps, difference = make_steps(max_grad_norm, nonfinite)
    gradients = [p.grad.clone() for p in make_parameters()]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + ROUNDS):
        for name, (step, parameters) in steps.items():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad.copy_(gradient)  # clipping scales it in place; each step gets it whole
            started = time.perf_counter()
            step()
            if i >= WARM_UP:
                times[name].append((time.perf_counter() - started) * 1e3)
        if i == 0 and difference() > 1e-5:
            raise SystemExit(f"parity is red: parameters differ by {difference():.1e}, no times")
    result: dict = {"max_grad_norm": max_grad_norm, "nonfinite": nonfinite}
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        result[name] = {
            "step_ms": statistics.median(values),
            "step_ms_p20": low,
            "step_ms_p80": high,
        }
    result["ratio"] = result["torch"]["step_ms"] / result["progtuning"]["step_ms"]
    result["parameters_relative_difference"] = difference()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write optimizer.json into this folder")
    output = parser.parse_args().output
    cases = [(1e-2, "skip"), (None, "ignore"), (None, "skip")]
    results = [measure(*case) for case in cases]
    for r in results:
        clip = "no clipping" if r["max_grad_norm"] is None else "with clipping"
        print(
            f"{clip:13} nonfinite={r['nonfinite']:6}  torch {r['torch']['step_ms']:6.2f} ms  "
            f"progtuning {r['progtuning']['step_ms']:6.2f} ms  ratio {r['ratio']:.2f}"
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"meta": provenance(torch.device("cpu")), "results": results}
        (output / "optimizer.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
