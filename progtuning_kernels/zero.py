"""Has DeepSpeed's ZeRO-1 and ZeRO-2 partition what trains, anew at every change of plan.

ZeRO copies what trains when it starts into one flat tensor per group; each rank keeps a slice of it
in float32, with the moments, and reduces every gradient of it. A tensor that froze later would be
kept, reduced and decayed on. At a change of plan DeepSpeed's own optimizer is built anew, in place,
over the tensors that are active; ranks send each other what lies in another's slice now. A flat
tensor has one step counter: tensors that began to train at different steps get flat tensors of
their own, as each has a counter of its own on one process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model.call_stack import caller
from .model.families import UnsupportedModelError

_OWN_KEYS = ("params", "param_names")  # of a part; the rest is its group's
# What an engine's optimizer is told or learns, beside what it is made of
_KEPT = ("loss_scaler", "dynamic_loss_scale", "custom_loss_scaler", "external_loss_scale")
_KEPT += ("clip_grad", "overflow", "_global_grad_norm", "_is_gradient_accumulation_boundary")


def is_engine(module: object) -> bool:
    """Whether a module is a `DeepSpeedEngine`, or of a class derived from it."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(module).__mro__)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO keeps the optimizer's state of a model in slices, one on every rank."""
    return any(getattr(p, "_hp_mapping", None) is not None for p in model.parameters())


def running_engine(model: nn.Module) -> Any | None:
    """The engine whose method, its forward as a rule, is under way and that holds `model`."""
    deepspeed = sys.modules.get("deepspeed.runtime.engine")
    engine = None if deepspeed is None else caller(deepspeed.DeepSpeedEngine)
    held = engine is not None and any(module is model for module in engine.modules())
    return engine if held else None


def refuse_engine(engine: Any) -> None:
    """Raise `UnsupportedModelError` for what does not follow a change of plan."""
    if type(engine).__name__ != "DeepSpeedEngine":
        _refuse(type(engine).__name__, "a DeepSpeedEngine, without pipeline stages")
    optimizer = getattr(engine, "optimizer", None)
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer":
        _refuse_partitioned(engine)
    elif kind == "BF16_Optimizer":
        what = "ZeRO-1 on bfloat16 with gradients accumulated in float32"
        _refuse(what, 'ZeRO-2, or leave "grad_accum_dtype" out')
    elif kind.startswith("FP16_"):
        _refuse("training in 16 bits without ZeRO", '"zero_optimization": {"stage": 1} or 2')
    elif optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        _refuse(kind, '"zero_optimization": {"stage": 1} or 2, or fully_shard (FSDP2)')
    elif getattr(optimizer, "in_backward", False):
        _refuse("an update inside backward, before ranks reduce,", "in_backward=False")


def _refuse_partitioned(engine: Any) -> None:
    zero = engine.optimizer
    base = zero.optimizer
    base = base.base if isinstance(base, PartitionedOptimizer) else base
    bases = [cls.__name__ for cls in type(base).__mro__]
    # MaskedOptimizer would clip by the norm of one rank's slice, Adagrad has its state before a
    # step, the others want whole tensors
    others = ("MaskedOptimizer", "Adagrad", "Adafactor", "Muon", "Onebit", "ZeroOneAdam")
    others += ("Lamb", "FusedLamb")
    for there, what, cure in (
        (zero.cpu_offload, "ZeRO-Offload", "GPU memory: leave offload_optimizer out"),
        (
            any(name.startswith(others) for name in bases),
            f"{bases[0]} in ZeRO",
            "torch.optim.AdamW",
        ),
        (zero.has_moe_layers, "a mixture of experts over ranks", "fully_shard (FSDP2)"),
        (zero.model_parallel_world_size > 1, "tensor parallelism", "fully_shard (FSDP2)"),
        (zero.elastic_checkpoint, "elastic_checkpoint", "a configuration without it"),
        (engine.load_universal_checkpoint(), "a universal checkpoint", "one of ZeRO"),
        (engine.is_deepcompile_enabled(), "DeepCompile", "a configuration without it"),
        (not hasattr(zero, "round_robin_bit16_offsets"), "this version", "deepspeed>=0.19"),
    ):
        if there:
            _refuse(what, cure)


