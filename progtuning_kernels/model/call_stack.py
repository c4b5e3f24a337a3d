"""Looks at the calls under way, for the few facts that no object tells."""

from __future__ import annotations

import sys
from traceback import walk_stack
from typing import Any, TypeVar

_T = TypeVar("_T")


def called_from(file: str) -> bool:
    """Whether a function of this source file is on the stack of the calling thread."""
    return any(frame.f_code.co_filename == file for frame, _ in walk_stack(sys._getframe()))


def caller(kind: type[_T]) -> _T | None:
    """The nearest object of this kind whose method is on the stack of the calling thread."""
    owners = (frame.f_locals.get("self") for frame, _ in walk_stack(sys._getframe()))
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def caller_local(kind: type, name: str) -> Any:
    """A local variable of the nearest method of an object of this kind that has it; or None."""
    frames = [frame.f_locals for frame, _ in walk_stack(sys._getframe())]
    return next((f[name] for f in frames if name in f and isinstance(f.get("self"), kind)), None)
