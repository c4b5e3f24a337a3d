"""linear_cross_entropy: a head and its loss, without the logits of all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend
from ...sharding import is_sharded
from . import chunks, reference
from .reference import Options, Reduction


def _reason_against_triton(tensors: Sequence[Tensor]) -> str | None:
    return backend.triton_reason(tensors[0].device, tensors[0].dtype)


_ROWS, _SCALE = (backend.triton_function(__name__, name) for name in ("rows", "scale"))
OP = backend.register(
    backend.Op(
        "linear_cross_entropy",
        (
            backend.Implementation("triton", _ROWS, _reason_against_triton, scale=_SCALE),
            backend.Implementation("reference", reference.rows, scale=reference.scale),
        ),
    )
)


class CrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns where more than the loss is asked for.

    All are float32 (float64 for float64).

    Attributes:
        loss: what the op returns if only the loss is asked for.
        z_loss: the part of loss that is z-loss, reduced as loss is. It has no gradient. None if it
            was not asked for.
        token_accuracy: of the rows that count, the share whose label has the largest logit; of
            equal logits the first is the largest. With the reduction "none" it has the shape of
            labels: 1 or 0 for each row, 0 where a row does not count. It has no gradient. None if
            it was not asked for.
    """

    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None


def _outputs(ctx: Any, formed: chunks.Formed) -> tuple[Tensor | None, ...]:
    metrics = formed.z_loss, formed.token_accuracy
    ctx.mark_non_differentiable(*(t for t in metrics if t is not None))
    ctx.set_materialize_grads(False)  # nothing reads gradients of the metrics
    return formed.loss, *metrics


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, chosen, hidden, weight, bias, labels, class_weight, num_items, options, leaf, row_ids
    ):
        demand = _demanded(ctx.needs_input_grad, leaf, 8)
        tensors = (hidden, weight, bias, labels, class_weight, num_items)
        formed = chunks.form(chosen, *tensors, demand, options, row_ids=row_ids)
        ctx.of_rows = leaf is not None
        ctx.save_for_backward(*formed.gradients, formed.unscale)
        ctx.dtype, ctx.chosen, ctx.handed_over = hidden.dtype, chosen, False
        return _outputs(ctx, formed)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *of_metrics):
        if ctx.handed_over:
            raise RuntimeError(
                "linear_cross_entropy: a second backward of the same loss: its gradients were "
                "formed in the forward and are handed over; compute the loss again"
            )
        *gradients, unscale = ctx.saved_tensors
        ctx.handed_over = True
        factor = upstream * unscale
        for gradient in gradients:
            if gradient is not None:
                ctx.chosen.scale(gradient, factor)
        given = [None if gradient is None else gradient.to(ctx.dtype) for gradient in gradients]
        return None, *_placed(given, ctx.of_rows, 4)


class _RowsOfLinearCrossEntropy(torch.autograd.Function):
    """The loss of every row; the backward, which knows what is upstream, forms the gradients."""

    @staticmethod
    def forward(ctx, chosen, hidden, weight, bias, labels, class_weight, options, leaf, row_ids):
        tensors = (hidden, weight, bias, labels, class_weight)
        ctx.save_for_backward(*tensors, row_ids)
        ctx.chosen, ctx.options, ctx.of_rows = chosen, options, leaf is not None
        formed = chunks.form(chosen, *tensors, None, (False, False, False), options)
        return _outputs(ctx, formed)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *of_metrics):
        *tensors, row_ids = ctx.saved_tensors
        demand = _demanded(ctx.needs_input_grad, row_ids, 7)
        formed = chunks.form(ctx.chosen, *tensors, None, demand, ctx.options, upstream, row_ids)
        dtype = tensors[0].dtype
        for gradient in formed.gradients if dtype == torch.float16 else ():
            if gradient is not None:
                ctx.chosen.scale(gradient, formed.unscale)
        given = [None if gradient is None else gradient.to(dtype) for gradient in formed.gradients]
        return None, *_placed(given, ctx.of_rows, 3)


def _demanded(needed: Sequence[bool], leaf: Tensor | None, place: int) -> list[bool]:
    """Whether hidden, weight and bias want gradients: the leaf's is that of weight."""
    of_hidden, of_weight, of_bias = needed[1:4]
    return [of_hidden, of_weight if leaf is None else needed[place], of_bias]


