"""The accuracy study: GLUE tasks, every method, several seeds, from files given by a path.

    python benchmarks/accuracy_study.py --data FOLDER [--task cola] [--method full] [--seeds 3]
    python benchmarks/accuracy_study.py --table FOLDER       # the tables of the docs
    python benchmarks/accuracy_study.py --figure FOLDER PNG  # score against time

`FOLDER/<task>/train.jsonl` and `validation.jsonl` hold the rows (`text`, or `text_a` and `text_b`,
and `label`). What trains is in `benchmarks/experiments/accuracy.toml`. A finished run is one JSON
in `<output>/accuracy/<task>/`; finished ones are skipped and a stopped one goes on from its newest
checkpoint, so that the study can be run in pieces.

Every method sees the same rows in the same order and starts from the same head. `train_seconds`
counts training steps alone; the tables show that of the fastest seed, since whatever else a machine
does only adds to it, and mean and standard error of everything else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from progtuning_kernels.cli.engine import Run, write_json
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.progress import TrainProgress
from progtuning_kernels.cli.settings import TrainSettings
from progtuning_kernels.cli.train import load_data
from progtuning_kernels.schedules.files import read_settings

EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "accuracy.toml"
NAMES = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
METRICS = {
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "accuracy": "accuracy",
    "f1": "F1",
}


def settings_of(
    experiment: Mapping[str, Any], task: str, method: str, seed: int, *, data: Path, work: Path
) -> TrainSettings:
    """One run's settings."""
    chosen = {**experiment["common"], **experiment["tasks"][task], **experiment["methods"][method]}
    if "." in chosen.get("schedule", ""):
        chosen["schedule"] = str(EXPERIMENT.parent / chosen["schedule"])
    return TrainSettings(
        **chosen,
        train_file=data / task / "train.jsonl",
        validation_file=data / task / "validation.jsonl",
        seed=seed,
        output=work / f"{task}-{method}-seed{seed}",
        checkpoint_every=200,
        keep_checkpoints=1,
        resume=True,
    )


