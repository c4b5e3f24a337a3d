"""The options of one training run: names, types, defaults and help, for the command and for files.

`progtuning train` and `progtuning plan` make their options from the fields here (`config.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal

from .errors import UserError

Method = Literal["progressive", "progressive-cache", "full", "lora", "progressive-lora"]
Strategy = Literal["stage", "no", "steps", "epoch"]
# names that `plan_training` has, and what the fields here call the same
DTYPES = {"fp32": "fp32", "bf16": "bf16-pure"}
OPTIMIZERS = {"adamw": "fp32", "adamw-bf16": "bf16", "adamw-8bit": "8bit"}


def option(default: Any, *names: str, least: float | None = None, most: float | None = None) -> Any:
    """A field with other names of its option, without dashes, and its range, both ends included."""
    return field(default=default, metadata={"names": names, "least": least, "most": most})


def described(cls: type) -> dict[str, tuple[str, str]]:
    """Title and help of every field, as the docstring of its class has them."""
    found, title, name = {}, "", ""
    for line in cleandoc(cls.__doc__ or "").splitlines():
        if match := re.fullmatch(r"(\S.*):", line):
            title = match[1]
        elif match := re.fullmatch(r"    (\w+): (.*)", line):
            name, found[match[1]] = match[1], (title, match[2])
        elif line.startswith("        "):
            found[name] = title, f"{found[name][1]} {line.strip()}"
    return found


@dataclass(frozen=True)
class TrainOptions:
    """Options of `progtuning train`, as its `--help` has them.

    `trainer` holds values of `transformers.TrainingArguments`, by its names; what is not there has
    the default of `TRAINER_DEFAULTS`, or the Trainer's. "eval_strategy" may be "stage", which the
    Trainer has not; there is no "bf16", which `precision` says.

    Data and task:
        model: Folder or hub id; "minilm" comes with the extra demo.
        task: text-classification (or classification), token-classification, question-answering,
            masked-lm, causal-lm, seq2seq or image-classification.
        dataset: Instead of files: a hub data set "owner/name:config", or "docstrings".
        train_file: Training rows: .jsonl, .json, .csv, .tsv, .parquet or .txt, also .gz;
            repeatable.
        validation_file: Validation rows; repeatable.
        validation_split: Share of the training rows to validate on, instead of a file.
        predict_file: Rows to answer after training; repeatable.
        separator: Of CSV files; found unless given.
        columns: ROLE=NAME, such as text=sentence or label=class; repeatable.
        problem_type: What the labels of a text classification are: classes unless given; numbers
            with a fraction need it.
        max_train_rows: Use the first rows only.
        max_validation_rows: Use the first rows only.
        max_length: Tokens of a row at most.
        add_tokens: Tokens to add to the vocabulary, with commas, or a file of one a line;
            repeatable.
        max_new_tokens: Tokens of a target or a generated text at most.
        mlm_probability: masked-lm: share of the tokens to guess.
        doc_stride: question-answering: tokens that two windows of a text share.

    Method and schedule:
        method: progressive-cache keeps what frozen blocks compute for a row and reads it in later
            epochs; full and lora are there to compare with.
        schedule: progressive, random (LISA), cyclic (BAdam), adaptive (AutoFreeze), plateau (stages
            end when evaluations get no better), budget (--rho), the blocks that train (0-3,8; -1 is
            the last), or a .toml, .yaml or .json file (examples/random_blocks.toml).
        rho: For --schedule budget, which trains the units that are worth most of those whose step
            costs at most this share of a full one.
        importance: For --schedule budget, what units are worth: by eight batches, or, snr, by
            their weights alone.
        stages: Stages of the progressive schedule.
        embeddings: When the embeddings train in it; under always, backward is never truncated.
        frozen_mode: Mode of frozen blocks: eval has no dropout.
        tied: What a weight shared by embeddings and LM head does once the embeddings are frozen.
        only: Regular expression: only parameters whose names match it train, such as "mlp|lm_head".
        train_new_tokens: Of embeddings and LM head, only the rows of --add-tokens train.
        blocks: Path of the block list where it cannot be found; several with commas, in order.
        packing: auto leaves padding out of what blocks compute where a batch has more than a little
            of it, on wherever it has any.
        cache: Memory for the prefix cache, such as 8GiB; auto: a quarter of what is free. Off
            unless given, but for progressive-cache, where it is auto.
        graph: Replay steps of a stage as CUDA graphs.
        lora_rank: Rank of LoRA adapters.

    Training:
        anneal: Each unit's rate falls on its own cosine to 0 where it freezes (FreezeOut).
        tokens_per_batch: Size of a micro-batch in tokens, instead of rows.

    Memory and precision:
        precision: bf16: autocast; bf16-pure: weights in bf16; auto: autocast on GPUs that compute
            in bf16, otherwise fp32.
        state_dtype: Of AdamW's moments; full and lora have fp32 only.
        master_weights: bf16-pure: the optimizer keeps fp32 copies of the weights.
        in_backward: Update inside backward, unit by unit.
        state_device: cpu: AdamW's moments and masters stay in host memory, where the update runs.
        load_in_4bit: Load the model in 4 bits (QLoRA); needs bitsandbytes and a LoRA method.

    Evaluation:
        metric: The metric to show beside the loss; all that fit are written down.
        early_stopping_patience: Stop after so many evaluations without a better one.

    The run:
        device: auto, cpu, cuda, or one GPU: cuda:1.
        resume: Go on from the newest checkpoint.
        overwrite: Remove an earlier run from the output first.
    """

    model: str = "minilm"
    task: str = "text-classification"
    dataset: str | None = None
    train_file: tuple[str, ...] = ()
    validation_file: tuple[str, ...] = ()
    validation_split: float | None = option(None, least=0, most=1)
    predict_file: tuple[str, ...] = ()
    separator: str | None = None
    columns: dict[str, str] = field(default_factory=dict, metadata={"names": ("column",)})
    problem_type: Literal["single_label", "multi_label", "regression"] | None = None
    max_train_rows: int | None = option(None, "train-rows", least=1)
    max_validation_rows: int | None = option(None, "validation-rows", least=1)
    max_length: int = option(128, "seq-len", least=2)
    add_tokens: tuple[str, ...] = ()
    max_new_tokens: int = option(128, least=1)
    mlm_probability: float = option(0.15, least=0, most=1)
    doc_stride: int = option(128, least=0)

    method: Method = "progressive"
    schedule: str | dict[str, Any] = "progressive"
    rho: float | None = option(None, least=0, most=1)
    importance: Literal["gradient", "contribution", "snr"] = "gradient"
    stages: int = option(3, least=1)
    embeddings: Literal["first_stage", "always", "never"] = "first_stage"
    frozen_mode: Literal["eval", "train"] = "eval"
    tied: Literal["frozen", "head_only"] = "frozen"
    only: str | None = None
    train_new_tokens: bool = False
    blocks: str | None = None
    packing: Literal["auto", "on", "off"] = "auto"
    cache: str | None = None
    graph: Literal["off", "auto", "on"] = "off"
    lora_rank: int = option(8, least=1)

    anneal: bool = False
    tokens_per_batch: int | None = option(None, least=1)

    precision: Literal["auto", "fp32", "bf16", "bf16-pure"] = "auto"
    state_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"
    master_weights: bool = False
    in_backward: bool = False
    state_device: Literal["cpu"] | None = None
    load_in_4bit: bool = False

    metric: str | None = None
    early_stopping_patience: int | None = option(None, least=1)

    device: str = "auto"
    resume: bool = False
    overwrite: bool = False

    trainer: dict[str, Any] = field(default_factory=dict)

    def of_trainer(self, name: str) -> Any:
        """A value of `transformers.TrainingArguments`; None where the Trainer's default holds."""
        return self.trainer.get(name, TRAINER_DEFAULTS.get(name))

    @property
    def output(self) -> Path:
        return Path(self.of_trainer("output_dir"))

    @property
    def block_lists(self) -> list[str] | None:
        """Paths of the block lists; None: the library finds them."""
        return None if self.blocks is None else self.blocks.split(",")

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "progressive-lora")

    @property
    def is_scheduled(self) -> bool:
        """Whether the method freezes by a schedule, with this library's optimizer."""
        return self.method not in ("full", "lora")

    @property
    def cache_size(self) -> str | None:
        """Size of the prefix cache as it was given, or "auto"; None: there is no cache."""
        return self.cache or ("auto" if self.method == "progressive-cache" else None)

    def by_names_of_python(self, dtype: str | None, optimizer: str | None) -> TrainOptions:
        """With the `dtype` and the `optimizer` that `plan_training` takes, where they are given."""
        changed = {}
        for option, name, field_name, values in (
            ("--dtype", dtype, "precision", DTYPES),
            ("--optimizer", optimizer, "state_dtype", OPTIMIZERS),
        ):
            if name is None:
                continue
            changed[field_name], before = values[name], getattr(self, field_name)
            if before not in (values[name], getattr(TrainOptions, field_name)):
                raise UserError(
                    f"{option} {name} and {_dashed(field_name)} {before} exclude each other: leave "
                    "one out"
                )
        return replace(self, **changed)

    def check(self) -> None:
        """Refuse options that exclude each other, before anything is loaded."""
        own, default = vars(self), vars(TrainOptions())
        changed = {name for name in own if own[name] != default[name]}
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        self._check_data()
        self._check_method(changed)
        given = self.of_trainer
        for name in _NOT_OF_TRAINER:
            if name in self.trainer:
                raise UserError(
                    f"{_dashed(name)} is left to the command, which makes batches and figures"
                )
        if "resume_from_checkpoint" in self.trainer:
            raise UserError("--resume goes on from the newest checkpoint; no other can be given")
        if self.tokens_per_batch and given("per_device_train_batch_size") != _BATCH_SIZE:
            raise UserError("--tokens-per-batch and --batch-size exclude each other")
        if given("fp16") and self.precision not in ("auto", "fp32"):
            raise UserError(f"--fp16 and --precision {self.precision} exclude each other")
        if given("eval_strategy") == "no" and (
            self.early_stopping_patience or given("load_best_model_at_end")
        ):
            raise UserError(
                "--early-stopping-patience and --load-best-model-at-end need evaluations: not "
                "--eval-strategy no"
            )
        if given("save_strategy") == "no" and given("load_best_model_at_end"):
            raise UserError("--load-best-model-at-end needs checkpoints: not --save-strategy no")

    def _check_data(self) -> None:
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise UserError(f"--validation-split {self.validation_split} is no share of the rows")
        if self.dataset == "docstrings" and self.columns:
            raise UserError("--dataset docstrings has no columns to choose from")
        if self.dataset == "docstrings" and self.task != "text-classification":
            raise UserError(f"--dataset docstrings is no {self.task}: give --train-file")

    def _check_method(self, changed: set[str]) -> None:
        scheduled = [_dashed(name) for name in _FOR_SCHEDULED if name in changed]
        scheduled += ["--packing on"] if self.packing == "on" else []
        if scheduled and not self.is_scheduled:
            raise UserError(
                f"{scheduled[0]} is for the progressive methods; --method {self.method} uses "
                "torch's AdamW and no schedule"
            )
        if self.schedule != "progressive" and {"stages", "embeddings"} & changed:
            raise UserError(
                "--stages and --embeddings are for the progressive schedule; others have their own "
                "settings, in a file"
            )
        if self.schedule != "budget" and "importance" in changed:
            raise UserError("--importance is for --schedule budget")
        if self.schedule == "budget" and self.only is not None:
            raise UserError("--schedule budget counts whole units: leave --only out")
        if (self.schedule == "budget") != (self.rho is not None):
            raise UserError(
                "--schedule budget and --rho need each other: --schedule budget --rho 0.5"
            )
        self._check_tokens()
        if self.load_in_4bit and not self.uses_lora:
            raise UserError("--load-in-4bit needs --method lora or progressive-lora")
        if self.master_weights and self.precision != "bf16-pure":
            raise UserError("--master-weights needs --precision bf16-pure")

    def _check_tokens(self) -> None:
        if self.add_tokens and self.task == "image-classification":
            raise UserError("--add-tokens: image-classification has no vocabulary")
        if self.train_new_tokens and not self.add_tokens:
            raise UserError("--train-new-tokens trains the rows of --add-tokens: give them")
        if self.train_new_tokens and self.method == "full":
            raise UserError(
                "--train-new-tokens is for the progressive and LoRA methods; --method full trains "
                "every row: leave it out"
            )
        if self.add_tokens and self.uses_lora and not self.train_new_tokens:
            raise UserError(
                f"--method {self.method} trains no embeddings, and tokens of --add-tokens would "
                "stay as they were drawn: give --train-new-tokens"
            )
        if self.add_tokens and self.is_scheduled and self.embeddings == "never":
            raise UserError(
                "--embeddings never trains no row of --add-tokens: take first_stage or always"
            )


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_FOR_SCHEDULED = """
schedule only rho anneal state_dtype master_weights in_backward state_device cache graph
""".split()
_BATCH_SIZE = 32
# What would train or evaluate on other rows than the command says, or change nothing.
_NOT_OF_TRAINER = """
accelerator_config auto_find_batch_size batch_eval_metrics data_seed dataloader_drop_last
eval_do_concat_batches include_for_metrics prediction_loss_only sortish_sampler
train_sampling_strategy
""".split()


