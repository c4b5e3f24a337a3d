"""The prefix cache: what it changes is time, and nothing else."""

from __future__ import annotations

import copy
import pickle
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from proofs import FixedPlan, counted_runs, enable_checkpointing, gradients
from tiny_models import BATCH, MODELS, tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from progtuning_kernels import (
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    PrefixCache,
    ProgressiveSchedule,
    UnsupportedModelError,
    patch_model,
    random_state,
)
from progtuning_kernels.cache import side_forwards, trial
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.cache.content_keys import digest_rows, signature
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.call import Call, UnknownContent
from progtuning_kernels.model.layout import EMBEDDINGS
from progtuning_kernels.patch import handle_of

BLOCKS = 4
BUDGET = 1 << 26
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


@pytest.fixture(autouse=True)
def _always_on(request, monkeypatch):
    """Tiny blocks cost less than any cache: only the tests of that ask whether it pays."""
    if "times" not in request.fixturenames:
        monkeypatch.setattr(BreakEven, "verdict", lambda self, rows: None)


@pytest.fixture
def times() -> None:
    """Asked for by tests in which the cache may switch itself off."""


def _cache(**options: Any) -> PrefixCache:
    return PrefixCache(BUDGET, device="cpu", **options)


def _patch(
    model: nn.Module, boundary: int = 2, *, cache: PrefixCache | None = None, **options: Any
) -> PatchHandle:
    plan = FreezePlan.from_boundary(boundary, BLOCKS, embeddings=False)
    return patch_model(model, FixedPlan(plan), cache=cache, **options)


def _pair(name: str, boundary: int = 2, **options: Any) -> tuple[PatchHandle, PatchHandle]:
    """The same model patched with a cache and without."""
    return (
        _patch(tiny_model(name), boundary, cache=_cache(), **options),
        _patch(tiny_model(name), boundary, **options),
    )


def _blocks(handle: PatchHandle) -> list[nn.Module]:
    return [handle.model.get_submodule(path) for path in handle.layout.block_paths]


@contextmanager
def _embeddings_runs(handle: PatchHandle) -> Iterator[list[str]]:
    """Paths of the modules of the embeddings that compute."""
    runs: list[str] = []
    hooks = [
        handle.model.get_submodule(path).register_forward_pre_hook(
            lambda *_, path=path: runs.append(path)
        )
        for path in handle.layout.module_paths(EMBEDDINGS)
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _rows_entering(block: nn.Module) -> Iterator[list[int]]:
    rows: list[int] = []
    hook = block.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    try:
        yield rows
    finally:
        hook.remove()


def _rows(inputs: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    return {k: v[list(rows)] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _joined(*batches: dict[str, Any]) -> dict[str, Any]:
    return {
        k: torch.cat([b[k] for b in batches]) if isinstance(v, torch.Tensor) else v
        for k, v in batches[0].items()
    }


def _repadded(inputs: dict[str, Any], *, more: int, pad: int = 0) -> dict[str, Any]:
    """The same rows with `more` columns of padding (fewer, if negative) on the right."""
    tokens = inputs["input_ids"].shape[1]
    changed = {}
    for name, value in inputs.items():
        if not (isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == tokens):
            changed[name] = value
        elif more < 0:
            changed[name] = value[:, :more].contiguous()
        else:
            fill = {"labels": -100, "input_ids": pad}.get(name, 0)
            changed[name] = nn.functional.pad(value, (0, more), value=fill)
    return changed


def _assert_same(found: dict, expected: dict, *, exact: bool = True) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        if exact:
            assert torch.equal(found[name], gradient), name
        else:
            scale = float(gradient.abs().max()) + 1e-6
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("boundary", range(1, BLOCKS + 1))
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name, boundary):
    if name == "bart-seq2seq-lm" and boundary == BLOCKS:
        return  # its head is tied: nothing is left to train
    handle, plain = _pair(name, boundary)
    batches = [tiny_inputs(name, seed=seed) for seed in (1, 2)]
    losses = []
    for epoch in range(3):
        if epoch == 2:
            with (
                counted_runs(_blocks(handle)) as runs,
                _embeddings_runs(handle) as embeddings,
            ):
                for inputs in batches:
                    gradients(handle.model, inputs)
        for inputs in batches:
            expected = gradients(plain.model, inputs)
            found = gradients(handle.model, inputs)
            _assert_same(found, expected, exact=name not in MIXTURES)
            with torch.no_grad():
                losses.append(float(plain.model(**inputs).loss))
    report = handle.cache_report()
    assert str(report)
    reason = REFUSED.get((name, boundary))
    if reason is not None:
        assert report.state == "bypassed" and report.served_steps == 0
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(report.reason)
        return
    assert report.state == "on", report
    level = min(boundary, handle.layout.stacks[0].length)
    assert report.level == level and report.rows == {level: 2 * BATCH}
    assert report.misses == 2 * BATCH and report.hits == 3 * 2 * BATCH
    assert report.served_steps == 3 * 2
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
    handle, plain = _pair(name, 2)
    pad = 1 if "roberta" in name else 0
    first, second = tiny_inputs(name, seed=1), tiny_inputs(name, seed=2)
    for inputs in (first, second):
        gradients(handle.model, inputs)
    several = _joined(first, second)
    batches = [
        _rows(several, (5, 0, 2)),
        _rows(several, (3, 1, 4, 0)),
        _repadded(first, more=4, pad=pad),
        _repadded(_rows(several, (2, 5)), more=-4),
    ]
    with counted_runs(_blocks(handle)) as runs:
        found = [gradients(handle.model, inputs) for inputs in batches]
    assert not runs[0] and not runs[1]
    for inputs, grads in zip(batches, found, strict=True):
        _assert_same(grads, gradients(plain.model, inputs), exact=False)
    assert handle.cache_report().rows == {2: 2 * BATCH}


def test_heads_that_read_padding_are_served_only_with_the_same_padding():
    handle, plain = _pair("bert-qa", 2)
    inputs = tiny_inputs("bert-qa")
    longer = _repadded(inputs, more=3)
    for batch in (inputs, longer, inputs, longer):
        _assert_same(gradients(handle.model, batch), gradients(plain.model, batch))
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
    handle, plain = _pair(name, 2)
    inputs = tiny_inputs(name)
    left = {k: v.clone() for k, v in inputs.items()}
    for row, count in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for value in left.values():
            if value.ndim == 2:
                value[row] = value[row].roll(value.shape[1] - count)
    for batch in (inputs, left, inputs, left):
        found, expected = gradients(handle.model, batch), gradients(plain.model, batch)
        _assert_same(found, expected, exact=False)
    assert handle.cache_report().rows == {2: rows}
    shared = rows < 2 * BATCH
    assert handle.cache_report().served_steps == 2 + shared


def test_only_missing_rows_of_a_mixed_batch_run_the_prefix():
    handle, plain = _pair("bert-sequence", 2)
    several = _joined(*(tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)))
    gradients(handle.model, _rows(several, (0, 1, 2, 3)))
    for rows, ran in (((0, 1, 4), [1]), ((2, 4, 3), []), ((5, 0), [1]), ((0, 5, 4), [])):
        batch = _rows(several, rows)
        with _rows_entering(_blocks(handle)[0]) as entered:
            found = gradients(handle.model, batch)
        assert entered == ran
        _assert_same(found, gradients(plain.model, batch), exact=False)
    other = tiny_inputs("bert-sequence", seed=3)
    batch = _joined(other, _rows(several, (0,)))
    with _rows_entering(_blocks(handle)[0]) as entered:
        found = gradients(handle.model, batch)
    assert entered == [BATCH]
    _assert_same(found, gradients(plain.model, batch), exact=False)
    assert handle.cache_report().rows == {2: 2 * BATCH + BATCH}


def _train(
    model: nn.Module,
    schedule: MilestoneSchedule | ProgressiveSchedule,
    batches: Sequence[dict[str, Any]],
    *,
    accumulate: int = 1,
    dropout: bool = False,
    **options: Any,
) -> tuple[list[float], PatchHandle]:
    handle = patch_model(model, schedule, **options)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2, weight_decay=0.1), max_grad_norm=1.0)
    losses = []
    for i, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    return losses, handle


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "name", ["bert-sequence", "gpt2-causal-lm", "bart-sequence", "t5-sequence"]
)
def test_a_whole_run_is_the_same_with_dropout_in_what_trains(name, accumulate):
    batches = [tiny_inputs(name, seed=seed) for seed in (1, 2, 3)] * (4 * accumulate)
    results = []
    for cache in (_cache(), None):
        # functional dropout in code around the prefix would make it no fixed function
        model = tiny_model(name, dropout=name in ("bert-sequence", "gpt2-causal-lm"))
        torch.manual_seed(5)
        losses, handle = _train(
            model, ProgressiveSchedule(3, 12), batches, accumulate=accumulate, cache=cache
        )
        results.append((losses, model.state_dict(), torch.get_rng_state()))
        if cache is not None:
            assert handle.cache_report().served_steps
    (losses, weights, random_state), (expected, plain_weights, plain_state) = results
    assert losses == expected
    assert all(torch.equal(weights[key], plain_weights[key]) for key in weights)
    assert torch.equal(random_state, plain_state)


