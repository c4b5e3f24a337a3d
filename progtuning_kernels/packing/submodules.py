"""Sub-modules that run on padded tokens inside packed blocks, by hooks of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention import running_tokens
from .blocks import Place, output_at, value_at, with_outputs, with_values
from .tokens import take_places


@dataclass(frozen=True)
class PaddedRole:
    """Places of what is per token in a sub-module's arguments and in what it returns."""

    entering: frozenset[Place]
    returned: frozenset[Place]


def runs_padded(hook: Any) -> bool:
    """Whether a hook is one that `run_padded` installs."""
    return getattr(hook, "__module__", None) == __name__


def run_padded(module: nn.Module, role: PaddedRole) -> list[RemovableHandle]:
    """Hooks under which a sub-module of a packed block runs on padded tokens."""

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tokens = running_tokens()
        if tokens is None:
            return None
        changes = {}
        for place in role.entering:
            value = value_at(place, args, kwargs)
            if isinstance(value, Tensor):
                original = tokens.origins.get(id(value))
                if original is not None:
                    changes[place] = original[1]
                elif tokens.holds_packed(value):
                    changes[place] = tokens.pad(value)
        return with_values(changes, args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = running_tokens()
        if tokens is None:
            return None
        found = {}
        for place in role.returned:
            value = output_at(place, output)
            if tokens.holds_padded(value):
                found[place] = take_places(value, tokens.index)
        return with_outputs(found, output)

    return [
        module.register_forward_pre_hook(UncopiedHook(enter), with_kwargs=True),
        module.register_forward_hook(UncopiedHook(leave)),
    ]


class UncopiedHook:
    """Does nothing in a copy of the module, which is an ordinary one, and can be pickled."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_hook_of_a_copy, ())


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    pass
