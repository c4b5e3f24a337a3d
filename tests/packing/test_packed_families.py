"""Families beyond the tiny models: packed and equal, or padded with a reason, never wrong.

The verdict of each stands here, so that one that stops packing is noticed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from packed_models import LEFT, MIXED, RIGHT, Run, batch_of, packed_forwards, patched, real_outputs
from tiny_models import EXPERTS, IDS, SIZES, T5, TWO_SIDES, VOCABULARY

from progtuning_kernels.model.outputs import difference

_SIZES = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64}
_TEXT = dict(**_SIZES, num_labels=3)
_GROUPED = dict(**_SIZES, **IDS, num_key_value_heads=2)
_OLD = dict(vocab_size=VOCABULARY, n_layer=2, n_head=4, **IDS)
PACKS = "packs"
# Queries at padding before the first token see no key and attend to padding; something reads them.
RIGHT_ONLY = "packs padding on the right"

FAMILIES = {
    # encoders
    ("EsmForMaskedLM", PACKS): dict(**_SIZES, pad_token_id=0, mask_token_id=3),
    ("EuroBertForMaskedLM", PACKS): _GROUPED,
    ("LayoutLMForSequenceClassification", PACKS): _TEXT,
    ("ErnieForSequenceClassification", PACKS): _TEXT,
    ("Data2VecTextForSequenceClassification", PACKS): _TEXT,
    ("CLIPTextModelWithProjection", PACKS): dict(**_SIZES, projection_dim=32, **IDS),
    ("RoFormerForSequenceClassification", PACKS): _TEXT,
    ("MegatronBertForSequenceClassification", PACKS): _TEXT,
    ("RemBertForSequenceClassification", PACKS): _TEXT,
    ("XmodForSequenceClassification", PACKS): dict(**_TEXT, default_language="en_XX"),
    ("BigBirdForSequenceClassification", PACKS): dict(**_TEXT, attention_type="original_full"),
    ("BertForMultipleChoice", PACKS): _TEXT,
    # decoders
    ("CohereForCausalLM", PACKS): _GROUPED,
    ("Cohere2ForCausalLM", PACKS): dict(**_GROUPED, sliding_window=4),
    ("GraniteForCausalLM", PACKS): _GROUPED,
    ("Olmo2ForCausalLM", PACKS): _GROUPED,
    ("StableLmForCausalLM", PACKS): _GROUPED,
    ("Starcoder2ForCausalLM", PACKS): _GROUPED,
    ("PersimmonForCausalLM", PACKS): dict(**_SIZES, **IDS),
    ("BioGptForCausalLM", PACKS): dict(**_SIZES, **IDS),
    ("OlmoeForCausalLM", PACKS): dict(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    ("FalconForCausalLM", PACKS): dict(**{**_SIZES, "intermediate_size": None}, **IDS),
    ("BloomForCausalLM", RIGHT_ONLY): dict(hidden_size=32, **_OLD),
    ("GPTJForCausalLM", RIGHT_ONLY): dict(n_embd=32, n_positions=64, rotary_dim=4, **_OLD),
    ("XGLMForCausalLM", RIGHT_ONLY): dict(
        d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, vocab_size=VOCABULARY, **IDS
    ),
    # hybrids: a part of their blocks runs padded
    ("Lfm2ForCausalLM", PACKS): dict(**_GROUPED, layer_types=["conv", "full_attention"]),
    ("JambaForCausalLM", PACKS): dict(
        **_GROUPED,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    ("Qwen3NextForCausalLM", PACKS): dict(
        **_GROUPED,
        **EXPERTS,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    ("FalconH1ForCausalLM", PACKS): dict(
        **_GROUPED,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    # two stacks
    ("MT5ForConditionalGeneration", PACKS): T5,
    ("BartForConditionalGeneration", PACKS): TWO_SIDES,
    ("WhisperForConditionalGeneration", PACKS): dict(
        **TWO_SIDES, num_mel_bins=8, max_source_positions=8, max_target_positions=32
    ),
    # its experts get noise on every token, which the reason says, not how the first way failed
    ("SwitchTransformersForConditionalGeneration", "blocks draw random numbers"): dict(
        **T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=0,  # no token is left out for its place: another reason
    ),
    ("SwitchTransformersForConditionalGeneration", "leaves tokens out"): dict(
        **T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
    # what mixes neighbours, or keeps no place for a token
    ("MambaForCausalLM", "nearly all its parameters"): dict(
        hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4, pad_token_id=0
    ),
    ("RwkvForCausalLM", "an output differs"): dict(
        hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, attention_hidden_size=32, **IDS
    ),
    ("XLNetForSequenceClassification", "no mask of the batch has the shape"): dict(
        d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=VOCABULARY, num_labels=3
    ),
    ("ConvBertForSequenceClassification", "an output differs"): _TEXT,
    ("FNetForSequenceClassification", "an output differs"): dict(
        **{k: v for k, v in _TEXT.items() if k != "num_attention_heads"}
    ),
    ("NystromformerForSequenceClassification", "an output differs"): dict(
        **_TEXT, num_landmarks=4, segment_means_seq_len=4, conv_kernel_size=3
    ),
    ("LongformerForSequenceClassification", "no mask of the batch has the shape"): dict(
        **_TEXT, attention_window=4, pad_token_id=0
    ),
}


def _model(name, settings):
    torch.manual_seed(0)
    cls = getattr(hf, name)
    model = cls(cls.config_class(**settings)).train()
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or key == "p"):
                setattr(module, key, 0.0)
    return model


def _batch(name, spans):
    if "Sequence" in name or "CLIP" in name:
        batch = batch_of("bert-sequence", spans)
        if "CLIP" in name:
            del batch["labels"]
            for row, (_, stop) in enumerate(spans):
                batch["input_ids"][row, stop - 1] = 2  # the token that it pools
        return batch
    if "MultipleChoice" in name:
        batch = batch_of("bert-sequence", spans)
        rows = {k: batch[k].view(2, 2, -1) for k in ("input_ids", "attention_mask")}
        return rows | {"labels": torch.tensor([0, 1])}
    if "Conditional" not in name:
        return batch_of("llama-causal-lm", spans)
    batch = batch_of("t5-seq2seq-lm", spans)
    mask = batch["attention_mask"]
    # the decoder has as many tokens as the encoder and a mask of its own, padded otherwise
    batch["decoder_attention_mask"] = mask.flip(0)
    batch["decoder_input_ids"] = batch["input_ids"].flip(0)
    batch["labels"] = batch["decoder_input_ids"].masked_fill(mask.flip(0) == 0, -100)
    if name.startswith("Whisper"):
        features = torch.randn(len(spans), 8, 16, generator=torch.Generator().manual_seed(2))
        del batch["input_ids"], batch["attention_mask"]
        batch["input_features"] = features
    return batch


def _run(model, batch):
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**batch)
    loss = output[0].square().sum() if "labels" not in batch else output.loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return Run(loss.detach(), real_outputs(output, {"attention_mask": mask}), gradients)


def _assert_equal(found, expected):
    for one, other in zip(expected.outputs, found.outputs, strict=True):
        if one.shape[:1] == other.shape[:1]:
            assert difference(one, other) <= 1e-5
    assert difference(expected.loss, found.loss) <= 1e-5
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(g.abs().max().item() for g in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        assert (found.gradients[name] - gradient).abs().max().item() <= 1e-5 * scale, name


@pytest.mark.parametrize(("name", "verdict"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_packed_and_equal_or_padded_for_a_reason(name, verdict):
    settings = FAMILIES[name, verdict]
    model, padded = _model(name, settings), _model(name, settings)
    handle = patched(model, groups=4)
    packed = []
    for spans in (MIXED, LEFT, RIGHT):
        batch, before = _batch(name, spans), packed_forwards(handle)
        _assert_equal(_run(model, batch), _run(padded, batch))
        packed.append(packed_forwards(handle) > before)
    if verdict == PACKS:
        assert packed == [True, True, True], handle.packing_report()
    elif verdict == RIGHT_ONLY:
        assert packed == [False, False, True], handle.packing_report()
    else:
        assert verdict in str(handle.packing_report())
        assert packed == [False, False, False]


def test_short_rows_of_the_trial_leave_sparse_attention_on():
    """BigBird exchanges its attention for good where rows are short."""
    settings = dict(
        **{**_TEXT, "max_position_embeddings": 128},
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
    )
    name = "BigBirdForSequenceClassification"
    model, padded = _model(name, settings), _model(name, settings)
    batch = batch_of("bert-sequence", [(0, 48), (0, 40), (0, 30), (0, 20)], columns=48)
    handle = patched(model)
    runs = []
    for each in (model, padded):
        np.random.seed(0)  # the blocks that a block sees at random
        runs.append(_run(each, batch))
        assert each.bert.attention_type == "block_sparse"
    _assert_equal(*runs)
    assert "changes its modules" in str(handle.packing_report())


def test_padding_on_a_side_that_was_not_tried_is_packed_right_or_not_at_all():
    """Several sequences a row are tried as they come, here with padding on the right."""
    name = "BertForMultipleChoice"
    model, padded = _model(name, _TEXT), _model(name, _TEXT)
    handle = patched(model)
    for spans, packs in ((RIGHT, True), (LEFT, False)):
        batch, before = _batch(name, spans), packed_forwards(handle)
        _assert_equal(_run(model, batch), _run(padded, batch))
        assert (packed_forwards(handle) > before) == packs


def test_labels_at_every_place_do_not_make_a_trial_that_shows_nothing():
    """All places are kept for such a batch, and a later one without labels has padding."""
    name = "ConvBertForMaskedLM"
    model, padded = _model(name, _SIZES), _model(name, _SIZES)
    handle = patched(model)
    batch = {k: _batch("Sequence", RIGHT)[k] for k in ("input_ids", "attention_mask")}
    model(**batch, labels=batch["input_ids"])
    assert "an output differs" in str(handle.packing_report())
    _assert_equal(_run(model, batch), _run(padded, batch))
