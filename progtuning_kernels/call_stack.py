"""Who is calling: for the few facts that no object tells."""

from __future__ import annotations

import sys


def called_from(file: str) -> bool:
    """Whether a function of this source file is on the stack of the calling thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False
