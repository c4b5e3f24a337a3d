"""Units of what stands outside the blocks.

What is registered before a stack lies upstream of it and is embeddings; what follows a stack
belongs to its last block, or is head if no other stack follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from .families import EMBEDDINGS, Family, is_shared, matched_unit, ruled_unit
from .stacks import Stack

_IN_ORDER = (nn.ModuleList, nn.Sequential)


def outside_units(
    model: nn.Module, stacks: Sequence[Stack], families: Sequence[Family]
) -> tuple[dict[str, int], dict[str, int]]:
    """Units of the modules outside the stacks, and of the bare parameters of their containers."""
    by_path = {stack.path: stack for stack in stacks}
    head = stacks[-1].blocks.stop
    beside = {name for family in families for name in family.beside}
    outside: dict[str, int] = {}
    containers: dict[str, int] = {}

    def after(stack: Stack | None) -> int:
        if stack is None:
            return EMBEDDINGS
        return head if stack is stacks[-1] else stack.blocks[-1]

    def ruled(name: str, near: Sequence[Stack]) -> int | None:
        if is_shared(name, families):
            return min(s.first for s in near)
        if any(f.after and re.search(f.after, name) for f in families):
            return after(max(near, key=lambda s: s.first))
        return ruled_unit(name, families, head)

    def place(module: nn.Module, path: str, unit: int, near: Sequence[Stack]) -> None:
        """Give a module beside the stacks in `near` its unit, or each part of it one."""
        found = ruled(f"{path}.", near)
        unit = unit if found is None else found
        parameters = [name for name, _ in module.named_parameters(prefix=path)]
        modules = [f"{name}." for name, part in module.named_modules(prefix=path) if part != module]
        parted = any(ruled(name, near) not in (None, unit) for name in (*modules, *parameters))
        # named to its end, a parameter alone is meant: what its module computes may be needed later
        parted |= any(matched_unit(n, families, head, end=r"\Z") is not None for n in parameters)
        # what has no forward is not called: its parts are
        if type(module).forward is nn.Module.forward or parted:
            containers[path] = unit
            for name, child in module.named_children():
                place(child, f"{path}.{name}", unit, near)
        else:
            outside[path] = unit

    def visit(module: nn.Module, prefix: str, before: Stack | None) -> None:
        children = dict(module.named_children())
        inside = {
            name: [s for s in stacks if f"{s.path}.".startswith(f"{prefix}{name}.")]
            for name in children
        }
        # what stands beside a base model is its head, in whatever order the two are registered
        # (XLM-RoBERTa's classifier comes first)
        base = inside.get(getattr(module, "base_model_prefix", None) or "", [])
        is_whole = len(base) == len(stacks) and _has_upstream(
            module.get_submodule(module.base_model_prefix), base[0].path
        )
        containers[prefix.removesuffix(".")] = head if is_whole else EMBEDDINGS
        near = [s for found in inside.values() for s in found]
        # lists of blocks in one list of lists, and what stands between them in lists of their own
        stages = [
            found
            for name, found in inside.items()
            if len(found) > 1
            and [s.path for s in found] == [f"{prefix}{name}.{i}" for i in range(len(found))]
        ]
        between = stages[0] if stages else []
        last = stacks[-1] if is_whole else before  # the one registered last so far
        for name, child in children.items():
            path = prefix + name
            if path in by_path:
                last = by_path[path]
            elif inside[name]:
                # what stands in a list runs in the list's order
                visit(child, f"{path}.", last if isinstance(module, _IN_ORDER) else None)
                last = inside[name][-1]
            elif name in beside and last is not None and isinstance(child, nn.ModuleList):
                outside.update({f"{path}.{i}": last.first + i for i in range(len(child))})
            elif isinstance(child, nn.ModuleList) and len(child) == len(between) > 0:
                containers[path] = EMBEDDINGS
                ahead = between if last is between[-1] else [before, *between[:-1]]
                for i, stage in enumerate(ahead):
                    place(child[i], f"{path}.{i}", after(stage), near)
            else:
                place(child, path, after(last), near)

    visit(model, "", None)
    return outside, containers


def _has_upstream(base: nn.Module, stack_path: str) -> bool:
    """Whether anything in `base` is registered before the stack, as a base model's embeddings are.

    Some models without a head call their bare encoder by the name of a base model.
    """
    for name, child in base.named_children():
        if f".{name}." not in f".{stack_path}.":
            return True
        base = child
        break
    return _has_upstream(base, stack_path) if not isinstance(base, nn.ModuleList) else False
