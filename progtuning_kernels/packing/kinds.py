"""Kinds of arguments: each may take another way through the model's code, and is tried alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..model.call import NOT_ROWS, WANTS_ALL_BLOCKS, Call

Kind = frozenset[tuple[Any, ...]]

_MOST_TRIALS = 8  # of kinds beside the first: what counts up in an argument is not tried for ever
_NEW = "no training forward with such arguments was tried"
_NEEDS_GRADIENTS = "arguments came later that need gradients, as the model's own outputs do"
# Arguments that change what is returned, and nothing about tokens
_ONLY_OUTPUTS = NOT_ROWS | WANTS_ALL_BLOCKS | {"use_cache", "return_dict", "logits_to_keep"}


class TriedKinds:
    """Kinds of arguments that trials have seen, and what they have shown."""

    def __init__(self) -> None:
        self._reasons: dict[Kind, str] = {}  # why such forwards run padded; "": they run packed
        self._trials = 0

    def wants_trial(self, call: Call) -> bool:
        """Not where MatryoshkaLoss of sentence-transformers calls again with outputs of the same
        step: its stand-in of a forward would mix those of a trial with them.
        """
        if self._trials == _MOST_TRIALS or _needs_gradients(call):
            return False
        return kind_of(call) not in self._reasons

    def count_trial(self) -> None:
        self._trials += 1

    def note(self, call: Call, reason: str) -> None:
        """A decided trial of these arguments: why forwards with them run padded, "" for packed.

        It holds for a forward without labels, too, as evaluation makes it.
        """
        self._reasons[kind_of(call)] = reason
        self._reasons.setdefault(kind_of(call, labels=False), reason)

    def reason(self, call: Call) -> str:
        return self._reasons.get(
            kind_of(call), _NEEDS_GRADIENTS if _needs_gradients(call) else _NEW
        )


def _needs_gradients(call: Call) -> bool:
    return any(tensor.requires_grad for tensor in call.tensors.values())


def kind_of(call: Call, *, labels: bool = True) -> Kind:
    """Names of arguments, with the rank of a tensor, and the value of a word or whole number."""
    found = set[tuple[Any, ...]]()
    for name, value in call.named.items():
        if name in _ONLY_OUTPUTS or not (labels or "label" not in name):
            continue
        if isinstance(value, Tensor):
            found.add((name, Tensor, value.ndim))
        else:
            found.add((name, type(value), value if isinstance(value, str | int) else None))
    return frozenset(found)
