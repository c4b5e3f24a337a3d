"""Kinds of arguments: each may take another way through the model's code, and is tried alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.call import NOT_ROWS, WANTS_ALL_BLOCKS, Call
from ..model.forward_hooks import tensors_in

Kind = frozenset[tuple[str, Any]]

_MOST_KINDS = 16
_MOST_TRIALS = 4  # of one kind, whose batches show nothing or whose trial raises
_MOST_NUMBERS = 4  # in one argument, all of which pack: like a step's, they choose nothing
_NEW = "no forward with such arguments was tried"
# Arguments that change what is returned, and nothing about tokens
_ONLY_OUTPUTS = NOT_ROWS | WANTS_ALL_BLOCKS | {"use_cache", "return_dict", "logits_to_keep"}


class TriedKinds:
    """Kinds of arguments that trials have seen, and what they have shown.

    A trial with gradients holds for forwards without, and not the other way round.
    """

    def __init__(self) -> None:
        # why such forwards run padded, "" if they run packed; by kind, and whether it trains
        self._reasons: dict[tuple[Kind, bool], str] = {}
        self._trials: Counter[tuple[Kind, bool]] = Counter()
        self._numbers: dict[str, set[int]] = {}  # by argument
        self._counts: set[str] = set()  # arguments whose numbers choose nothing

    def wants_trial(self, call: Call) -> bool:
        """Not where MatryoshkaLoss of sentence-transformers calls again with outputs of the same
        step: its stand-in of a forward would mix those of a trial with them.
        """
        key = self._key_of(call)
        if self._known(key) is not None or self._trials[key] == _MOST_TRIALS or _answered(call):
            return False
        return key in self._trials or len(self._trials) < _MOST_KINDS

    def note(self, call: Call, reason: str | None) -> None:
        """What a trial of these arguments has shown: why forwards with them run padded, "" for
        packed, None for nothing.
        """
        key = self._key_of(call)
        self._trials[key] += 1
        if reason is None:
            return
        if reason == "":
            for name, value in key[0]:
                if type(value) is int:
                    numbers = self._numbers.setdefault(name, set())
                    numbers.add(value)
                    if len(numbers) == _MOST_NUMBERS:
                        self._counts.add(name)
            # evaluation need not have the labels that training has
            unlabelled = frozenset((n, v) for n, v in self._key_of(call)[0] if not _is_label(n))
            self._reasons[unlabelled, False] = ""
        self._reasons[self._key_of(call)] = reason

    def reason(self, call: Call) -> str:
        """Why a forward with these arguments runs padded, "" if it does not."""
        found = self._known(self._key_of(call))
        return _NEW if found is None else found

    def _known(self, key: tuple[Kind, bool]) -> str | None:
        kind, trains = key
        found = self._reasons.get(key)
        return self._reasons.get((kind, True)) if found is None and not trains else found

    def _key_of(self, call: Call) -> tuple[Kind, bool]:
        """The kind, names of arguments with what may choose a way, and whether it trains."""
        named = ((n, v) for n, v in call.named.items() if n not in _ONLY_OUTPUTS)
        kind = frozenset((n, None if n in self._counts else _choice(v)) for n, v in named)
        return kind, torch.is_grad_enabled()


def _choice(value: Any) -> Any:
    """A word or a whole number, also as the one value of a list; the rank of a tensor."""
    if isinstance(value, Tensor):
        scalar = not value.ndim and value.device.type == "cpu" and not value.is_floating_point()
        return int(value) if scalar else (value.ndim,)
    if isinstance(value, list | tuple) and value and all(isinstance(v, str | int) for v in value):
        return value[0] if len({*value}) == 1 else None  # collators make lists of a task's name
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, str | int | Enum) else None


def _is_label(name: str) -> bool:
    return name == "label" or name.endswith("labels")


def _answered(call: Call) -> bool:
    dicts = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Mapping)]
    return any(tensor.grad_fn is not None for tensor in tensors_in(dicts))
