"""The options of one training run: names, types, defaults and help, for the command and for files.

`progtuning train` and `progtuning plan` make their options from the fields here (`config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .errors import UserError

Method = Literal["progressive", "progressive-cache", "full", "lora", "progressive-lora"]
Strategy = Literal["stage", "no", "steps", "epoch"]


@dataclass(frozen=True)
class Option:
    """How the command shows a field.

    Attributes:
        group: title of the section of `--help`.
        help: one or two sentences.
        names: other names of the option, without dashes.
        least, most: range of numbers, both ends included.
    """

    group: str
    help: str
    names: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


def option(
    default: Any,
    group: str,
    help: str,
    *names: str,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    shown = {"option": Option(group, help, names, least, most)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=shown)
    return field(default=default, metadata=shown)


_DATA, _METHOD, _TRAIN = "Data and task", "Method and schedule", "Training"
_MEMORY, _EVALUATE, _RUN = "Memory and precision", "Evaluation", "The run"


@dataclass(frozen=True)
class TrainOptions:
    """Options of `progtuning train`, under their own names; `trainer` holds those of the Trainer.

    Attributes:
        trainer: values of `transformers.TrainingArguments`, by its names; what is not here has
            the default of `TRAINER_DEFAULTS`, or the Trainer's. "eval_strategy" may be "stage",
            which the Trainer has not; there is no "bf16", which `precision` says.
    """

    model: str = option("minilm", _DATA, 'Folder or hub id; "minilm" comes with the extra demo.')
    task: str = option(
        "text-classification",
        _DATA,
        "text-classification (or classification), token-classification, question-answering, "
        "masked-lm, causal-lm, seq2seq or image-classification.",
    )
    dataset: str | None = option(
        None, _DATA, 'Instead of files: a hub data set "owner/name:config", or "docstrings".'
    )
    train_file: tuple[str, ...] = option(
        (),
        _DATA,
        "Training rows: .jsonl, .json, .csv, .tsv, .parquet or .txt, also .gz; repeatable.",
    )
    validation_file: tuple[str, ...] = option((), _DATA, "Validation rows; repeatable.")
    validation_split: float | None = option(
        None,
        _DATA,
        "Share of the training rows to validate on, instead of a file.",
        least=0,
        most=1,
    )
    predict_file: tuple[str, ...] = option((), _DATA, "Rows to answer after training; repeatable.")
    separator: str | None = option(None, _DATA, "Of CSV files; found unless given.")
    columns: dict[str, str] = option(
        {}, _DATA, "ROLE=NAME, such as text=sentence or label=class; repeatable.", "column"
    )
    problem_type: Literal["single_label", "multi_label", "regression"] | None = option(
        None,
        _DATA,
        "What the labels of a text classification are: classes unless given; numbers with a "
        "fraction need it.",
    )
    max_train_rows: int | None = option(None, _DATA, "Use the first rows only.", least=1)
    max_validation_rows: int | None = option(None, _DATA, "Use the first rows only.", least=1)
    max_length: int = option(128, _DATA, "Tokens of a row at most.", "seq-len", least=2)
    max_new_tokens: int = option(
        128, _DATA, "Tokens of a target or a generated text at most.", least=1
    )
    mlm_probability: float = option(
        0.15, _DATA, "masked-lm: share of the tokens to guess.", least=0, most=1
    )
    doc_stride: int = option(
        128, _DATA, "question-answering: tokens that two windows of a text share.", least=0
    )

    method: Method = option(
        "progressive",
        _METHOD,
        "progressive-cache keeps what frozen blocks compute for a row and reads it in later "
        "epochs; full and lora are there to compare with.",
    )
    schedule: str | dict[str, Any] = option(
        "progressive",
        _METHOD,
        "progressive, random (LISA), cyclic (BAdam), adaptive (AutoFreeze), or a .toml, .yaml or "
        ".json file (examples/random_blocks.toml).",
    )
    stages: int = option(3, _METHOD, "Stages of the progressive schedule.", least=1)
    embeddings: Literal["first_stage", "always", "never"] = option(
        "first_stage",
        _METHOD,
        "When the embeddings train in it; under always, backward is never truncated.",
    )
    frozen_mode: Literal["eval", "train"] = option(
        "eval", _METHOD, "Mode of frozen blocks: eval has no dropout."
    )
    tied: Literal["frozen", "head_only"] = option(
        "frozen",
        _METHOD,
        "What a weight shared by embeddings and LM head does once the embeddings are frozen.",
    )
    blocks: str | None = option(
        None,
        _METHOD,
        "Path of the block list where it cannot be found; several with commas, in order.",
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        _METHOD,
        "auto leaves padding out of what blocks compute where a batch has more than a little of "
        "it, on wherever it has any.",
    )
    cache: str | None = option(
        None,
        _METHOD,
        "Memory for the prefix cache, such as 8GiB; auto: a quarter of what is free. Off unless "
        "given, but for progressive-cache, where it is auto.",
    )
    graph: Literal["off", "auto", "on"] = option(
        "off", _METHOD, "Replay steps of a stage as CUDA graphs."
    )
    lora_rank: int = option(8, _METHOD, "Rank of LoRA adapters.", least=1)

    anneal: bool = option(
        False, _TRAIN, "Each unit's rate falls on its own cosine to 0 where it freezes (FreezeOut)."
    )
    tokens_per_batch: int | None = option(
        None, _TRAIN, "Size of a micro-batch in tokens, instead of rows.", least=1
    )

    precision: Literal["auto", "fp32", "bf16", "bf16-pure"] = option(
        "auto",
        _MEMORY,
        "bf16: autocast; bf16-pure: weights in bf16; auto: autocast on GPUs that compute in bf16, "
        "otherwise fp32.",
    )
    state_dtype: Literal["fp32", "bf16", "8bit"] = option(
        "fp32", _MEMORY, "Of AdamW's moments; full and lora have fp32 only."
    )
    master_weights: bool = option(
        False, _MEMORY, "bf16-pure: the optimizer keeps fp32 copies of the weights."
    )
    in_backward: bool = option(False, _MEMORY, "Update inside backward, unit by unit.")
    load_in_4bit: bool = option(
        False, _MEMORY, "Load the model in 4 bits (QLoRA); needs bitsandbytes and a LoRA method."
    )

    metric: str | None = option(
        None, _EVALUATE, "The metric to show beside the loss; all that fit are written down."
    )
    early_stopping_patience: int | None = option(
        None, _EVALUATE, "Stop after so many evaluations without a better one.", least=1
    )

    device: str = option("auto", _RUN, "auto, cpu, cuda, or one GPU: cuda:1.")
    resume: bool = option(False, _RUN, "Go on from the newest checkpoint.")
    overwrite: bool = option(False, _RUN, "Remove an earlier run from the output first.")

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

    def check(self) -> None:
        """Refuse options that exclude each other, before anything is loaded.

        Raises:
            UserError: one line that names both.
        """
        default = type(self)()
        changed = {
            f.name
            for f in fields(self)
            if f.name != "trainer" and getattr(self, f.name) != getattr(default, f.name)
        }
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        self._check_data()
        self._check_method(changed)
        given = self.of_trainer
        for name in _NOT_OF_TRAINER:
            if name in self.trainer:
                raise UserError(
                    f"{_dashed(name)} is left to the command, which makes batches of rows of like "
                    "length, and figures of all rows"
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
            raise UserError(
                f"--dataset docstrings is a text classification; use files for {self.task}"
            )

    def _check_method(self, changed: set[str]) -> None:
        if not self.is_scheduled:
            for name in _FOR_SCHEDULED:
                if name in changed:
                    raise UserError(
                        f"{_dashed(name)} is for the progressive methods; --method {self.method} "
                        "uses torch's AdamW and no schedule"
                    )
        if self.packing == "on" and not self.is_scheduled:
            raise UserError(
                f"--packing on is for the progressive methods, not --method {self.method}"
            )
        if self.schedule != "progressive" and {"stages", "embeddings"} & changed:
            raise UserError(
                "--stages and --embeddings are for the progressive schedule; others have their "
                "own settings, in a file"
            )
        if self.load_in_4bit and not self.uses_lora:
            raise UserError("--load-in-4bit needs --method lora or progressive-lora")
        if self.master_weights and self.precision != "bf16-pure":
            raise UserError("--master-weights needs --precision bf16-pure")


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_FOR_SCHEDULED = ("anneal", "state_dtype", "master_weights", "in_backward", "cache", "graph")
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
    """

    learning_rate: float = option(5e-5, _TRAIN, "Peak learning rate.", "lr", least=0)
    num_train_epochs: float = option(3.0, _TRAIN, "Passes over the rows.", "epochs", least=0)
    max_steps: int | None = option(
        None, _TRAIN, "Optimizer steps, instead of epochs.", "steps", least=1
    )
    per_device_train_batch_size: int = option(
        _BATCH_SIZE, _TRAIN, "Rows of a micro-batch, on each device.", "batch-size", least=1
    )
    gradient_accumulation_steps: int = option(
        1, _TRAIN, "Micro-batches of an optimizer step.", "accumulate", least=1
    )
    weight_decay: float = option(0.01, _TRAIN, "Decay of matrices.", least=0)
    warmup_steps: float = option(
        0.06, _TRAIN, "Steps that warm up; below 1, a share of all steps.", "warmup", least=0
    )
    lr_scheduler_type: str = option(
        "linear", _TRAIN, "What the rate does after that: linear, cosine, constant, ..."
    )
    max_grad_norm: float = option(
        1.0, _TRAIN, "Gradients are clipped to this norm; 0: no clipping.", least=0
    )

    bf16: bool | None = option(None, _MEMORY, "The same as --precision bf16.")
    gradient_checkpointing: bool | None = option(
        None, _MEMORY, "Compute blocks again in backward instead of keeping what they computed."
    )

    eval_strategy: Strategy = option(
        "stage", _EVALUATE, "When to evaluate; stage: at the end of every stage."
    )
    eval_steps: float | None = option(
        None, _EVALUATE, "Steps between evaluations, with --eval-strategy steps.", least=0
    )
    per_device_eval_batch_size: int | None = option(
        None, _EVALUATE, "Rows of a batch there; as in training unless given.", least=1
    )
    load_best_model_at_end: bool | None = option(
        None, _EVALUATE, "Save the model of the best evaluation instead of the last."
    )
    metric_for_best_model: str | None = option(
        None, _EVALUATE, "What is best; the validation loss unless given."
    )

    output_dir: str = option(
        "runs/train", _RUN, "Folder of model/, metrics.json and checkpoints.", "output"
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "steps", _RUN, "When to write a checkpoint."
    )
    save_steps: float = option(
        200, _RUN, "Steps between checkpoints; 0: never.", "checkpoint-every", least=0
    )
    save_total_limit: int = option(
        2, _RUN, "Checkpoints that are kept, the newest.", "keep-checkpoints", least=1
    )
    logging_steps: float | None = option(
        None, _RUN, "Steps between logs; a 200th of the run unless given.", least=0
    )
    report_to: tuple[str, ...] = option(
        ("none",), _RUN, "Trackers: tensorboard, wandb, trackio, mlflow, ...; repeatable."
    )
    seed: int = option(0, _RUN, "Of weights, rows and dropout.", least=0, most=2**32 - 1)
    push_to_hub: bool | None = option(None, _RUN, "Upload the model and its card.")
    hub_model_id: str | None = option(None, _RUN, "Where to: owner/name.")


TRAINER_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in fields(ShownOfTrainer) if f.default is not None
}
# What decides the cost of a step or of a run.
PLANNED = """
model task max_length method schedule stages embeddings frozen_mode tied blocks packing cache
lora_rank precision state_dtype master_weights in_backward gradient_checkpointing bf16 max_steps
per_device_train_batch_size device
""".split()
CONTRIBUTION = """
model task dataset train_file validation_file validation_split separator columns problem_type
max_train_rows max_validation_rows max_length blocks precision metric device learning_rate max_steps
per_device_train_batch_size max_grad_norm output_dir seed
""".split()
