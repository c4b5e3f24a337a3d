"""Watches forwards of models, and repeats them without a trace.

torch runs hooks in `module(...)` alone; SqueezeBERT, among others, goes past them by
`module.forward()`, which is watched here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

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


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer back afterwards, by object and by value."""
    kept = [
        (m._buffers, {name: (b, b.clone()) for name, b in m._buffers.items() if b is not None})
        for m in model.modules()
    ]
    try:
        yield
    finally:
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
