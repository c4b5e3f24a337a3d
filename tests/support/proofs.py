"""What the tests of truncation share: plain freezing as the truth, and counters of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from progtuning_kernels import FreezePlan
from progtuning_kernels.model.forward_hooks import ForwardHooks
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots


class FixedPlan:
    """A schedule of one given plan."""

    total_steps = None

    def __init__(self, plan: FreezePlan) -> None:
        self._plan = plan

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        return self._plan

    def stage(self, step: int) -> int:
        return 0

    def bind(self, total_steps: int) -> FixedPlan:
        return self


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    if loss.requires_grad:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def frozen_by_hand(
    model: nn.Module, plan: FreezePlan, inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Gradients of the unpatched model with the plan's parameters frozen the plain way."""
    layout = find_layout(model)
    on = {EMBEDDINGS: plan.embeddings, layout.head: plan.head, **dict(enumerate(plan.trainable))}
    for slot in parameter_slots(model, layout):
        if slot.parameter.requires_grad:
            slot.parameter.requires_grad_(all(on[unit] for unit in slot.units))
    return gradients(model, inputs)


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of all tensors that `call` hands to autograd's `saved_tensors_hooks`."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return total


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@contextmanager
def counted_runs(blocks: Sequence[nn.Module]) -> Iterator[Counter[int]]:
    """How often each block computes: counted at its first linear or norm, which a checkpoint
    computes again, unlike the hooks of the block itself.
    """
    runs: Counter[int] = Counter()
    hooks = []
    for i, block in enumerate(blocks):
        inner = next(m for m in block.modules() if m is not block and m._parameters)
        # a hook of the user's that comes has a cache look at a row again
        hooks.append(ForwardHooks(inner, lambda *_, i=i: runs.update([i])))
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()
