"""Everything that only a GPU can show, in one command, most important first.

    make gpu-suite OUT=FOLDER PYTHON=python3
    python benchmarks/gpu_suite.py --output FOLDER --budget-s 460
    python benchmarks/gpu_suite.py --output FOLDER --rehearse     # the same on a CPU, tiny

Builds the extension in place, runs the GPU tests, then the benchmarks, each in a process of its own
with a time limit; what is written so far stays. Needs torch, triton, transformers, pybind11, pytest
and nvcc, and no network; other packages take part if they are installed. In FOLDER: `suite.json`
(what became of every part, and all verdicts), `suite.log` (everything printed), and a JSON per
benchmark. Ends with 1 if a part failed, a missed target is no failure; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 460.0


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        limit_s: of its time, under the whole budget of 460 s; another budget scales it.
        budgeted: it takes --budget-s, and ends by itself before it is killed.
        output: it takes --output.
        environment: on top of this process's.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    budgeted: bool = False
    output: bool = True
    environment: tuple[tuple[str, str], ...] = ()


def _experiment(name: str, limit_s: float, *options: str) -> Part:
    path = f"benchmarks/experiments/{name}.toml"
    return Part(name, ("benchmarks/run.py", path, *options), limit_s, budgeted=True)


def gpu_parts() -> list[Part]:
    tests = [
        "tests/test_gpu.py",
        "tests/ops/test_gpu_masked_update.py",
        "tests/ops/test_masked_norm.py",
    ]
    tests += ["tests/ops/test_masked_update_triton.py", "tests/optim/test_optimizer_precision.py"]
    if find_spec("hypothesis") is not None:
        tests += ["tests/cache/test_row_store.py"]
    first = ("-m", "pytest", "-x", "-m", "gpu", "tests/ops/test_gpu_masked_update.py")
    blocking = (("CUDA_LAUNCH_BLOCKING", "1"),)
    build = ("setup.py", "build_ext", "--inplace")
    cuda = ("--device", "cuda")
    return [
        Part("build", build, 90, output=False),
        Part("first launches", first, 45, output=False, environment=blocking),
        Part("GPU tests", ("-m", "pytest", "-m", "gpu", *tests), 60, output=False),
        _experiment("gpu-bert", 70),
        _experiment("gpu-llama-1b", 110),
        Part("optimizer", ("benchmarks/optimizer.py", *cuda), 40),
        Part("kernels", ("benchmarks/kernels.py", *cuda), 60, budgeted=True),
        Part("prefix cache", ("benchmarks/prefix_cache.py", *cuda), 30),
        _experiment("gpu-bert-others", 60),
    ]


def rehearsal_parts() -> list[Part]:
    """The same kinds of parts, on a CPU."""
    return [
        Part("build", ("setup.py", "--version"), 90, output=False),
        Part(
            "GPU tests",
            (
                "-m",
                "pytest",
                "-m",
                "gpu",
                "--collect-only",
                "-q",
                "tests/ops/test_gpu_masked_update.py",
            ),
            60,
            output=False,
        ),
        _experiment("rehearsal", 90, "--device", "cpu"),
        Part(
            "kernels",
            ("benchmarks/kernels.py", "--device", "cpu", "--only", "^rms_norm, dx", "--rounds=2"),
            60,
            budgeted=True,
        ),
    ]


class Suite:
    def __init__(self, output: Path, budget_s: float) -> None:
        self.output, self.budget_s = output, budget_s
        self.started = time.monotonic()
        self.parts: list[dict[str, Any]] = []
        output.mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started)

    def run(self, part: Part) -> None:
        """Log its output as it comes, and what became of it."""
        limit_s = min(part.limit_s * self.budget_s / BUDGET_S, self.left_s())
        record: dict[str, Any] = {"name": part.name, "limit_s": round(limit_s, 1)}
        self.parts.append(record)
        if limit_s < 3:
            record["outcome"] = "out of time"
            return self.write()
        command = [sys.executable, *part.command]
        command += ["--output", str(self.output)] if part.output else []
        command += ["--budget-s", f"{0.8 * limit_s:.0f}"] if part.budgeted else []
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | dict(part.environment)
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
        }
        began = time.monotonic()
        with (self.output / "suite.log").open("a") as log:
            print(f"\n== {part.name} (at most {limit_s:.0f} s)", file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
            try:
                code = process.wait(timeout=limit_s)
                record["outcome"] = "done" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                record["outcome"] = "cut off"
        record["wall_s"] = round(time.monotonic() - began, 1)
        print(f"{part.name}: {record['outcome']} after {record['wall_s']:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        content = {"budget_s": self.budget_s, "parts": self.parts}
        content |= {"verdicts": [*verdicts(self.output)]}
        partial = self.output / "suite.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.output / "suite.json")


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _ceiling(result: dict[str, Any], name: str) -> str:
    """Of an update's speedup, in brackets: the bytes that the baseline moves, over its own."""
    entries = (next(iter(result["providers"].values())), result["providers"][name])
    most, own = (entry.get("bytes_per_parameter") for entry in entries)
    return f" (ceiling {most / own:.2f} x by bytes)" if most and own else ""


def verdicts(folder: Path) -> Iterator[dict[str, Any]]:
    """Of all results there are: {"target", "met" (None: not measured), "found"}."""
    for path in sorted(folder.glob("training/*.json")):
        yield from _load(path)["verdicts"]
    for result in _load(folder / "optimizer.json").get("results", ()):
        for name, entry in result["providers"].items():
            if (target := entry.get("target_speedup")) is not None:
                what = f"{result['workload']}, {result['case']}: {name}, {target:g} x"
                yield {
                    "target": f"{what}{_ceiling(result, name)}",
                    "met": entry["speedup"] >= target,
                    "found": f"{entry['speedup']:.3f}, {entry['speedup'] / target - 1:+.1%}",
                }
    yield from _load(folder / "kernels.json").get("verdicts", ())


def show(suite: Suite) -> None:
    print("\nTargets")
    words = {True: "met", False: "NOT met", None: "not measured"}
    for verdict in verdicts(suite.output):
        print(f"  {words[verdict['met']]:12} {verdict['target']}: {verdict['found']}")
    print("Parts")
    for part in suite.parts:
        print(f"  {part['outcome']:12} {part['name']}, {part.get('wall_s', 0):.0f} s")
    print(f"{time.monotonic() - suite.started:.0f} s; all output: {suite.output / 'suite.log'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"default {BUDGET_S:g}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--rehearse tries the commands on a CPU)")
        raise SystemExit(2)
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise SystemExit(f"{arguments.output} is not empty: results of two runs would be mixed")
    suite = Suite(arguments.output.resolve(), arguments.budget_s)
    for part in rehearsal_parts() if arguments.rehearse else gpu_parts():
        suite.run(part)  # one that fails keeps no other from running: each checks itself
    show(suite)
    failed = [part for part in suite.parts if part["outcome"].startswith("failed")]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
