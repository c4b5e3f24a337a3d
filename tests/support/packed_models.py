"""What the tests of packing share: batches with padding of every kind, runs, the truth in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from proofs import FixedPlan
from tiny_models import VOCABULARY, tiny_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from progtuning_kernels import FreezePlan, PatchHandle, patch_model
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.model.outputs import compared

Span = tuple[int, int]  # of a row's tokens: from, to
COLUMNS = 11
# Rows and N are even in all of them, and stay so with tokens kept besides the real ones (the one
# before a label, the first or last of every row): times 48, the width inside the tiny models'
# blocks, they are multiples of 32, and no activation function ends on a vector that is not full,
# which rounds in another way.
RIGHT: Sequence[Span] = ((0, 11), (0, 7), (0, 11), (0, 1))
LEFT: Sequence[Span] = ((0, 11), (0, 11), (4, 11), (10, 11))
# without padding, on the right, on the left, on both sides of one token
MIXED: Sequence[Span] = ((0, 11), (0, 7), (8, 11), (5, 6))
SIDES = {"right": RIGHT, "left": LEFT, "mixed": MIXED}


def batch_of(
    name: str, spans: Sequence[Span], *, columns: int = COLUMNS, seed: int = 1
) -> dict[str, Any]:
    """Inputs of a tiny model (`tiny_models.MODELS`), one row a span."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(spans)
    mask = torch.zeros(rows, columns, dtype=torch.long)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = 1
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    ids = ids.masked_fill(mask == 0, 1 if "roberta" in name else 0)
    if name.startswith(("t5", "bart")) and name.endswith("sequence"):
        for row, (_, stop) in enumerate(spans):
            ids[row, stop - 1] = 2  # they classify at the last end-of-sentence token
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given = tiny_inputs(name)
    if name.endswith("seq2seq-lm"):
        length = columns if name.startswith("fsmt") else 7
        labels = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        labels[1:, 4:] = -100
    elif name.endswith("lm"):
        labels = ids.masked_fill(mask == 0, -100)
    elif name.endswith("token"):
        labels = torch.randint(3, mask.shape, generator=generator).masked_fill(mask == 0, -100)
    elif name.endswith("qa"):
        return inputs | {"start_positions": torch.ones(rows).long(), "end_positions": mask.sum(1)}
    elif "pixel_values" in given:
        pixels = given["pixel_values"]
        pixels = torch.randn(rows, *pixels.shape[1:], generator=generator)
        return inputs | {"pixel_values": pixels, "return_loss": True}
    else:
        labels = torch.arange(rows) % 3
    return inputs | {"labels": labels}


@dataclass
class Run:
    """What one forward and backward gave."""

    loss: Tensor
    outputs: list[Tensor]  # at real tokens
    gradients: dict[str, Tensor]


def run(model: nn.Module, inputs: dict[str, Any]) -> Run:
    model.zero_grad()
    output = model(**inputs)
    if output.loss.requires_grad:
        output.loss.backward()
    return Run(
        output.loss.detach(),
        real_outputs(output, inputs),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


def real_outputs(output: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Everything that a model returns but keys and values, without what stands at padding."""
    mask = inputs["attention_mask"]
    real = mask != 0
    return [(t[real] if t.shape[:2] == mask.shape else t).detach() for t in compared(output)]


def patched(model: nn.Module, boundary: int = 0, *, groups: int = 1, **options: Any) -> PatchHandle:
    """The model, patched to train from a boundary on, packing wherever there is padding."""
    blocks = find_layout(model).num_blocks
    plan = FreezePlan.from_boundary(boundary, blocks, embeddings=boundary == 0)
    handle = patch_model(model, FixedPlan(plan), **{"packing": "on", "kernels": "off", **options})
    handle.freezer.packer.groups = groups
    return handle


def packed_forwards(handle: PatchHandle) -> int:
    return handle.packing_report().batches


class _NothingBelowDouble(TorchFunctionMode):
    """Norms and softmaxes that compute in fp32 whatever they get, compute in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def run_in_double(model: nn.Module, inputs: dict[str, Any]) -> Run:
    """The truth: what a copy of the model gives in fp64."""
    twin = copy.deepcopy(model).double()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    floats = {n: v for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    with _NothingBelowDouble():
        return run(twin, inputs | {name: value.double() for name, value in floats.items()})


def gradient_error(found: Iterable[dict[str, Tensor]], truth: Iterable[dict[str, Tensor]]) -> float:
    """Root of the mean over batches and tensors of their squared relative errors.

    One number of a whole model: sums over tokens round otherwise in every tensor, some worse, some
    better. Gradients that are 0 in truth (of key biases: a softmax does not see them) are rounding
    alone, and are judged by `zeros_stay_small`.
    """
    squares = []
    for one, true in zip(found, truth, strict=True):
        assert one.keys() == true.keys()
        for name in _not_zero(true):
            error = (one[name].double() - true[name]).norm() / true[name].norm()
            squares.append(float(error) ** 2)
    return (sum(squares) / len(squares)) ** 0.5


def zeros_stay_small(found: dict[str, Tensor], truth: dict[str, Tensor], share: float) -> bool:
    """Whether gradients that are 0 in truth are at most a share of the largest gradient."""
    largest = max(float(g.norm()) for g in truth.values())
    zeros = truth.keys() - set(_not_zero(truth))
    return all(float(found[name].double().norm()) <= share * largest for name in zeros)


def _not_zero(truth: dict[str, Tensor]) -> list[str]:
    """Names of the gradients that are not 0 but for rounding in fp64."""
    largest = max(float(g.norm()) for g in truth.values())
    return [name for name, g in truth.items() if float(g.norm()) > 1e-12 * largest]
