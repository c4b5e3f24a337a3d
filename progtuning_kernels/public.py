"""The names of the package, which `progtuning_kernels` imports at the first use of one."""

from .budget import budget_schedule
from .cache import CacheReport, PrefixCache
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .contribution import Contribution, measure_contribution
from .freezing.truncation import TruncationError, TruncationReport
from .model.families import UnsupportedModelError, register_family
from .ops import backend_report
from .optim import MaskedAdamW, release_frozen_state
from .patch import PatchHandle, patch_model
from .planner import TrainingPlan, plan_training
from .schedules import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    FreezePlan,
    MilestoneSchedule,
    PlateauSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
    annealed_lr,
)
from .schedules.files import schedule_from_file

__all__ = [
    "AdaptiveSchedule",
    "CacheReport",
    "CheckpointError",
    "Contribution",
    "CyclicBlockSchedule",
    "FixedBlockSchedule",
    "FreezePlan",
    "MaskedAdamW",
    "MilestoneSchedule",
    "PatchHandle",
    "PlateauSchedule",
    "PrefixCache",
    "ProgressiveSchedule",
    "RandomBlockSchedule",
    "TrainingPlan",
    "TruncationError",
    "TruncationReport",
    "UnsupportedModelError",
    "annealed_lr",
    "backend_report",
    "budget_schedule",
    "load_checkpoint",
    "measure_contribution",
    "patch_model",
    "plan_training",
    "register_family",
    "release_frozen_state",
    "save_checkpoint",
    "schedule_from_file",
]