@dataclass(frozen=True)
class ShownOfTrainer:
    """What `--help` shows of `transformers.TrainingArguments`; a value here is our default.

    The command takes all other fields of it as well. Nothing is made of this class.

    Training:
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the rows.
        max_steps: Optimizer steps, instead of epochs.
        per_device_train_batch_size: Rows of a micro-batch, on each device.
        gradient_accumulation_steps: Micro-batches of an optimizer step.
        weight_decay: Decay of matrices.
        warmup_steps: Steps that warm up; below 1, a share of all steps.
        lr_scheduler_type: What the rate does after that: linear, cosine, constant, ...
        max_grad_norm: Gradients are clipped to this norm; 0: no clipping.

    Memory and precision:
        bf16: The same as --precision bf16.
        gradient_checkpointing: Compute blocks again in backward instead of keeping what they
            computed.

    Evaluation:
        eval_strategy: When to evaluate; stage: at the end of every stage.
        eval_steps: Steps between evaluations, with --eval-strategy steps.
        per_device_eval_batch_size: Rows of a batch there; as in training unless given.
        load_best_model_at_end: Save the model of the best evaluation instead of the last.
        metric_for_best_model: What is best; the validation loss unless given.

    The run:
        output_dir: Folder of model/, metrics.json and checkpoints.
        save_strategy: When to write a checkpoint.
        save_steps: Steps between checkpoints; 0: never.
        save_total_limit: Checkpoints that are kept, the newest.
        logging_steps: Steps between logs; a 200th of the run unless given.
        report_to: Trackers: tensorboard, wandb, trackio, mlflow, ...; repeatable.
        seed: Of weights, rows and dropout.
        push_to_hub: Upload the model and its card.
        hub_model_id: Where to: owner/name.
    """

    learning_rate: float = option(5e-5, "lr", least=0)
    num_train_epochs: float = option(3.0, "epochs", least=0)
    max_steps: int | None = option(None, "steps", least=1)
    per_device_train_batch_size: int = option(_BATCH_SIZE, "batch-size", least=1)
    gradient_accumulation_steps: int = option(1, "accumulate", least=1)
    weight_decay: float = option(0.01, least=0)
    warmup_steps: float = option(0.06, "warmup", least=0)
    lr_scheduler_type: str = "linear"
    max_grad_norm: float = option(1.0, least=0)

    bf16: bool | None = None
    gradient_checkpointing: bool | None = None

    eval_strategy: Strategy = "stage"
    eval_steps: float | None = option(None, least=0)
    per_device_eval_batch_size: int | None = option(None, least=1)
    load_best_model_at_end: bool | None = None
    metric_for_best_model: str | None = None

    output_dir: str = option("runs/train", "output")
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = option(200, "checkpoint-every", least=0)
    save_total_limit: int = option(2, "keep-checkpoints", least=1)
    logging_steps: float | None = option(None, least=0)
    report_to: tuple[str, ...] = ("none",)
    seed: int = option(0, least=0, most=2**32 - 1)
    push_to_hub: bool | None = None
    hub_model_id: str | None = None


TRAINER_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in fields(ShownOfTrainer) if f.default is not None
}
# What decides the cost of a step or of a run.
PLANNED = """
model task max_length add_tokens method schedule rho importance stages embeddings frozen_mode tied
train_new_tokens only blocks packing cache lora_rank precision state_dtype master_weights
in_backward state_device gradient_checkpointing bf16 max_steps per_device_train_batch_size device
""".split()
CONTRIBUTION = """
model task dataset train_file validation_file validation_split separator columns problem_type
max_train_rows max_validation_rows max_length blocks precision metric device learning_rate max_steps
per_device_train_batch_size max_grad_norm output_dir seed
""".split()
DEMO = """
model dataset stages num_train_epochs per_device_train_batch_size learning_rate max_train_rows
max_validation_rows device output_dir
""".split()