def test_rows_move_up_when_the_boundary_rises():
    inputs = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2, 3)]
    schedule = MilestoneSchedule({0: 1, 6: 3}, embeddings="never")
    model = tiny_model("bert-sequence")
    handle = patch_model(model, schedule, cache=_cache())
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
    runs_by_step = []
    rows_by_step = []
    for batch in inputs * 4:
        with counted_runs(_blocks(handle)) as runs:
            model(**batch).loss.backward()
        runs_by_step.append([runs[i] for i in range(BLOCKS)])
        rows_by_step.append(dict(handle.cache_report().rows))
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    assert runs_by_step[3:6] == [[0, 1, 1, 1]] * 3
    # the first step of a stage proves, by three forwards, that nothing is cut off or left out
    assert runs_by_step[7:9] == [[0, 1, 1, 1]] * 2  # read at 1, stored at 3
    assert runs_by_step[9:] == [[0, 0, 0, 1]] * 3
    assert rows_by_step[5] == {1: 3 * BATCH}
    assert rows_by_step[6] == {1: 2 * BATCH, 3: BATCH}
    assert rows_by_step[7] == {1: BATCH, 3: 2 * BATCH}
    assert rows_by_step[9] == {3: 3 * BATCH}


def test_a_mixed_batch_starts_from_the_level_that_each_row_has():
    several = _joined(*(tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)))
    schedule = MilestoneSchedule({0: 1, 1: 3}, embeddings="never")
    handle = patch_model(tiny_model("bert-sequence"), schedule, cache=_cache())
    plain = _patch(tiny_model("bert-sequence"), 3)
    gradients(handle.model, _rows(several, (0, 1, 2, 3)))
    handle.advance()
    gradients(handle.model, _rows(several, (0, 4)))  # proves; both are at 3 now
    batch = _rows(several, (0, 1, 2, 5, 4))
    with (
        _rows_entering(_blocks(handle)[0]) as at_zero,
        _rows_entering(_blocks(handle)[1]) as at_one,
    ):
        found = gradients(handle.model, batch)
    assert (at_zero, at_one) == ([1], [1, 2])
    _assert_same(found, gradients(plain.model, batch), exact=False)
    assert handle.cache_report().rows == {1: 1, 3: 5}  # row 3 was not asked for since


def _add(model: nn.Module) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.5)


def _load(model: nn.Module) -> None:
    model.load_state_dict(tiny_model("bert-sequence", seed=9).state_dict())


def _replace(model: nn.Module) -> None:
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() + 0.5, requires_grad=False)


def _set_data(model: nn.Module) -> None:
    table = model.bert.embeddings.word_embeddings
    table.weight.data = table.weight.data + 0.5


def _swap_module(model: nn.Module) -> None:
    output = model.bert.encoder.layer[0].output
    output.LayerNorm = nn.LayerNorm(32, eps=1e-3)


