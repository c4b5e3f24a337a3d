"""`progtuning predict`: answers of a saved model, one JSON object for every row."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Image
from rich.console import Console
from torch import nn
from transformers import AutoConfig

from .config import columns_from
from .errors import UserError
from .models import cannot_load
from .options import TrainOptions
from .preparation import Prepared, Rows, prepare, read_rows, trainer_classes
from .tasks import KINDS

# of models that have another name than their auto class: T5ForConditionalGeneration, MarianMTModel
_OLD_NAMES = {
    "seq2seq": ("ForConditionalGeneration", "MTModel"),
    "causal-lm": ("LMHeadModel",),
    "question-answering": ("ForQuestionAnsweringSimple",),
}


def tasks_of(architectures: Sequence[str]) -> list[str]:
    """What models of these classes were trained for."""
    return [
        name
        for name, kind in KINDS.items()
        for architecture in architectures
        if architecture.endswith((f"For{kind.model}", *_OLD_NAMES.get(name, ())))
    ]


def predict_rows(model: nn.Module, prepared: Prepared, output: Path) -> int:
    """Write `output`: every row of "predict", and what the model says of it as "prediction"."""
    task, rows = prepared.task, prepared.rows.splits["predict"]
    first = prepared.args.process_index == 0
    if hasattr(task, "generate") and not first:
        return len(rows)
    if hasattr(task, "generate"):
        answers = task.generate(model.eval(), prepared.processor, rows)
    else:
        trainer = trainer_classes(task)[0](
            model=model,
            args=prepared.args,
            data_collator=prepared.collate,
            processing_class=prepared.processor,
            preprocess_logits_for_metrics=task.preprocess_logits,
        )
        predictions = trainer.predict(prepared.encoded["predict"]).predictions
        answers = task.answers(predictions, rows)
    if not first:
        return len(rows)
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    with output.open("w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            row |= {name: row[name]["path"] for name in images} | {"prediction": answer}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return len(rows)


def run(
    model: str,
    *,
    files: tuple[str, ...],
    output: Path,
    task: str | None,
    columns: tuple[str, ...],
    batch_size: int,
    max_length: int | None,
    max_new_tokens: int,
) -> None:
    if output.suffix != ".jsonl" or output in map(Path, files):
        raise UserError(f"--output {output}: answers are JSON lines, in a .jsonl file of their own")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # missing, damaged: there is no common class
        raise UserError(cannot_load(model, error)) from error
    found = tasks_of(config.architectures or ())
    if task is None and not found:
        raise UserError(f"{model} does not say what it was trained for: give --task")
    options = TrainOptions(
        model=model,
        task=task or found[0],
        predict_file=files,
        columns=columns_from(columns),
        max_new_tokens=max_new_tokens,
        max_length=max_length or getattr(config, "progtuning_max_length", TrainOptions.max_length),
        trainer={"per_device_eval_batch_size": batch_size, "report_to": ("none",)},
    )
    rows: Rows = read_rows(options, ("predict",))
    quiet = not sys.stderr.isatty()
    prepared = prepare(options, rows, remove_unused_columns=False, disable_tqdm=quiet)
    count: Any = predict_rows(prepared.model, prepared, output)
    Console().print(f"{count:,} rows: {output}", soft_wrap=True)
