"""The accuracy study: GLUE tasks, every method, several seeds, from files given by a path.

    python benchmarks/accuracy_study.py --data FOLDER [--task cola] [--method full] [--seeds 3]

`FOLDER/<task>/train.jsonl` and `validation.jsonl` hold the rows (`text`, or `text_a` and `text_b`,
and `label`). What trains is in `benchmarks/experiments/accuracy.toml`. A finished run is one JSON
in `<output>/accuracy/<task>/`; finished ones are skipped and a stopped one goes on from its newest
checkpoint, so that the study can be run in pieces. `benchmarks/plot.py <output>` makes tables and
the figure from them.

Every method sees the same rows in the same order and starts from the same head.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from progtuning_kernels.cli.app import train
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.preparation import read_rows
from progtuning_kernels.cli.train import Run, write_json
from progtuning_kernels.schedules.files import read_settings

EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "accuracy.toml"


def options_of(
    experiment: Mapping[str, Any], task: str, method: str, seed: int, *, data: Path, work: Path
) -> TrainOptions:
    """One run's options."""
    chosen = {**experiment["common"], **experiment["tasks"][task], **experiment["methods"][method]}
    if "." in chosen.get("schedule", ""):
        chosen["schedule"] = str(EXPERIMENT.parent / chosen["schedule"])
    chosen |= {
        "train-file": data / task / "train.jsonl",
        "validation-file": data / task / "validation.jsonl",
        "seed": seed,
        "output": work / f"{task}-{method}-seed{seed}",
        "checkpoint-every": 200,
        "keep-checkpoints": 1,
    }
    arguments = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in chosen.items()
    ]
    options, _ = train.options(train.make_context("train", [*arguments, "--resume"]))
    return options


def stored(result: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What is kept of a run's metrics.json: no step by step record, no path of a machine."""
    config = {k: v for k, v in result["config"].items() if k not in ("resume", "overwrite")}
    config["schedule"] = Path(config["schedule"]).name
    for key in ("train_file", "validation_file"):
        config[key] = [Path(one).name for one in config[key]]
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
        options = options_of(
            experiment, task, method, seed, data=arguments.data, work=arguments.work
        )
        result = Run(options, read_rows(options), name=method, console=console).train()
        if (failure := result["summary"]["failure"]) is not None:
            raise UserError(f"{task}, {method}, seed {seed}: {failure}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, stored(result, method))
        shutil.rmtree(options.output)  # figures alone are wanted; a model is 90 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with one folder of JSONL per task"
    )
    parser.add_argument("--task", action="append", help="a task; all without it")
    parser.add_argument("--method", action="append", help="a method; all without it")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--seed", type=int, action="append", help="this one only")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="for the JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="for checkpoints")
    arguments = parser.parse_args()
    arguments.seed = arguments.seed or [*range(arguments.seeds)]
    try:
        run(arguments)
    except (UserError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
