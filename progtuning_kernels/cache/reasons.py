"""Why a stage, or one forward in it, runs as without a cache, as far as no trial is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.call import Call, text_configs, wanted_of_all_blocks
from ..model.layout import Layout
from .prefix_weights import PrefixWeights

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def stage_reason(
    model: nn.Module, layout: Layout, weights: PrefixWeights, level: int, *, fixed: bool
) -> str | None:
    """Why nothing can be served in a stage; `fixed`: frozen units are held in eval mode."""
    config = getattr(model, "config", None)
    if not level:
        return "nothing below the boundary is frozen"
    if (kind := next(model.parameters()).device.type) not in ("cpu", "cuda", "meta"):
        return f"the random numbers of {kind} devices are not watched"
    if not fixed:
        return 'frozen_mode="train": frozen units are no fixed function'
    if (name := weights.trainable(level)) is not None:
        return f"{name} trains below the boundary"
    if model._compiled_call_impl is not None:
        return "the model is compiled whole: compile its blocks"
    for module in (config, *map(model.get_submodule, layout.containers)):
        for name in _LAYERDROP:
            if getattr(module, "__dict__", {}).get(name):
                return f"{name} leaves out blocks at random"
    for part in text_configs(config):
        for name in ("rope_parameters", "rope_scaling"):
            if kind := _batch_dependent_rope(getattr(part, name, None)):
                return f"{kind} position frequencies depend on the longest row of a batch"
    return None


def call_reason(model: nn.Module, weights: PrefixWeights, call: Call) -> str | None:
    """Why these arguments want the blocks below the boundary to run."""
    if (name := weights.hooked()) is not None:
        return f"a forward hook on {name} wants it to run"
    named = call.named
    for name in ("past_key_values", "inputs_embeds", "encoder_outputs"):
        if name in named:
            return f"{name} was given"
    if named.get("use_cache") is True:
        return "use_cache=True: keys and values of all blocks are wanted"
    if (reason := wanted_of_all_blocks(model, named)) is not None:
        return reason
    mask = named.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", None) != 2:
        return "attention_mask is not of shape (B, T)"
    return None


def _batch_dependent_rope(rope: Any) -> str | None:
    if not isinstance(rope, Mapping):
        return None
    for kind in (rope.get("rope_type"), rope.get("type")):
        if kind in ("dynamic", "longrope"):
            return kind
    return next(filter(None, map(_batch_dependent_rope, rope.values())), None)