@pytest.mark.parametrize("change", [_add, _load, _replace, _set_data, _swap_module])
def test_no_stale_row_is_read_after_weights_change(change):
    handle, plain = _pair("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(handle.model, inputs)
    assert handle.cache_report().served_steps == 1
    for model in (handle.model, plain.model):
        torch.manual_seed(3)
        change(model)
        for name, p in model.named_parameters():
            p.requires_grad_(
                not name.startswith(("bert.emb", "bert.encoder.layer.0.", "bert.encoder.layer.1."))
            )
    for _ in range(3):
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert handle.cache_report().served_steps > 1


def test_blocks_that_thaw_and_train_take_their_rows_with_them():
    schedule = MilestoneSchedule({0: 1, 2: 3, 4: 1, 6: 3, 8: 0}, embeddings="never")
    batches = [tiny_inputs("bert-sequence")] * 10
    cached, handle = _train(tiny_model("bert-sequence"), schedule, batches, cache=_cache())
    plain, _ = _train(tiny_model("bert-sequence"), schedule, batches)
    assert cached == plain
    assert handle.cache_report().state == "bypassed"
    assert handle.cache_report().rows == {}


def test_weights_that_are_written_through_data_are_noticed_in_evaluation():
    handle, plain = _pair("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(handle.model, inputs)
    for model in (handle.model, plain.model):  # as averages of weights are swapped in
        model.bert.encoder.layer[0].output.dense.weight.data.mul_(1.5)
        model.eval()
    with torch.no_grad():
        assert torch.equal(handle.model(**inputs).logits, plain.model(**inputs).logits)
    assert handle.cache_report().rows == {}


def test_merging_and_switching_adapters():
    def lora() -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model("bert-sequence"), config)

    handle, plain = _patch(lora(), 2, cache=_cache()), _patch(lora(), 2)
    inputs = tiny_inputs("bert-sequence")

    def check(*, served: int) -> None:
        before = handle.cache_report().served_steps
        with torch.no_grad():
            assert torch.equal(handle.model(**inputs).logits, plain.model(**inputs).logits)
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
        assert handle.cache_report().served_steps == before + served

    gradients(handle.model, inputs)
    check(served=2)
    with handle.model.disable_adapter(), plain.model.disable_adapter(), torch.no_grad():
        assert torch.equal(handle.model(**inputs).logits, plain.model(**inputs).logits)
    handle.settle(), plain.settle()
    check(served=2)  # the adapters are back, and so are their rows
    for model in (handle.model, plain.model):
        model.base_model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(handle.model(**inputs).logits, plain.model(**inputs).logits)


def test_evaluation_reads_and_does_not_write():
    handle, plain = _pair("bert-sequence", 2)
    known, unknown = (tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2))
    gradients(handle.model, known)
    for model in (handle.model, plain.model):
        model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for inputs in (known, unknown):
                with counted_runs(_blocks(handle)) as runs:
                    found = handle.model(**inputs).logits
                assert torch.equal(found, plain.model(**inputs).logits)
                if context is torch.inference_mode:  # the first has proved the way
                    assert (runs[0], runs[3]) == ((0, 1) if inputs is known else (1, 1))
    report = handle.cache_report()
    assert report.rows == {2: BATCH} and report.misses == BATCH and report.served_steps == 2
    handle.model.train()
    _assert_same(gradients(handle.model, known), gradients(plain.model.train(), known))


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "llama-causal-lm", "t5-seq2seq-lm"])
def test_generation_runs_the_prefix(name):
    handle, plain = _pair(name, 2)
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
    _assert_same(gradients(handle.model.train(), inputs), gradients(plain.model.train(), inputs))


def test_keys_and_values_that_the_output_holds_in_evaluation_are_all_there():
    handle = _patch(tiny_model("llama-causal-lm"), 2, cache=_cache())
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
    handle, plain = _pair(name, 2)
    inputs = {**tiny_inputs(name), **more}
    if "inputs_embeds" in more:
        inputs["inputs_embeds"] = torch.randn(BATCH, 11, 32)
        del inputs["input_ids"]
    for _ in range(2):
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    report = handle.cache_report()
    assert report.state == "bypassed" and reason in report.reason
    assert report.served_steps == 0 and report.rows == {}
    assert sum(n for why, n in report.bypasses.items() if reason in why) == 2, report


def test_stages_without_a_fixed_prefix_are_bypassed():
    inputs = tiny_inputs("bert-sequence")

    def reason(handle: PatchHandle) -> str:
        for _ in range(2):
            gradients(handle.model, inputs)
        report = handle.cache_report()
        assert report.state == "bypassed" and report.served_steps == 0
        assert report.reason in str(handle.truncation_report())
        return report.reason

    assert "nothing below" in reason(_patch(tiny_model("bert-sequence"), 0, cache=_cache()))
    model = tiny_model("bert-sequence", dropout=True)
    assert "frozen_mode" in reason(_patch(model, 2, cache=_cache(), frozen_mode="train"))
    model = tiny_model("bert-masked-lm")
    handle = _patch(model, 2, cache=_cache(), tied="head_only")
    inputs = tiny_inputs("bert-masked-lm")
    assert "trains below" in reason(handle)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("bart-sequence", lambda m: setattr(m.model.encoder, "dropout", 0.5), "no fixed function"),
        ("bart-sequence", lambda m: setattr(m.model.encoder, "layerdrop", 0.5), "layerdrop"),
        (
            "llama-causal-lm",
            lambda m: setattr(m.config, "rope_parameters", {"rope_type": "dynamic"}),
            "dynamic",
        ),
        ("t5-sequence", lambda m: setattr(m.transformer.encoder.dropout, "p", 0.5), None),
    ],
)
def test_prefixes_that_depend_on_chance_or_on_the_batch_are_refused(name, change, reason):
    model = tiny_model(name)
    change(model)
    boundary = 2
    handle = _patch(model, boundary, cache=_cache())
    inputs = tiny_inputs(name)
    for _ in range(2):
        model(**inputs).loss.backward()
    report = handle.cache_report()
    if reason is None:  # that module belongs to block 1, which is held in eval mode
        assert report.served_steps == 1
    else:
        assert report.served_steps == 0 and reason in report.reason


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class _Own(nn.Module):
    """Four blocks; `read(model, x, y)` is what happens to the embeddings (B, T, C) before them."""

    def __init__(self, read: Callable[..., torch.Tensor] = lambda model, x, y: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.table = nn.Embedding(50, 16), nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.head = nn.Linear(16, 11)
        self.read = read

    def run(self, ids: torch.Tensor, y: Any = None) -> torch.Tensor:
        x = self.read(self, self.embed(ids), y)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.run(input_ids)


class _Labelled(_Own):
    def forward(self, input_ids: torch.Tensor, labels: Any) -> torch.Tensor:
        return self.run(input_ids, labels)


class _Conditioned(_Own):
    def forward(self, input_ids: torch.Tensor, condition: Any) -> torch.Tensor:
        return self.run(input_ids, condition)


class _ClassLabelled(_Own):
    def forward(self, input_ids: torch.Tensor, class_labels: Any) -> torch.Tensor:
        return self.run(input_ids, class_labels)


def _own_pair(model: _Own) -> tuple[PatchHandle, nn.Module]:
    """A model patched with a cache, in training mode, and a copy that is left alone."""
    untouched = copy.deepcopy(model)
    return _patch(model.train(), 2, cache=_cache()), untouched.train()


def _ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(seed))


