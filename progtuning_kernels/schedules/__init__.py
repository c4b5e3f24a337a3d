"""Freezing schedules: which units (embeddings, blocks 0..L-1, head) train at an optimizer step.

They are pure functions of (step, number of blocks), standard library only, so that every rank, and
a resumed run, derives the same plan. `AdaptiveSchedule` alone has state: the decisions that it has
recorded, which travel with `PatchHandle.state_dict`. CONTRIBUTING.md says how to add one.
"""

from .adaptive import AdaptiveSchedule
from .annealing import annealed_lr
from .blocks import (
    BlockOrder,
    BlockSet,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    RandomBlockSchedule,
    UnitPolicy,
)
from .plan import (
    FreezePlan,
    ObservingSchedule,
    Schedule,
    check_schedule,
    decides_by_gradients,
    stage_count,
    stage_starts,
    steps_to_check,
    units_by_stage,
    whole_number,
)
from .progressive import EmbeddingPolicy, MilestoneSchedule, ProgressiveSchedule

__all__ = [
    "AdaptiveSchedule",
    "BlockOrder",
    "BlockSet",
    "CyclicBlockSchedule",
    "EmbeddingPolicy",
    "FixedBlockSchedule",
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
    "stage_starts",
    "steps_to_check",
    "units_by_stage",
    "whole_number",
]
