"""`plan_training`: composes what every stage of a schedule costs from steps on the meta device."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

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
from ..optim.in_backward import ClipMode
from ..schedules import (
    FreezePlan,
    Schedule,
    check_schedule,
    decides_in_training,
    stage_starts,
)
from ..schedules.plan import check_choice
from ..schedules.progressive import scales_with_length
from .calibration import CannotCalibrate, UnitCosts, measure_units, measure_update
from .example_batch import example_batch, on_meta
from .host_plan import HostRates
from .meta_step import meta_copy
from .ranks import Strategy, ranks_of
from .stage_meter import MeasuredStage, OptimizerName, Options, StageMeter
from .training_plan import Remedy, StagePlan, TrainingPlan

# A distinct plan of a model of 32 blocks takes 2 s, and a longer table says no more.
_MOST_PLANS = 64
# Length of a run that no one has named: every number of stages up to 12 divides it.
_ANY_LENGTH = math.lcm(*range(1, 13))

_IN_BACKWARD = "in_backward (without exact clipping)"
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
    master_weights: bool | Literal["8bit"] = False,
    in_backward: bool = False,
    clip_mode: ClipMode | None = None,
    state_device: Literal["cpu"] | None = None,
    pcie_gbps: float = 25.0,
    host_gbps: float = 40.0,
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
        master_weights: as for `MaskedAdamW`.
        in_backward: it updates inside backward, so that one block's gradients are alive at a time.
        clip_mode: how gradients are clipped there. "exact" keeps all of them until backward ends,
            on the device, or with `state_device` on the host; None: as the others, or not at all.
        state_device: "cpu": the state is in host memory, and the update runs there. Nothing changes
            where `device` is a CPU.
        pcie_gbps: with `state_device`: 10⁹ bytes a second that go to the host, and as many back at
            the same time. 25 is what 16 lanes of PCIe 4.0 reach.
        host_gbps: with `state_device`: 10⁹ bytes a second that the update reads and writes in host
            memory, unless `calibrate` times it. 40 is what two channels of memory reach.
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
            seconds (four rounds at least), and compose stages from that. With `state_device`, time
            an update on this machine's CPU, too.
        ranks: processes that train together, each on micro-batches of its own. Bytes are then those
            of one rank.
        strategy: "ddp", which None means; "fsdp2": `fully_shard` on every block, and on the model;
            "zero2": DeepSpeed's ZeRO-2, with its bucket of 500 million elements.

    Raises:
        UnsupportedModelError: the model cannot be cut into units.
        ValueError: a setting out of range; autocast of weights that are not in float32; a strategy
            for one rank, or "zero2" with what only `MaskedAdamW` has; `state_device` with several
            ranks; `clip_mode` without `in_backward`; a schedule that does not fit, has no length,
            has more than 64 different plans, or decides while it trains; an `only` that matches
            nothing that trains, or leaves nothing to a plan; a model that is patched, or that asks
            for values of its data and so cannot run on the meta device.
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
    _check_placement(state_device, in_backward, clip_mode, ranks, pcie_gbps, host_gbps)
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must be positive")
    if autocast is not None and (dtype, autocast) not in _AUTOCASTS:
        raise ValueError(
            f"autocast={autocast} with dtype={dtype}: autocast is to bfloat16 or float16, of "
            "weights in float32"
        )
    _check_real_tokens(real_tokens, padding=padding)
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
        clip_mode=clip_mode,
    )
    if state_device is not None and target.type != "cpu":
        if calibrate:
            host_gbps = measure_update(options, dtype) / 1e9
        options = replace(options, host=HostRates(pcie_gbps * 1e9, host_gbps * 1e9))
    if strategy == "zero2":
        _check_zero2(optimizer, master_weights, in_backward)
    copied = meta_copy(model, dtype)
    layout = find_layout(copied, blocks)
    starts = list(stage_starts(timed, total_steps))
    plans = _plans_at(starts, timed, layout.num_blocks, total_steps)
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
    notes += _notes_of_host(state_device, options.host, calibrate=calibrate)
    notes += [
        f"{part.name}: {len(part.ids):,} of {len(part.weight):,} rows train, and no others"
        for part in meter.freezer.rows.of_tensors
    ]
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
        remedies = _remedies(meter, plans[peak], stages[peak], batch_size, memory_bytes)
    return TrainingPlan(
        title=(
            f"{type(model).__name__}, {layout.num_blocks} blocks, {batch_size} "
            f"row{'s' * (batch_size != 1)} of {seq_len} tokens, {_short(dtype)}, "
            + ("" if autocast is None else f"autocast to {_short(autocast)}, ")
            + optimizer
            + " on the host" * (options.host is not None)
            + (
                ", 24-bit weights"
                if master_weights == "8bit"
                else ", master weights" * bool(master_weights)
            )
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


def _check_real_tokens(share: float, *, padding: bool) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"real_tokens={share} must be above 0 and at most 1")
    if share < 1 and not padding:
        raise ValueError(f"real_tokens={share} leaves padding out, and there is none")


def _check_zero2(optimizer: str, master_weights: object, in_backward: bool) -> None:
    if optimizer != "adamw" or master_weights or in_backward:
        raise ValueError(
            f"strategy='zero2' with {optimizer=}, {master_weights=}, {in_backward=}: ZeRO takes "
            "torch.optim.AdamW, and keeps its state and weights in float32: leave them out, or "
            "plan 'fsdp2'"
        )


def _plans_at(
    starts: Sequence[int], schedule: Schedule, num_blocks: int, total_steps: int
) -> list[FreezePlan]:
    plans = [schedule.plan(start, num_blocks) for start in starts]
    if len(set(plans)) > _MOST_PLANS:
        raise ValueError(
            f"{len(set(plans))} different plans in {total_steps:,} steps, more than the "
            f"{_MOST_PLANS} that a table holds: give fewer steps="
        )
    return plans


def _check_placement(
    state_device: str | None,
    in_backward: bool,
    clip_mode: ClipMode | None,
    ranks: int,
    pcie_gbps: float,
    host_gbps: float,
) -> None:
    """Raise `ValueError` for settings of where state lies that exclude each other."""
    if clip_mode is not None:
        check_choice("clip_mode", clip_mode, ClipMode)
        if not in_backward:
            raise ValueError(f"{clip_mode=} is for in_backward=True")
    if state_device not in (None, "cpu"):
        raise ValueError(f"state_device must be None or 'cpu', got {state_device!r}")
    if state_device is not None and ranks != 1:
        raise ValueError(f"{state_device=} is planned for one rank: leave {ranks=} out")
    if not (pcie_gbps > 0 and host_gbps > 0):
        raise ValueError(f"{pcie_gbps=} and {host_gbps=} must be positive")


def _notes_of_host(device: str | None, rates: HostRates | None, *, calibrate: bool) -> list[str]:
    if rates is None:
        nothing = f"state_device={device!r} changes nothing where the device is a CPU"
        return [nothing] if device is not None else []
    timed = " (an update, timed here)" if calibrate else ""
    pcie, memory = (f"{rate / 1e9:.3g} GB/s" for rate in (rates.pcie, rates.memory))
    return [f"PCIe at {pcie} each way, host memory at {memory}{timed}"]


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


def _remedies(
    meter: StageMeter, plan: FreezePlan, stage: StagePlan, rows: int, memory_bytes: int | None
) -> list[Remedy]:
    """What each option alone makes of the peak of a stage, where it lowers it; and several
    together, where none alone suffices.
    """
    options, stateless = meter.options, stage.peak_bytes - stage.state_bytes
    peaks, states = {}, _other_states(meter, plan)
    if options.gradient_blocks is None:
        within = replace(options, in_backward=True, clip_mode=None)
        peaks[_IN_BACKWARD] = replace(meter, options=within).peak_bytes(plan)
    for name, (size, rates) in states.items():
        peaks[name] = stateless + size
        if rates is not None and options.in_backward:  # more gradients are on their way
            peaks[name] = replace(meter, options=replace(options, host=rates)).peak_bytes(plan)
    if plan.embeddings:
        with suppress(ValueError):  # there may be nothing else that trains
            peaks['embeddings="never"'] = meter.peak_bytes(replace(plan, embeddings=False))
    if rows > 1:
        half = on_meta(meter.inputs, rows, rows // 2)
        peaks[f"a micro-batch of {rows // 2}"] = meter.peak_bytes(plan, inputs=half)
    checkpoints = switch_checkpointing_on(meter.model)  # last, as it stays on in the copy
    if checkpoints:
        peaks["gradient checkpointing"] = meter.peak_bytes(plan)
    found = [Remedy(*item) for item in peaks.items() if item[1] < stage.peak_bytes]
    if memory_bytes is not None and all(r.peak_bytes > memory_bytes for r in found):
        if stage.peak_bytes > memory_bytes and options.ranks.strategy is None:
            names = ["gradient checkpointing"] * checkpoints
            found += _together(meter, plan, rows, memory_bytes, names, states)
    return sorted(found, key=lambda remedy: remedy.peak_bytes)


_States = dict[str, tuple[int, HostRates | None]]


def _other_states(meter: StageMeter, plan: FreezePlan) -> _States:
    """Forms of the state that take less of the device, with their bytes there."""
    options, found = meter.options, {}
    if options.host is None and options.ranks.strategy != "zero2":  # it takes no MaskedAdamW
        found["bf16 moments"] = meter.state_bytes(plan, "adamw-bf16"), None
        found["8-bit state"] = meter.state_bytes(plan, "adamw-8bit"), None
        if options.device.type != "cpu" and options.ranks.strategy is None:
            found['state_device="cpu"'] = 0, HostRates(1.0, 1.0)
    return found


def _together(
    meter: StageMeter,
    plan: FreezePlan,
    rows: int,
    memory_bytes: int,
    names: list[str],
    states: _States,
) -> list[Remedy]:
    """The first options that suffice beside those of `names`, which are in force; if none do, all
    of them.
    """
    options, size = meter.options, meter.device_state_bytes(plan, meter.options.optimizer)
    forms = {"": (size, options.host)} | {
        name: form for name, form in states.items() if form[0] < size
    }
    for smaller in (False, True)[: 1 + (rows > 1)]:
        inputs = on_meta(meter.inputs, rows, 1) if smaller else meter.inputs
        for form, (state_bytes, rates) in forms.items():
            for within in sorted({options.gradient_blocks is not None, True}):
                clip = None if within else options.clip_mode
                changed = replace(options, in_backward=within, clip_mode=clip, host=rates)
                tried = replace(meter, options=changed)
                peak = tried.peak_bytes(plan, inputs=inputs) + state_bytes
                peak -= tried.device_state_bytes(plan, options.optimizer)
                more = [form] * bool(form) + ["a micro-batch of 1"] * smaller
                more += [_IN_BACKWARD] * (within and options.gradient_blocks is None)
                found = Remedy(", ".join([*names, *more]), peak)
                if peak <= memory_bytes:
                    return [found]
    return [found]


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
