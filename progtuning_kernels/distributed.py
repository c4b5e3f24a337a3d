"""Adapts what surrounds a model on several processes to a change of plan.

`DistributedDataParallel` decides when it is built which gradients it reduces; its reducer is built
anew before the first forward of a stage, in milliseconds. FSDP2 (`fully_shard`) only gathers one
frozen block less. DeepSpeed's ZeRO partitions anew (`zero.py`). Ranks compare what they train at
every change: another schedule on one of them would add up gradients of different tensors, or have
all wait for it. They do so through the store that torch's process groups began with, since a
collective is what would hang.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .model.call_stack import called_from
from .model.families import UnsupportedModelError
from .model.layout import Layout, parameter_slots
from .model.rows import rows_of
from .sharding import fsdp_records
from .zero import (
    awaits_partition,
    is_engine,
    partition_active,
    partition_at_next_forward,
    ranks_of,
    refuse_engine,
    running_engine,
)

_AGREED = "agreed"
_meetings = itertools.count()  # every rank makes its wrappers in the same order


def _loaded(module: str, name: str) -> type | tuple[()]:
    """A class of a module, or `()`, which has no instances, while that is not imported."""
    return getattr(sys.modules.get(module), name, ())


def shards_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that `fully_shard` was called on."""
    fsdp = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [module for module in model.modules() if isinstance(module, fsdp)]


