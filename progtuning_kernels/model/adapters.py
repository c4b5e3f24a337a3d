"""What PEFT adds to a model, as far as freezing blocks must know of it. PEFT is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import UnsupportedModelError
from .layout import Layout, ParameterSlot


def adapter_configs(model: nn.Module) -> list[Any]:
    """Adapter configs of a PEFT model, or of a model that adapters were injected into."""
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind))


def check_adapters(model: nn.Module, layout: Layout) -> None:
    """Refuse adapters that cannot freeze with their blocks.

    Raises:
        UnsupportedModelError: prompts that enter below block 0, or a prefix whose columns do not
            belong to one block each.
    """
    for config in adapter_configs(model):
        kind = _kind(config)
        if not getattr(config, "is_prompt_learning", False):
            continue
        if kind != "PREFIX_TUNING":
            raise UnsupportedModelError(
                f"{kind.lower()} trains only what enters below block 0, so it would stop training "
                "at the first block that freezes: use LoRA, IA3 or prefix tuning"
            )
        if getattr(config, "prefix_projection", False):
            raise UnsupportedModelError(
                "prefix tuning with prefix_projection=True shares one projection between all "
                "blocks, which cannot freeze one by one: use prefix_projection=False"
            )
        if config.num_layers != layout.stacks[-1].length:
            raise UnsupportedModelError(
                f"prefix tuning has keys and values for {config.num_layers} blocks, the stack "
                f"{layout.stacks[-1].path} has {layout.stacks[-1].length}"
            )


def rank_allocation_end(model: nn.Module) -> int | None:
    """Last step at which AdaLoRA moves ranks between its adapters; None without AdaLoRA.

    Up to then `update_and_allocate` reads the gradient of every adapter, and fails without it.
    """
    ends = [
        config.total_step - config.tfinal
        for config in adapter_configs(model)
        if _kind(config) == "ADALORA" and config.total_step
    ]
    return max(ends, default=None)


@dataclass(frozen=True)
class FrozenColumns:
    """Columns of a sliced parameter that belong to frozen blocks, and their values.

    The parameter itself trains, so momentum and decay would move them: they are put back.
    """

    slot: ParameterSlot
    columns: torch.Tensor  # (n,) indices
    values: torch.Tensor  # (rows, n)

    @classmethod
    def of(cls, slot: ParameterSlot, frozen: Sequence[int]) -> FrozenColumns:
        """Take the columns of the blocks in `frozen` as they are now."""
        table = slot.parameter.detach()
        width = table.shape[1] // len(slot.units)
        first = [slot.units.index(unit) * width for unit in frozen]
        ranges = [torch.arange(start, start + width, device=table.device) for start in first]
        columns = torch.cat(ranges)
        return cls(slot, columns, table[:, columns].clone())

    def put_back(self) -> None:
        with torch.no_grad():
            self.slot.parameter[:, self.columns] = self.values
