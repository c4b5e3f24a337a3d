"""The freeze-aware ops against torch, torch.compile, and other people's kernels.

    python benchmarks/kernels.py [--output FOLDER]       # on the GPU, if there is one
    python benchmarks/kernels.py --device cpu            # gate and cost of a call, no kernels
    python benchmarks/kernels.py --only "rms_norm.*dx" --budget-s 500
    python benchmarks/kernels.py --table FOLDER          # the stored numbers in Markdown

A call is what training pays for: the forward, and the backward for the gradients demanded, nothing
else. `kernel_us` is the device's time per call, of about 20 calls replayed from one CUDA graph over
buffers of four times L2 in sum (`hot_us`: over one set of them); what waits for the device cannot
be captured, and is timed by events around the calls. `call_us` is what the call costs Python,
unsynchronised. Before any time there is the gate: results and gradients of 512 rows of the full
call against fp64. Ours may be no less accurate than plain torch in the same dtype, the others may
round more, up to eight times as much. A provider that fails has a reason in place of times.

On the CPU, and without Triton's interpreter, our ops run plain torch: the CPU form runs the gate
and measures what the call costs Python on tiny tensors, and says nothing of kernels.

Prediction. Norms and activations move bytes: `floor_bytes` is what any implementation has to move,
and a time below its share of a copy's bandwidth is a mistake of the benchmark. torch and its
compiler skip undemanded gradients of weights too, so gains there come from fusion alone; the norms
of quack, and of liger-kernel before 0.8.5, always compute them. The loss is bound by its 1 to 3
matmuls: level with the compiler, 1.2 x eager, whose logits in float32 also take most of the memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_operations import cases
from kernel_peers import PACKAGES, installed
from kernel_timing import ROUNDS, Machine, measure
from kernel_verdicts import show, table, verdicts
from optimizer import reason, wait
from stored_results import store

from progtuning_kernels import backend
from progtuning_kernels.cli.provenance import provenance

try:
    from rich.progress import track
except ImportError:  # a machine that has torch and nothing else

    def track(sequence: Any, description: str) -> Any:
        return sequence


FOLDER = Path(__file__).resolve().parent
# a script's folder is on the path: transformers, which a peer imports later, would take this file
# for a package that it knows
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]


def _device_state(device: torch.device) -> str | None:
    """Driver, clocks, power: what explains a number that does not repeat."""
    if device.type != "cuda":
        return None
    query = "driver_version,pstate,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {backend.one_line(error)}"
    return done.stdout.strip() or f"not known: {done.stderr.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, the default with a GPU, or cpu")
    parser.add_argument("--only", default="", help="cases whose title this regex is found in")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no case after it")
    parser.add_argument("--output", type=Path, help="write kernels.json into this folder")
    parser.add_argument("--table", type=Path, help="print the table of this folder's results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "kernels.json").read_text())))
        return
    started, device = time.monotonic(), torch.device(arguments.device)
    if device.type == "cpu":
        # a second thread gains nothing here, and where a core is taken its barriers take 40 ms
        torch.set_num_threads(1)
    chosen = [case for case in cases(device) if re.search(arguments.only, str(case))]
    if not chosen:
        raise SystemExit(f"no case has {arguments.only!r} in its title")
    machine, packages = Machine.measured(device), installed()
    meta = provenance(device)
    meta["versions"] |= packages
    content: dict[str, Any] = {
        "meta": meta | {"device_state": _device_state(device)},
        "copy_gb_per_s": machine.copy_gb_per_s,
        "matmul_tflop_per_s": machine.matmul_tflop_per_s,
        "l2_bytes": machine.l2_bytes,
        "rounds": arguments.rounds,
        "results": [],
        "failed": {},
        "not_reached": [str(case) for case in chosen],
        "verdicts": [],
    }

    def keep() -> None:
        if arguments.output is not None:
            store(content, arguments.output / "kernels.json")

    print(f"copy: {machine.copy_gb_per_s:.1f} GB/s")
    if device.type == "cuda":
        print(f"matmul: {machine.matmul_tflop_per_s:.0f} TFLOP/s, bfloat16")
    else:
        print("on the CPU, the gate and the overhead of a call: nothing here is a kernel's time")
    absent = {name for name, package in PACKAGES.items() if packages[package] is None}
    absent |= {"compile"} if device.type == "cpu" else set()
    for name in sorted(absent & PACKAGES.keys()):
        print(f"{name}: no numbers, {PACKAGES[name]} is not installed")
    for case in track(chosen, description="kernels"):
        if time.monotonic() - started > arguments.budget_s:
            break
        content["not_reached"].remove(str(case))
        try:
            content["results"].append(measure(case, machine, arguments.rounds))
            show(content["results"][-1], absent)
        except Exception as error:  # before anybody's call: the tensors do not fit
            content["failed"][str(case)] = reason(error)
            print(f"\n{case}: {reason(error)}")
            keep()
            wait(device)
        content["verdicts"] = [vars(v) for v in verdicts(content["results"])]
        keep()
        if device.type == "cuda":
            gc.collect()  # graphs hold their pools
            torch.cuda.empty_cache()
    content["meta"]["device_state_at_the_end"] = _device_state(device)
    keep()
    if content["not_reached"]:
        print(f"\nout of budget: {len(content['not_reached'])} of {len(chosen)} cases not reached")
    print()
    for verdict in verdicts(content["results"]):
        print(verdict)


if __name__ == "__main__":
    main()
