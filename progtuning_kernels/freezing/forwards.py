"""What is done before and after every forward of a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..graphs import Feed
from ..model.forward_hooks import tensors_in, with_own_containers
from ..model.host_copies import HostCopies
from ..model.layout import EMBEDDINGS
from .freezer import Freezer
from .gradient_paths import GradientPaths
from .missed_steps import MissedSteps
from .missed_updates import MissedUpdates
from .unit_use import UnitUse, measure_forward

# Numbers of tokens that a shape (B, T) may have under captured graphs: a 16th of the places is
# computed in vain
_PACKED_SIZES = 8
_WATCHES = "its backward looks whether the loss reads padding"
_WRAPPED = "DistributedDataParallel hooks gradients on streams of its own"
_PROVES = "the first forward of a stage proves that freezing cuts nothing off"


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of a training forward, kept so that a report can repeat it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: AbstractContextManager[Any]  # that it ran under


class Forwards:
    """Follows changes of the model before a forward that trains; proves once per plan that freezing
    cuts nothing off; has a prefix cache put its stand-ins in last.
    """

    def __init__(self, freezer: Freezer, steps: MissedSteps, updates: MissedUpdates) -> None:
        self._freezer = freezer
        self._missed_steps = steps
        self._missed_updates = updates
        self._paths: GradientPaths | None = None  # of the forward that proves
        self.last: ForwardInputs | None = None  # of the last forward that trained
        self._host = HostCopies()  # of the forward under way

    def before_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to call the model with."""
        freezer, trains = self._freezer, torch.is_grad_enabled()
        freezer.graphs.forbid()
        if freezer.packer.busy:
            return args, kwargs
        freezer.rows.synchronise()
        if trains:
            freezer.rows.begin_training()
            freezer.follow_changes()
            freezer.follow_wrapper()
            if not freezer.sharded:  # FSDP2 writes weights at every forward
                self._missed_steps.before_forward(freezer.step)
            self._missed_updates.before_forward()
        self._try_packing(args, kwargs)
        if freezer.cache is not None:
            if freezer.cache.busy:
                return freezer.packer.begin(args, kwargs, self._host, aside=True)
            self._host.clear()  # torch calls no hook after a KeyboardInterrupt
            if trains or freezer.follows_shards:
                freezer.cache.before_forward(args, kwargs, self._host, proved=freezer.proved)
        self.end_proof()
        if trains:
            freezer.follow_surroundings()
            if not freezer.proved:
                self._paths = self._watch_paths(inputs=(args, kwargs))
                freezer.rows.show_uses()
            if self.last is None or not _answered(args):
                self.last = _inputs_of(args, kwargs, freezer.active.device.type)
            freezer.graphs.look()
        fed: list[Feed] = []
        if freezer.cache is not None:
            fed += freezer.cache.fed()
            freezer.cache.install_stand_ins()
        freezer.packer.sizes = _PACKED_SIZES if freezer.graphs.captures else None
        args, kwargs = freezer.packer.begin(args, kwargs, self._host)
        if trains:
            watches = freezer.packer.watches
            if freezer.cache is not None and not freezer.packer.packs:
                freezer.cache.watch_padding()
                watches |= freezer.cache.watches
            against = _WATCHES if watches else None
            if not freezer.proved:
                against = _PROVES
            elif freezer.wrapped:
                against = _WRAPPED
            freezer.graphs.allow([*fed, *freezer.packer.fed()], against=against)
        return args, kwargs

    def _try_packing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        freezer = self._freezer
        if torch.is_grad_enabled():
            freezer.packer.learn(args, kwargs, freezer.boundary, freezer.share)
        elif freezer.cache is None or not freezer.cache.busy:
            freezer.packer.learn_kind(args, kwargs, freezer.share)

    def after_forward(self, output: Any) -> None:
        """Called after a forward that raised too: `output` is None then."""
        cache = self._freezer.cache
        if self._freezer.packer.busy:
            return
        self._freezer.packer.end()
        self._freezer.rows.end_forward()
        self._freezer.graphs.forbid()
        if cache is not None:
            if cache.busy:
                return
            cache.after_forward(raised=output is None)
        self._host.clear()
        self.end_proof(output)

    def end_proof(self, output: Any = None) -> None:
        """End the watch of the forward that proves, if any; `output` is None if it has raised."""
        paths, self._paths = self._paths, None
        if paths is None:
            return
        paths.remove()
        self._freezer.rows.hold()
        if output is not None:
            if paths.finish(output):
                self._freezer.freeze_moved()
            self._freezer.proved = True

    def count_last(self) -> dict[int, UnitUse]:
        """Run the last training forward once more, with counters; {} before the first."""
        freezer, last = self._freezer, self.last
        if last is None:
            return {}
        paused = nullcontext() if freezer.cache is None else freezer.cache.paused()
        # some models write into the tensors that they are called with
        clones = with_own_containers((last.args, last.kwargs), clone=True)
        with last.autocast, paused, freezer.graphs.paused():
            paths = self._watch_paths(compiled=True)
            try:
                return measure_forward(freezer.model, freezer.layout, *clones)
            finally:
                paths.remove()
                self.last = last  # not the clones

    def _watch_paths(self, **options: Any) -> GradientPaths:
        freezer = self._freezer
        no_grad = {*range(freezer.boundary), *({EMBEDDINGS} & freezer.frozen)}
        return GradientPaths(
            freezer.model,
            freezer.layout,
            no_grad=no_grad,
            freezes=freezer.frozen_sometime(),
            **options,
        )


def _answered(args: tuple[Any, ...]) -> bool:
    """Whether a dict holds what an earlier forward wrote into it: sentence-transformers' Matryoshka
    and AdaptiveLayerLoss call the model with it again, and take the answer from there.
    """
    dicts = [a for a in args if isinstance(a, Mapping)]
    return any(t.grad_fn is not None for t in tensors_in(dicts))


def _inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> ForwardInputs:
    autocast: AbstractContextManager[Any] = nullcontext()
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        autocast = torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type))
    return ForwardInputs(*with_own_containers((args, kwargs)), autocast)
