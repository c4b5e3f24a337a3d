"""What a step costs under any plan, from a few measured ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn

from ..freezing.active_set import TiedPolicy
from ..freezing.boundary import FrozenMode
from ..freezing.freezer import Freezer, StageState
from ..model.layout import EMBEDDINGS, Layout
from ..planner.calibration import CannotCalibrate, measure_units
from ..planner.example_batch import example_batch, on_meta
from ..planner.meta_step import count_flops, meta_copy
from ..planner.planning import without_data
from ..planner.stage_meter import Options, freeze_quietly
from ..schedules import FreezePlan
from ..swaps import Kernels
from .knapsack import Cost, StepCosts


def measure_step_costs(
    model: nn.Module,
    layout: Layout,
    *,
    shape: tuple[int, int] | None,
    inputs: Mapping[str, Any] | None,
    options: Options,
    calibrate: bool,
    tied: TiedPolicy,
    frozen_mode: FrozenMode,
    kernels: Kernels,
    head: tuple[bool, ...],
) -> StepCosts:
    """Operations on the meta device, or seconds composed of measured units.

    Args:
        shape: rows and tokens of a batch, for a model that takes tokens; None: that of `inputs`.
        calibrate: seconds; raises `ValueError` where they cannot be had.
        head: whether it trains, the ways to be measured.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    copied = meta_copy(model, dtype)
    freezer = Freezer(copied, layout, tied=tied, frozen_mode=frozen_mode)
    with without_data(model):
        if shape is not None:
            batch = example_batch(copied, *shape, padding=True, device=options.device)
        else:
            assert inputs is not None
            batch = on_meta(inputs, 0, 0)
    everything = _all_that_trains(freezer, layout)
    if calibrate:
        if head != (True,):
            raise ValueError(
                'calibrate=True times the head with its weight gradients: pass head="always"'
            )
        try:
            units = measure_units(
                model,
                layout,
                batch,
                options,
                dtype=dtype,
                tied=tied,
                only=None,
                frozen_mode=frozen_mode,
                between=True,
                kernels=kernels,
            )
        except CannotCalibrate as reason:
            raise ValueError(
                f"{type(model).__name__} cannot be timed ({reason}): leave calibrate=True out, and "
                "costs are counted in operations"
            ) from reason

        def cost(state: StageState) -> Cost:
            return Fraction(units.step_s(state, layout.num_blocks))

    else:

        def cost(state: StageState) -> Cost:
            with without_data(model):
                step = count_flops(
                    copied,
                    layout,
                    batch,
                    boundary=state.boundary,
                    device=options.device,
                    autocast=options.autocast,
                )
            return step.forward + step.backward

    def measured(plan: FreezePlan) -> Cost:
        return cost(freeze_quietly(freezer, plan))

    stacks = {i: stack.path for stack in layout.stacks for i in stack.blocks}
    kinds = []
    for i, path in enumerate(layout.block_paths):
        block = model.get_submodule(path)
        sizes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
        kinds.append((stacks[i], type(block), sizes))
    return compose(measured, everything, kinds, head)


def _all_that_trains(freezer: Freezer, layout: Layout) -> FreezePlan:
    """Everything, without units in which the user has left nothing to train."""
    blocks = range(layout.num_blocks)
    active = freeze_quietly(freezer, FreezePlan((True,) * len(blocks), embeddings=True)).active
    return FreezePlan(
        tuple(i in active for i in blocks),
        embeddings=EMBEDDINGS in active,
        head=layout.head in active,
    )


def compose(
    measure: Callable[[FreezePlan], Cost],
    everything: FreezePlan,
    kinds: Sequence[Hashable],
    head: Collection[bool],
) -> StepCosts:
    """What any plan costs, from the costs of a few.

    Blocks of one kind cost the same, and so does moving the boundary down past one pair of kinds.

    Args:
        measure: the cost of a step.
        everything: the units that can train.
        kinds: of the blocks.
        head: whether it trains, the ways that are wanted.
    """
    measure = functools.cache(measure)
    num_blocks, full = everything.num_blocks, measure(everything)
    blocks = [i for i in range(num_blocks) if everything.trainable[i]]
    added: dict[int, Cost] = {}
    of_kind: dict[Hashable, Cost] = {}
    for i in reversed(blocks if everything.embeddings else blocks[1:]):
        if kinds[i] not in of_kind:
            flags = tuple(on and j != i for j, on in enumerate(everything.trainable))
            of_kind[kinds[i]] = max(0, full - measure(replace(everything, trainable=flags)))
        added[i] = of_kind[kinds[i]]

    base: dict[tuple[int, bool], Cost] = {}
    if everything.head:
        base[num_blocks, True] = measure(FreezePlan((False,) * num_blocks))
    steps: dict[Hashable, Cost] = {}
    for i in reversed(blocks):
        pair, above = (kinds[i], *kinds[i + 1 : i + 2]), base.get((i + 1, True))
        if above is not None and pair in steps:
            base[i, True] = above + steps[pair]
            continue
        flags = tuple(on and j >= i for j, on in enumerate(everything.trainable))
        base[i, True] = measure(FreezePlan(flags)) - sum(added[j] for j in blocks if j > i)
        if above is not None:
            steps[pair] = base[i, True] - above
    if everything.embeddings:
        base[EMBEDDINGS, True] = full - sum(added.values())
    if False in head:
        if blocks:
            top = FreezePlan(tuple(j == blocks[-1] for j in range(num_blocks)))
            saved = measure(top) - measure(replace(top, head=False))
            base |= {(i, False): base[i, True] - saved for i in blocks}
        if everything.embeddings:
            # not the same difference: a weight tied to the head freezes with it
            without = measure(replace(everything, head=False))
            base[EMBEDDINGS, False] = without - sum(added.values())
    return StepCosts(base, added, full)
