"""The prefix cache and packed tokens together: neither changes what the other gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proofs import FixedPlan, counted_runs, enable_checkpointing, gradients
from tiny_models import tiny_model
from torch import nn

from progtuning_kernels import FreezePlan, MaskedAdamW, MilestoneSchedule, PrefixCache, patch_model
from progtuning_kernels.cache import trial
from progtuning_kernels.freezing.handle import PatchHandle

BLOCKS, VOCABULARY = 4, 97
BUDGET = 1 << 26
FAMILIES = [
    "bert-sequence",
    "gpt2-causal-lm",
    "llama-causal-lm",
    "t5-seq2seq-lm",
    "distilbert-sequence",
]
# the lowest boundary that a cache serves: T5's block 1 gets the relative bias of block 0
LOWEST = {"t5-seq2seq-lm": 2}


def _cache(**options: Any) -> PrefixCache:
    return PrefixCache(BUDGET, **{"device": "cpu", **options})


def _batch(
    name: str, lengths: Sequence[int], *, side: str = "right", seed: int = 1, columns: int = 0
) -> dict[str, Any]:
    """Rows of these lengths; a row's content follows from `seed`, its place and its length."""
    tokens = max(columns, *lengths)
    ids = torch.zeros(len(lengths), tokens, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + 50 * row + length)
        start = tokens - length if side == "left" else 0
        ids[row, start : start + length] = torch.randint(
            3, VOCABULARY, (length,), generator=generator
        )
        mask[row, start : start + length] = 1
    labels = torch.arange(len(lengths)) % 3
    if name.endswith("causal-lm"):
        labels = ids.masked_fill(mask == 0, -100)
    elif name.endswith("seq2seq-lm"):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, VOCABULARY, (len(lengths), 5), generator=generator)
        labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _cut(batch: dict[str, Any], rows: slice, columns: int) -> dict[str, Any]:
    """Some rows of a batch, and the first columns of what is as long as its mask."""
    shape = batch["attention_mask"].shape
    return {k: v[rows, :columns] if v.shape == shape else v[rows] for k, v in batch.items()}


def _plan(boundary: int) -> FixedPlan:
    return FixedPlan(FreezePlan.from_boundary(boundary, BLOCKS, embeddings=False))


def _assert_close(found: dict[str, Any], expected: dict[str, Any], error: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-2 * largest)
        assert float((found[name] - value).abs().max()) <= error * scale, name


@contextmanager
def _places_entering(block: nn.Module) -> Iterator[list[int]]:
    """Tokens on which the last linear of a block computes, padding included.

    By a forward of its own: blocks with a hook of somebody else's run padded.
    """
    places: list[int] = []
    linear = [m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")][-1]

    def counted(x: torch.Tensor) -> torch.Tensor:
        places.append(x.shape[:-1].numel())
        return type(linear).forward(linear, x)

    linear.forward = counted
    try:
        yield places
    finally:
        del linear.forward


def _block(handle: PatchHandle, number: int) -> nn.Module:
    return handle.model.get_submodule(handle.layout.block_paths[number])


def _train(
    name: str, batches: Sequence[dict[str, Any]], *, packing: str, cache: PrefixCache | None
) -> tuple[list[float], dict[str, torch.Tensor], PatchHandle]:
    model = tiny_model(name)
    lowest = LOWEST.get(name, 1)
    schedule = MilestoneSchedule({0: lowest, len(batches): lowest + 1}, embeddings="never")
    handle = patch_model(model, schedule, packing=packing, cache=cache)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-3, weight_decay=0.1), max_grad_norm=1.0)
    losses = []
    for batch in (*batches, *batches) * 2:  # two epochs of each of two stages
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}, handle


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_runs_are_those_of_padded_models_without_a_cache(name, side):
    # the second batch has other rows beside the same ones, and the longest row changes
    batches = [
        _batch(name, (11, 4, 6, 2), side=side),
        _batch(name, (9, 4, 3, 2), side=side),
        _batch(name, (5, 4, 17, 2), side=side, columns=19),
    ]
    expected, weights, _ = _train(name, batches, packing="off", cache=None)
    found, own, handle = _train(name, batches, packing="auto", cache=_cache())
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for key, weight in weights.items():
        assert torch.allclose(own[key], weight, rtol=1e-5, atol=1e-5), key
    packed, cached = handle.packing_report(), handle.cache_report()
    assert packed.batches == 4 * len(batches) and packed.skipped_share > 0.3, packed
    assert cached.state == "on" and cached.served_steps >= 2 * len(batches), cached
    assert cached.hits >= 6 * 4


