"""Watches forwards of models, and repeats them without a trace.

torch runs hooks in `module(...)` alone; SqueezeBERT, among others, goes past them by
`module.forward()`, which is watched here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_PLAIN = (FunctionType, MethodType, partial)  # forwards that keep nothing from call to call
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any], None]


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Tensors in a module's inputs or output, and in objects unknown to pytree, `depth` deep."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()), depth - 1)
        elif depth and is_dataclass(leaf) and not isinstance(leaf, type):
            own = [getattr(leaf, field.name, None) for field in fields(leaf)]
            yield from tensors_in(own, depth - 1)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            yield from tensors_in(list(vars(leaf).values()), depth - 1)


def with_own_containers(value: Any, *, clone: bool = False) -> Any:
    """Copies of all containers, into which models write; of the tensors too if `clone`."""
    if isinstance(value, torch.Tensor):
        return value.clone() if clone else value
    if isinstance(value, tuple):
        items = [with_own_containers(item, clone=clone) for item in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, MutableMapping | list):
        pairs = list(value.items() if isinstance(value, MutableMapping) else enumerate(value))
        value = copy.copy(value)
        for key, item in pairs:
            value[key] = with_own_containers(item, clone=clone)
    return value


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer back afterwards, by object and by value, and what an object that stands in
    the place of a `forward` has noted: sentence-transformers' MatryoshkaLoss counts forwards there.
    """
    kept = [
        (m._buffers, {name: (b, b.clone()) for name, b in m._buffers.items() if b is not None})
        for m in model.modules()
    ]
    forwards = [vars(own) for m in model.modules() if (own := forward_object(m)) is not None]
    noted = [with_own_containers(attributes) for attributes in forwards]
    try:
        yield
    finally:
        for attributes, before in zip(forwards, noted, strict=True):
            attributes.clear()
            attributes.update(before)
        with torch.no_grad():
            for buffers, before in kept:
                for name, (buffer, values) in before.items():
                    buffers[name] = buffer
                    # compared: batch norm writes without a new version, and a copy makes one
                    if not (buffer.is_meta or torch.equal(buffer, values)):
                        buffer.copy_(values)


class ForwardHooks:
    """Calls `before(module, args, kwargs)` and `after(module, output)` until `remove()`: as hooks
    where the module is called, from a `forward` of the instance where that is called alone.
    """

    def __init__(self, module: nn.Module, before: Before, after: After | None = None) -> None:
        self._module, self._before, self._after = module, before, after
        self._hooks = [module.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if after is not None:
            self._hooks.append(module.register_forward_hook(self._leave))
        self._called = False  # through the hooks: `forward` has nothing to watch then
        self._own = module.__dict__.get("forward")
        self._replacement = self._forward
        module.__dict__["forward"] = self._replacement

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        # transformers 5.0 puts back what it found there, perhaps a forward of its own
        if self._module.__dict__.get("forward") is self._replacement:
            del self._module.__dict__["forward"]
            if self._own is not None:
                self._module.__dict__["forward"] = self._own

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called = True
        self._before(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._after(module, output)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        run = self._own or type(module).forward.__get__(module)
        if self._called:
            self._called = False
            return run(*args, **kwargs)
        self._before(module, args, kwargs)
        output = run(*args, **kwargs)
        if self._after is not None:
            self._after(module, output)
        return output


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A `forward` in the instance itself, as accelerate gives one; none of `ForwardHooks`."""
    forward = module.__dict__.get("forward")
    while isinstance(hooks := getattr(forward, "__self__", None), ForwardHooks):
        forward = hooks._own
    return forward


def forward_object(module: nn.Module) -> Any:
    """What stands in the place of `forward` in the instance, if it is an object with attributes."""
    own = own_forward(module)
    return None if isinstance(own, _PLAIN) or not hasattr(own, "__dict__") else own


def foreign_hook(module: nn.Module) -> str | None:
    """Where a hook inside a module comes from, if it is not known to do with any shape."""
    for part in module.modules():
        kinds = (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
        for hook in chain.from_iterable(hooks.values() for hooks in kinds):
            source = getattr(hook, "__module__", None) or type(hook).__module__
            if source.split(".")[0] not in ("torch", "transformers", __name__.split(".")[0]):
                return source
    return None
