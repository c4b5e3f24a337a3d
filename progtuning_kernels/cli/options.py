"""The options of one training run that are this library's own; the others are the Trainer's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["progressive", "progressive-cache", "full", "lora", "progressive-lora"]


@dataclass(frozen=True)
class TrainOptions:
    """Options of `progtuning train`, under their own names; `trainer` holds those of the Trainer.

    Attributes:
        trainer: values of `transformers.TrainingArguments`, by its names; what is not here has
            the default of `TRAINER_DEFAULTS`, or the Trainer's.
    """

    model: str = "minilm"
    task: str = "text-classification"
    dataset: str | None = None  # hub name "owner/name:config", or "docstrings"
    train_file: tuple[str, ...] = ()
    validation_file: tuple[str, ...] = ()
    validation_split: float | None = None  # share of the training rows that is held out
    predict_file: tuple[str, ...] = ()
    separator: str | None = None  # of CSV; None: found
    columns: dict[str, str] = field(default_factory=dict)  # role -> column name
    # None: classes; refused where the labels are numbers with a fraction
    problem_type: Literal["single_label", "multi_label", "regression"] | None = None
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    max_length: int = 128
    max_new_tokens: int = 128  # that seq2seq and causal-lm generate; of a seq2seq target
    metric: str | None = None
    method: Method = "progressive"
    schedule: str | dict[str, Any] = "progressive"
    stages: int = 3
    embeddings: str = "first_stage"
    frozen_mode: str = "eval"
    tied: str = "frozen"
    blocks: str | None = None
    packing: str = "auto"
    cache: str | None = None  # None: off but for progressive-cache; "auto" or a size
    graph: str = "off"
    lora_rank: int = 8
    load_in_4bit: bool = False
    state_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"
    in_backward: bool = False
    anneal: bool = False
    precision: Literal["auto", "fp32", "bf16", "bf16-pure"] = "auto"
    tokens_per_batch: int | None = None  # instead of rows
    mlm_probability: float = 0.15
    doc_stride: int = 128
    early_stopping_patience: int | None = None
    device: str = "auto"
    push_to_hub: bool = False
    evaluates_stages: bool = True
    resume: bool = False
    overwrite: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


# What differs from the defaults of `transformers.TrainingArguments`.
TRAINER_DEFAULTS: dict[str, Any] = {
    "output_dir": Path("runs/train"),
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "warmup_steps": 0.06,  # below 1: a share of the steps
    "max_grad_norm": 1.0,
    "save_steps": 200,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": "none",
}
