"""From options to a model and encoded rows: what train, predict and contribution begin with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn

from ..model.layout import Layout, find_layout
from . import models
from .config import training_arguments
from .data import digest, load_splits
from .errors import UserError, as_user_error
from .new_tokens import read_tokens, rows_of
from .options import TrainOptions
from .tasks import Task, task_class
from .tasks.causal_lm import sft_classes


@dataclass
class Rows:
    """Rows as they were read, and the task that they are of; no model is needed for it."""

    splits: dict[str, Dataset]
    task: Task
    description: str
    digest: str  # of the content that trains and is evaluated

    def summary(self) -> str:
        """One line: what was read, and what the labels were taken for."""
        counts = ", ".join(f"{len(rows):,} {split} rows" for split, rows in self.splits.items())
        about = self.task.summary()
        named = ", ".join(f"{k} from {v}" for k, v in self.task.columns.items() if k != v)
        return "; ".join(filter(None, (f"{self.description}: {counts}", named, about)))


@dataclass
class Prepared:
    """A model on its device, and the rows as it reads them."""

    options: TrainOptions
    rows: Rows
    args: transformers.TrainingArguments
    model: nn.Module
    processor: Any
    layout: Layout
    encoded: dict[str, Dataset]
    collate: Any
    notes: list[str]  # what a user should know of weights and rows

    @property
    def task(self) -> Task:
        return self.rows.task

    @property
    def new_ids(self) -> list[int]:
        """Ids of the tokens that were added."""
        tokens = read_tokens(self.options.add_tokens)
        return self.processor.convert_tokens_to_ids(tokens) if tokens else []

    @property
    def rows_to_train(self) -> dict[str, list[int]] | None:
        """`rows` of `patch_model`; None: whole weights train."""
        return rows_of(self.model, self.new_ids) if self.options.train_new_tokens else None

    def adapt(self, rank: int) -> None:
        """Put LoRA on the model; without a schedule PEFT trains the rows of new tokens, too."""
        rows = None if self.options.is_scheduled else self.rows_to_train
        self.model = models.wrap_lora(self.model, self.options.task, rank, rows)
        paths = [f"base_model.model.{stack.path}" for stack in self.layout.stacks]
        self.layout = find_layout(self.model, paths)

    def batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        collated = self.collate([dict(row) for row in rows])
        return {k: v.to(self.args.device) for k, v in collated.items()}

    def lengths(self, split: str) -> list[int]:
        """What a row takes in a batch: its tokens; 1 for what has none, as an image."""
        rows = self.encoded[split]
        if "input_ids" not in rows.column_names:
            return [1] * len(rows)
        return [len(ids) for ids in rows["input_ids"]]


def read_rows(options: TrainOptions, wanted: Sequence[str] = ("train", "validation")) -> Rows:
    """The rows that the options name; `UserError` if they cannot be used."""
    splits = load_splits(options, wanted)
    try:
        task = task_class(options.task)(options, splits)
    except UserError as error:
        if options.validation_split is None:
            raise
        # the parts of a file are shuffled
        said = re.sub(r"^(train|validation) row (\d+)", r"row \2 of the \1 part", str(error))
        raise UserError(said) from error
    # "label" may be the classes that have a column each; rows to predict need fewer columns
    foreign = options.columns.keys() - task.columns.keys() - {"label"}
    if foreign and "train" in wanted:
        taken = ", ".join(task.columns)
        raise UserError(f"--column {foreign.pop()}: {options.task} reads only {taken}")
    if options.dataset is not None:
        description = f"data set {options.dataset}"
    else:
        files = (*options.train_file, *options.validation_file)
        description = " and ".join(dict.fromkeys(name.rsplit("/", 1)[-1] for name in files))
    learnt = {split: own for split, own in splits.items() if split != "predict"}
    return Rows(splits, task, description, digest(learnt))


def trainer_classes(task: Task) -> tuple[type, type]:
    """The Trainer of a task, and the class of its arguments."""
    if task.trainer == "SFTTrainer":
        return sft_classes()
    arguments = task.trainer.replace("Trainer", "TrainingArguments")
    return getattr(transformers, task.trainer), getattr(transformers, arguments)


def prepare(
    options: TrainOptions, rows: Rows, *, weights: bool = True, **arguments: Any
) -> Prepared:
    """Load the model, encode the rows, and try a batch; `arguments` are the Trainer's.

    Without `weights` the model is on the meta device, and nothing is tried.
    """
    task = rows.task
    wanted = getattr(task, "trainer_options", {})
    arguments = {k: v for k, v in wanted.items() if k not in options.trainer} | arguments
    arguments["dataloader_pin_memory"] = torch.cuda.is_available()
    args = training_arguments(options, trainer_classes(task)[1], **arguments)
    transformers.set_seed(args.seed)
    model, processor, notes = models.load_model(options, task, args.device, weights=weights)
    if task.processor == "AutoTokenizer":
        models.check_length(model, options.max_length, "--max-length", processor)
        if "predict" in rows.splits and hasattr(task, "generate"):
            models.check_length(model, options.max_new_tokens, "--max-new-tokens", processor)
    encoded = {
        split: task.encode(own, processor, model, split) for split, own in rows.splits.items()
    }
    notes += getattr(task, "notes", [])
    with as_user_error():
        layout = find_layout(model, options.block_lists)
    if weights and not options.load_in_4bit:
        model.to(args.device)
    collate = task.collator(processor, model)
    prepared = Prepared(options, rows, args, model, processor, layout, encoded, collate, notes)
    if all("input_ids" in own.column_names for own in encoded.values()):
        notes += models.check_rows(model, processor, encoded)
    if "train" in encoded and (ids := prepared.new_ids):
        absent = {*ids}.difference(*encoded["train"]["input_ids"])
        if absent:
            notes.append(f"in no training row: {len(absent):,} of the {len(ids):,} tokens added")
    if not weights:
        return prepared
    # the longest row, and one that has to be padded
    longest = max(encoded, key=lambda split: max(prepared.lengths(split)))
    order = sorted(range(len(encoded[longest])), key=prepared.lengths(longest).__getitem__)
    batch = prepared.batch([encoded[longest][i] for i in (order[-1], order[0])])
    if task.trainer == "Seq2SeqTrainer" and "labels" not in batch:
        return prepared  # to generate: a forward wants what the decoder has said so far
    models.try_forward(model, batch, causal=options.task == "causal-lm")
    return prepared
