"""Where a model keeps its embeddings, blocks and head, and which parameters several of them use.

Discovery is structural. A stack is an outermost `nn.ModuleList` of blocks: the one that is as long
as the model's config says, or else every list whose items can be checkpointed (which is how
transformers marks its blocks), or else the only list of equal modules. Encoder-decoders and models
with towers have several stacks; their blocks are numbered through, in the order in which the stacks
run. What is registered before a stack lies upstream of it and is embeddings; what follows a stack
belongs to its last block, or is head if no other stack follows.

`families.py` holds what structure alone gets wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from torch import nn

from .families import FAMILIES, Family, UnsupportedModelError

EMBEDDINGS = -1  # unit number of the embeddings; blocks are 0..L-1, the head is L

# Stacks that read what the others computed, wherever they are registered.
_RUNS_LAST = re.compile(r"(^|\.)(decoder|language_model|text_decoder|talker)(\.|$)")
# PEFT's prefix tuning: one table whose columns are keys and values of block 0, of block 1, ...
_SLICED = re.compile(r"(^|\.)prompt_encoder\.[^.]+\.embedding\.weight$")


@dataclass(frozen=True)
class Stack:
    """One list of blocks.

    Attributes:
        path: qualified name of the list, e.g. "bert.encoder.layer".
        first: number of its first block; blocks are numbered through all stacks.
        length: number of its blocks.
    """

    path: str
    first: int
    length: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.length)


@dataclass(frozen=True)
class Layout:
    """Cut of one model into units. Names are qualified names, valid while the structure is.

    Attributes:
        stacks: lists of blocks, in the order in which they run.
        block_paths: every block, block 0 first.
        outside: unit of every module that stands outside the blocks, outermost only, with or
            without parameters (GPT-2's embedding dropout is one).
        containers: unit of the bare parameters of every module on the way down to a stack, the
            model itself ("") included, as the order of registration has it.
        found: units of such parameters as forwards have shown them; they come before `containers`.
        families: exceptions to the structural rules, the whole model's first.
    """

    stacks: tuple[Stack, ...]
    block_paths: tuple[str, ...]
    outside: Mapping[str, int]
    containers: Mapping[str, int]
    families: tuple[Family, ...]
    found: dict[str, int] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return len(self.block_paths)

    @property
    def head(self) -> int:
        """Unit number of the head."""
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
        """Unit that the parameter of this qualified name sits in."""
        if name in self.found:
            return self.found[name]
        owner = name.rpartition(".")[0]
        path = owner
        while path:
            if path in self._unit_of_path:
                return self._unit_of_path[path]
            path = path.rpartition(".")[0]
        ruled = _ruled_unit(name, self.families, self.head)
        return self.containers.get(owner, self.head) if ruled is None else ruled

    def units_of(self, name: str) -> tuple[int, ...]:
        """Units that use the parameter: all blocks of a stack for what its blocks share."""
        if _SLICED.search(name):
            return tuple(self.stacks[-1].blocks)
        if _is_shared(name, self.families):
            return tuple(self._nearest_stack(name).blocks)
        return (self.unit_of(name),)

    def unruled(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Bare parameters of containers that no rule places: only a forward shows who uses them."""
        found = {}
        for path in self.containers:
            for attribute, parameter in model.get_submodule(path)._parameters.items():
                name = f"{path}.{attribute}" if path else attribute
                ruled = _ruled_unit(name, self.families, self.head) is not None
                if parameter is not None and not (ruled or _is_shared(name, self.families)):
                    found[name] = parameter
        return found

    @cached_property
    def _unit_of_path(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.block_paths)} | dict(self.outside)

    def _nearest_stack(self, name: str) -> Stack:
        def shared_parts(stack: Stack) -> int:
            pairs = zip(stack.path.split("."), name.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(name))

        return max(self.stacks, key=shared_parts)


def _ruled_unit(name: str, families: Sequence[Family], head: int) -> int | None:
    """Unit that a family's rules give to a parameter name or to a path that ends in a dot."""
    for family in families:
        for pattern, unit in (
            (family.head, head),
            (family.embeddings, EMBEDDINGS),
            (family.first_block, 0),
        ):
            if pattern and re.search(pattern, name):
                return unit
    return None


