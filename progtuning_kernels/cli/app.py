"""The `progtuning` command. Heavy imports happen inside the commands, so `--help` is quick."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import click

from .. import __version__
from .config import RunCommand, as_yaml, choose_device, finite
from .errors import UserError, as_user_error, end_with
from .options import CONTRIBUTION, DEMO, DTYPES, OPTIMIZERS, PLANNED, Method, TrainOptions
from .tasks import TASKS

_PATH = click.Path(path_type=Path)


def _positive(default: int | None = None) -> dict[str, Any]:
    return {"type": click.IntRange(min=1), "default": default}


def _rate(default: float) -> dict[str, Any]:
    kind = click.FloatRange(0, min_open=True)
    return {"type": kind, "default": default, "metavar": "GBPS", "callback": finite}


def _choice(*values: str) -> dict[str, Any]:
    return {"type": click.Choice(values), "default": values[0]}


@click.group(
    context_settings={
        "show_default": True,
        "max_content_width": 80,
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --learning_rate
    }
)
@click.version_option(__version__)
def app() -> None:
    """Progressive fine-tuning of Transformers; frozen blocks cost nothing."""


@app.command(
    cls=RunCommand,
    epilog="Example: progtuning train --train-file train.jsonl --validation-file dev.jsonl "
    "--model bert-base-uncased --output runs/mine",
)
@click.option(
    "--dry-run", is_flag=True, help="Print all options and the plan as a CONFIG, train nothing."
)
def train(options: TrainOptions, dry_run: bool) -> None:
    """Fine-tune a model, with transformers' Trainer.

    CONFIG is a .yaml, .toml or .json file of the same options; those on the command line go before
    it, and paths in it start from the folder of the call. Every other field of
    transformers.TrainingArguments is an option as well.

    Exit status: 0; 2 for a call, a file or a model that cannot be used (one line says why); 3 if
    nothing was learnt: the validation loss is not finite in the end, or in half of the steps the
    loss or its gradients were not. No model is saved then.
    """
    options.check()
    choose_device(options.device)
    from . import train as command

    said = io.StringIO()
    with redirect_stdout(said) if dry_run else nullcontext():
        command.run(options, dry_run=dry_run)
    if dry_run:  # all of it is a file that the command reads
        plan = textwrap.indent(said.getvalue(), "# ", lambda line: True)
        click.echo(f"{as_yaml(options)}\n{plan}")


@app.command(
    epilog="Example: progtuning predict runs/mine/model --file rows.jsonl --output answers.jsonl"
)
@click.argument("model")
@click.option("--file", "files", multiple=True, required=True, help="Rows; repeatable.")
@click.option("--output", required=True, type=_PATH, help="Gets a JSON object for every row.")
@click.option("--task", type=click.Choice(TASKS), metavar="TASK", help="Found unless given.")
@click.option("--column", "columns", multiple=True, help="ROLE=NAME, as for train; repeatable.")
@click.option("--batch-size", **_positive(32), help="Rows per batch.")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of a row at most.")
@click.option("--max-new-tokens", **_positive(128), help="Tokens of a generated text at most.")
@click.option("--device", default="auto", help="auto, cpu, cuda, or one GPU: cuda:1.")
def predict(device: str, **options: Any) -> None:
    """Answer rows with a model that train has saved."""
    choose_device(device)
    from . import predict as command

    command.run(**options)


@app.command(
    cls=RunCommand,
    shown=PLANNED,
    defaults={"task": "auto"},
    epilog="Example: progtuning plan --model Llama-3-8B/config.json --max-length 2048 "
    "--batch-size 4 --precision bf16-pure --state-dtype 8bit --device cuda --memory 80GB",
)
@click.option(
    "--dtype", type=click.Choice([*DTYPES]), help="Of the weights: --precision fp32 or bf16-pure."
)
@click.option("--optimizer", type=click.Choice([*OPTIMIZERS]), help="The same as --state-dtype.")
@click.option(
    "--padding/--no-padding", default=True, help="Whether rows are padded, and attention masked."
)
@click.option(
    "--real-tokens",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    metavar="SHARE",
    callback=finite,
    help="Share of a batch's places that are no padding: packing computes blocks on these alone.",
)
@click.option("--memory", help="What has to suffice, such as 24GiB.")
@click.option("--calibrate", is_flag=True, help="Time two blocks, embeddings and head here.")
@click.option(
    "--pcie",
    "pcie_gbps",
    **_rate(25.0),
    help="--state-device cpu: GB/s between host and device, each way.",
)
@click.option(
    "--host-bandwidth",
    "host_gbps",
    **_rate(40.0),
    help="--state-device cpu: GB/s of host memory, unless --calibrate times the update.",
)
@click.option("--ranks", **_positive(1), help="Processes: bytes are those of one of them.")
@click.option(
    "--strategy", type=click.Choice(["ddp", "fsdp2", "zero2"]), help="Of several; ddp unless given."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def plan(options: TrainOptions, dtype: str | None, optimizer: str | None, **more: Any) -> None:
    """Show what every stage of a run would cost: operations, memory, time.

    No weights are needed: --model may be a config.json. CONFIG is a file of options as train takes
    it; what decides no cost is left aside.
    """
    options = options.by_names_of_python(dtype, optimizer)
    options.check()
    from . import plan_command

    plan_command.run(options, **more)


@app.command(epilog="Example: progtuning bench --model minilm --batch-size 32 --seq-len 64")
@click.option("--model", default="minilm", help="Folder, config.json or hub id; random weights.")
@click.option(
    "--task",
    **_choice("auto", "classification", "causal-lm"),
    help="auto: a language model if the config says so, otherwise classification.",
)
@click.option("--stages", **_positive(3), help="Stages of the schedule.")
@click.option(
    "--embeddings",
    **_choice("first_stage", "always", "never"),
    help="When the embeddings train.",
)
@click.option("--blocks", help="Path of the block list where it cannot be found; with commas.")
@click.option("--batch-size", **_positive(32), help="Rows per batch.")
@click.option("--seq-len", **_positive(64), help="Tokens per row.")
@click.option(
    "--precision", **_choice("auto", "fp32", "bf16"), help="auto: bf16 autocast on GPUs that do it."
)
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
    cls=RunCommand,
    shown=CONTRIBUTION,
    defaults={"output_dir": "runs/contribution", "learning_rate": 1e-4, "max_steps": 50},
    epilog="Example: progtuning contribution --dataset docstrings --output runs/contribution",
)
def contribution(options: TrainOptions) -> None:
    """Measure what every block contributes, for a schedule with weights.

    As in the paper: the fall in validation loss when the block trains beside embeddings and head.
    There is a training of --max-steps for every block, and one of none of them.
    """
    options.check()
    choose_device(options.device)
    from . import contribution_command

    contribution_command.run(options)


@app.command(
    cls=RunCommand,
    shown=DEMO,
    defaults={
        "dataset": "docstrings",
        "max_train_rows": 2400,
        "max_validation_rows": 800,
        "max_length": 64,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "output_dir": "runs/demo",
    },
    epilog="Example: progtuning demo --seeds 3",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(get_args(Method)),
    default=["full", "progressive", "progressive-cache"],
    help="What to compare; once for every method.",
)
@click.option("--seeds", **_positive(1), help="Repeat every method with so many seeds.")
@click.option(
    "--lora-lr",
    type=click.FloatRange(0),
    default=2e-3,
    callback=finite,
    help="Peak learning rate of the LoRA methods.",
)
def demo(options: TrainOptions, **more: Any) -> None:
    """Fine-tune a pretrained model with several methods, and compare.

    --output is emptied; it gets runs and report. --train-file takes the place of the docstrings.
    """
    if options.resume or options.predict_file or options.of_trainer("push_to_hub"):
        raise UserError("the demo has no --resume, --predict-file or --push-to-hub: train has them")
    if options.train_file and options.dataset == "docstrings":
        options = replace(options, dataset=None)
    options.check()
    choose_device(options.device)
    from . import demo as command

    command.run(options, **more)


@app.command(epilog="Example: progtuning report runs/demo/* --output runs/demo/report")
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("--output", type=_PATH, default=Path("runs/report"), help="Gets report.html.")
@click.option("--markdown", is_flag=True, help="Print the comparison as a Markdown table as well.")
def report(runs: Sequence[Path], output: Path, markdown: bool) -> None:
    """Compare finished runs: a table, plots, one HTML file.

    A run is a folder that train has written, or one of transformers' Trainer, which takes method
    and seed from its name (full-seed0).
    """
    from rich.console import Console

    from ..report import (
        comparison_table,
        find_run,
        findings,
        load_run,
        markdown_table,
        notices,
        write_report,
    )

    # folders without a run, such as other reports, are left out
    kept = [path for path in runs if not path.is_dir() or find_run(path)]
    if not kept:
        raise UserError("none of these folders has a metrics.json or a trainer_state.json")
    console = Console()
    with as_user_error():
        loaded = [load_run(path) for path in kept]
        console.print(comparison_table(loaded))
        for line in (*findings(loaded)[1:], *notices(loaded)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        if markdown:
            print(markdown_table(loaded))
        console.print(f"report: {write_report(loaded, output)}", soft_wrap=True)


@app.command(epilog="Example: progtuning doctor")
@click.option(
    "--all", "everything", is_flag=True, help="Versions, and every implementation of every op."
)
def doctor(everything: bool) -> None:
    """Show what runs on this machine, and what would make it faster."""
    from . import doctor as command

    command.run(everything=everything)


def _fail(message: str) -> NoReturn:
    end_with(f"error: {' '.join(message.split())}", 2, of_all=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: an error that the user can mend is one line, exit status 2."""
    try:
        app.main(args=arguments, prog_name="progtuning", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:  # an unknown option, a value out of range
        _fail(error.format_message())
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a folder that cannot be written, a disk that is full
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except ValueError as error:
        from ..model.families import UnsupportedModelError

        if not isinstance(error, UnsupportedModelError):  # it comes in the first forward
            raise
        _fail(str(error))