def _embedded(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + model.table(y)[:, None]


def _through_a_copy(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = y.to(torch.float64)
    return x * (y > 4).to(x.dtype)[:, None, None]


def _through_an_index(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + model.table.weight[y][:, None]


def _through_numpy(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + torch.tensor(y.numpy() * 0.5, dtype=x.dtype)[:, None, None]


def _through_a_number(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * float(y.sum())


def _through_a_branch(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if (y > 4).any() else x


def _through_a_shape(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * len(y[y > 4])


def _summed(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y.sum()


def _written_into(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(y), dtype=x.dtype)
    out.copy_(y)
    return x + out[:, None, None]


@pytest.mark.parametrize("cls", [_Labelled, _ClassLabelled])
@pytest.mark.parametrize(
    "read",
    [
        _embedded,
        _through_a_copy,
        _through_an_index,
        _written_into,
    ],
)
def test_labels_that_the_prefix_reads_are_in_the_key(cls, read):
    handle, untouched = _own_pair(cls(read))
    labels = torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [1, 2, 7, 8], [10, 2, 7, 8]])
    for y in labels:
        assert torch.equal(handle.model(_ids(), y), untouched(_ids(), y))
    report = handle.cache_report()
    assert report.hits == 2 + 4 + 3 and report.rows == {2: 4 + 2 + 1}


@pytest.mark.parametrize(
    "read", [_through_numpy, _through_a_number, _through_a_branch, _through_a_shape, _summed]
)
@pytest.mark.parametrize("cls", [_Labelled, _Conditioned])
def test_what_a_whole_batch_is_computed_from_is_refused(cls, read):
    handle, untouched = _own_pair(cls(read))
    labels = torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [1, 2, 7, 8]])
    for y in labels:
        assert torch.equal(handle.model(_ids(), y), untouched(_ids(), y))
    report = handle.cache_report()
    assert report.served_steps == 0 and report.state == "bypassed"
    assert "other rows" in report.reason or "below the boundary takes values" in report.reason


def _above_only(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.shifted = y.to(torch.int32).roll(1)  # as decoders make their inputs of labels
    return x


def test_labels_that_the_prefix_does_not_read_share_a_row():
    handle, untouched = _own_pair(_Labelled(_above_only))
    for y in torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [0, 0, 0, 0]]):
        assert torch.equal(handle.model(_ids(), y), untouched(_ids(), y))
    report = handle.cache_report()
    assert report.served_steps == 2 and report.rows == {2: 4}


@pytest.mark.parametrize("read", [lambda m, x, y: x * (1 if y is None else y), lambda m, x, y: x])
def test_plain_values_are_left_out_of_the_key_where_the_prefix_does_without(read):
    handle, untouched = _own_pair(_Labelled(read))
    for y in (2, 3, 2, 3):
        assert torch.equal(handle.model(_ids(), y), untouched(_ids(), y))
    reads = not torch.equal(untouched(_ids(), 2), untouched(_ids(), 3))
    assert handle.cache_report().served_steps == (2 if reads else 3)


class _Counted(_Own):
    def forward(self, input_ids: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return self.run(input_ids) / num_items_in_batch


def test_a_count_that_differs_in_every_batch_is_one_kind_of_arguments():
    handle, untouched = _own_pair(_Counted())
    for count in range(1, 12):
        assert torch.equal(handle.model(_ids(), count), untouched(_ids(), count))
    assert handle.cache_report().served_steps == 10


_ELSEWHERE = torch.ones(16)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tensor_that_is_set_on_the_model_is_watched(in_place):
    handle, untouched = _own_pair(_Own(lambda model, x, y: x + model.condition))
    conditions = [torch.full((16,), float(value)) for value in (1, 1, 2, 2, 3)]
    for model in (handle.model, untouched):
        model.condition = conditions[0].clone()
    for i, condition in enumerate(conditions):
        for model in (handle.model, untouched):
            if in_place and i % 2 == 0:
                model.condition.copy_(condition)
            elif i % 2 == 0:
                model.condition = condition.clone()
        assert torch.equal(handle.model(_ids()), untouched(_ids()))
    assert handle.cache_report().served_steps == 2


@pytest.mark.parametrize("carrier", [lambda model: model, lambda model: model.config])
def test_a_number_that_is_set_between_forwards_is_noticed_where_the_prefix_reads_it(carrier):
    class Configured(_Own):
        def __init__(self) -> None:
            super().__init__(lambda model, x, y: x * carrier(model).scale)
            self.config = SimpleNamespace()
            carrier(self).scale = 1.0

    handle, untouched = _own_pair(Configured())
    with counted_runs(_blocks(handle)) as runs:
        for step, scale in enumerate((1.0, 1.0, 2.0, 2.0, 2.0, 1.0)):
            for model in (handle.model, untouched):
                carrier(model).scale, carrier(model).step = scale, step  # one that nobody reads
            if step:
                handle.truncation_report()  # a forward of another kind hides no change
            for seed in range(2):
                assert torch.equal(handle.model(_ids(seed)), untouched(_ids(seed)))
    report = handle.cache_report()
    assert report.served_steps == 6 and report.rows == {2: 8}, runs


def test_a_tensor_that_nobody_can_watch_is_refused():
    handle, untouched = _own_pair(_Own(lambda model, x, y: x + _ELSEWHERE))
    for _ in range(2):
        assert torch.equal(handle.model(_ids()), untouched(_ids()))
    assert "that no module holds" in handle.cache_report().reason
    model = _Own(lambda model, x, y: x + model.head.weight.mean())
    handle = _patch(model, 2, cache=_cache())
    with pytest.raises(UnsupportedModelError):  # by the proof
        handle.model(_ids())
    assert "weight, which trains" in handle.cache_report().reason


def test_random_numbers_of_the_device_are_watched(monkeypatch):
    """Another generator of the CPU plays the one of a GPU."""
    own = torch.Generator()

    def set_state(state: list[torch.Tensor], gpus: Any) -> None:
        torch.set_rng_state(state[0])
        own.set_state(state[1])

    for module in (random_state, side_forwards, trial):
        monkeypatch.setattr(
            module, "torch_state", lambda gpus=(): [torch.get_rng_state(), own.get_state()]
        )
        monkeypatch.setattr(module, "set_torch_state", set_state)

    def dropout(model: _Own, x: torch.Tensor, y: Any) -> torch.Tensor:
        return x * (torch.rand(x.shape, generator=own) > 0.3) / 0.7

    handle, untouched = _own_pair(_Own(dropout))
    for step in range(3):
        own.manual_seed(step)
        found = handle.model(_ids())
        own.manual_seed(step)
        assert torch.equal(found, untouched(_ids()))
    assert "no fixed function" in handle.cache_report().reason

    def to_no_effect(model: _Own, x: torch.Tensor, y: Any) -> torch.Tensor:
        return x if torch.rand([], generator=own) < 0.0 else x + 1

    handle, untouched = _own_pair(_Own(to_no_effect))
    for step in range(3):
        own.manual_seed(step)
        found, after = handle.model(_ids()), own.get_state()
        own.manual_seed(step)
        assert torch.equal(found, untouched(_ids())) and torch.equal(after, own.get_state())
    assert handle.cache_report().served_steps == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(4) < 0.01,
        lambda: torch.rand(4) > 0.99,
        lambda: torch.rand(4, dtype=torch.bfloat16) > 0.99,
        lambda: torch.rand_like(torch.ones(4)) < 0.01,
        lambda: torch.empty(4).uniform_() < 0.01,
        lambda: torch.bernoulli(torch.full((4,), 0.01)) == 1,
        lambda: torch.empty(4).bernoulli_(0.01) == 1,
    ],
)
def test_what_happens_by_chance_and_seldom_is_noticed(draw):
    def label_dropout(model: _Own, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + model.table(torch.where(draw(), 10, y))[:, None]

    handle, _ = _own_pair(_ClassLabelled(label_dropout))
    handle.model(_ids(), torch.tensor([1, 2, 3, 4]))
    assert "no fixed function" in handle.cache_report().reason


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy_are_watched(draw):
    handle, untouched = _own_pair(_Own(lambda model, x, y: x * draw()))
    for step in range(3):
        results = []
        for model in (handle.model, untouched):
            random.seed(step), np.random.seed(step)
            results.append(model(_ids()))
        assert torch.equal(*results)
    assert "Python or numpy" in handle.cache_report().reason


def test_masks_that_wav2vec2_draws_are_new_in_every_step():
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.3,
        mask_time_length=2,
        layerdrop=0.0,
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), 0.0),
        **dict.fromkeys(("feat_proj_dropout", "final_dropout"), 0.0),
    )
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    handle, untouched = _own_pair(model)
    values = torch.randn(3, 800)
    for step in range(3):
        results = []
        for one in (handle.model, untouched):
            np.random.seed(step)
            results.append(one(values).logits)
        assert torch.equal(*results)
    assert handle.cache_report().state == "bypassed"


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
    handle = patch_model(model.eval(), schedule, cache=_cache(), step=1)

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
    handle, plain = _pair(name, 2)
    inputs = tiny_inputs(name)
    for _ in range(2):
        gradients(handle.model, inputs)
    for _ in range(2):
        found, expected = (
            h.model(**inputs, output_hidden_states=True).hidden_states for h in (handle, plain)
        )
        assert len(found) == BLOCKS + 1 and all(map(torch.equal, found, expected))
        handle.unpatch()


