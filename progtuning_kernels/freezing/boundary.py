"""Runs the prefix without autograd.

A block below the boundary is switched, per instance, to one fixed subclass of its own class whose
`forward` runs under `torch.no_grad()`: autograd then has nothing below block k, whatever the caller
did above or before. README.md says why classes are flipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from torch import nn

from ..graphs import graph_members
from ..model.derived_classes import derive, derived_classes, without_derived_ancestors
from ..model.layout import EMBEDDINGS, Layout
from ..packing import blocks as packed_blocks

FrozenMode = Literal["eval", "train"]

# Mode last asked for by `.train(mode)` while the module was held in eval; read when it thaws.
_requested_mode: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_unfrozen: dict[type, type] = {}  # class made here: the one that it was made from


def _hiding(name: str, value: Callable[[Any], Any]) -> property:
    """A property that hides, and keeps, what the instance's `__dict__` has under this name."""
    return property(value, lambda self, given: self.__dict__.__setitem__(name, given))


def _unfrozen_class(module: nn.Module) -> type:
    """The module's class without those derived in this file."""
    cls = without_derived_ancestors(type(module))
    return _unfrozen.get(cls, cls)


def frozen_class(
    base: type,
    *,
    no_grad: bool,
    hold_eval: bool,
    own_forward: bool,
    packs: bool = False,
    graphed: bool = False,
) -> type:
    """One fixed subclass of `base` per combination of flags; `base` itself without a flag.

    Args:
        no_grad: `forward` runs under `torch.no_grad()`, and is never checkpointed.
        hold_eval: `train(True)`, as the Trainer calls it before every step, leaves eval mode on.
        own_forward: the instance has a `forward` of its own, as accelerate gives to the modules of
            a model spread over devices; `no_grad` then surrounds the whole call.
        packs: the block runs packed wherever the forward under way does.
        graphed: the block asks whether a captured graph runs it.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            output = base.forward(self, *args, **kwargs)
        return output if torch.compiler.is_compiling() else _writable(output)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return base.__call__(self, *args, **kwargs)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        _requested_mode[self] = mode
        _hold_eval(self, base, mode)
        return self

    if not (no_grad or hold_eval or packs or graphed):
        return base
    members: dict[str, Any] = {}
    if no_grad:
        members["__call__" if own_forward else "forward"] = call if own_forward else forward
        if hasattr(base, "gradient_checkpointing"):
            members["gradient_checkpointing"] = _hiding("gradient_checkpointing", lambda _: False)
    if hold_eval:
        members["train"] = train
    if packs:
        members |= packed_blocks.members(base, members.get("forward", base.forward))
    if graphed and not own_forward:
        members |= graph_members(base, "run_block", members.get("forward"))
    made = derive(base, ("frozen", no_grad, hold_eval, own_forward, packs, graphed), members)
    if packs and not no_grad and made not in _unfrozen:
        packed_blocks.checkpointed(made)
    _unfrozen[made] = base
    return made


def _writable(output: Any) -> Any:
    # wav2vec2 writes its mask vector, which trains, into the features: autograd forbids that for a
    # view made under `no_grad`
    if isinstance(output, torch.Tensor):
        return output.detach() if output._is_view() else output
    return tuple(map(_writable, output)) if type(output) is tuple else output


def _hold_eval(module: nn.Module, base: type, mode: bool) -> None:
    """Set eval mode, except on embeddings whose mode only says whether NEFTune adds its noise."""
    base.train(module, False)
    for inner in module.modules():
        if "neftune_noise_alpha" in inner.__dict__:
            inner.training = mode


def _padded_class(base: type) -> type:
    """A subclass of `nn.TransformerEncoder` that makes no nested tensors while a layer trains.

    The original decides by the first layer, which may be frozen alone.
    """

    def use_nested_tensor(self: Any) -> bool:
        trains = self.training or (
            torch.is_grad_enabled() and any(p.requires_grad for p in self.layers.parameters())
        )
        return self.__dict__["use_nested_tensor"] and not trains

    made = derive(
        base, "padded", {"use_nested_tensor": _hiding("use_nested_tensor", use_nested_tensor)}
    )
    _unfrozen[made] = base
    return made


def _drop_own_forward(module: nn.Module) -> None:
    """Remove an instance `forward` that is a class's own, bound: transformers 5.0 leaves one after
    capturing hidden states, which would outlive the flips, so that a thawed block never trained.
    """
    own = module.__dict__.get("forward")
    if getattr(own, "__self__", None) is module and any(
        vars(cls).get("forward") is own.__func__
        for cls in {*type(module).__mro__, *derived_classes()}
    ):
        del module.__dict__["forward"]


class Boundary:
    def __init__(self, model: nn.Module, layout: Layout, frozen_mode: FrozenMode) -> None:
        self._model = model
        self._layout = layout
        self._hold_eval = frozen_mode == "eval"
        self._placed: dict[nn.Module, tuple[bool, bool]] = {}
        holders = (model.get_submodule(s.path.rpartition(".")[0]) for s in layout.stacks)
        self._encoders = [m for m in holders if "use_nested_tensor" in m.__dict__]
        self._modes: dict[nn.Module, list[tuple[nn.Module, bool]]] = {}
        self._packed: frozenset[nn.Module] = frozenset()  # blocks that can run packed
        self._graphed: frozenset[nn.Module] = frozenset()  # blocks that ask their graphs

    def place_modules(self, frozen: Collection[int], boundary: int) -> None:
        """Put every module on its side: `frozen` are the units that hold no active tensor, those
        below `boundary` run under `no_grad`.
        """
        sides: dict[nn.Module, tuple[bool, bool]] = {}  # without autograd; in eval mode
        # the head runs after everything that trains: nothing is gained by holding its mode
        for unit in self._layout.units[:-1]:
            for path in self._layout.module_paths(unit):
                # those of a decoder run after blocks that may be trainable
                no_grad = unit in frozen if unit == EMBEDDINGS else unit < boundary
                hold_eval = unit in frozen and self._hold_eval
                sides[self._model.get_submodule(path)] = no_grad, hold_eval
        # modules that have left the model in the meantime go back to their own class
        self._put_back(module for module in self._placed if module not in sides)
        self._placed = sides
        for module, (no_grad, hold_eval) in sides.items():
            self._switch(module, no_grad=no_grad, hold_eval=hold_eval)
        self._pad(bool(frozen))

    def pack_blocks(self, blocks: Collection[nn.Module]) -> None:
        """Put these blocks, and no others, into the class that can run packed."""
        before, self._packed = self._packed, frozenset(blocks)
        self._switch_again(before ^ self._packed)

    def graph_blocks(self, blocks: Collection[nn.Module]) -> None:
        """Put these blocks, and no others, into the class whose forward a graph may run."""
        before, self._graphed = self._graphed, frozenset(blocks)
        self._switch_again(before ^ self._graphed)

    def _switch_again(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            no_grad, hold_eval = self._placed.get(module, (False, False))
            self._switch(module, no_grad=no_grad, hold_eval=hold_eval)

    def restore_modules(self) -> None:
        """Put every module back as it was found, except for modes asked for in the meantime."""
        self._put_back(self._placed)
        self._placed = {}
        self._pad(False)

    def _pad(self, on: bool) -> None:
        for encoder in self._encoders:
            base = _unfrozen_class(encoder)
            encoder.__class__ = _padded_class(base) if on else base

    def _put_back(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._switch(module, no_grad=False, hold_eval=False)

    def _switch(self, module: nn.Module, *, no_grad: bool, hold_eval: bool) -> None:
        base = _unfrozen_class(module)
        if hold_eval and module not in self._modes:
            self._modes[module] = [(m, m.training) for m in module.modules()]
            _requested_mode.pop(module, None)
            _hold_eval(module, base, module.training)
        _drop_own_forward(module)
        own_forward = no_grad and "forward" in module.__dict__
        flags = dict(no_grad=no_grad, hold_eval=hold_eval, own_forward=own_forward)
        target = frozen_class(
            base, **flags, packs=module in self._packed, graphed=module in self._graphed
        )
        if type(module) is not target:
            module.__class__ = target
        if not hold_eval and module in self._modes:
            modes = self._modes.pop(module)
            requested = _requested_mode.pop(module, None)
            if requested is None:
                for m, mode in modes:
                    m.training = mode
            else:
                module.train(requested)
