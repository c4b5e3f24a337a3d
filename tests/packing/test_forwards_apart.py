"""A packed forward leaves nothing behind that another one takes for its own."""

from __future__ import annotations

import pytest
import torch
from proofs import FixedPlan, enable_checkpointing
from tiny_models import tiny_model

from progtuning_kernels import FreezePlan, patch_model
from progtuning_kernels.packing import padded


@pytest.mark.parametrize("checkpointed", [False, True])
def test_embeddings_that_are_handed_over_twice(checkpointed):
    """Llama's first block gets the very tensor: what was noted on it is of the forward before."""
    torch.manual_seed(1)
    embeddings = torch.randn(3, 9, 32)
    masks = [
        torch.arange(9)[None] < torch.tensor(lengths)[:, None] for lengths in ((9, 4, 2), (3, 9, 6))
    ]
    plan = FixedPlan(FreezePlan.from_boundary(0, 4, embeddings=True))
    models = [tiny_model("llama-causal-lm") for _ in range(2)]
    packed = patch_model(models[0], plan, packing="on")
    patch_model(models[1], plan, packing="off")
    if checkpointed:
        for model in models:
            enable_checkpointing(model)

    def gradient(model, mask, **options) -> torch.Tensor:
        model.zero_grad()
        labels = torch.where(mask, 5, -100)
        batch = dict(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels)
        model(**batch, use_cache=False, **options).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    for mask, options in ((masks[0], {}), (masks[1], {"output_hidden_states": True})):
        one, other = (gradient(model, mask, **options) for model in models)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with padded():
        one, other = (gradient(model, masks[0]) for model in models)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert packed.packing_report().batches == 1
