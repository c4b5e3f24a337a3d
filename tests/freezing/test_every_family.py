"""Invariant 1, for every family at every boundary: gradients as in plain PyTorch, nothing below."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from proofs import (
    FixedPlan,
    counted_runs,
    enable_checkpointing,
    frozen_by_hand,
    gradients,
    saved_bytes,
)
from tiny_models import BOUNDARIES, CHECKPOINTED, MODELS, TELLING, tiny_inputs, tiny_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from progtuning_kernels import FreezePlan, PatchHandle, patch_model

pytestmark = pytest.mark.usefixtures("padded")  # bits are compared

BLOCKS = 4


def _plan(boundary: int) -> FreezePlan:
    return FreezePlan.from_boundary(boundary, BLOCKS, embeddings=boundary == 0)


# Early transformers 5 checkpoint a block with its hooks inside: the input that the checkpoint keeps
# is then counted one unit too early.
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)


def _prove(
    handle: PatchHandle,
    inputs: dict[str, Any],
    expected: dict[str, torch.Tensor],
    *,
    inputs_kept_before_hooks: bool = False,
) -> None:
    """The handle's model has the expected gradients, bit for bit, and nothing below."""
    model, boundary = handle.model, handle.boundary
    found = gradients(model, inputs)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name

    entering = {}
    blocks = [model.get_submodule(path) for path in handle.layout.block_paths]
    hooks = [
        block.register_forward_pre_hook(lambda m, args, i=i: entering.update({i: args[0]}))
        for i, block in enumerate(blocks)
    ]
    saved = saved_bytes(lambda: model(**inputs))
    for hook in hooks:
        hook.remove()
    if boundary:
        assert not any(entering[i].requires_grad for i in range(min(boundary + 1, BLOCKS)))

    report = handle.truncation_report()
    report.assert_truncated()
    assert report.saved_bytes == saved
    assert report.boundary == boundary
    for unit in report.prefix:
        assert unit.nodes == 0
        if not inputs_kept_before_hooks:
            assert (unit.saved_bytes, unit.activation_bytes) == (0, 0)


def _with_lora(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer, with weights that give every adapter a gradient."""
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=["correction_coefs"],  # Gemma 3n goes around its adapter in train mode only
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


def _patch(
    model: nn.Module, boundary: int, expected: dict[str, torch.Tensor]
) -> PatchHandle | None:
    """The patched model; None where nothing is left to train, which must be refused."""
    if expected:
        handle = patch_model(model, FixedPlan(_plan(boundary)))
        assert handle.boundary == boundary
        return handle
    assert boundary == BLOCKS
    with pytest.raises(ValueError, match="freezes everything that was trainable"):
        patch_model(model, FixedPlan(_plan(boundary)))
    return None


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", MODELS)
def test_plain(name, boundary):
    inputs = tiny_inputs(name)
    expected = frozen_by_hand(tiny_model(name), _plan(boundary), inputs)
    if handle := _patch(tiny_model(name), boundary, expected):
        _prove(handle, inputs, expected)
        suffix = handle.truncation_report().units[boundary + 1 :]
        assert all(unit.nodes and unit.saved_bytes for unit in suffix if unit.params)


@pytest.mark.parametrize(
    ("name", "boundary"), [(name, boundary) for name, boundary in TELLING if name in CHECKPOINTED]
)
def test_gradient_checkpointing(name, boundary):
    inputs = tiny_inputs(name)
    plain = tiny_model(name)
    enable_checkpointing(plain)
    expected = frozen_by_hand(plain, _plan(boundary), inputs)
    for enabled_first in (True, False) if boundary == 2 else (False,):
        model = tiny_model(name)
        if enabled_first:
            enable_checkpointing(model)
        handle = _patch(model, boundary, expected)
        if handle is None:
            continue
        blocks = [model.get_submodule(path) for path in handle.layout.block_paths]
        with counted_runs(blocks) as once:
            gradients(model, inputs)
        if not enabled_first:
            enable_checkpointing(model)
        _prove(handle, inputs, expected, inputs_kept_before_hooks=HOOKS_INSIDE)
        with counted_runs(blocks) as runs:
            gradients(model, inputs)
        if not enabled_first:  # blocks that train are computed a second time, for backward
            assert runs == {i: n * (1 + (i >= boundary)) for i, n in once.items()}


@pytest.mark.parametrize(("name", "boundary"), TELLING)
def test_lora(name, boundary):
    inputs = tiny_inputs(name)
    model = _with_lora(tiny_model(name))
    expected = frozen_by_hand(copy.deepcopy(model), _plan(boundary), inputs)
    assert all(".lora_" in key for key in expected)
    if handle := _patch(model, boundary, expected):
        _prove(handle, inputs, expected)
