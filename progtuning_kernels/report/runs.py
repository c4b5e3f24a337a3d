"""Stored runs, and the figures taken from them.

A run is a `metrics.json` of `progtuning train` or a `trainer_state.json` of transformers' Trainer.
A figure that a run did not store is None and shown as "–", never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

MISSING = "–"
_FORMAT = 1
_METHODS = {"full": 0, "progressive": 1, "progressive-cache": 2, "lora": 3, "progressive-lora": 4}
# of the Trainer's evaluations, what is no metric
_NO_METRICS = re.compile(r"eval_(\w+_)?(loss|runtime|\w+_per_second|model_preparation_time)$")


@dataclass(frozen=True)
class Run:
    """One stored run: the fields of its metrics.json, or what a trainer_state.json has of them.

    Attributes:
        path: folder of the file.
        name: of the run; `METHOD-seed<N>` where a repeat is meant.
        method: "full", "progressive", "lora", ...
        seed: 0 where none was stored.
        metric_name: such as "accuracy".
        config: options of the run.
        meta: device, versions, commit.
        data: rows, label names, digest.
        model: name, number of parameters.
        steps: what was logged of each step: "step", "loss", ...
        evaluations: "step", "metric", and "train_seconds" where it was stored.
        stages: "stage" from 0, "boundary", "first_step", and what a step of it costs.
        summary: "metric", "train_seconds", peak bytes, ...
    """

    path: Path
    name: str
    method: str
    seed: int
    metric_name: str
    config: dict[str, Any]
    meta: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The repeats of one method: runs that did the same work with different seeds."""

    place: int  # in the table, from 0
    label: str
    method: str
    runs: list[Run]

    def values(self, key: str) -> list[float | None]:
        return [number(run.summary, key) for run in self.runs]


def find_run(path: str | Path) -> Path | None:
    """The file of the run in a folder, or `path` itself if it is a file; None if there is none.

    Args:
        path: of a folder with metrics.json, trainer_state.json or checkpoints, or of such a file.
    """
    path = Path(path)
    if path.is_file():
        return path
    checkpoints = path.glob("checkpoint-*/trainer_state.json")
    newest_first = sorted(checkpoints, key=lambda p: (len(p.parent.name), p.parent.name))[::-1]
    found = (path / "metrics.json", path / "trainer_state.json", *newest_first)
    return next((file for file in found if file.exists()), None)


def load_run(path: str | Path) -> Run:
    """Read a run from its folder or its file.

    Args:
        path: as for `find_run`.

    Raises:
        ValueError: there is no run, or its file cannot be read; says what is wrong with it.
    """
    file = find_run(path)
    if file is None:
        raise ValueError(f"{path}: no metrics.json here, and no trainer_state.json, so no run")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None
    if isinstance(stored, dict) and "log_history" in stored:
        return _of_trainer(file, stored)
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{file}: not a run of format {_FORMAT} (format: {found!r})")
    kinds = get_type_hints(Run)
    del kinds["path"]
    for name, kind in kinds.items():
        if name not in stored:
            raise ValueError(f"{file}: {name!r} is missing")
        value = stored[name]
        entries = value if isinstance(value, list) else ()
        if type(value) is not (get_origin(kind) or kind) or any(
            type(e) is not dict for e in entries
        ):
            raise ValueError(f"{file}: {name!r} is not what a run stores there")
    if type(stored["meta"].get("versions") or {}) is not dict:
        raise ValueError(f"{file}: the versions in 'meta' are not by package")
    for stage in stored["stages"]:
        flags = stage.get("trainable")
        says_what = number(stage, "boundary") is not None if flags is None else type(flags) is list
        if not says_what or number(stage, "first_step") is None:
            raise ValueError(f"{file}: a stage does not say what it trains, or from which step on")
    return Run(file.parent, *(stored[name] for name in kinds))


