"""What is per token in the calls of one stack's blocks, seen in a padded forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layout import Layout
from ..model.stacks import Stack
from .attention import CallsSeen, UnpackableError, names_attention
from .blocks import BlockRole, Place, output_places, places_of
from .recipes import StackRecipe
from .submodules import PaddedRole

_MOST_PADDED = 0.9  # share of a block's parameters in sub-modules that run padded


class Recording:
    """What is per token in the calls of one stack's blocks and their sub-modules."""

    def __init__(
        self, model: nn.Module, layout: Layout, stack: Stack, masks: Mapping[str, Tensor]
    ) -> None:
        self._stack = stack
        self._masks = masks
        self.seen = CallsSeen()
        self._blocks = {p: model.get_submodule(p) for p in layout.block_paths[: stack.blocks.stop]}
        self._blocks = {p: self._blocks[p] for i, p in enumerate(self._blocks) if i in stack.blocks}
        self._order: list[str] = []
        self._mask = ""  # name of the stack's
        self._roles: dict[str, BlockRole] = {}
        self._problem = ""
        self._whole: dict[str, dict[int, Tensor]] = {}  # what blocks got that is not per token
        self._entered: dict[str, frozenset[Place]] = {}
        self._got_whole: set[str] = set()  # sub-modules that got such, with what is per token
        self._returned: dict[str, frozenset[Place]] = {}
        self._inside: list[str] = []  # blocks under way

    @property
    def attention_modules(self) -> list[nn.Module]:
        return [m for block in self._blocks.values() for m in block.modules() if names_attention(m)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for path, block in self._blocks.items():
                for name, module in block.named_modules(prefix=path):
                    enter = self._enter_block if name == path else self._enter_part
                    leave = self._leave_block if name == path else self._leave_part
                    hooks.callback(
                        module.register_forward_pre_hook(
                            _with_path(enter, name), with_kwargs=True
                        ).remove
                    )
                    hooks.callback(module.register_forward_hook(_with_path(leave, name)).remove)
            yield

    def _enter_block(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append(path)
        if path in self._order:
            self._problem = "a block runs twice in a forward"
            return
        self._order.append(path)
        places = list(places_of(args, kwargs))
        place, hidden = next(
            ((at, value) for at, value in places if value.ndim > 2 and value.is_floating_point()),
            ((), None),
        )
        shape = hidden.shape[:2] if hidden is not None else None
        name = next((n for n, mask in self._masks.items() if mask.shape == shape), None)
        if name is None:
            self._problem = "no mask of the batch has the shape of its hidden states"
            return
        if self._mask not in ("", name):
            self._problem = "its blocks run on rows of different lengths"
        self._mask = name
        mask = self._masks[name]
        per_token = {at for at, value in places if at != place and _is_per_token(value, mask)}
        self._whole[path] = {
            id(value): value for at, value in places if at != place and at not in per_token
        }
        self._roles[path] = BlockRole(place, frozenset(per_token), last=False)

    def _leave_block(self, path: str, output: Any) -> None:
        self._inside.pop()
        if path not in self._roles:
            return
        mask = self._masks[self._mask]
        returned = {
            at
            for at, value in output_places(output)
            if value.ndim > 2 and value.shape[:2] == mask.shape
        }
        self._roles[path] = replace(self._roles[path], returned=frozenset(returned))

    def _enter_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = self._whole.get(self._inside[-1]) if self._inside else None
        if whole is None:
            return
        places, mask = list(places_of(args, kwargs)), self._masks[self._mask]
        entered = {
            at
            for at, value in places
            if id(value) not in whole and value.ndim > 1 and _like(value, mask)
        }
        if entered and any(id(value) in whole for _, value in places):
            self._got_whole.add(path)
        self._entered[path] = self._entered.get(path, frozenset()) | entered

    def _leave_part(self, path: str, output: Any) -> None:
        if path not in self._entered:
            return
        mask = self._masks[self._mask]
        returned = {
            at
            for at, value in output_places(output)
            if value.ndim > 2 and value.shape[:2] == mask.shape
        }
        self._returned[path] = self._returned.get(path, frozenset()) | returned

    def recipes(self) -> Iterator[StackRecipe]:
        """Ways to run the stack packed, the best first; raises `UnpackableError` for none.

        Padded are queries, keys and values in an attention function that is looked up, elsewhere
        the smallest sub-modules that get what the block got for the whole batch, its mask among it;
        then these, and whole attention modules in place of the function that they look up.
        """
        if self._problem or set(self._order) != set(self._blocks):
            raise UnpackableError(self._problem or "not every block runs in a forward")
        if (limited := self._limits_tokens()) is not None:
            raise UnpackableError(
                f"{limited} leaves tokens out by how many stand before them, padding among these"
            )
        names = {
            id(module): name
            for path, block in self._blocks.items()
            for name, module in block.named_modules(prefix=path)
        }
        calling = {names[key] for key in self.seen.modules if key in names}
        cross = frozenset(self.seen.cross)
        roles = {
            path: replace(role, last=path == self._order[-1], cross=cross)
            for path, role in self._roles.items()
        }
        for left, whole in ((calling, set()), (set(), calling)):
            parts = self._padded_parts(left, whole & self._got_whole)
            yield StackRecipe(self._mask, roles, tuple(sorted(left)), parts, heads=self.seen.heads)

    def _limits_tokens(self) -> str | None:
        """The class of a module with a capacity for tokens, as routers of experts have: in the few
        short rows of a trial none is full.
        """
        for block in self._blocks.values():
            for module in block.modules():
                held = vars(module).items()
                if any("capacity" in name and type(value) is int and value for name, value in held):
                    return type(module).__name__
        return None

    def _padded_parts(self, left: set[str], whole: set[str]) -> dict[str, PaddedRole]:
        """Sub-modules to run padded: those in `whole`, and the smallest outside of them, none with
        one of those in `left` inside.
        """
        reached = {p for p in self._got_whole - left if not _is_inside(p, whole)}
        smallest = {
            path
            for path in reached
            if path in whole or not any(_is_inside(p, {path}) for p in reached | left)
        }
        for path, block in self._blocks.items():
            inside = [
                block.get_submodule(p.removeprefix(f"{path}."))
                for p in smallest
                if p.startswith(f"{path}.")
            ]
            held = sum(p.numel() for m in inside for p in m.parameters())
            if inside and held > _MOST_PADDED * sum(p.numel() for p in block.parameters()):
                raise UnpackableError(
                    f"{type(block).__name__} would run on padding with nearly all its parameters"
                )
        return {
            p: PaddedRole(self._entered[p], self._returned.get(p, frozenset())) for p in smallest
        }


def _with_path(function: Callable[..., None], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, last: Any) -> None:  # kwargs before, the output after
        if function.__name__.startswith("_enter"):
            function(path, args, last)
        else:
            function(path, last)

    return hook


def _is_inside(path: str, others: Collection[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _like(value: Tensor, mask: Tensor) -> bool:
    """Whether a tensor is (B, T, ...), or (1, T, ...)."""
    return value.shape[0] in (1, mask.shape[0]) and value.shape[1:2] == mask.shape[1:]


def _is_per_token(value: Tensor, mask: Tensor) -> bool:
    """Whether it says something of every token, and is no mask."""
    if value.ndim < 2 or not _like(value, mask) or mask.shape[1] in value.shape[2:]:
        return False
    if value.shape != mask.shape:
        return True
    if value.unique().numel() > 2 and not bool((value == mask).all()):
        return True  # ids of words, 0 at padding
    return not any(torch.equal(mask != 0, pattern) for pattern in (value != 0, value == 0))
