"""What the calls of a module read past their arguments: its attributes, and those inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# the mode is part of a call's kind; children are looked at before a cache takes blocks out
_APART = ("training", "_modules")


class ModuleState:
    """Attributes of modules and their configs, entries of dicts in them, and hooks: which objects
    they are, not what is in these.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners: list[tuple[str, dict[str, Any]]] = []
        for m in modules:
            self._owners.append((type(m).__name__, m.__dict__))
            config = m.__dict__.get("config")
            if hasattr(config, "__dict__") and all(vars(config) is not d for _, d in self._owners):
                self._owners.append((type(config).__name__, vars(config)))
        self._owners += [
            (f"{owner}.{name}", value)
            for owner, held in self._owners
            for name, value in held.items()
            if isinstance(value, dict) and value and name not in (*_APART, *_HOOKS)
        ]
        self._seen = [_Seen(held) for _, held in self._owners]
        self._hooks = [m.__dict__[name] for m in modules for name in _HOOKS]
        self._hook_count = sum(map(len, self._hooks))

    @property
    def changed(self) -> bool:
        return sum(map(len, self._hooks)) != self._hook_count or any(
            not seen.holds for seen in self._seen
        )

    def put_back(self) -> list[str]:
        """The names of attributes that have changed, which are then as they were."""
        pairs = zip(self._owners, self._seen, strict=True)
        return [f"{owner}.{name}" for (owner, _), seen in pairs for name in seen.put_back()]

    def tensors(self) -> Iterator[Tensor]:
        for seen in self._seen:
            yield from (value for value in seen.values if isinstance(value, Tensor))


class _Seen:
    """The objects in a dict."""

    def __init__(self, held: dict[Any, Any]) -> None:
        self._held = held
        self._names = [name for name in held if name not in _APART]
        # of two, as one alone comes without a tuple
        self._get = itemgetter(*self._names, *self._names[:1])
        self._size = len(held)
        self.values = self._get(held)

    @property
    def holds(self) -> bool:
        if len(self._held) != self._size:
            return False
        try:
            return all(map(is_, self._get(self._held), self.values))
        except KeyError:
            return False

    def put_back(self) -> list[Any]:
        before = dict(zip(self._names, self.values, strict=False))
        new = [name for name in self._held if name not in (*_APART, *before)]
        for name in new:
            del self._held[name]
        old = [name for name, value in before.items() if self._held.get(name) is not value]
        for name in old:
            self._held[name] = before[name]
        return new + old
