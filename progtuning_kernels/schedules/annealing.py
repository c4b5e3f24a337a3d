"""FreezeOut's learning rates (arXiv 1706.04983) for any schedule that only ever freezes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .plan import Schedule, check_schedule, decides_in_training


def annealed_lr(
    schedule: Schedule,
    groups: Sequence[Mapping[str, Any]],
    num_blocks: int,
    *,
    base: Callable[[int], float] = lambda step: 1.0,
    scaled: bool = False,
) -> list[Callable[[int], float]]:
    """One factor of the learning rate per group, as `torch.optim.lr_scheduler.LambdaLR` takes them.

    Every unit's rate falls from its full value to 0 at the step at which it freezes, along its own
    cosine, so that a freeze is no jump:

        factor(s) = base(s) * a * (1 + cos(pi * s / s_u)) / 2      0 from s_u on

    with s_u the first step at which the plan leaves unit u out (the length of the run where it
    never does), and a = 1, or S / s_u (S steps in all) if `scaled`, which gives every unit the same
    sum of rates. FreezeOut itself, with its linear spacing, is `ProgressiveSchedule(L)`.

    Args:
        schedule: the one that the model is patched with, of known length.
        groups: of `handle.param_groups(by_unit=True)`, also through an optimizer.
        num_blocks: number of blocks of the model, L.
        base: factor for all units at a step, e.g. of a warm-up.
        scaled: whether a is S / s_u.

    Returns:
        One function of the step per group, in their order.

    Raises:
        ValueError: groups that do not say their unit, a schedule that thaws, decides while it
            trains, or does not know the length of the run.
        TypeError: no schedule.

    Example:
        ```python
        optimizer = MaskedAdamW(handle.param_groups(lr=5e-5, by_unit=True))
        factors = annealed_lr(handle.schedule, optimizer.param_groups, handle.num_blocks)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        ```
    """
    check_schedule(schedule, "annealed_lr")
    if not all("unit" in group for group in groups):
        raise ValueError("the groups do not say their unit: handle.param_groups(by_unit=True)")
    total, ends = freezing_steps(schedule, num_blocks)

    def factor(end: int) -> Callable[[int], float]:
        def at(step: int) -> float:
            if step >= end:
                return 0.0
            peak = total / end if scaled else 1.0
            return base(step) * peak * (1 + math.cos(math.pi * step / end)) / 2

        return at

    return [factor(ends[group["unit"] + 1]) for group in groups]  # the embeddings are unit -1


def freezing_steps(schedule: Schedule, num_blocks: int) -> tuple[int, list[int]]:
    """The length of the run, and the first step without each unit (the length where none is)."""
    total = schedule.total_steps
    if decides_in_training(schedule):
        raise ValueError(
            f"{schedule!r} does not know its freezing steps in advance: nothing can be annealed"
        )
    if total is None:
        raise ValueError(
            "annealing needs the length of the run: call schedule.bind(total_steps) first"
        )
    ends = [total] * (num_blocks + 2)
    before: tuple[bool, ...] | None = None
    stage = -1
    for step in range(total):
        if schedule.stage(step) == stage:
            continue
        stage = schedule.stage(step)
        plan = schedule.plan(step, num_blocks)
        flags = (plan.embeddings, *plan.trainable, plan.head)
        if before is not None and any(
            on and not was for on, was in zip(flags, before, strict=True)
        ):
            raise ValueError(f"{schedule!r} thaws at step {step}: nothing anneals")
        ends = [min(e, total if on else step) for e, on in zip(ends, flags, strict=True)]
        before = flags
    return total, ends
