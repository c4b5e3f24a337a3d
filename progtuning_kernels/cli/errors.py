"""Errors that the user can mend: shown as one line, exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can mend; its message says all."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn the `ValueError` of a bad setting, or a missing extra, into a `UserError`."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