@pytest.mark.parametrize("boundary", range(1, BLOCKS + 1))
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_at_every_boundary(name, boundary):
    if boundary < LOWEST.get(name, 1):
        return
    handle = patch_model(tiny_model(name), _plan(boundary), packing="on", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(boundary), packing="off")
    first, second = _batch(name, (7, 12, 3, 5)), _batch(name, (7, 2, 3, 13))
    for batch in (first, second, first, second):
        expected, found = gradients(plain.model, batch), gradients(handle.model, batch)
        if expected:  # T5's head is tied to its embeddings
            _assert_close(found, expected)
        with torch.no_grad():
            loss = handle.model(**batch, use_cache=False).loss
            torch.testing.assert_close(loss, plain.model(**batch, use_cache=False).loss)
    report = handle.cache_report()
    assert report.state == "on" and report.hits == 2 + 4 + 4, report  # rows 0 and 2 are shared
    assert handle.packing_report().batches >= 4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_are_missing_are_computed_without_their_padding(name, side):
    options = {"packing": "auto", "kernels": "off"}
    handle = patch_model(tiny_model(name), _plan(2), cache=_cache(), **options)
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    whole = _batch(name, (9, 4, 3, 2), side=side)
    some = {key: value[:2] for key, value in whole.items()}
    gradients(handle.model, some)
    # heads read the first column, losses of language models the place before the first token: what
    # is read of left padding is kept
    kept = 1 if side == "left" and name != "t5-seq2seq-lm" else 0  # of each row with padding
    # and stored, as a padded forward leaves it, but for Llama's, which is zeros
    missing = 2 * 9 if kept and name != "llama-causal-lm" else 3 + 2 + 2 * kept
    tokens = 9 + 4 + 3 + 2 + 3 * kept
    if name == "t5-seq2seq-lm":
        tokens = 4 * 5  # block 2 is the decoder's first
    with _places_entering(_block(handle, 0)) as below, _places_entering(_block(handle, 2)) as above:
        for _ in range(2):
            _assert_close(gradients(handle.model, whole), gradients(plain.model, whole))
    # one row is looked at before, as a linear has a forward of its own
    assert below == [9, missing] and above == [tokens] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_found_under_any_padding(name):
    handle = patch_model(tiny_model(name), _plan(2), packing="auto", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    lengths = (9, 4, 3, 2)
    gradients(handle.model, _batch(name, lengths))
    long = _batch(name, lengths, columns=15)
    alone = _cut(long, slice(3, 4), 2)
    dense = _cut(long, slice(0, 1), 9)
    with counted_runs([_block(handle, 0)]) as runs:
        for batch in (long, alone, dense):
            _assert_close(gradients(handle.model, batch), gradients(plain.model, batch))
    # the last two have no padding, on which nothing was tried, and go on from the same rows
    assert not runs[0]
    padded = handle.packing_report().padded
    assert padded == {"the batch has no padding": 2}, padded


@pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_two_served_forwards_before_one_backward(name, reentrant):
    """Each recomputes with the tokens of its own."""
    batches = [_batch(name, lengths) for lengths in ((9, 4, 3, 2), (5, 6, 9, 1))]
    found = []
    for options in ({"packing": "on", "cache": _cache()}, {"packing": "off"}):
        handle = patch_model(tiny_model(name), _plan(2), **options)
        model = handle.model
        if reentrant is not None:
            enable_checkpointing(model, use_reentrant=reentrant)
        for _ in range(2):
            model.zero_grad()
            one, other = (model(**batch, use_cache=False).loss for batch in batches)
            (one + 2 * other).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if handle.cache is not None:
            assert handle.cache_report().served_steps >= 2 and handle.cache_report().hits == 8
            assert handle.packing_report().batches == 4
    _assert_close(*found)


def test_blocks_that_are_compiled_one_by_one():
    name = "bert-sequence"
    handle = patch_model(tiny_model(name), _plan(2), packing="on", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    for block in handle.model.bert.encoder.layer:
        block.compile(backend="eager")
    for lengths in ((9, 4, 3, 2), (9, 5, 3, 8), (9, 5, 3, 8)):  # two rows of the second are there
        batch = _batch(name, lengths)
        _assert_close(gradients(handle.model, batch), gradients(plain.model, batch))
    assert handle.cache_report().hits == 2 + 4 and handle.packing_report().batches == 3


_LENGTHS = (1, 9, 4, 6, 2, 7)  # of six rows


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm"])
def test_any_rows_in_any_batch(name):
    handle = patch_model(tiny_model(name), _plan(2), packing="on", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    row = st.integers(0, len(_LENGTHS) - 1)
    # `parametrize` beside `given` would make a model for every example

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(row, min_size=1, max_size=5), st.integers(0, 4), st.booleans())
    def check(rows: list[int], more: int, left: bool) -> None:
        side = "left" if left else "right"
        columns = max(_LENGTHS[i] for i in rows) + more
        pool = _batch(name, _LENGTHS, side=side, columns=max(columns, *_LENGTHS))
        start = pool["input_ids"].shape[1] - columns if left else 0
        batch = {
            k: v[rows, start : start + columns] if v.ndim == 2 else v[rows] for k, v in pool.items()
        }
        found, expected = gradients(handle.model, batch), gradients(plain.model, batch)
        if torch.tensor([float(g.abs().max()) for g in expected.values()]).isfinite().all():
            _assert_close(found, expected)  # a row of one token has no next one: its loss is NaN

    check()
    assert handle.cache_report().hits > 20 and handle.packing_report().batches > 10


def _stored(handle: PatchHandle, level: int) -> list[torch.Tensor]:
    """Stored rows, shortest first; lengths differ."""
    rows = list(handle.cache.rows.store._levels[level].values())
    return sorted(rows, key=len)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*FAMILIES, "bert-qa"])
