"""Measures one stage of a model on the meta device: what its plan trains, operations and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..cache import PrefixCache
from ..cache.row_codec import row_format
from ..freezing.truncation import measure_forward
from ..model.layout import EMBEDDINGS, Layout, parameter_slots
from ..optim import MaskedAdamW
from ..schedules import FreezePlan
from .meta_step import StepFlops, TargetKernels, count_flops, peak_live_bytes
from .stage_flags import StageFlags, StageState
from .training_plan import StagePlan

OptimizerName = Literal["adamw", "adamw-bf16", "adamw-8bit"]
STATE_DTYPES: dict[str, Any] = {
    "adamw": torch.float32,
    "adamw-bf16": torch.bfloat16,
    "adamw-8bit": "8bit",
}


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a step, beside the model and its inputs; see `plan_training`."""

    optimizer: OptimizerName
    master_weights: bool
    in_backward: bool
    cache: PrefixCache | None
    device: torch.device


@dataclass(frozen=True)
class MeasuredStage:
    """One plan: its units, its counts, and the figures for the user, as yet without its steps and
    relative times.
    """

    state: StageState
    head: int
    flops: StepFlops
    figures: StagePlan

    @property
    def passes_frozen_blocks(self) -> bool:
        """Whether a frozen block lies above the lowest unit that trains."""
        blocks = sum(unit >= 0 for unit in self.state.active) - (self.head in self.state.active)
        return blocks < self.head - self.state.boundary


class StageMeter:
    """Puts plans on one model, and measures a step under each.

    Args:
        model: a copy on the meta device that nobody else uses.
        flags: of that copy.
        inputs: its arguments, on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        flags: StageFlags,
        inputs: Mapping[str, Any],
        options: Options,
    ) -> None:
        self.model = model
        self.layout = layout
        self._flags = flags
        self._inputs = inputs
        self._options = options
        self._measured: dict[FreezePlan, MeasuredStage] = {}

    def measure(self, plan: FreezePlan) -> MeasuredStage:
        """Everything about a step under `plan`; measured once."""
        if plan not in self._measured:
            self._measured[plan] = self._measure(plan)
        return self._measured[plan]

    def _measure(self, plan: FreezePlan) -> MeasuredStage:
        options, state = self._options, self._flags.put(plan)
        flops = count_flops(
            self.model,
            self.layout,
            self._inputs,
            boundary=state.boundary,
            device=options.device,
        )
        weights, state_bytes = self._weight_bytes(), self._state_bytes(options.optimizer)
        live = self._live_bytes(self._inputs, in_backward=options.in_backward)
        figures = StagePlan(
            first_step=0,
            steps=0,
            boundary=state.boundary,
            trains=_in_words(self.layout, state),
            trainable_params=state.trainable_params,
            weight_bytes=weights,
            gradient_bytes=self._gradient_bytes(),
            state_bytes=state_bytes,
            activation_bytes=self._activation_bytes(state),
            peak_bytes=weights + state_bytes + live,
            forward_flops=flops.forward,
            backward_flops=flops.backward,
            step_ratio=1.0,
            cache_bytes_per_sample=self._cache_bytes(state),
        )
        return MeasuredStage(state, self.layout.head, flops, figures)

    def peak_bytes(
        self,
        plan: FreezePlan,
        *,
        inputs: Mapping[str, Any] | None = None,
        in_backward: bool | None = None,
    ) -> int:
        """Of a step under `plan` with other inputs, or with updates inside backward."""
        self._flags.put(plan)
        options = self._options
        within = options.in_backward if in_backward is None else in_backward
        live = self._live_bytes(inputs or self._inputs, in_backward=within)
        return self._weight_bytes() + self._state_bytes(options.optimizer) + live

    def state_bytes(self, plan: FreezePlan, optimizer: OptimizerName) -> int:
        """Of another optimizer's state under `plan`."""
        self._flags.put(plan)
        return self._state_bytes(optimizer)

    def _live_bytes(self, inputs: Mapping[str, Any], *, in_backward: bool) -> int:
        device = self._options.device
        return peak_live_bytes(
            self.model, self.layout, inputs, device=device, in_backward=in_backward
        )

    def _weight_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def _state_bytes(self, optimizer: OptimizerName) -> int:
        active = [p for p in self.model.parameters() if p.requires_grad]
        masked = MaskedAdamW(
            active,
            state_dtype=STATE_DTYPES[optimizer],
            master_weights=self._options.master_weights,
        )
        return sum(t.nbytes for p in active for t in masked.init_state(p).values())

    def _gradient_bytes(self) -> int:
        units = dict.fromkeys(self.layout.units, 0)
        for slot in parameter_slots(self.model, self.layout):
            if slot.parameter.requires_grad:
                units[slot.home] += slot.parameter.nbytes
        return (max if self._options.in_backward else sum)(units.values())

    def _activation_bytes(self, state: StageState) -> int:
        with TargetKernels(self._options.device):
            uses = measure_forward(
                self.model, self.layout, (), self._inputs, boundary=state.boundary
            )
        return sum(use.activation_bytes for use in uses.values())

    def _cache_bytes(self, state: StageState) -> int | None:
        """Of one row of `seq_len` tokens; a row is stored without its padding."""
        cache = self._options.cache
        if cache is None or not state.boundary:
            return None
        hidden: list[torch.Tensor] = []

        def note(_: nn.Module, args: Any, output: Any) -> None:
            hidden.append(output if isinstance(output, torch.Tensor) else output[0])

        last = self.model.get_submodule(self.layout.block_paths[state.boundary - 1])
        hook = last.register_forward_hook(note)
        try:
            with torch.no_grad(), TargetKernels(self._options.device):
                self.model(**self._inputs)
        finally:
            hook.remove()
        _, tokens, width = hidden[0].shape  # (B, T, C)
        return tokens * row_format(cache.dtype, hidden[0].dtype, width).token_bytes


def largest_batch(peak_bytes: Callable[[int], int], rows: int, limit: int) -> int:
    """About the most rows whose peak is at most `limit`; from 8 on a multiple of 8. 0: not one.

    The peak is the greatest of several straight lines in the number of rows (temporaries of the
    head, of a block, gradients), so that a chord lies above it: interpolated rows fit, and come
    near the answer from below, as bisection does from above.

    Args:
        peak_bytes: of a number of rows.
        rows: where to start.
    """
    known = {rows: peak_bytes(rows)}
    while known[rows] > limit and rows > 1:
        rows //= 2
        known[rows] = peak_bytes(rows)
    if known[rows] > limit:
        return 0
    fails = 2 * rows
    while fails < 2**20 and known.setdefault(fails, peak_bytes(fails)) <= limit:
        rows, fails = fails, 2 * fails
    while fails in known and fails - rows > max(1, rows // 16):
        share = (limit - known[rows]) / (known[fails] - known[rows])
        for guess in (rows + int(share * (fails - rows)), (rows + fails) // 2):
            if rows < guess < fails:
                known[guess] = peak_bytes(guess)
                rows, fails = (guess, fails) if known[guess] <= limit else (rows, guess)
    return rows - rows % 8 if rows >= 8 else rows


def _in_words(layout: Layout, state: StageState) -> str:
    runs: list[list[int]] = []
    for i in sorted(unit for unit in state.active if 0 <= unit < layout.head):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    parts = ["embeddings"] * (EMBEDDINGS in state.active)
    if runs:
        parts.append("blocks " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs))
    return ", ".join([*parts, *["head"] * (layout.head in state.active)])
