"""Errors that the user can mend: shown as one line, exit status 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """An error that the user can mend; its message says all. Any part of the command raises it."""


def end_with(line: str, status: int, *, of_all: bool = True) -> NoReturn:
    """Print a line and exit; `of_all`: every rank ends so, and the first says it."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        time.sleep(5)  # rank 0 writes and says it meanwhile; a launcher ends all ranks at once
    if first or not of_all:
        print(line, file=sys.stderr)
    raise SystemExit(status) from None


@contextmanager
def as_user_error(*more: type[Exception], said: str = "") -> Iterator[None]:
    """Turn the `ValueError` of a bad setting, or a missing extra, into a `UserError`.

    Args:
        more: other classes; `Exception` where the errors of a package have none in common.
        said: what goes before the error's first line.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError, *more) as error:
        from ..backend import one_line  # it imports torch, which takes a second

        raise UserError(f"{said}: {one_line(error)}" if said else str(error)) from error
