"""Errors that the user can mend: shown as one line, exit status 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """An error that the user can mend; its message says all."""


def end_with(line: str, status: int) -> NoReturn:
    """Print a line, once for all ranks that say the same, and exit."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # rank 0 has said it meanwhile, and the launcher ends this one
    print(line, file=sys.stderr)
    raise SystemExit(status) from None


@contextmanager
def as_user_error(*more: type[Exception]) -> Iterator[None]:
    """Turn the `ValueError` of a bad setting, or a missing extra, into a `UserError`."""
    try:
        yield
    except (ValueError, ImportError, *more) as error:
        raise UserError(str(error)) from error