def test_a_model_called_with_one_dict_into_which_it_writes():
    class Sentences(_Own):
        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            features["sentence_embedding"] = self.run(features["input_ids"])
            return features

    handle, untouched = _own_pair(Sentences())
    several = torch.cat([_ids(), _ids(1)])
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [3, 4, 0, 1], [3, 4, 0, 1]):
        batch = {"input_ids": several[rows]}
        found = handle.model(batch)
        assert found is batch and list(found) == ["input_ids", "sentence_embedding"]
        expected = untouched({"input_ids": several[rows]})["sentence_embedding"]
        assert torch.equal(found["sentence_embedding"], expected)
    assert handle.cache_report().served_steps == 2 and handle.cache_report().rows == {2: 8}
    handle.model(transformers.BatchEncoding({"input_ids": several[[5, 4]]}))
    batch = {"input_ids": torch.cat([several[:3], _ids(9)[:1]])}  # one row is missing
    with _rows_entering(handle.model.blocks[0]) as entered:
        assert list(handle.model(batch)) == ["input_ids", "sentence_embedding"]
    assert entered == [1] and handle.cache_report().served_steps == 4
    with pytest.raises(KeyError, match="input_ids"):
        handle.model({})  # the model's own error
    with pytest.raises(UnknownContent, match="two arguments"):
        _ = Call(("one",), ({"a": 1},), {"a": 2}).named


def test_a_forward_without_a_tensor_is_left_to_the_model():
    handle, _ = _own_pair(_Own())
    with pytest.raises(TypeError, match="embedding"):
        handle.model(None)
    assert "no argument is a tensor" in str(handle.cache_report())


@contextmanager
def _counted_trials(monkeypatch) -> Iterator[list[Any]]:
    trials: list[Any] = []
    learn = trial.Trial.learn_path
    monkeypatch.setattr(
        trial.Trial,
        "learn_path",
        lambda self, call, *args, **options: (
            trials.append(call) or learn(self, call, *args, **options)
        ),
    )
    yield trials


def test_a_trial_that_fails_alone_is_remembered(monkeypatch):
    def with_gradients(model: _Own, x: torch.Tensor, y: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("train me\nplease")
        return x

    handle, untouched = _own_pair(_Own(with_gradients))
    with _counted_trials(monkeypatch) as trials:
        with pytest.raises(IndexError):
            handle.model(_ids() + 100)  # no trial will do: nothing is remembered
        for _ in range(3):
            assert torch.equal(handle.model(_ids()), untouched(_ids()))
        assert len(trials) == 2
    report = handle.cache_report()
    assert report.state == "bypassed"
    assert report.reason == "a trial of its forward raises RuntimeError: train me"


def test_a_prefix_that_changes_in_every_forward_switches_it_off(monkeypatch):
    handle, untouched = _own_pair(_Own())
    with _counted_trials(monkeypatch) as trials, pytest.warns(UserWarning, match="changes between"):
        for _ in range(20):
            for model in (handle.model, untouched):
                with torch.no_grad():
                    model.blocks[1].linear.weight.add_(0.01)
            assert torch.equal(handle.model(_ids()), untouched(_ids()))
    assert len(trials) < 10
    report = handle.cache_report()
    assert report.state == "off" and "block 1" in report.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: (
            transformers.BarkFineModel(
                transformers.BarkFineConfig(
                    hidden_size=32,
                    num_layers=BLOCKS,
                    num_heads=4,
                    input_vocab_size=50,
                    output_vocab_size=50,
                    n_codes_total=4,
                    n_codes_given=1,
                )
            ),
            {"codebook_idx": 2, "input_ids": torch.randint(3, 50, (3, 6, 4))},
        ),
    ],
    ids=["bark-fine"],
)
def test_models_that_a_stand_in_does_not_fit_are_learnt_once(monkeypatch, make):
    model, inputs = make()
    handle, untouched = _own_pair(model)
    with _counted_trials(monkeypatch) as trials:
        for _ in range(3):
            assert torch.equal(handle.model(**inputs)[0], untouched(**inputs)[0])
    assert len(trials) == 1
    report = handle.cache_report()
    assert report.served_steps == 2 or report.state == "bypassed"


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["embeddings", "encoder.layer.1.output", "layer.3", "classifier"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("as asked"), KeyboardInterrupt()])
def test_an_error_in_a_forward_reaches_its_caller(error, where, first, grads):
    handle, plain = _pair("bert-sequence", 2)
    model = handle.model
    inputs, others = (tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2))
    modules, keys = dict(model.named_modules()), set(model.state_dict())
    if not first:
        gradients(model, inputs)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]

    def fail(*_: Any) -> None:
        raise error

    hook = next(m for p, m in modules.items() if p.endswith(where)).register_forward_hook(fail)
    for batch in (inputs, others):
        served = not first and batch is inputs
        if served and where in ("embeddings", "encoder.layer.1.output"):
            continue  # it does not run
        with pytest.raises(type(error)) as raised, torch.set_grad_enabled(grads):
            model(**batch)
        assert raised.value is error
        if isinstance(error, Exception):  # torch calls no hook after a KeyboardInterrupt
            assert dict(model.named_modules()) == modules
        assert set(model.state_dict()) == keys  # a handler may save
    hook.remove()
    for batch in (inputs, others):
        _assert_same(gradients(model, batch), gradients(plain.model, batch))
    assert dict(model.named_modules()) == modules
    assert handle.freezer.proved
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]


