"""Logits that are computed only when they are read.

In most training loops only a cross-entropy reads the logits of a language model's head.
`DeferredLogits` stands in for them: what loss functions do to logits before the cross-entropy
(upcasting, shifting, flattening, soft-capping) it does to the hidden states, and at the
cross-entropy it becomes one `linear_cross_entropy`, which never holds all logits at once. Any other
operation computes the logits, and goes on with them as an ordinary tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.rows import product
from ..ops import linear_cross_entropy


class _Head(NamedTuple):
    """What the logits are made of: hidden (..., H), weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    updated: tuple[Tensor, ...]  # what an update of the head leaves a trace in
    versions: tuple[int, ...]  # of these when the model ran
    # FSDP2's, which gather the root's weights and begin its backward; for the loss, or the logits
    hooks: list[Callable[[Tensor], Any]]
    rows: tuple[Tensor, Tensor] | None  # leaf (k, H) and ids (k,): these rows of weight train


class _Capping(NamedTuple):
    """How much of cap * tanh(logits / cap) has been done: 1 divided, 2 tanh, 3 all of it."""

    cap: float
    steps: int


class DeferredLogits(Tensor):
    """Logits (..., V) of a head, not computed yet.

    Shape, dtype and device are those of the logits; `requires_grad` is true.
    """

    _head: _Head
    _capping: _Capping | None
    _logits: Tensor | None

    @staticmethod
    def __new__(
        cls, head: _Head, dtype: torch.dtype, capping: _Capping | None = None
    ) -> DeferredLogits:
        shape = (*head.hidden.shape[:-1], head.weight.shape[0])
        made = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=head.hidden.device, requires_grad=True
        )
        made._head, made._capping, made._logits = head, capping, None
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0] if args else None, DeferredLogits):
            found = handler(*args, **kwargs)
            if found is not None:
                return found
        args, kwargs = torch.utils._pytree.tree_map_only(
            DeferredLogits, materialise, (tuple(args), dict(kwargs))
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            f"the logits were not computed, and {func} reads them below autograd: pass "
            'kernels="off" to patch_model'
        )


def defer(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shards: Sequence[Tensor] = (),
    rows: tuple[Tensor, Tensor] | None = None,
) -> DeferredLogits:
    """The logits of `F.linear(hidden, weight, bias)`, in autocast's dtype where that is on.

    Args:
        shards: that weight and bias were gathered from.
        rows: leaf (k, H) and ids (k,), where the gradient of these rows of weight is the leaf's.
    """
    device_type = hidden.device.type
    updated = tuple(t for t in (weight, bias, *shards, *(rows or ())) if t is not None)
    if torch.is_autocast_enabled(device_type):
        low = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
        updated = ()  # a copy, which no optimizer changes
    head = _Head(hidden, weight, bias, updated, _versions(updated), [], rows)
    return DeferredLogits(head, hidden.dtype)


def materialise(deferred: DeferredLogits) -> Tensor:
    """The logits (..., V) as an ordinary tensor, computed at the first call.

    Raises:
        RuntimeError: the head's weight has changed since the model ran, or is freed.
    """
    if deferred._logits is not None:
        return deferred._logits
    head = deferred._head
    if _is_gone(head):
        raise RuntimeError(
            "these logits were not computed when the model ran, and fully_shard has freed the head "
            'since: read them before backward(), or pass kernels="off" to patch_model'
        )
    if _is_stale(head):
        raise RuntimeError(
            "these logits were not computed when the model ran, and the head has been updated "
            'since: read them before optimizer.step(), or pass kernels="off" to patch_model'
        )
    with torch.autocast(head.hidden.device.type, enabled=False):
        if head.rows is None:
            logits = F.linear(head.hidden, head.weight, head.bias)
        else:
            logits = product(head.hidden, head.weight, head.bias, *head.rows)
        if (capping := deferred._capping) is not None:
            logits = logits / capping.cap
            logits = torch.tanh(logits) if capping.steps >= 2 else logits
            logits = logits * capping.cap if capping.steps == 3 else logits
    with torch._C.DisableTorchFunctionSubclass():
        logits = logits.to(deferred.dtype)
    if torch.is_grad_enabled():  # without it they have no graph, which a later reader may need
        deferred._logits = logits
        _hook(logits, head)
    return logits


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors)


def _is_gone(head: _Head) -> bool:
    """Whether the weight's storage is empty: FSDP2 has freed what it had gathered."""
    return head.weight.numel() > 0 and head.weight.untyped_storage().nbytes() == 0


def _hook(result: Tensor, head: _Head) -> None:
    for hook in head.hooks if result.requires_grad else ():
        result.register_hook(hook)


def _register_hook(deferred: DeferredLogits, hook: Callable[[Tensor], Any]) -> Any:
    """Keep a hook of FSDP2 for what is computed; any other wants the logits."""
    if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
        return None
    deferred._head.hooks.append(hook)
    return deferred._head.hooks  # no handle, which FSDP2 does not want


