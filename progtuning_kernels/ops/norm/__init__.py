"""layer_norm and rms_norm over the last dimension, which compute the gradients demanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ... import backend
from ..contract import present
from . import reference
from .reference import Cast, Inputs, Norm, Result

# A program holds a row in registers; of wider ones, backward would spill.
MAX_TRITON_COLUMNS = 8192
_CASTS = get_args(Cast)
_FLOAT32, _PLAIN = {torch.float32}, (Tensor, torch.nn.Parameter)


def _dtypes(inputs: Sequence[Any]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in inputs if tensor is not None}


def _reason_against_triton(inputs: Sequence[Any], dtypes: set[torch.dtype]) -> str | None:
    x = inputs[0]
    reason = backend.triton_reason(x.device, *dtypes)
    if reason is not None:
        return reason
    if x.shape[-1] > MAX_TRITON_COLUMNS:
        return f"rows of {x.shape[-1]} elements; Triton's are at most {MAX_TRITON_COLUMNS}"
    for tensor in inputs:
        if type(tensor) not in _PLAIN and tensor is not None:
            return f"no Triton kernel for tensors of type {type(tensor).__name__}"
    return None


def _reason_against_triton_rms_norm(inputs: Sequence[Any]) -> str | None:
    return _reason_against_triton(inputs, _dtypes(inputs))


def _reason_against_triton_layer_norm(inputs: Sequence[Any]) -> str | None:
    x, residual, *parameters = inputs
    dtypes = _dtypes(inputs)
    if dtypes != _FLOAT32 and torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtype of layer_norm"
    reason = _reason_against_triton(inputs, dtypes)
    if reason is None and len(dtypes) > 1:
        # x and residual may differ; their sum has to have the dtype of weight and bias
        h = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if any(p.dtype != h for p in present(parameters)):
            return f"weight or bias is not {h}"
    return reason


def _probe(device: torch.device) -> Inputs:
    x = torch.zeros(2, 8, dtype=torch.float32, device=device)
    return Inputs(x, None, x[0], None)


def _register(name: str, reason_against_triton: backend.Reason) -> backend.Op:
    run = backend.triton_function(__name__, "run")
    implementations = (
        backend.Implementation("triton", run, reason_against_triton),
        backend.Implementation("reference", reference.run),
    )
    return backend.register(backend.Op(name, implementations, _probe))


LAYER_NORM = _register("layer_norm", _reason_against_triton_layer_norm)
RMS_NORM = _register("rms_norm", _reason_against_triton_rms_norm)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    return_sum: bool = False,
    implementation: str | None = None,
) -> Result:
    """LayerNorm (Ba et al., arXiv 1607.06450) over the last dimension of dropout(x) + residual.

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 or float64.
        weight: (C,), or None.
        bias: (C,), or None.
        eps: added to the variance.
        residual: of the shape of x, or None.
        dropout: probability in [0, 1]: x is dropped out before the residual is added, and the
            elements that are kept are scaled by 1 / (1 - dropout). Only with a residual.
        return_sum: return h as well. Only with a residual.
        implementation: "triton" or "reference"; None chooses.

    Returns:
        y, of the shape of x; (y, h) with `return_sum`, where h = dropout(x) + residual.

    Raises:
        ValueError: the arguments do not fit together, or `implementation` has no such name.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
    """
    inputs, norm = Inputs(x, residual, weight, bias), Norm(eps, center=True)
    reference.check("layer_norm", inputs, return_sum)
    if not 0 <= dropout <= 1:
        raise ValueError(f"layer_norm: dropout must be in [0, 1], got {dropout}")
    if dropout and residual is None:
        raise ValueError("layer_norm: dropout needs a residual")
    function = backend.select(LAYER_NORM, inputs, implementation).function
    return function(inputs, norm, return_sum, dropout)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "before_weight",
    residual: Tensor | None = None,
    return_sum: bool = False,
    implementation: str | None = None,
) -> Result:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last dimension of x + residual.

    Args:
        x: (..., C), any strides; float32, bfloat16, float16 or float64.
        weight: (C,), or None; its dtype may differ from that of x.
        eps: added to the mean of squares.
        offset: added to the weight, in float32: 1 in Gemma. Only with cast "after_weight".
        cast: "before_weight": normalise in float32, round to the dtype of x + residual, multiply
            by the weight (Llama, Qwen, Mistral, T5): a float32 weight makes a float32 result.
            "after_weight": all in float32, rounded at the end (Gemma, OLMo 2, gpt-oss).
        residual: of the shape of x, or None.
        return_sum: return h as well. Only with a residual.
        implementation: "triton" or "reference"; None chooses.

    Returns:
        y, of the shape of x; (y, h) with `return_sum`, where h = x + residual.

    Raises:
        ValueError: the arguments do not fit together, or `implementation` has no such name.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
    """
    inputs = Inputs(x, residual, weight, None)
    reference.check("rms_norm", inputs, return_sum)
    if cast not in _CASTS:
        raise ValueError(f"rms_norm: cast must be one of {_CASTS}, got {cast!r}")
    cast_first = cast == "before_weight"
    if offset and cast_first:
        raise ValueError('rms_norm: an offset needs cast="after_weight"')
    norm = Norm(eps, center=False, offset=offset, cast_first=cast_first)
    return backend.select(RMS_NORM, inputs, implementation).function(inputs, norm, return_sum)
