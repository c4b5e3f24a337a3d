"""Optimizers that read `p.requires_grad` and leave frozen tensors alone."""

from .frozen_state import release_frozen_state, state_bytes
from .masked_adamw import MaskedAdamW
from .masked_optimizer import MaskedOptimizer

__all__ = ["MaskedAdamW", "MaskedOptimizer", "release_frozen_state", "state_bytes"]
