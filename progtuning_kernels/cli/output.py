"""The output folder of a run: never emptied of what is not a run's own."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from .errors import UserError

RUN_FILES = ("model", "adapter", "checkpoints", "metrics.json*")
DEMO_FILES = ("full-seed*", "progressive-seed*", "report")


def _entries(folder: Path, own: tuple[str, ...]) -> list[Path]:
    """What the folder holds; an error if any of it matches no pattern in `own`."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UserError(f"{folder} is a file")
    entries = sorted(folder.iterdir())
    foreign = [e.name for e in entries if not any(fnmatch(e.name, pattern) for pattern in own)]
    if foreign:
        raise UserError(f"{folder} holds other files ({foreign[0]}); give another --output")
    return entries


def empty_folder(folder: Path, own: tuple[str, ...]) -> None:
    """Remove an earlier run's files; patterns in `own` say which those are.

    Raises:
        UserError: the folder holds anything else; nothing is removed then.
    """
    for entry in _entries(folder, own):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make sure, before anything is loaded, that a run may write into `folder`.

    Raises:
        UserError: it holds something, and neither option was given; or both were.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if overwrite:
        _entries(folder, RUN_FILES)
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file")
    elif not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give --resume, --overwrite or another --output")
