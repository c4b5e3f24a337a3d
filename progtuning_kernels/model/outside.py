"""Units of what stands outside the blocks.

What is registered before a stack lies upstream of it and is embeddings; what follows a stack
belongs to its last block, or is head if no other stack follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .families import EMBEDDINGS, Family, is_shared, matched_unit, ruled_unit
from .stacks import Stack

_IN_ORDER = (nn.ModuleList, nn.Sequential)


def outside_units(
    model: nn.Module, stacks: Sequence[Stack], families: Sequence[Family]
) -> tuple[dict[str, int], dict[str, int]]:
    """Units of the modules outside the stacks, and of the bare parameters of their containers."""
    placed = _Outside(stacks, families)
    placed.visit(model, "", None)
    return placed.modules, placed.containers


@dataclass
class _Outside:
    stacks: Sequence[Stack]
    families: Sequence[Family]
    modules: dict[str, int] = field(default_factory=dict)
    containers: dict[str, int] = field(default_factory=dict)

    @property
    def _head(self) -> int:
        return self.stacks[-1].blocks.stop

    def visit(self, module: nn.Module, prefix: str, before: Stack | None) -> None:
        """Place the children of a container; `before` is the last stack registered before it."""
        children = dict(module.named_children())
        inside = {
            name: [s for s in self.stacks if f"{s.path}.".startswith(f"{prefix}{name}.")]
            for name in children
        }
        # what stands beside a base model is its head, in whatever order the two are registered
        # (XLM-RoBERTa's classifier comes first)
        base = inside.get(getattr(module, "base_model_prefix", None) or "", [])
        is_whole = len(base) == len(self.stacks) and _has_upstream(
            module.get_submodule(module.base_model_prefix), base[0].path
        )
        self.containers[prefix.removesuffix(".")] = self._head if is_whole else EMBEDDINGS
        near = [s for found in inside.values() for s in found]
        between = _stages(inside, prefix)
        beside = {name for family in self.families for name in family.beside}
        last = self.stacks[-1] if is_whole else before  # the one registered last so far
        for name, child in children.items():
            path = prefix + name
            stack = next((s for s in inside[name] if s.path == path), None)
            if stack is not None:
                last = stack
            elif inside[name]:
                # what stands in a list runs in the list's order
                self.visit(child, f"{path}.", last if isinstance(module, _IN_ORDER) else None)
                last = inside[name][-1]
            elif name in beside and last is not None and isinstance(child, nn.ModuleList):
                self.modules.update({f"{path}.{i}": last.first + i for i in range(len(child))})
            elif isinstance(child, nn.ModuleList) and len(child) == len(between) > 0:
                self.containers[path] = EMBEDDINGS
                ahead = between if last is between[-1] else [before, *between[:-1]]
                for i, stage in enumerate(ahead):
                    self._place(child[i], f"{path}.{i}", self._after(stage), near)
            else:
                self._place(child, path, self._after(last), near)

    def _place(self, module: nn.Module, path: str, unit: int, near: Sequence[Stack]) -> None:
        """Give a module beside the stacks in `near` its unit, or each part of it one."""
        found = self._ruled(f"{path}.", near)
        unit = unit if found is None else found
        parameters = [name for name, _ in module.named_parameters(prefix=path)]
        modules = [f"{name}." for name, part in module.named_modules(prefix=path) if part != module]
        parted = any(self._ruled(name, near) not in (None, unit) for name in modules + parameters)
        # named to its end, a parameter alone is meant: what its module computes may be needed later
        parted |= any(
            matched_unit(name, self.families, self._head, end=r"\Z") is not None
            for name in parameters
        )
        # what has no forward is not called: its parts are
        if type(module).forward is nn.Module.forward or parted:
            self.containers[path] = unit
            for name, child in module.named_children():
                self._place(child, f"{path}.{name}", unit, near)
        else:
            self.modules[path] = unit

    def _ruled(self, name: str, near: Sequence[Stack]) -> int | None:
        if is_shared(name, self.families):
            return min(s.first for s in near)
        if any(f.after and re.search(f.after, name) for f in self.families):
            return self._after(max(near, key=lambda s: s.first))
        return ruled_unit(name, self.families, self._head)

    def _after(self, stack: Stack | None) -> int:
        if stack is None:
            return EMBEDDINGS
        return self._head if stack is self.stacks[-1] else stack.blocks[-1]


def _stages(inside: dict[str, list[Stack]], prefix: str) -> list[Stack]:
    """The stacks in one list of lists, between which what stands in lists of their own runs."""
    for name, found in inside.items():
        if len(found) > 1 and [s.path for s in found] == [
            f"{prefix}{name}.{i}" for i in range(len(found))
        ]:
            return found
    return []


def _has_upstream(base: nn.Module, stack_path: str) -> bool:
    """Whether anything in `base` is registered before the stack, as a base model's embeddings are.

    Some models without a head call their bare encoder by the name of a base model.
    """
    name, first = next(base.named_children())
    if f".{name}." not in f".{stack_path}.":
        return True
    return not isinstance(first, nn.ModuleList) and _has_upstream(first, stack_path)