def test_a_forward_that_raises_leaves_every_module_in_its_place():
    handle, plain = _pair("bert-sequence", 2, packing="off")
    inputs = tiny_inputs("bert-sequence")
    modules = dict(handle.model.named_modules())
    for _ in range(2):
        gradients(handle.model, inputs)

    def fail(*_: Any) -> None:
        raise RuntimeError("as asked")

    hook = _blocks(handle)[3].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="as asked"):
            handle.model(**inputs)
        assert dict(handle.model.named_modules()) == modules
    hook.remove()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = handle.model.register_forward_pre_hook(interrupt)  # torch calls no hook after that
    for go_on in (handle.advance, lambda: None):
        with pytest.raises(KeyboardInterrupt):
            handle.model(**inputs)
        go_on()
    hook.remove()
    handle.truncation_report().assert_truncated()
    assert dict(handle.model.named_modules()) == modules
    with pytest.raises(RuntimeError, match="size"):
        handle.model(**{**inputs, "input_ids": inputs["input_ids"][:, :7]})
    assert dict(handle.model.named_modules()) == modules
    _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert dict(handle.model.named_modules()) == modules


def test_the_report_of_the_truncation_runs_the_prefix():
    handle = _patch(tiny_model("bert-sequence"), 2, cache=_cache())
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(handle.model, inputs)
    before = handle.cache_report()
    with counted_runs(_blocks(handle)) as runs:
        report = handle.truncation_report()
    report.assert_truncated()
    assert [runs[i] for i in range(BLOCKS)] == [1] * BLOCKS
    assert handle.cache_report() == before
    assert "cache: on at block 2" in str(report)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_checkpointing_and_autocast(name, checkpointed, autocast):
    handle, plain = _pair(name, 2, packing="off")
    inputs = tiny_inputs(name)
    for model in (handle.model, plain.model):
        if checkpointed:
            enable_checkpointing(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(3):
            with counted_runs(_blocks(handle)) as runs:
                found = gradients(handle.model, inputs)
            _assert_same(found, gradients(plain.model, inputs))
    assert [runs[i] for i in range(BLOCKS)] == [0, 0, *[1 + checkpointed] * 2]
    assert handle.cache_report().served_steps == 2
    if autocast:
        with torch.no_grad():  # in another precision these are not the same rows
            found, expected = (m(**inputs).loss for m in (handle.model, plain.model))
        assert torch.equal(found, expected)
        assert handle.cache_report().served_steps == 2


def test_blocks_that_are_compiled_one_by_one():
    handle, plain = _pair("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    for model in (handle.model, plain.model):
        for block in model.bert.encoder.layer:
            block.compile(backend="eager")
    for _ in range(3):
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert handle.cache_report().served_steps == 2


def test_a_model_compiled_whole_runs_its_prefix():
    model = tiny_model("bert-sequence")
    model.compile(backend="eager")
    handle = _patch(model, 2, cache=_cache())
    plain = _patch(tiny_model("bert-sequence"), 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        _assert_same(gradients(model, inputs), gradients(plain.model, inputs), exact=False)
    assert "compiled" in handle.cache_report().reason


def test_a_batch_announced_is_a_hint_that_is_no_longer_taken():
    handle = _patch(tiny_model("bert-sequence"), cache=_cache())
    with pytest.deprecated_call(match="leave it out"):
        handle.prefetch(**tiny_inputs("bert-sequence"))


def test_trainer(tmp_path):
    rows = []
    for seed in range(4):
        inputs = tiny_inputs("bert-sequence", seed=seed)
        rows += [{k: v[i] for k, v in inputs.items()} for i in range(BATCH)]

    def run(cache: PrefixCache | None) -> tuple[dict[str, torch.Tensor], Any]:
        model = tiny_model("bert-sequence", dropout=True)
        reports = []

        class Callback(ProgtuningCallback):
            def on_train_end(self, args, state, control, **kwargs):
                if cache is not None:
                    reports.append(self.handle.cache_report())
                super().on_train_end(args, state, control, **kwargs)

        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                num_train_epochs=6,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                report_to="none",
                save_strategy="no",
                eval_strategy="epoch",
                disable_tqdm=True,
                use_cpu=True,
                seed=7,
            ),
            train_dataset=rows,
            eval_dataset=rows[:6],
            callbacks=[Callback(ProgressiveSchedule(3), cache=cache)],
        )
        trainer.train()
        assert handle_of(model) is None
        return model.state_dict(), reports

    weights, (report,) = run(_cache())
    assert report.served_steps > 4 and report.hits > 12
    expected, _ = run(None)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name


def test_resume_finds_the_rows_of_a_folder_again(tmp_path):
    inputs = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)]
    schedule = MilestoneSchedule({0: 1, 2: 3}, embeddings="never")
    cache = {"device": "disk", "path": tmp_path / "rows"}
    model = tiny_model("bert-sequence")
    handle = patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache))
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
    for batch in inputs * 2:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    state, weights = handle.state_dict(), copy.deepcopy(model.state_dict())
    expected = gradients(model, inputs[0])
    handle.unpatch()

    model = tiny_model("bert-sequence")
    model.load_state_dict(weights)
    handle = patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache))
    handle.load_state_dict(state)
    gradients(model, inputs[1])  # proves
    with counted_runs(_blocks(handle)) as runs:
        _assert_same(gradients(model, inputs[0]), expected)
    assert [runs[i] for i in range(BLOCKS)] == [0, 0, 0, 1]
    handle.unpatch()

    model = tiny_model("bert-sequence", seed=4)
    with patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache)) as handle:
        gradients(model, inputs[0])
        assert handle.cache_report().hits == 0


def test_rows_of_another_data_set_make_room(tmp_path):
    one, other = (tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2))
    rows = {}
    for inputs in (one, other):
        room = PrefixCache(sum(rows.values()) or BUDGET, device="disk", path=tmp_path)
        with _patch(tiny_model("bert-sequence"), cache=room) as handle:
            for _ in range(3):
                gradients(handle.model, inputs)
            report = handle.cache_report()
            assert report.hits == 2 * BATCH and report.state == "on"
            rows = {2: report.nbytes}


