"""Measures one stage of a model on the meta device: what its plan trains, operations and bytes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cache import PrefixCache
from ..freezing.freezer import Freezer, StageState
from ..freezing.unit_use import measure_forward
from ..model.layout import EMBEDDINGS, Layout
from ..optim import MaskedAdamW
from ..optim.in_backward import ClipMode
from ..optim.masked_adamw import SMALLEST_8BIT, STATE_DTYPES
from ..optim.moments import MOMENT_KEYS, new_moments
from ..schedules import FreezePlan
from .example_batch import on_meta
from .host_plan import HostPlan, HostRates, plan_host
from .meta_step import StepFlops, TargetKernels, count_flops, live_at_peak, update_blocks
from .ranks import Ranks
from .training_plan import Part, StagePlan

_MOST_PARTS = 8  # of a peak, as far as a table shows them
OptimizerName = Literal["adamw", "adamw-bf16", "adamw-8bit"]


def state_dtype_of(optimizer: OptimizerName) -> Any:
    """`MaskedAdamW`'s `state_dtype`: float32, or what the name ends with."""
    return STATE_DTYPES[optimizer.removeprefix("adamw-") if "-" in optimizer else "fp32"]


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a step, beside the model and its inputs; see `plan_training`."""

    optimizer: OptimizerName
    master_weights: Any  # as `MaskedAdamW` takes it
    in_backward: bool
    cache: PrefixCache | None
    device: torch.device
    autocast: torch.dtype | None = None
    real_tokens: float = 1.0
    ranks: Ranks = field(default_factory=Ranks)
    clip_mode: ClipMode | None = None
    host: HostRates | None = None  # None: state lies beside the weights

    @property
    def gradient_blocks(self) -> int | None:
        """The blocks whose gradients are alive at a time; None: all, until `step()`."""
        if self.ranks.cuts_gradients:  # unit by unit
            return 1
        if not self.in_backward or self.ranks.strategy == "ddp":
            return None
        if self.host is not None:
            return 3  # that of the block at hand, and two on their way
        return None if self.clip_mode == "exact" else 1


@dataclass(frozen=True)
class MeasuredStage:
    """What a stage under one plan costs; the steps and times in its figures are set later."""

    state: StageState
    flops: StepFlops
    figures: StagePlan


def freeze_quietly(freezer: Freezer, plan: FreezePlan) -> StageState:
    """Put `plan` in force on a copy of the model, without the warnings that training gives."""
    freezer.active.check_plan(plan)
    state = freezer.freeze(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        freezer.truncate_checkpointing()
    return state


@dataclass(frozen=True)
class StageMeter:
    """Puts plans on a model, a copy on the meta device of its own, and measures a step of each."""

    model: nn.Module
    layout: Layout
    freezer: Freezer
    inputs: Mapping[str, Any]
    options: Options

    def measure(self, plan: FreezePlan) -> MeasuredStage:
        state, device = freeze_quietly(self.freezer, plan), self.options.device
        where = (self.model, self.layout)
        flops = count_flops(
            *where,
            self.inputs,
            boundary=state.boundary,
            device=device,
            autocast=self.options.autocast,
            real_tokens=self.options.real_tokens,
        )
        activation_bytes, padding_bytes = self._activation_bytes(self.inputs)
        peak_bytes, parts = self._peak(plan, self.inputs)
        blocks = range(self.layout.num_blocks)
        trained = FreezePlan(
            tuple(i in state.active for i in blocks),
            embeddings=EMBEDDINGS in state.active,
            head=self.layout.head in state.active,
        )
        figures = StagePlan(
            first_step=0,
            steps=0,
            boundary=state.boundary,
            trains=trained.units_in_words(),
            trainable_params=state.trainable_params,
            activation_bytes=activation_bytes - padding_bytes,
            peak_bytes=peak_bytes,
            peak_parts=parts,
            forward_flops=flops.forward,
            backward_flops=flops.backward,
            step_ratio=1.0,
            cache_bytes_per_sample=self._cache_bytes(flops),
            **self.bytes_without_a_step(plan),
        )
        return MeasuredStage(state, flops, figures)

    def bytes_without_a_step(self, plan: FreezePlan) -> dict[str, Any]:
        """The fields of `StagePlan` that shapes and flags alone decide."""
        boundary, where = freeze_quietly(self.freezer, plan).boundary, (self.model, self.layout)
        return {
            "weight_bytes": self.options.ranks.weight_bytes(self.model),
            "gradient_bytes": self._gradient_bytes(),
            "state_bytes": self.device_state_bytes(plan, self.options.optimizer),
            "host": self._host_plan(),
            "buffer_bytes": self.options.ranks.buffer_bytes(*where),
            "traffic": self.options.ranks.traffic(*where, boundary),
        }

    def peak_bytes(self, plan: FreezePlan, *, inputs: Mapping[str, Any] | None = None) -> int:
        """Of a step under `plan`, if need be with other inputs."""
        return self._peak(plan, inputs or self.inputs)[0]

    def _peak(self, plan: FreezePlan, inputs: Mapping[str, Any]) -> tuple[int, tuple[Part, ...]]:
        """Bytes on the device, and their parts."""
        ranks = self.options.ranks
        parts = {"state": self.device_state_bytes(plan, self.options.optimizer)}
        kinds = live_at_peak(
            self.model,
            inputs,
            device=self.options.device,
            autocast=self.options.autocast,
            gradient_blocks=self.options.gradient_blocks,
        )
        parts["weights"] = ranks.weight_bytes(self.model)
        parts["buffers of communication"] = ranks.buffer_bytes(self.model, self.layout)
        if ranks.cuts_gradients:
            parts["gradients of a rank"] = self._gradient_bytes()
        if self.options.real_tokens < 1:
            # where gradients make the peak, padding is gone by then
            live = sum(count * size for (_, size), count in kinds.items())
            kept, padding = self._activation_bytes(inputs)
            gradients = self._whole_gradient_bytes()
            return sum(parts.values()) + max(live - padding, kept - padding, gradients), ()
        for kind in {kind for kind, _ in kinds}:
            same = {size: count for (other, size), count in kinds.items() if other == kind}
            times = f"{number} x " if (number := sum(same.values())) > 1 else ""
            parts[times + kind] = sum(size * count for size, count in same.items())
        found = sorted((Part(*p) for p in parts.items() if p[1]), key=lambda p: (-p.nbytes, p.what))
        peak_bytes = sum(part.nbytes for part in found)
        shown = [part for part in found[:_MOST_PARTS] if part.nbytes > peak_bytes / 1000]
        small = peak_bytes - sum(part.nbytes for part in shown)
        return peak_bytes, (*shown, *([Part("smaller ones", small)] if small else []))

    def _activation_bytes(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """What a forward keeps on padded rows, and how much of it is padding in blocks."""
        kept, in_blocks = self._kept_bytes(inputs)
        padding = 1 - self.options.real_tokens
        if padding and self.options.autocast is not None:
            # copies of weights are as large for any number of rows
            rows = len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)))
            in_blocks = self._kept_bytes(on_meta(inputs, rows, 2 * rows))[1] - in_blocks
        return kept, round(padding * in_blocks)

    def _kept_bytes(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """What a forward keeps for backward, in all and in blocks."""
        kernels = TargetKernels(self.options.device, self.options.autocast)
        with kernels, kernels.forward():
            uses = measure_forward(self.model, self.layout, (), inputs)
        kept = {unit: use.activation_bytes for unit, use in uses.items()}
        return sum(kept.values()), sum(kept.get(i, 0) for i in range(self.layout.num_blocks))

    def _gradient_bytes(self) -> int:
        if self.options.ranks.cuts_gradients:
            return sum(t.nbytes for t in self.options.ranks.updated(self.model))
        return self._whole_gradient_bytes()

    def _whole_gradient_bytes(self) -> int:
        """Of the blocks whose gradients are alive at a time, as backward goes through them."""
        places = {p: i for i, p in enumerate(self.model.parameters())}
        blocks = sorted(update_blocks(self.model), key=lambda block: places[block[0]])
        sizes = [sum(p.nbytes for p in block) for block in blocks]
        alive = self.options.gradient_blocks or len(sizes)
        return max(sum(sizes[i : i + alive]) for i in range(len(sizes)))

    def state_bytes(self, plan: FreezePlan, optimizer: OptimizerName) -> int:
        """Of the optimizer's state, wherever it lies."""
        freeze_quietly(self.freezer, plan)
        masters = 0
        if self.options.ranks.kept_beside_state:
            masters = sum(t.nbytes for t in self.options.ranks.updated(self.model))
        states = self._states(optimizer).values()
        return masters + sum(t.nbytes for state in states for t in state.values())

    def device_state_bytes(self, plan: FreezePlan, optimizer: OptimizerName) -> int:
        """The part of `state_bytes` that lies beside the weights."""
        nbytes = self.state_bytes(plan, optimizer)
        return nbytes if self.options.host is None else 0

    def _states(self, optimizer: OptimizerName) -> dict[Tensor, dict[str, Tensor]]:
        """What the optimizer keeps for every tensor that it updates, under the flags there are."""
        updated = self.options.ranks.updated(self.model)
        masked = MaskedAdamW(
            updated,
            state_dtype=state_dtype_of(optimizer),
            master_weights=self.options.master_weights,
        )
        whole = updated
        if self.options.ranks.strategy == "fsdp2":
            whole = [p for p in self.model.parameters() if p.requires_grad]
        states = {}
        for part, p in zip(updated, whole, strict=True):
            state = masked.init_state(part)
            # whether moments have 8 bits is decided by the tensor, not by its shard
            if masked.state_dtype == "8bit" and part.numel() < SMALLEST_8BIT <= p.numel():
                state = {k: t for k, t in state.items() if k not in MOMENT_KEYS}
                state |= new_moments(part, "8bit")
            states[part] = state
        return states

    def _host_plan(self) -> HostPlan | None:
        options = self.options
        if options.host is None:
            return None
        return plan_host(
            update_blocks(self.model),
            self._states(options.optimizer),
            options.host,
            in_backward=options.in_backward,
            exact=options.clip_mode == "exact",
        )

    def _cache_bytes(self, flops: StepFlops) -> int | None:
        """Of one row, the real ones of `seq_len` tokens; it is stored without its padding."""
        cache, hidden = self.options.cache, flops.prefix_output
        if cache is None or hidden is None:
            return None
        _, tokens, width = hidden.shape  # (B, T, C)
        return cache.row_bytes(round(self.options.real_tokens * tokens), width, hidden.dtype)