def test_stored_rows_are_those_of_the_padded_model(name, side):
    batch = _batch(name, (9, 4, 3, 2), side=side)
    if name == "bert-qa":
        batch.pop("labels")
        batch |= {key: torch.tensor([1, 1, 0, 1]) for key in ("start_positions", "end_positions")}
    rows = []
    for packing in ("off", "on"):
        handle = patch_model(tiny_model(name), _plan(2), packing=packing, cache=_cache())
        for _ in range(2):
            gradients(handle.model, batch)
        assert handle.cache_report().hits == 4
        rows.append(_stored(handle, 2))
    for own, padded in zip(*reversed(rows), strict=True):
        assert own.shape == padded.shape
        torch.testing.assert_close(own, padded, rtol=1e-5, atol=1e-5)


def test_rows_with_a_hole_in_their_mask_are_stored_as_padded_ones():
    """What stands in the hole belongs to the row, and a packed forward leaves zeros there."""
    batch = _batch("bert-sequence", (9, 4, 6, 2))
    batch["attention_mask"][2, 3] = 0
    handle = patch_model(tiny_model("bert-sequence"), _plan(2), packing="on", cache=_cache())
    plain = patch_model(tiny_model("bert-sequence"), _plan(2), packing="off")
    for _ in range(2):
        _assert_close(gradients(handle.model, batch), gradients(plain.model, batch))
    longest = max(_stored(handle, 2), key=lambda row: (row[:, 0] != 0).sum().item())
    assert longest.shape[0] == 9 and all(row.any() for row in _stored(handle, 2)[-1])
    assert handle.cache_report().hits == 4 and handle.packing_report().batches == 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_folder_serves_packed_runs_and_padded_ones(tmp_path, dtype):
    name, lengths = "bert-sequence", (9, 4, 3, 2)
    batches = [_batch(name, lengths, seed=seed) for seed in (1, 2)]
    tolerance = 1e-5 if dtype is None else 2e-2

    def run(packing: str) -> tuple[list[dict[str, torch.Tensor]], Any]:
        cache = _cache(device="disk", path=Path(tmp_path), dtype=dtype)
        with patch_model(tiny_model(name), _plan(2), packing=packing, cache=cache) as handle:
            found = [gradients(handle.model, batch) for batch in batches]
            return found, handle.cache_report()

    expected, first = run("off")
    assert first.hits == 0
    for packing in ("auto", "off", "auto"):
        found, report = run(packing)
        assert report.hits == 8 and report.misses == 0, report
        for one, other in zip(found, expected, strict=True):
            _assert_close(one, other, tolerance)


