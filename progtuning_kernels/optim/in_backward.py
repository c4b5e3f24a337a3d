"""Updates inside backward: one call per block as soon as its last gradient is there.

What it saves depends on what has to be known before the first update:

- no clipping, nonfinite="ignore": one call per block; one block's gradients are alive.
- no clipping, nonfinite="skip": norm and update per block; a bad block is skipped, not the whole
  step; one block's gradients.
- clip_mode="exact" (default): updates at the end, as without in_backward; only the norms are taken
  per block, of gradients that are still in cache; all gradients are alive.
- clip_mode="previous_norm": per block, clipped by the norm of the step before; one block's.
- clip_mode="per_block": per block, clipped by its own norm; one block's.

The last two are approximations and change what is trained; both skip per block. Accumulation keeps
all gradients until the last micro-batch, whose backward then updates.

A block is what the parameters' names say ("encoder.layer.3.attention..." is of "encoder.layer.3");
`handle.param_groups()` and `model.named_parameters()` bring names; without names every parameter is
updated on its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.autograd import Variable

from ..ops.masked_norm import masked_norm
from ..sharding import local_of

if TYPE_CHECKING:
    from .masked_optimizer import ActiveBucket, MaskedOptimizer, Member

ClipMode = Literal["exact", "previous_norm", "per_block"]

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def block_of(member: Member) -> str:
    """The block a parameter is updated with: its name up to the first number, or its parent."""
    if member.name is None:
        return f"parameter {member.index}"
    numbered = _NUMBERED.match(member.name)
    return numbered.group() if numbered else member.name.rpartition(".")[0]


class _Block:
    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.ready: set[int] = set()  # indices of those whose gradient has come in this backward
        self.started: list[Member] = []  # those in the buckets: others never had a gradient
        self.buckets: list[ActiveBucket] = []
        self.known: dict[int, tuple[Tensor, int]] = {}  # index: gradient, its version, in the norm
        self.norm: Tensor | None = None


class UpdateInBackward:
    """The hooks of one optimizer; set anew whenever another set of parameters is active."""

    def __init__(self, optimizer: MaskedOptimizer) -> None:
        self._optimizer = optimizer
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._blocks: list[_Block] = []
        self._places: dict[Tensor, tuple[_Block, Member]] = {}
        self._graph_task: int | None = None  # of the backward whose end is awaited
        self._norms: list[Tensor] = []  # of the blocks updated in this step
        self._skipped: list[Tensor] = []
        self._done: set[int] = set()  # indices of the parameters updated in this step
        self.previous_norm: Tensor | None = None  # of the last good step; saved with the optimizer

    @property
    def keeps_gradients(self) -> bool:
        """Whether the update waits for the end, because clipping needs every gradient first."""
        return self._optimizer.max_grad_norm is not None and self._optimizer.clip_mode == "exact"

    def install(self) -> None:
        """Hooks on the active parameters, none on others."""
        for handle in self._handles:
            handle.remove()
        self._arrange()
        self._handles = [
            p.register_post_accumulate_grad_hook(self._gradient_is_there) for p in self._places
        ]

    def _arrange(self) -> None:
        blocks: dict[str, list[Member]] = {}
        for member in self._optimizer.members():
            if member.parameter.requires_grad:
                blocks.setdefault(block_of(member), []).append(member)
        self._blocks = [_Block(members) for members in blocks.values()]
        self._places = {m.parameter: (block, m) for block in self._blocks for m in block.members}

    def _gradient_is_there(self, p: Tensor) -> None:
        optimizer = self._optimizer
        if optimizer.accumulating():
            return
        if self._graph_task is None:  # the first of a backward: step() would look too late
            optimizer.check_groups()
            if optimizer.regrouped():
                self._arrange()  # hooks cannot change while they run; step() does it
        if p not in self._places:
            return
        block, member = self._places[p]
        self._check(p, member)
        block.ready.add(member.index)
        if len(block.ready) == len(block.members):
            self._complete(block)

    def _check(self, p: Tensor, member: Member) -> None:
        name = member.name or f"parameter {member.index}"
        distributed = torch.distributed
        if (
            local_of(p) is p
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        ):
            raise RuntimeError(
                f"in_backward=True: the gradient of {name} is this rank's own; "
                "DistributedDataParallel reduces it after the hooks have run. Use "
                "in_backward=False, or FSDP2 (fully_shard)"
            )
        if local_of(p) is not p and not self.keeps_gradients and self._needs_norm():
            raise RuntimeError(
                "in_backward=True with sharded parameters: the norm of a block would need a "
                "reduction inside backward. Use nonfinite='ignore' without clipping, or "
                "clip_mode='exact'"
            )
        task = torch._C._current_graph_task_id()
        if self._graph_task is None:
            self._graph_task = task
            Variable._execution_engine.queue_callback(self._end_of_backward)
        elif self._graph_task != task:
            self._graph_task = None
            raise RuntimeError(
                "in_backward=True: one backward runs inside another (re-entrant checkpointing): a "
                "gradient could grow after its update. Use use_reentrant=False"
            )
        if member.index in self._done:
            raise RuntimeError(
                f"in_backward=True: {name} has been updated already in this step. Call step() "
                "after every backward, and wrap all but the last micro-batch in "
                "optimizer.accumulate()"
            )

    def _needs_norm(self) -> bool:
        return self._optimizer.max_grad_norm is not None or self._optimizer.nonfinite == "skip"

    def _end_of_backward(self) -> None:
        self._graph_task = None
        for block in self._blocks:
            if block.ready:  # some of its parameters had no gradient in this backward
                self._complete(block)

    @torch.no_grad()
    def _complete(self, block: _Block) -> None:
        block.ready.clear()
        members = [m for m in block.members if m.parameter.grad is not None]
        if self.keeps_gradients:
            grads = [member.parameter.grad for member in members]
            if all(local_of(grad) is grad and not grad.is_sparse for grad in grads):
                block.norm = masked_norm(grads)
                block.known = {
                    m.index: (m.parameter.grad, m.parameter.grad._version) for m in members
                }
            return
        optimizer = self._optimizer
        started = [
            m
            for m in block.members
            if m.parameter.grad is not None or optimizer.state.get(m.parameter)
        ]
        if started != block.started or not all(
            b.is_current(optimizer.state) for b in block.buckets
        ):
            block.started, block.buckets = started, optimizer.build_buckets(started)
        gradients = [bucket.gather() for bucket in block.buckets]
        previous = self.previous_norm if optimizer.clip_mode == "previous_norm" else None
        decision = optimizer.decide(block.buckets, gradients, previous_norm=previous)
        optimizer.apply(block.buckets, gradients, decision)
        for member in members:
            if not optimizer.zero_grads:
                member.parameter.grad = None
            self._done.add(member.index)
        if decision.norm is not None:
            self._norms.append(decision.norm)
        if decision.found_inf is not None:
            self._skipped.append(decision.found_inf)

    def known_norm(self, active: Sequence[ActiveBucket]) -> Tensor | None:
        """The norm of all gradients, where every one of them is in a block's norm as it is now."""
        if not self.keeps_gradients:
            return None
        known: dict[int, tuple[Tensor, int]] = {}
        for block in self._blocks:
            known |= block.known
            block.known = {}
        for bucket in active:
            for member in bucket.members:
                grad = member.parameter.grad
                if grad is None:
                    continue
                seen, version = known.get(member.index, (None, -1))
                if seen is not grad or version != grad._version:
                    return None
        norms = [block.norm for block in self._blocks if block.norm is not None]
        for block in self._blocks:
            block.norm = None
        device = norms[0].device
        return masked_norm([norm.to(device) for norm in norms])

    def forget_backward(self) -> None:
        """Drop what a backward that broke off has left."""
        self._graph_task = None
        for block in self._blocks:
            block.ready.clear()

    @torch.no_grad()
    def end_of_step(self) -> None:
        """The step's norm and whether anything was skipped, from its blocks."""
        optimizer = self._optimizer
        if self._norms:
            device = self._norms[0].device
            optimizer._norm = norm = masked_norm([norm.to(device) for norm in self._norms])
            # a bad step says nothing about the next one's norm
            before = norm if self.previous_norm is None else self.previous_norm
            self.previous_norm = torch.where(norm.isfinite(), norm, before)
        if self._skipped:
            device = self._skipped[0].device
            bad = torch.stack([found.to(device) for found in self._skipped]).amax()
            optimizer._skipped = optimizer._skipped + bad
        self._norms, self._skipped, self._done = [], [], set()
        self.forget_backward()
