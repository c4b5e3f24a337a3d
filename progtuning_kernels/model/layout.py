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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from .families import FAMILIES, Family, UnsupportedModelError

EMBEDDINGS = -1  # unit number of the embeddings; blocks are 0..L-1, the head is L

# Stacks that read what the others computed, wherever they are registered.
_RUNS_LAST = re.compile(r"(^|\.)(decoder|language_model|text_decoder|talker)(\.|$)")
_LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward
_IN_ORDER = (nn.ModuleList, nn.Sequential)
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
        module = self.module_of(name)
        if module is not None:
            return self._unit_of_path[module]
        ruled = _ruled_unit(name, self.families, self.head)
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
    """Unit that a family's rules give to a parameter name or to a path that ends in a dot.

    The rule that names it to its end goes first, then those that so name a module around it.
    """
    parts = name.removesuffix(".").split(".")
    around = [".".join(parts[:i]) + "." for i in range(len(parts) - 1, 0, -1)]
    exact = (_matched(path, families, head, end=r"\Z") for path in (name, *around))
    found = next((unit for unit in exact if unit is not None), None)
    return _matched(name, families, head) if found is None else found


def _matched(name: str, families: Sequence[Family], head: int, end: str = "") -> int | None:
    for family in families:
        for pattern, unit in (
            (family.head, head),
            (family.embeddings, EMBEDDINGS),
            (family.first_block, 0),
        ):
            if pattern and re.search(f"(?:{pattern}){end}", name):
                return unit
    return None


def _is_shared(name: str, families: Sequence[Family]) -> bool:
    return any(f.shared and re.search(f.shared, name) for f in families)


def _outermost_lists(model: nn.Module, depth: Any) -> dict[str, nn.Module]:
    """Every list that may hold blocks: module lists; or else sequences of equal modules, if they
    hold most of the model or have the depth that its config gives.
    """
    found: dict[str, nn.Module] = {}
    equal: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path.startswith(outer + ".") for outer in (*found, *equal)):
            continue  # experts or branches inside a block
        items = list(module.children())
        if not path or not items or any(isinstance(item, _LISTS) for item in items):
            continue  # a list of lists: no item has a forward of its own
        if not all(next(item.parameters(), None) is not None for item in items):
            continue
        if isinstance(module, nn.ModuleList):
            found[path] = module
        elif isinstance(module, nn.Sequential) and _one_class(module) and len(items) > 1:
            equal[path] = module
    deep = any(len(module) == depth for module in equal.values())
    return found or (equal if deep or _is_most(model, equal.values()) else {})


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _is_most(model: nn.Module, parts: Iterable[nn.Module]) -> bool:
    return 2 * _size(parts) > _size([model])


def _one_class(modules: nn.Module) -> bool:
    return len({type(module) for module in modules.children()}) == 1


def _in_order(paths: Sequence[str]) -> list[str]:
    return sorted(paths, key=lambda path: _RUNS_LAST.search(path) is not None)


def _choose_stacks(model: nn.Module, families: Sequence[Family]) -> list[str]:
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    lists = _outermost_lists(model, depth)
    name = type(model).__name__
    for family in families:
        every = [p for p, m in model.named_modules() if isinstance(m, (*_LISTS, nn.Sequential))]
        named = [p for end in family.blocks for p in every if f".{p}".endswith(f".{end}")]
        if named:
            return named
    if not lists:
        raise UnsupportedModelError(
            f"{name}: no list of blocks found (an nn.ModuleList of layers); {_which(model)}"
        )
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
        return max(choices, key=lambda paths: _size(map(model.get_submodule, paths)))
    listing = ", ".join(f"{p} ({len(m)})" for p, m in lists.items())
    what = f"cannot tell which list holds the blocks among {listing}"
    if len(lists) == 1:
        what = f"its only list, {listing}, is the smaller part of it, so it may hold no blocks"
    raise UnsupportedModelError(f"{name}: {what}; {_which(model)}")


def _which(model: nn.Module) -> str:
    """What to pass as `blocks`: the modules of one class that hold the most parameters."""
    lists: dict[frozenset[type], list[str]] = defaultdict(list)
    children: dict[frozenset[type], list[str]] = {}
    for path, module in model.named_modules():
        own = {f"{path}.{n}".lstrip("."): c for n, c in module.named_children() if _size([c])}
        kinds = frozenset(type(child) for child in own.values())
        if any(issubclass(kind, _LISTS) for kind in kinds):
            continue
        if path and isinstance(module, (*_LISTS, nn.Sequential)):
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
            groups.values(), key=lambda g: _size(map(model.get_submodule, g)), reverse=True
        ):
            try:
                find_layout(model, paths)
            except UnsupportedModelError:
                continue
            several = "" if len(paths) == 1 else ", in the order in which they run"
            named = paths[0] if len(paths) == 1 else paths
            return f"name what the blocks are{several}: blocks={named!r}"
    return "there is no cure: no two modules in it run one after the other"


