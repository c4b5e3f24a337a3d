"""How many real tokens a second a Trainer trains on, without a read of the device per step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer

_IDS, _MASK = "input_ids", "attention_mask"


class TokenRate:
    """Counts the tokens of a Trainer's training steps, and the seconds of training.

    Tokens are the entries of `input_ids` that `attention_mask` does not exclude, those of a decoder
    not among them. Batches without `input_ids` have none.

    Args:
        trainer: its `training_step` is wrapped until `remove`; None counts nothing.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self._tokens: Tensor | None = None  # int64, on the device of the batches
        self._seconds = 0.0
        self._since = time.perf_counter()
        self._begins = False  # an optimizer step, with the next micro-batch
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self._before = vars(trainer).get("training_step") if trainer else None
        if trainer is not None:
            trainer.training_step = self._counted(trainer.training_step)

    def _counted(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self._begins:  # other callbacks had their turn
                self._begins = False
                self.did_not_train()
            self._count(inputs)
            return step(model, inputs, *args, **kwargs)

        return training_step

    def _count(self, inputs: Any) -> None:
        for name, ids in inputs.items() if isinstance(inputs, Mapping) else ():
            # one row may be several texts, each under a prefix of its own
            prefix = name.removesuffix(_IDS)
            if prefix in (name, "decoder_") or not isinstance(ids, Tensor):
                continue
            mask = inputs.get(prefix + _MASK)
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                tokens = mask.sum()
            else:
                tokens = torch.full((), ids.numel(), device=ids.device)
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def begin_step(self) -> None:
        """An optimizer step begins; what has passed since the last call of a method is of it."""
        self.trained()
        self._begins = True

    def trained(self) -> None:
        """What has passed since the last call of a method was training."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now

    def did_not_train(self) -> None:
        """What has passed since the last call of a method was evaluation, or saving."""
        self._since = time.perf_counter()

    def read(self, device: torch.device) -> float | None:
        """Tokens per second of all ranks since the last read; None without tokens.

        The host waits for the device. All ranks call this together.

        Args:
            device: on which ranks exchange their counts.
        """
        self.trained()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, None
        tokens = torch.zeros((), dtype=torch.int64) if tokens is None else tokens
        summed: Any = reduce(tokens.to(device), "sum")  # typed as whatever it may get
        total = int(summed)
        return total / seconds if total else None

    def remove(self) -> None:
        """Give the Trainer its own training step back."""
        trainer = self._trainer() if self._trainer else None
        if trainer is not None:
            del trainer.training_step
            if self._before is not None:
                trainer.training_step = self._before
