"""What several ops check of their arguments, and how they hand over demanded gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(op: str, dtype: torch.dtype, name: str = "") -> None:
    """Raises ValueError for a dtype that no op computes in."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        found = f"{name} is {dtype}" if name else f"got {dtype}"
        raise ValueError(f"{op}: {found}, expected one of {names}")


def present(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that were demanded: what a custom operator can return."""
    return [gradient for gradient in gradients if gradient is not None]


def placed(gradients: Sequence[Tensor], demanded: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `present`: None where nothing was demanded."""
    left = iter(gradients)
    return [next(left) if wanted else None for wanted in demanded]
