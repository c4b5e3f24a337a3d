"""How a stack runs packed, and what is put into a model for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch import nn

from .attention import own_name, redirect, restore
from .blocks import BlockRole, PackedCall
from .heads import run_head_packed
from .submodules import PaddedRole, run_padded
from .tokens import PackedTokens

_ABOVE = BlockRole((0,), frozenset(), last=True)


@dataclass(frozen=True)
class StackRecipe:
    """How the blocks of one stack run packed."""

    mask: str  # name of the argument that says which tokens are real
    roles: Mapping[str, BlockRole]  # by path of the block
    attention: tuple[str, ...]  # paths of the modules whose attention function is ours
    padded: Mapping[str, PaddedRole]  # sub-modules that run on padded tokens
    columns: tuple[int, ...] = ()  # which the head reads, padding or not
    grouped: bool = False
    heads: int = 1  # of its attention
    # modules above the blocks that could run packed, by path: why one does not, "" if it does
    above: Mapping[str, str] = field(default_factory=dict)


class Installed:
    """What packing has put into a model; `remove` takes it out."""

    def __init__(
        self,
        model: nn.Module,
        recipes: Mapping[str, StackRecipe],
        place: Callable[[Collection[nn.Module]], None],
    ) -> None:
        self.recipes = recipes
        self._place = place
        self._roles = {
            stack: {model.get_submodule(path): role for path, role in recipe.roles.items()}
            for stack, recipe in recipes.items()
        }
        self._attention = [
            model.get_submodule(path) for recipe in recipes.values() for path in recipe.attention
        ]
        self._hooks = [
            hook
            for recipe in recipes.values()
            for path, role in recipe.padded.items()
            for hook in run_padded(model.get_submodule(path), role)
        ]
        self._above = {
            stack: [model.get_submodule(p) for p, against in recipe.above.items() if not against]
            for stack, recipe in recipes.items()
        }
        for module in chain.from_iterable(self._above.values()):
            self._hooks += run_head_packed(module)
        self._names = list(map(own_name, self._attention))
        for module in self._attention:
            redirect(module)
        place([block for roles in self._roles.values() for block in roles])

    def calls(
        self, stack: str, tokens: PackedTokens, *, above: bool = True
    ) -> dict[int, PackedCall]:
        """Calls of the blocks of one stack, and of what is `above` them, by id."""
        grouped = self.recipes[stack].grouped
        calls = {
            id(block): PackedCall(role, tokens, grouped)
            for block, role in self._roles[stack].items()
        }
        if above:
            alone = PackedCall(_ABOVE, tokens, grouped=False)
            calls |= {id(module): alone for module in self._above[stack]}
        return calls

    def is_outdated(self) -> bool:
        """Whether the model calls another attention function than when it was tried."""
        return self._names != list(map(own_name, self._attention))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._attention:
            restore(module)
        self._place(())
