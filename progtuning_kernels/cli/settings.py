"""The options of one training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..packing import Packing

Task = Literal["classification", "causal-lm"]
Method = Literal["full", "progressive", "progressive-cache", "lora", "progressive-lora"]
Precision = Literal["auto", "fp32", "bf16"]
StateDtype = Literal["fp32", "bf16", "8bit"]

# Options that may differ between a checkpoint and the call that resumes it.
_FREE = {
    "output",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "overwrite",
    "device",
    "metric",
    "cache",
    "schedule",  # a file may move; what it says is compared
}


@dataclass(frozen=True)
class TrainSettings:
    """Every option of `progtuning train`, under its own name."""

    model: str = "minilm"
    dataset: str | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    task: Task = "classification"
    method: Method = "progressive"
    schedule: str = "progressive"
    stages: int = 3
    embeddings: str = "first_stage"
    frozen_mode: str = "eval"
    tied: str = "frozen"
    blocks: str | None = None
    packing: Packing = "auto"
    cache: str = "auto"
    lora_rank: int = 8
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    max_length: int = 128
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    anneal: bool = False
    max_grad_norm: float = 1.0
    state_dtype: StateDtype = "fp32"
    precision: Precision = "auto"
    metric: str | None = None
    seed: int = 0
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    device: str = "auto"
    output: Path = field(default_factory=lambda: Path("runs/train"))
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    resume: bool = False
    overwrite: bool = False

    @property
    def block_lists(self) -> list[str] | None:
        """Paths of the block lists; None: the library finds them."""
        return None if self.blocks is None else self.blocks.split(",")

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "progressive-lora")

    def flat(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """The options that decide the numbers of a run: a resumed run must have the same."""
        return {k: v for k, v in self.flat().items() if k not in _FREE}
