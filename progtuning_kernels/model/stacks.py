"""Finds the stacks of a model: the lists that hold its blocks.

Discovery is structural. A stack is an outermost `nn.ModuleList` of blocks: the one that is as long
as the model's config says, or else every list whose items can be checkpointed (which is how
transformers marks its blocks), or else the only list of equal modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import Family, UnsupportedModelError

# Stacks that read what the others computed, wherever they are registered.
_RUNS_LAST = re.compile(r"(^|\.)(decoder|language_model|text_decoder|talker)(\.|$)")
LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


class UnknownBlocksError(UnsupportedModelError):
    """Which modules are the blocks was not found, or was named wrongly."""


@dataclass(frozen=True)
class Stack:
    """One list of blocks."""

    path: str  # qualified name of the list, e.g. "bert.encoder.layer"
    first: int  # number of its first block; blocks are numbered through all stacks
    length: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.length)


def _outermost_lists(model: nn.Module, depth: Any) -> dict[str, nn.Module]:
    """Every list that may hold blocks: module lists, or else sequences of equal modules."""
    found: dict[str, nn.Module] = {}
    equal: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path.startswith(outer + ".") for outer in (*found, *equal)):
            continue  # experts or branches inside a block
        items = list(module.children())
        if not path or not items or any(isinstance(item, LISTS) for item in items):
            continue  # a list of lists: no item has a forward of its own
        if not all(next(item.parameters(), None) is not None for item in items):
            continue
        if isinstance(module, nn.ModuleList):
            found[path] = module
        elif isinstance(module, nn.Sequential) and _one_class(module) and len(items) > 1:
            equal[path] = module
    deep = any(len(module) == depth for module in equal.values())
    return found or (equal if deep or _is_most(model, equal.values()) else {})


def parameter_count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _is_most(model: nn.Module, parts: Iterable[nn.Module]) -> bool:
    return 2 * parameter_count(parts) > parameter_count([model])


def _one_class(modules: nn.Module) -> bool:
    return len({type(module) for module in modules.children()}) == 1


def _in_order(paths: Sequence[str]) -> list[str]:
    return sorted(paths, key=lambda path: _RUNS_LAST.search(path) is not None)


def choose_stacks(model: nn.Module, families: Sequence[Family]) -> list[str]:
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    lists = _outermost_lists(model, depth)
    name = type(model).__name__
    for family in families:
        every = [p for p, m in model.named_modules() if isinstance(m, (*LISTS, nn.Sequential))]
        named = [p for end in family.blocks for p in every if f".{p}".endswith(f".{end}")]
        if named:
            return named
    if not lists:
        raise UnknownBlocksError(f"{name}: no list of blocks found (an nn.ModuleList of layers)")
    paired = bool(getattr(config, "is_encoder_decoder", False))
    # transformers' blocks can be checkpointed, and say so in their class
    marked = [
        p
        for p, m in lists.items()
        if all(hasattr(type(b), "gradient_checkpointing") for b in m.children())
    ]
    if isinstance(depth, int) and not paired:
        fitting = [p for p in (marked or lists) if len(lists[p]) == depth]
        if len(fitting) == 1 or (fitting and marked):
            return _in_order(fitting)
        if not fitting and len(lists) == 1:
            ((path, modules),) = lists.items()
            if not marked and len(modules) < depth and depth % len(modules) == 0:
                raise UnsupportedModelError(
                    f"{name}: its blocks share weights ({path} holds {len(modules)} "
                    f"module(s) for {depth} layers), so they cannot be frozen one by one; there is "
                    "no cure: a module that runs as several layers freezes as one"
                )
    if marked:
        return _in_order(marked)
    if len(lists) == 1 and _is_most(model, lists.values()):
        return list(lists)
    equal = [p for p, m in lists.items() if len(m) > 1 and _one_class(m)]
    if paired:
        sides = [
            [p for p in equal if re.search(rf"(^|\.){side}\.[^.]+$", p)]
            for side in ("encoder", "decoder")
        ]
        if [len(side) for side in sides] == [1, 1]:
            return [side[0] for side in sides]
    # stages, each a list of blocks: they run in their order, and so does what is made like them
    parents = {p.rpartition(".")[0] for p in lists}
    nested = [p for p in parents if isinstance(model.get_submodule(p), nn.ModuleList)]
    choices = [equal] if len(equal) == 1 else []
    if len(nested) == 1:
        inside = (m for p, m in lists.items() if p.startswith(f"{nested[0]}."))
        kinds = {type(block) for m in inside for block in m}
        choices.append([p for p, m in lists.items() if {type(b) for b in m} <= kinds])
    if choices:
        return max(choices, key=lambda paths: parameter_count(map(model.get_submodule, paths)))
    listing = ", ".join(f"{p} ({len(m)})" for p, m in lists.items())
    what = f"cannot tell which list holds the blocks among {listing}"
    if len(lists) == 1:
        what = f"its only list, {listing}, is the smaller part of it, so it may hold no blocks"
    raise UnknownBlocksError(f"{name}: {what}")


def _blocks_at(model: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    """Every list of blocks at `path`, with their paths; a module that is no list is a block."""
    module = model.get_submodule(path)
    # by their own names: a Sequential may have others than numbers
    inside = [f"{path}.{name}" for name in module._modules]
    if not isinstance(module, (*LISTS, nn.Sequential)):
        yield path, [path]
    elif any(isinstance(item, LISTS) for item in module.children()):
        for item in inside:
            yield from _blocks_at(model, item)
    elif inside:
        yield path, inside


def stacks_at(model: nn.Module, paths: Sequence[str]) -> tuple[list[Stack], list[str]]:
    """The stacks that `paths` name, and the paths of their blocks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    stacks: list[Stack] = []
    blocks: list[str] = []
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(
                "blocks= takes names of modules, such as 'encoder.layers', not a "
                f"{type(path).__name__}"
            )
        if path not in modules:
            raise UnknownBlocksError(f"{type(model).__name__} has no module at {path!r}")
        for found, inside in _blocks_at(model, path):
            stacks.append(Stack(found, len(blocks), len(inside)))
            blocks += inside
    names = list(paths)
    if len(blocks) < 2 and not (blocks and isinstance(modules[names[0]], (*LISTS, nn.Sequential))):
        what = f"a {type(modules[names[0]]).__name__}, not a list of blocks" if names else "nothing"
        raise UnknownBlocksError(f"blocks={names!r} is {what}")
    twice = [p for p in blocks if blocks.count(p) > 1 or any(p.startswith(f"{b}.") for b in blocks)]
    if twice:
        raise UnsupportedModelError(f"blocks={names!r} names {twice[0]} twice: name it once")
    return stacks, blocks
