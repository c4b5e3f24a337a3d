"""The prefix cache under every family, and under what their forwards are asked for."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from cached_models import (
    BLOCKS,
    assert_same,
    blocks_of,
    cached_and_plain,
    cpu_cache,
    joined,
    patched_at,
    repadded,
    take_rows,
)
from proofs import counted_runs, enable_checkpointing, gradients
from tiny_models import BATCH, TELLING, tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import MilestoneSchedule, PatchHandle, patch_model
from progtuning_kernels.model.forward_hooks import ForwardHooks
from progtuning_kernels.model.layout import EMBEDDINGS

# What cannot do without its prefix, by family and boundary, and why.
REFUSED = {
    ("t5-seq2seq-lm", 1): "more tensor",  # the relative bias, which block 1 gets from block 0
    ("t5-sequence", 1): "more tensor",
    **{("fsmt-seq2seq-lm", k): r"not \(B, T, C\)" for k in (1, 2, 3, 4)},  # time comes first
    **{("gemma3n-causal-lm", k): r"not \(B, T, C\)" for k in (1, 2, 3, 4)},  # four streams do
}
# Their loss or their head reads padding: rows are stored with it.
WITH_PADDING = {"bert-qa", "distilbert-qa", "llama-qa", "siglip-contrastive"}
# The experts above the boundary see zeros where they saw padding, in batches of another size.
MIXTURES = {"mixtral-causal-lm", "qwen2-moe-causal-lm", "qwen3-moe-causal-lm"}


@contextmanager
def _embeddings_runs(handle: PatchHandle) -> Iterator[list[str]]:
    """Paths of the modules of the embeddings that compute."""
    runs: list[str] = []
    hooks = [
        ForwardHooks(handle.model.get_submodule(path), lambda *_, path=path: runs.append(path))
        for path in handle.layout.module_paths(EMBEDDINGS)
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


TIED = "bart-seq2seq-lm"  # nothing is left to train above its last block


@functools.lru_cache(maxsize=1)  # the boundaries of a model come one after the other
def _plain(name: str) -> PatchHandle:
    """A run without a cache, whose step is the boundary."""
    boundaries = range(BLOCKS + (name != TIED))
    schedule = MilestoneSchedule({k: k for k in boundaries}, embeddings="never")
    return patch_model(tiny_model(name), schedule)


@pytest.mark.parametrize(
    ("name", "boundary"), [(name, k) for name, k in TELLING if k and (name, k) != (TIED, BLOCKS)]
)
def test_every_family(name, boundary):
    handle, plain = patched_at(tiny_model(name), boundary, cache=cpu_cache()), _plain(name)
    plain.seek(boundary)
    batches = [tiny_inputs(name, seed=seed) for seed in (1, 2)]
    expected = [gradients(plain.model, inputs) for inputs in batches]
    for _ in range(2):
        for inputs, right in zip(batches, expected, strict=True):
            assert_same(gradients(handle.model, inputs), right, exact=name not in MIXTURES)
    with counted_runs(blocks_of(handle)) as runs, _embeddings_runs(handle) as embeddings:
        for inputs in batches:
            gradients(handle.model, inputs)
    report = handle.cache_report()
    assert str(report)
    reason = REFUSED.get((name, boundary))
    if reason is not None:
        assert report.state == "bypassed" and report.served_steps == 0
        assert re.search(reason, report.reason)
        return
    assert report.state == "on", report
    level = min(boundary, handle.layout.stacks[0].length)
    assert report.level == level and report.rows == {level: 2 * BATCH}
    assert report.misses == 2 * BATCH and report.hits == 2 * 2 * BATCH
    assert report.served_steps == 2 * 2
    assert all(runs[i] == 0 for i in range(level)), runs
    if len(handle.layout.stacks) > 1:  # those of the other side run
        other = "vision_model." if name.startswith("siglip") else "decoder."
        embeddings = [path for path in embeddings if other not in path]
    if not name.endswith("audio"):  # Wav2Vec2 returns what its feature projection computes
        assert not embeddings
    paths = handle.cache._paths.values()
    per_token = any(path.per_token for path in paths)
    assert all(p.unpadded for p in paths) == (per_token and name not in WITH_PADDING)


@pytest.mark.parametrize(
    "name",
    [
        "bert-sequence",
        "bert-token",
        "roberta-sequence",
        "distilbert-sequence",
        "deberta-v2-sequence",
        "modernbert-sequence",
        "gpt2-causal-lm",
        "llama-causal-lm",
        "gemma3-causal-lm",
        "mixtral-causal-lm",
        "t5-seq2seq-lm",
    ],
)
def test_rows_are_found_in_other_batches_and_under_other_padding(name):
    handle, plain = cached_and_plain(name, 2)
    pad = 1 if "roberta" in name else 0
    first, second = tiny_inputs(name, seed=1), tiny_inputs(name, seed=2)
    for inputs in (first, second):
        gradients(handle.model, inputs)
    several = joined(first, second)
    batches = [
        take_rows(several, (5, 0, 2)),
        take_rows(several, (3, 1, 4, 0)),
        repadded(first, more=4, pad=pad),
        repadded(take_rows(several, (2, 5)), more=-4),
    ]
    with counted_runs(blocks_of(handle)) as runs:
        found = [gradients(handle.model, inputs) for inputs in batches]
    assert not runs[0] and not runs[1]
    for inputs, grads in zip(batches, found, strict=True):
        assert_same(grads, gradients(plain.model, inputs), exact=False)
    assert handle.cache_report().rows == {2: 2 * BATCH}


def test_heads_that_read_padding_are_served_only_with_the_same_padding():
    handle, plain = cached_and_plain("bert-qa", 2)
    inputs = tiny_inputs("bert-qa")
    longer = repadded(inputs, more=3)
    for batch in (inputs, longer, inputs, longer):
        assert_same(gradients(handle.model, batch), gradients(plain.model, batch))
    report = handle.cache_report()
    assert report.served_steps == 2 and report.misses == 2 * BATCH
    assert "padding" in str(report)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("bert-token", 2 * BATCH - 1),  # the row without padding is one and the same
        ("llama-causal-lm", 2 * BATCH - 1),
        ("bert-sequence", 2 * BATCH),  # its pooler reads the first column, padding included
    ],
)
def test_left_padding_is_another_row(name, rows):
    """BERT counts positions from the first column."""
    handle, plain = cached_and_plain(name, 2)
    inputs = tiny_inputs(name)
    left = {k: v.clone() for k, v in inputs.items()}
    for row, count in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for value in left.values():
            if value.ndim == 2:
                value[row] = value[row].roll(value.shape[1] - count)
    for batch in (inputs, left, inputs, left):
        found, expected = gradients(handle.model, batch), gradients(plain.model, batch)
        assert_same(found, expected, exact=False)
    assert handle.cache_report().rows == {2: rows}
    shared = rows < 2 * BATCH
    assert handle.cache_report().served_steps == 2 + shared


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "llama-causal-lm", "t5-seq2seq-lm"])
def test_generation_runs_the_prefix(name):
    handle, plain = cached_and_plain(name, 2)
    inputs = tiny_inputs(name)
    for _ in range(2):
        gradients(handle.model, inputs)
    prompt = {k: v[:1] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    tokens = [
        model.eval().generate(**prompt, max_new_tokens=5, do_sample=False)
        for model in (handle.model, plain.model)
    ]
    assert torch.equal(*tokens)
    with torch.no_grad():
        found, expected = (m(**inputs, use_cache=True) for m in (handle.model, plain.model))
    assert torch.equal(found.logits, expected.logits)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert_same(gradients(handle.model.train(), inputs), gradients(plain.model.train(), inputs))


def test_keys_and_values_that_the_output_holds_in_evaluation_are_all_there():
    handle = patched_at(tiny_model("llama-causal-lm"), 2, cache=cpu_cache())
    inputs = tiny_inputs("llama-causal-lm")
    for _ in range(2):
        gradients(handle.model, inputs)
    assert handle.cache_report().served_steps == 1
    with torch.no_grad():
        past = handle.model.eval()(**inputs).past_key_values
    assert all(layer.keys is not None for layer in past.layers) and len(past.layers) == BLOCKS
    assert any("keys and values" in reason for reason in handle.cache_report().bypasses)
    with torch.no_grad():
        handle.model(**inputs, use_cache=False)
    assert handle.cache_report().served_steps == 2


@pytest.mark.parametrize(
    "name, more, reason",
    [
        ("bert-sequence", {"output_hidden_states": True}, "output_hidden_states"),
        ("bert-sequence", {"output_attentions": True}, "output_attentions"),
        ("qwen2-moe-causal-lm", {"output_router_logits": True}, "output_router_logits"),
        ("llama-causal-lm", {"use_cache": True}, "use_cache=True"),
        ("bert-sequence", {"attention_mask": torch.ones(BATCH, 1, 11, 11)}, "attention_mask"),
        ("bert-sequence", {"inputs_embeds": None}, "inputs_embeds"),
    ],
)
def test_forwards_that_want_the_prefix_get_it(name, more, reason):
    handle, plain = cached_and_plain(name, 2)
    inputs = {**tiny_inputs(name), **more}
    if "inputs_embeds" in more:
        inputs["inputs_embeds"] = torch.randn(BATCH, 11, 32)
        del inputs["input_ids"]
    for _ in range(2):
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    report = handle.cache_report()
    assert report.state == "bypassed" and reason in report.reason
    assert report.served_steps == 0 and report.rows == {}
    assert sum(n for why, n in report.bypasses.items() if reason in why) == 2, report


_VISION = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, patch_size=8
)


def _llava(layer: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    text = dict(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION, image_size=16),
            text_config=transformers.LlamaConfig(**text, intermediate_size=48, use_cache=False),
            image_token_index=98,
            image_token_id=98,
            image_seq_length=4,
            vision_feature_layer=layer,
        )
    )
    ids = torch.randint(3, 90, (3, 12))
    ids[:, 2:6] = 98
    return model, {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}


def _dpt() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        **_VISION,
        image_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    return transformers.DPTForDepthEstimation(config), {"pixel_values": torch.randn(3, 3, 32, 32)}


@pytest.mark.parametrize("boundary", [1, 3])
@pytest.mark.parametrize("make", [lambda: _llava(-2), lambda: _llava(2), _dpt])
def test_hidden_states_that_a_model_asks_itself_for(make, boundary):
    """The first forward ever is one of a later stage."""
    model, inputs = make()
    untouched = copy.deepcopy(model).eval()
    schedule = MilestoneSchedule({0: 0, 1: boundary}, embeddings="never")
    handle = patch_model(model.eval(), schedule, cache=cpu_cache(), step=1)

    def check() -> None:
        found, expected = (m(**inputs)[0] for m in (model, untouched))
        assert torch.equal(found, expected)
        found.sum().backward()

    for _ in range(3):
        check()
    report = handle.cache_report()
    assert report.served_steps or "without the prefix" in report.reason
    handle.unpatch()
    check()
    outputs = [m(**inputs, output_hidden_states=True).hidden_states for m in (model, untouched)]
    assert all(map(torch.equal, *outputs)) and len(outputs[0]) == 5


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "vit-image"])
def test_hidden_states_that_are_first_asked_for_after_a_cached_forward(name):
    handle, plain = cached_and_plain(name, 2)
    inputs = tiny_inputs(name)
    for _ in range(2):
        gradients(handle.model, inputs)
    for _ in range(2):
        found, expected = (
            h.model(**inputs, output_hidden_states=True).hidden_states for h in (handle, plain)
        )
        assert len(found) == BLOCKS + 1 and all(map(torch.equal, found, expected))
        handle.unpatch()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_checkpointing_and_autocast(name, checkpointed, autocast):
    handle, plain = cached_and_plain(name, 2, packing="off")
    inputs = tiny_inputs(name)
    for model in (handle.model, plain.model):
        if checkpointed:
            enable_checkpointing(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(3):
            with counted_runs(blocks_of(handle)) as runs:
                found = gradients(handle.model, inputs)
            assert_same(found, gradients(plain.model, inputs))
    assert [runs[i] for i in range(BLOCKS)] == [0, 0, *[1 + checkpointed] * 2]
    assert handle.cache_report().served_steps == 2
    if autocast:
        with torch.no_grad():  # in another precision these are not the same rows
            found, expected = (m(**inputs).loss for m in (handle.model, plain.model))
        assert torch.equal(found, expected)
        assert handle.cache_report().served_steps == 2


def test_blocks_that_are_compiled_one_by_one():
    handle, plain = cached_and_plain("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    for model in (handle.model, plain.model):
        for block in model.bert.encoder.layer:
            block.compile(backend="eager")
    for _ in range(3):
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert handle.cache_report().served_steps == 2


def test_a_model_compiled_whole_runs_its_prefix():
    model = tiny_model("bert-sequence")
    model.compile(backend="eager")
    handle = patched_at(model, 2, cache=cpu_cache())
    plain = patched_at(tiny_model("bert-sequence"), 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        assert_same(gradients(model, inputs), gradients(plain.model, inputs), exact=False)
    assert "compiled" in handle.cache_report().reason