def _is_stale(head: _Head) -> bool:
    """Whether weight or bias changed since the model ran."""
    return head.versions != _versions(head.updated)


def _derived(
    deferred: DeferredLogits,
    *,
    hidden: Tensor | None = None,
    dtype: torch.dtype | None = None,
    capping: _Capping | None = None,
) -> DeferredLogits | None:
    if deferred._logits is not None:
        return None  # once computed, they serve
    head = deferred._head if hidden is None else deferred._head._replace(hidden=hidden)
    return DeferredLogits(head, dtype or deferred.dtype, capping or deferred._capping)


def _to(deferred: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """Change the dtype, if that is all that is asked for."""
    dtype = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    return _derived(deferred, dtype=dtype)


def _same(deferred: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    return None if args or kwargs else _derived(deferred)


def _view(deferred: DeferredLogits, *shape: Any) -> DeferredLogits | None:
    """Give the rows a new shape, if the last dimension stays."""
    if len(shape) == 1 and isinstance(shape[0], Sequence):
        shape = tuple(shape[0])
    if not shape or not all(isinstance(size, int) for size in shape):
        return None
    rows, vocabulary = shape[:-1], deferred.shape[-1]
    if shape[-1] == -1 and -1 not in rows:
        total, known = deferred.numel(), math.prod(rows)
        if not known or total != known * vocabulary:
            return None
    elif shape[-1] != vocabulary:
        return None
    hidden = deferred._head.hidden
    return _derived(deferred, hidden=hidden.reshape(*rows, hidden.shape[-1]))


def _getitem(deferred: DeferredLogits, index: Any) -> DeferredLogits | None:
    """Take some of the rows, if the last dimension stays whole."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(isinstance(entry, Tensor) for entry in entries):
        mask = entries[0]
        whole_rows = len(entries) == 1 and mask.dtype == torch.bool
        if not whole_rows or mask.dim() >= deferred.dim():
            return None
    elif not all(entry is Ellipsis or isinstance(entry, int | slice) for entry in entries):
        return None
    else:
        dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
        reaches_last = (
            bool(entries[dots[0] + 1 :]) if dots else len(entries) == deferred.dim()
        ) or len(entries) - len(dots) >= deferred.dim()
        if len(dots) > 1 or (reaches_last and entries[-1] != slice(None)):
            return None
    return _derived(deferred, hidden=deferred._head.hidden[index])


def _divide(deferred: DeferredLogits, cap: Any, **kwargs: Any) -> DeferredLogits | None:
    if kwargs or deferred._capping is not None or not _is_number(cap) or cap <= 0:
        return None
    return _derived(deferred, capping=_Capping(float(cap), 1))


def _tanh(deferred: DeferredLogits) -> DeferredLogits | None:
    capping = deferred._capping
    if capping is None or capping.steps != 1:
        return None
    return _derived(deferred, capping=capping._replace(steps=2))


def _multiply(deferred: DeferredLogits, cap: Any) -> DeferredLogits | None:
    capping = deferred._capping
    if capping is None or capping.steps != 2 or not _is_number(cap) or cap != capping.cap:
        return None
    return _derived(deferred, capping=capping._replace(steps=3))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cross_entropy(
    deferred: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`F.cross_entropy(logits, target, ...)` of rows of logits (N, V) and classes (N,)."""
    head, capping = deferred._head, deferred._capping
    if (
        deferred._logits is not None
        or (size_average, reduce) != (None, None)
        or reduction not in ("mean", "sum", "none")
        or head.hidden.dim() != 2
        or target.dtype not in (torch.int64, torch.int32)
        or target.shape != head.hidden.shape[:1]
        or target.device != head.hidden.device
        or (capping is not None and capping.steps != 3)
        or _is_stale(head)
        or _is_gone(head)
    ):
        return None
    with torch.autocast(head.hidden.device.type, enabled=False):
        loss = linear_cross_entropy(
            head.hidden,
            head.weight,
            target,
            head.bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=None if capping is None else capping.cap,
            class_weight=weight,
            reduction=reduction,
            weight_rows=head.rows,
        )
    _hook(loss, head)
    # cross-entropy of bf16 logits is bf16, except under autocast
    with torch._C.DisableTorchFunctionSubclass():
        dtype = deferred.dtype
    return loss if torch.is_autocast_enabled(loss.device.type) else loss.to(dtype)


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.register_hook: _register_hook,
    Tensor.float: lambda deferred: _derived(deferred, dtype=torch.float32),
    Tensor.to: _to,
    Tensor.contiguous: _same,
    Tensor.view: _view,
    Tensor.reshape: _view,
    torch.reshape: _view,
    Tensor.__getitem__: _getitem,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    torch.div: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    F.cross_entropy: _cross_entropy,
}
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "itemsize", "is_cpu")
_PROPERTIES += ("is_cuda", "is_sparse", "is_quantized", "is_meta", "is_nested", "_base")
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
    torch.is_floating_point,
    torch.numel,
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
}
