"""A task of `progtuning train` under a plain Trainer, on a tiny BERT of its own kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tiny_models import tiny_model

from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.tasks import Task, task_class


def task_of(name: str, options: dict[str, Any] | None = None, **splits: list[dict]) -> Task:
    rows = {split: Dataset.from_list(own) for split, own in splits.items()}
    return task_class(name)(TrainOptions(**{"max_length": 32, **(options or {})}), rows)


def make_model(task: Task) -> torch.nn.Module:
    config = copy.deepcopy(tiny_model("bert-masked-lm").config)
    config.num_hidden_layers = 2
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    task.configure(config)
    torch.manual_seed(0)
    return getattr(transformers, task.auto_model).from_config(config)


def trainer_of_task(
    task: Task,
    model: torch.nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int = 0,
    **splits: Any,
) -> transformers.Trainer:
    """Splits are lists of rows; "validation" is evaluated, "train" trained on."""
    encoded = {
        split: task.encode(Dataset.from_list(rows), tokenizer, model, split)
        for split, rows in splits.items()
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            per_device_train_batch_size=16,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            seed=7,
        ),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        data_collator=task.collator(tokenizer, model),
        preprocess_logits_for_metrics=task.preprocess_logits,
        compute_metrics=lambda found: task.figures(found.predictions, found.label_ids),
    )


def answers_of(
    task: Task, model: torch.nn.Module, tokenizer: Any, folder: Path, rows: list[dict]
) -> list[dict[str, Any]]:
    trainer = trainer_of_task(task, model, tokenizer, folder)
    rows = Dataset.from_list(rows)
    found = trainer.predict(task.encode(rows, tokenizer, model, "predict"))
    return task.answers(found.predictions, rows)


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
