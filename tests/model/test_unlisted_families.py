"""Families without a row, a name or a special case anywhere in the project: they train all the
same, through all stages, with a loss that falls and frozen blocks that do not move by one bit.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from proofs import frozen_by_hand, gradients

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.model.families import FAMILIES

_SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=97)
MODELS = {
    # relative attention, a list of blocks without checkpointing marks
    "xlnet": lambda: hf.XLNetForSequenceClassification(
        hf.XLNetConfig(d_model=32, n_layer=4, n_head=4, d_inner=48, vocab_size=97, dropout=0.0)
    ),
    # ALiBi instead of position embeddings
    "bloom": lambda: hf.BloomForSequenceClassification(
        hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=97, pad_token_id=0)
    ),
    # no attention at all
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(**_SIZES, state_size=4, intermediate_size=64, pad_token_id=0)
    ),
    # blocks of different widths, pictures
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            num_channels=3, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32
        )
    ),
    # stages of blocks, with embeddings and norms between them
    "segformer": lambda: hf.SegformerForImageClassification(
        hf.SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            sr_ratios=[2, 1, 1, 1],
            strides=[2, 2, 1, 1],
            drop_path_rate=0.0,
        )
    ),
    "pvt": lambda: hf.PvtForImageClassification(
        hf.PvtConfig(
            image_size=32,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            sequence_reduction_ratios=[2, 1, 1, 1],
            strides=[2, 2, 1, 1],
            drop_path_rate=0.0,
            num_labels=2,
        )
    ),
    # an encoder of one kind and a decoder of another, put together by the user
    "vision-encoder-decoder": lambda: hf.VisionEncoderDecoderModel(
        encoder=hf.ViTModel(
            hf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=8,
            )
        ),
        decoder=hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=97,
                n_positions=32,
                add_cross_attention=True,
                is_decoder=True,
                bos_token_id=2,
                eos_token_id=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
    ),
}


def _model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if name == "vision-encoder-decoder":
        model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 0, 1])
    if name in ("convnext", "segformer", "pvt", "vision-encoder-decoder"):
        inputs = {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": labels}
        if name == "vision-encoder-decoder":
            inputs["labels"] = torch.randint(3, 97, (4, 6), generator=generator)
        return inputs
    ids = torch.randint(3, 97, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    if name != "mamba":
        mask[1, 6:] = 0
        ids = ids.masked_fill(mask == 0, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"labels": ids if name == "mamba" else labels}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_through_all_stages(name):
    model, inputs = _model(name), _inputs(name)
    assert model.config.model_type not in FAMILIES
    schedule = ProgressiveSchedule(4, 16)
    handle = patch_model(model, schedule)
    assert handle.num_blocks == 4
    optimizer = MaskedAdamW(handle.param_groups(lr=3e-3, weight_decay=0.1), max_grad_norm=1.0)
    losses, frozen = [], {}
    for step in range(16):
        twin = _model(name)
        twin.load_state_dict(model.state_dict())
        if step % 4 == 0:
            expected = frozen_by_hand(twin, handle.plan, inputs)
            found = gradients(model, inputs)
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
            handle.truncation_report().assert_truncated()
            frozen |= {
                n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad
            }
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
        handle.advance()
    assert handle.boundary == 3 and frozen
    assert losses[4] < losses[0] and losses[15] < 0.9 * losses[0]
