"""The members of an optimizer's groups, and buckets of those that are active: built once, and again
when anything of theirs has moved.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..ops.masked_update.bucket import (
    GROUPS_PER_LAUNCH,
    TENSORS_PER_LAUNCH,
    Bucket,
    Gradients,
    is_dense,
)
from ..sharding import is_sharded, local_of

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Member:
    parameter: Tensor
    index: int  # over all groups, in order; random numbers of the update depend on it
    group: int  # index of its group
    name: str | None  # in the group's `param_names`; None where the optimizer was given no names

    @property
    def label(self) -> str:
        return self.name or f"parameter {self.index}"


def parameters_of(groups: Groups) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def members_of(groups: Groups) -> list[Member]:
    """Every parameter in the order of the groups; `ValueError` for one that is there twice."""
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


@dataclass(eq=False)
class ActiveBucket:
    """A bucket together with the parameters whose gradients it wants, DTensors included.

    With state on the host, the bucket is of the host's copies of parameters.
    """

    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    bucket: Bucket
    groups: list[int]  # of the optimizer, in the bucket's numbering

    def __post_init__(self) -> None:
        self.sharded = any(map(is_sharded, self.parameters))
        self._addresses = self._addresses_now()
        self._places = self._places_of_states()
        self._written: list[int] | None = None  # versions after the last update, with masters

    def follow_parameters(self) -> None:
        """Set the masters of parameters that were written from outside, as loading weights does.

        A residual becomes 0: whether p is still what it belongs to, p's bits do not say.
        """
        bucket = self.bucket
        if bucket.masters is None:
            return
        versions = [p._version for p in bucket.params]
        for i, (p, master) in enumerate(zip(bucket.params, bucket.masters, strict=True)):
            if bucket.has_residuals:
                if self._written is not None and self._written[i] != versions[i]:
                    master.zero_()
            elif self._written is None or self._written[i] != versions[i]:
                # an equal one keeps what the parameter's precision does not show
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        self._written = [version + 1 for version in versions]  # the update is one more

    def gather(self) -> Gradients:
        """The gradients of this moment; `RuntimeError` for a sparse one."""
        grads = [p.grad for p in self.parameters]
        if self.sharded:
            grads = [None if grad is None else local_of(grad) for grad in grads]
        refuse_sparse(grads)
        return self.bucket.gather(grads)

    def is_current(self, state: Mapping[Any, dict[str, Tensor]]) -> bool:
        """Whether everything still lies where the table of addresses says: `.data =`, `.to`,
        `share_memory_` and FSDP move tensors, and entries of the state may be replaced.
        """
        return (
            self._addresses == self._addresses_now()
            and all(
                state.get(p) is own for p, own in zip(self.parameters, self.states, strict=True)
            )
            and self._places == self._places_of_states()
        )

    def _addresses_now(self) -> list[int]:
        locals_ = map(local_of, self.parameters) if self.sharded else self.parameters
        return [p.data_ptr() for p in locals_]

    def _places_of_states(self) -> list[int]:
        tensors = [t for own in self.states for t in own.values() if isinstance(t, Tensor)]
        return [t.data_ptr() for t in (map(local_of, tensors) if self.sharded else tensors)]


def refuse_sparse(grads: Iterable[Tensor | None]) -> None:
    """Raise `RuntimeError` for a sparse gradient."""
    for grad in grads:
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"a parameter of shape {tuple(grad.shape)} has a sparse gradient; build the "
                "embedding with sparse=False"
            )


class BucketTable:
    """The buckets of some active parameters: of all of them, or of one block."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._buckets: list[ActiveBucket] = []
        self._waiting = self.members  # never seen with a gradient: they have no state yet

    def buckets(
        self,
        state: Mapping[Any, dict[str, Tensor]],
        build: Callable[[list[Member]], ActiveBucket],
    ) -> list[ActiveBucket]:
        """Buckets that `build` has made of members that fit into one launch, made anew when a
        gradient comes for the first time or something has moved.
        """
        fresh = any(member.parameter.grad is not None for member in self._waiting)
        if not fresh and all(bucket.is_current(state) for bucket in self._buckets):
            return self._buckets
        started = [
            m for m in self.members if m.parameter.grad is not None or state.get(m.parameter)
        ]
        for p in (member.parameter for member in started):
            if p.grad is not None and p.grad.shape != p.shape:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a gradient of shape "
                    f"{tuple(p.grad.shape)}, of before it was replaced: call zero_grad() first"
                )
        self._buckets = [build(part) for part in launches(started)]
        known = {member.index for member in started}
        self._waiting = [m for m in self.members if m.index not in known]
        return self._buckets


def launches(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members of one device and dtype, in parts that one launch can take."""
    kinds: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
    for member in members:
        local = local_of(member.parameter)
        kinds[local.device, local.dtype, is_dense(local)].append(member)
    for same in kinds.values():
        part: list[Member] = []
        groups: set[int] = set()
        for member in same:
            groups.add(member.group)
            if len(part) == TENSORS_PER_LAUNCH or len(groups) > GROUPS_PER_LAUNCH:
                yield part
                part, groups = [], {member.group}
            part.append(member)
        yield part