def _is_shared(name: str, families: Sequence[Family]) -> bool:
    return any(f.shared and re.search(f.shared, name) for f in families)


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(outer + ".") for outer in found):
            continue  # experts or branches inside a block
        if any(isinstance(item, nn.ModuleList) for item in module):
            continue  # a list of lists: no item has a forward of its own
        if all(next(item.parameters(), None) is not None for item in module):
            found[path] = module
    return found


def _in_order(paths: Sequence[str]) -> list[str]:
    return sorted(paths, key=lambda path: _RUNS_LAST.search(path) is not None)


def _choose_stacks(model: nn.Module, families: Sequence[Family]) -> list[str]:
    lists = _outermost_lists(model)
    name = type(model).__name__
    if not lists:
        raise UnsupportedModelError(
            f"{name}: no list of blocks found (an nn.ModuleList of layers); "
            'name it with blocks="path.to.the.list"'
        )
    for family in families:
        named = [p for end in family.blocks for p in lists if f".{p}".endswith(f".{end}")]
        if named:
            return named
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    paired = bool(getattr(config, "is_encoder_decoder", False))
    # transformers' blocks can be checkpointed, and say so in their class
    marked = [
        p for p, m in lists.items() if all(hasattr(type(b), "gradient_checkpointing") for b in m)
    ]
    if isinstance(depth, int) and not paired:
        fitting = [p for p in (marked or lists) if len(lists[p]) == depth]
        if len(fitting) == 1 or (fitting and marked):
            return _in_order(fitting)
        if not fitting and len(lists) == 1:
            ((path, modules),) = lists.items()
            if not marked and depth % len(modules) == 0:
                raise UnsupportedModelError(
                    f"{name}: its blocks share weights ({path} holds {len(modules)} "
                    f"module(s) for {depth} layers), so they cannot be frozen one by one"
                )
    if marked:
        return _in_order(marked)
    equal = [p for p, m in lists.items() if len(m) > 1 and len({type(b) for b in m}) == 1]
    if paired:
        sides = [
            [p for p in equal if re.search(rf"(^|\.){side}\.[^.]+$", p)]
            for side in ("encoder", "decoder")
        ]
        if [len(side) for side in sides] == [1, 1]:
            return [side[0] for side in sides]
    if len(equal) != 1:
        listing = ", ".join(f"{p} ({len(m)})" for p, m in lists.items())
        raise UnsupportedModelError(
            f"{name}: cannot tell which list holds the blocks among {listing}; "
            'name it with blocks="path.to.the.list", or several in the order in which they run'
        )
    return equal


def _blocks_at(model: nn.Module, path: str) -> list[str]:
    """Paths of the blocks in the list at `path`."""
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(f"{type(model).__name__} has no module at {path!r}") from None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise UnsupportedModelError(f"{path!r} is a {type(blocks).__name__}, not a list of blocks")
    if any(isinstance(block, nn.ModuleList | nn.ModuleDict) for block in blocks):
        raise UnsupportedModelError(f"{path!r} is a list of lists, which have no forward")
    # by their own names: a Sequential may have others than numbers
    return [f"{path}.{name}" for name in blocks._modules]


def _check_no_sharing(model: nn.Module, layout: Layout) -> None:
    owners: dict[int, set[int]] = defaultdict(set)
    for i, path in enumerate(layout.block_paths):
        for name, parameter in model.get_submodule(path).named_parameters():
            if len(layout.units_of(f"{path}.{name}")) == 1:
                owners[id(parameter)].add(i)
    shared = sorted(next((o for o in owners.values() if len(o) > 1), ()))
    if shared:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its blocks share weights (blocks {shared} hold the same "
            "parameter), so they cannot be frozen one by one"
        )


def _families_of(model: nn.Module) -> tuple[Family, ...]:
    """Rules of the model and of the models inside it (a vision tower, a language model)."""
    types: dict[str, None] = {}
    for module in model.modules():
        model_type = getattr(module.__dict__.get("config"), "model_type", None)
        if isinstance(model_type, str):
            types[model_type] = None
    return tuple(FAMILIES[t] for t in types if t in FAMILIES)


