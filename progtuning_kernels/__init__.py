"""Progressive fine-tuning of Transformers, with the cost of the frozen rest removed.

`patch_model(model, schedule)` makes a Hugging Face model train only the blocks that its schedule
says; see README.md for the manual.
"""

from ._backend import backend_report
from .boundary import TruncationError, TruncationReport
from .families import UnsupportedModelError
from .optim import MaskedAdamW, release_frozen_state
from .patch import PatchHandle, patch_model
from .schedules import FreezePlan, MilestoneSchedule, ProgressiveSchedule

__version__ = "0.1.0"

__all__ = [
    "FreezePlan",
    "MaskedAdamW",
    "MilestoneSchedule",
    "PatchHandle",
    "ProgressiveSchedule",
    "TruncationError",
    "TruncationReport",
    "UnsupportedModelError",
    "backend_report",
    "patch_model",
    "release_frozen_state",
]
