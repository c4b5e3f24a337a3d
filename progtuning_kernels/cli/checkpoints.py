"""What the command line asks of a checkpoint, beside what the library compares."""

from __future__ import annotations

from typing import Any

from .errors import UserError


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