def stored(result: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What is kept of a run's metrics.json: no step by step record, no path of a machine."""
    config = {
        key: Path(value).name if key in ("train_file", "validation_file", "schedule") else value
        for key, value in result["config"].items()
        if key != "output"
    }
    kept = {key: value for key, value in result.items() if key not in ("steps", "config")}
    return kept | {"name": method, "config": config}


def run(arguments: argparse.Namespace) -> None:
    # a script's folder is on the path: transformers would take kernels.py for a package it knows
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != EXPERIMENT.parents[1]]
    experiment = read_settings(EXPERIMENT)
    tasks = arguments.task or [*experiment["tasks"]]
    methods = arguments.method or [*experiment["methods"]]
    for kind, chosen in (("tasks", tasks), ("methods", methods)):
        unknown = [name for name in chosen if name not in experiment[kind]]
        if unknown:
            raise UserError(
                f"no {unknown[0]!r} in {EXPERIMENT.name}: {', '.join(experiment[kind])}"
            )
    console = Console()
    wanted = [(s, t, m) for s in arguments.seed for t in tasks for m in methods]
    for number, (seed, task, method) in enumerate(wanted, 1):
        path = arguments.output / "accuracy" / task / f"{method}-seed{seed}.json"
        if path.exists():
            continue
        console.print(f"[bold]{number} of {len(wanted)}: {task}, {method}, seed {seed}")
        settings = settings_of(
            experiment, task, method, seed, data=arguments.data, work=arguments.work
        )
        shutil.rmtree(settings.output / "model", ignore_errors=True)
        result = Run(settings, load_data(settings), name=method).train(TrainProgress(console))
        if (failure := result["summary"]["failure"]) is not None:
            raise UserError(f"{task}, {method}, seed {seed}: {failure}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, stored(result, method))
        shutil.rmtree(settings.output)  # figures alone are wanted; a model is 90 MB


def load(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Stored runs by task and method, both in the order of the experiment's file."""
    experiment = read_settings(EXPERIMENT)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in experiment["tasks"]:
        for method in experiment["methods"]:
            paths = sorted((folder / "accuracy" / task).glob(f"{method}-seed*.json"))
            if paths:
                runs = [json.loads(path.read_text()) for path in paths]
                found.setdefault(task, {})[method] = runs
    return found


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and its standard error; of one value there is none."""
    values = [*values]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def _figures(runs: list[dict[str, Any]]) -> tuple[float, float | None, float]:
    score, error = mean_and_error(run["summary"]["metric"] for run in runs)
    return score, error, min(run["summary"]["train_seconds"] for run in runs)


def table(folder: Path) -> str:
    """One Markdown table per task."""
    lines = []
    for task, methods in load(folder).items():
        first = next(iter(methods.values()))[0]
        full_s = _figures(methods["full"])[2] if "full" in methods else None
        lines += [
            f"**{NAMES[task]}**, {first['data']['train_rows']:,} rows, "
            f"{first['config']['epochs']} epochs, {first['summary']['steps']:,} steps:",
            "",
            f"| Method | Seeds | {METRICS[first['metric_name']]} | Training (s) | / full | "
            "Updates saved (%) | Peak state (MiB) |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for method, runs in methods.items():
            score, error, train_s = _figures(runs)
            shown = f"{score:.3f}" if error is None else f"{score:.3f} ± {error:.3f}"
            ratio = "–" if full_s is None else f"{train_s / full_s:.2f}"
            saved = statistics.mean(run["summary"]["updates_saved_share"] for run in runs)
            state = max(run["summary"]["peak_state_bytes"] for run in runs)
            lines.append(
                f"| {method} | {len(runs)} | {shown} | {train_s:.0f} | {ratio} | "
                f"{100 * saved:.1f} | {state / 2**20:.1f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def contribution_table(folder: Path) -> str:
    """How far the measures of `progtuning contribution` agree on the order of the blocks.

    From `<folder>/contribution/<task>.json`, as the command writes them.
    """
    rows = []
    for task in NAMES:
        path = folder / "contribution" / f"{task}.json"
        if not path.exists():
            continue
        stored = json.loads(path.read_text())
        found = {tuple(c["between"]): c["spearman"] for c in stored["rank_correlations"]}
        pairs = [("train", "skip"), ("train", "gradient"), ("skip", "gradient")]
        cells = [f"{found[pair]:+.2f}" for pair in pairs]
        rows.append(f"| {NAMES[task]}, {stored['config']['steps']} steps | {' | '.join(cells)} |")
    heads = ("Spearman, blocks of MiniLM", "train – skip", "train – gradient", "skip – gradient")
    return "\n".join([f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: |", *rows])


def figure(folder: Path, path: Path) -> None:
    """Score against time, one panel per task, a point per method with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = load(folder)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(7.5 * len(tasks), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (task, methods) in zip(axes[0], tasks.items(), strict=True):
        for index, (method, runs) in enumerate(methods.items()):
            score, error, train_s = _figures(runs)
            axis.errorbar(
                train_s,
                score,
                yerr=error,
                fmt="osD^vPX<>ph*"[index % 12],
                color=plt.get_cmap("tab20")(index % 20),
                markersize=8,
                capsize=3,
                label=method,
            )
        first = next(iter(methods.values()))[0]
        axis.set_xlabel("training time (s), fastest seed")
        axis.set_ylabel(f"{METRICS[first['metric_name']]} (mean ± standard error)")
        axis.set_title(f"{NAMES[task]}, {first['summary']['steps']:,} steps", loc="left")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one folder of JSONL per task")
    parser.add_argument("--task", action="append", help="a task; all without it")
    parser.add_argument("--method", action="append", help="a method; all without it")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--seed", type=int, action="append", help="this one only")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="for the JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="for checkpoints")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print tables, train nothing")
    parser.add_argument("--figure", nargs=2, type=Path, metavar=("FOLDER", "PNG"))
    arguments = parser.parse_args()
    arguments.seed = arguments.seed or [*range(arguments.seeds)]
    try:
        if arguments.table is not None:
            print(table(arguments.table))
            print(contribution_table(arguments.table))
        elif arguments.figure is not None:
            figure(*arguments.figure)
        elif arguments.data is None:
            raise UserError("--data FOLDER is missing: where the tasks' JSONL files are")
        else:
            run(arguments)
    except (UserError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
