"""`progtuning train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from ..patch import patch_model
from ..schedules import MilestoneSchedule, decides_by_gradients
from .batches import Order
from .datasets import Columns, Example, TextData, build_data, read_hub, read_rows
from .docstrings import load_docstrings
from .engine import Run
from .errors import UserError, as_user_error
from .methods import build_schedule
from .models import load_model_and_tokenizer
from .output import check_run_folder
from .progress import TrainProgress
from .settings import TrainSettings

_MOST_ROWS = 20  # of a plan: a random schedule may have a stage every few steps


def load_data(s: TrainSettings) -> TextData:
    """The examples that the settings ask for; `UserError` if they cannot be used."""
    if s.dataset is None and s.train_file is None:
        raise UserError("no data: give --train-file and --validation-file, or --dataset")
    if s.dataset is not None:
        for option, file in (("train", s.train_file), ("validation", s.validation_file)):
            if file is not None:
                raise UserError(f"--dataset and --{option}-file exclude each other")
    if s.dataset == "docstrings":
        if s.text_column or s.pair_column or s.label_column:
            raise UserError("--dataset docstrings has no columns to choose from")
        if s.task == "causal-lm":
            raise UserError("--dataset docstrings is a classification; use files for causal-lm")
        return docstring_data(s.max_train_rows or 2400, s.max_validation_rows or 800)
    if s.dataset is not None:
        train, validation = read_hub(s.dataset)
        description = f"hub data set {s.dataset}"
    else:
        if s.validation_file is None:
            raise UserError("--train-file needs --validation-file")
        train, validation = read_rows(s.train_file), read_rows(s.validation_file)
        description = f"{s.train_file.name} and {s.validation_file.name}"
    return build_data(
        train[: s.max_train_rows],
        validation[: s.max_validation_rows],
        columns=Columns(s.text_column, s.pair_column, s.label_column),
        labelled=s.task == "classification",
        description=description,
    )


def docstring_data(train_rows: int, validation_rows: int) -> TextData:
    """The same rows for every seed of a run, so that seeds differ in training alone."""
    with as_user_error():
        data = load_docstrings(train_rows=train_rows, validation_rows=validation_rows)
    return TextData(
        [Example(text, None, label) for text, label in data.train],
        [Example(text, None, label) for text, label in data.validation],
        tuple(data.label_names),
        data.description,
    )


def plan_table(s: TrainSettings, data: TextData) -> Table:
    """What a run would do, stage by stage, without loading weights."""
    if s.task == "causal-lm" and s.max_steps is None:
        raise UserError("--dry-run of causal-lm needs --max-steps: rows are cut while training")
    model, *_ = load_model_and_tokenizer(s.model, s.task, data.label_names, weights=False)
    order = Order([1] * len(data.train), batch_size=s.batch_size, accumulate=s.accumulate, seed=0)
    total_steps = s.max_steps or s.epochs * order.steps_per_epoch
    with as_user_error():
        schedule = build_schedule(s, total_steps)
        used = MilestoneSchedule({}, embeddings="always") if s.method == "full" else schedule
        handle = patch_model(model, used, tied=s.tied, blocks=s.block_lists)
    table = Table(title=f"{s.method}, {total_steps:,} steps, {handle.num_blocks} blocks")
    columns = ("stage", "steps", "trains", "active params (M)", "step cost")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 2 else "right")
    updates = 0
    stages = [schedule.stage(step) for step in range(total_steps)]
    firsts = [0, *(i for i in range(1, total_steps) if stages[i] != stages[i - 1])]
    for stage, (first, end) in enumerate(zip(firsts, [*firsts[1:], total_steps], strict=True)):
        with as_user_error():
            handle.seek(first)
        updates += handle.active_params * (end - first)
        if stage >= _MOST_ROWS:
            continue
        # below the boundary a block costs its forward, above it a frozen one all but its dW
        below = handle.boundary
        above = handle.plan.trainable[below:].count(False)
        cost = 1 - (2 * below + above) / (3 * handle.num_blocks)
        table.add_row(
            str(stage + 1),
            f"{first + 1:,}-{end:,}",
            handle.plan.units_in_words(),
            f"{handle.active_params / 1e6:,.2f}",
            f"{cost:.3f}",
        )
    saved = 1 - updates / (handle.trainable_params * total_steps)
    table.caption = (
        f"{saved:.1%} of parameter updates saved. Step cost: expected, relative to the full step: "
        "1 - 2f/3, f the frozen share of the blocks (1 - f/3 where the embeddings go on training); "
        "embeddings and head left out."
    )
    if len(firsts) > _MOST_ROWS:
        table.caption += f" The first {_MOST_ROWS} of {len(firsts)} stages."
    if decides_by_gradients(schedule):
        table.caption += " What an adaptive schedule freezes later is decided while it trains."
    return table


def run(options: Mapping[str, Any], *, dry_run: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "progtuning train runs in one process; on several, use the Trainer with "
            "ProgtuningCallback, or a loop of your own (examples/accelerate_loop.py), by torchrun"
        )
    s = TrainSettings(**options)
    console = Console()
    if not dry_run:
        check_run_folder(s.output, resume=s.resume, overwrite=s.overwrite)
    elif s.uses_lora:
        raise UserError("--dry-run plans full and progressive")
    data = load_data(s)
    console.print(data.summary(), soft_wrap=True, markup=False)
    if dry_run:
        console.print(plan_table(s, data))
        return
    trained = Run(s, data, name=s.output.name)
    for note in trained.notes:
        console.print(note, soft_wrap=True, markup=False)
    result = trained.train(TrainProgress(console))
    summary = result["summary"]
    for line in (
        f"{result['metric_name']}: {summary['metric']:.4f}",
        f"training: {summary['train_seconds']:.1f} s",
        f"parameter updates saved: {summary['updates_saved_share']:.1%}",
        f"peak optimizer state: {summary['peak_state_bytes'] / 2**20:.1f} MiB",
        f"peak saved activations: {summary['peak_activation_bytes'] / 2**20:.1f} MiB",
    ):
        console.print(line, highlight=False)
    if summary["packing"] is not None:
        console.print(summary["packing"], highlight=False, markup=False, soft_wrap=True)
    if summary["skipped_steps"]:
        console.print(
            f"{summary['skipped_steps']} of {summary['steps']} steps skipped: non-finite gradients"
        )
    if summary["failure"] is None:
        console.print(f"model: {s.output / 'model'}", soft_wrap=True)
    console.print(f"figures: {s.output / 'metrics.json'}", soft_wrap=True)
    if summary["failure"] is not None:
        fail_learning([f"{summary['failure']}; no model was saved"])


def fail_learning(reasons: Sequence[str]) -> NoReturn:
    """Exit with status 3: the training ran, and a model learnt nothing."""
    print(f"error: nothing was learnt: {'; '.join(reasons)}", file=sys.stderr)
    raise SystemExit(3)
