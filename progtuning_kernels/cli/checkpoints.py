"""Checkpoints of a training run: one file each, written beside and renamed, newest few kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._backend import one_line
from .errors import UserError

_FORMAT = 1


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of `step`.

    A reader, or a run that was killed here, sees the whole file or none of it.

    Args:
        keep: how many of the newest checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({"format": _FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def load_newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run, None if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    paths = sorted(folder.glob("step-*.pt"))
    if not paths:
        return None
    try:
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']}")
    except Exception as error:  # a damaged file fails in many ways, and none of them matters here
        reason = one_line(error)
        raise UserError(f"{paths[-1]} cannot be read ({reason}); delete it to go on") from error
    return state


def check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what a checkpoint was written with to this call.

    Raises:
        UserError: names the first setting that differs.
    """
    if saved["parameters"] != current["parameters"]:
        raise UserError(
            f"the checkpoint is of another model: it has {len(saved['parameters'])} parameters of "
            f"{saved['settings']['model']!r}, this run {len(current['parameters'])} of "
            f"{current['settings']['model']!r}"
        )
    if saved["data"] != current["data"]:
        raise UserError("the data has changed since the checkpoint was written")
    for name, value in current["settings"].items():
        if saved["settings"].get(name) != value:
            raise UserError(
                f"the checkpoint was written with {name}={saved['settings'].get(name)!r}, this "
                f"call has {name}={value!r}"
            )
