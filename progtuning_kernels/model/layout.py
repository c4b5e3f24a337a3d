"""How a model is cut into units: embeddings, blocks and head, and which parameters several use.

Encoder-decoders and models with towers have several stacks; their blocks are numbered through, in
the order in which the stacks run. `families.py` holds what structure alone gets wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from torch import nn

from .families import (
    EMBEDDINGS,
    FAMILIES,
    Family,
    UnsupportedModelError,
    is_shared,
    kinds_of,
    register_call,
    ruled_unit,
)
from .outside import outside_units
from .stacks import LISTS, Stack, UnknownBlocksError, choose_stacks, parameter_count, stacks_at


@dataclass(frozen=True)
class Layout:
    """Cut of one model into units. Names are qualified names, valid while the structure is."""

    stacks: tuple[Stack, ...]  # in the order in which they run
    block_paths: tuple[str, ...]
    # unit of every module outside the blocks, outermost only, with or without parameters
    outside: Mapping[str, int]
    # unit of the bare parameters of every module on the way down to a stack, the model itself ("")
    # included, by the order of registration
    containers: Mapping[str, int]
    families: tuple[Family, ...]  # exceptions to the structural rules, the whole model's first
    # units of such parameters as forwards have shown them; they come before `containers`
    found: dict[str, int] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return len(self.block_paths)

    @property
    def head(self) -> int:
        return self.num_blocks

    @property
    def units(self) -> range:
        """All unit numbers, the embeddings' first."""
        return range(EMBEDDINGS, self.head + 1)

    def unit_label(self, unit: int) -> str:
        if unit == EMBEDDINGS:
            return "embeddings"
        return "head" if unit == self.head else f"block {unit}"

    def module_paths(self, unit: int) -> tuple[str, ...]:
        """Modules that make up one unit, the block itself first."""
        own = (self.block_paths[unit],) if 0 <= unit < self.head else ()
        return (*own, *(path for path, owner in self.outside.items() if owner == unit))

    def unit_of(self, name: str) -> int:
        """The unit that holds the parameter of this qualified name."""
        if name in self.found:
            return self.found[name]
        module = self.module_of(name)
        if module is not None:
            return self._unit_of_path[module]
        ruled = ruled_unit(name, self.families, self.head)
        owner = name.rpartition(".")[0]
        return self.containers.get(owner, self.head) if ruled is None else ruled

    def unit_of_module(self, path: str) -> int | None:
        """Unit of a block, or of a module in `outside`; None for any other."""
        return self._unit_of_path.get(path)

    def module_of(self, name: str) -> str | None:
        """Block, or module in `outside`, that holds the parameter; None if it is bare."""
        path = name.rpartition(".")[0]
        while path and path not in self._unit_of_path:
            path = path.rpartition(".")[0]
        return path or None

    def units_of(self, name: str) -> tuple[int, ...]:
        """Units that use the parameter: all blocks of a stack for what its blocks share."""
        if is_shared(name, self.families):
            return tuple(self.nearest_stack(name).blocks)
        return (self.unit_of(name),)

    def unruled(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Bare parameters of containers that no rule places: only a forward shows who uses them."""
        found = {}
        for path in self.containers:
            for attribute, parameter in model.get_submodule(path)._parameters.items():
                name = f"{path}.{attribute}" if path else attribute
                ruled = ruled_unit(name, self.families, self.head) is not None
                if parameter is not None and not (ruled or is_shared(name, self.families)):
                    found[name] = parameter
        return found

    def guess_unruled(self, model: nn.Module) -> None:
        """Take these for head, which cuts nothing off, until a forward shows who uses them."""
        for name in self.unruled(model):
            self.found.setdefault(name, self.head)

    @cached_property
    def _unit_of_path(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.block_paths)} | dict(self.outside)

    def nearest_stack(self, name: str) -> Stack:
        """The stack whose path has most leading parts in common with a qualified name."""

        def shared_parts(stack: Stack) -> int:
            pairs = zip(stack.path.split("."), name.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(name))

        return max(self.stacks, key=shared_parts)


@dataclass(frozen=True)
class ParameterSlot:
    """One distinct parameter, by owner and attribute: FSDP2 and others replace its object."""

    name: str  # the first of its qualified names
    owner: nn.Module
    attribute: str  # its name in the owner
    units: tuple[int, ...]  # that use it, ascending; several where it is tied or shared

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]

    @property
    def home(self) -> int:
        """The unit that it is counted in: the head for a table tied to it, else the lowest."""
        return self.units[-1] if self.units[0] == EMBEDDINGS else self.units[0]


def parameter_slots(model: nn.Module, layout: Layout) -> Iterator[ParameterSlot]:
    """Every distinct parameter once, with all units that use it (several when it is tied)."""
    first: dict[int, tuple[str, nn.Module, str]] = {}
    units: dict[int, set[int]] = defaultdict(set)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            first.setdefault(id(parameter), (name, module, attribute))
            units[id(parameter)].update(layout.units_of(name))
    for key, (name, module, attribute) in first.items():
        yield ParameterSlot(name, module, attribute, tuple(sorted(units[key])))


def find_layout(
    model: nn.Module,
    blocks: str | Sequence[str] | None = None,
    *,
    rules: Mapping[str, Family] = MappingProxyType({}),
) -> Layout:
    """Cut `model` into units, or raise `UnsupportedModelError`; `blocks` as in `patch_model`.

    `rules` are families that count instead of those in `FAMILIES`.
    """
    try:
        return _layout_of(model, [blocks] if isinstance(blocks, str) else blocks, rules)
    except UnknownBlocksError as error:
        raise UnsupportedModelError(f"{error}; {_which(model)}") from None


def _layout_of(
    model: nn.Module, paths: Sequence[str] | None, rules: Mapping[str, Family]
) -> Layout:
    table = {**FAMILIES, **rules}
    families = tuple(table[kind] for kind in kinds_of(model) if kind in table)
    stacks, block_paths = stacks_at(
        model, choose_stacks(model, families) if paths is None else list(paths)
    )
    outside, containers = outside_units(model, stacks, families)
    layout = Layout(
        stacks=tuple(stacks),
        block_paths=tuple(block_paths),
        outside=MappingProxyType(outside),
        containers=MappingProxyType(containers),
        families=families,
    )
    _check_no_sharing(model, layout)
    return layout


def _which(model: nn.Module) -> str:
    """What to pass as `blocks`: the modules of one class that hold the most parameters."""
    lists: dict[frozenset[type], list[str]] = defaultdict(list)
    children: dict[frozenset[type], list[str]] = {}
    for path, module in model.named_modules():
        own = {
            f"{path}.{n}".lstrip("."): c for n, c in module.named_children() if parameter_count([c])
        }
        kinds = frozenset(type(child) for child in own.values())
        if any(issubclass(kind, LISTS) for kind in kinds):
            continue
        if path and isinstance(module, (*LISTS, nn.Sequential)):
            inside = any(path.startswith(p + ".") for found in lists.values() for p in found)
            if len(own) > 1 and not inside:
                lists[kinds].append(path)
        elif len(own) > 1 and not children:  # layers held one by one
            for child_path, child in own.items():
                children.setdefault(frozenset([type(child)]), []).append(child_path)
            children = {k: found for k, found in children.items() if len(found) > 1} or {
                kinds: list(own)
            }
    for groups in (lists, children):
        for paths in sorted(
            groups.values(),
            key=lambda g: parameter_count(map(model.get_submodule, g)),
            reverse=True,
        ):
            try:
                _layout_of(model, paths, {})
            except UnsupportedModelError:
                continue
            several = "" if len(paths) == 1 else ", in the order in which they run"
            named = paths[0] if len(paths) == 1 else paths
            return f"name what the blocks are{several}: blocks={named!r}"
    return "there is no cure: no two modules in it run one after the other"


def _check_no_sharing(model: nn.Module, layout: Layout) -> None:
    owners: dict[int, dict[int, str]] = defaultdict(dict)
    for i, path in enumerate(layout.block_paths):
        block = model.get_submodule(path)
        for name, parameter in block.named_parameters(remove_duplicate=False):
            if len(layout.units_of(f"{path}.{name}")) == 1:
                owners[id(parameter)][i] = name
    shared = next((names for names in owners.values() if len(names) > 1), None)
    if shared is None:
        return
    found = (
        f"{type(model).__name__}: its blocks share weights (blocks {sorted(shared)} hold the same "
        "parameter), so they cannot be frozen one by one"
    )
    modules = [model.get_submodule(layout.block_paths[i]) for i in shared]
    if len({id(module) for module in modules}) < len(modules):
        raise UnsupportedModelError(
            f"{found}; there is no cure: a module that runs as several blocks freezes as one"
        )
    patterns = []
    for i, name in shared.items():
        path = layout.block_paths[i]
        stack = next(s for s in layout.stacks if i in s.blocks)
        place = re.escape(path)
        if stack.path != path:
            place = re.escape(stack.path) + r"\.[^.]+"
        patterns.append(rf"^{place}\.{_shared_part(modules, name)}")
    cure = register_call(model, "shared", "|".join(dict.fromkeys(patterns)))
    raise UnsupportedModelError(
        f"{found}; to let it train only while all of them do, call {cure} before patching"
    )


def _shared_part(blocks: Sequence[nn.Module], name: str) -> str:
    """Pattern of the outermost module that is the same in all `blocks`, or of the parameter."""
    parts = name.split(".")
    held = [dict(block.named_parameters(remove_duplicate=False)) for block in blocks]
    for length in range(1, len(parts)):
        part = ".".join(parts[:length]) + "."
        ids = [{id(p) for n, p in own.items() if n.startswith(part)} for own in held]
        if all(own == ids[0] for own in ids):
            return re.escape(part)
    return f"{re.escape(name)}$"
