"""`progtuning plan`, and the table that `progtuning train --dry-run` prints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import nn
from transformers import AutoConfig

from ..cache import PrefixCache
from ..planner import TrainingPlan, plan_training
from ..planner.planning import switch_checkpointing_on
from ..schedules import (
    MilestoneSchedule,
    PlateauSchedule,
    Schedule,
    decides_in_training,
    stage_starts,
)
from ..schedules.progressive import scales_with_length
from .budget import chosen_schedule
from .config import autocast_dtype, build_schedule, choose_device
from .errors import UserError, as_user_error
from .models import auto_class, check_length, model_path, quiet_transformers, wrap_lora
from .new_tokens import make_room, read_tokens, rows_of
from .options import OPTIMIZERS, TrainOptions
from .sizes import parse_bytes

_OPTIMIZERS: dict[str, Any] = {dtype: name for name, dtype in OPTIMIZERS.items()}
_MOST_STAGES = 20  # of a table: a random schedule may have a stage every few steps
_BY_SCORE = "how long a stage lasts is decided in training, by the score: shares are assumed"
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def model_without_weights(name: str, task: str) -> tuple[nn.Module, str]:
    """The model of a folder, a config file or a hub id, on the meta device, and its task.

    The task "auto" is what the config says, and a text classification if that is no language model.
    """
    quiet_transformers()
    with as_user_error(Exception, said=f"cannot load the config of {name!r}"):
        config = AutoConfig.from_pretrained(model_path(name))
        if task == "auto":
            causal = any(_CAUSAL.search(kind) for kind in config.architectures or ())
            task = "causal-lm" if causal else "text-classification"
        with torch.device("meta"):
            model = auto_class(task).from_config(config)
    if task == "text-classification" and config.pad_token_id is None:
        # decoders classify at the last token that is not padding, so they must know it
        model.config.pad_token_id = 0
    return model, task


def _schedule_to_plan(
    options: TrainOptions, steps: int | None, chosen: Schedule | None
) -> tuple[Schedule, list[str]]:
    """The schedule that is planned in place of the run's, and what it leaves out."""
    if chosen is not None:
        return chosen, []
    if not options.is_scheduled:
        return MilestoneSchedule({}, embeddings="always"), []
    schedule = build_schedule(options, steps)
    if isinstance(schedule, PlateauSchedule):
        schedule.of_stages.total_steps = schedule.of_stages.total_steps or schedule.stages
        return schedule.of_stages, [_BY_SCORE]
    if decides_in_training(schedule):
        return MilestoneSchedule({}), ["what an adaptive schedule freezes is decided in training"]
    return schedule, []