def _of_trainer(file: Path, state: Mapping[str, Any]) -> Run:
    """A run of the Trainer; its name, method and seed are those of its folder, `METHOD-seed<N>`.

    Stages are known to the logging step. Seconds are the `train_runtime` of the last `train()`,
    evaluation included; the state in a checkpoint does not have it.
    """
    logs = state["log_history"]
    is_list = isinstance(logs, list) and all(isinstance(log, dict) for log in logs)
    if not is_list or not all("step" in log for log in logs):
        raise ValueError(f"{file}: 'log_history' is no list of the Trainer's logs")
    folder = file.resolve().parent
    name = folder.parent.name if re.fullmatch(r"checkpoint-\d+", folder.name) else folder.name
    method, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", name).groups()
    named = [key for log in logs for key in log if key.startswith("eval_")]
    metric = next((key for key in named if not _NO_METRICS.match(key)), "eval_loss")
    evaluations = [{"step": log["step"], "metric": log[metric]} for log in logs if metric in log]
    steps = [log for log in logs if "loss" in log]
    stages: list[dict[str, Any]] = []
    for log in (log for log in steps if {"stage", "boundary"} <= log.keys()):
        stage = {"stage": log["stage"] - 1, "boundary": log["boundary"]}
        if not stages or stages[-1]["stage"] != stage["stage"]:
            stages.append(stage | {"first_step": stages[-1]["last_step"] + 1 if stages else 1})
        stages[-1]["last_step"] = log["step"]
    config = {"epochs": state.get("num_train_epochs"), "batch_size": state.get("train_batch_size")}
    seconds = [log["train_runtime"] for log in logs if "train_runtime" in log][-1:]
    summary = {"steps": state.get("global_step"), "train_seconds": seconds[0] if seconds else None}
    summary["metric"] = evaluations[-1]["metric"] if evaluations else None
    about = (name, method, int(seed or 0), metric.removeprefix("eval_"), config, {}, {}, {})
    return Run(file.parent, *about, steps, evaluations, stages, summary)


def group_runs(runs: Sequence[Run]) -> list[Row]:
    """Rows in the order of the methods; seeds that did other work are rows of their own.

    Args:
        runs: in any order.

    Raises:
        ValueError: no run at all, one run twice, or runs of different metrics.
    """
    if not runs:
        raise ValueError("no runs to report")
    if len(metrics := distinct(run.metric_name for run in runs)) > 1:
        shown = ", ".join(metrics)
        cut = [run.path.parent for run in runs if run.path.name.startswith("checkpoint-")]
        if cut:
            shown += f"; of {cut[0]} there is only a checkpoint"
        raise ValueError(f"runs measure different metrics ({shown}): report them apart")
    groups: dict[tuple[str, str, tuple[str, ...]], list[Run]] = {}
    for run in runs:
        base = run.name.removesuffix(f"-seed{run.seed}")
        for name in (base, f"{run.path.resolve().parent.name}/{base}"):  # so named in two folders
            repeats = groups.setdefault((run.method, name, (*work(run).values(),)), [])
            if run.seed not in {other.seed for other in repeats}:
                repeats.append(run)
                break
        else:
            raise ValueError(f"{run.path}: this run, or one like it, is given twice")
    rows = []
    for method in sorted({m for m, *_ in groups}, key=lambda m: (_METHODS.get(m, 9), m)):
        own = [(name, group) for (m, name, _), group in groups.items() if m == method]
        for name, group in own:
            label = name if len({name for name, _ in own}) > 1 else method
            namesakes = [other[0] for other_name, other in own if other_name == name]
            label += "".join(f", {w} {work(group[0])[w]}" for w in differences(namesakes))
            rows.append(Row(len(rows), label, method, group))
    return rows


def work(run: Run) -> dict[str, str]:
    """What a run had to do, beyond its method, the method's settings, and its seed."""

    def of(source: Mapping[str, Any], *keys: str) -> str:
        found = (source.get(key) for key in keys)
        return " x ".join(MISSING if value is None else str(value) for value in found)

    parameters = show(number(run.model, "num_params"), ",.0f")
    return {
        "devices": of(run.meta, "device"),
        "data": of(run.data, "train_rows", "validation_rows", "label_names"),
        "models": f"{of(run.model, 'name')}, {parameters} parameters",
        "epochs": of(run.config, "epochs"),
        "steps": of(run.summary, "steps"),
        "batch sizes": of(run.config, "batch_size", "accumulate"),
        "sequence lengths": of(run.config, "max_length"),
        "precisions": of(run.config, "precision"),
    }


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What differs in the work of these runs, and the values; a seed may choose its own rows."""
    found = {what: distinct(work(run)[what] for run in runs) for what in work(runs[0])}
    for seed in {run.seed for run in runs}:
        rows = [run.data for run in runs if run.seed == seed]
        content = distinct(f"{d.get('description')}, content {d.get('digest')}" for d in rows)
        found["data"] = content if len(content) > 1 else found["data"]
    return {what: values for what, values in found.items() if len(values) > 1}


def full_row(rows: Sequence[Row], row: Row) -> Row | None:
    """The first row of the method full that did the same work as `row`, if all its runs learnt."""
    for full in (other for other in rows if other.method == "full"):
        runs = [*full.runs, *row.runs]
        if not differences(runs) and not any(run.summary.get("failure") for run in runs):
            return full
    return None


def number(figures: Mapping[str, Any], key: str) -> float | None:
    """The finite number that is stored under `key`."""
    value = figures.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def show(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)


def distinct(values: Iterable[object]) -> list[str]:
    """As texts, in the order in which they come."""
    return list(dict.fromkeys(MISSING if value is None else str(value) for value in values))