def test_a_folder_written_by_a_packed_run_serves_a_padded_one(tmp_path):
    batch = _batch("llama-causal-lm", (9, 4, 3, 2))
    results = []
    for packing, hits in (("auto", 0), ("off", 4)):
        cache = _cache(device="disk", path=Path(tmp_path))
        model = tiny_model("llama-causal-lm")
        with patch_model(model, _plan(2), packing=packing, cache=cache) as handle:
            results.append(gradients(model, batch))
            assert handle.cache_report().hits == hits
    _assert_close(*results)


def test_a_decoder_packs_beside_a_served_encoder():
    name = "t5-seq2seq-lm"
    batch = _batch(name, (9, 4, 3, 2))
    batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    # as many tokens as the encoder's, at other places
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]] * 2)
    batch["labels"] = batch["labels"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
    assert batch["attention_mask"].sum() == batch["decoder_attention_mask"].sum() == 18
    handle = patch_model(tiny_model(name), _plan(2), packing="on", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    for _ in range(3):
        _assert_close(gradients(handle.model, batch), gradients(plain.model, batch))
    assert handle.cache_report().hits == 8, handle.cache_report()


def test_an_encoder_as_long_as_its_decoder_has_tokens_is_not_taken_for_packed():
    name = "t5-seq2seq-lm"
    both = _batch(name, (5, 3)) | {"labels": torch.randint(3, VOCABULARY, (2, 8))}
    both["decoder_input_ids"] = both["labels"].clone()
    both["decoder_attention_mask"] = torch.tensor([[1] * 5 + [0] * 3] * 2)
    both["labels"][:, 5:] = -100
    one = {key: value[:1] for key, value in both.items()}  # 5 tokens, and 5 of 8
    handle = patch_model(tiny_model(name), _plan(2), packing="on", cache=_cache())
    plain = patch_model(tiny_model(name), _plan(2), packing="off")
    for batch in (both, one, one):
        handle.cache.rows.store.drop(2)
        _assert_close(gradients(handle.model, batch), gradients(plain.model, batch))
    assert handle.packing_report().batches == 3, handle.packing_report()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["bert-sequence", "t5-seq2seq-lm"])
def test_evaluation_and_training_in_turn_keep_the_rows(name, autocast):
    """One row is computed again then, padded, and compared with what a packed batch gave."""
    handle = patch_model(tiny_model(name), _plan(2), packing="auto", cache=_cache())
    batch = _batch(name, (9, 4, 3, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(3):
            gradients(handle.model, batch)
            with torch.no_grad():
                handle.model(**batch, use_cache=False)
    report = handle.cache_report()
    assert report.misses == 4 and report.hits == 8 and not report.bypasses, report
    assert report.served_steps == 2 + 3


def test_settings_that_packing_makes_are_no_change(monkeypatch):
    """Packing points modules at other configs and hooks them: rows are not looked at for that."""
    handle = patch_model(tiny_model("t5-seq2seq-lm"), _plan(2), packing="on", cache=_cache())
    dense, batch = (_batch("t5-seq2seq-lm", lengths) for lengths in ((9, 9), (9, 4, 3)))
    gradients(handle.model, dense)  # nothing can be tried yet
    for each in (batch, dense, batch):
        gradients(handle.model, each)
        assert not handle.cache._check.doubted
    report = handle.cache_report()
    assert report.state == "on" and not report.bypasses and report.hits == 1 + 2 + 3, report
    assert handle.packing_report().packs


def test_a_trial_that_raises_gives_its_reason(monkeypatch):
    def raising(*args: Any, **options: Any) -> None:
        raise RuntimeError("as asked")

    monkeypatch.setattr(trial.Trial, "learn_path", raising)
    handle = patch_model(tiny_model("bert-sequence"), _plan(2), packing="on", cache=_cache())
    for _ in range(2):
        gradients(handle.model, _batch("bert-sequence", (9, 4, 3)))
    report = handle.cache_report()
    assert report.state == "bypassed" and "RuntimeError: as asked" in report.reason
    assert handle.packing_report().batches == 2


def test_a_row_that_cannot_be_computed_again_gives_its_reason(monkeypatch):
    handle = patch_model(tiny_model("bert-sequence"), _plan(2), packing="on", cache=_cache())
    batch = _batch("bert-sequence", (9, 4, 3))
    for _ in range(2):
        gradients(handle.model, batch)

    def raising(*args: Any, **options: Any) -> None:
        raise RuntimeError("as asked")

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(handle.cache._side, "boundary_activations", raising)
        handle.model(**batch)
    (reason,) = handle.cache_report().bypasses
    assert "RuntimeError: as asked" in reason
