"""`progtuning plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backend import one_line
from ..planner import plan_training
from ..planner.planning import switch_checkpointing_on
from ..schedules import ProgressiveSchedule
from .errors import UserError, as_user_error
from .models import auto_class, check_length, choose_device, minilm_folder, quiet_transformers
from .sizes import parse_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PASSED_ON = ("batch_size", "seq_len", "padding", "optimizer", "master_weights", "in_backward")
_PASSED_ON += ("cache", "tied", "calibrate", "real_tokens")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def model_without_weights(name: str, task: str) -> nn.Module:
    """The model of a folder, a config file or a hub id, on the meta device.

    Args:
        task: "classification", "causal-lm", or "auto": what the config's `architectures` say,
            and classification where they name no language model.

    Raises:
        UserError: there is no such config, or no model of that task for it.
    """
    from transformers import AutoConfig

    quiet_transformers()
    path = str(minilm_folder()) if name == "minilm" else name
    try:
        config = AutoConfig.from_pretrained(path)
        if task == "auto":
            causal = any(_CAUSAL.search(kind) for kind in config.architectures or ())
            task = "causal-lm" if causal else "classification"
        with torch.device("meta"):
            model = auto_class(task).from_config(config)
    except Exception as error:  # missing, damaged, no network: there is no common class
        raise UserError(f"cannot load the config of {name!r}: {one_line(error)}") from error
    if task == "classification" and config.pad_token_id is None:
        # decoders classify at the last token that is not padding, so they must know it
        model.config.pad_token_id = 0
    return model


def run(options: Mapping[str, Any]) -> None:
    o = dict(options)
    memory = None if o["memory"] is None else parse_bytes(o["memory"])
    device = choose_device(o["device"]) if o["device"] != "cuda" else torch.device("cuda")
    if device.type == "cuda" and o["calibrate"] and not torch.cuda.is_available():
        raise UserError("--calibrate on cuda needs a GPU")
    model = model_without_weights(o["model"], o["task"])
    check_length(model, o["seq_len"], "--seq-len")
    if o["gradient_checkpointing"] and not switch_checkpointing_on(model):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing")
    with as_user_error():
        plan = plan_training(
            model,
            ProgressiveSchedule(o["stages"], o["steps"], embeddings=o["embeddings"]),
            dtype=_DTYPES[o["dtype"]],
            memory_bytes=memory,
            device=device,
            blocks=None if o["blocks"] is None else o["blocks"].split(","),
            **{name: o[name] for name in _PASSED_ON},
        )
    print(json.dumps(plan.to_dict(), indent=2) if o["json"] else plan)
