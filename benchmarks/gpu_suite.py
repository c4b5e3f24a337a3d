"""Everything that only a GPU can show, in one command, most important first.

    make gpu-suite OUT=FOLDER PYTHON=python3                   # 8 minutes
    make gpu-suite OUT=FOLDER PYTHON=python3 ARGS=--short      # 5 minutes, for a second run
    python benchmarks/gpu_suite.py --output FOLDER --rehearse  # the same on a CPU, tiny

Builds the extension in place, runs the GPU tests, then the benchmarks, each in a process of its own
with a time limit; what is written so far stays. The limits sum to the whole, starts of processes
included; the last part, the kernels, has what the others leave. `--short` leaves out what has no
target (the prefix cache by itself, other people's training packages), times the optimizer on the
tensors of one model, and builds only what has changed.

Needs torch, triton, transformers, peft, pybind11, pytest, hypothesis and nvcc, and no network;
other packages take part if they are installed. In FOLDER: `suite.json` (what became of every part,
and all verdicts), `suite.log` (everything printed), and a JSON per benchmark. The exit status is 1
if a part failed or was cut off (a missed target is no failure), and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stored_results import WORDS, store

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S, SHORT_S = 480.0, 300.0
REHEARSAL_TAKES = 4  # times as long, on a busy machine of two cores
START_S = 5.0  # of this process, before the first part
WORKERS = 4  # of the tests, most of whose time is the compiler's
NEEDED = ("torch", "triton", "transformers", "peft", "pybind11", "pytest", "hypothesis")


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        limit_s: of its time, its start included.
        budgeted: it takes --budget-s, and ends by itself before it is killed.
        output: it takes --output.
        environment: on top of this process's.
        after_failure_of: the part that has to have failed; else this one is left out.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    budgeted: bool = False
    output: bool = True
    environment: tuple[tuple[str, str], ...] = ()
    after_failure_of: str | None = None


def gpu_test_files() -> list[str]:
    """Those with tests of the marker: to import all files takes longer than many tests."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def _tests(limit_s: float, again_s: float) -> list[Part]:
    """All at once, and the first that fails once more: blocking launches name its kernel."""
    options = ["-m", "pytest", "-m", "gpu", "--tb=short", "--continue-on-collection-errors"]
    options += ["-o", f"cache_dir={Path(tempfile.gettempdir(), 'progtuning-gpu-suite')}"]
    several = ("-n", str(WORKERS)) if find_spec("xdist") is not None else ()
    again = ("-x", "--last-failed", "--last-failed-no-failures=none")
    files = gpu_test_files()
    return [
        Part("GPU tests", (*options, *several, *files), limit_s, output=False),
        Part(
            "a test that failed, launch by launch",
            (*options, *again, *files),
            again_s,
            output=False,
            environment=(("CUDA_LAUNCH_BLOCKING", "1"),),
            after_failure_of="GPU tests",
        ),
    ]


def _experiment(name: str, limit_s: float, *options: str) -> Part:
    path = f"benchmarks/experiments/{name}.toml"
    return Part(name, ("benchmarks/run.py", path, *options), limit_s, budgeted=True)


def _benchmark(name: str, limit_s: float, *options: str, budgeted: bool = True) -> Part:
    command = (f"benchmarks/{name.replace(' ', '_')}.py", "--device", "cuda", *options)
    return Part(name, command, limit_s, budgeted)


def gpu_parts(*, short: bool) -> list[Part]:
    """Limits: 480 s, short 300 s, less the start of this process."""
    build = ("setup.py", "build_ext", "--inplace")
    if short:
        return [
            Part("build", build, 45, output=False),
            *_tests(65, 15),
            _experiment("gpu-bert", 40),
            _experiment("gpu-graph", 30, *("--only", "ours"), *("--only", "ours, graph")),
            _experiment("gpu-llama-1b", 45),
            _benchmark("optimizer", 20, "--workload", "BERT-base, 199 tensors"),
            _benchmark("kernels", 35, "--rounds", "10"),
        ]
    return [
        Part("build", build, 60, output=False),
        *_tests(90, 20),
        _experiment("gpu-bert", 60),
        _experiment("gpu-graph", 45),
        _experiment("gpu-llama-1b", 70),
        _benchmark("optimizer", 35),
        _benchmark("prefix cache", 25, "--rounds", "8", budgeted=False),
        _experiment("gpu-bert-others", 30),
        _benchmark("kernels", 40, "--rounds", "10"),
    ]


def rehearsed(part: Part) -> Part:
    """The same on a CPU: nothing is built, tests are collected, benchmarks are tiny."""
    first, *_ = part.command
    if first == "setup.py":
        command = (first, "--version")
    elif first == "-m":
        command = (*part.command, "--collect-only")
    else:
        command = ("tests/support/gpu_rehearsal.py", *part.command)
    return replace(part, command=command, limit_s=REHEARSAL_TAKES * part.limit_s)


