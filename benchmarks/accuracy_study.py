"""The accuracy study: many methods on many tasks, in paired runs that are stored one by one.

    python benchmarks/accuracy_study.py prepare                   # models and BBC News, once
    python benchmarks/accuracy_study.py times --data FOLDER       # on a quiet machine, before runs
    python benchmarks/accuracy_study.py plan                      # what is left to run, in hours
    python benchmarks/accuracy_study.py runs --data FOLDER        # what is missing, one by one
    python benchmarks/accuracy_study.py table --page PAGE --picture PNG

`experiments/study.toml` says what is trained. Every run of a seed begins with the same head and
sees the same rows in the same order. A run is stored as one line of `<output>/runs.jsonl`, and not
made again; one that is stopped goes on from its newest checkpoint. Seconds in the table are those
of the steps that `times` has measured, step by step in turn, not those of the runs.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from stored_results import store
from study_models import CACHE, prepare
from study_plan import EXPERIMENT, TIMES, Job, Study
from study_tables import draw, fill, table
from study_tasks import Task, read_task
from study_training import steps_per_epoch, time_methods, train

from progtuning_kernels.backend import one_line
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.schedules.files import read_settings


def with_rows(experiment: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """The same with few training rows in small batches; its runs count for nothing else."""
    for scope in (experiment["common"], *experiment["tasks"].values()) if rows else ():
        scope |= {"train_rows": rows, "rows": max(1, rows // 4)}
    for model in experiment["models"].values() if rows else ():
        model["train_rows"] = {}
    return experiment


def task_reader(study: Study, options: argparse.Namespace) -> Callable[[Job], Task]:
    """Reads the rows of a run; those of the last one are kept."""

    @lru_cache(maxsize=2)
    def read(model: str, name: str) -> Task:
        settings = study.task_settings(model, name)
        return read_task(name, settings, model, data=options.data, cache=options.cache)

    def of_job(job: Job) -> Task:
        task = read(job.model, job.task)
        if job.tunes:
            rows = study.task_settings(job.model, job.task)["tuning_rows"]
            task = task.split(study.experiment["tuning"]["share"], rows)
        return task

    return of_job


def show_plan(study: Study, jobs: list[Job]) -> None:
    """Count and minutes of what is missing, by model, task and kind."""
    total_s, unknown = 0.0, 0
    counts: dict[tuple[str, str, str], list[float | None]] = {}
    for job in jobs:
        place = job.model, job.task, "tuning" if job.tunes else "runs"
        counts.setdefault(place, []).append(study.about_seconds(job))
    for (model, task, kind), seconds in counts.items():
        timed = [s for s in seconds if s is not None]
        total_s, unknown = total_s + sum(timed), unknown + len(seconds) - len(timed)
        minutes = f"{sum(timed) / len(timed) / 60:6.1f} min" if timed else "not timed"
        print(f"{model:8} {task:7} {kind:7} {len(seconds):4} x {minutes}")
    print(
        f"{len(study.records)} stored, {len(jobs)} to run: about {total_s / 3600:.1f} hours", end=""
    )
    print(f", and {unknown} runs that `times` has not timed" if unknown else "")
    if study.strangers:
        print(f"{study.strangers} stored runs have other settings or seeds, and do not count")


def missing(study: Study, options: argparse.Namespace) -> list[Job]:
    return [
        job
        for job in study.jobs()
        if job not in study.records
        and (not options.model or job.model in options.model)
        and (not options.task or job.task in options.task or job.tunes)
        and (not options.method or job.method in options.method)
    ]


@contextmanager
def claimed(jobs: list[Job], folder: Path) -> Iterator[Job | None]:
    """The first run that no other command is making, with a lock on it; None: there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        with (folder / f"{job.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield job
            return
    yield None


@contextmanager
def undisturbed(folder: Path, *, timing: bool) -> Iterator[None]:
    """Several commands may make runs in a folder, but none beside one that times steps."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        kind = fcntl.LOCK_EX if timing else fcntl.LOCK_SH
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is timing or making runs in {folder}") from None
        yield


def work_folder(folder: Path, job: Job, settings: Mapping[str, Any], steps: int) -> Path:
    """Of a run's checkpoints; one that was stopped goes on under the same settings only."""
    numbers = json.dumps([settings, steps], sort_keys=True).encode()
    return folder / "work" / f"{job.name}, {hashlib.sha256(numbers).hexdigest()[:8]}"


def make_runs(study: Study, options: argparse.Namespace) -> None:
    meta = provenance(torch.device("cpu"))
    if meta["dirty"] and not options.dirty:
        raise UserError("the tree has uncommitted changes: commit them, or give --dirty")
    read, failed, done = task_reader(study, options), {}, 0
    show_plan(study, missing(study, options))
    while options.limit is None or done < options.limit:
        study.read()
        jobs = [j for j in missing(study, options) if j.rate is not None and j not in failed]
        with claimed(jobs, options.output / "work") as job:
            if job is None:
                break
            study.read()
            if job in study.records:  # by another command, before the lock was ours
                continue
            settings = study.settings(job.model, job.task, job.method)
            started = time.perf_counter()
            try:
                task = read(job)
                whole = settings["epochs"] * steps_per_epoch(task, settings)
                steps = study.steps(job.model, job.task, job.method, whole)
                work = work_folder(options.output, job, settings, steps)
                found = train(job, settings, task, steps, cache=options.cache, work=work)
            except Exception as error:  # of one run: those after it are hours of their own
                failed[job] = one_line(error)
                print(f"{job.name}: left out: {failed[job]}", flush=True)
                continue
            study.add(job, {**found, "meta": meta})
            shutil.rmtree(work, ignore_errors=True)
        gc.collect()
        done += 1
        minutes = (time.perf_counter() - started) / 60
        print(
            f"{job.name}: {found['score']:.2f}, {minutes:.1f} min, {len(jobs) - 1} left", flush=True
        )
    if failed:
        raise UserError(
            f"{len(failed)} runs were left out, the first: {next(iter(failed.values()))}"
        )


def measure_times(study: Study, options: argparse.Namespace) -> None:
    experiment, places = study.experiment, {}
    for part in experiment["parts"]:
        for task in part["tasks"]:
            places.setdefault((part["model"], task), []).extend(part["methods"])
    read = task_reader(study, options)
    for (model, name), methods in places.items():
        wanted = (not options.model or model in options.model) and (
            not options.task or name in options.task
        )
        path = options.output / TIMES / f"{model}-{name}.json"
        known = study.times.get((model, name), {"methods": {}})["methods"]
        # those of before again: a file holds what was timed together
        wanted_methods = {*(options.method or methods), *known}
        chosen = [m for m in methods if m in wanted_methods]
        if not wanted or known.keys() >= {*chosen}:
            continue
        started, settings = time.perf_counter(), experiment["models"][model]
        found = time_methods(
            {m: (study.settings(model, name, m), experiment["methods"][m]["way"]) for m in chosen},
            model,
            read(Job(model, name, methods[0], 0, None)),
            batches=settings["timed_batches"],
            rounds=settings["timed_rounds"],
            cache=options.cache,
        )
        meta = provenance(torch.device("cpu"))
        store({"meta": meta, "model": model, "task": name, **found}, path)
        print(f"{path}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def show_table(study: Study, options: argparse.Namespace) -> None:
    if not study.records:
        raise UserError(f"no runs in {options.output}")
    shown = table(study)
    print(shown)
    if options.page is not None:
        fill(options.page, shown)
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(study, options.picture)
        print(f"\n{options.picture}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["prepare", "times", "plan", "runs", "table"])
    parser.add_argument("--data", type=Path, help="folder of <task>/train.jsonl, validation.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="(%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of models (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    for name in ("model", "task", "method"):
        parser.add_argument(f"--{name}", action="append", help=f"this {name} alone; repeatable")
    parser.add_argument("--limit", type=int, help="of runs")
    parser.add_argument("--rows", type=int, help="training rows: a try")
    parser.add_argument("--dirty", action="store_true", help="run with uncommitted changes")
    parser.add_argument("--page", type=Path, help="fill its table between the study's markers")
    parser.add_argument("--picture", type=Path, help="draw the figure into this file")
    options = parser.parse_args()
    options.cache = options.cache.expanduser()
    # a script's folder is on the path: transformers would take kernels.py for a package it knows
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != EXPERIMENT.parents[1]]
    torch.set_num_threads(options.threads)
    try:
        if options.command == "prepare":
            prepare(options.cache)
            return
        study = Study(with_rows(read_settings(EXPERIMENT), options.rows), options.output)
        if options.command == "plan":
            show_plan(study, missing(study, options))
        elif options.command == "table":
            show_table(study, options)
        else:
            with undisturbed(options.output, timing=options.command == "times"):
                {"times": measure_times, "runs": make_runs}[options.command](study, options)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
