"""Tells optimizers that `requires_grad` flags have changed.

`optim` and `patch` never import each other: `p.requires_grad` is all they share. An optimizer that
wants to release state at the moment of the change, and not at its next step, listens here; it then
looks at the flags of its own parameters, so one model's change costs another's optimizer one loop
and nothing else. Weak references only: listening keeps nothing alive.
"""

from __future__ import annotations

import weakref
from typing import Protocol


class Listener(Protocol):
    """What hears of changes."""

    def on_flags_changed(self) -> None:
        """Called after `requires_grad` changed on some parameters of some model."""


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    _listeners.add(listener)


def announce() -> None:
    for listener in list(_listeners):
        listener.on_flags_changed()
