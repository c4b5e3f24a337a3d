"""Gradient norms per block, for schedules that decide by them, taken by hooks inside backward.

README.md says why, and how ranks come to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..model.layout import Layout
from ..schedules import ObservingSchedule
from ..sharding import local_of


class _Block:
    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.ready: set[int] = set()  # ids of those whose gradient has come in this backward
        self.square: Tensor | None = None  # of the norm in the last backward; 0-dim float32


class GradientNorms:
    def __init__(self, model: nn.Module, layout: Layout, schedule: ObservingSchedule) -> None:
        self._model = model
        self._layout = layout
        self.schedule = schedule
        self._step = 0
        self._ended = False
        self._blocks: dict[int, _Block] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._awaits_end = False  # of the backward that is running
        self.reduced_at_end = False  # gradients are whole at the end of backward only, as under DDP
        self.sharded = False  # every rank holds a shard of each gradient
        # (L + 1,): sums of squares over the steps of an interval, and how many steps; None until a
        # gradient has come in it
        self._sums: Tensor | None = None

    def install_norm_hooks(self) -> None:
        """Hook the parameters that are active now, before optimizers hear of a change of plan: a
        hook here then runs before one that frees the gradient.
        """
        self.remove_norm_hooks()
        self._blocks = {}
        for i, path in enumerate(self._layout.block_paths):
            active = [p for p in self._model.get_submodule(path).parameters() if p.requires_grad]
            if active:
                self._blocks[i] = block = _Block(active)
                hook = self._hook(i, block)
                self._handles += [p.register_post_accumulate_grad_hook(hook) for p in active]

    def remove_norm_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._awaits_end = False

    def begin_step(self, step: int) -> None:
        """Take the next backward passes for those of `step`; drop what was measured of another."""
        if step not in (self._step, self._step + 1):
            self._sums = None
        self._step, self._ended = step, False
        self._awaits_end = False  # of one that broke off
        for block in self._blocks.values():
            block.square = None
            block.ready.clear()

    def end_step(self) -> None:
        """Count the norms of the step just made, and have the schedule decide if it is time to.

        Calling it again does nothing. A step with a NaN or an infinity is left out, and a decision
        without any other step. Raises `RuntimeError` for one that no backward came before.
        """
        if self._ended or not self.schedule.observes(self._step):
            return
        self._ended = True
        squares = {i: b.square for i, b in self._blocks.items() if b.square is not None}
        if squares:
            self._add(squares)
        if self.schedule.decides(self._step):
            if self._sums is None:
                raise RuntimeError(
                    f"{self.schedule!r}: no gradient of any block was seen in the steps up to "
                    f"{self._step}; it needs a backward through the patched model in each"
                )
            norms = self._norms()
            self._sums = None
            if norms is not None:
                self.schedule.observe(self._step, norms, self._layout.num_blocks)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the interval under way; reading them waits for the device."""
        return {"sums": None if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums = state["sums"]
        self._sums = None if sums is None else torch.tensor(sums, dtype=torch.float32, device="cpu")

    def _hook(self, index: int, block: _Block):
        def gradient_is_there(p: Tensor) -> None:
            if not self.schedule.observes(self._step):
                return
            if p.grad is None:
                raise RuntimeError(
                    f"{self.schedule!r}: an optimizer has freed a gradient of block {index} "
                    "before its norm was taken: build it after patch_model"
                )
            if not self._awaits_end:
                self._awaits_end = True
                Variable._execution_engine.queue_callback(self._end_of_backward)
            block.ready.add(id(p))
            if len(block.ready) == len(block.parameters) and not self.reduced_at_end:
                self._measure(block)

        return gradient_is_there

    def _end_of_backward(self) -> None:
        self._awaits_end = False
        if self.reduced_at_end:
            # the last bucket is waited for in a callback of its own, queued after this one
            Variable._execution_engine.queue_callback(self._measure_rest)
        else:
            self._measure_rest()

    def _measure_rest(self) -> None:
        for block in self._blocks.values():
            if block.ready:  # not measured yet: some of its parameters may have no gradient
                self._measure(block)

    @torch.no_grad()
    def _measure(self, block: _Block) -> None:
        if any(p.grad is None for p in block.parameters if id(p) in block.ready):
            raise RuntimeError(
                f"{self.schedule!r}: an optimizer has freed gradients of a block before its norm "
                "was taken: give it handle.param_groups(), whose names tell it the blocks"
            )
        block.ready.clear()
        grads = [local_of(p.grad) for p in block.parameters if p.grad is not None]
        if grads:
            norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
            block.square = torch.stack(norms).square().sum()

    @torch.no_grad()
    def _add(self, squares: dict[int, Tensor]) -> None:
        device = next(iter(squares.values())).device
        row = torch.zeros(self._layout.num_blocks + 1, dtype=torch.float32, device=device)
        row[-1] = 1
        for i, square in squares.items():
            row[i] = square.to(device, non_blocking=True)
        row = torch.where(row.isfinite().all(), row, torch.zeros_like(row))
        self._sums = row if self._sums is None else self._sums.to(device) + row

    def _norms(self) -> Sequence[float] | None:
        """Root mean square over steps; None where every step had a non-finite norm."""
        sums, ranks = self._sums, 1
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
            distributed.broadcast(sums, src=0)
            ranks = distributed.get_world_size()
        *squares, steps = sums.tolist()
        if self.sharded:
            steps /= ranks  # each of them has counted every step, but only its part of the squares
        return [(square / steps) ** 0.5 for square in squares] if steps else None
