"""`budget_schedule`: chooses what to train by what a step may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from inspect import signature
from numbers import Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contribution import measure_contribution
from ..freezing.active_set import ActiveSet, TiedPolicy
from ..freezing.boundary import FrozenMode
from ..freezing.handle import handle_of
from ..model.layout import EMBEDDINGS, find_layout
from ..planner.stage_meter import OptimizerName, Options
from ..schedules import FixedBlockSchedule, FreezePlan, whole_number
from ..schedules.plan import check_choice
from ..swaps import Kernels
from .importance import Batch, by_gradient, by_signal
from .knapsack import StepCosts, choose_units
from .step_costs import measure_step_costs

Importance = Literal["gradient", "contribution", "snr"]
BudgetPolicy = Literal["chosen", "always", "never"]
_ROWS, _TOKENS = 32, 128  # of a batch of which nothing is known, as of `progtuning plan`
_WAYS = {"chosen": (True, False), "always": (True,), "never": (False,)}


def budget_schedule(
    model: nn.Module,
    rho: float | Sequence[float],
    total_steps: int | None = None,
    *,
    importance: Importance | Sequence[float] | None = None,
    batches: Iterable[Batch] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(**batch).loss,
    batch_size: int | None = None,
    seq_len: int | None = None,
    embeddings: BudgetPolicy = "chosen",
    head: BudgetPolicy = "always",
    calibrate: bool = False,
    optimizer: OptimizerName = "adamw",
    autocast: torch.dtype | None = None,
    frozen_mode: FrozenMode = "eval",
    tied: TiedPolicy = "frozen",
    kernels: Kernels = "auto",
    blocks: str | Sequence[str] | None = None,
) -> FixedBlockSchedule:
    """Choose the units that are worth most among those whose step costs at most a share of the full
    one.

    A step costs its forward, its backward down to the lowest unit that trains, and the weight
    gradients and update of every unit that trains. For every boundary a knapsack finds the blocks
    above it; GreenTrainer (arXiv 2309.13192) chooses tensors in this way. The result is exact: no
    other set of units within the budget has more importance. It is the same on all ranks: the
    first one measures and tells the others.

    Args:
        model: not patched. What the user has frozen stays so, costs nothing, and is worth nothing.
            It is not changed.
        rho: the share of the full step, above 0 and at most 1. Several: one for each stage of a run
            of equal stages, which costs their mean.
        total_steps: length of the run in optimizer steps; None: bound later, for a single `rho`.
        importance: "gradient": sum of |gradient * weight| over `batches`, without dropout.
            "contribution": the gain in loss when the block trains, of `measure_contribution` on
            `batches`. "snr": signal-to-noise ratio of the singular values of the weight matrices,
            as Spectrum has it (arXiv 2406.06623), which needs no batches. Or numbers, none
            negative: one for every block, or for the embeddings, the blocks and the head. None:
            "gradient" with batches, "snr" without.
        batches: arguments of the model by name, on its device.
        loss: 0-dim loss of one batch; by default the model's own.
        batch_size: rows of a micro-batch, for the costs; None: as the first of `batches`, or 32.
        seq_len: tokens of each row; None: as above, or 128, or as many as the model has positions.
        embeddings: "chosen" by the budget as blocks are, "always" or "never".
        head: "always", since most heads are new; "chosen" or "never".
        calibrate: costs are seconds, of real steps of two blocks, embeddings and head on the
            model's device, the optimizer included. Otherwise they are operations, which are the
            same on every machine, without the optimizer.
        optimizer: for calibration: "adamw", "adamw-bf16" or "adamw-8bit".
        autocast: for calibration: bfloat16 or float16; None: no autocast.
        frozen_mode: as for `patch_model`.
        tied: as for `patch_model`.
        kernels: as for `patch_model`, for calibration.
        blocks: as for `patch_model`.

    Raises:
        ValueError: a rho outside its range, or below the cheapest step, which the message names;
            no batches where they are needed; importance that is negative, not finite or nowhere
            above 0; several rho without `total_steps`; a model that is patched, cannot run on the
            meta device, or cannot be timed.
        TypeError: no number where one belongs.
        UnsupportedModelError: the model cannot be cut into units.

    Example:
        ```python
        schedule = budget_schedule(model, 0.5, 60)
        print(schedule)
        ```
    """
    if handle_of(model) is not None:
        raise ValueError("the model is patched: choose before, or call handle.unpatch() first")
    check_choice("embeddings", embeddings, BudgetPolicy)
    check_choice("head", head, BudgetPolicy)
    if isinstance(importance, str):
        check_choice("importance", importance, Importance)
    shares, total_steps = _shares(rho, total_steps)

    def choose() -> list[str]:
        layout = find_layout(model, blocks)
        given = [] if batches is None else list(batches)
        asked: Any = ("gradient" if given else "snr") if importance is None else importance
        by = asked if isinstance(asked, str) else None  # arrays compare by element
        if not all(isinstance(batch, Mapping) for batch in given):
            raise TypeError("batches must be several, each of the arguments of the model by name")
        shape = _shape(model, batch_size, seq_len, given)
        if by in ("gradient", "contribution") and not given:
            raise ValueError(f'importance="{by}" needs batches: give some, or take "snr"')
        where = (model, layout, ActiveSet(model, layout, tied))
        if not where[-1].trainable_params:
            raise ValueError("nothing of the model is trainable: every parameter is frozen")
        worth: Any
        if by == "gradient":
            worth = by_gradient(*where, given, loss)
        elif by == "contribution":
            on = embeddings != "never"
            found = measure_contribution(model, given, loss=loss, embeddings=on, blocks=blocks)
            worth = found.weights
        else:
            worth = by_signal(*where) if by == "snr" else asked
        target = next(model.parameters()).device
        if target.type == "meta":
            target = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        costs = measure_step_costs(
            model,
            layout,
            shape=shape,
            inputs=given[0] if shape is None else None,
            options=Options(
                optimizer=optimizer,
                master_weights=False,
                in_backward=False,
                cache=None,
                device=target,
                autocast=autocast,
            ),
            calibrate=calibrate,
            tied=tied,
            frozen_mode=frozen_mode,
            kernels=kernels,
            head=_WAYS[head],
        )
        numbers = _per_unit(worth, layout.num_blocks, measured=by is not None)
        plans = []
        for share in shares:
            plan = choose_units(
                costs,
                numbers,
                Fraction(share) * costs.full,
                embeddings=_WAYS[embeddings],
                head=_WAYS[head],
            )
            if plan is None:
                raise ValueError(_too_small(share, costs, embeddings, head))
            plans.append(_text(plan, head))
        return plans

    starts = [i * (total_steps or 0) // len(shares) for i in range(len(shares))]
    schedule = FixedBlockSchedule(
        dict(zip(starts, _of_first_rank(choose), strict=True)),
        head="always" if head == "always" else "never",
    )
    return schedule if total_steps is None else schedule.bind(total_steps)


def _shares(rho: Any, total_steps: int | None) -> tuple[list[float], int | None]:
    """The share of each stage, and the length of the run."""
    shares = list(rho) if isinstance(rho, Sequence) and not isinstance(rho, str) else [rho]
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, Real):
            raise TypeError(f"rho must be above 0 and at most 1, got {share!r}: pass a number")
        if not 0 < float(share) <= 1:
            raise ValueError(f"rho must be above 0 and at most 1, got {share!r}")
    if not shares:
        raise ValueError("rho is empty: give one number, or one for each stage")
    if total_steps is not None:
        total_steps = whole_number("total_steps", total_steps, len(shares))
    elif len(shares) > 1:
        raise ValueError(f"{len(shares)} stages need the length of the run: give total_steps")
    return [*map(float, shares)], total_steps


def _shape(
    model: nn.Module, batch_size: int | None, seq_len: int | None, given: Sequence[Batch]
) -> tuple[int, int] | None:
    """Rows and tokens of the batch whose step is counted; None: as the first of the given ones."""
    takes_tokens = "input_ids" in signature(model.forward).parameters
    if given and (batch_size is None or seq_len is None or not takes_tokens):
        return None
    if not takes_tokens:
        raise ValueError(f"{type(model).__name__} does not take input_ids: give batches")
    rows = _ROWS if batch_size is None else batch_size
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = min(_TOKENS, positions or _TOKENS) if seq_len is None else seq_len
    return whole_number("batch_size", rows, 1), whole_number("seq_len", tokens, 1)


def _per_unit(worth: Sequence[float], num_blocks: int, *, measured: bool) -> list[Fraction]:
    """Importance of the embeddings, the blocks and the head, exactly.

    Beside new adapters a new head has a gradient, and would be all that trains.
    """
    try:
        numbers = [float(value) for value in worth]
    except (TypeError, ValueError):
        raise TypeError(f"importance must be numbers, got {worth!r}") from None
    if len(numbers) == num_blocks:
        numbers = [0.0, *numbers, 0.0]
    if len(numbers) != num_blocks + 2:
        raise ValueError(
            f"{len(numbers)} numbers of importance: give {num_blocks}, one for every block, or "
            f"{num_blocks + 2} with the embeddings first and the head last"
        )
    if not all(0 <= value < math.inf for value in numbers) or not any(
        numbers[: -1 if measured else None]
    ):
        below = " below the head" if measured else ""
        raise ValueError(
            f"importance must be finite, none negative and not all 0{below}, found {numbers}; new "
            'adapters, which are 0, have none by gradient yet: take "snr"'
        )
    return [Fraction(value) for value in numbers]


def _too_small(share: float, costs: StepCosts, embeddings: str, head: str) -> str:
    """Why nothing fits, and the smallest rho that does."""
    least = min(
        (
            Fraction(cost)
            for (boundary, trains), cost in costs.base.items()
            if (boundary == EMBEDDINGS) in _WAYS[embeddings] and trains in _WAYS[head]
        ),
        default=None,
    )
    if least is None:
        return f'nothing can train under embeddings="{embeddings}" and head="{head}"'
    smallest = math.ceil(least / costs.full * 1000) / 1000
    return f"rho={share} is less than the cheapest step costs: pass rho={smallest} or more"


def _text(plan: FreezePlan, head: str) -> str:
    """The units of a plan as `FixedBlockSchedule` reads them."""
    parts = plan.units_in_words().replace("blocks ", "").split(", ")
    return ",".join(part for part in parts if not (part == "head" and head == "always"))


def _of_first_rank(choose: Callable[[], list[str]]) -> list[str]:
    """What the first process chooses, or the error that it raises, in all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return choose()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [choose()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