def _placed(given: Sequence[Tensor | None], of_rows: bool, between: int) -> list[Tensor | None]:
    """The gradients in the order of the inputs behind the first."""
    of_hidden, of_weight, of_bias = given
    ends = (None, of_weight) if of_rows else (of_weight, None)
    return [of_hidden, ends[0], of_bias, *[None] * between, ends[1], None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | int | None = None,
    accum_dtype: torch.dtype | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    max_logits_bytes: int | None = None,
    weight_rows: tuple[Tensor, Tensor] | None = None,
    implementation: str | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of `hidden @ weight.T + bias`, without the logits of all rows at once.

        x_i = softcapped(weight @ hidden_i + bias)
        lse_i = log(sum_c exp(x_i[c]))        y = labels_i
        row_i = (1 - s) w[y] (lse_i - x_i[y])
                + s / V sum_c w[c] (lse_i - x_i[c]) + z_loss lse_i^2

    s is `label_smoothing`, w `class_weight` or 1, as in `F.cross_entropy`. Gradients are formed in
    the forward, the demanded ones only, so there is one backward per call. If all rows are ignored
    the mean is NaN and the gradients are 0, as in torch. With `reduction="none"` the backward forms
    them, and computes the logits again: one matmul more, and any number of backwards.

    Args:
        hidden: (..., H); float32, bfloat16, float16 or float64, or under autocast its dtype.
        weight: (V, H), of the dtype and device of hidden.
        labels: (...), int64 or int32, not shifted.
        bias: (V,), of the dtype and device of hidden.
        ignore_index: label of the rows that do not count.
        label_smoothing: in [0, 1].
        softcap: above 0: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        z_loss: times the squared log-sum-exp of each row that counts is added (PaLM, Chowdhery et
            al., arXiv 2204.02311, with 1e-4).
        class_weight: (V,), on the device of hidden; no gradient.
        reduction: "mean", "sum", or "none" for the loss of each row, 0 where it does not count.
        num_items: divides the sum of the rows instead, with "mean" and "sum": what the Trainer
            hands to a loss as num_items_in_batch.
        accum_dtype: in which the gradients of weight and bias add up over chunks of rows; None is
            float32 (float64 for float64). torch.bfloat16, for a hidden of that dtype, takes half
            the memory, and every sum is rounded.
        return_z_loss: also return the part of the loss that is z-loss.
        return_token_accuracy: also return the share of rows whose label has the largest logit.
        max_logits_bytes: of the logits that exist at a time; at least 512 rows do. None is 512 MiB.
            Where the Triton kernels run and the weight needs a gradient, None is as many bytes as
            the sum of this gradient takes in accum_dtype, if this is more, and all rows run at
            once where this takes no more memory than chunks and their sum.
        weight_rows: a leaf (k, H) and ids (k,): the gradient of these rows of weight is the leaf's,
            and weight gets none; the leaf holds what they hold.
        implementation: "triton" or "reference"; None chooses.

    Returns:
        The loss, a 0-dim float32 (float64 for float64); of the shape of labels with "none". With
        return_z_loss or return_token_accuracy a `CrossEntropyOutput`.

    Raises:
        TypeError: an argument that is no tensor where one belongs.
        ValueError: the arguments do not fit together, a DTensor, or `implementation` has no such
            name.
        RuntimeError: the implementation that is asked for cannot run; in a second backward of the
            same loss.
    """
    given = {"hidden": hidden, "weight": weight, "labels": labels}
    optional = {"bias": bias, "class_weight": class_weight}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"linear_cross_entropy: {name} must be a tensor, got {kind}")
        if is_sharded(type(tensor)):
            raise ValueError(
                f"linear_cross_entropy: {name} is a DTensor; pass {name}.full_tensor(), which "
                "autograd follows"
            )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    reference.check(hidden, weight, labels, bias, class_weight)
    options = Options(
        *(ignore_index, float(label_smoothing), None if softcap is None else float(softcap)),
        *(float(z_loss), reduction, accum_dtype, return_z_loss, return_token_accuracy),
        *(max_logits_bytes, implementation),
    )
    options.check(hidden.dtype)
    if num_items is not None:
        if reduction == "none":
            raise ValueError("linear_cross_entropy: num_items divides a sum, and there is none")
        if not isinstance(num_items, Tensor):
            num_items = torch.full((), num_items, dtype=torch.float64, device=hidden.device)
        if num_items.numel() != 1:
            raise ValueError(f"linear_cross_entropy: num_items has {num_items.numel()} elements")
        num_items = num_items.detach().reshape(()).to(hidden.device, non_blocking=True)
    shape = labels.shape if reduction == "none" else ()
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    class_weight = None if class_weight is None else class_weight.detach()
    recorded = torch.is_grad_enabled()
    weight, leaf, row_ids = _with_leaf(weight, weight_rows)
    wanting = (hidden, weight if leaf is None else leaf, bias)
    demand = [recorded and t is not None and t.requires_grad for t in wanting]
    tensors = (hidden, weight, bias, labels, class_weight, num_items)
    if torch.compiler.is_compiling():
        formed = demand if reduction != "none" else [False] * 3
        found = linear_cross_entropy_op(*tensors, None, formed, *options)
    else:
        chosen = backend.select(OP, [hidden], implementation)
        if not any(demand):
            found = chunks.form(chosen, *tensors, demand, options)
        elif reduction == "none":
            found = _RowsOfLinearCrossEntropy.apply(chosen, *tensors[:5], options, leaf, row_ids)
        else:
            found = _LinearCrossEntropy.apply(chosen, *tensors, options, leaf, row_ids)
    loss, of_z, accuracy = found[:3]
    if loss.shape != shape:  # no view where none is needed: hooks are lost with writes to one
        loss = loss.view(shape)
    if not (return_z_loss or return_token_accuracy):
        return loss
    return CrossEntropyOutput(
        loss,
        of_z.view(shape) if return_z_loss else None,
        accuracy.view(shape) if return_token_accuracy else None,
    )


def _with_leaf(
    weight: Tensor, rows: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, leaf and ids; in compiled code a weight of which the leaf is a part, and no leaf."""
    if rows is None:
        return weight, None, None
    leaf, row_ids = rows
    if leaf.shape != (len(row_ids), weight.shape[1]):
        raise ValueError(
            f"linear_cross_entropy: {len(row_ids)} rows of weight {tuple(weight.shape)} need a "
            f"leaf {(len(row_ids), weight.shape[1])}, got {tuple(leaf.shape)}"
        )
    weight = weight.detach()
    if torch.compiler.is_compiling():
        return weight.index_copy(0, row_ids, leaf.to(weight.dtype)), None, None
    return weight, leaf, row_ids


@torch.library.custom_op("progtuning::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    upstream: Tensor | None,
    demand: Sequence[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    accum_dtype: torch.dtype | None,
    return_z_loss: bool,
    return_token_accuracy: bool,
    max_logits_bytes: int | None,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `chunks.Formed` has, empty where not asked for: loss, z-loss, accuracy, the gradients
    of hidden, weight and bias, and `unscale`.

    `upstream`, (N,): of the rows' losses, in the backward of the reduction "none".
    """
    options = Options(
        *(ignore_index, label_smoothing, softcap, z_loss, reduction, accum_dtype),
        *(return_z_loss, return_token_accuracy, max_logits_bytes, implementation),
    )
    tensors = (hidden, weight, bias, labels, class_weight, num_items)
    chosen = backend.select(OP, [hidden], implementation)
    formed = chunks.form(chosen, *tensors, demand, options, upstream)
    dtypes = [reference.wide(hidden.dtype)] * 2
    dtypes += chunks.stored_dtypes(hidden.dtype, accum_dtype)
    z_losses, accuracy, d_hidden, d_weight, d_bias = (
        hidden.new_empty(0, dtype=dtype) if tensor is None else tensor
        for tensor, dtype in zip((*formed[1:3], *formed.gradients), dtypes, strict=True)
    )
    return formed.loss, z_losses, accuracy, d_hidden, d_weight, d_bias, formed.unscale


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, class_weight, num_items, upstream, demand, *options):
    options = Options(*options)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = chunks.stored_dtypes(hidden.dtype, options.accum_dtype)
    gradients = [
        hidden.new_empty(shape if demanded else (0,), dtype=dtype)
        for shape, demanded, dtype in zip(shapes, demand, dtypes, strict=True)
    ]
    unscale = hidden.new_empty((), dtype=reference.wide(hidden.dtype))
    of_loss = labels.shape if options.reduction == "none" else ()
    asked = (options.return_z_loss, options.return_token_accuracy)
    metrics = [unscale.new_empty(of_loss if a and upstream is None else (0,)) for a in asked]
    return (unscale.new_empty(of_loss), *metrics, *gradients, unscale)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.demand, ctx.dtype, ctx.options = inputs[7], inputs[0].dtype, Options(*inputs[8:])
    ctx.save_for_backward(*(inputs[:5] if ctx.options.reduction == "none" else output[3:]))
    ctx.mark_non_differentiable(*output[1:])


def _hand_over(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.options.reduction == "none":
        demand = list(ctx.needs_input_grad[:3])
        formed = linear_cross_entropy_op(*ctx.saved_tensors, None, upstream, demand, *ctx.options)
        *gradients, factor = formed[3:]
    else:
        demand = ctx.demand
        *gradients, unscale = ctx.saved_tensors
        factor = upstream * unscale
    given = (
        (gradient.to(factor.dtype) * factor).to(ctx.dtype) if demanded else None
        for gradient, demanded in zip(gradients, demand, strict=True)
    )
    return (*given, *[None] * 15)


linear_cross_entropy_op.register_autograd(_hand_over, setup_context=_save_gradients)
