"""Progressive fine-tuning of Transformers, with the cost of the frozen rest removed.

`patch_model(model, schedule)` makes a Hugging Face model train only the blocks that its schedule
says; see README.md for the manual.
"""

from ._backend import backend_report
from .families import UnsupportedModelError, register_family
from .optim import MaskedAdamW, release_frozen_state
from .patch import PatchHandle, patch_model
from .schedules import FreezePlan, MilestoneSchedule, ProgressiveSchedule
from .truncation import TruncationError, TruncationReport

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
    "register_family",
    "release_frozen_state",
]
