"""Finds the call that helps where a forward runs the units in another order than registered.

The model is cut once more with each; one that puts the two modules in the right order is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import nn

from .families import FAMILIES, Family, UnsupportedModelError, joined, kind_of, register_call
from .layout import Layout, ParameterSlot, find_layout, parameter_slots


def cure_for(
    model: nn.Module, layout: Layout, slot: ParameterSlot, path: str, ran: Sequence[str]
) -> str:
    """What keeps freezing the unit of `path` from cutting off `slot`, which it is computed from.

    `ran` are the modules that the forward has called, in their order; `path` is the last.
    """
    blocks, owner = layout.block_paths, layout.module_of(slot.name)
    again = path in ran[:-1]
    if again and path in blocks and owner in blocks:
        return f"there is no cure: {path} runs more than once in a forward, so it freezes too early"
    stacks = [stack.path for stack in layout.stacks]
    for rule, pattern in _rules(layout, slot, path, ran):
        kind = kind_of(model)
        family = joined(FAMILIES.get(kind, Family()), {rule: pattern})
        found = find_layout(model, stacks, rules={kind: family})
        if rule == "after" and found.unit_of_module(path) != _last_run(layout, ran):
            continue
        if _agrees(model, found, slot, path):
            return f"call {register_call(model, rule, pattern)} before patching"
    for order in _orders(layout, slot, path, ran):
        try:
            found = find_layout(model, order)
        except UnsupportedModelError:  # a block inside a block
            continue
        if _agrees(model, found, slot, path):
            what = "block lists" if set(order) == set(stacks) else "blocks"
            return f"name the {what} in the order in which they run: blocks={order}"
    return "there is no cure: no rule puts these two in that order"


def _agrees(model: nn.Module, layout: Layout, slot: ParameterSlot, path: str) -> bool:
    unit = layout.unit_of_module(path)  # None: it is not frozen as a whole
    again = next(s for s in parameter_slots(model, layout) if s.parameter is slot.parameter)
    return unit is None or again.units[0] <= unit


def _rules(
    layout: Layout, slot: ParameterSlot, path: str, ran: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Rules that may help, the likeliest first."""
    blocks, owner = layout.block_paths, layout.module_of(slot.name)
    itself = rf"^{re.escape(path)}\."
    over = blocks[-1] in ran  # all blocks have run before
    if path not in blocks:
        if path in ran[:-1]:  # used early and late: its parameters alone, not what it computes
            yield "embeddings", rf"^{re.escape(path)}\..*[^.]$"
        elif over:
            yield "head", itself
    if owner not in blocks:
        modules = () if owner is None else (owner, slot.name.rpartition(".")[0])
        for name in dict.fromkeys(modules):
            yield "embeddings", rf"^{re.escape(name)}\."
        yield "embeddings", f"^{re.escape(slot.name)}$"
    elif path not in blocks and not over:
        yield "after", itself


def _last_run(layout: Layout, ran: Sequence[str]) -> int:
    return max((i for i, path in enumerate(layout.block_paths) if path in ran), default=0)


def _orders(
    layout: Layout, slot: ParameterSlot, path: str, ran: Sequence[str]
) -> Iterator[list[str]]:
    """Orders of lists and of blocks that may help, the simplest first."""
    blocks, owner = list(layout.block_paths), layout.module_of(slot.name)
    if path not in blocks:  # a block of its own, in the middle
        last = _last_run(layout, ran) + 1
        yield [*blocks[:last], path, *blocks[last:]]
        return
    if owner is None:
        return
    if owner not in blocks:
        at = blocks.index(path)
        yield [*blocks[:at], owner, *blocks[at:]]
        return
    stack_of = {blocks[i]: stack for stack in layout.stacks for i in stack.blocks}
    first = {name: -i for i, name in enumerate(reversed(ran))}  # the first call counts
    called = sorted((b for b in blocks if b in first), key=first.__getitem__)
    runs = [stack for stack, _ in groupby(called, key=stack_of.__getitem__)]
    lists = list(dict.fromkeys([*runs, *layout.stacks]))
    if len(runs) == len(set(runs)):
        yield [stack.path for stack in lists]
    else:  # side by side: the first of each, the second of each, ...
        yield sorted(
            blocks,
            key=lambda b: (blocks.index(b) - stack_of[b].first, lists.index(stack_of[b])),
        )
    yield list(dict.fromkeys([*called, *blocks]))
