"""Packed or padded: the same outputs at real tokens and loss, gradients as near to the truth."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    SIDES,
    batch_of,
    gradient_error,
    packed_forwards,
    patched,
    run,
    run_in_double,
    zeros_stay_small,
)
from proofs import enable_checkpointing, frozen_by_hand
from tiny_models import BOUNDARIES, IN_EVERY_MODE, MODELS, tiny_inputs, tiny_model

from progtuning_kernels import MilestoneSchedule, patch_model
from progtuning_kernels.model.outputs import difference
from progtuning_kernels.packing import packer
from progtuning_kernels.packing.tokens import kept_places

# Of the tiny models; all others pack, whatever side the padding is on.
PADDED = {
    "bert-qa": "reads hidden states at padding",  # its loss is a softmax over all places
    "distilbert-qa": "reads hidden states at padding",
    "llama-qa": "reads hidden states at padding",
    "deberta-v2-conv-sequence": "size of tensor",  # the convolution runs beside the blocks
    "fsmt-seq2seq-lm": "no mask of the batch has the shape",  # time first
    "xlm-sequence": "expanded size",  # a block is spread over four lists
    "gemma3n-causal-lm": "no mask of the batch has the shape",  # hidden states of four streams
    **dict.fromkeys(
        (
            "whisper-speech-lm",
            "vit-image",
            "clip-image",
            "wav2vec2-audio",
            "wav2vec2-stable-audio",
            "hubert-stable-audio",
        ),
        "no attention_mask of shape (B, T)",
    ),
}
PACKING = [name for name in MODELS if name not in PADDED]
# A query that sees no key, at padding before the first token, attends to padding in these, and the
# label of the first token, or BERT's kind of pooler, reads that.
RIGHT_ONLY = {"gemma2-causal-lm", "deberta-sequence", "deberta-v2-sequence"}
# Experts get fewer tokens: products of other shapes, which round otherwise.
NOT_TO_THE_BIT = {"mixtral-causal-lm", "qwen2-moe-causal-lm", "qwen3-moe-causal-lm"}


def _sides(name):
    return ["right"] if name in RIGHT_ONLY else list(SIDES)


def _boundaries(name):
    # BART's head for language is its embeddings, tied, and nothing else
    return BOUNDARIES[:-1] if name == "bart-seq2seq-lm" else BOUNDARIES


def _batch(name, side, **options):
    batch = batch_of(name, SIDES[side], **options)
    if name.startswith("t5"):
        # keys out of a cache lie otherwise in memory, and eager attention rounds otherwise
        batch["use_cache"] = False
    return batch


def _same_bits(found, expected):
    assert torch.equal(found.loss, expected.loss)
    assert len(found.outputs) == len(expected.outputs)
    assert all(map(torch.equal, found.outputs, expected.outputs))


def _close(found, expected, tolerance):
    """Loss, outputs and gradients, relative to the largest value in each."""
    assert difference(expected.loss, found.loss) <= tolerance
    for one, other in zip(expected.outputs, found.outputs, strict=True):
        assert difference(one, other) <= tolerance
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max((g.abs().max().item() for g in expected.gradients.values()), default=0.0)
    for name, gradient in expected.gradients.items():
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        error = (gradient - found.gradients[name]).abs().max().item()
        assert error <= 10 * tolerance * scale, name


def test_those_that_pack_are_known_by_name():
    found = {}
    for name in MODELS:
        model = tiny_model(name)
        handle = patched(model)
        model(**tiny_inputs(name))
        if not packed_forwards(handle):
            found[name] = "; ".join(handle.packing_report().stacks.values())
    assert found.keys() == PADDED.keys()
    for name, reason in PADDED.items():
        assert reason in found[name], name


@pytest.mark.parametrize("name", PACKING)
def test_every_boundary(name):
    """Through all boundaries in turn, as a run goes."""
    model = tiny_model(name)
    schedule = MilestoneSchedule({k: k for k in _boundaries(name)})
    handle = patch_model(model, schedule, packing="on", kernels="off")
    handle.freezer.packer.groups = 1
    batches = [_batch(name, side) for side in _sides(name)]
    for boundary in _boundaries(name):
        assert handle.boundary == boundary
        found, expected, truth = [], [], []
        for batch in batches:
            padded = tiny_model(name)
            frozen_by_hand(padded, handle.plan, batch)
            before = packed_forwards(handle)
            found.append(run(model, batch))
            assert packed_forwards(handle) == before + 1
            expected.append(run(padded, batch))
            truth.append(run_in_double(padded, batch).gradients)
            if name in NOT_TO_THE_BIT:
                _close(found[-1], expected[-1], 1e-6)
            else:
                _same_bits(found[-1], expected[-1])
            assert found[-1].gradients.keys() == expected[-1].gradients.keys()
            assert zeros_stay_small(found[-1].gradients, truth[-1], 1e-6)
        ours = gradient_error([r.gradients for r in found], truth)
        assert ours <= 1.05 * gradient_error([r.gradients for r in expected], truth)
        for one, other in zip(found, expected, strict=True):
            _close(one, other, 1e-6)
        handle.advance()


@pytest.mark.parametrize("name", PACKING)
def test_in_groups_of_like_length(name, monkeypatch):
    monkeypatch.setattr(packer, "cost_of_group", lambda *_: 0.0)
    model = tiny_model(name)
    handle = patched(model, groups=4)
    for side in _sides(name):
        batch = _batch(name, side)
        _close(run(model, batch), run(tiny_model(name), batch), 1e-6)
    if "modules on padded" not in str(handle.packing_report()):
        assert "attend together" in str(handle.packing_report())


_WIDE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=97,
    max_position_embeddings=32,
    num_labels=3,
    pad_token_id=0,
)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_ANY_LENGTH = {
    "bert-sequence": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**_WIDE, **_NO_DROPOUT)
    ),
    "llama-causal-lm": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_WIDE, num_key_value_heads=2)),
    "t5-seq2seq-lm": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=97,
            dropout_rate=0.0,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
            attn_implementation="eager",
        )
    ),
}


@functools.cache
def _any_length(name):
    """A model that packs, its handle and its padded twin: widths are multiples of 32."""
    torch.manual_seed(0)
    padded = _ANY_LENGTH[name]().train()
    model = copy.deepcopy(padded)
    handle = patched(model)
    run(model, _batch(name, "right"))
    assert packed_forwards(handle)
    return model, handle, padded


@st.composite
def _spans(draw):
    """Columns and rows, the first of them full: products of less than four rows round otherwise."""
    columns = draw(st.integers(4, 13))
    rows = [(0, columns)]
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, columns - 1))
        rows.append((start, draw(st.integers(start + 1, columns))))
    return columns, rows


@pytest.mark.parametrize("name", _ANY_LENGTH)
@settings(max_examples=40)
@given(drawn=_spans(), groups=st.sampled_from([1, 4]), seed=st.integers(0, 3))
def test_any_lengths(name, drawn, groups, seed):
    columns, spans = drawn
    model, handle, padded = _any_length(name)
    handle.freezer.packer.groups = groups
    batch = batch_of(name, spans, columns=columns, seed=seed)
    if name.startswith("t5"):
        batch["use_cache"] = False
    labels = batch["labels"] if name == "llama-causal-lm" else None
    before = packed_forwards(handle)
    found, expected = run(model, batch), run(padded, batch)
    read = [0] if name == "bert-sequence" else []  # by its pooler, padding or not
    packs = not kept_places(batch["attention_mask"], labels, read).all()
    assert packed_forwards(handle) == before + packs
    if groups == 1:
        _same_bits(found, expected)
    _close(found, expected, 1e-6)


@pytest.mark.parametrize("name", [n for n in IN_EVERY_MODE if n not in PADDED])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, "autocast"], ids=lambda d: str(d).split(".")[-1]
)
def test_every_precision(name, dtype, checkpointed):
    padded = tiny_model(name)
    if hasattr(padded, "set_experts_implementation"):
        padded.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    batch = _batch(name, "mixed")
    truth = run_in_double(padded, batch)
    if checkpointed:
        enable_checkpointing(padded)
    if isinstance(dtype, torch.dtype):
        padded = padded.to(dtype)
    model = copy.deepcopy(padded)
    handle = patched(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        found, expected = run(model, batch), run(padded, batch)
    assert packed_forwards(handle)
    if dtype is torch.float64:
        # some norms compute in fp32 whatever the model's dtype is
        return _close(found, expected, 1e-7)
    # products of bf16 round otherwise in other shapes: as near to the truth, and a rounding of it
    eps = torch.finfo(torch.bfloat16).eps
    pairs = zip(found.outputs, expected.outputs, truth.outputs, strict=True)
    for one, other, true in pairs:
        assert difference(true, one) <= 1.05 * difference(true, other) + eps
    ours = gradient_error([found.gradients], [truth.gradients])
    assert ours <= 1.05 * gradient_error([expected.gradients], [truth.gradients])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ["bert-token", "llama-causal-lm"])
def test_masks_of_other_dtypes(name, dtype):
    model = tiny_model(name)
    handle = patched(model)
    batch = _batch(name, "mixed")
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    _same_bits(run(model, batch), run(tiny_model(name), batch))
    assert packed_forwards(handle)


@pytest.mark.parametrize("name", ["bert-token", "llama-causal-lm", "gpt2-causal-lm"])
@pytest.mark.parametrize("given_as", ["position_ids", "inputs_embeds", "token_type_ids"])
def test_other_arguments_per_token(name, given_as):
    padded, batch = tiny_model(name), _batch(name, "mixed")
    mask = batch["attention_mask"]
    if given_as == "position_ids":
        batch[given_as] = (mask.cumsum(1) - 1).clamp(min=0)
    elif given_as == "token_type_ids":
        if name == "llama-causal-lm":
            pytest.skip("Llama has no token types")
        # after a token of the other kind, in every row
        batch[given_as] = (mask.cumsum(1) > 1).long()
    else:
        embedded = padded.get_input_embeddings()(batch.pop("input_ids")).detach()
        # what stands at padding is read by nobody: it may be anything
        batch[given_as] = embedded + torch.randn(embedded.shape) * (1 - mask)[..., None]
    model = tiny_model(name)
    handle = patched(model)
    _same_bits(run(model, batch), run(padded, batch))
    _close(run(model, batch), run(padded, batch), 1e-6)
    assert packed_forwards(handle) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-sequence", "t5-seq2seq-lm"])
def test_rows_that_are_all_padding(name, attention):
    """Eager attention weighs all places of such a row alike."""
    if (name, attention) == ("t5-seq2seq-lm", "eager"):
        pytest.skip("T5 calls no attention function by name")
    model, padded = tiny_model(name), tiny_model(name)
    for one in (model, padded):
        one.set_attn_implementation(attention)
    handle = patched(model)
    run(model, _batch(name, "mixed"))
    batch = _batch(name, "mixed")
    batch["attention_mask"][1] = 0
    if name.startswith("bert"):  # others find the last token by the pad id
        batch["input_ids"][1] = 0
    before = packed_forwards(handle)
    found, expected = run(model, batch), run(padded, batch)
    assert packed_forwards(handle) == before + 1
    _same_bits(found, expected)
    _close(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["bert-token", "llama-token", "t5-seq2seq-lm"])
def test_masks_with_holes(name):
    model = tiny_model(name)
    handle = patched(model)
    for seed in range(4):
        batch = batch_of(name, [(0, 11)] * 6)
        holes = torch.rand(6, 11, generator=torch.Generator().manual_seed(seed)) < 0.4
        holes[:, 0] = False
        batch["attention_mask"][holes] = 0
        if name.endswith("token"):
            batch["labels"][holes] = -100
        else:
            batch["use_cache"] = False
        found, expected = run(model, batch), run(tiny_model(name), batch)
        _close(found, expected, 1e-6)
        assert packed_forwards(handle) == seed + 1


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "t5-sequence"])
def test_without_padding_nothing_is_done(name):
    model = tiny_model(name)
    handle = patched(model)
    run(model, _batch(name, "right"))
    before = packed_forwards(handle)
    batch = batch_of(name, [(0, 11)] * 3)
    found, expected = run(model, batch), run(tiny_model(name), batch)
    _same_bits(found, expected)
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())
    assert packed_forwards(handle) == before
    assert handle.packing_report().padded == {"the batch has no padding": 1}


@pytest.mark.parametrize("name", ["bert-sequence", "bart-sequence", "t5-sequence"])
def test_evaluation(name):
    model, padded = tiny_model(name), tiny_model(name).eval()
    handle = patched(model)
    run(model, _batch(name, "right"))
    before = packed_forwards(handle)
    model.eval()
    for side in SIDES:
        batch = _batch(name, side)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, padded(**batch).logits)
    assert packed_forwards(handle) == before + len(SIDES)
