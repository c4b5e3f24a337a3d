"""What was captured of one module's calls in a stage: one `ReplayedCall` for each kind of them."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..model.forward_hooks import foreign_hook
from .legality import NotCapturable
from .module_state import ModuleState
from .pools import Pool, pool_on
from .replayed_call import Feed, Gradients, ReplayedCall, Turns, tensors_of

MOST_KINDS = 64  # of calls in a stage: 8 lengths by 8 numbers of packed tokens
WARM_UP = "the first of its kind (shapes, and values of what is no tensor) in a stage"
_CONSTANTS = int | float | str | bool | None


class _WarmUp:
    """A kind of call that runs eagerly, until a backward has shown what it starts from."""

    def __init__(self) -> None:
        self.wanted: tuple[bool, ...] | None = None
        self.differentiated = False  # its backward
        self.repeated = False  # one forward had two backwards


class _Observed(torch.autograd.Function):
    """Copies of outputs, which tell what backward starts from."""

    @staticmethod
    def forward(ctx: Any, warm_up: _WarmUp, *outputs: Tensor) -> Any:
        ctx.warm_up, ctx.done = warm_up, False
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.warm_up.wanted = tuple(g is not None for g in grads)
        ctx.warm_up.differentiated |= torch.is_grad_enabled()
        ctx.warm_up.repeated |= ctx.done
        ctx.done = True
        return None, *grads


class CapturedModule:
    """Calls of one module, whose parameters and buffers stay where they are.

    Attributes:
        refusal: why none can be captured; None where some may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules = [*module.modules()]
        self._slots = [
            (held, name, t, t.data_ptr(), t.dtype, t.requires_grad)
            for m in self._modules
            for held in (m._parameters, m._buffers)
            for name, t in held.items()
            if t is not None
        ]
        self._children = [
            (m._modules, (*m._modules.values(),)) for m in self._modules if m._modules
        ]
        self._state: ModuleState | None = None  # that the captured calls have read
        self._kinds: dict[Hashable, _WarmUp | ReplayedCall | str] = {}
        self._gradients: Gradients | None = None
        self._turns = Turns()
        self._device = self._slots[0][2].device if self._slots else torch.device("cpu")
        pool = pool_on(self._device)
        self._pool: Pool | None = None if isinstance(pool, str) else pool
        self.refusal = pool if isinstance(pool, str) else self._refusal()

    @property
    def on_device(self) -> bool:
        """Whether its device can capture at all."""
        return self._pool is not None

    @property
    def captured(self) -> int:
        """How many kinds of calls."""
        return sum(isinstance(kind, ReplayedCall) for kind in self._kinds.values())

    @property
    def nbytes(self) -> int:
        calls = [kind for kind in self._kinds.values() if isinstance(kind, ReplayedCall)]
        return sum(part.nbytes for part in (self._pool, self._gradients, *calls) if part)

    @property
    def changed(self) -> bool:
        """Whether what captured calls read is another thing now: a parameter or buffer that was
        replaced, moved or switched, a module, an attribute, a hook.
        """
        return (
            any(
                held.get(name) is not t
                or t.requires_grad is not flag
                or t.data_ptr() != at
                or t.dtype is not dtype
                for held, name, t, at, dtype, flag in self._slots
            )
            or any((*held.values(),) != children for held, children in self._children)
            or (bool(self.captured) and self._state is not None and self._state.changed)
        )

    def look(self) -> None:
        """Look at it before a forward begins, while nothing was captured."""
        if not self.captured and self._pool is not None:
            self._state = ModuleState(self._modules)
            self.refusal = self._refusal()

    def run_eagerly(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of a call, which is neither captured nor replayed."""
        with self._pool.warm_up() if self._pool is not None else nullcontext():
            return forward(*args, **kwargs)

    def run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        feeds: Sequence[Feed] = (),
        against: str | None = None,
    ) -> tuple[Any, str | None]:
        """The output of a call, and why it ran eagerly, if it did.

        Args:
            feeds: what it gets past its arguments.
            against: why it is not to be captured or replayed this time.

        Raises:
            NotCapturable: it has not run; `lasting` says whether it is always so.
        """
        if self.refusal is not None:
            raise NotCapturable(self.refusal, lasting=True)
        if (around := _surroundings()) is not None:
            raise NotCapturable(f"{around} would miss what is replayed")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, spec, feeds)
        kind = self._kinds.setdefault(key, _WarmUp())
        if isinstance(kind, str):
            raise NotCapturable(kind, lasting=True)
        if isinstance(kind, _WarmUp) and (against is not None or kind.wanted is None):
            output = self.run_eagerly(forward, args, kwargs)
            return _observed(output, kind), against or WARM_UP
        if against is not None:
            raise NotCapturable(against)
        if isinstance(kind, _WarmUp) and kind.differentiated:
            raise NotCapturable("its backward is differentiated (create_graph=True)")
        if isinstance(kind, _WarmUp) and kind.repeated:
            raise NotCapturable("a forward has two backwards (retain_graph=True)")
        if self._turns.awaited:
            raise NotCapturable("the backward of a forward before it may still come")
        if isinstance(kind, _WarmUp):
            if sum(not isinstance(kind, _WarmUp) for kind in self._kinds.values()) >= MOST_KINDS:
                raise NotCapturable(
                    f"more than {MOST_KINDS} kinds of calls in a stage: have the collator pad to a "
                    "multiple (pad_to_multiple_of)"
                )
            kind = self._kinds[key] = self._capture(forward, leaves, spec, feeds, kind.wanted)
            if isinstance(kind, str):
                raise NotCapturable(kind, lasting=True)
        return kind.replay(tensors_of(leaves, feeds), self._turns.begin()), None

    def _refusal(self) -> str | None:
        devices = {t.device for _, _, t, *_ in self._slots}
        if len(devices) != 1:
            return "its parameters and buffers are not all on one device"
        if (source := foreign_hook(self._module)) is not None:
            return f"a hook of {source} inside it would not be called"
        for module in self._modules:
            if getattr(module, "gradient_checkpointing", False):
                return "gradient checkpointing is on"
            if module._compiled_call_impl is not None:
                return f"a {type(module).__name__} is compiled by torch.compile"
        for name, p in self._module.named_parameters():
            if type(p) is not nn.Parameter:
                return f"{name} is a {type(p).__name__}"
            if p._backward_hooks:
                return f"a hook on the gradient of {name} would be captured, not called"
        return None

    def _key(self, leaves: list[Any], spec: Any, feeds: Sequence[Feed]) -> Hashable:
        """Equal for calls that one recording serves."""
        for t in tensors_of(leaves, feeds):
            if t.device != self._device or t.layout != torch.strided:
                raise NotCapturable("an argument is sparse, or on another device", lasting=True)
        known: list[Hashable] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                known.append((leaf.shape, leaf.dtype, leaf.requires_grad))
            elif isinstance(leaf, _CONSTANTS):
                known.append((type(leaf), str(leaf)))  # nan equals itself, 0.0 is not -0.0
            else:
                raise NotCapturable(f"an argument holds a {type(leaf).__name__}", lasting=True)
        known += [(feed.key, *(t.shape for t in feed.tensors)) for feed in feeds]
        key = (
            tuple(known),
            str(spec),
            _autocast_dtype(self._device),
            tuple(m.training for m in self._modules),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        if key not in self._kinds:
            once = [other for other, kind in self._kinds.items() if isinstance(kind, _WarmUp)]
            if len(once) >= 4 * MOST_KINDS:  # such as numbers that vary, which never come again
                del self._kinds[once[0]]
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
        if self._gradients is None:
            self._gradients = Gradients([p for p in self._module.parameters() if p.requires_grad])
        buffers = [*self._module.buffers()]
        autocast = _recordable_autocast(self._device)

        def run(*args: Any, **kwargs: Any) -> Any:  # its backward comes when autocast is over
            with autocast:
                return forward(*args, **kwargs)

        state = ModuleState(self._modules)
        written: list[str] = []
        try:
            try:
                with torch.autocast(self._device.type, enabled=False):
                    call = ReplayedCall(
                        *(self._pool, run, leaves, spec, feeds, self._gradients, wanted, buffers),
                        known=[t for _, _, t, *_ in self._slots] + [*state.tensors()],
                    )
            finally:  # nothing was computed: what lies in an attribute now has no values
                written += state.put_back()
            if written:
                raise NotCapturable(f"its forward sets {written[0]}")
            return call
        except Exception as error:  # whatever it is, the call may run eagerly
            reason = f"it cannot be captured: {self._named(error)}"
            warnings.warn(f"a {type(self._module).__name__} runs eagerly: {reason}", stacklevel=8)
            return reason

    def _named(self, error: BaseException) -> str:
        """What was refused, in which module, and where that is written."""
        names = {id(module): name for name, module in self._module.named_modules()}
        where, inside = "", ""
        skipped = str(Path(torch.__file__).parent), str(Path(__file__).parent)
        for frame, line in traceback.walk_tb(error.__traceback__):
            own, code = frame.f_locals.get("self"), frame.f_code
            if isinstance(own, nn.Module) and names.get(id(own)):
                inside = f" in {names[id(own)]}"
            # a mode of torch's, in which an operation ran, is not where that is written
            if not (code.co_filename.startswith(skipped) or code.co_name.startswith("__torch_")):
                where = f", {code.co_filename}:{line}"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{message}{inside}{where}"


def _observed(output: Any, kind: _WarmUp) -> Any:
    leaves, spec = pytree.tree_flatten(output)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not at:
        kind.wanted = ()
        return output
    for i, copy in zip(at, _Observed.apply(kind, *(leaves[i] for i in at)), strict=True):
        leaves[i] = copy
    return pytree.tree_unflatten(leaves, spec)


def _surroundings() -> str | None:
    """What watches single operations, or calls of modules, of the forward at hand."""
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "a hook on saved tensors"
    if torch.is_anomaly_enabled():
        return "anomaly detection"
    if torch.nn.modules.module._has_any_global_hook():
        return "a hook on all modules"
    return None


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _recordable_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast at hand; a weight that it has cast lies in the graph's memory: it keeps none."""
    dtype = _autocast_dtype(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
