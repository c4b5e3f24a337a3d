"""The accuracy study's runs: which there are, in which order, which are stored, and what they cost.

Nothing here needs torch. `experiments/study.toml` says what is trained.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "study.toml"
RUNS, TIMES = "runs.jsonl", "times"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One run. `rate` None: its method's rate is not tuned yet."""

    model: str
    task: str
    method: str
    seed: int
    rate: float | None
    tunes: bool = False

    @property
    def name(self) -> str:
        rate = "rate not tuned" if self.rate is None else f"rate {self.rate:g}"
        kind = "tuning" if self.tunes else f"seed {self.seed}"
        return f"{self.model}, {self.task}, {self.method}, {kind}, {rate}"


class Study:
    """The experiment, with the runs and the times that a folder holds."""

    def __init__(self, experiment: Mapping[str, Any], folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.times = {
            (stored["model"], stored["task"]): self._of_these_settings(stored)
            for path in sorted(folder.glob(f"{TIMES}/*.json"))
            for stored in [json.loads(path.read_text())]
        }
        self.read()

    def read(self) -> None:
        """The stored runs, those of other commands too."""
        experiment = self.experiment
        self.records: dict[Job, Record] = {}
        self.strangers = 0  # stored runs of other settings or seeds, or of no part
        wanted = {(p["model"], t, m) for p in experiment["parts"] for t, m in _pairs(p)}
        tuned = {(p["model"], m) for p in experiment["parts"] for m in p["methods"]}
        for record in read_runs(self.folder / RUNS):
            job = Job(**record["job"])
            place = job.model, job.task, job.method
            if job.tunes:
                known = (job.model, job.method) in tuned
            else:
                known = place in wanted and job.seed >= experiment["first_seed"]
            same = known and (
                record["settings"] == self.settings(*place)
                if job.tunes
                else _same(record["settings"], self.settings(*place))
            )
            if same:
                self.records[job] = record
            else:
                self.strangers += 1

    def _of_these_settings(self, times: Record) -> Record:
        place = times["model"], times["task"]
        kept = {
            method: timed
            for method, timed in times["methods"].items()
            if method in self.experiment["methods"]
            and _same(timed["settings"], self.settings(*place, method))
        }
        return {**times, "methods": kept}

    def settings(self, model: str, task: str, method: str) -> dict[str, Any]:
        """What decides the numbers of a run."""
        own = self.experiment["methods"][method]
        return {
            **self.task_settings(model, task),
            **{k: v for k, v in own.items() if k not in ("title", "way", "runs_of", "rate_of")},
        }

    def task_settings(self, model: str, task: str) -> dict[str, Any]:
        """What is the same for every method; a large model may have fewer rows of a task."""
        of_model = self.experiment["models"][model]
        rows = {key: of_model.get(key, {}) for key in ("train_rows", "tuning_rows")}
        return {
            **self.experiment["common"],
            **{k: v for k, v in self.experiment["tasks"][task].items() if k != "title"},
            **{key: of_task[task] for key, of_task in rows.items() if task in of_task},
        }

    def jobs(self) -> list[Job]:
        """All runs in their order, each once."""
        return list(dict.fromkeys(self._jobs()))

    def _jobs(self) -> Iterator[Job]:
        tuning, methods = self.experiment["tuning"], self.experiment["methods"]
        for part in self.experiment["parts"]:
            model = part["model"]
            trained = [m for m in part["methods"] if "runs_of" not in methods[m]]
            for method in trained:
                tuned = methods[method].get("rate_of", method)
                for task in self.experiment["models"][model]["tuning_tasks"]:
                    for rate in self.rates(model, tuned):
                        yield Job(model, task, tuned, tuning["seed"], rate, tunes=True)
            first = self.experiment["first_seed"]
            for seed in range(first, first + part["seeds"]):
                for task in part["tasks"]:
                    for method in trained:
                        yield Job(model, task, method, seed, self.rate(model, method))

    def rates(self, model: str, method: str) -> Sequence[float]:
        """Of a method's own, or of all methods that train what it trains: weights or adapters."""
        of_model = self.experiment["models"][model]
        key = "lora_rates" if self.experiment["methods"][method].get("lora") else "rates"
        return of_model.get("method_rates", {}).get(method, of_model[key])

    def rate(self, model: str, method: str) -> float | None:
        """The tuned rate; None where a tuning run is missing."""
        method = self.experiment["methods"][method].get("rate_of", method)
        scores: dict[float, float] = {}
        for rate in self.rates(model, method):
            found = [
                self.records.get(
                    Job(model, task, method, self.experiment["tuning"]["seed"], rate, tunes=True)
                )
                for task in self.experiment["models"][model]["tuning_tasks"]
            ]
            if None in found:
                return None
            scores[rate] = statistics.mean(record["score"] for record in found if record)
        return max(scores, key=lambda rate: scores[rate])

    def add(self, job: Job, record: Mapping[str, Any]) -> None:
        """Store a run."""
        settings = self.settings(job.model, job.task, job.method)
        record = {"job": asdict(job), "settings": settings, **record}
        append_run(self.folder / RUNS, record)
        self.records[job] = record

    def runs(self, model: str, task: str, method: str) -> dict[int, Record]:
        """The stored runs with the tuned rate, by seed."""
        method = self.experiment["methods"][method].get("runs_of", method)
        rate = self.rate(model, method)
        return {
            job.seed: record
            for job, record in sorted(self.records.items(), key=lambda item: item[0].seed)
            if (job.model, job.task, job.method, job.rate) == (model, task, method, rate)
            and not job.tunes
        }

    def seconds(self, model: str, task: str, method: str, steps: int) -> float | None:
        """Of so many steps of a method, the whole schedule; None where it was not timed."""
        found = self.times.get((model, task), {"methods": {}})["methods"].get(method)
        return None if found is None else run_seconds(found, steps)

    def steps(self, model: str, task: str, method: str, whole: int) -> int:
        """Steps of a method where all epochs take `whole`: fewer if it has another's seconds.

        Raises:
            ValueError: the times that say how many are not measured.
        """
        other = self.experiment["methods"][method].get("seconds_of")
        if other is None:
            return whole
        limit_s = self.seconds(model, task, other, whole)
        own_s = self.seconds(model, task, method, whole)
        if limit_s is None or own_s is None:
            raise ValueError(
                f"{method} takes the seconds of {other}: accuracy_study.py times first, for "
                f"--model {model} --task {task}"
            )
        return max(1, min(whole, round(whole * limit_s / own_s)))

    def about_seconds(self, job: Job) -> float | None:
        """What a run will take with packed tokens, its evaluation included; None: not timed."""
        times = self.times.get((job.model, job.task))
        if times is None:
            return None
        method = job.method if job.method in times["methods"] else "full-packed"
        try:
            steps = self.steps(job.model, job.task, method, times["steps"])
        except ValueError:
            return None
        own_s = self.seconds(job.model, job.task, method, steps)
        packed_s = self.seconds(job.model, job.task, "full-packed", times["steps"])
        if own_s is None or packed_s is None:
            return None
        share = 1.0
        if job.tunes:
            settings = self.settings(job.model, job.task, job.method)
            rows = min(times["train_rows"], settings.get("tuning_rows", times["train_rows"]))
            share = rows / times["train_rows"] * (1 - self.experiment["tuning"]["share"])
        return share * min(own_s, packed_s) + times["evaluation_s"]


def _same(one: Record, other: Record) -> bool:
    """Whether settings are the same but for the rows that tuning takes."""
    return {**one, "tuning_rows": None} == {**other, "tuning_rows": None}


def _pairs(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(task, method) for task in part["tasks"] for method in part["methods"]]


def run_seconds(timed: Mapping[str, Any], steps: int) -> float:
    """A run of `steps`, from the steps of a short run with the same stages."""
    stages = timed["stages"]
    step_ms = sum(stage["share"] * stage["step_ms"] for stage in stages)
    return (steps * step_ms + sum(stage["first_extra_ms"] for stage in stages)) / 1e3


def by_stage(
    stages: Sequence[int], warm: Sequence[bool], rounds_ms: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """What is stored of a method's times: a median over rounds for every step, a mean for a stage.

    What the first two steps of a stage take longer, in which packing and cache are tried, is apart.

    Args:
        stages: of every step.
        warm: of every step, whether it is left out of the mean.
        rounds_ms: milliseconds of every step, in every round.
    """
    times_ms = [statistics.median(of_step) for of_step in zip(*rounds_ms, strict=True)]
    found = []
    for stage in sorted(set(stages)):
        own = [i for i, s in enumerate(stages) if s == stage]
        step_ms = statistics.mean(times_ms[i] for i in own if not warm[i])
        extra_ms = sum(times_ms[i] - step_ms for i in own[:2] if warm[i])
        share = len(own) / len(stages)
        found.append({"share": share, "step_ms": step_ms, "first_extra_ms": extra_ms})
    return found


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Stored runs; a line that was cut off when its writer was killed is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_run(path: Path, record: Mapping[str, Any]) -> None:
    """Write one line, and see it on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut off
                file.write(b"\n")
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
