"""Gradient checkpointing that is not transformers' own."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from proofs import frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import MilestoneSchedule, patch_model


def test_reentrant_checkpoints_by_a_function_of_another_library():
    """LLaMA-Factory's: around the blocks that train, whose input it makes require grad."""

    def checkpoint_of(block):
        def checkpointed(call, *args, **kwargs):
            if not any(p.requires_grad for p in block.parameters()):
                return call(*args, **kwargs)
            args[0].requires_grad_()
            return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=True, **kwargs)

        return checkpointed

    inputs = tiny_inputs("llama-causal-lm")
    for boundary in range(4):
        plan = MilestoneSchedule({0: boundary}).plan(0, 4)
        expected = frozen_by_hand(tiny_model("llama-causal-lm"), plan, inputs)
        model = tiny_model("llama-causal-lm")
        model.gradient_checkpointing_enable()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = checkpoint_of(module)
        patch_model(model, MilestoneSchedule({0: boundary, 9: 4}), packing="off")
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
