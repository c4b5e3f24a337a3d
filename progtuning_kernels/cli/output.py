"""The output folder of a run: never emptied of what is not a run's own."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

from .errors import UserError
from .options import Method

# Patterns of the names that a command writes, and what such a folder holds; None: anything.
Files = dict[str, "Files | None"]

# checkpoints and runs (TensorBoard's) are the Trainer's
RUN_FILES: Files = dict.fromkeys(
    (
        "model",
        "adapter",
        "checkpoint-*",
        "runs",
        "metrics.json*",
        "predictions.jsonl",
        "schedule.json",
    )
)
DEMO_FILES: Files = {
    **{f"{method}-seed[0-9]*": RUN_FILES for method in get_args(Method)},
    "report": {"report.html": None},
}


def _entries(folder: Path, own: Files) -> list[Path]:
    """The paths in a folder; `UserError` if any of them, or of those below, is not in `own`."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UserError(f"{folder} is a file")
    entries = sorted(folder.iterdir())
    for entry in entries:
        pattern = next((pattern for pattern in own if fnmatch(entry.name, pattern)), None)
        if pattern is None:
            raise UserError(f"{folder} holds other files ({entry.name}); give another --output")
        if own[pattern] is not None:
            _entries(entry, own[pattern])
    return entries


def empty_folder(folder: Path, own: Files) -> None:
    """Remove an earlier run's files; `own` says which those are."""
    for entry in _entries(folder, own):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make sure, before anything is loaded, that a run may write into `folder`."""
    found = _entries(folder, RUN_FILES if overwrite else {"*": None})
    if found and not (resume or overwrite):
        raise UserError(f"{folder} is not empty; give --resume, --overwrite or another --output")
