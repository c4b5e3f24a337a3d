"""Proves in one training forward that freezing from the bottom cuts off nothing that still trains.

The inputs of every unit are followed through the autograd graph down to the parameters that they
are computed from. README.md says what could be cut off otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ..distributed import forms_of_shards
from ..model.call_stack import called_from
from ..model.cures import cure_for
from ..model.families import UnsupportedModelError, register_call
from ..model.forward_hooks import ForwardHooks, tensors_in
from ..model.layout import EMBEDDINGS, Layout, parameter_slots
from ..model.rows import trained_by_rows


class GradientPaths:
    """Watches the modules of one model during one forward.

    Args:
        no_grad: units that run without autograd.
        freezes: units that are frozen now or will be.
        inputs: the model's arguments.
        compiled: watch compiled modules too. Only for a forward that is forced to run eagerly:
            another one would compile the hooks into its graph, where they stay.

    Raises (from the forward that is watched, or from `finish`):
        UnsupportedModelError: a unit is computed from a parameter of a later unit, or from one that
            the model does not hold; embeddings that no unit is computed from.
        RuntimeError: blocks that train are checkpointed by the reentrant variant above a frozen
            prefix, which trains nothing; an input wants a gradient that is cut off.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        *,
        no_grad: Collection[int],
        freezes: Collection[int],
        inputs: Any = (),
        compiled: bool = False,
    ) -> None:
        self._model = model
        self._layout = layout
        self._no_grad = no_grad
        self._freezes = freezes
        self._slots = {id(slot.parameter): slot for slot in parameter_slots(model, layout)}
        # fully_shard puts other tensors in the places of parameters for as long as a block runs
        self._forms: dict[int, int] = {}  # id of each to that of the one which was there first
        self._note_forms()  # the shards among fewer ranks that are there now are gone by then
        self._unruled = {id(p): name for name, p in layout.unruled(model).items()}
        self._checked: dict[Any, int] = {}  # lowest unit that a node was followed for
        self._readers: dict[int, int] = {}  # lowest unit computed from a parameter, by its id
        self._given = {id(leaf) for leaf in _leaves(tensors_in(inputs))}
        self._ran: list[str] = []  # paths of the modules called, in their order
        self._hooks: list[ForwardHooks] = []
        self._blind = False
        for unit in layout.units[:-1]:
            for path in layout.module_paths(unit):
                module = model.get_submodule(path)
                if compiled or module._compiled_call_impl is None:
                    check = partial(self._before_module, unit, path)
                    self._hooks.append(ForwardHooks(module, check))
                else:
                    self._blind = True

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._checked.clear()

    def finish(self, output: Any) -> bool:
        """Write the units of bare parameters into `layout.found`; whether any has changed."""
        self._refuse_other_uses(output)
        found = self._layout.found
        before = dict(found)
        for key, name in self._unruled.items():
            reader = self._readers.get(key)
            if reader is not None:
                first = EMBEDDINGS if reader == 0 else reader
                found[name] = min(found.get(name, first), first)
            elif self._blind:  # its readers may be compiled, and unseen: as registered
                found.pop(name, None)
        self._refuse_late_embeddings(output)
        return found != before

    def _refuse_other_uses(self, output: Any) -> None:
        """Of tensors of which rows train: uses that give these no gradient."""
        rows = {k: s for k, s in self._slots.items() if trained_by_rows(s.owner, s.attribute)}
        for leaf in _leaves(tensors_in(output)) if rows else ():
            if (slot := rows.get(self._key_of(leaf))) is not None:
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: {slot.name} is used by other code than lookups "
                    "and linear layers of the modules that hold it, where its rows get no "
                    "gradient: train it as a whole, without rows"
                )

    def _refuse_late_embeddings(self, output: Any) -> None:
        if EMBEDDINGS not in self._freezes or self._blind:
            return
        for leaf in _leaves(tensors_in(output), self._checked):
            key = self._key_of(leaf)
            slot = self._slots.get(key)
            if slot is None or key in self._unruled or key in self._readers:
                continue
            if slot.units == (EMBEDDINGS,):
                pattern = rf"^{re.escape(slot.name.rpartition('.')[0])}\."
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: no block is computed from {slot.name}, which "
                    "would stop training with the embeddings all the same; call "
                    f"{register_call(self._model, 'head', pattern)} before patching"
                )

    def _before_module(
        self, unit: int, path: str, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._ran.append(path)
        tensors = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        trains = unit not in self._no_grad and path in self._layout.block_paths
        # without the checkpoint, it is the model that runs a part of itself under no_grad
        reentrant = not torch.is_grad_enabled() and called_from(torch.utils.checkpoint.__file__)
        if torch.is_grad_enabled() or reentrant:
            for leaf in _leaves(tensors, self._checked, unit):
                self._check(leaf, unit, path)
        if trains and not tensors and reentrant:
            raise RuntimeError(
                f"{path} trains but runs without autograd above a frozen prefix, as "
                "reentrant checkpointing makes it: pass use_reentrant=False"
            )

    def _key_of(self, leaf: torch.Tensor) -> int:
        if id(leaf) not in self._slots and id(leaf) not in self._forms:
            self._note_forms()  # some are made as blocks run
        return self._forms.get(id(leaf), id(leaf))

    def _note_forms(self) -> None:
        for forms in forms_of_shards(self._model):
            for key in {id(p) for p in forms} & self._slots.keys():
                self._forms.update((id(p), key) for p in forms)

    def _check(self, leaf: torch.Tensor, unit: int, path: str) -> None:
        """`path`, a module of `unit`, is computed from `leaf`, a parameter or another tensor."""
        key = self._key_of(leaf)
        slot = self._slots.get(key)
        label = self._layout.unit_label(unit)
        if slot is not None:
            self._readers[key] = min(unit, self._readers.get(key, unit))
            if key not in self._unruled and slot.units[0] > unit:
                later = self._layout.unit_label(slot.units[0])
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: {path} ({label}) is computed from {slot.name} "
                    f"({later}), whose gradient freezing {label} would cut off; "
                    f"{cure_for(self._model, self._layout, slot, path, self._ran)}"
                )
            return
        if isinstance(leaf, nn.Parameter) and unit in self._freezes:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: {path} ({label}) is computed from a parameter of "
                f"shape {tuple(leaf.shape)} that is none of the model's, whose gradient freezing "
                f"{label} would cut off; patch a module that holds both"
            )
        if id(leaf) in self._given and unit in self._no_grad:
            raise RuntimeError(
                f"{path} ({label}) is frozen and cuts off the gradient of an input of shape "
                f"{tuple(leaf.shape)} that requires grad: detach the input, or run this forward "
                "after handle.unpatch()"
            )


def _leaves(
    tensors: Iterable[torch.Tensor], checked: dict[Any, int] | None = None, unit: int = 0
) -> Iterator[torch.Tensor]:
    """Leaves that require grad and that `tensors`, of unit `unit`, are computed from, or are.

    `checked` keeps the autograd nodes followed so far, with the lowest unit that it was done for.
    """
    checked = {} if checked is None else checked
    pending = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            pending.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    while pending:
        node = pending.pop()
        if checked.get(node, unit + 1) <= unit:
            continue
        checked[node] = unit
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        pending += [following for following, _ in node.next_functions if following is not None]
