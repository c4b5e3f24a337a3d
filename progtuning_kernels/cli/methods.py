"""What `patch_model` and the optimizer are given for the options of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..cache import PrefixCache
from ..model.layout import Layout
from ..model.rows import TrainedRows
from ..optim import MaskedAdamW
from ..optim.masked_adamw import STATE_DTYPES
from ..patch import patch_model
from ..schedules import Schedule, annealed_lr
from .errors import UserError, as_user_error
from .options import TrainOptions
from .sizes import parse_bytes

_WITHOUT_STORES = {"cache": None, "graph": "off", "packing": "off"}


def patch_options(options: TrainOptions, layout: Layout) -> dict[str, Any]:
    """What `patch_model` is given, but for model and schedule."""
    cache: Any = options.cache_size
    if cache not in (None, "auto"):
        cache = PrefixCache(parse_bytes(cache))
    return {
        "frozen_mode": options.frozen_mode,
        "tied": options.tied,
        "only": options.only,
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
    rows: TrainedRows | None = None,
) -> tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]:
    """`MaskedAdamW` over all that will ever train, and the rates of `--anneal`.

    None is left to the Trainer: the optimizer of the other methods and of `--optim`, and rates.
    """
    if not options.is_scheduled:
        return None, None
    if "optim" in options.trainer:
        own = (options.anneal, options.in_backward, options.master_weights)
        if any(own) or options.state_dtype != "fp32":
            raise UserError(
                "--anneal, --in-backward, --master-weights and --state-dtype are MaskedAdamW's: "
                "leave out --optim"
            )
        return None, None
    with as_user_error():
        # for its parameter groups alone: the callback patches when training begins
        patch = patch_options(options, layout) | _WITHOUT_STORES
        handle = patch_model(model, schedule, **patch, rows=rows)
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
            stochastic_rounding=options.precision == "bf16-pure" and not options.master_weights,
            master_weights=options.master_weights,
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
