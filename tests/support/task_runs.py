"""Tasks of `progtuning train`: made from rows, and run from files to answers on a tiny BERT."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from tiny_folders import sentence_tokenizer
from tiny_models import tiny_model

from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.models import auto_class
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.tasks import Task, task_class


def task_of(name: str, options: dict[str, Any] | None = None, **splits: list[dict]) -> Task:
    rows = {split: Dataset.from_list(own) for split, own in splits.items()}
    return task_class(name)(TrainOptions(**{"max_length": 32, **(options or {})}), rows)


def train_and_predict(
    task: str, folder: Path, *options: object, predict: list[dict], **splits: list[dict]
) -> SimpleNamespace:
    """A run of three stages, and a call of `progtuning predict` on the folder that it saved.

    Returns:
        `figures` of the last evaluation, the saved `model` by the plain class, and `answers` to the
        rows of `predict`, which were the same in both calls.
    """
    start = tiny_model("bert-masked-lm")
    start.config.hidden_dropout_prob = start.config.attention_probs_dropout_prob = 0.0
    start.save_pretrained(folder / "start")
    sentence_tokenizer().save_pretrained(folder / "start")
    for name, rows in {**splits, "predict": predict}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = {
        "--task": task,
        "--model": folder / "start",
        "--train-file": folder / "train.jsonl",
        "--validation-file": folder / "validation.jsonl",
        "--predict-file": folder / "predict.jsonl",
        "--output": folder / "run",
    }
    fixed = {"--batch-size": 16, "--lr": 1e-2, "--save-strategy": "no"}
    given = [str(word) for pair in {**files, **fixed}.items() for word in pair]
    main(["train", *given, *map(str, options)])

    output, answers = folder / "run", folder / "answers.jsonl"
    call = ["predict", output / "model", "--file", folder / "predict.jsonl", "--output", answers]
    main([*map(str, call)])
    found = [
        [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in (output / "predictions.jsonl", answers)
    ]
    assert found[0] == found[1]
    metrics = json.loads((output / "metrics.json").read_text())
    return SimpleNamespace(
        figures=metrics["evaluations"][-1],
        model=auto_class(task).from_pretrained(output / "model"),
        answers=found[0],
    )


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_from_files(folder: Path, *arguments: object, **splits: list[dict]) -> dict[str, Any]:
    """`progtuning train` with rows as JSONL files; metrics.json, and "folder" of the model.

    Rows of "predict" give "predictions".
    """
    files = []
    for split, rows in splits.items():
        files += [f"--{split}-file", write_rows(folder / f"{split}.jsonl", rows)]
    common = ["--output", folder / "run", "--batch-size", 16, "--lr", 1e-2, "--device", "cpu"]
    main(["train", *map(str, [*files, *common, *arguments])])
    run = json.loads((folder / "run/metrics.json").read_text()) | {"folder": folder / "run/model"}
    if "predict" in splits:
        run["predictions"] = read_predictions(folder / "run/predictions.jsonl")
    return run


def read_predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]


def predict_from_file(model: Path, rows: Path, *arguments: object) -> list[dict[str, Any]]:
    """`progtuning predict`, which finds the task of the model."""
    output = model.parent / "answers.jsonl"
    main(
        ["predict", str(model), "--file", str(rows), "--output", str(output), *map(str, arguments)]
    )
    return read_predictions(output)
