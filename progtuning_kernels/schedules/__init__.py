"""Freezing schedules: which units (embeddings, blocks 0..L-1, head) train at an optimizer step.

They are pure functions of (step, number of blocks), standard library only, so that every rank, and
a resumed run, derives the same plan. `AdaptiveSchedule` and `PlateauSchedule` alone have state: the
decisions that they have recorded, which travel with `PatchHandle.state_dict`. CONTRIBUTING.md says
how to add one.
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
    DecidingSchedule,
    FreezePlan,
    ObservingSchedule,
    Schedule,
    ScoredSchedule,
    check_schedule,
    decides_by_gradients,
    decides_by_score,
    decides_in_training,
    stage_count,
    stage_starts,
    steps_to_check,
    units_by_stage,
    whole_number,
)
from .plateau import PlateauSchedule
from .progressive import EmbeddingPolicy, MilestoneSchedule, ProgressiveSchedule

__all__ = [
    "AdaptiveSchedule",
    "BlockOrder",
    "BlockSet",
    "CyclicBlockSchedule",
    "DecidingSchedule",
    "EmbeddingPolicy",
    "FixedBlockSchedule",
    "FreezePlan",
    "MilestoneSchedule",
    "ObservingSchedule",
    "PlateauSchedule",
    "ProgressiveSchedule",
    "RandomBlockSchedule",
    "Schedule",
    "ScoredSchedule",
    "UnitPolicy",
    "annealed_lr",
    "check_schedule",
    "decides_by_gradients",
    "decides_by_score",
    "decides_in_training",
    "stage_count",
    "stage_starts",
    "steps_to_check",
    "units_by_stage",
    "whole_number",
]