def _blocks_at(model: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    """Every list of blocks at `path` with the paths of its blocks; a module that is no list is one
    block, a list of lists is its lists in their order.
    """
    module = model.get_submodule(path)
    # by their own names: a Sequential may have others than numbers
    inside = [f"{path}.{name}" for name in module._modules]
    if not isinstance(module, (*_LISTS, nn.Sequential)):
        yield path, [path]
    elif any(isinstance(item, _LISTS) for item in module.children()):
        for item in inside:
            yield from _blocks_at(model, item)
    elif inside:
        yield path, inside


def _stacks_at(model: nn.Module, paths: Sequence[str]) -> tuple[list[Stack], list[str]]:
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
            raise UnsupportedModelError(
                f"{type(model).__name__} has no module at {path!r}; {_which(model)}"
            )
        for found, inside in _blocks_at(model, path):
            stacks.append(Stack(found, len(blocks), len(inside)))
            blocks += inside
    names = list(paths)
    if len(blocks) < 2 and not (blocks and isinstance(modules[names[0]], (*_LISTS, nn.Sequential))):
        what = f"a {type(modules[names[0]]).__name__}, not a list of blocks" if names else "nothing"
        raise UnsupportedModelError(f"blocks={names!r} is {what}; {_which(model)}")
    twice = [p for p in blocks if blocks.count(p) > 1 or any(p.startswith(f"{b}.") for b in blocks)]
    if twice:
        raise UnsupportedModelError(f"blocks={names!r} names {twice[0]} twice: name it once")
    return stacks, blocks


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


def _kinds_of(model: nn.Module) -> list[str]:
    """What the rules of a family may be registered for: classes and types of its modules."""
    kinds: dict[str, None] = {}
    for module in model.modules():
        kinds |= dict.fromkeys(cls.__name__ for cls in type(module).__mro__)
        model_type = getattr(module.__dict__.get("config"), "model_type", None)
        if isinstance(model_type, str):
            kinds[model_type] = None
    return list(kinds)


def kind_of(model: nn.Module) -> str:
    """What a rule for this very model is registered for."""
    own = getattr(getattr(model, "config", None), "model_type", None)
    return own if own in _kinds_of(model) else type(model).__name__


def register_call(model: nn.Module, rule: str, pattern: str) -> str:
    """The call that gives this model a rule, as a user types it."""
    return f"register_family({kind_of(model)!r}, {rule}=r'{pattern}')"


def _outside_units(
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
        if _is_shared(name, families):
            return min(s.first for s in near)
        if any(f.after and re.search(f.after, name) for f in families):
            return after(max(near, key=lambda s: s.first))
        return _ruled_unit(name, families, head)

    def place(module: nn.Module, path: str, unit: int, near: Sequence[Stack]) -> None:
        """Give a module beside the stacks in `near` its unit, or each part of it one."""
        found = ruled(f"{path}.", near)
        unit = unit if found is None else found
        parameters = [name for name, _ in module.named_parameters(prefix=path)]
        modules = [f"{name}." for name, part in module.named_modules(prefix=path) if part != module]
        parted = any(ruled(name, near) not in (None, unit) for name in (*modules, *parameters))
        # named to its end, a parameter alone is meant: what its module computes may be needed later
        parted |= any(_matched(n, families, head, end=r"\Z") is not None for n in parameters)
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


def find_layout(
    model: nn.Module,
    blocks: str | Sequence[str] | None = None,
    *,
    rules: Mapping[str, Family] = MappingProxyType({}),
) -> Layout:
    """Cut `model` into units.

    Args:
        model: any module that runs blocks.
        blocks: qualified name of the block list where discovery cannot choose; several, in the
            order in which they run, of lists or of single modules that are a block each.
        rules: families that count instead of those in `FAMILIES`.

    Raises:
        UnsupportedModelError: no block list, several that fit, or blocks that share weights.
    """
    table = {**FAMILIES, **rules}
    families = tuple(table[kind] for kind in _kinds_of(model) if kind in table)
    if blocks is None:
        paths = _choose_stacks(model, families)
    else:
        paths = [blocks] if isinstance(blocks, str) else list(blocks)
    stacks, block_paths = _stacks_at(model, paths)
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
