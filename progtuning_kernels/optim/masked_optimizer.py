"""What every masked optimizer shares: who is active, one norm, one call per bucket, release.

`p.requires_grad` alone says whether a tensor is active. A change of plan never touches
`param_groups`, so learning rate schedulers, checkpoints and trainers built around them keep working
at every stage. What a user changes in them counts from the next step on; looking for it takes 4 us
of a step's 180, for 200 small tensors in 2 groups on a CPU.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import freeze_events
from ..ops.bucket import (
    GROUPS_PER_LAUNCH,
    TENSORS_PER_LAUNCH,
    Bucket,
    Gradients,
    Hyper,
    is_dense,
)
from ..ops.grad_decision import GradDecision, decide, norm_over_ranks
from ..sharding import local_of
from .frozen_state import OnFreeze, offload_frozen_state, release_frozen_state
from .in_backward import ClipMode, UpdateInBackward

Nonfinite = Literal["skip", "ignore"]


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


class ActiveBucket:
    """A bucket together with the parameters whose gradients it wants, DTensors included."""

    def __init__(
        self,
        members: Sequence[Member],
        states: Sequence[dict[str, Tensor]],
        bucket: Bucket,
        groups: Sequence[int],
    ) -> None:
        self.members, self.states = list(members), list(states)
        self.parameters = [member.parameter for member in members]
        self.bucket = bucket
        self.groups = list(groups)  # of the optimizer, in the bucket's numbering
        self._places = self._places_of_states()
        self._written: list[int] | None = None  # versions after the last update, with masters
        self.sharded = any(local_of(p) is not p for p in self.parameters)

    def follow_parameters(self) -> None:
        """Masters of parameters that somebody else has written to, as loading weights does.

        A master keeps what its parameter's precision does not show.
        """
        bucket = self.bucket
        if bucket.masters is None:
            return
        versions = [p._version for p in bucket.params]
        for i, (p, master) in enumerate(zip(bucket.params, bucket.masters, strict=True)):
            if self._written is None or self._written[i] != versions[i]:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        self._written = [version + 1 for version in versions]  # the update is one more

    def gather(self) -> Gradients:
        """The gradients of this moment.

        Raises:
            RuntimeError: one is sparse.
        """
        grads = [p.grad for p in self.parameters]
        if self.sharded:
            grads = [None if grad is None else local_of(grad) for grad in grads]
        for grad in grads:
            if grad is not None and grad.is_sparse:
                raise RuntimeError(
                    f"a parameter of shape {tuple(grad.shape)} has a sparse gradient; build the "
                    "embedding with sparse=False"
                )
        return self.bucket.gather(grads)

    def is_current(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether everything still lies where the table says.

        Parameters and state move with `.data =`, `.to`, `share_memory_` and FSDP; state with
        whoever clears or replaces the optimizer's entries, too.
        """
        locals_ = map(local_of, self.parameters) if self.sharded else self.parameters
        return (
            self.bucket.addresses == [p.data_ptr() for p in locals_]
            and all(
                state.get(p) is own for p, own in zip(self.parameters, self.states, strict=True)
            )
            and self._places == self._places_of_states()
        )

    def _places_of_states(self) -> list[int]:
        return [
            local_of(t).data_ptr()
            for own in self.states
            for t in own.values()
            if isinstance(t, Tensor)
        ]