def _refuse(what: str, cure: str) -> None:
    raise UnsupportedModelError(f"DeepSpeed: {what} does not follow a change of plan; use {cure}")


def ranks_of(engine: Any) -> list[int]:
    return dist.get_process_group_ranks(engine.seq_data_parallel_group)


def partition_active(engine: Any, *, patched: bool = True) -> None:
    """Have ZeRO hold the tensors of the engine's module that require grad, and no others.

    Raises `RuntimeError` for one that no group of the optimizer has, and leaves it out where the
    model is patched no more.
    """
    partitioned = _partitioned(engine)
    if partitioned is not None:
        partitioned.follow_flags(patched=patched)


def partition_at_next_forward(engine: Any) -> None:
    """As `partition_active` for a model that is patched no more, where all ranks train on."""

    def partition(module: nn.Module, _: object) -> None:
        if module.training:
            partition_active(engine, patched=False)
            hook.remove()

    hook = engine.module.register_forward_pre_hook(partition)


def awaits_partition(engine: Any) -> bool:
    """Whether a checkpoint has brought tensors that do not train, or not all that do."""
    optimizer = getattr(engine.optimizer, "optimizer", None)
    return isinstance(optimizer, PartitionedOptimizer) and optimizer.loaded


def follow_loads(model: nn.Module) -> None:
    """Have an engine that loads a checkpoint into `model` take the partitions of that checkpoint,
    before `model` is patched; a patched one does so by itself.
    """
    if _weights_loaded not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_weights_loaded)


def _weights_loaded(module: nn.Module, _: object) -> None:
    engine = running_engine(module)
    if engine is not None:
        refuse_engine(engine)
        _partitioned(engine)  # an engine loads the state of its optimizer after the weights


def _partitioned(engine: Any) -> PartitionedOptimizer | None:
    """What stands in ZeRO for the engine's optimizer, made where it is missing; None: no ZeRO."""
    zero = engine.optimizer
    if zero is None or isinstance(zero, torch.optim.Optimizer):
        return None
    if not isinstance(zero.optimizer, PartitionedOptimizer):
        zero.optimizer = PartitionedOptimizer(engine)
    return zero.optimizer


class _Part(dict):
    """Some tensors of a group of the user's optimizer, with the group's numbers, which whoever sets
    them here sets there: DeepSpeed's users set learning rates in `engine.optimizer.param_groups`.
    """

    def __init__(self, group: dict[str, Any], tensors: list[nn.Parameter], names: list[str]):
        super().__init__(group, params=tensors, param_names=names)
        self.group = group
        self.tensors = tensors

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key not in _OWN_KEYS:
            self.group[key] = value

    def read_numbers(self) -> None:
        self.update((k, v) for k, v in self.group.items() if k not in _OWN_KEYS)


@dataclass(frozen=True)
class _Slices:
    """Where the tensors of a part lie in its flat tensor, and how that is cut."""

    starts: dict[nn.Parameter, int]
    size: int  # elements of each rank's slice
    flat: Tensor  # (size,) the slice of this rank, float32


