"""How many real tokens a second a Trainer trains on, without a read of the device per step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from ..patch import handle_of

_rates: weakref.WeakKeyDictionary[nn.Module, TokenRate] = weakref.WeakKeyDictionary()


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook. A copy of the module has it too, and no rate."""
    rate, handle = _rates.get(module), handle_of(module)
    if rate is None or not (module.training and torch.is_grad_enabled()):
        return
    # a wrapper has no handle, and the library's own forwards do not pass it
    if handle is None or not handle.forwards.aside:
        rate.count(args, kwargs)


class TokenRate:
    """Counts the tokens of `called` in forwards that train, and the seconds of training.

    Tokens are the entries of `input_ids` that `attention_mask` does not exclude. Batches without
    `input_ids` have none.

    Args:
        called: what the Trainer calls: the model, or the wrapper around it.
    """

    def __init__(self, called: nn.Module) -> None:
        self._tokens: Tensor | None = None  # int64, on the device of the batches
        self._seconds = 0.0
        self._since = time.perf_counter()
        _rates[called] = self
        self._hook = called.register_forward_pre_hook(
            _before_forward, prepend=True, with_kwargs=True
        )

    def count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        for value in args:  # sentence-transformers calls its model with a dict
            named |= value if isinstance(value, Mapping) else {}
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if not isinstance(ids, Tensor):
            return
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            tokens = mask.sum()
        else:
            tokens = torch.full((), ids.numel(), device=ids.device)
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

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
        total = int(reduce(tokens.to(device), "sum"))
        return total / seconds if total else None

    def remove(self) -> None:
        self._hook.remove()
