"""What freezing must know of PEFT's adapters in a model. PEFT is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

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


def save_with_adapter(model: Any, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Have PEFT save tensors of the base beside the adapter, from now on, and also once unpatched.

    It takes embeddings and LM head along (`save_embedding_layers`), and loads them.

    Args:
        tensors: with their names.

    Raises:
        UnsupportedModelError: for a tensor that `save_pretrained` would leave out.
    """
    if not (tensors and adapter_configs(model) and hasattr(model, "save_pretrained")):
        return
    if "save_embedding_layers" not in signature(model.save_pretrained).parameters:
        raise UnsupportedModelError(
            f"rows: save_pretrained of {type(model).__name__} leaves out what trains beside "
            "adapters of add_adapter: use peft.get_peft_model(model, config)"
        )
    layers = [getattr(model, f"get_{kind}_embeddings", list)() for kind in ("input", "output")]
    saved = {id(p) for layer in layers if layer for p in layer.parameters()}
    for name, tensor in tensors:
        if id(tensor) not in saved and ".modules_to_save." not in name:
            raise UnsupportedModelError(
                f"rows: PEFT saves embeddings and LM head, and would leave out {name}: name its "
                "module in modules_to_save of the adapter's config"
            )
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=True)


def rank_allocation_end(model: nn.Module) -> int | None:
    """Last step at which AdaLoRA, if there is one, reads the gradient of every adapter."""
    ends = [
        config.total_step - config.tfinal
        for config in adapter_configs(model)
        if _kind(config) == "ADALORA" and config.total_step
    ]
    return max(ends, default=None)