def test_copies_pickles_and_the_unpatched_model_know_of_no_cache():
    handle = _patch(tiny_model("bert-sequence"), 2, cache=_cache(), packing="off")
    model, inputs = handle.model, tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(model, inputs)

    def snapshot(model: nn.Module) -> dict[str, Any]:
        return {path: (type(m), set(vars(m))) for path, m in model.named_modules()}

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = gradients(model, inputs)
    assert handle.cache_report().served_steps == 2
    for copied in copies:
        with counted_runs(list(copied.bert.encoder.layer)) as runs:
            found = gradients(copied, inputs)
        assert all(runs[i] == 1 for i in range(BLOCKS))
        _assert_same(found, {k: v for k, v in expected.items() if k in found})
    cache = handle.cache
    handle.unpatch()
    untouched = tiny_model("bert-sequence")
    untouched(**inputs)
    assert snapshot(model) == snapshot(untouched)
    assert handle.cache is None and cache is not None
    with pytest.raises(RuntimeError, match="without a cache|no cache"):
        handle.cache_report()


def test_one_cache_serves_one_model():
    cache = _cache()
    with _patch(tiny_model("bert-sequence"), 2, cache=cache):
        with pytest.raises(ValueError, match="another patched model"):
            _patch(tiny_model("bert-sequence"), 2, cache=cache)
    handle = _patch(tiny_model("bert-sequence", seed=3), 2, cache=cache)
    plain = _patch(tiny_model("bert-sequence", seed=3), 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    with pytest.raises(ValueError, match="cache must be"):
        patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(2, 4), cache="on")
    with pytest.raises(ValueError, match="max_bytes"):
        PrefixCache(0)


def test_automatic_cache():
    plan = FreezePlan.from_boundary(2, BLOCKS, embeddings=False)
    handle = patch_model(tiny_model("bert-sequence"), FixedPlan(plan), cache="auto")
    for _ in range(2):
        gradients(handle.model, tiny_inputs("bert-sequence"))
    assert handle.cache_report().served_steps == 1


def test_a_small_budget_computes_the_rest():
    row = 11 * 32 * 4
    cache = PrefixCache(4 * row, device="cpu")
    handle = _patch(tiny_model("bert-sequence"), 2, cache=cache)
    plain = _patch(tiny_model("bert-sequence"), 2)
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2, 3)]
    for inputs in batches * 3:
        _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs), exact=False)
    report = handle.cache_report()
    assert 0 < report.nbytes <= 4 * row and report.served_steps


def test_it_switches_itself_off_where_reading_costs_more(times, monkeypatch):
    handle, plain = _pair("bert-sequence", 2)
    read = handle.cache.rows.store.read

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.05)
        return read(*args, **kwargs)

    handle.cache.rows.store.read = slow
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in range(8)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for inputs in batches * 2:
            _assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert sum("prefix cache is off" in str(w.message) for w in seen) == 1
    report = handle.cache_report()
    assert report.state == "off" and "reading a row takes" in report.reason
    assert report.rows == {} and report.served_steps == 0
    assert "off" in str(handle.truncation_report())


def test_it_stays_on_where_the_prefix_is_dear(times):
    handle, _ = _pair("bert-sequence", 2)
    hook = _blocks(handle)[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in range(6)]
    for inputs in batches * 2:
        gradients(handle.model, inputs)
    hook.remove()
    report = handle.cache_report()
    assert report.state == "on" and report.served_steps == 6
    assert report.prefix_ms * BATCH > 20 > report.read_ms * BATCH


def test_data_that_never_comes_again(times):
    row = 11 * 32 * 4
    handle = _patch(tiny_model("bert-sequence"), 2, cache=PrefixCache(3 * row, device="cpu"))
    hook = _blocks(handle)[0].register_forward_pre_hook(lambda *_: time.sleep(0.005))
    with pytest.warns(UserWarning, match="others came without a hit"):
        for seed in range(6):
            gradients(handle.model, tiny_inputs("bert-sequence", seed=seed))
    hook.remove()
    assert handle.cache_report().state == "off"


def test_verdicts(times):
    counts = BreakEven()
    for _ in range(4):
        counts.add_prefix(30.0, 3)
        assert counts.verdict(0) is None
        counts.add_read(3.0, 3)
    assert counts.verdict(0) is None
    for _ in range(60):
        counts.add_read(28.0, 3)
    assert "reading a row takes 9.333 ms, computing it 10.000 ms" in counts.verdict(0)
    counts = BreakEven()
    counts.misses, counts.refused = 201, 1
    assert "budget holds 100 rows" in counts.verdict(100)
    counts.hits = 1
    assert counts.verdict(100) is None
    counts = BreakEven()
    counts.misses = 200_001
    assert "augmentation" in counts.verdict(200_001)


def _digests(inputs: dict[str, Any], **options: Any) -> tuple[bytes, ...]:
    return digest_rows(Call((), (), inputs), b"", **{"unpadded": True, **options}).digests


def test_what_a_row_is_recognised_by():
    inputs = tiny_inputs("bert-sequence")
    base = _digests(inputs)
    assert len(set(base)) == BATCH and all(len(d) == 16 for d in base)
    assert _digests({**inputs, "labels": inputs["labels"] + 1}) == base
    assert _digests({**inputs, "return_dict": True, "num_items_in_batch": torch.tensor(3)}) == base
    assert _digests(_repadded(inputs, more=5)) == base
    assert _digests(_repadded(inputs, more=5), unpadded=False) != _digests(inputs, unpadded=False)
    assert _digests({"input_ids": inputs["input_ids"]})[0] == base[0]  # no mask: all ones
    ids = inputs["input_ids"].clone()
    ids[2, -1] = 50  # padding
    assert _digests({**inputs, "input_ids": ids}) == base
    ids[2, 0] += 1
    assert _digests({**inputs, "input_ids": ids})[:2] == base[:2]
    assert _digests({**inputs, "input_ids": ids})[2] != base[2]
    for name in ("token_type_ids", "position_ids", "anything"):
        zeros = torch.zeros_like(inputs["input_ids"])
        changed = zeros.clone()
        changed[1, 2] = 1
        one, other = (_digests({**inputs, name: value}) for value in (zeros, changed))
        assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True]
        assert not set(one) & set(base)
    holes = inputs["attention_mask"].clone()
    holes[0, 3] = 0
    assert _digests({**inputs, "attention_mask": holes})[0] != base[0]
    assert Call((), (), {**inputs, "attention_mask": holes}).spans[0][0] == (0, 11)
    assert _digests({**inputs, "scale": 2.0}) != base
    shared = {**inputs, "position_ids": torch.arange(11)[None]}
    assert not set(_digests(shared)) & set(base)
    pixels = tiny_inputs("vit-image")
    assert len(set(_digests(pixels))) == BATCH
    with pytest.raises(UnknownContent, match="is a list"):
        _ = signature(Call((), (), {**inputs, "images": [1, 2]}))
    with pytest.raises(UnknownContent, match="no argument"):
        _ = Call((), (), {"scale": torch.tensor(1.0)}).size