def plan_run(
    options: TrainOptions,
    model: nn.Module,
    *,
    steps: int | None,
    device: str,
    rows: dict[str, list[int]] | None = None,
    real_tokens: float = 1.0,
    choose: Callable[[nn.Module], Schedule] | None = None,
    **more: Any,
) -> TrainingPlan:
    """What the stages of a run would cost, as `plan_training` says.

    Args:
        model: with or without weights; it gets checkpointing and adapters if the options say so.
        steps: optimizer steps of the run; None: as long as the schedule says.
        device: "cpu" or "cuda"; it need not be here.
        rows: of embeddings and LM head that train alone; None: all.
        real_tokens: share of a micro-batch's places that are no padding, where packing is on.
        choose: gives the schedule of the model as it trains, instead of the options.
    """
    if options.load_in_4bit:
        raise UserError("weights in 4 bits are not planned: leave --load-in-4bit out")
    if options.of_trainer("gradient_checkpointing") and not switch_checkpointing_on(model):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing")
    if options.uses_lora:
        of_peft = None if options.is_scheduled else rows
        model = wrap_lora(model, options.task, options.lora_rank, of_peft)
    size = options.cache_size if options.is_scheduled else None
    with as_user_error():
        chosen = None if choose is None else choose(model)
        schedule, notes = _schedule_to_plan(options, steps, chosen)
        by_score = _BY_SCORE in notes
        steps = None if by_score else steps  # these stages have shares of their own
        length = schedule.total_steps or steps
        if length is None and not scales_with_length(schedule):
            raise UserError("the stages of this schedule need the length of the run: --max-steps")
        if length is not None and not scales_with_length(schedule):
            first, *_ = [*islice(stage_starts(schedule, length), _MOST_STAGES, None), length]
            if first < length:
                notes.append(f"the first {_MOST_STAGES} stages, of {length:,} steps")
                steps = first
        plan = plan_training(
            model,
            schedule,
            steps=steps,
            device=device,
            dtype=torch.bfloat16 if options.precision == "bf16-pure" else torch.float32,
            autocast=autocast_dtype(options, device),
            optimizer=_OPTIMIZERS[options.state_dtype],
            master_weights=options.master_weights,
            in_backward=options.in_backward,
            state_device=options.state_device,
            cache=False if size is None else size == "auto" or PrefixCache(parse_bytes(size)),
            tied=options.tied,
            only=options.only if options.is_scheduled else None,
            frozen_mode=options.frozen_mode,
            blocks=options.block_lists,
            rows=rows if options.is_scheduled else None,
            real_tokens=real_tokens if options.is_scheduled and options.packing != "off" else 1.0,
            **more,
        )
    known = plan.length_known and not by_score
    return dataclasses.replace(plan, notes=(*plan.notes, *notes), length_known=known)


def _with_weights(options: TrainOptions) -> tuple[nn.Module, Callable[[nn.Module], Schedule]]:
    """A model whose units can be compared, and what chooses them."""
    if options.importance != "snr":
        raise UserError(
            f"--importance {options.importance} needs rows: take --importance snr, or "
            "progtuning train --dry-run"
        )
    path = model_path(options.model)
    with as_user_error(Exception, said=f"--importance snr needs weights of {options.model!r}"):
        model = auto_class(options.task).from_pretrained(path)
    return model, lambda model: chosen_schedule(
        options,
        model,
        options.of_trainer("max_steps"),
        batch_size=options.of_trainer("per_device_train_batch_size"),
        seq_len=options.max_length,
    )


def run(options: TrainOptions, *, memory: str | None, as_json: bool, **more: Any) -> None:
    memory_bytes = None if memory is None else parse_bytes(memory)
    source_of = click.get_current_context().get_parameter_source
    for name, flag in (("pcie_gbps", "--pcie"), ("host_gbps", "--host-bandwidth")):
        if source_of(name) is not ParameterSource.DEFAULT and options.state_device is None:
            raise UserError(f"{flag} is of the state on the host: give --state-device cpu as well")
    # state on the host is apart from the weights, which are then planned on a GPU
    assumed = options.state_device is not None and options.device == "auto"
    device = "cuda" if assumed or options.device == "cuda" else choose_device(options.device)
    timed = more["calibrate"] and options.state_device is None  # else the host's update is
    if device == "cuda" and timed and not torch.cuda.is_available():
        raise UserError("--calibrate on cuda needs a GPU")
    model, task = model_without_weights(options.model, options.task)
    check_length(model, options.max_length, "--max-length")
    options = dataclasses.replace(options, task=task)
    if options.schedule == "budget":
        model, more["choose"] = _with_weights(options)
    rows = None
    if tokens := read_tokens(options.add_tokens):
        old = model.get_input_embeddings().weight.shape[0]  # of which the tokenizer may use fewer
        make_room(model, old + len(tokens), weights=False)
        new = range(old, old + len(tokens))
        rows = rows_of(model, new) if options.train_new_tokens else None
    plan = plan_run(
        options,
        model,
        batch_size=options.of_trainer("per_device_train_batch_size"),
        seq_len=options.max_length,
        steps=options.of_trainer("max_steps"),
        device=device,
        rows=rows,
        memory_bytes=memory_bytes,
        **more,
    )
    print(json.dumps(plan.to_dict(), indent=2) if as_json else plan)
