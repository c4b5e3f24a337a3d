"""Tells optimizers that `requires_grad` flags have changed, through one list for the process.

A listener looks at the flags of its own parameters, and can release state at once, not at its next
step; a change of another model costs it one loop. Listening keeps nothing alive.
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