def _outside_units(
    model: nn.Module, stacks: Sequence[Stack], families: Sequence[Family]
) -> tuple[dict[str, int], dict[str, int]]:
    """Units of the modules outside the stacks, and of the bare parameters of their containers."""
    by_path = {stack.path: stack for stack in stacks}
    head = stacks[-1].blocks.stop
    beside = {name for family in families for name in family.beside}
    outside: dict[str, int] = {}
    containers: dict[str, int] = {}

    def after(stack: Stack) -> int:
        return head if stack is stacks[-1] else stack.blocks[-1]

    def visit(module: nn.Module, prefix: str) -> None:
        inside = {
            name: [s for s in stacks if f"{s.path}.".startswith(f"{prefix}{name}.")]
            for name, _ in module.named_children()
        }
        # what stands beside a base model is its head, in whatever order the two are registered
        # (XLM-RoBERTa's classifier comes first)
        base = inside.get(getattr(module, "base_model_prefix", None) or "", [])
        is_whole = len(base) == len(stacks) and _has_upstream(
            module.get_submodule(module.base_model_prefix), base[0].path
        )
        containers[prefix.removesuffix(".")] = head if is_whole else EMBEDDINGS
        last: Stack | None = stacks[-1] if is_whole else None  # the one registered last so far
        for name, child in module.named_children():
            path = prefix + name
            ruled = _ruled_unit(path + ".", families, head)
            beside_stacks = [s for found in inside.values() for s in found]
            if path in by_path:
                last = by_path[path]
            elif inside[name]:
                visit(child, path + ".")
                last = inside[name][-1]
            elif name in beside and last is not None and isinstance(child, nn.ModuleList):
                outside.update({f"{path}.{i}": last.first + i for i in range(len(child))})
            elif _is_shared(path + ".", families):
                outside[path] = min(s.first for s in beside_stacks)
            elif any(f.after and re.search(f.after, path + ".") for f in families):
                outside[path] = after(max(beside_stacks, key=lambda s: s.first))
            elif ruled is not None:
                outside[path] = ruled
            else:
                outside[path] = EMBEDDINGS if last is None else after(last)

    visit(model, "")
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


def find_layout(model: nn.Module, blocks: str | Sequence[str] | None = None) -> Layout:
    """Cut `model` into units.

    Args:
        model: any module that runs blocks.
        blocks: qualified name of the block list where discovery cannot choose; several, in the
            order in which they run.

    Raises:
        UnsupportedModelError: no block list, several that fit, or blocks that share weights.
    """
    families = _families_of(model)
    if blocks is None:
        paths = _choose_stacks(model, families)
    else:
        paths = [blocks] if isinstance(blocks, str) else list(blocks)
    stacks: list[Stack] = []
    block_paths: list[str] = []
    for path in paths:
        found = _blocks_at(model, path)
        stacks.append(Stack(path, len(block_paths), len(found)))
        block_paths += found
    if not stacks or len(set(block_paths)) < len(block_paths):
        raise UnsupportedModelError(f"blocks={blocks!r} names no list, or one list twice")
    outside, containers = _outside_units(model, stacks, families)
    layout = Layout(
        stacks=tuple(stacks),
        block_paths=tuple(block_paths),
        outside=MappingProxyType(outside),
        containers=MappingProxyType(containers),
        families=families,
    )
    _check_no_sharing(model, layout)
    return layout


@dataclass(frozen=True)
class ParameterSlot:
    """One distinct parameter: where it hangs, and the units that use it.

    Held by owner and attribute, not by object: FSDP2 and others replace Parameter objects.

    Attributes:
        name: the first of its qualified names.
        owner: module that it hangs on.
        attribute: its name there.
        units: units that use it, in ascending order; several where it is tied or shared.
        sliced: its columns belong to the blocks in `units` in equal parts, and freeze with them.
    """

    name: str
    owner: nn.Module
    attribute: str
    units: tuple[int, ...]
    sliced: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]

    @property
    def home(self) -> int:
        """The unit that it is counted in: a table tied to the head goes on training with the head,
        what blocks share is at home in the lowest of them.
        """
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
        used_by = tuple(sorted(units[key]))
        yield ParameterSlot(name, module, attribute, used_by, bool(_SLICED.search(name)))