class PartitionedOptimizer:
    """Stands in ZeRO for the user's optimizer, whose groups it splits into parts.

    The user's groups stay, so that learning-rate schedulers find them; their parameters are the
    slices of this rank. Parts take the place of groups for the length of a call.

    Attributes:
        base: the user's optimizer.
        loaded: whether the parts are those of a checkpoint, and flags may differ.
    """

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        self.base = zero.optimizer
        self.loaded = False
        self._engine = engine
        self._names = {p: name for name, p in engine.module.named_parameters()}
        parameters = {name: p for p, name in self._names.items()}
        self._groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._parts: list[_Part] = []
        for group, held in zip(self.base.param_groups, zero.bit16_groups, strict=True):
            # what was frozen when ZeRO started is in the group's names at most
            named = [parameters.get(name) for name in group.get("param_names", ())]
            members = dict.fromkeys((*(p for p in named if p is not None), *held))
            self._groups.append((group, list(members)))
            part = _Part(group, held, [self._names[p] for p in held])
            part["params"] = group["params"]
            self._parts.append(part)
        zero.load_state_dict = self.load_into_zero
        engine.load_checkpoint = self.load_checkpoint

    @property
    def param_groups(self) -> list[_Part]:
        for part in self._parts:
            part.read_numbers()
        return self._parts

    @param_groups.setter
    def param_groups(self, parts: list[_Part]) -> None:
        self._parts = parts

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        groups, self.base.param_groups = self.base.param_groups, self.param_groups
        try:
            self.base.step()
        finally:
            self.base.param_groups = groups

    def state_dict(self) -> dict[str, Any]:
        groups, self.base.param_groups = self.base.param_groups, self.param_groups
        try:
            return self.base.state_dict()
        finally:
            self.base.param_groups = groups

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load what `state_dict` returned, for the parts that it was returned for."""
        groups, self.base.param_groups = self.base.param_groups, self.param_groups
        try:
            self.base.load_state_dict(saved)
            for part, loaded in zip(self._parts, self.base.param_groups, strict=True):
                part.group.update((k, v) for k, v in loaded.items() if k not in _OWN_KEYS)
        finally:
            self.base.param_groups = groups
        for i in range(len(self._parts)):
            flat = self._slices(i).flat
            _check_elementwise(self.state.get(flat, {}), flat)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        """The engine's own, whatever trains now: it looks for each tensor that is frozen among
        those that were when the checkpoint was written.
        """
        frozen = [p for _, members in self._groups for p in members if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        try:
            return type(self._engine).load_checkpoint(self._engine, *args, **options)
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def load_into_zero(self, state_dict_list: list[dict[str, Any]], **options: Any) -> None:
        """ZeRO's `load_state_dict`, for the tensors that trained when it was saved."""
        zero = self._engine.optimizer
        saved = state_dict_list[dist.get_rank(zero.dp_process_group)]["base_optimizer_state"]
        named = [group.get("param_names") for group in saved["param_groups"]]
        if None in named:  # of a run that was not patched
            parts = [self._part(group, members) for group, members in self._groups]
        else:
            parts = [self._part_of(names) for names in named]
        self._rebuild(parts)
        self.state.clear()
        self.loaded = True
        type(zero).load_state_dict(zero, state_dict_list, **options)

    def follow_flags(self, *, patched: bool) -> None:
        """Partition the tensors that require grad: parts lose what froze, what thawed is new."""
        self.loaded = False
        held = {p for part in self._parts for p in part.tensors}
        active = {p for p in self._engine.module.parameters() if p.requires_grad and p.numel()}
        known = {p for _, members in self._groups for p in members}
        unknown = active - known
        if unknown and patched:
            raise RuntimeError(
                f"DeepSpeed: {min(self._names.get(p, '?') for p in unknown)} trains from here on, "
                "and was in no group of the optimizer that trained when DeepSpeed started: call "
                "deepspeed.initialize before patch_model, or make the groups by "
                "handle.param_groups(); freeze it before that if it shall not train"
            )
        active -= unknown
        if held == active:
            return
        self._check_no_gradients_wait()
        parts: list[_Part] = []
        sources: list[tuple[_Slices, dict[str, Any]]] = []  # of the first parts
        for i, part in enumerate(self._parts):
            if kept := [p for p in part.tensors if p in active]:
                parts.append(self._part(part.group, kept))
                sources.append((self._slices(i), self.state.get(part["params"][0], {})))
                _check_elementwise(sources[-1][1], part["params"][0])
        for group, members in self._groups:
            if thawed := [p for p in members if p in active - held]:
                parts.append(self._part(group, thawed))
        self._rebuild(parts)
        self.state.clear()
        for i, (old, state) in enumerate(sources):
            new = self._slices(i)
            new.flat.data.copy_(self._moved(old, new, old.flat.data))
            if state:
                self.state[new.flat] = {
                    key: self._moved(old, new, value) if _per_element(value) else value
                    for key, value in state.items()
                }

    def _check_no_gradients_wait(self) -> None:
        zero = self._engine.optimizer
        kept = (*zero.averaged_gradients.values(), *zero.all_grad_tensors.values())
        grads = (p.grad for group in zero.bit16_groups for p in group)
        if any(gradient is not None for gradient in (*kept, *grads)):
            raise RuntimeError(
                "DeepSpeed: the plan changes while accumulated gradients wait for an update: call "
                "handle.seek(engine.global_steps) after engine.step(), which counts updates"
            )

    def _part(self, group: dict[str, Any], tensors: list[nn.Parameter]) -> _Part:
        return _Part(group, tensors, [self._names[p] for p in tensors])

    def _part_of(self, names: Sequence[str]) -> _Part:
        """The part that a checkpoint names."""
        for group, members in self._groups:
            found = {self._names[p]: p for p in members}
            if names[0] in found and found.keys() >= set(names):
                return self._part(group, [found[name] for name in names])
        raise ValueError(
            f"DeepSpeed: the checkpoint has {names[0]} and {len(names) - 1} more in one group of "
            "the optimizer, and this run has not: make the groups as they were made"
        )

    def _rebuild(self, parts: list[_Part]) -> None:
        """Have ZeRO hold the tensors of `parts`, with new slices; moments are the caller's part."""
        engine, zero = self._engine, self._engine.optimizer
        zero.destroy()
        stay = {p for part in parts for p in part.tensors}
        for p in (p for part in self._parts for p in part.tensors if p not in stay):
            p.data = p.data.clone()  # it would keep all of the old flat tensor alive
            p.grad_accum = None
        self._parts = parts
        new = engine._configure_zero_optimizer(self)
        vars(new).update((name, getattr(zero, name)) for name in _KEPT)
        new.load_state_dict = self.load_into_zero
        if engine._support_torch_style_backward:
            new.register_grad_acc_post_hook(engine._backward_post_hook)
        # in place: users, accelerate and schedulers hold the old one
        zero.__dict__ = new.__dict__
        for group, _ in self._groups:
            group["params"] = [part["params"][0] for part in parts if part.group is group]

    def _slices(self, index: int) -> _Slices:
        zero = self._engine.optimizer
        tensors, starts = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
        return _Slices(
            dict(zip(tensors[index], starts[index], strict=True)),
            zero.partition_size[index],
            zero.single_partition_of_fp32_groups[index],
        )

    def _moved(self, old: _Slices, new: _Slices, values: Tensor) -> Tensor:
        """What lies in `new`'s slice of this rank, of what `values` are for `old`'s.

        `values` is (old.size,), the result (new.size,), with zeros for padding.
        """
        group = self._engine.optimizer.dp_process_group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        moves = [*_moves(old, new)]
        sent = [[m for m in moves if (m.source, m.target) == (rank, r)] for r in range(ranks)]
        came = [[m for m in moves if (m.source, m.target) == (r, rank)] for r in range(ranks)]
        pieces = [values.narrow(0, m.read, m.size) for to in sent for m in to]
        counts = [[sum(m.size for m in to) for to in side] for side in (came, sent)]
        received = values.new_empty(sum(counts[0]))
        dist.all_to_all_single(received, torch.cat([values[:0], *pieces]), *counts, group=group)
        moved, place = values.new_zeros(new.size), 0
        for m in (m for by in came for m in by):
            moved.narrow(0, m.write, m.size).copy_(received.narrow(0, place, m.size))
            place += m.size
        return moved


@dataclass(frozen=True)
class _Move:
    """Elements that lie in one slice of the rank `source` and belong into that of `target`."""

    source: int
    target: int
    read: int  # where they begin in the slice of the source
    write: int  # where in that of the target
    size: int


def _moves(old: _Slices, new: _Slices) -> Iterator[_Move]:
    """All ranks' moves, in the same order on each of them."""
    for p, start in new.starts.items():
        done = 0
        while done < p.numel():
            source, read = divmod(old.starts[p] + done, old.size)
            target, write = divmod(start + done, new.size)
            size = min(p.numel() - done, old.size - read, new.size - write)
            yield _Move(source, target, read, write, size)
            done += size


def _per_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _check_elementwise(state: dict[str, Any], flat: Tensor) -> None:
    for key, value in state.items():
        if _per_element(value) and value.shape != flat.shape:
            raise RuntimeError(
                f"DeepSpeed: the optimizer's {key} has the shape {tuple(value.shape)}, not one "
                f"number for each of the {flat.numel()} elements that this rank updates: it cannot "
                "follow a change of plan; use torch.optim.AdamW"
            )
