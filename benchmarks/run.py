"""Whole training runs in stages: this library against what a user would take instead.

    python benchmarks/run.py benchmarks/experiments/minilm.toml [--output FOLDER] [--only NAME]
    python benchmarks/run.py EXPERIMENT --isolate           # every run in a process of its own
    python benchmarks/run.py --verdict FOLDER               # stored targets, measure nothing

An experiment (TOML) names a model's shape, what everybody trains, and who. Everybody gets the same
weights, the same rows in the same order, the same clipping and the same learning rate. First comes
the gate (`gate.py`): losses, gradients and updates of a step in every stage against plain
torch. A provider that fails it, or cannot run here, has a reason in place of numbers. Then runs are
made, step by step in turn or run by run in turn. A *step* is forward, backward, clipping, update
and dropping the gradients, and at a change of stage what that costs. Losses are stored beside every
time.

`whole_runs` composes longer runs from the medians (see `runs.summarise`), with the first step
of every stage as it was; `measured_run_s` is what the measured run took, all of its steps, and
`composed_over_measured` how far the same composition is from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings, in_words
from experiment import Experiment, Target, read_experiment
from gate import Gate
from providers import PROVIDERS
from runs import Record, summarise, train
from stored_results import Verdict, store
from training import reason

from progtuning_kernels.cli.provenance import installed_version, provenance

FOLDER = Path(__file__).resolve().parent
# a script's folder is on the path: transformers, which is imported later, would take kernels.py
# here for a package that it knows
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]

BASELINE = "full"


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


class Bench:
    """One experiment on one device: gates, runs, and the JSON as it grows."""

    def __init__(self, experiment: Experiment, path: Path, arguments: argparse.Namespace) -> None:
        self.experiment, self.path, self.arguments = experiment, path, arguments
        self.device = torch.device(arguments.device or experiment.device)
        self.work = experiment.work(self.device)
        self.deadline = None
        if arguments.budget_s is not None:
            self.deadline = time.monotonic() + arguments.budget_s
        only = arguments.only or experiment.providers
        self.names = [BASELINE, *(n for n in only if n != BASELINE)]
        self.gate: Gate | None = None
        self.gates: dict[str, dict[str, float]] = {}
        self.reasons: dict[str, str] = {}
        self.records: dict[str, Record] = {}
        self.meta = provenance(self.device)
        if self.device.type == "cuda":
            self.meta["driver_clock_power"] = _driver()
        packages = {p for n in self.names for p in PROVIDERS[n].packages}
        self.meta["versions"] |= {
            package: installed_version(package) for package in sorted(packages)
        }

    def run(self) -> None:
        """Gate and runs of everybody, side by side or one by one."""
        groups = [[n] for n in self.names if self._runs_apart(n)]
        here = [n for n in self.names if not self._runs_apart(n)]
        one_by_one = self.experiment.interleave == "runs"
        groups = [*([[n] for n in here] if one_by_one else [here]), *groups]
        self.write()  # a run cut short leaves its targets, not measured
        for repeat in range(self.experiment.repeats):
            for group in groups:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    break
                if group and self._runs_apart(group[0]):
                    self._run_apart(group[0])
                else:
                    self._run_here(group, first=not repeat)
                self.write()

    def _run_here(self, names: list[str], *, first: bool) -> None:
        if first:
            self._check(names)
        providers = {n: PROVIDERS[n] for n in names if n not in self.reasons}
        together = self.experiment.steps_together
        self.reasons |= train(providers, self.work, together, self.records)

    def _runs_apart(self, name: str) -> bool:
        if self.arguments.worker is not None:
            return False
        return self.arguments.isolate or PROVIDERS[name].patches_globally

    def _check(self, names: list[str]) -> None:
        if self.gate is None:
            self.gate = Gate(self.work, self.experiment.gate_rows or self.experiment.rows)
        for name in names:
            try:
                self.gates[name] = self.gate.check(PROVIDERS[name])
                shown = ", ".join(f"{k} {v:.1e}" for k, v in self.gates[name].items())
                print(f"{name}: gate green, {shown}", flush=True)
            except Exception as error:
                self._no_number(name, reason(error))

    def _no_number(self, name: str, why: str) -> None:
        self.reasons[name] = why
        print(f"{name}: no number: {why}", flush=True)

    def _run_apart(self, name: str) -> None:
        """One run in a process of its own; its record is added to those of earlier ones."""
        for package in PROVIDERS[name].packages:
            if installed_version(package) is None:  # a process would take seconds to say so
                return self._no_number(name, f"{package} is not installed")
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "record.json")
            command = [sys.executable, str(FOLDER / "run.py"), str(self.path), "--only", name]
            command += ["--device", self.device.type, "--worker", str(result)]
            left = None if self.deadline is None else max(5.0, self.deadline - time.monotonic())
            try:
                done = subprocess.run(command, timeout=left, capture_output=True, text=True)
            except subprocess.TimeoutExpired:
                return self._no_number(name, "out of time")
            if not result.exists():
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                why = f"its process ended with {done.returncode}: {last[:300]}"
                return self._no_number(name, why)
            found = json.loads(result.read_text())
        if found["reason"] is not None:
            return self._no_number(name, found["reason"])
        self.gates[name] = found["gate"]
        record = Record(**found["record"])
        if name in self.records:
            self.records[name].add(record)
        else:
            self.records[name] = record

    def worker(self) -> None:
        """The other side of `_run_apart`."""
        (name,) = self.arguments.only
        self._run_here([name], first=True)
        found: dict[str, Any] = {"reason": self.reasons.get(name)}
        if found["reason"] is None:
            record = dataclasses.asdict(self.records[name])
            found |= {"gate": self.gates[name], "record": record}
        self.arguments.worker.write_text(json.dumps(found))

    def content(self) -> dict[str, Any]:
        providers: dict[str, Any] = {}
        for name in self.names:
            if name in self.reasons:
                providers[name] = {"reason": self.reasons[name]}
            elif name not in self.records or not self.records[name].run_s:
                providers[name] = {"reason": "not reached"}
            else:
                providers[name] = {"gate": self.gates[name]} | summarise(
                    PROVIDERS[name],
                    self.work,
                    self.records[name],
                    epochs=self.experiment.epochs_per_stage,
                    steps_per_epoch=self.experiment.steps_per_epoch,
                )
        content = {
            "meta": self.meta,
            "experiment": dataclasses.asdict(self.experiment)
            | {"device": self.device.type, "isolated": self.arguments.isolate},
            "providers": providers,
        }
        return content | {"verdicts": [dataclasses.asdict(v) for v in verdicts(content)]}

    def write(self) -> None:
        if self.arguments.output is None or self.arguments.worker is not None:
            return
        path = self.arguments.output / "training" / f"{self.experiment.name}.json"
        store(self.content(), path)


# ---- what is shown


def figure(entry: Mapping[str, Any], metric: str, epochs_per_stage: int) -> float | None:
    """A whole run's seconds, or the peak over its stages; None where it was not measured."""
    if metric == "run_s":
        runs = entry.get("whole_runs", ())
        return next((r["run_s"] for r in runs if r["epochs_per_stage"] == epochs_per_stage), None)
    found = [stage.get(metric) for stage in entry.get("stages", ())]
    return None if not found or None in found else max(found)


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    """Every target of the experiment, met or not, and by how much."""
    experiment, providers, found = content["experiment"], content["providers"], []
    for target in (Target(**t) for t in experiment["targets"]):
        is_time = target.metric == "run_s"
        of = target.of[0] if len(target.of) == 1 else "best of " + " | ".join(target.of)
        what = f"{experiment['title']}: {of} against {target.over}, "
        what += (
            f"whole run of {experiment['stages']} x {target.epochs_per_stage} epochs, "
            f"{target.limit:g} x as fast"
            if is_time
            else f"at most {target.limit:g} of its peak memory"
        )
        if allowed := in_words(ceilings(experiment["name"], dataclasses.asdict(target))):
            what += f" ({allowed})"
        base = figure(providers.get(target.over, {}), target.metric, target.epochs_per_stage)
        ratios = {}
        for name in target.of:
            own = figure(providers.get(name, {}), target.metric, target.epochs_per_stage)
            if own and base:
                ratios[name] = base / own if is_time else own / base
        if not ratios:
            found.append(Verdict(what, None, "no numbers of both"))
            continue
        best = (max if is_time else min)(ratios, key=ratios.__getitem__)
        ratio = ratios[best]
        met = ratio >= target.limit if is_time else ratio <= target.limit
        by = f"{ratio / target.limit - 1:+.1%}"
        found.append(Verdict(what, met, f"{ratio:.3f} ({best}), {by} of {target.limit:g}"))
    return found


