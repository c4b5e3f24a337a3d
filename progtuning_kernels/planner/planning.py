"""`plan_training`: composes what every stage of a schedule costs from steps on the meta device."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..backend import one_line
from ..cache import PrefixCache
from ..freezing.active_set import TiedPolicy
from ..freezing.boundary import FrozenMode
from ..freezing.freezer import Freezer
from ..freezing.handle import handle_of
from ..model.derived_classes import derived_classes
from ..model.layout import find_layout
from ..model.rows import TrainedRows
from ..schedules import (
    FreezePlan,
    Schedule,
    check_schedule,
    decides_in_training,
    stage_starts,
)
from ..schedules.plan import check_choice
from ..schedules.progressive import scales_with_length
from .calibration import CannotCalibrate, UnitCosts, measure_units
from .example_batch import example_batch, on_meta
from .meta_step import meta_copy
from .ranks import Strategy, ranks_of
from .stage_meter import MeasuredStage, OptimizerName, Options, StageMeter
from .training_plan import Remedy, StagePlan, TrainingPlan

# A distinct plan of a model of 32 blocks takes 2 s, and a longer table says no more.
_MOST_PLANS = 64
# Length of a run that no one has named: every number of stages up to 12 divides it.
_ANY_LENGTH = math.lcm(*range(1, 13))

_AUTOCASTS = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


def _with_length(schedule: Schedule, steps: int | None) -> tuple[Schedule, int]:
    """The schedule, or a copy of it that knows how long the run is, and that length."""
    check_schedule(schedule, "plan_training")
    if decides_in_training(schedule):
        raise ValueError(
            f"{type(schedule).__name__} decides while it trains: plan a MilestoneSchedule that "
            "freezes as you expect it to"
        )
    if steps is None and schedule.total_steps is not None:
        return schedule, schedule.total_steps
    if steps is None and not scales_with_length(schedule):
        raise ValueError("the schedule does not know the length of the run: give steps=")
    length = _ANY_LENGTH if steps is None else steps
    return copy.deepcopy(schedule).bind(length), int(length)


def plan_training(
    model: nn.Module,
    schedule: Schedule,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    optimizer: OptimizerName = "adamw",
    master_weights: bool = False,
    in_backward: bool = False,
    cache: bool | PrefixCache = False,
    steps: int | None = None,
    memory_bytes: int | None = None,
    device: torch.device | str | None = None,
    padding: bool = True,
    real_tokens: float = 1.0,
    inputs: Mapping[str, Any] | None = None,
    frozen_mode: FrozenMode = "eval",
    tied: TiedPolicy = "frozen",
    only: str | None = None,
    blocks: str | Sequence[str] | None = None,
    rows: Mapping[str, Any] | None = None,
    calibrate: bool = False,
    ranks: int = 1,
    strategy: Strategy | None = None,
) -> TrainingPlan:
    """Say what every stage of a run costs, without weights and without training.

    The model's own forward and backward run on the meta device, once for every distinct plan of the
    schedule, while operations (torch's counter), saved activations and live bytes are counted.
    Modules are counted as they are, without freeze-aware kernels.

    Args:
        model: an unpatched model; it is not changed. Its weights may be on the meta device:
            `with torch.device("meta"): AutoModelForCausalLM.from_config(config)`. Gradient
            checkpointing counts if it is switched on.
        schedule: as for `patch_model`.
        batch_size: rows of a micro-batch.
        seq_len: tokens in each row.
        dtype: of weights, activations and gradients.
        autocast: bfloat16 or float16: the forward runs under `torch.autocast`. Weights, gradients
            and state keep `dtype`, results of matrix products are in this one, and activations
            include the copies of weights that backward reads. None: no autocast.
        optimizer: "adamw", "adamw-bf16" or "adamw-8bit": `MaskedAdamW` with moments in float32,
            bfloat16 or 8 bits.
        master_weights: the optimizer keeps float32 copies of bfloat16 and float16 weights.
        in_backward: it updates inside backward, so that one unit's gradients are alive at a time.
        cache: count what a `PrefixCache` would keep of a row, in its `dtype`, and time steps
            without the prefix.
        steps: optimizer steps of the run; None: as the schedule says, or equal stages.
        memory_bytes: what a stage has to fit in; None: nothing.
        device: where it will run: which attention kernel is taken and what dropout keeps depend on
            it. None: where the model is, or from the meta device a GPU if there is one.
        padding: rows are padded, so that there is an attention mask.
        real_tokens: share of a micro-batch's places that are no padding, above 0 and at most 1.
            Packing computes blocks on these alone: their linear layers, kept bytes and seconds take
            this share of the padded ones, attention in groups its power of 1.5 (planner/README.md).
            Embeddings, head and the step of full training, which stages are compared with, stay
            padded. A model that does not pack (`handle.packing_report()`) takes 1.
        inputs: arguments of the model in place of tokens and labels, `batch_size` in dimension 0.
        frozen_mode: as for `patch_model`.
        tied: as for `patch_model`.
        only: as for `patch_model`. The step of full training, which stages are compared with,
            trains everything; nothing is calibrated.
        blocks: as for `patch_model`.
        rows: as for `patch_model`. The step of full training trains all rows.
        calibrate: time real steps of two blocks, embeddings and head on `device`, for about two
            seconds (four rounds at least), and compose stages from that.
        ranks: processes that train together, each on micro-batches of its own. Bytes are then those
            of one rank.
        strategy: "ddp", which None means; "fsdp2": `fully_shard` on every block, and on the model;
            "zero2": DeepSpeed's ZeRO-2, with its bucket of 500 million elements.

    Raises:
        UnsupportedModelError: the model cannot be cut into units.
        ValueError: a setting out of range; autocast of weights that are not in float32; a strategy
            for one rank, or "zero2" with what only `MaskedAdamW` has; a schedule that does not fit,
            has no length, has more than 64 different plans, or decides while it trains; an `only`
            that matches nothing that trains, or leaves nothing to a plan; a model that is patched,
            or that asks for values of its data and so cannot run on the meta device.
        TypeError: not a module, such as a config; not a schedule, such as its class.

    Example:
        ```python
        plan = plan_training(model, ProgressiveSchedule(2, 60), batch_size=4, seq_len=16)
        print(plan)
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}; of a config build one "
            'without weights: with torch.device("meta"): AutoModel....from_config(config)'
        )
    derived = set(map(type, model.modules())) & set(derived_classes())
    if derived or any(map(handle_of, model.modules())):
        raise ValueError("the model is patched: plan before, or call handle.unpatch() first")
    check_choice("optimizer", optimizer, OptimizerName)
    check_choice("frozen_mode", frozen_mode, FrozenMode)
    check_choice("tied", tied, TiedPolicy)
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must be positive")
    if autocast is not None and (dtype, autocast) not in _AUTOCASTS:
        raise ValueError(
            f"autocast={autocast} with dtype={dtype}: autocast is to bfloat16 or float16, of "
            "weights in float32"
        )
    if not 0 < real_tokens <= 1:
        raise ValueError(f"real_tokens={real_tokens} must be above 0 and at most 1")
    if real_tokens < 1 and not padding:
        raise ValueError(f"real_tokens={real_tokens} leaves padding out, and there is none")
    if device is None:
        here = next(model.parameters()).device
        device = ("cuda" if torch.cuda.is_available() else "cpu") if here.type == "meta" else here
    target = torch.device(device)
    timed, total_steps = _with_length(schedule, steps)
    options = Options(
        optimizer=optimizer,
        master_weights=master_weights,
        in_backward=in_backward,
        cache=PrefixCache(1) if cache is True else cache or None,
        device=target,
        autocast=autocast,
        real_tokens=real_tokens,
        ranks=ranks_of(ranks, strategy),
    )
    if strategy == "zero2" and (optimizer != "adamw" or master_weights or in_backward):
        raise ValueError(
            f"strategy='zero2' with optimizer={optimizer!r}, {master_weights=}, {in_backward=}: "
            "ZeRO takes torch.optim.AdamW, and keeps its state and weights in float32: leave them "
            "out, or plan 'fsdp2'"
        )
    copied = meta_copy(model, dtype)
    layout = find_layout(copied, blocks)
    starts = list(stage_starts(timed, total_steps))
    plans = [timed.plan(start, layout.num_blocks) for start in starts]
    if len(set(plans)) > _MOST_PLANS:
        raise ValueError(
            f"{len(set(plans))} different plans in {total_steps:,} steps, more than the "
            f"{_MOST_PLANS} that a table holds: give fewer steps="
        )
    everything = FreezePlan((True,) * layout.num_blocks, embeddings=True)
    freezer = Freezer(copied, layout, tied=tied, frozen_mode=frozen_mode)
    with without_data(model):
        if inputs is None:
            batch = example_batch(copied, batch_size, seq_len, padding=padding, device=target)
        else:
            batch = on_meta(inputs, batch_size, batch_size)
        meter = StageMeter(copied, layout, freezer, batch, options)
        full = replace(meter, options=replace(options, real_tokens=1.0)).measure(everything)
        by_plan = {everything: full} if real_tokens == 1 and not rows and only is None else {}
        meter = _with_masks(meter, rows, only, tied=tied, frozen_mode=frozen_mode)
        by_plan |= {
            plan: meter.measure(plan) for plan in dict.fromkeys(plans) if plan not in by_plan
        }
    measured = [by_plan[plan] for plan in plans]

    notes = [_attention_note(target, full, padding=padding)]
    notes += filter(None, [meter.freezer.active.explain_only()])
    if real_tokens < 1:
        notes.append(
            f"packed: blocks compute on {real_tokens:.0%} of the places, full training on all"
        )
    length_known = steps is not None or schedule.total_steps is not None
    if not length_known:
        notes.append("the run has no length yet: steps are shares of it")
    costs = None
    if calibrate:
        try:
            costs = measure_units(
                model,
                layout,
                batch,
                options,
                dtype=dtype,
                tied=tied,
                only=only,
                frozen_mode=frozen_mode,
                between=any(
                    i not in m.state.active
                    for m in measured
                    for i in range(m.state.boundary, layout.num_blocks)
                ),
            )
            notes.append(f"times: real steps of two blocks on {target}")
        except CannotCalibrate as reason:
            notes.append(f"not calibrated: {one_line(reason)}")
    stages = [
        replace(
            _with_times(m, full, costs, layout.num_blocks, real_tokens),
            first_step=start,
            steps=end - start,
        )
        for m, start, end in zip(measured, starts, [*starts[1:], total_steps], strict=True)
    ]
    peak = max(range(len(stages)), key=lambda i: stages[i].peak_bytes)
    with without_data(model):
        remedies = _remedies(meter, plans[peak], stages[peak], batch_size)
    return TrainingPlan(
        title=(
            f"{type(model).__name__}, {layout.num_blocks} blocks, {batch_size} "
            f"row{'s' * (batch_size != 1)} of {seq_len} tokens, {_short(dtype)}, "
            + ("" if autocast is None else f"autocast to {_short(autocast)}, ")
            + optimizer
            + ", master weights" * master_weights
            + ", in backward" * in_backward
        ),
        stages=tuple(stages),
        full=_with_times(full, full, costs, layout.num_blocks, 1.0),
        memory_bytes=memory_bytes,
        remedies=tuple(remedies),
        notes=tuple(notes),
        calibrated=costs is not None,
        length_known=length_known,
        ranks=options.ranks,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_masks(
    meter: StageMeter, rows: Mapping[str, Any] | None, only: str | None, **options: Any
) -> StageMeter:
    """A meter of the same model, of which parts train alone; after that of full training."""
    if not rows and only is None:
        return meter
    options |= {"rows": TrainedRows(meter.model, rows), "only": only}
    return replace(meter, freezer=Freezer(meter.model, meter.layout, **options))


@contextmanager
def without_data(model: nn.Module, what: str = "planned without data") -> Iterator[None]:
    """Raise `ValueError` where a model cannot run on what it is given instead of data."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be {what}: {one_line(error)}") from error


def _attention_note(device: torch.device, full: MeasuredStage, *, padding: bool) -> str:
    kernels = ", ".join(sorted(full.flops.attention)) or "the model's own"
    known = device.type == "cpu" or torch.cuda.is_available()
    assumed = "" if known else " (assumed: there is none here)"
    mask = "with a mask, as rows are padded" if padding else "rows without padding"
    return f"attention on {device.type}: {kernels}{assumed}, {mask}"


def _with_times(
    measured: MeasuredStage,
    full: MeasuredStage,
    costs: UnitCosts | None,
    num_blocks: int,
    real_tokens: float,
) -> StagePlan:
    def cost(stage: MeasuredStage, real_tokens: float, *, cached: bool = False) -> float:
        if costs is None:
            return stage.figures.flops - stage.flops.prefix * cached
        packed = costs.with_real_tokens(real_tokens)
        return packed.step_s(stage.state, num_blocks, cached=cached)

    whole, own, figures = cost(full, 1.0), cost(measured, real_tokens), measured.figures
    has_cache = figures.cache_bytes_per_sample is not None
    return replace(
        figures,
        step_ratio=own / whole,
        step_ms=None if costs is None else own * 1e3,
        cached_step_ratio=cost(measured, real_tokens, cached=True) / whole if has_cache else None,
    )


def _remedies(meter: StageMeter, plan: FreezePlan, stage: StagePlan, rows: int) -> list[Remedy]:
    """What each option alone makes of the peak of a stage, where it lowers it."""
    stateless = stage.peak_bytes - stage.state_bytes
    peaks = {"in_backward (without exact clipping)": meter.peak_bytes(plan, in_backward=True)}
    if meter.options.ranks.strategy != "zero2":  # which does not take MaskedAdamW
        peaks["8-bit state"] = stateless + meter.state_bytes(plan, "adamw-8bit")
        peaks["bf16 moments"] = stateless + meter.state_bytes(plan, "adamw-bf16")
    if plan.embeddings:
        with suppress(ValueError):  # there may be nothing else that trains
            peaks['embeddings="never"'] = meter.peak_bytes(replace(plan, embeddings=False))
    if rows > 1:
        half = on_meta(meter.inputs, rows, rows // 2)
        peaks[f"a micro-batch of {rows // 2}"] = meter.peak_bytes(plan, inputs=half)
    if switch_checkpointing_on(meter.model):  # last, as it stays on in the copy
        peaks["gradient checkpointing"] = meter.peak_bytes(plan)
    found = (Remedy(*item) for item in peaks.items() if item[1] < stage.peak_bytes)
    return sorted(found, key=lambda remedy: remedy.peak_bytes)


def switch_checkpointing_on(model: Any) -> bool:
    """Switch it on; False where it is on, or the model has none."""
    if not getattr(model, "supports_gradient_checkpointing", False) or any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        return False
    model.config.use_cache = False  # transformers would do it, and say so
    with warnings.catch_warnings():  # 5.23 has another name for it, 5.0 has not
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return True
