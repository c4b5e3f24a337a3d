"""Freezing schedules: pure functions of (step, number of blocks). Standard library only.

A schedule answers one question: which units (embeddings, blocks 0..L-1, head) train at an optimizer
step. It holds no model and no state beyond its settings, so every rank, and a resumed run, derives
the same plan from the same step. Random ones draw from (seed, number of the draw) and keep no
generator. `AdaptiveSchedule` alone has state: its plans are functions of the step and of the
decisions it has recorded, which travel with `PatchHandle.state_dict`.

To add a schedule: one class with `plan(step, num_blocks) -> FreezePlan`, `stage(step) -> int`,
`total_steps` and `bind(total_steps)`; one line in `files.py`; one test.
"""

from .adaptive import AdaptiveSchedule
from .annealing import annealed_lr
from .blocks import BlockOrder, CyclicBlockSchedule, RandomBlockSchedule, UnitPolicy
from .plan import (
    FreezePlan,
    ObservingSchedule,
    Schedule,
    check_schedule,
    decides_by_gradients,
    stage_count,
    steps_to_check,
    whole_number,
)
from .progressive import EmbeddingPolicy, MilestoneSchedule, ProgressiveSchedule

__all__ = [
    "AdaptiveSchedule",
    "BlockOrder",
    "CyclicBlockSchedule",
    "EmbeddingPolicy",
    "FreezePlan",
    "MilestoneSchedule",
    "ObservingSchedule",
    "ProgressiveSchedule",
    "RandomBlockSchedule",
    "Schedule",
    "UnitPolicy",
    "annealed_lr",
    "check_schedule",
    "decides_by_gradients",
    "stage_count",
    "steps_to_check",
    "whole_number",
]