def is_built() -> bool:
    """Whether the extension has CUDA kernels, and is newer than everything that it is made of."""
    package = ROOT / "progtuning_kernels"
    try:
        if not json.loads((package / "_build.json").read_text())["cuda"]:
            return False
        built_s = min(path.stat().st_mtime for path in package.glob("_C.*"))
    except (OSError, ValueError, KeyError):
        return False
    sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
    return all(path.stat().st_mtime < built_s for path in sources)


class Suite:
    def __init__(self, output: Path, budget_s: float) -> None:
        self.output, self.budget_s = output, budget_s
        self.started = time.monotonic()
        self.parts: list[dict[str, Any]] = []
        output.mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started)

    def run(self, part: Part, limit_s: float) -> None:
        """Log its output as it comes, and what became of it."""
        limit_s = min(limit_s, self.left_s())
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
            print(f"\n== {part.name} (at most {limit_s:.0f} s)", file=log)
            print(f"$ {shlex.join(command)}", file=log, flush=True)
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
                record["outcome"] = "cut off"
            finally:
                if process.returncode is None:  # also where this one is interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        record["wall_s"] = round(time.monotonic() - began, 1)
        print(f"{part.name}: {record['outcome']} after {record['wall_s']:.0f} s", flush=True)
        self.write()

    def run_all(self, parts: list[Part]) -> None:
        """One that fails keeps no other from running: each checks itself."""
        for part in parts:
            outcomes = {record["name"]: record["outcome"] for record in self.parts}
            before = part.after_failure_of
            if before is None or outcomes[before].startswith("failed"):
                self.run(part, self.left_s() if part is parts[-1] else part.limit_s)

    def write(self) -> None:
        content = {"budget_s": self.budget_s, "parts": self.parts}
        content |= {"verdicts": [*verdicts(self.output)]}
        store(content, self.output / "suite.json")


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
            if (target := entry.get("target_speedup")) is None:
                continue
            speedup = entry.get("speedup")
            found = entry.get("reason")
            yield {
                "target": f"{result['workload']}, {result['case']}: {name}, {target:g} x"
                + _ceiling(result, name),
                "met": None if speedup is None else speedup >= target,
                "found": found or f"{speedup:.3f}, {speedup / target - 1:+.1%}",
            }
    yield from _load(folder / "kernels.json").get("verdicts", ())


def show(suite: Suite, *, rehearsed: bool) -> None:
    print("\nTargets" + (", which a rehearsal's times say nothing about" if rehearsed else ""))
    for verdict in verdicts(suite.output):
        print(f"  {WORDS[verdict['met']]:12} {verdict['target']}: {verdict['found']}")
    print("Parts")
    for part in suite.parts:
        print(f"  {part['outcome']:12} {part['name']}, {part.get('wall_s', 0):.0f} s")
    print(f"{time.monotonic() - suite.started:.0f} s; all output: {suite.output / 'suite.log'}")


def how_to_keep(folder: Path, device: str) -> str:
    """Commands: one stores the results, the others print the tables that pages then must have."""
    kept = f"benchmarks/results/{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"
    lines = [f"To keep these results, in {ROOT}:"]
    if folder != ROOT / kept:
        given = shlex.quote(str(folder))
        lines.append(f"  mkdir -p {kept} && cp -r {given}/*.json {given}/training {kept}/")
    lines.append(
        "Then put what these print between the markers of its page; test_pages.py compares:"
    )
    for marker, command in (
        ("optimizer", "optimizer.py --table"),
        ("cache", "prefix_cache.py --table"),
        ("training", "plot.py"),
    ):
        lines.append(f"  python benchmarks/{command} {kept}  # <!-- {marker}:begin -->")
    lines.append("To compare kernels with their predicted times:")
    lines.append(f"  python benchmarks/predicted_times.py --compare {shlex.quote(str(folder))}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--short", action="store_true", help=f"in {SHORT_S:g} s instead of {BUDGET_S:g}"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise SystemExit(f"{arguments.output} is not empty: results of two runs would be mixed")
    suite_s = SHORT_S if arguments.short else BUDGET_S
    parts = gpu_parts(short=arguments.short)
    if arguments.rehearse:
        device = None
        suite_s *= REHEARSAL_TAKES
        parts = [rehearsed(part) for part in parts]
    else:
        started = time.monotonic()
        import torch

        if not torch.cuda.is_available():
            print("no GPU here: nothing to measure (--rehearse tries the commands on a CPU)")
            raise SystemExit(2)
        device = torch.cuda.get_device_name()
        suite_s -= time.monotonic() - started
        if is_built():
            parts = [part for part in parts if part.name != "build"]
            print("build: the extension is up to date")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed: {', '.join(missing)}; parts that need them will fail", flush=True)
    suite = Suite(arguments.output.resolve(), suite_s)
    suite.run_all(parts)
    show(suite, rehearsed=arguments.rehearse)
    if device is not None:
        print(how_to_keep(suite.output, device))
    # a hang is a failure, too; a part that has no time left is none
    outcomes = [part["outcome"] for part in suite.parts]
    raise SystemExit(any(o.startswith("failed") or o == "cut off" for o in outcomes))


if __name__ == "__main__":
    main()
