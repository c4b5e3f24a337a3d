"""Measures what units cost on a device: real steps of a copy with two blocks and random weights.

Hooks on the blocks cut a step's time into the parts of which the step of any stage is composed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..freezing.active_set import TiedPolicy
from ..freezing.boundary import FrozenMode
from ..freezing.freezer import Freezer, StageState
from ..model.layout import EMBEDDINGS, Layout, find_layout, parameter_slots
from ..optim import MaskedAdamW
from ..schedules import FreezePlan
from ..swaps import Kernels
from .example_batch import on_device
from .host_plan import update_bytes_of
from .meta_step import loss_of, meta_copy
from .stage_meter import Options, freeze_quietly, state_dtype_of

_UPDATED = 2**24  # elements, more than caches hold
_SECONDS, _MIN_ROUNDS = 2.0, 6  # after a round that warms up; it takes longer where it must


class CannotCalibrate(Exception):
    """The message says why."""


@dataclass(frozen=True)
class UnitCosts:
    """Seconds that each part of the model takes for one micro-batch."""

    embeddings: float  # forward and backward
    embeddings_frozen: float  # forward under no_grad
    block: float  # forward and backward, with the gradient of its input
    block_lowest: float  # without that gradient, which nothing below needs
    block_frozen: float  # forward under no_grad
    block_between: float  # frozen, the gradient passes to what trains below; 0: not measured
    head: float  # forward, loss and backward
    update: float  # of the optimizer, per parameter
    head_alone: float = 0.0  # a weight tied to frozen embeddings is frozen; 0: no weight is tied

    def with_real_tokens(self, share: float) -> UnitCosts:
        """Where blocks compute on this share of the places."""
        names = ("block", "block_lowest", "block_frozen", "block_between")
        return replace(self, **{name: share * getattr(self, name) for name in names})

    def step_s(self, state: StageState, num_blocks: int, *, cached: bool = False) -> float:
        """Seconds of one step in a stage; `cached`: without the prefix."""
        is_alone = bool(self.head_alone) and EMBEDDINGS not in state.active
        seconds = self.head_alone if is_alone else self.head
        seconds += self.update * state.trainable_params
        if EMBEDDINGS in state.active:
            seconds += self.embeddings
        elif not (cached and state.boundary):
            seconds += self.embeddings_frozen
        for i in range(num_blocks):
            if i < state.boundary:
                seconds += 0 if cached else self.block_frozen
            elif i not in state.active:
                seconds += self.block_between
            elif i == state.boundary and EMBEDDINGS not in state.active:
                seconds += self.block_lowest
            else:
                seconds += self.block
        return seconds


def _two_block_model(
    model: nn.Module, layout: Layout, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    if len(layout.stacks) != 1 or layout.num_blocks < 2:
        raise CannotCalibrate("it takes one stack of two blocks or more")
    kinds = {
        tuple((n, tuple(p.shape)) for n, p in model.get_submodule(path).named_parameters())
        for path in layout.block_paths
    }
    if len(kinds) > 1:
        raise CannotCalibrate("the blocks have parameters of different shapes")
    small = meta_copy(model, dtype)
    blocks: Any = small.get_submodule(layout.stacks[0].path)
    del blocks[2:]
    small.to_empty(device=device)
    with torch.no_grad():
        for p in small.parameters():
            # zeros and tiny numbers would take other paths through a processor than weights do
            p.normal_(0, 0.02) if p.ndim >= 2 else p.fill_(0.5)
        for buffer in small.buffers():
            buffer.zero_()  # positions of 0, angles of 0: as quick to compute with as others
    return small


class _Sections:
    """Seconds between the events of a step, by name of the section that ends with the event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        self._last = self._now()

    def end(self, section: str) -> None:
        self.seconds[section].append(self._now() - self._last)
        self.start()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def least(self, *sections: str) -> float:
        """Sum of each section's least: what else runs on a machine only adds."""
        return sum(min(self.seconds[s]) for s in sections)


def _hidden_states(values: Any) -> torch.Tensor | None:
    tensors = (t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor))
    return next((t for t in tensors if t.ndim >= 2 and t.is_floating_point()), None)


def _timed_step(
    model: nn.Module,
    layout: Layout,
    inputs: Mapping[str, Any],
    optimizer: MaskedAdamW,
    clock: _Sections,
    name: str,
    autocast: AbstractContextManager[Any],
) -> None:
    """Time the sections of one step, such as f"{name} block 0 forward"."""

    def boundary(passed: str, behind: str, values: Any) -> None:
        """Forward has passed one section; backward comes back here when it has passed another."""
        clock.end(f"{name} {passed} forward")
        hidden = _hidden_states(values)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: clock.end(f"{name} {behind} backward"))

    first, second = (model.get_submodule(path) for path in layout.block_paths)
    with (
        first.register_forward_pre_hook(
            lambda _, args, kwargs: boundary("embeddings", "block 0", (args, kwargs)),
            with_kwargs=True,
        ),
        first.register_forward_hook(lambda _, args, out: boundary("block 0", "block 1", out)),
        second.register_forward_hook(lambda _, args, out: boundary("block 1", "head", out)),
    ):
        clock.start()
        with autocast:
            loss = loss_of(model(**inputs))
        clock.end(f"{name} head forward")
        loss.backward()
        clock.end(f"{name} last backward")
        optimizer.step()
        optimizer.zero_grad()  # which gives the memory of gradients back
        clock.end(f"{name} update")


