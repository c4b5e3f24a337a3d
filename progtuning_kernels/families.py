"""Where a model keeps its embeddings, blocks and head.

Discovery is structural: the block list is the outermost `nn.ModuleList` whose length is the number
of layers in the model's config (or, without a config, the only one of equal blocks); what is
registered before it on the way down, inside the base model, lies upstream of block 0 and is
embeddings, the rest is head.
`FAMILIES` holds the few families whose registration order says otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

EMBEDDINGS = -1  # unit number of the embeddings; blocks are 0..L-1, the head is L


class UnsupportedModelError(ValueError):
    """The model cannot be cut into embeddings, blocks and head; the message says why."""


@dataclass(frozen=True)
class Family:
    """What structure alone gets wrong for one `config.model_type`.

    Attributes:
        head: regular expression, searched in parameter names: these are head although they are
            registered before the blocks.
        embeddings: the same for parameters registered after the blocks that feed block 0, and
            for those that feed every block.
    """

    head: str | None = None
    embeddings: str | None = None


FAMILIES: dict[str, Family] = {
    # OPTDecoder registers its final norm and output projection before `layers`.
    "opt": Family(head=r"decoder\.(final_layer_norm|project_out)\."),
    # Relative positions that every block uses: trainable only while all blocks are.
    "deberta-v2": Family(embeddings=r"encoder\.(rel_embeddings|LayerNorm|conv)\."),
    "deberta": Family(embeddings=r"encoder\.rel_embeddings\."),
    "mpnet": Family(embeddings=r"encoder\.relative_attention_bias\."),
}


@dataclass(frozen=True)
class Layout:
    """Cut of one model into units. Names are qualified names, valid while the structure is.

    Attributes:
        blocks_path: the block list, e.g. "bert.encoder.layer".
        block_paths: every block, block 0 first.
        upstream_paths: modules registered before the block list, outermost only, with or without
            parameters (GPT-2's embedding dropout is one).
        container_paths: modules on the way down to the block list, the model itself ("") first.
        family: exceptions to the structural rule.
    """

    blocks_path: str
    block_paths: tuple[str, ...]
    upstream_paths: tuple[str, ...]
    container_paths: tuple[str, ...]
    family: Family

    @property
    def num_blocks(self) -> int:
        return len(self.block_paths)

    @property
    def head(self) -> int:
        """Unit number of the head."""
        return self.num_blocks

    def unit_label(self, unit: int) -> str:
        if unit == EMBEDDINGS:
            return "embeddings"
        return "head" if unit == self.head else f"block {unit}"

    def unit_of(self, parameter_name: str) -> int:
        """Unit that the parameter of this qualified name sits in."""
        for i, path in enumerate(self.block_paths):
            if parameter_name.startswith(path + "."):
                return i
        if self.family.head and re.search(self.family.head, parameter_name):
            return self.head
        if self.family.embeddings and re.search(self.family.embeddings, parameter_name):
            return EMBEDDINGS
        owner = parameter_name.rpartition(".")[0]
        if owner in self.container_paths:  # a bare parameter beside the block list: a token, a bias
            return EMBEDDINGS
        if any(parameter_name.startswith(path + ".") for path in self.upstream_paths):
            return EMBEDDINGS
        return self.head


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(outer + ".") for outer in found):
            continue  # experts or branches inside a block
        if all(next(item.parameters(), None) is not None for item in module):
            found[path] = module
    return found


def _choose_blocks(model: nn.Module) -> str:
    lists = _outermost_lists(model)
    name = type(model).__name__
    expected = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not lists:
        raise UnsupportedModelError(
            f"{name}: no list of blocks found (an nn.ModuleList of layers); "
            'name it with blocks="path.to.the.list"'
        )
    if expected is None:
        fitting = [p for p, m in lists.items() if len(m) > 1 and len({type(b) for b in m}) == 1]
    else:
        fitting = [p for p, m in lists.items() if len(m) == expected]
        if not fitting and all(len(m) < expected for m in lists.values()):
            path, modules = max(lists.items(), key=lambda entry: len(entry[1]))
            raise UnsupportedModelError(
                f"{name}: its blocks share weights ({path} holds {len(modules)} "
                f"module(s) for {expected} layers), so they cannot be frozen one by one"
            )
    if len(fitting) != 1:
        listing = ", ".join(f"{p} ({len(m)})" for p, m in lists.items())
        raise UnsupportedModelError(
            f"{name}: cannot tell which list holds the blocks among {listing}; "
            'name it with blocks="path.to.the.list"'
        )
    return fitting[0]


def _blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(f"{type(model).__name__} has no module at {path!r}") from None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise UnsupportedModelError(f"{path!r} is a {type(blocks).__name__}, not a list of blocks")
    return list(blocks)


def _check_no_sharing(model: nn.Module, blocks: list[nn.Module]) -> None:
    owners: dict[int, set[int]] = defaultdict(set)
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            owners[id(parameter)].add(i)
    shared = sorted(next((o for o in owners.values() if len(o) > 1), ()))
    if shared:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its blocks share weights (blocks {shared} hold the same "
            "parameter), so they cannot be frozen one by one"
        )


def find_layout(model: nn.Module, blocks: str | None = None) -> Layout:
    """Cut `model` into units.

    Args:
        model: any module that runs one stack of blocks.
        blocks: qualified name of the block list, where discovery cannot choose.

    Raises:
        UnsupportedModelError: no block list, several that fit, or blocks that share weights.
    """
    path = blocks if blocks is not None else _choose_blocks(model)
    modules = _blocks_at(model, path)
    _check_no_sharing(model, modules)

    upstream, containers = [], []
    container, prefix = model, ""
    for part in path.split("."):
        containers.append(prefix.removesuffix("."))
        # what stands beside a base model is its head, in whatever order the two are registered
        # (XLM-RoBERTa's classifier comes first)
        if getattr(container, "base_model_prefix", None) != part:
            for child_name, _ in container.named_children():
                if child_name == part:
                    break
                upstream.append(prefix + child_name)
        container = container.get_submodule(part)
        prefix += part + "."

    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None), Family())
    return Layout(
        blocks_path=path,
        block_paths=tuple(f"{path}.{name}" for name, _ in container.named_children()),
        upstream_paths=tuple(
            u for u in upstream if not (family.head and re.search(family.head, u + "."))
        ),
        container_paths=tuple(containers),
        family=family,
    )


@dataclass(frozen=True)
class ParameterSlot:
    """One distinct parameter: where it hangs, and the units that use it.

    Held by owner and attribute, not by object: FSDP2 and others replace Parameter objects.
    """

    name: str
    owner: nn.Module
    attribute: str
    units: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]


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
            units[id(parameter)].add(layout.unit_of(name))
    for key, (name, module, attribute) in first.items():
        yield ParameterSlot(name, module, attribute, tuple(sorted(units[key])))
