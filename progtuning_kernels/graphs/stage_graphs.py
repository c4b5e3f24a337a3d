"""Captures the training forwards of one patched model, stage by stage, and replays them."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..model.call import argument_names
from ..model.derived_classes import base_of, derive
from ..model.forward_hooks import foreign_hook
from .pools import Pool, pool_on
from .replayed_call import Feed, Gradients, NotCapturable, ReplayedCall, Turns, tensors_of
from .report import GraphReport

Graph = Literal["off", "auto", "on"]

_MOST_KINDS = 32  # of calls in a stage
_GRAPHS = "_progtuning_graphs"
_NEVER_RAN = 'off: graph="auto" captures where a stored result shows that it pays; none does yet'
_CONSTANTS = int | float | str | bool | None


class _WarmUp:
    """A kind of call that runs eagerly, until a backward has shown what it starts from."""

    def __init__(self) -> None:
        self.wanted: tuple[bool, ...] | None = None


class _Observed(torch.autograd.Function):
    """Copies of outputs, which tell what backward starts from."""

    @staticmethod
    def forward(ctx: Any, warm_up: _WarmUp, *outputs: Tensor) -> Any:
        ctx.warm_up = warm_up
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.warm_up.wanted = tuple(g is not None for g in grads)
        return None, *grads


class StageGraphs:
    """Captured forwards and backwards of one model.

    Args:
        mode: "on" captures; "auto" does where a measurement says that it pays; "off" never.
    """

    def __init__(self, model: nn.Module, mode: Graph) -> None:
        self._model = model
        self._mode = mode
        self._takes_use_cache = "use_cache" in argument_names(model)
        self._allowed: tuple[Sequence[Feed], str | None] | None = None
        self._paused = False
        self._replays = 0
        self._eager: Counter[str] = Counter()
        self.drop()
        if mode == "on":
            model.__dict__[_GRAPHS] = self
            model.__class__ = _graphed_class(type(model))

    def drop(self) -> None:
        """Forget all that was captured: another stage begins, or what it was captured of is gone."""
        self._kinds: dict[Hashable, _WarmUp | ReplayedCall | str] = {}
        self._pool: Pool | None = None
        self._gradients: Gradients | None = None
        self._turns = Turns()
        self._refusal: str | None = None
        self._looked = False
        self._modules: list[nn.Module] = []

    def remove(self) -> None:
        """Take it out of the model."""
        self.drop()
        if self._model.__dict__.pop(_GRAPHS, None) is not None:
            self._model.__class__ = base_of(type(self._model))

    @property
    def captures(self) -> bool:
        """Whether forwards of the stage can be captured."""
        return self._pool is not None

    def look(self) -> None:
        """Look at the stage, if it begins, before modules are taken out of their places."""
        if self._mode == "on" and not self._looked and not self._paused:
            self._look()

    def allow(self, feeds: Sequence[Feed] = (), *, against: str | None = None) -> None:
        """Let the forward that comes be captured or replayed.

        Args:
            feeds: what it gets past its arguments.
            against: why it has to run eagerly this time.
        """
        if self._looked and not self._paused:
            self._allowed = feeds, against

    def forbid(self) -> None:
        """Have all forwards run as they are, until `allow`."""
        self._allowed = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this context run as they are."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def report(self) -> GraphReport:
        captured = [kind for kind in self._kinds.values() if isinstance(kind, ReplayedCall)]
        if self._mode == "off":
            state = 'off: graph="off"'
        elif self._mode == "auto":
            state = _NEVER_RAN
        else:
            state = f"eager: {self._refusal}" if self._refusal else "on"
        return GraphReport(
            state,
            len(captured),
            self._replays,
            sum(part.nbytes for part in (self._pool, self._gradients, *captured) if part),
            dict(self._eager),
        )

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict) -> Any:
        """One forward."""
        if self._allowed is None or not torch.is_grad_enabled() or not self._model.training:
            return forward(*args, **kwargs)
        (feeds, against), self._allowed = self._allowed, None
        if self._takes_use_cache and "use_cache" not in kwargs:
            kwargs = {**kwargs, "use_cache": False}
        try:
            output = self._run(forward, args, kwargs, feeds, against)
        except NotCapturable as reason:
            self._eager[str(reason)] += 1
            output = forward(*args, **kwargs)
        return output

    def _run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        feeds: Sequence[Feed],
        against: str | None,
    ) -> Any:
        if self._refusal is not None:
            raise NotCapturable(self._refusal)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, spec, feeds)
        kind = self._kinds.setdefault(key, _WarmUp())
        if isinstance(kind, str):
            raise NotCapturable(kind)
        if isinstance(kind, ReplayedCall):
            if self._slots_changed():
                self.drop()
                raise NotCapturable("a parameter or buffer was replaced, moved or switched")
        if isinstance(kind, _WarmUp) and (against is not None or kind.wanted is None):
            self._eager[against or "the first of its kind in a stage"] += 1
            with self._pool.warm_up():
                return _observed(forward(*args, **kwargs), kind)
        if against is not None:
            raise NotCapturable(against)
        if self._turns.awaited:
            raise NotCapturable("the backward of a forward before it may still come")
        if self._gradients is not None and self._gradients.held_elsewhere():
            raise NotCapturable("something other than .grad keeps a gradient of an earlier step")
        if isinstance(kind, _WarmUp):
            kind = self._kinds[key] = self._capture(forward, leaves, spec, feeds, kind.wanted)
            if isinstance(kind, str):
                raise NotCapturable(kind)
        self._replays += 1
        output = kind.replay(tensors_of(leaves, feeds), self._turns.begin())
        torch.autograd.graph.increment_version(kind.written)
        return output

    def _look(self) -> None:
        """Look at the stage that begins."""
        self._looked = True
        modules = [*self._model.modules()]
        self._modules = modules
        self._slots = [
            (held, name, t, t.data_ptr(), t.requires_grad)
            for m in modules
            for held in (m._parameters, m._buffers)
            for name, t in held.items()
            if t is not None
        ]
        self._refusal = self._stage_reason()
        if self._refusal is None:
            pool = pool_on(self._slots[0][2].device)
            if isinstance(pool, str):
                self._refusal = pool
            else:
                self._pool = pool

    def _stage_reason(self) -> str | None:
        devices = {t.device for _, _, t, _, _ in self._slots}
        if len(devices) != 1:
            return "its parameters and buffers are not all on one device"
        if (source := foreign_hook(self._model)) is not None:
            return f"a hook of {source} inside the model would not be called"
        for module in self._modules:
            if getattr(module, "gradient_checkpointing", False):
                return "gradient checkpointing is on"
            if module._compiled_call_impl is not None:
                return f"a {type(module).__name__} is compiled by torch.compile"
        for name, p in self._model.named_parameters():
            if type(p) is not nn.Parameter:
                return f"{name} is a {type(p).__name__}"
            if p._backward_hooks:
                return f"a hook on the gradient of {name} would be captured, not called"
        return None

    def _slots_changed(self) -> bool:
        return any(
            held.get(name) is not t or t.data_ptr() != at or t.requires_grad is not flag
            for held, name, t, at, flag in self._slots
        )

    def _key(self, leaves: list[Any], spec: Any, feeds: Sequence[Feed]) -> Hashable:
        """Equal for calls that one recording serves."""
        device = self._slots[0][2].device
        known: list[Hashable] = []
        for leaf in tensors_of(leaves, feeds):
            if leaf.device != device or leaf.requires_grad or leaf.layout != torch.strided:
                raise NotCapturable("an argument on another device, sparse, or with a gradient")
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                known.append((leaf.shape, leaf.dtype))
            elif isinstance(leaf, _CONSTANTS):
                known.append((type(leaf), leaf))
            else:
                raise NotCapturable(f"an argument is a {type(leaf).__name__}")
        known += [(feed.key, *(t.shape for t in feed.tensors)) for feed in feeds]
        key = (
            tuple(known),
            str(spec),
            _autocast_dtype(device),
            tuple(m.training for m in self._modules),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        if key not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            raise NotCapturable(
                f"more than {_MOST_KINDS} kinds of calls in a stage: have the collator pad to a "
                "multiple (pad_to_multiple_of)"
            )
        return key

    def _capture(
        self,
        forward: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        feeds: Sequence[Feed],
        wanted: tuple[bool, ...],
    ) -> ReplayedCall | str:
        """The call, or why it cannot be captured."""
        device = self._slots[0][2].device
        if self._gradients is None:
            active = [p for p in self._model.parameters() if p.requires_grad]
            self._gradients = Gradients(active)
        versions = [(t, t._version) for _, _, t, _, _ in self._slots]
        try:
            with _recordable_autocast(device):
                call = ReplayedCall(
                    self._pool, forward, leaves, spec, feeds, self._gradients, wanted
                )
        except Exception as error:
            reason = f"it cannot be captured: {self._named(error)}"
            warnings.warn(f"a training forward runs eagerly: {reason}", stacklevel=6)
            return reason
        call.written = [t for t, version in versions if t._version != version]
        return call

    def _named(self, error: BaseException) -> str:
        """What was refused, in which module, and where that is written."""
        names = {id(module): name for name, module in self._model.named_modules()}
        where, inside = "", ""
        torch_folder = str(Path(torch.__file__).parent)
        for frame, line in traceback.walk_tb(error.__traceback__):
            own = frame.f_locals.get("self")
            if isinstance(own, nn.Module) and names.get(id(own)):
                inside = f" in {names[id(own)]}"
            if not frame.f_code.co_filename.startswith((torch_folder, str(Path(__file__).parent))):
                where = f", {frame.f_code.co_filename}:{line}"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{message}{inside}{where}"


def _observed(output: Any, kind: _WarmUp) -> Any:
    leaves, spec = pytree.tree_flatten(output)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for i, copy in zip(at, _Observed.apply(kind, *(leaves[i] for i in at)), strict=True):
        leaves[i] = copy
    return pytree.tree_unflatten(leaves, spec)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _recordable_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast at hand, which keeps no weight that it casts: that lies in the graph's memory."""
    dtype = _autocast_dtype(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def _graphed_class(base: type) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs = self.__dict__.get(_GRAPHS)
        run = base.forward.__get__(self)
        return run(*args, **kwargs) if graphs is None else graphs.run(run, args, kwargs)

    forward.__wrapped__ = base.forward  # transformers reads its signature
    return derive(base, "graphed", {"forward": forward})