def test_positional_arguments():
    handle, plain = _pair("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    several = _joined(inputs, tiny_inputs("bert-sequence", seed=2))
    for rows in ((0, 1, 2), (0, 1, 2, 3), (3, 0)):
        batch = _rows(several, rows)
        found = []
        for model in (handle.model, plain.model):
            model.zero_grad()
            output = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
            output.loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        _assert_same(*found, exact=False)
    assert handle.cache_report().served_steps == 2


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "vit-image"])
def test_on_a_gpu(name, device):
    cache = PrefixCache(BUDGET, device=device)
    handle = _patch(tiny_model(name).cuda(), 2, cache=cache)
    plain = _patch(tiny_model(name).cuda(), 2)
    batches = [{k: v.cuda() for k, v in tiny_inputs(name, seed=seed).items()} for seed in range(3)]
    for inputs in batches * 3:
        found, expected = gradients(handle.model, inputs), gradients(plain.model, inputs)
        for key, gradient in expected.items():
            assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-5), key
    report = handle.cache_report()
    assert report.served_steps == 6 and report.prefix_ms and report.read_ms


class _Gathering(_Block):
    """A block that does something beside its work, as `does(block, x)` says."""

    does: Callable[..., Any] = staticmethod(lambda block, x: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.does(self, x)
        return super().forward(x)


def _served_as_untouched(model: nn.Module, change: Callable[..., None] = lambda m, e: None) -> str:
    handle, untouched = _own_pair(model)
    for epoch in range(4):
        for each in (handle.model, untouched):
            change(each, epoch)
        for seed in range(3):
            assert torch.equal(handle.model(_ids(seed)), untouched(_ids(seed)))
    return handle.cache_report().reason


def test_trials_leave_no_trace_in_buffers_generators_and_inputs():
    class Tracing(_Own):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("mean", torch.zeros(()))
            self.generator = torch.Generator()

        def __deepcopy__(self, memo):
            return Tracing()

        def forward(self, input_ids):
            x = self.embed(input_ids)
            input_ids.clamp_(min=1)
            for block in self.blocks:
                x = block(x)
            self.mean = 0.5 * self.mean + 1
            noise = torch.rand(11, generator=self.generator)
            return self.head(self.norm(x.mean(1))) * self.mean + noise

    torch.manual_seed(0)
    model = Tracing()
    handle, untouched = _own_pair(model)
    untouched.load_state_dict(model.state_dict())
    for seed in range(4):
        one, other = _ids(seed), _ids(seed)
        assert torch.equal(handle.model(one), untouched(other)) and torch.equal(one, other)
    handle.unpatch()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(untouched.named_buffers())[name]), name


def test_rows_that_are_computed_before_a_forward_leave_no_trace_in_buffers():
    class Counting(_Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("forwards", torch.zeros(()))

        def forward(self, input_ids):
            self.forwards += 1
            return self.run(input_ids)

    handle, untouched = _own_pair(Counting())
    for seed in (0, 1, 2, 0, 1):
        assert torch.equal(handle.model(_ids(seed)), untouched(_ids(seed)))
    assert handle.model.forwards == 5 and handle.cache_report().served_steps == 2


@pytest.mark.parametrize("kept", ["attribute", "hook", "integers"])
def test_what_a_frozen_block_hands_on_beside_its_output_keeps_it_running(kept):
    class Reading(_Own):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(_Gathering() for _ in range(BLOCKS))

        def forward(self, input_ids):
            out = super().forward(input_ids)
            return out if kept != "attribute" else out + self.blocks[0].seen.mean()

    if kept == "attribute":
        _Gathering.does = staticmethod(lambda block, x: setattr(block, "seen", x.detach() * 1))
    model = Reading()
    if kept == "hook":
        model.blocks[0].register_forward_hook(lambda module, args, output: None)
    reason = _served_as_untouched(model)
    _Gathering.does = staticmethod(lambda block, x: None)
    expected = {"attribute": "keeps a tensor in seen", "hook": "a forward hook on _Gathering"}
    assert expected.get(kept, "") in reason


def test_a_number_inside_a_frozen_block_is_watched():
    class Scaled(_Block):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = _Own()
    model.blocks = nn.ModuleList(Scaled() for _ in range(BLOCKS))
    model.blocks[0].scale = 1.0
    _served_as_untouched(model, lambda m, epoch: setattr(m.blocks[0], "scale", 1.0 + epoch // 2))


def test_a_batch_of_one_row_does_not_vouch_for_larger_ones():
    handle, untouched = _own_pair(_Own(lambda model, x, y: x - x.mean(0, keepdim=True)))
    for seed in (0, 1, 2, 0, 1, 2):
        rows = 1 if seed == 0 else 3
        ids = _ids(seed)[:rows]
        assert torch.equal(handle.model(ids), untouched(ids))


def test_an_output_that_shows_no_tensor_is_not_compared():
    class Opaque:
        __slots__ = ("logits",)

    class Opaquely(_Own):
        def forward(self, input_ids):
            output = Opaque()
            output.logits = super().forward(input_ids)
            return output

    handle, _ = _own_pair(Opaquely())
    handle.model(_ids())
    handle.model(_ids())
    assert "shows no tensor" in handle.cache_report().reason


def test_what_the_model_keeps_of_the_prefix_stays_new():
    class Keeping(_Own):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 0:
                    self.kept = x.detach()
            return self.head(x.mean(1))

    handle, untouched = _own_pair(Keeping())
    for seed in (0, 1, 0, 1, 0, 1):
        assert torch.equal(handle.model(_ids(seed)), untouched(_ids(seed)))
        assert torch.equal(handle.model.kept, untouched.kept)
    assert handle.cache_report().state == "bypassed"


def test_settings_that_go_work_for_one_release_more():
    with pytest.warns(DeprecationWarning, match="bfloat16"):
        assert PrefixCache(BUDGET, dtype="8bit").dtype is torch.bfloat16
    with pytest.warns(DeprecationWarning, match="content"):
        cache = _cache(id_column="sample")
    handle = _patch(tiny_model("bert-sequence"), cache=cache)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(3):
        handle.model(**inputs, sample=torch.arange(BATCH)).loss.backward()
    assert handle.cache_report().hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_of_stored_rows_is_served(dtype):
    handle = _patch(tiny_model("bert-sequence"), 2, cache=_cache(dtype=dtype))
    for _ in range(3):
        handle.model(**tiny_inputs("bert-sequence")).loss.backward()
    assert handle.cache_report().hits == 2 * BATCH
