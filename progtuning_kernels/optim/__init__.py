"""Optimizers that read `p.requires_grad` and leave frozen tensors alone."""

from .host_state import HostReport
from .masked_adamw import MaskedAdamW
from .masked_optimizer import MaskedOptimizer
from .state import release_frozen_state, state_bytes

__all__ = [
    "HostReport",
    "MaskedAdamW",
    "MaskedOptimizer",
    "release_frozen_state",
    "state_bytes",
]
