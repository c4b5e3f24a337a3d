"""Modules above the blocks that run on kept tokens alone, by hooks of theirs.

A head that sees every token (final norm and vocabulary, a masked language model's dense, norm and
decoder) is the largest matrix product of a small language model. It gets (B, T, C) and gives
(B, T, D) as ever; between its hooks it computes N places of B x T.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.derived_classes import base_of
from ..model.forward_hooks import foreign_hook, own_forward
from ..model.layout import Layout
from ..model.rows import only_routes
from .blocks import tokens_of
from .submodules import UncopiedHook

_ATTRIBUTE = "_progtuning_head_tokens"  # of a packed tensor that a head runs on
# Of a block's parameters that a head has at least, to be packed. With half of the places real,
# forward and backward of `nn.Linear` take 0.60 to 0.74 of their padded time from 0.08 on (CPU,
# widths 128 and 384), and more than all of it for a handful of labels; below 0.2 it is not 1 % of a
# step.
LEAST_SHARE = 0.2
# Of a batch's places: with more real tokens, unpacking what a head returns eats up what is saved.
# 4,000 outputs of a width of 128 take 0.88 of their padded time at 0.79, and 1.06 at 0.90.
MOST_REAL = 0.8


def run_head_packed(module: nn.Module) -> list[RemovableHandle]:
    """Hooks under which a module runs on kept tokens wherever the forward under way says so."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = tokens_of(module)
        if tokens is None or kwargs or len(args) != 1 or not tokens.holds_padded(args[0]):
            return None  # among these a part of the rows or columns, as `logits_to_keep` takes it
        if args[0].device != tokens.index.device or reason_for_padding(module) is not None:
            return None
        packed = tokens.pack(args[0])
        setattr(packed, _ATTRIBUTE, tokens)
        return (packed,), kwargs

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tokens = getattr(args[0], _ATTRIBUTE, None) if args else None
        if tokens is None:
            return None
        delattr(args[0], _ATTRIBUTE)
        return tokens.unpack(output)

    return [
        module.register_forward_pre_hook(UncopiedHook(enter), with_kwargs=True),
        module.register_forward_hook(UncopiedHook(leave)),
    ]


def reason_for_padding(module: nn.Module) -> str | None:
    """Why a head gets padding though its forward is packed, None if it does not."""
    for part in module.modules():
        swapped = base_of(type(part)) is not None and not only_routes(type(part))
        if isinstance(part, nn.Linear) and swapped:
            return "its logits are computed where they are read"  # see swaps/deferred_logits.py
        if own_forward(part) is not None:
            return "it has a forward of its own"
    if (source := foreign_hook(module)) is not None:
        return f"a hook of {source} would see packed tokens"
    return None


class HeadsSeen:
    """Modules of the head unit that get one tensor (B, T, C), once, and return one (B, T, D)."""

    def __init__(self, model: nn.Module, layout: Layout, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks
        self._modules = {
            path: module
            for root in layout.module_paths(layout.head)
            for path, module in model.get_submodule(root).named_modules(prefix=root)
            if _size(module) >= LEAST_SHARE * _size(model.get_submodule(layout.block_paths[-1]))
        }
        self._calls: dict[str, list[str | None]] = {path: [] for path in self._modules}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for path, module in self._modules.items():
                hook = module.register_forward_hook(self._noting(path), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _noting(self, path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ends = (*args, *kwargs.values(), output)
            per_token = (
                len(args) == 1
                and not kwargs
                and all(isinstance(x, Tensor) and x.ndim == 3 for x in ends)
            )
            names = (n for n, m in self._masks.items() if all(x.shape[:2] == m.shape for x in ends))
            self._calls[path].append(next(names, None) if per_token else None)

        return note

    def of_mask(self, name: str) -> tuple[str, ...]:
        """The outermost of these modules whose tokens are those of one mask."""
        found: list[str] = []
        for path, calls in self._calls.items():  # a module comes before its parts
            if calls == [name] and not any(path.startswith(f"{outer}.") for outer in found):
                found.append(path)
        return tuple(found)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