def forms_of_shards(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """For each parameter that `fully_shard` has sharded, the tensors that take turns in its place:
    autograd sees the gathered one.
    """
    forms = ("sharded_param", "_unsharded_param", "_sharded_post_forward_param")
    for shard in fsdp_records(model).values():
        known = [getattr(shard, form, None) for form in forms]
        yield [p for p in known if p is not None]


def put_shards_back(model: nn.Module) -> None:
    """Put shards in the place of gathered weights, which an evaluation leaves: flags are set on
    what a module holds, and FSDP2 copies them from the shard when it gathers, not back.
    """
    for module in shards_of(model):
        module.reshard()


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for FSDP1 and ZeRO-3: their flat pieces of parameters cannot
    freeze block by block.
    """
    cure = (
        "shard it by torch.distributed.fsdp.fully_shard (FSDP2), block by block; in accelerate: "
        "fsdp_version=2"
    )
    name = type(model).__name__
    fsdp1 = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    parameters = [*model.parameters()]
    flat = any(getattr(p, "_fsdp_flattened", False) for p in parameters) or any(
        isinstance(module, fsdp1) for module in model.modules()
    )
    # inside its forward FSDP1 has put tensors without a trace of it in the place of flat pieces
    if flat or (fsdp1 and called_from(sys.modules[fsdp1.__module__].__file__)):
        raise UnsupportedModelError(
            f"{name}: FSDP1 (FullyShardedDataParallel) keeps gradients and state of frozen "
            f"parameters, and wants a flat piece to train as a whole: {cure}"
        )
    if any(hasattr(p, "ds_id") for p in parameters):
        raise UnsupportedModelError(
            f"{name}: DeepSpeed ZeRO-3 fixes what trains when it starts, and leaves blocks that "
            f"thaw later untrained: use ZeRO-2, or {cure}"
        )


def surrounding(model: nn.Module) -> DistributedDataParallel | nn.Module | None:
    """What runs the forward of `model` that is under way: DDP, a DeepSpeed engine, or the model
    itself if sharded.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and any(module is model for module in ddp.modules()):
        return ddp
    return model if shards_of(model) else running_engine(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DeepSpeedEngine` and `torch.compile`, in any
    order.

    Raises `UnsupportedModelError` for other wrappers, and for one around a part of the model.
    """
    while True:
        inner = _without_compile(model)
        if not _reduces(inner):
            break
        model = inner.module
    for path, module in inner.named_modules():
        _refuse_wrapper(module)
        if _reduces(module):
            raise UnsupportedModelError(
                f"{path} is a {type(module).__name__} inside the {type(inner).__name__} to be "
                f"patched, whose forward it does not see: pass model.{path}.module"
            )
    return inner


def _without_compile(wrapped: nn.Module) -> nn.Module:
    while True:
        _refuse_wrapper(wrapped)
        # PEFT hands attributes of the model inside on: a child of this name is what counts
        inner = wrapped._modules.get("_orig_mod")
        if inner is None:
            return wrapped
        wrapped = inner


def _refuse_wrapper(module: nn.Module) -> None:
    if isinstance(module, DataParallel):
        raise UnsupportedModelError(
            "DataParallel copies the model to every GPU in each forward, without its patch: "
            "use DistributedDataParallel, one process per GPU (torchrun)"
        )
    if is_engine(module):
        refuse_flat_parameters(module)
        refuse_engine(module)


def _reduces(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) or is_engine(module)


class Wrapper:
    """What surrounds one patched model on several processes; arguments as `PatchHandle.attach`."""

    def __init__(
        self, model: nn.Module, layout: Layout, wrapped: nn.Module, timeout: timedelta | None
    ) -> None:
        inner = _without_compile(wrapped)
        if not any(module is model for module in inner.modules()):
            raise ValueError(
                f"attach() takes what surrounds the patched {type(model).__name__}; this "
                f"{type(wrapped).__name__} does not hold it"
            )
        refuse_flat_parameters(inner)
        self._model = model
        self._layout = layout
        self.ddp = inner if isinstance(inner, DistributedDataParallel) else None
        self.engine: Any = inner if is_engine(inner) else None
        self._root = None if _reduces(inner) or not shards_of(model) else inner
        self._lowest: nn.Module | None = None  # FSDP2: what must not gather what lies below it
        records = fsdp_records(model) if self.sharded else {}
        self._mesh = next((r.sharded_param.device_mesh for r in records.values()), None)
        self._ranks = self._all_ranks()
        self._timeout = timeout or self._group_timeout()
        self._meeting = f"progtuning/{next(_meetings)}/{min(self._ranks, default=0)}"
        self._round = self._shared = 0
        self._behind = False  # a change of plan that was not followed to the end

    @property
    def sharded(self) -> bool:
        return self._root is not None

    @property
    def on_several_ranks(self) -> bool:
        return len(self._ranks) > 1

    def holds(self, found: nn.Module) -> bool:
        """Whether `found`, of `surrounding`, is what this was made for."""
        return found in (self.ddp, self.engine) or (self.sharded and found is self._model)

    @property
    def awaits_rebuild(self) -> bool:
        """Whether the last change of plan ended in an error, or a checkpoint was loaded that may
        have been written under another plan.
        """
        return self._behind or (self.engine is not None and awaits_partition(self.engine))

    def reshard(self) -> None:
        if self.sharded:
            put_shards_back(self._model)

    def follow(self, *, step: int, boundary: int, options: Sequence[str]) -> None:
        """Follow a change of plan, on every rank before its first forward under it: `RuntimeError`
        on all ranks that come if another trains something else or does not come in time.

        Args:
            options: with which ranks of a sharded model gather in other forwards.
        """
        self._behind = True
        slots = list(parameter_slots(self._model, self._layout))
        names = [slot.name for slot in slots if slot.parameter.requires_grad]
        which = [str(r.runs) for slot in slots for r in rows_of(slot.owner).values()]
        what = [f"step {step}, boundary {boundary}, {len(names)} active tensors"]
        if self.sharded:
            what += options
        self._agree(step, ", ".join(what), [*names, *which, *what])
        self._rebuild(boundary)
        self._behind = False

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks of a sharded model, entry by entry, by one collective for each
        dimension of its mesh.
        """
        # that of the collectives: under CPUOffloadPolicy, shards are elsewhere
        found = torch.tensor(numbers, dtype=torch.int32, device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, self._mesh.get_group(dimension))
        return found.tolist()

    def share(self, value: bytes, source: int | None = None) -> bytes:
        """What the rank `source`, or the first, was called with, on all ranks; `RuntimeError` where
        that does not come in time.
        """
        source = self._ranks[0] if source is None else source
        store = dist.distributed_c10d._get_default_store()
        place = f"{self._meeting}/shared/{self._shared}"
        self._shared += 1
        if self.rank == source:
            store.set(place, value)
            return value
        try:
            store.wait([place], self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {source} has not come to this forward within "
                f"{self._timeout.total_seconds():.0f} s: {error}"
            ) from error
        value = store.get(place)
        if store.add(f"{place}/read", 1) == len(self._ranks) - 1:  # nobody else will
            store.delete_key(place)
            store.delete_key(f"{place}/read")
        return value

    def release(self) -> None:
        """Have everything reduced and gathered again, for a model that is not patched any more."""
        if not dist.is_initialized():  # a script may end its process group first
            return
        if self.engine is not None and sys.exc_info()[0] is not None:
            # gradients may wait, and the other ranks need not have come to an end
            partition_at_next_forward(self.engine)
        else:
            self._rebuild(boundary=0, patched=False)

    def _rebuild(self, boundary: int, *, patched: bool = True) -> None:
        if self.ddp is not None:
            _rebuild_reducer(self.ddp)
        if self.engine is not None:
            partition_active(self.engine, patched=patched)
        if self._root is not None:
            self._stop_gathering_below(boundary)

    def _agree(self, step: int, what: str, names: Sequence[str]) -> None:
        if len(self._ranks) < 2:
            return
        digest = hashlib.sha256("\n".join([str(step), *names]).encode()).hexdigest()
        rank, chief = dist.get_rank(), self._ranks[0]
        store = dist.distributed_c10d._get_default_store()
        place, before = (f"{self._meeting}/{self._round - i}" for i in range(2))
        self._round += 1
        store.set(f"{place}/{rank}", f"{digest} {what}")
        store.delete_key(f"{before}/{rank}")  # the chief has read it: there was a verdict
        if rank == chief:
            verdict = self._compare(store, place, step)
            if verdict == _AGREED:  # all have come here, and so have read the last verdict
                store.delete_key(f"{before}/verdict")
            store.set(f"{place}/verdict", verdict)
            if verdict != _AGREED:
                # the store may live in this process, which is about to end with an error
                came = [rank for rank in self._ranks[1:] if store.check([f"{place}/{rank}"])]
                with contextlib.suppress(RuntimeError):
                    read = [f"{place}/{rank}/has read" for rank in came]
                    store.wait(read, timedelta(seconds=5))
        else:
            # the chief says who is missing, if it gets to that first
            patience = self._timeout + timedelta(seconds=5)
            try:
                store.wait([f"{place}/verdict"], patience)
            except RuntimeError as error:
                raise RuntimeError(
                    f"rank {chief} did not come to the change of plan at step {step} within "
                    f"{self._timeout.total_seconds():.0f} s: {error}"
                ) from error
            verdict = store.get(f"{place}/verdict").decode()
            if verdict != _AGREED:
                store.set(f"{place}/{rank}/has read", "")
        if verdict != _AGREED:
            raise RuntimeError(verdict)

    def _compare(self, store: Any, place: str, step: int) -> str:
        """The verdict for every rank: `_AGREED`, or what is wrong."""
        keys = {rank: f"{place}/{rank}" for rank in self._ranks}
        try:
            store.wait([*keys.values()], self._timeout)
        except RuntimeError:
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            return (
                f"rank {', '.join(map(str, missing))} did not come to the change of plan at step "
                f"{step} within {self._timeout.total_seconds():.0f} s: every rank needs the same "
                "schedule, and one handle.advance() per optimizer step"
            )
        said = {rank: store.get(key).decode().split(" ", 1) for rank, key in keys.items()}
        groups: dict[str, list[int]] = {}
        for rank, (digest, _) in said.items():
            groups.setdefault(digest, []).append(rank)
        if len(groups) == 1:
            return _AGREED
        descriptions = "; ".join(
            f"rank {', '.join(map(str, ranks))}: {said[ranks[0]][1]}" for ranks in groups.values()
        )
        return (
            f"ranks do not train the same: {descriptions}. Every rank needs the same schedule and "
            "seed, the same frozen layers and rows, and one handle.advance() per optimizer step"
            + ("; under fully_shard also a cache and packing, or none" if self.sharded else "")
        )

    def _all_ranks(self) -> list[int]:
        if self.ddp is not None:
            return dist.get_process_group_ranks(self.ddp.process_group)
        if self.engine is not None:
            return ranks_of(self.engine)
        return [] if self._mesh is None else sorted(self._mesh.mesh.flatten().tolist())

    def _group_timeout(self) -> timedelta:
        if len(self._ranks) < 2:
            return timedelta(0)
        group = dist.group.WORLD if self.ddp is None else self.ddp.process_group
        kind = next(self._model.parameters()).device.type
        if self._mesh is not None:  # under CPUOffloadPolicy, shards are on another
            kind = self._mesh.device_type
        return group._get_backend(torch.device(kind)).options._timeout

    def _stop_gathering_below(self, boundary: int) -> None:
        """Backward ends in block `boundary`; FSDP2 would gather the one below it ahead of time."""
        if self._lowest is not None:
            self._lowest.set_modules_to_backward_prefetch([])
            self._lowest = None
        if boundary == 0:
            return
        inside = self._layout.block_paths[boundary : boundary + 1]
        lowest = self._model.get_submodule(inside[0]) if inside else self._root
        shards = shards_of(lowest)
        # with shards of its own inside, which of them ends backward is not known
        alone = shards[:1] == [lowest] and (len(shards) == 1 or lowest is self._root)
        if alone and not lowest._get_fsdp_state()._states_to_backward_prefetch:
            # an explicit list takes the place of the default; the module itself is there already
            lowest.set_modules_to_backward_prefetch([lowest])
            self._lowest = lowest


def _rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Make a new reducer as unpickling does, without broadcasting parameters, which are equal."""
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    # torch keeps no record of a hook of its own, but for the name that it logs
    logged = ddp._get_ddp_logging_data().get("comm_hook")
    built_in = [h for h in dist.BuiltinCommHookType.__members__.values() if str(h) == logged]
    ddp._remove_autograd_hooks()
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    ddp._has_rebuilt_buckets = False
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    for hook in built_in:
        ddp._register_builtin_comm_hook(hook)
    if ddp.mixed_precision is not None:
        ddp.reducer._set_mixed_precision_param_dtype(ddp.mixed_precision.param_dtype)
