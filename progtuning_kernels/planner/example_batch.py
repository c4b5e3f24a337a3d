"""A micro-batch of a given shape, with labels of the kind that the model's head wants."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .meta_step import TargetKernels


def example_batch(
    model: nn.Module, batch_size: int, seq_len: int, *, padding: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """Arguments of `model.forward`, on the meta device, where the model is too.

    Labels are found by running the model without them: one a token where it returns logits for
    every token, one a row otherwise. With `padding` there is an attention mask.
    """
    accepts = inspect.signature(model.forward).parameters
    if "input_ids" not in accepts:
        raise ValueError(
            f"{type(model).__name__} does not take input_ids: give its arguments as inputs={{...}}"
        )
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
    batch = {"input_ids": ids}
    if padding and "attention_mask" in accepts:
        batch["attention_mask"] = torch.ones_like(ids)
    probe = dict(batch)
    if "decoder_input_ids" in accepts:
        probe["decoder_input_ids"] = ids
    with torch.no_grad(), TargetKernels(device):
        output = model(**probe)
    if "start_positions" in accepts and hasattr(output, "start_logits"):
        row = torch.zeros(batch_size, dtype=torch.long, device="meta")
        return batch | {"start_positions": row, "end_positions": row}
    logits = getattr(output, "logits", None)
    if "labels" not in accepts or logits is None:
        return probe
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind == "multi_label_classification":
        return batch | {"labels": torch.zeros_like(logits, dtype=logits.dtype)}
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device="meta")
    if logits.ndim == 2 and logits.shape[-1] == 1:  # a regression
        labels = labels.to(logits.dtype)
    return batch | {"labels": labels}


def on_meta(inputs: Mapping[str, Any], rows: int, new_rows: int) -> dict[str, Any]:
    """The same arguments on the meta device, with `new_rows` where dimension 0 has `rows`."""

    def move(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        shape = (new_rows, *t.shape[1:]) if t.ndim and t.shape[0] == rows else t.shape
        return torch.empty(shape, dtype=t.dtype, device="meta")

    return pytree.tree_map(move, dict(inputs))


def on_device(
    inputs: Mapping[str, Any], device: torch.device, vocabulary: int | None
) -> dict[str, Any]:
    """Real values in place of meta tensors: random tokens, labels 0 and 1, padding at the right."""

    def fill(name: str, t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        if t.is_floating_point():
            return torch.randn(t.shape, dtype=t.dtype, device=device)
        if name == "attention_mask":
            mask = torch.ones(t.shape, dtype=t.dtype, device=device)
            mask[-1, -max(1, t.shape[1] // 4) :] = 0  # padding, as in the plan
            return mask
        high = vocabulary if name.endswith("input_ids") and vocabulary else 2
        return torch.randint(high, t.shape, dtype=t.dtype, device=device)

    return {name: pytree.tree_map(lambda t, n=name: fill(n, t), v) for name, v in inputs.items()}
