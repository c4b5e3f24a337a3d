"""Sees in a gradient whether a loop's loss reads padding; a trial of the model cannot show it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.host_copies import waits_for

PADDING_READ = "the loss reads hidden states or logits at padding"


def looks(device: torch.device) -> int:
    """Gradients to look at. Each is a read of a GPU, which has one: in the step of a trial."""
    return 1 if waits_for(device) else 3


def padding_read(gradient: Tensor, of_tokens: Tensor) -> bool | None:
    """Whether something has read padding, which then gets a gradient; None where that cannot be
    seen: the gradient is zero everywhere, or not finite, which makes NaN of masked places, too.

    Args:
        gradient: (B, T, C), of all places.
        of_tokens: the part of it that belongs to tokens, in any shape.
    """
    count = gradient.count_nonzero()
    shows = (count > 0) & gradient.isfinite().all()
    shows, reads = torch.stack([shows, count != of_tokens.count_nonzero()]).tolist()
    return reads if shows else None
