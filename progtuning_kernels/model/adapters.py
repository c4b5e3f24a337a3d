"""What freezing must know of PEFT's adapters in a model. PEFT is not imported."""

from __future__ import annotations

from typing import Any

from torch import nn

from .families import UnsupportedModelError


def adapter_configs(model: nn.Module) -> list[Any]:
    """Adapter configs of a PEFT model, or of a model that adapters were injected into."""
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind))


def check_adapters(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for adapters that cannot freeze with their blocks."""
    for config in adapter_configs(model):
        if not getattr(config, "is_prompt_learning", False):
            continue
        kind = _kind(config)
        if kind == "PREFIX_TUNING":
            raise UnsupportedModelError(
                "prefix tuning keeps the keys and values of all blocks in one tensor, which cannot "
                "freeze block by block: use LoRA or IA3, or train it without patch_model"
            )
        raise UnsupportedModelError(
            f"{kind.lower()} trains only what enters below block 0, so it would stop training at "
            "the first block that freezes: use LoRA or IA3"
        )


def rank_allocation_end(model: nn.Module) -> int | None:
    """Last step at which AdaLoRA, if there is one, reads the gradient of every adapter."""
    ends = [
        config.total_step - config.tfinal
        for config in adapter_configs(model)
        if _kind(config) == "ADALORA" and config.total_step
    ]
    return max(ends, default=None)
