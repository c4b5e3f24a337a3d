"""What is trained: shapes of models, random rows, and what a provider of a training step is."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from real_rows import Row, padded, random_batches
from torch import nn

from progtuning_kernels import ProgressiveSchedule
from progtuning_kernels.bench import Batch, Refused, Session

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-autocast": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A model's config; weights are random, nothing is downloaded."""

    kind: str
    width: int
    blocks: int
    heads: int
    inside: int
    vocabulary: int
    kv_heads: int | None = None

    @property
    def is_causal(self) -> bool:
        return self.kind == "llama"


SHAPES = {
    "tiny BERT": Shape("bert", 32, 6, 2, 64, 300),
    "tiny Llama": Shape("llama", 32, 6, 4, 64, 300, 2),
    "MiniLM": Shape("bert", 384, 6, 12, 1536, 30522),
    "MiniLM-L12": Shape("bert", 384, 12, 12, 1536, 30522),
    "BERT-base": Shape("bert", 768, 12, 12, 3072, 30522),
    "Llama 20 M": Shape("llama", 384, 6, 6, 1024, 8192, 2),
    "Llama 1 B": Shape("llama", 2048, 16, 32, 8192, 128256, 8),
}


@dataclass(frozen=True)
class Work:
    """What everybody trains.

    Args:
        shape: a name of `SHAPES`.
        precision: of weights, "bf16-autocast": float32 weights, activations under autocast.
        rows, tokens: of a batch. Rows are padded on the right, to between half and all tokens.
        batches: of an epoch.
        epochs: of a stage.
        clip: norm that gradients are clipped to.
        dropout: None: what the config has, 0.1 for BERT, none for Llama.
        forced_kernels: swap kernels in whatever the size of a call: for the gate, of few rows.
        real_rows: for BERT: batches are random ones of these, padded to their longest row each.
    """

    shape: str
    precision: str
    rows: int
    tokens: int
    stages: int
    batches: int
    epochs: int
    device: torch.device
    lr: float = 5e-5
    clip: float = 1.0
    dropout: float | None = None
    forced_kernels: bool = False
    real_rows: tuple[Row, ...] = ()

    @property
    def sizes(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def boundaries(self) -> tuple[int, ...]:
        return ProgressiveSchedule(self.stages).boundaries(self.sizes.blocks)

    @property
    def steps_of_stage(self) -> int:
        return self.batches * self.epochs

    @property
    def steps(self) -> int:
        return self.stages * self.steps_of_stage

    def model(self) -> nn.Module:
        """The same weights every time, in training mode, on the device."""
        import transformers as hf

        s = self.sizes
        sizes: dict[str, Any] = dict(
            hidden_size=s.width,
            num_hidden_layers=s.blocks,
            num_attention_heads=s.heads,
            intermediate_size=s.inside,
            vocab_size=s.vocabulary,
            max_position_embeddings=max(512, self.tokens),
        )
        if s.is_causal:
            config = hf.LlamaConfig(**sizes, num_key_value_heads=s.kv_heads, use_cache=False)
            make = hf.LlamaForCausalLM
        else:
            if self.dropout is not None:
                sizes["hidden_dropout_prob"] = sizes["attention_probs_dropout_prob"] = self.dropout
            config = hf.BertConfig(**sizes)
            make = hf.BertForSequenceClassification
        torch.manual_seed(0)
        with self.device:
            return make(config).to(PRECISIONS[self.precision]).train()

    def autocast(self) -> Any:
        if self.precision != "bf16-autocast":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def epoch(self, number: int) -> list[Batch]:
        """The same rows in every epoch, in batches of other company."""
        if self.real_rows:
            batches = random_batches(self.real_rows, self.rows, seed=100 + number)
            vocabulary = self.sizes.vocabulary
            return [padded(rows, vocabulary, self.device) for rows in batches[: self.batches]]
        generator = torch.Generator().manual_seed(1)
        count = self.rows * self.batches
        ids = torch.randint(5, self.sizes.vocabulary, (count, self.tokens), generator=generator)
        lengths = torch.randint(self.tokens // 2, self.tokens + 1, (count,), generator=generator)
        mask = (torch.arange(self.tokens) < lengths[:, None]).long()
        ids = ids * mask
        labels = ids.masked_fill(mask == 0, -100) if self.sizes.is_causal else ids[:, 0] % 2
        order = torch.randperm(count, generator=torch.Generator().manual_seed(100 + number))
        return [
            {
                "input_ids": ids[rows].to(self.device),
                "attention_mask": mask[rows].to(self.device),
                "labels": labels[rows].to(self.device),
            }
            for rows in order.split(self.rows)
        ]


_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)(?:\.|$)")


def trains(name: str, stage: int, boundary: int) -> bool:
    """Whether the paper's plan trains what has this name: by the name alone, unlike the library."""
    if (block := _BLOCK.search(name)) is not None:
        return int(block[1]) >= boundary
    return stage == 0 or "embed" not in name


def freeze(model: nn.Module, stage: int, boundary: int, *, evaluate: bool = False) -> None:
    """What a user writes without this library.

    Args:
        evaluate: switch dropout in the frozen part off, too.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, stage, boundary))
    if evaluate:
        for name, module in model.named_modules():
            if ("embed" in name or _BLOCK.search(name)) and not trains(name, stage, boundary):
                module.eval()


def reason(error: BaseException) -> str:
    """One line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, Refused) else f"{type(error).__name__}: {first[:300]}"


def free(device: torch.device, *, compiled: bool = False) -> None:
    """Give back what models hold that nobody uses any more."""
    if compiled:
        torch.compiler.reset()  # it keeps every model that it compiled
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Provider:
    """One way to train.

    Args:
        build: Work -> a session; raises `Refused` where it cannot.
        follows_plan: it trains what the schedule says; else everything, or what it likes.
        same_rule: its gradients and its AdamW are those of plain torch, and the gate asks for them.
        movement_tolerance: relative, of what three updates move, against plain torch's.
        keeps_gradients: they are there after backward.
        clips_otherwise: by another norm than that of this step's gradients; compared unclipped.
        caches: later epochs of a stage are cheaper than the first.
        captures: it replays graphs, from the third forward of a stage on.
        compiles: it uses torch.compile.
        patches_globally: it changes transformers for everybody, and wants a process of its own.
        packages: whose versions go into the result.
        lr: instead of the work's.
    """

    build: Callable[[Work], Session]
    follows_plan: bool = False
    same_rule: bool = True
    movement_tolerance: float = 0.05
    keeps_gradients: bool = True
    clips_otherwise: bool = False
    caches: bool = False
    captures: bool = False
    compiles: bool = False
    patches_globally: bool = False
    packages: tuple[str, ...] = ()
    lr: float | None = None

    @property
    def passes(self) -> int:
        """Forwards of a stage until one runs as most do."""
        return 1 + self.caches + 2 * self.captures

    def session(self, work: Work) -> Session:
        torch.manual_seed(0)
        return self.build(work if self.lr is None else replace(work, lr=self.lr))
