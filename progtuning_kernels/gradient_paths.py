"""Proves that freezing from the bottom cuts nothing off that still trains.

Frozen units run under `no_grad`. That is right if nothing in a unit is computed from a parameter
that trains longer than the unit does: a decoder block frozen before the encoder would cut the
encoder's gradient off, and so would an input norm that was taken for head, without any error. One
training forward shows it: here every module's inputs are followed through the autograd graph down
to the parameters that they were computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils import _pytree as pytree

from .call_stack import called_from
from .cures import cure_for
from .families import UnsupportedModelError
from .layout import Layout, ParameterSlot, parameter_slots


class GradientPaths:
    """Watches the modules of one model during one forward.

    Args:
        model: the model that `layout` describes.
        layout: its cut into units.
        boundary: the effective boundary.
        compiled: watch compiled modules too. Only for a forward that is forced to run eagerly:
            another one would compile the hooks into its graph, where they stay.

    Raises (from the forward that is watched):
        UnsupportedModelError: a unit is computed from a parameter of a later unit.
        RuntimeError: blocks that train are checkpointed by the reentrant variant above a frozen
            prefix, which trains nothing.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, boundary: int, *, compiled: bool = False
    ) -> None:
        self._model = model
        self._layout = layout
        self._boundary = boundary
        self._slots = {id(slot.parameter): slot for slot in parameter_slots(model, layout)}
        self._seen: set[Any] = set()
        self._ran: list[str] = []  # paths of the modules called, in their order
        self._handles: list[Any] = []
        for unit in layout.units[:-1]:
            for path in layout.module_paths(unit):
                module = model.get_submodule(path)
                if compiled or module._compiled_call_impl is None:
                    hook = self._hook(unit, path)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _hook(self, unit: int, path: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._ran.append(path)
            tensors = [
                t
                for t in pytree.tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor) and t.requires_grad
            ]
            if not torch.is_grad_enabled():
                trains = unit >= self._boundary and path in self._layout.block_paths
                # a model may run a part of itself under no_grad by its own will
                if trains and not tensors and called_from(torch.utils.checkpoint.__file__):
                    raise RuntimeError(
                        f"{path} trains but runs without autograd above a frozen prefix, as "
                        "reentrant checkpointing makes it: pass use_reentrant=False"
                    )
                return
            for tensor in tensors:
                self._follow(tensor, unit, path)

        return check

    def _follow(self, tensor: torch.Tensor, unit: int, path: str) -> None:
        """Check every parameter that `tensor` depends on and that no earlier tensor did."""
        pending = [tensor.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            slot = self._slots.get(id(getattr(node, "variable", None)))
            if slot is not None and slot.units[0] > unit:
                raise UnsupportedModelError(self._explain(slot, unit, path))
            pending += [following for following, _ in node.next_functions]

    def _explain(self, slot: ParameterSlot, unit: int, path: str) -> str:
        layout = self._layout
        first, later = layout.unit_label(unit), layout.unit_label(slot.units[0])
        found = (
            f"{type(self._model).__name__}: {path} ({first}) is computed from {slot.name} "
            f"({later}), whose gradient freezing {first} would cut off"
        )
        return f"{found}; {cure_for(self._model, layout, slot, path, self._ran)}"
