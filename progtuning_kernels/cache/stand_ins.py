"""Takes modules out of one forward: in their places stand modules that return what is known.

Entries of the parents' `_modules` are exchanged and put back within one forward, so that classes,
instances and state dicts are never touched. A stand-in hands attribute reads on to its original:
code that reads `block.attention_type` on the way finds it. `recorded_levels.py` says what they
return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class UnservableError(ValueError):
    """The model's prefix cannot be left out; the message says why."""


class StopForward(Exception):
    """Ends a forward whose boundary activations are known."""


class StandIn(nn.Module):
    """Stands in the place of `original` and runs `run(original, args, kwargs)`."""

    def __init__(self, original: nn.Module, run: Run) -> None:
        super().__init__()
        self.training = original.training
        self.__dict__["_original"] = original  # no child: it keeps its own parent
        self.__dict__["_run"] = run
        first = next(original.parameters(), None)
        if first is not None:  # a model's dtype and device are those of the first that it finds
            self._parameters["first"] = first

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_original"], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # after a KeyboardInterrupt it may stand here still, and what a handler saves is whole
        return self._original.state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._original, args, kwargs)


@contextmanager
def output_handed_to(receive: Callable[[Any], None], module: nn.Module) -> Iterator[None]:
    """Hand what `module` returns to `receive`, once."""

    # a hook, as transformers 5.0 looks for blocks in their places where hidden states are asked for
    def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hook.remove()
        receive(output)

    hook = module.register_forward_hook(catch)
    try:
        yield
    finally:
        hook.remove()


class Swaps:
    """Stand-ins for modules of one model, by path."""

    def __init__(self, model: nn.Module, runs: Mapping[str, Run]) -> None:
        self._entries: list[tuple[dict[str, Any], str, nn.Module, StandIn]] = []
        for path, run in runs.items():
            parent, _, name = path.rpartition(".")
            modules = model.get_submodule(parent)._modules
            self._entries.append((modules, name, modules[name], StandIn(modules[name], run)))

    def install_stand_ins(self) -> None:
        for modules, name, _, stand_in in self._entries:
            modules[name] = stand_in

    def remove_stand_ins(self) -> None:
        """Put the originals back; calling it again does nothing."""
        for modules, name, original, stand_in in self._entries:
            if modules.get(name) is stand_in:
                modules[name] = original

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.install_stand_ins()
        try:
            yield
        finally:
            self.remove_stand_ins()


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states that a block is called with: its first tensor, or the one by that name."""
    named = kwargs.get("hidden_states")
    candidates = (*args, *([] if named is None else [named]), *kwargs.values())
    return next((value for value in candidates if isinstance(value, torch.Tensor)), None)


@dataclass(frozen=True)
class Structure:
    """How a module hands its hidden states on: alone, or at one place of a tuple or list."""

    kind: type | None  # `tuple`, `list`, or None for the tensor alone
    length: int = 1
    place: int = 0  # of the hidden states, the first tensor
    others: int = 0  # number of tensors at other places

    @classmethod
    def of(cls, output: Any) -> Structure | None:
        """None if there are no hidden states at any place that is known."""
        if isinstance(output, torch.Tensor):
            return cls(None)
        if type(output) not in (tuple, list):
            return None
        places = [i for i, item in enumerate(output) if isinstance(item, torch.Tensor)]
        if not places:
            return None
        others = sum(item is not None for item in output) - 1
        return cls(type(output), len(output), places[0], others)

    def hidden(self, output: Any) -> torch.Tensor:
        return output if self.kind is None else output[self.place]

    def wrap(self, hidden: torch.Tensor) -> Any:
        """The same structure around other hidden states; None at all other places."""
        if self.kind is None:
            return hidden
        return self.kind(hidden if i == self.place else None for i in range(self.length))
