"""Tells sharded tensors (`DTensor`) from ordinary ones, without importing torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def is_sharded(t: Tensor | type) -> bool:
    """Whether a tensor, or a class of tensors, is a `DTensor`."""
    return hasattr(t, "to_local")


def local_of(t: Tensor) -> Tensor:
    """The shard of a `DTensor` on this rank; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t


def fsdp_groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of the parameters that `fully_shard(module)` gathers together; [] without."""
    if not hasattr(type(module), "_get_fsdp_state"):
        return []
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; a single one before
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g]


def fsdp_records(model: nn.Module) -> dict[tuple[int, str], Any]:
    """FSDP2's record of every parameter that it gathers, by id of its owner's `_parameters` and by
    name. `sharded_param` of a record is the shard; the owner may hold the gathered tensor.
    """
    records = {}
    for group in (group for module in model.modules() for group in fsdp_groups(module)):
        for record in group.fsdp_params:
            info = record._module_info
            owners = [info.module, *info.shared_modules]
            names = [info.param_name, *info.shared_param_names]
            for owner, name in zip(owners, names, strict=True):
                records[id(owner._parameters), name] = record
    return records


def forget(model: nn.Module, shard: Tensor) -> None:
    """Have FSDP2 gather one of its parameters no more, which leaves the model."""
    for group in (group for module in model.modules() for group in fsdp_groups(module)):
        group.fsdp_params = [r for r in group.fsdp_params if r.sharded_param is not shard]


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 gathers the parameters of one module."""

    group: Any  # of what it gathers together
    records: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, model: nn.Module) -> Sharding | None:
        """None for a module of `model` that holds no shards."""
        for group in (group for part in model.modules() for group in fsdp_groups(part)):
            infos = [(record, record._module_info) for record in group.fsdp_params]
            own = [r for r, info in infos if module in (info.module, *info.shared_modules)]
            if own:
                return cls(group, tuple(own))
        return None

    @property
    def stays(self) -> bool:
        """In a forward: whether what is gathered stays until the backward, as the root's does."""
        return self.group.post_forward_mesh_info is None

    def may_stay(self, model: nn.Module) -> bool:
        """Before a forward: whether `stays` may hold in it; FSDP2 decides late for the root."""
        own = any(group is self.group for group in fsdp_groups(model))
        return self.stays or (
            own and bool(getattr(model._get_fsdp_state(), "_auto_reshard_after_forward", True))
        )

    @property
    def shards(self) -> list[Tensor]:
        """Tensors of which an update leaves a trace in one."""
        shards = [record.sharded_param.detach() for record in self.records]
        return [*shards, *map(local_of, shards)]