class MaskedOptimizer(Optimizer):
    """Base of the masked optimizers; a subclass writes `init_state`, `make_bucket` and `hyper`.

    Args:
        params: parameters, named parameters or groups, frozen ones included.
        defaults: hyper-parameters of the groups.
        max_grad_norm: clip the global L2 norm of the active gradients to this; None: no clipping.
        on_freeze: "release" drops the state of a tensor as soon as it stops being active, "keep"
            holds it for a tensor that will be thawed, "offload" holds it in pinned CPU memory.
        nonfinite: "skip" leaves everything as it is in a step whose gradients hold a NaN or an
            infinity, and counts it; "ignore" saves the norm pass where nothing is clipped.
        in_backward: update every block as soon as its gradients are there (`in_backward.py`).
        clip_mode: how `max_grad_norm` and `in_backward` go together.
        zero_grads: leave zeros in the gradients that were used.
        seed: of the random numbers that round the state.
    """

    # GradScaler then hands over its scale and its finding instead of unscaling in passes of its own
    _step_supports_amp_scaling = True
    # of the whole optimizer: in a group they would be ignored
    _SETTINGS = frozenset(
        ("max_grad_norm", "on_freeze", "nonfinite", "clip_mode", "zero_grads", "seed")
    )

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        on_freeze: OnFreeze,
        nonfinite: Nonfinite,
        in_backward: bool,
        clip_mode: ClipMode,
        zero_grads: bool,
        seed: int,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        for name, value, kinds in (
            ("on_freeze", on_freeze, OnFreeze),
            ("nonfinite", nonfinite, Nonfinite),
            ("clip_mode", clip_mode, ClipMode),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        if clip_mode != "exact" and not in_backward:
            raise ValueError(f"clip_mode={clip_mode!r} is for in_backward=True")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must have 64 bits, got {seed}")
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.on_freeze = on_freeze
        self.nonfinite = nonfinite
        self.clip_mode = clip_mode
        self.zero_grads = zero_grads
        self.seed = seed
        self._norm: Tensor | None = None
        self.accumulating: Callable[[], bool] = _never
        self._skipped: Tensor | int = 0
        self._control: Tensor | None = None
        self._start(UpdateInBackward(self) if in_backward else None)

    def _start(self, in_backward: UpdateInBackward | None) -> None:
        self._buckets: list[ActiveBucket] | None = None
        self._waiting: list[Member] = []  # active, never seen with a gradient: no state yet
        self._settled = True  # False: what was loaded for frozen tensors is all there yet
        self._flags = self._current_flags()
        self._in_backward = in_backward
        self._forget_tables()
        freeze_events.listen(self)

    def __getstate__(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in (*self._SETTINGS, "_norm")}
        settings["_skipped"] = self.skipped_steps
        in_backward = self._in_backward is not None
        return {**super().__getstate__(), **settings, "_in_backward": in_backward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy brings its settings; load_state_dict brings state and groups, and keeps ours
        in_backward = state.pop("_in_backward", None)
        super().__setstate__(state)
        if in_backward is None:
            self._forget_tables()
        else:
            self.accumulating, self._control = _never, None
            self._start(UpdateInBackward(self) if in_backward else None)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients before clipping, 0-dim float32; None: nobody needed it.

        Reading it copies it on its device: on a GPU every step writes to the same place.
        """
        return None if self._norm is None else self._norm.clone()

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of non-finite gradients. Reading it waits for the device."""
        return int(self._skipped) + (0 if self._control is None else int(self._control[3]))

    def _control_on(self, device: torch.device) -> Tensor | None:
        """What the native kernels of a GPU decide in: kept, so that no step has to clear it."""
        if device.type != "cuda":
            return None
        if self._control is None or self._control.device != device:
            skipped = self.skipped_steps
            self._skipped = 0
            self._control = torch.tensor(
                [0.0, 1.0, 0.0, skipped], dtype=torch.float32, device=device
            )
        return self._control

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add to the gradients: `in_backward` waits for the last one.

        for micro_batch in window[:-1]:
            with optimizer.accumulate():
                loss(micro_batch).backward()
        loss(window[-1]).backward()
        optimizer.step()
        """
        before, self.accumulating = self.accumulating, _always
        try:
            yield
        finally:
            self.accumulating = before

    def on_flags_changed(self) -> None:
        """Called when `requires_grad` has changed somewhere, perhaps on another model."""
        flags = self._current_flags()
        if self._flags != flags:
            self._flags = flags
            self._forget_tables()
            if self._settled:
                self._settle_frozen_state()

    def regrouped(self) -> bool:
        """Whether the groups hold other tensors than when the tables were made."""
        return self._sizes != [len(group["params"]) for group in self.param_groups] or not all(
            map(operator.is_, self._tensors, self._parameters())
        )

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _forget_tables(self) -> None:
        """They hold addresses of tensors, and the groups that these are in."""
        tensors = list(self._parameters())
        if len(set(tensors)) < len(tensors):
            twice = next(p for p, count in Counter(tensors).items() if count > 1)
            raise ValueError(
                f"a tensor of shape {tuple(twice.shape)} is in the groups twice, and would be "
                "updated twice in a step: take it out once"
            )
        self._buckets, self._tensors = None, tensors
        self._sizes = [len(group["params"]) for group in self.param_groups]
        if self._in_backward is not None:
            self._in_backward.install()

    def _settle_frozen_state(self) -> None:
        self._settled = True
        if self.on_freeze == "release":
            release_frozen_state(self)
        elif self.on_freeze == "offload":
            offload_frozen_state(self)

    def check_groups(self, groups: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Raise `ValueError` for what a group asks for and this optimizer would not do.

        Args:
            groups: None: its own. It runs in every step, so that what is written into a group
                later is found, too.
        """
        for group in self.param_groups if groups is None else groups:
            if not self._SETTINGS.isdisjoint(group) or "in_backward" in group:
                name = min(group.keys() & (self._SETTINGS | {"in_backward"}))
                raise ValueError(
                    f"{name} is a setting of the whole optimizer, and would be ignored in a group: "
                    f"take it out, and give it to {type(self).__name__}({name}=...)"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check_groups([{**self.defaults, **param_group}])
        super().add_param_group(param_group)
        for p in param_group["params"]:
            if p.requires_grad:
                self._refuse_complex(p)
        if hasattr(self, "_buckets"):  # not while torch's own constructor adds the first ones
            self._flags += [p.requires_grad for p in param_group["params"]]
            self._forget_tables()

    def _refuse_complex(self, p: Tensor) -> None:
        if p.is_complex():
            raise ValueError(
                f"{type(self).__name__} has no update for complex parameters ({p.dtype}, shape "
                f"{tuple(p.shape)}): keep torch.view_as_real of it as the parameter, or freeze it"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `{}` for a parameter that has no state.

        "masked" holds what belongs to no parameter: the seed, steps skipped, and the norm that
        `clip_mode="previous_norm"` clips by. Hooks see all of it.
        """

        def complete(_: Optimizer, saved: dict[str, Any]) -> None:
            for group in saved["param_groups"]:
                for i in group["params"]:
                    saved["state"].setdefault(i, {})
            saved["masked"] = {"seed": self.seed, "skipped_steps": self.skipped_steps}
            if self._in_backward is not None:
                saved["masked"]["previous_norm"] = self._in_backward.previous_norm

        present = set(map(id, self._parameters()))
        others = [k for k in self.state if isinstance(k, Tensor) and id(k) not in present]
        apart = {p: self.state.pop(p) for p in others}
        if any(apart.values()):
            shapes = ", ".join(str(tuple(p.shape)) for p, state in apart.items() if state)
            warnings.warn(
                f"no group holds the tensors of shape {shapes} any more: their state is not saved. "
                "optimizer.state[new] = optimizer.state.pop(old) hands it on",
                stacklevel=2,
            )
        first = self.register_state_dict_post_hook(complete, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()
            self.state.update(apart)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, at any stage; hooks see all of it.

        The plan that its state belongs to may be yet to come, as where the handle is loaded after
        the optimizer: what `on_freeze` says of tensors that are frozen is done in the next step.

        Raises:
            ValueError: groups of other sizes, state of another shape or of another kind of
                optimizer, or an option that this one does not have. Nothing is changed then.
        """
        loaded: dict[str, Any] = {}
        owners: dict[Any, Member] = {}

        def take(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            self.check_groups(saved["param_groups"])
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            owners.update(zip(numbers, self.members(), strict=False))
            loaded.update(saved)
            if [len(group["params"]) for group in saved["param_groups"]] == self._sizes:
                for i, member in owners.items():
                    if state := saved["state"].get(i):
                        self.check_saved(state, member)
            # torch would cast every tensor of the state to its parameter's dtype: sixteen bits of
            # the moments of a bfloat16 parameter would be gone, and codes would be anything
            return {**saved, "state": {k: v for k, v in saved["state"].items() if k not in owners}}

        def put(_: Optimizer) -> None:
            for i, member in owners.items():
                if state := loaded["state"].get(i):
                    self.state[member.parameter] = self.state_from(state, member.parameter)
            if masked := loaded.get("masked"):
                self.seed = masked["seed"]
                self._skipped, self._control = masked["skipped_steps"], None
                if self._in_backward is not None:
                    self._in_backward.previous_norm = masked.get("previous_norm")
            self._settled = False

        hooks = (
            self.register_load_state_dict_pre_hook(take),  # after the user's own
            self.register_load_state_dict_post_hook(put, prepend=True),  # before them
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.forget_backward()

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """Fresh state of one parameter."""
        raise TypeError(f"{type(self).__name__} defines no init_state")

    def check_saved(self, saved: dict[str, Any], member: Member) -> None:
        """Raise `ValueError` if this is not what a parameter's state looks like here."""

    def state_from(self, saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """A copy of one parameter's saved state, as this optimizer keeps it, on its device."""
        return {
            key: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
            for key, value in saved.items()
        }

    def make_bucket(
        self,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        indices: list[int],
        groups: list[int],
    ) -> Bucket:
        """The bucket of these tensors, local shards where they are DTensors."""
        raise TypeError(f"{type(self).__name__} defines no make_bucket")

    def hyper(self, group: dict[str, Any]) -> Hyper:
        """The numbers of a group as the update wants them."""
        raise TypeError(f"{type(self).__name__} defines no hyper")

    def members(self) -> list[Member]:
        """Every parameter, frozen ones included, in the order of the groups."""
        found: list[Member] = []
        for i, group in enumerate(self.param_groups):
            size = len(group["params"])
            names = group.get("param_names") or [None] * size
            if len(names) != size:
                raise ValueError(
                    f"group {i} has {size} params and {len(names)} param_names: change both"
                )
            for p, name in zip(group["params"], names, strict=True):
                found.append(Member(p, len(found), i, name))
        return found

    def build_buckets(self, members: Iterable[Member]) -> list[ActiveBucket]:
        """Buckets of one device and dtype, split where one launch could not take them."""
        kinds: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
        for member in members:
            self._refuse_complex(member.parameter)
            local = local_of(member.parameter)
            kinds[local.device, local.dtype, is_dense(local)].append(member)
        buckets = []
        for same in kinds.values():
            part: list[Member] = []
            groups: set[int] = set()
            for member in same:
                groups.add(member.group)
                if len(part) == TENSORS_PER_LAUNCH or len(groups) > GROUPS_PER_LAUNCH:
                    buckets.append(self._build_bucket(part))
                    part, groups = [], {member.group}
                part.append(member)
            buckets.append(self._build_bucket(part))
        return buckets

    def _build_bucket(self, members: list[Member]) -> ActiveBucket:
        groups = sorted({member.group for member in members})
        states = [self.state[m.parameter] or self._start_state(m.parameter) for m in members]
        for member, state in zip(members, states, strict=True):
            if isinstance(state.get("step"), float | int):  # written by hand, as older torch had it
                device = member.parameter.device
                state["step"] = torch.tensor(state["step"], dtype=torch.float32, device=device)
        bucket = self.make_bucket(
            [local_of(member.parameter).detach() for member in members],
            [{key: local_of(value) for key, value in state.items()} for state in states],
            [member.index for member in members],
            [groups.index(member.group) for member in members],
        )
        return ActiveBucket(members, states, bucket, groups)

    def _start_state(self, p: Tensor) -> dict[str, Tensor]:
        self.state[p].update(self.init_state(p))
        return self.state[p]

    def _current_flags(self) -> list[bool]:
        return [p.requires_grad for p in self._parameters()]

    def _active_buckets(self) -> list[ActiveBucket]:
        """The buckets of this step: those of the last one unless something about them changed."""
        fresh = any(member.parameter.grad is not None for member in self._waiting)
        current = self._buckets is not None and all(
            bucket.is_current(self.state) for bucket in self._buckets
        )
        if fresh or not current:
            active = [m for m in self.members() if m.parameter.requires_grad]
            started = [
                m for m in active if m.parameter.grad is not None or self.state.get(m.parameter)
            ]
            for m in started:
                grad = m.parameter.grad
                if grad is not None and grad.shape != m.parameter.shape:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(m.parameter.shape)} has a gradient of shape "
                        f"{tuple(grad.shape)}, of before it was replaced: call zero_grad() first"
                    )
            self._buckets = self.build_buckets(started)
            known = {member.index for member in started}
            self._waiting = [m for m in active if m.index not in known]
        return self._buckets

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every active tensor that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: a sparse gradient, or a loss scale that came too late for `in_backward`.
            ValueError: as `check_groups`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        early = self._in_backward
        if early is not None and early.keeps_gradients:
            early = None
        if early is not None and scale is not None:
            raise RuntimeError(
                f"{type(self).__name__}: in_backward=True has updated with scaled gradients before "
                "GradScaler said so: train in bfloat16, or clip with clip_mode='exact'"
            )
        self.check_groups()
        if self.regrouped():
            self._forget_tables()
        self.on_flags_changed()  # where nobody announced it
        if not self._settled:
            self._settle_frozen_state()
        left = early is None or any(p.grad is not None for p in self._parameters())
        active = self._active_buckets() if left else []
        gradients = [bucket.gather() for bucket in active]
        if any(any(some.addresses) for some in gradients):
            # GradScaler hands over its finding without its scale where it has unscaled already
            unscaled = found_inf is not None and scale is None
            known = None
            if self._in_backward is not None and not unscaled:
                known = self._in_backward.known_norm(active)
            control = self._control_on(active[0].bucket.device)
            decision = self.decide(
                active, gradients, scale, found_inf, known_norm=known, control=control
            )
            self.apply(active, gradients, decision)
            self._norm = decision.norm
            if decision.found_inf is not None and not decision.counted:
                self._skipped = self._skipped + decision.found_inf
        if early is not None:
            early.end_of_step()
        return loss

    def decide(
        self,
        active: Sequence[ActiveBucket],
        gradients: Sequence[Gradients],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        known_norm: Tensor | None = None,
        previous_norm: Tensor | None = None,
        control: Tensor | None = None,
    ) -> GradDecision:
        """Norm, clipping coefficient and whether to skip, for these gradients taken together.

        Args: as `ops.grad_decision.decide`.
        """
        if known_norm is None and any(bucket.sharded for bucket in active):
            known_norm = norm_over_ranks([p.grad for b in active for p in b.parameters])
        return decide(
            [bucket.bucket for bucket in active],
            gradients,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.nonfinite == "skip",
            grad_scale=scale,
            found_inf=found_inf,
            known_norm=known_norm,
            previous_norm=previous_norm,
            control=control,
        )

    def apply(
        self,
        active: Sequence[ActiveBucket],
        gradients: Sequence[Gradients],
        decision: GradDecision,
    ) -> None:
        """One update call per bucket."""
        for bucket, some in zip(active, gradients, strict=True):
            device = bucket.bucket.device
            bucket.follow_parameters()
            bucket.bucket.update(
                some,
                [self.hyper(self.param_groups[group]) for group in bucket.groups],
                grad_factor=_on(decision.grad_factor, device),
                found_inf=_on(decision.found_inf, device),
                seed=self.seed,
                zero_grads=self.zero_grads,
            )


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=True)


def _never() -> bool:
    return False


def _always() -> bool:
    return True
