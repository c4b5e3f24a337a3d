"""What every masked optimizer shares: who is active, one norm, one call per bucket, release.

`p.requires_grad` alone says whether a tensor is active. A change of plan never touches
`param_groups`, so learning rate schedulers, checkpoints and trainers built around them keep working
at every stage. What a user changes in them counts from the next step on; looking for it takes 4 us
of a step's 180, for 200 small tensors in 2 groups on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import freeze_events
from ..ops.masked_norm import masked_norm
from ..ops.masked_update.bucket import Bucket, Hyper
from ..ops.masked_update.grad_decision import GradDecision, decide, decide_by, norm_over_ranks
from ..sharding import local_of
from .active_buckets import (
    ActiveBucket,
    BucketTable,
    GroupSnapshot,
    Member,
    members_of,
    parameters_of,
)
from .host_state import HostReport, HostState, Work, grads_of, norms_of
from .in_backward import BackwardHooks, ClipMode, block_tables, refuse_distributed
from .state import (
    OnFreeze,
    load_state_dict,
    open_state,
    save_state_dict,
    settle_frozen_state,
    state_bytes,
)

Nonfinite = Literal["skip", "ignore"]
StateDevice = Literal["cpu"]


class MaskedOptimizer(Optimizer):
    """Base of the masked optimizers; a subclass writes `init_state`, `make_bucket` and `hyper`.

    Args:
        params: parameters, named parameters or groups, frozen ones included.
        defaults: hyper-parameters of the groups; the settings are those of `MaskedAdamW`.
    """

    # GradScaler then hands over its scale and its finding instead of unscaling in passes of its own
    _step_supports_amp_scaling = True
    # of the whole optimizer: in a group they would be ignored
    _SETTINGS = frozenset({"max_grad_norm", "on_freeze", "nonfinite", "in_backward", "seed"})
    _SETTINGS |= {"clip_mode", "zero_grads", "state_device"}
    # What a subclass defines:
    init_state: Callable[[Tensor], dict[str, Tensor]]  # fresh state of one parameter
    # (params, states, indices, groups) of a launch, local shards where they are DTensors
    make_bucket: Callable[[list[Tensor], list[dict[str, Tensor]], list[int], list[int]], Bucket]
    hyper: Callable[[dict[str, Any]], Hyper]  # the numbers of a group as the update wants them

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
        state_device: StateDevice | None = None,
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
        if zero_grads and in_backward:  # step() would use the zeros once more
            raise ValueError("zero_grads keeps the gradients that in_backward=True gives up")
        if state_device not in (None, "cpu"):
            raise ValueError(f"state_device must be None or 'cpu', got {state_device!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must have 64 bits, got {seed}")
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.on_freeze: OnFreeze = on_freeze
        self.nonfinite = nonfinite
        self.in_backward = in_backward
        self.clip_mode = clip_mode
        self.zero_grads = zero_grads
        self.seed = seed
        self.state_device: StateDevice | None = state_device
        self._norm: Tensor | None = None
        self._previous_norm: Tensor | None = None  # of the last good step of `in_backward`
        self._skipped: Tensor | int = 0
        self._start()

    def _start(self) -> None:
        self.accumulating: Callable[[], bool] = lambda: False
        self._control: Tensor | None = None
        self._settled = True  # False: the state loaded for frozen tensors is still there
        self._host = None if self.state_device is None else HostState()
        self._on_host = False  # whether the host updates tensors of another device in this step
        self._hooks: BackwardHooks | None = None
        if self.in_backward:
            own = weakref.proxy(self)  # a dropped optimizer goes at once, and updates no more
            self._hooks = BackwardHooks(
                lambda: own._begin_backward(),
                lambda table: own._update_block(table),
                lambda: own._join_host(),
            )
        self._make_tables()
        freeze_events.listen(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in (*self._SETTINGS, "_norm", "_previous_norm")}
        return {**super().__getstate__(), **kept, "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = "defaults" in state  # load_state_dict brings state and groups only
        if not copied:
            own = members_of(self.param_groups)
            state = {**state, "state": open_state(state["state"], own, self.state_from)}
        super().__setstate__(state)
        for group in self.param_groups:  # of an older torch
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._start() if copied else self._make_tables()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients before clipping, 0-dim float32; None: none was taken.

        Reading it copies it on its device: on a GPU every step writes to the same place.
        """
        return None if self._norm is None else self._norm.clone()

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of non-finite gradients. Reading it waits for the device."""
        return int(self._skipped) + (0 if self._control is None else int(self._control[3]))

    def _control_on(self, device: torch.device) -> Tensor | None:
        """What the kernels of a GPU decide in: kept, so that no step has to clear it."""
        if device.type != "cuda":
            return None
        if self._control is None or self._control.device != device:
            skipped = self.skipped_steps
            self._skipped = 0
            self._control = torch.zeros(4, dtype=torch.float32, device=device)
            self._control[3].fill_(skipped)
        return self._control

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context in which backward passes only add to the gradients, whatever `in_backward` says.

        Example:
            ```python
            for batch in loader[:-1]:
                with optimizer.accumulate():
                    model(**batch).loss.backward()
            model(**loader[-1]).loss.backward()
            optimizer.step()
            ```
        """
        before, self.accumulating = self.accumulating, lambda: True
        try:
            yield
        finally:
            self.accumulating = before

    def _active_members(self) -> list[Member]:
        active = [m for m in members_of(self.param_groups) if m.parameter.requires_grad]
        for p in (member.parameter for member in active):
            if p.is_complex():
                raise ValueError(
                    f"{type(self).__name__} has no update for complex parameters ({p.dtype}, shape "
                    f"{tuple(p.shape)}): keep torch.view_as_real of it as parameter, or freeze it"
                )
        return active

    def _make_tables(self) -> None:
        active = self._active_members()
        self._table = BucketTable(active)
        if self._hooks is not None:
            self._hooks.install_hooks(active)
        self._arrange_host(active)
        self._snapshot = GroupSnapshot(self.param_groups)

    def _arrange_host(self, active: list[Member]) -> None:
        if self._host is not None:
            self._on_host = self._host.covers(active)
            tables = block_tables(active) if self._hooks is None else self._hooks.tables
            self._host.arrange(tables)

    def on_flags_changed(self) -> None:
        """Called when `requires_grad` has changed somewhere, perhaps on another model."""
        if self._snapshot.differs_from(self.param_groups):
            self._make_tables()
            if self._settled:
                self._settle_frozen_state()

    def _settle_frozen_state(self) -> None:
        offloaded = self.on_freeze == "offload" and self._host is not None  # it is there already
        settle_frozen_state(self, "keep" if offloaded else self.on_freeze)

    def check_groups(self, groups: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Look for what a group asks for and this optimizer would not do.

        It runs in every step, so that what is written into a group later is found, too.

        Args:
            groups: None: its own.

        Raises:
            ValueError: an option that would be ignored although it changes the result.
        """
        for group in self.param_groups if groups is None else groups:
            if not self._SETTINGS.isdisjoint(group):
                name = min(group.keys() & self._SETTINGS)
                raise ValueError(
                    f"{name} is a setting of the whole optimizer, and would be ignored in a group: "
                    f"take it out, and give it to {type(self).__name__}({name}=...)"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check_groups([{**self.defaults, **param_group}])
        super().add_param_group(param_group)
        if hasattr(self, "_snapshot"):  # not while torch's own constructor adds the first ones
            self.on_flags_changed()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `{}` for a parameter that has no state.

        "masked" holds what belongs to no parameter: the seed, steps skipped, and the norm that
        `clip_mode="previous_norm"` clips by. Hooks see all of it.
        """
        masked: dict[str, Any] = {"seed": self.seed, "skipped_steps": self.skipped_steps}
        if self.in_backward:
            masked["previous_norm"] = self._previous_norm
        return save_state_dict(self, masked)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, at any stage; hooks see all of it.

        The plan that its state belongs to may be yet to come, as where the handle is loaded after
        the optimizer: what `on_freeze` says of tensors that are frozen is done in the next step.

        Args:
            state_dict: of this class, or of `torch.optim.AdamW`.

        Raises:
            ValueError: groups of other sizes, state of another shape or of another kind of
                optimizer, or an option that this one does not have. Nothing is changed then.
        """

        def finish(saved: dict[str, Any]) -> None:
            if masked := saved.get("masked"):
                self.seed = masked["seed"]
                self._skipped, self._control = masked["skipped_steps"], None
                self._previous_norm = masked.get("previous_norm")
            self._settled = False

        load_state_dict(self, state_dict, self.check_groups, finish)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; it also forgets a backward that broke off under `in_backward`.

        Args:
            set_to_none: drop the gradients; otherwise they become zeros.
        """
        super().zero_grad(set_to_none)
        if self._hooks is not None:
            dropped = set() if self._host is None else self._host.forget_kept()
            self._hooks.forget_backward(dropped)

    def state_from(self, saved: dict[str, Any], member: Member) -> dict[str, Any]:
        """A copy of one parameter's saved state, as this optimizer keeps it, on its device.

        Args:
            saved: state of the parameter, of this or another optimizer.
            member: the parameter, with its place in the groups.

        Raises:
            ValueError: this is not what a parameter's state looks like here.
        """
        device = self.state_device_of(member.parameter)
        return {
            key: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for key, value in saved.items()
        }

    def state_device_of(self, p: Tensor) -> torch.device:
        """Where a parameter's state lies.

        Args:
            p: the parameter.
        """
        away = self._host is not None and self._host.copies.is_away(p)
        return torch.device("cpu") if away else p.device

    def active_buckets(self) -> list[ActiveBucket]:
        """The buckets of this moment, with fresh state for what has its first gradient."""
        return self._table.buckets(self.state, self._build_bucket)

    def _build_bucket(self, members: list[Member]) -> ActiveBucket:
        groups = sorted({member.group for member in members})
        parameters = [member.parameter for member in members]
        states = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update(self.init_state(p))
            states.append(state)
        bucket = self.make_bucket(
            [self._updated(local_of(p)) for p in parameters],
            [{key: local_of(value) for key, value in state.items()} for state in states],
            [member.index for member in members],
            [groups.index(member.group) for member in members],
        )
        return ActiveBucket(parameters, states, bucket, groups)

    def _updated(self, p: Tensor) -> Tensor:
        return p.detach() if self._host is None else self._host.copy_of(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every active tensor that has a gradient; all others stay as they are.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What `closure` has returned.

        Raises:
            RuntimeError: a gradient that is sparse or of another shape than its parameter, or a
                loss scale that came too late for `in_backward`.
            ValueError: an option in a group that would be ignored although it changes the result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._on_host = self._host is not None and self._host.covers(self._table.members)
        hooks = self._early_hooks()
        # after `unscale_` there is no scale, but what it has found
        if hooks is not None and not (scale is None and found_inf is None):
            cure = "in_backward=False" if self._on_host else "clip with clip_mode='exact'"
            raise RuntimeError(
                f"{type(self).__name__}: in_backward=True has taken scaled gradients before "
                f"GradScaler said so: train in bfloat16, or {cure}"
            )
        self.check_groups()
        self.on_flags_changed()  # where nobody announced it
        if not self._settled:
            self._settled = True
            self._settle_frozen_state()
        if self._on_host:
            decision = self._update_on_host(scale, found_inf)
        elif hooks is None or any(p.grad is not None for p in parameters_of(self.param_groups)):
            decision = self._update(self.active_buckets(), scale, found_inf, keeps_control=True)
        else:
            decision = None
        if decision is not None:
            self._norm = decision.norm
            if decision.found_inf is not None and not decision.counted:
                self._skipped = self._skipped + decision.found_inf
        if hooks is not None:
            norm, skipped = hooks.end_of_step()
            if norm is not None:
                self._norm = norm
                # a bad step says nothing about the next one's norm
                before = norm if self._previous_norm is None else self._previous_norm
                self._previous_norm = torch.where(norm.isfinite(), norm, before)
            if skipped is not None:
                self._skipped = self._skipped + skipped
        if self._host is not None:
            self._host.end_of_step()
        return loss

    def _update(
        self,
        active: list[ActiveBucket],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        previous_norm: Tensor | None = None,
        keeps_control: bool = False,
    ) -> GradDecision | None:
        """One decision for these gradients, one call per bucket; None without gradients."""
        gradients = [bucket.gather() for bucket in active]
        if not any(any(some.addresses) for some in gradients):
            return None
        known_norm = None
        if self.takes_norm and any(bucket.sharded for bucket in active):
            known_norm = norm_over_ranks([p.grad for b in active for p in b.parameters])
        decision = decide(
            [bucket.bucket for bucket in active],
            gradients,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.nonfinite == "skip",
            grad_scale=scale,
            found_inf=found_inf,
            known_norm=known_norm,
            previous_norm=previous_norm,
            control=self._control_on(active[0].bucket.device) if keeps_control else None,
        )
        for bucket, some in zip(active, gradients, strict=True):
            bucket.follow_parameters()
            bucket.bucket.update(
                some,
                self._hypers(bucket),
                grad_factor=_on(decision.grad_factor, bucket.bucket.device),
                found_inf=_on(decision.found_inf, bucket.bucket.device),
                seed=self.seed,
                zero_grads=self.zero_grads,
            )
        return decision

    def _hypers(self, bucket: ActiveBucket) -> list[Hyper]:
        return [self.hyper(self.param_groups[group]) for group in bucket.groups]

    @property
    def takes_norm(self) -> bool:
        """Whether a step takes the norm of its gradients, which is `grad_norm` after it."""
        return self.max_grad_norm is not None or self.nonfinite == "skip"

    @property
    def _clips_exactly(self) -> bool:
        return self.max_grad_norm is not None and self.clip_mode == "exact"

    def _early_hooks(self) -> BackwardHooks | None:
        """Those that take gradients inside backward, and update, unless clipping needs all first.

        None where such gradients stay; those for the host leave their device nevertheless.
        """
        return None if self._clips_exactly and not self._on_host else self._hooks

    def _begin_backward(self) -> bool:
        active = self._table.members
        self._on_host = self._host is not None and self._host.covers(active)
        hooks = self._early_hooks()
        if hooks is None or self.accumulating():
            return False
        self.check_groups()
        if self._snapshot.differs_from(self.param_groups):
            active = self._active_members()
            hooks.arrange_blocks(active)
            self._arrange_host(active)
        refuse_distributed(active, needs_norm=self.takes_norm)
        return True

    @torch.no_grad()
    def _update_block(self, table: BucketTable) -> GradDecision | None:
        previous = self._previous_norm if self.clip_mode == "previous_norm" else None
        if self._on_host:
            self._send_block(table, previous)
            return None
        active = table.buckets(self.state, self._build_bucket)
        decision = self._update(active, previous_norm=previous)
        for member in table.members:
            member.parameter.grad = None
        return decision

    def _send_block(self, table: BucketTable, previous: Tensor | None) -> None:
        """Have the host update a block, or keep its gradients for an exact norm."""
        assert self._host is not None
        table.buckets(self.state, self._build_bucket)  # checks, and makes state
        if self._clips_exactly:
            self._host.keep(table)
        else:
            work = self._host.send(table, takes_norm=self.takes_norm)
            self._submit(work, partial(self._decider(), previous_norm=previous))
        for member in table.members:
            member.parameter.grad = None

    def _decider(self) -> Callable[..., GradDecision]:
        """What decides by the norms of gradients, in a thread that is not to look at `self`."""
        max_grad_norm, skips = self.max_grad_norm, self.nonfinite == "skip"

        def decides(norms: Sequence[Tensor], **known: Tensor | None) -> GradDecision:
            norm = None
            if norms:
                norm = norms[0] if len(norms) == 1 else masked_norm(norms)
            return decide_by(norm, max_grad_norm=max_grad_norm, skip_nonfinite=skips, **known)

        return decides

    def _submit(self, work: Work, decides: Callable[..., GradDecision]) -> None:
        assert self._host is not None
        for p in work.staged:
            if not self.state[p]:  # of gradients that were kept, while a state was loaded
                self.state[p].update(self.init_state(p))
        buckets = work.table.buckets(self.state, self._build_bucket)
        hypers = [self._hypers(bucket) for bucket in buckets]
        self._host.submit(work, buckets, hypers, decides, self.seed)

    def _update_on_host(
        self, scale: Tensor | None, found_inf: Tensor | None
    ) -> GradDecision | None:
        """One decision for all gradients that are here or kept; None without any."""
        host = self._host
        assert host is not None
        host.copies.follow_device()
        waiting = [
            table
            for table in host.tables
            if any(member.parameter.grad is not None for member in table.members)
        ]
        if self.in_backward and self._clips_exactly:
            for table in waiting:
                self._send_block(table, None)
            waiting = []
        kept = host.take_kept()
        if not kept and not waiting:
            return None
        members = self._table.members
        grads = {p: grad for work in kept for p, grad in work.staged.items()} or grads_of(members)
        started = [m for m in members if m.parameter in grads or self.state.get(m.parameter)]
        norms = norms_of(started, grads) if self.takes_norm else []
        del grads
        known = {"grad_scale": scale, "found_inf": found_inf}
        known = {name: t for name, t in known.items() if t is not None}
        fetched = host.fetch([*norms, *known.values()])
        norms, rest = fetched[: len(norms)], fetched[len(norms) :]
        decides = partial(self._decider(), **dict(zip(known, rest, strict=True)))
        for work in kept:
            self._submit(work._replace(norms=norms), decides)
        for table in waiting:
            table.buckets(self.state, self._build_bucket)
            work = host.send(table, takes_norm=False)
            self._submit(work._replace(norms=norms), decides)
        decision = host.join()[-1]
        if self.zero_grads:
            for p in (m.parameter for m in members):
                if p.grad is not None:
                    p.grad.zero_()
        return decision

    def _join_host(self) -> list[GradDecision]:
        return [] if self._host is None else self._host.join()

    def host_report(self) -> HostReport:
        """Bytes that `state_device="cpu"` keeps on the host, and moved in the last step.

        Raises:
            ValueError: the state lies with the parameters.
        """
        if self._host is None:
            raise ValueError("host_report is of an optimizer with state_device='cpu'")
        return self._host.report(state_bytes(self))


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=True)
