"""What the groups of an optimizer hold, and whether that has changed since a table was made."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Member:
    """A parameter and its place in the optimizer.

    Attributes:
        index: over all groups, in order: what the random numbers of the update know it by.
        group: index of its group.
        name: as in the group's `param_names`; None where the optimizer was built without names.
    """

    parameter: Tensor
    index: int
    group: int
    name: str | None

    @property
    def label(self) -> str:
        return self.name or f"parameter {self.index}"


def parameters_of(groups: Groups) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def members_of(groups: Groups) -> list[Member]:
    """Every parameter, frozen ones included, in the order of the groups.

    Raises:
        ValueError: a tensor is there twice, or a group's names are not one per tensor.
    """
    found: list[Member] = []
    for i, group in enumerate(groups):
        size = len(group["params"])
        names = group.get("param_names") or [None] * size
        if len(names) != size:
            raise ValueError(
                f"group {i} has {size} params and {len(names)} param_names: change both"
            )
        for p, name in zip(group["params"], names, strict=True):
            found.append(Member(p, len(found), i, name))
    twice = [p for p, times in Counter(parameters_of(groups)).items() if times > 1]
    if twice:
        raise ValueError(
            f"a tensor of shape {tuple(twice[0].shape)} is in the groups twice, and would be "
            "updated twice in a step: take it out once"
        )
    return found


class GroupSnapshot:
    """The tensors of every group, and which of them were active, at one moment."""

    def __init__(self, groups: Groups) -> None:
        self._sizes = [len(group["params"]) for group in groups]
        self._tensors = list(parameters_of(groups))
        self._flags = [p.requires_grad for p in self._tensors]

    def differs_from(self, groups: Groups) -> bool:
        return (
            self._sizes != [len(group["params"]) for group in groups]
            or not all(map(operator.is_, self._tensors, parameters_of(groups)))
            or self._flags != [p.requires_grad for p in parameters_of(groups)]
        )
