"""Autocast on the meta device, where torch has none: what it casts, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Names of functions and methods, without underscores, that autocast runs in the lower precision
# (https://docs.pytorch.org/docs/stable/amp.html, "autocast op reference").
_LOWERED = frozenset(
    "linear matmul rmatmul mm bmm addmm addbmm baddbmm einsum conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention".split()
)
_LOWERED_ON_CUDA = frozenset("mv addmv addr prelu".split())
# and those that it runs in float32
_RAISED = frozenset(
    "binary_cross_entropy cosine_embedding_loss cross_entropy ctc_loss hinge_embedding_loss "
    "huber_loss kl_div l1_loss mse_loss multi_margin_loss nll_loss prod smooth_l1_loss "
    "soft_margin_loss triplet_margin_loss binary_cross_entropy_with_logits".split()
)
_RAISED_ON_CUDA = frozenset(
    "cosine_similarity cosh cumprod cumsum dist exp expm1 group_norm layer_norm log log10 log1p "
    "log2 log_softmax logsumexp norm pow reciprocal rms_norm rpow rsqrt sinh softmax softplus sum "
    "tan".split()
)


class Autocast:
    """Casts what autocast to `dtype` would cast on `device`.

    torch's own autocast is on meanwhile, for the CPU, where no tensor is: it says whether a model
    has switched it off around some lines, as rotary embeddings do.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._dtype = dtype
        self._lowered = _LOWERED | (_LOWERED_ON_CUDA if on_cuda else frozenset())
        self._raised = _RAISED | (_RAISED_ON_CUDA if on_cuda else frozenset())
        # a weight is cast once in a forward, and the copy lives as long: torch's cache
        self._copies: dict[int, torch.Tensor] = {}
        self._keeps_copies = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What autocast surrounds; `arguments` is asked in backward too, for checkpoints."""
        self._keeps_copies = True
        try:
            with torch.autocast("cpu", dtype=self._dtype):
                yield
        finally:
            self._keeps_copies = False
            self._copies.clear()

    def arguments(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments that autocast would give `func`."""
        if not torch.is_autocast_enabled("cpu"):
            return args, kwargs
        name = getattr(func, "__name__", "").strip("_")
        if name in self._lowered:
            wanted = self._dtype
        elif name in self._raised:
            wanted = torch.float32
        else:
            return args, kwargs
        return pytree.tree_map_only(torch.Tensor, lambda t: self._cast(t, wanted), (args, kwargs))

    def _cast(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not t.is_floating_point() or t.dtype in (dtype, torch.float64):
            return t
        if not (self._keeps_copies and dtype == self._dtype and t.is_leaf and t.requires_grad):
            return t.to(dtype)
        if id(t) not in self._copies:
            self._copies[id(t)] = t.to(dtype)
        return self._copies[id(t)]
