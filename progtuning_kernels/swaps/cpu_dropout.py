"""Dropout of a model on a CPU: its modules, and attention that drops probabilities.

A GPU's own dropout is one kernel. On a CPU torch draws every number by itself and passes four times
over the data: of a step of MiniLM (32 rows of 64 tokens, two cores) it takes a sixth. What comes in
its place computes the same bits from the same random numbers (`ops/dropout.py`), so that nothing
but the time tells.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import backend
from ..model.layout import Layout
from ..ops.dropout import OP, dropout

# Forward and backward of ours take 80 us more than torch's two small kernels; 16,384 numbers cost
# torch that much more than us.
FROM_BYTES = 2**16


def reason_against() -> str | None:
    """Why `ops.dropout` would run plain torch here, in one line; None if it would not."""
    forced = os.environ.get(backend.ENVIRONMENT_VARIABLE)
    if forced in ("triton", "reference"):
        return f"{backend.ENVIRONMENT_VARIABLE}={forced}"
    return OP.implementations[0].reason_against(torch.empty(2, dtype=torch.float32, device="cpu"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    from_bytes: int = 0,
) -> Tensor:
    """`F.scaled_dot_product_attention`, whose dropout, on a CPU, is `ops.dropout`.

    Args:
        query, key, value: (B, heads, T, width).
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch has them.
        from_bytes: of probabilities; for fewer torch's own runs.
    """
    options = dict(scale=scale, enable_gqa=enable_gqa)
    if (
        drops_enough(query, key, dropout_p, from_bytes)
        and all(type(t) is Tensor and t.dtype is torch.float32 for t in (query, key, value))
        and query.device.type == "cpu"
        and not (is_causal and attn_mask is not None)
        and not torch.is_autocast_enabled("cpu")
    ):
        return composed_attention(
            query, key, value, attn_mask, is_causal, **options, drop=lambda x: dropout(x, dropout_p)
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )


def drops_enough(query: Tensor, key: Tensor, dropout_p: float, from_bytes: int) -> bool:
    """Whether attention drops, and at least that many bytes of probabilities in float32."""
    rows = query.numel() // max(query.size(-1), 1)
    return 0 < dropout_p < 1 and 4 * rows * key.size(-2) >= max(from_bytes, 1)


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """The operations of the composite implementation that torch takes where it drops on a CPU."""
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    # a root each for query and key; the sign, if there is one, goes with the query
    root = math.sqrt(abs(scale))
    query = query * (-root if scale < 0 else root)
    if is_causal:
        square = query.size(-2), key.size(-2)
        attn_mask = torch.ones(square, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -math.inf)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ (key.transpose(-2, -1) * root)  # (B, heads, T, T)
    if attn_mask is not None:
        scores = scores.add_(attn_mask)
    return drop(_softmax(scores)) @ value


def _softmax(scores: Tensor) -> Tensor:
    """Over the keys; 0 for a query that sees none, where the ordinary softmax is NaN throughout.

    torch looks for such queries in all scores; the first column of the result tells as well.
    """
    found = scores.softmax(-1)
    if found.is_meta or not found.detach()[..., 0].isnan().any():
        return found
    return torch.ops.aten._safe_softmax(scores, -1)


@functools.cache
def attention_differs() -> str | None:
    """Why this torch's attention is not `attention`, found by running both once; None if it is."""
    generator = torch.Generator().manual_seed(0)
    *inputs, upstream = (
        torch.randn(2, 3, 9, 8, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in inputs]
    mask = torch.rand(2, 1, 9, 9, generator=generator, dtype=torch.float32, device="cpu") < 0.8
    mask[0, 0, 3] = False  # a row that sees nothing

    def results(run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        out = run(*inputs, attn_mask=mask, dropout_p=0.3)
        gradients = torch.autograd.grad(out, inputs, upstream)
        return [out, *gradients, torch.get_rng_state()]

    with torch.random.fork_rng([]), torch.enable_grad():
        pairs = zip(results(F.scaled_dot_product_attention), results(attention), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            return None
    return "this torch computes attention with dropout in another way"


class _FastDropout(TorchFunctionMode):
    """Inside it dropout, by itself or in attention, is ours."""

    def __init__(self, from_bytes: int) -> None:
        super().__init__()
        self.from_bytes = from_bytes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs, from_bytes=self.from_bytes)
        if func is F.dropout:
            return _functional(*args, **kwargs, from_bytes=self.from_bytes)
        return func(*args, **kwargs)


def _functional(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, from_bytes: int
) -> Tensor:
    if inplace or not training or x.numel() * x.element_size() < from_bytes:
        return F.dropout(x, p, training, inplace)
    return dropout(x, p)


def dropout_members(base: type, from_bytes: int) -> dict[str, Any]:
    """For a subclass of `nn.Dropout` or what has its forward."""

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        # compiled code keeps the original, which the compiler fuses with its neighbours
        if torch.compiler.is_compiling():
            return base.forward(self, x)
        return _functional(x, self.p, self.training, self.inplace, from_bytes=from_bytes)

    return {"forward": forward}


def attention_members(base: type, from_bytes: int) -> dict[str, Any]:
    """For a subclass of an attention module."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        with _FastDropout(from_bytes):
            return base.forward(self, *args, **kwargs)

    return {"forward": forward}


def dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that drop, with their paths."""
    for path, module in model.named_modules():
        if type(module) is nn.Dropout and 0 < module.p < 1:
            yield path, module


def attentions(model: nn.Module, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the blocks that choose an attention function and drop something, with paths.

    What they do with it need not be known: in `_FastDropout` everything has the bits it had.
    """
    for root in layout.block_paths:
        for path, module in model.get_submodule(root).named_modules(prefix=root):
            if path != root and _is_attention(module):
                yield path, module


def _is_attention(module: nn.Module) -> bool:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen not in ("sdpa", "eager") or "attention" not in type(module).__name__.lower():
        return False
    if any(child is not module and _is_attention(child) for child in module.modules()):
        return False
    found = [child.p for child in module.children() if type(child) is nn.Dropout]
    found += [v for name, v in vars(module).items() if "drop" in name and isinstance(v, float)]
    return any(0 < p < 1 for p in found)
