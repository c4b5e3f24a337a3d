"""Dropout of a model on a CPU: its modules, and attention that drops probabilities.

A GPU's own dropout is one kernel. On a CPU torch draws every number by itself and passes four times
over the data: a sixth of a step of MiniLM (32 rows of 64 tokens, two cores). Modules that drop run
their own forward with `ops.dropout` in its place: other masks, drawn by the same generator.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import backend
from ..model.layout import Layout
from ..ops.dropout import OP, dropout

# Forward and backward of ours take 40 us more than torch's two small kernels; 16,384 numbers cost
# torch 70 us more than us.
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
    """`F.scaled_dot_product_attention`, whose dropout, on a CPU in float32, is `ops.dropout`.

    Args:
        query, key, value: (B, heads, T, width).
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch has them.
        from_bytes: of probabilities; for fewer torch's own runs.
    """
    rows = query.numel() // max(query.size(-1), 1)
    if (
        not 0 < dropout_p < 1
        or 4 * rows * key.size(-2) < max(from_bytes, 1)
        or query.device.type != "cpu"
        or any(type(t) is not Tensor or t.dtype is not torch.float32 for t in (query, key, value))
        or (is_causal and attn_mask is not None)
        or torch.is_autocast_enabled("cpu")
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)  # (B, heads, T, T)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=torch.float32)
        attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -math.inf)
    if attn_mask is not None:
        scores = scores.add_(attn_mask)
    shares = scores.softmax(-1)
    # A query that sees no key has NaN in its whole row, and 0 in torch's attention. torch looks for
    # such rows in all scores; the first column of the result tells as well.
    if shares.detach()[..., 0].isnan().any():
        shares = torch.ops.aten._safe_softmax(scores, -1)
    return dropout(shares, dropout_p) @ value


class _FastDropout(TorchFunctionMode):
    """While it is active, `ops.dropout` runs in place of torch's, by itself and in attention."""

    def __init__(self, from_bytes: int) -> None:
        super().__init__()
        self._from_bytes = from_bytes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs, from_bytes=self._from_bytes)
        if func is F.dropout:
            return self._drop(*args, **kwargs)
        return func(*args, **kwargs)

    def _drop(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if inplace or not training or x.numel() * x.element_size() < self._from_bytes:
            return F.dropout(x, p, training, inplace)
        return dropout(x, p)


def members(base: type, from_bytes: int) -> dict[str, Any]:
    """The forward of a subclass of `base`, for modules that drop `from_bytes` or more at a time."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # compiled code keeps the original, which the compiler fuses with its neighbours
        if not self.training or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        with _FastDropout(from_bytes):
            return base.forward(self, *args, **kwargs)

    return {"forward": forward}


def dropping(model: nn.Module, layout: Layout) -> Iterator[tuple[str, str, nn.Module]]:
    """Modules that drop, with their kind and path: `nn.Dropout`, and attention of the blocks."""
    for path, module in model.named_modules():
        if type(module) is nn.Dropout and 0 < module.p < 1:
            yield "dropout", path, module
    for root in layout.block_paths:
        for path, module in model.get_submodule(root).named_modules(prefix=root):
            if path != root and _is_attention(module):
                yield "attention with dropout", path, module


def _is_attention(module: nn.Module) -> bool:
    """Whether a module chooses an attention function and drops something."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen not in ("sdpa", "eager") or "attention" not in type(module).__name__.lower():
        return False
    if any(child is not module and _is_attention(child) for child in module.modules()):
        return False
    found = [child.p for child in module.children() if type(child) is nn.Dropout]
    found += [v for name, v in vars(module).items() if "drop" in name and isinstance(v, float)]
    return any(0 < p < 1 for p in found)
