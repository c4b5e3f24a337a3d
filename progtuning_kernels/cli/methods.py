"""The methods that `--method` names: what trains, with which optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cache import PrefixCache
from ..model.layout import Layout
from ..optim import MaskedAdamW
from ..optim.masked_adamw import STATE_DTYPES
from ..patch import patch_model
from ..schedules import ProgressiveSchedule, Schedule, annealed_lr
from ..schedules.files import KINDS, make_schedule, schedule_from_file
from .errors import UserError, as_user_error
from .options import TrainOptions
from .sizes import parse_bytes

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What a name alone stands for: LISA's 20 steps (its published scripts), the 50 of BAdam in
# LLaMA-Factory, and AutoFreeze's percentile.
_NAMED = {
    "random": {"blocks": 2, "period": 20},
    "cyclic": {"blocks": 1, "period": 50},
    "adaptive": {"interval": 50, "percentile": 50},
}


_WITHOUT_STORES = {"cache": None, "graph": "off", "packing": "off"}


def follows_plan(options: TrainOptions) -> bool:
    return options.method.startswith("progressive")


def build_schedule(options: TrainOptions, total_steps: int) -> Schedule:
    """The schedule that `--schedule` asks for, bound to the length of the run.

    Raises:
        UserError: a bad setting, or a file that cannot be read.
    """
    name = options.schedule
    with as_user_error():
        if name == "progressive":
            return ProgressiveSchedule(
                options.stages, total_steps, embeddings=options.embeddings
            )
        if (options.stages, options.embeddings) != (TrainOptions.stages, TrainOptions.embeddings):
            raise ValueError(
                "--stages and --embeddings are for the progressive schedule; others have their "
                "own settings, in a file"
            )
        if isinstance(name, dict):
            schedule = make_schedule(name)
        elif name in _NAMED:
            schedule = make_schedule({"schedule": name, **_NAMED[name]})
        elif name in KINDS or "." not in name:
            names = ", ".join(("progressive", *_NAMED))
            raise ValueError(f"--schedule is {names} or a file, got {name!r}")
        else:
            schedule = schedule_from_file(name)
        if schedule.total_steps is None:
            schedule.bind(total_steps)
    return schedule


def check_method(options: TrainOptions) -> None:
    """Refuse options of the progressive methods where nothing of this library trains."""
    if follows_plan(options):
        if "optim" in options.trainer and (options.in_backward or options.state_dtype != "fp32"):
            raise UserError("--in-backward and --state-dtype are MaskedAdamW's: leave out --optim")
        return
    for name, given in (
        ("--anneal", options.anneal),
        ("--in-backward", options.in_backward),
        ("--state-dtype", options.state_dtype != "fp32"),
        ("--packing on", options.packing == "on"),
        ("--cache", options.cache is not None),
        ("--graph", options.graph != "off"),
    ):
        if given:
            raise UserError(
                f"{name} is for the progressive methods, not for --method {options.method}"
            )


def patch_options(options: TrainOptions, layout: Layout) -> dict[str, Any]:
    """What `patch_model` is given, but for model and schedule."""
    cache = options.cache or ("auto" if options.method == "progressive-cache" else None)
    if cache not in (None, "auto"):
        cache = PrefixCache(parse_bytes(cache))
    return {
        "frozen_mode": options.frozen_mode,
        "tied": options.tied,
        "packing": options.packing,
        "graph": options.graph,
        "cache": cache,
        "blocks": [stack.path for stack in layout.stacks],
    }


def optimizer_and_rates(
    model: nn.Module,
    options: TrainOptions,
    args: TrainingArguments,
    schedule: Schedule,
    layout: Layout,
) -> tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]:
    """`MaskedAdamW` over all that will ever train, and the rates of `--anneal`.

    None is left to the Trainer: the optimizer of the other methods and of `--optim`, and rates.
    """
    if not follows_plan(options) or "optim" in options.trainer:
        if options.anneal:
            raise UserError("--anneal sets the rates of MaskedAdamW: leave out --optim")
        return None, None
    with as_user_error():
        # for its parameter groups alone: the callback patches when training begins
        handle = patch_model(model, schedule, **patch_options(options, layout) | _WITHOUT_STORES)
        groups = handle.param_groups(weight_decay=args.weight_decay, by_unit=options.anneal)
        handle.unpatch()
        optimizer = MaskedAdamW(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm or None,
            state_dtype=STATE_DTYPES[options.state_dtype],
            # weights in bf16 lose most updates to rounding to nearest
            stochastic_rounding=options.precision == "bf16-pure",
            in_backward=options.in_backward,
            # "exact" would keep all gradients to the end
            clip_mode="previous_norm" if options.in_backward else "exact",
            seed=args.seed,
        )
        if not options.anneal:
            return optimizer, None
        warmup = args.get_warmup_steps(schedule.total_steps)
        factors: list[Callable[[int], float]] = annealed_lr(
            schedule,
            optimizer.param_groups,
            layout.num_blocks,
            base=lambda step: min(1.0, step / max(1, warmup)) if warmup else 1.0,
        )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