def show(content: Mapping[str, Any]) -> None:
    experiment, providers = content["experiment"], content["providers"]
    print(
        f"\n{experiment['title']}: {experiment['rows']} x {experiment['tokens']} tokens, "
        f"{experiment['precision']}, {experiment['stages']} stages; whole runs of "
        f"{experiment['steps_per_epoch']} steps an epoch"
    )
    base = providers.get(BASELINE, {})
    for name, entry in providers.items():
        if "reason" in entry:
            print(f"  {name:30} no number: {entry['reason']}")
            continue
        line = f"  {name:30}"
        for stage in entry["stages"]:
            line += f" {stage['later_epochs']['step_ms']:7.1f}"
        line += " ms"
        for run in entry["whole_runs"]:
            full_s = figure(base, "run_s", run["epochs_per_stage"])
            line += f"  {run['epochs_per_stage']} ep. {run['run_s']:7.1f} s"
            line += f" (x {full_s / run['run_s']:.2f})" if full_s else ""
        line += f"  changes {entry['whole_runs'][0]['first_steps_extra_s']:.2f} s"
        line += f"  loss {entry['last_epoch_loss']:.4f}"
        if peak := figure(entry, "peak_allocated_bytes", 0):
            line += f"  peak {peak / 2**30:.2f} GiB"
        print(line + (f"  [{entry['note']}]" if "note" in entry else ""))
    print()
    for verdict in content["verdicts"]:
        print(Verdict(**verdict))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?", type=Path, help="a TOML file")
    parser.add_argument("--only", action="append", metavar="PROVIDER", help="and the baseline")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="other than the experiment's")
    parser.add_argument("--isolate", action="store_true", help="a process for every run")
    parser.add_argument("--budget-s", type=float, help="begin no run after it")
    parser.add_argument("--output", type=Path, help="write training/EXPERIMENT.json in this folder")
    parser.add_argument("--verdict", type=Path, metavar="FOLDER", help="of stored results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other packages, on every build
    if arguments.verdict is not None:
        for path in sorted(arguments.verdict.glob("training/*.json")):
            show(json.loads(path.read_text()))
        return
    if arguments.experiment is None:
        parser.error("which experiment? a TOML file of benchmarks/experiments/")
    if unknown := [n for n in arguments.only or () if n not in PROVIDERS]:
        parser.error(f"no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    bench = Bench(read_experiment(arguments.experiment), arguments.experiment, arguments)
    if bench.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --device cpu, or an experiment for the CPU")
    if arguments.worker is not None:
        bench.worker()
        return
    bench.run()
    show(bench.content())


if __name__ == "__main__":
    main()
