"""`--schedule budget`: what trains is chosen by what its step may cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..budget import budget_schedule
from ..schedules import FixedBlockSchedule, Schedule
from ..schedules.files import schedule_from_file
from .errors import as_user_error
from .options import TrainOptions

CHOSEN = "schedule.json"  # in the folder of a run
BATCHES = 8  # that importance is measured on


def chosen_schedule(
    options: TrainOptions, model: nn.Module, total_steps: int | None, **batches: Any
) -> FixedBlockSchedule:
    """The schedule of a model as it trains, with its adapters.

    Args:
        batches: of `budget_schedule`: them, or their shape.
    """
    with as_user_error():
        return budget_schedule(
            model,
            options.rho or 1.0,
            total_steps,
            importance=options.importance,
            # new tokens train with the embeddings
            embeddings="always" if options.train_new_tokens else "chosen",
            frozen_mode=options.frozen_mode,
            tied=options.tied,
            blocks=options.block_lists,
            **batches,
        )


def write_choice(schedule: FixedBlockSchedule, folder: Path) -> None:
    content = {"schedule": "fixed", "blocks": schedule.blocks, "head": schedule.head}
    (folder / CHOSEN).write_text(json.dumps(content) + "\n", encoding="utf-8")


def choice_of(folder: Path, total_steps: int) -> Schedule | None:
    """What an earlier part of a run has chosen; None where there is none."""
    if not (folder / CHOSEN).exists():
        return None
    with as_user_error():
        return schedule_from_file(folder / CHOSEN).bind(total_steps)