def measure_update(options: Options, dtype: torch.dtype) -> float:
    """Bytes of host memory a second that an update reads and writes on this machine's CPU."""
    p = nn.Parameter(torch.zeros(_UPDATED, dtype=dtype, device="cpu"))
    p.grad = torch.full_like(p, 0.01)
    optimizer = MaskedAdamW(
        [p],
        state_dtype=state_dtype_of(options.optimizer),
        master_weights=options.master_weights,
        # as `progtuning train` has it, whose weights would lose most updates otherwise
        stochastic_rounding=dtype == torch.bfloat16 and not options.master_weights,
        nonfinite="ignore",
    )
    clock = _Sections(torch.device("cpu"))
    for _ in range(1 + _MIN_ROUNDS):
        clock.start()
        optimizer.step()
        clock.end("update")
    return update_bytes_of(p, optimizer.state[p]) / clock.least("update")


def measure_units(
    model: nn.Module,
    layout: Layout,
    inputs: Mapping[str, Any],
    options: Options,
    *,
    dtype: torch.dtype,
    tied: TiedPolicy,
    only: str | None,
    frozen_mode: FrozenMode,
    between: bool,
    kernels: Kernels = "off",
) -> UnitCosts:
    """The least times of real steps of a copy with two blocks and other weights.

    `between`: measure frozen blocks that the gradient passes as well. CannotCalibrate is raised for
    blocks that differ or train in part, as `only` makes them, and where a step fails.
    """
    if only is not None:
        raise CannotCalibrate(f"only={only!r} trains parts of blocks, and whole ones are timed")
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCalibrate("there is no GPU here")
    small = _two_block_model(model, layout, dtype, device)
    blocks = find_layout(small, [layout.stacks[0].path])
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    batch = on_device(inputs, device, vocabulary)
    freezer = Freezer(small, blocks, tied=tied, frozen_mode=frozen_mode, kernels=kernels)
    optimizer = MaskedAdamW(
        small.parameters(),
        lr=1e-6,
        max_grad_norm=1.0,  # as the Trainer has it: a norm reads every gradient once more
        on_freeze="keep",  # plans take turns: state that comes and goes would be timed
        state_dtype=state_dtype_of(options.optimizer),
        master_weights=options.master_weights,
    )
    full, upper = FreezePlan((True, True), embeddings=True), FreezePlan((False, True))
    plans = {"full": full, "lowest": upper}
    if between:
        plans["between"] = replace(upper, embeddings=True)
    clock, params = _Sections(device), freeze_quietly(freezer, full).trainable_params
    began = time.perf_counter()
    try:
        with torch.enable_grad():
            rounds = 0
            while rounds <= _MIN_ROUNDS or time.perf_counter() - began < _SECONDS:
                for name, plan in plans.items():
                    freeze_quietly(freezer, plan)
                    autocast = torch.autocast(
                        device.type, options.autocast, options.autocast is not None
                    )
                    _timed_step(small, blocks, batch, optimizer, clock, name, autocast)
                if not rounds:
                    clock.seconds.clear()
                rounds += 1
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CannotCalibrate(f"a step of two blocks fails: {error}") from error
    # forward of the lower block: the upper one is where memory grows to its peak, which in a
    # whole model a single block pays for
    block = clock.least("full block 0 forward")
    block += clock.least("full block 0 backward", "full block 1 backward") / 2
    passed = clock.least("between block 0 forward", "between block 0 backward") if between else 0.0
    tied_weights = any(
        len(s.units) > 1 and s.home == blocks.head for s in parameter_slots(small, blocks)
    )
    return UnitCosts(
        embeddings=clock.least("full embeddings forward", "full last backward"),
        embeddings_frozen=clock.least("lowest embeddings forward"),
        block=block,
        block_lowest=clock.least("lowest block 1 forward", "lowest last backward"),
        block_frozen=clock.least("lowest block 0 forward"),
        block_between=passed,
        head=clock.least("full head forward", "full head backward"),
        # on the host it runs beside the rest, and `measure_update` times it
        update=0.0 if options.host else clock.least("full update") / params,
        head_alone=(
            clock.least("lowest head forward", "lowest head backward") if tied_weights else 0.0
        ),
    )
