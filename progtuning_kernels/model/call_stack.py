"""Looks at the calls under way, for the few facts that no object tells."""

from __future__ import annotations

import sys
from typing import TypeVar

_T = TypeVar("_T")


def called_from(file: str) -> bool:
    """Whether a function of this source file is on the stack of the calling thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


def caller(kind: type[_T]) -> _T | None:
    """The nearest object of this kind whose method is on the stack of the calling thread."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), kind):
            return owner
        frame = frame.f_back
    return None
