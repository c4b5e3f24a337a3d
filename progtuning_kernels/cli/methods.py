"""The methods that `--method` names: what trains, with which optimizer, and what ends a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..cache import PrefixCache
from ..freezing.decay_groups import decay_groups
from ..model.layout import Layout
from ..optim import MaskedAdamW
from ..optim.masked_adamw import STATE_DTYPES
from ..patch import PatchHandle, patch_model
from ..schedules import ProgressiveSchedule, Schedule
from ..schedules.files import KINDS, make_schedule, schedule_from_file
from .errors import UserError, as_user_error
from .settings import TrainSettings
from .sizes import parse_bytes

# What a name alone stands for: LISA's 20 steps (its published scripts), the 50 of BAdam in
# LLaMA-Factory, and AutoFreeze's percentile.
_NAMED = {
    "random": {"blocks": 2, "period": 20},
    "cyclic": {"blocks": 1, "period": 50},
    "adaptive": {"interval": 50, "percentile": 50},
}


def build_schedule(s: TrainSettings, total_steps: int) -> Schedule:
    """The schedule that `--schedule` asks for, bound to the length of the run.

    Raises:
        ValueError, OSError: a bad setting, or a file that cannot be read.
    """
    if s.schedule == "progressive":
        return ProgressiveSchedule(s.stages, total_steps, embeddings=s.embeddings)
    if (s.stages, s.embeddings) != (TrainSettings.stages, TrainSettings.embeddings):
        raise ValueError(
            "--stages and --embeddings are for the progressive schedule; others have their own "
            "settings, in a file"
        )
    if s.schedule in _NAMED:
        schedule = make_schedule({"schedule": s.schedule, **_NAMED[s.schedule]})
    elif s.schedule in KINDS or "." not in s.schedule:
        names = ", ".join(("progressive", *_NAMED))
        raise ValueError(f"--schedule is {names} or a file, got {s.schedule!r}")
    else:
        schedule = schedule_from_file(s.schedule)
    if schedule.total_steps is None:
        schedule.bind(total_steps)
    return schedule


@dataclass
class Trained:
    """What trains and how: all that differs between the methods.

    Attributes:
        model: computes the loss.
        optimizer: holds every parameter that will ever train.
        update: clips where the optimizer does not, updates and zeroes.
        handle: of the patched model; None where nothing is scheduled.
        base: the Hugging Face model inside, which is saved.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], None]
    handle: PatchHandle | None
    base: nn.Module

    def active_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def skipped_steps(self) -> int:
        """Steps left out because of non-finite gradients; plain torch leaves out none."""
        return getattr(self.optimizer, "skipped_steps", 0)


def prefix_cache(s: TrainSettings) -> PrefixCache | str | None:
    """The `cache` of `patch_model`; `UserError` if `--cache` is no size, or for another method."""
    if s.method != "progressive-cache":
        if s.cache != TrainSettings.cache:
            raise UserError(f"--cache is for --method progressive-cache, not {s.method}")
        return None
    return s.cache if s.cache == "auto" else PrefixCache(parse_bytes(s.cache))


def progressive(
    model: nn.Module, s: TrainSettings, schedule: Schedule, layout: Layout, base: nn.Module
) -> Trained:
    with as_user_error():
        handle = patch_model(
            model,
            schedule,
            frozen_mode=s.frozen_mode,
            tied=s.tied,
            packing=s.packing,
            cache=prefix_cache(s),
            blocks=[stack.path for stack in layout.stacks],
        )
        optimizer = MaskedAdamW(
            handle.param_groups(weight_decay=s.weight_decay, by_unit=s.anneal),
            lr=s.lr,
            max_grad_norm=s.max_grad_norm or None,
            state_dtype=STATE_DTYPES[s.state_dtype],
            seed=s.seed,
        )

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trained(model, optimizer, update, handle, base)


def plain(model: nn.Module, s: TrainSettings, base: nn.Module) -> Trained:
    """Train without this library, by torch's fused AdamW and its clipping."""
    if s.anneal:
        raise UserError(f"--anneal is for the progressive methods, not for --method {s.method}")
    if s.state_dtype != "fp32":
        raise UserError(
            f"--state-dtype {s.state_dtype} is for the progressive methods; --method {s.method} "
            "uses torch's AdamW"
        )
    if s.packing == "on":
        raise UserError(f"--packing on is for the progressive methods, not --method {s.method}")
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        decay_groups(parameters, s.weight_decay), lr=s.lr, fused=device.type in ("cpu", "cuda")
    )

    def update() -> None:
        if s.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Trained(model, optimizer, update, None, base)
