"""Rows in place of the prefix: which blocks run, and losses and gradients as without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from cached_models import (
    BLOCKS,
    assert_same,
    blocks_of,
    cached_and_plain,
    cpu_cache,
    joined,
    patched_at,
    rows_entering,
    take_rows,
)
from proofs import counted_runs, gradients
from tiny_models import BATCH, tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    PrefixCache,
    ProgressiveSchedule,
    patch_model,
)


def test_only_missing_rows_of_a_mixed_batch_run_the_prefix():
    handle, plain = cached_and_plain("bert-sequence", 2)
    several = joined(*(tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)))
    gradients(handle.model, take_rows(several, (0, 1, 2, 3)))
    for rows, ran in (((0, 1, 4), [1]), ((2, 4, 3), []), ((5, 0), [1]), ((0, 5, 4), [])):
        batch = take_rows(several, rows)
        with rows_entering(blocks_of(handle)[0]) as entered:
            found = gradients(handle.model, batch)
        assert entered == ran
        assert_same(found, gradients(plain.model, batch), exact=False)
    other = tiny_inputs("bert-sequence", seed=3)
    batch = joined(other, take_rows(several, (0,)))
    with rows_entering(blocks_of(handle)[0]) as entered:
        found = gradients(handle.model, batch)
    assert entered == [BATCH]
    assert_same(found, gradients(plain.model, batch), exact=False)
    assert handle.cache_report().rows == {2: 2 * BATCH + BATCH}


def train(
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
    for cache in (cpu_cache(), None):
        # functional dropout in code around the prefix would make it no fixed function
        model = tiny_model(name, dropout=name in ("bert-sequence", "gpt2-causal-lm"))
        torch.manual_seed(5)
        losses, handle = train(
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
    handle = patch_model(model, schedule, cache=cpu_cache())
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
    runs_by_step = []
    rows_by_step = []
    for batch in inputs * 4:
        with counted_runs(blocks_of(handle)) as runs:
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
    several = joined(*(tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)))
    schedule = MilestoneSchedule({0: 1, 1: 3}, embeddings="never")
    handle = patch_model(tiny_model("bert-sequence"), schedule, cache=cpu_cache())
    plain = patched_at(tiny_model("bert-sequence"), 3)
    gradients(handle.model, take_rows(several, (0, 1, 2, 3)))
    handle.advance()
    gradients(handle.model, take_rows(several, (0, 4)))  # proves; both are at 3 now
    batch = take_rows(several, (0, 1, 2, 5, 4))
    with (
        rows_entering(blocks_of(handle)[0]) as at_zero,
        rows_entering(blocks_of(handle)[1]) as at_one,
    ):
        found = gradients(handle.model, batch)
    assert (at_zero, at_one) == ([1], [1, 2])
    assert_same(found, gradients(plain.model, batch), exact=False)
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
    handle, plain = cached_and_plain("bert-sequence", 2)
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
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert handle.cache_report().served_steps > 1


def test_blocks_that_thaw_and_train_take_their_rows_with_them():
    schedule = MilestoneSchedule({0: 1, 2: 3, 4: 1, 6: 3, 8: 0}, embeddings="never")
    batches = [tiny_inputs("bert-sequence")] * 10
    cached, handle = train(tiny_model("bert-sequence"), schedule, batches, cache=cpu_cache())
    plain, _ = train(tiny_model("bert-sequence"), schedule, batches)
    assert cached == plain
    assert handle.cache_report().state == "bypassed"
    assert handle.cache_report().rows == {}


def test_weights_that_are_written_through_data_are_noticed_in_evaluation():
    handle, plain = cached_and_plain("bert-sequence", 2)
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

    handle, plain = patched_at(lora(), 2, cache=cpu_cache()), patched_at(lora(), 2)
    inputs = tiny_inputs("bert-sequence")

    def check(*, served: int) -> None:
        before = handle.cache_report().served_steps
        with torch.no_grad():
            assert torch.equal(handle.model(**inputs).logits, plain.model(**inputs).logits)
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
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
    handle, plain = cached_and_plain("bert-sequence", 2)
    known, unknown = (tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2))
    gradients(handle.model, known)
    for model in (handle.model, plain.model):
        model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for inputs in (known, unknown):
                with counted_runs(blocks_of(handle)) as runs:
                    found = handle.model(**inputs).logits
                assert torch.equal(found, plain.model(**inputs).logits)
                if context is torch.inference_mode:  # the first has proved the way
                    assert (runs[0], runs[3]) == ((0, 1) if inputs is known else (1, 1))
    report = handle.cache_report()
    assert report.rows == {2: BATCH} and report.misses == BATCH and report.served_steps == 2
    handle.model.train()
    assert_same(gradients(handle.model, known), gradients(plain.model.train(), known))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["embeddings", "encoder.layer.1.output", "layer.3", "classifier"])
@pytest.mark.parametrize(
    ("error", "grads"),
    [
        (torch.OutOfMemoryError("as asked"), True),
        (torch.OutOfMemoryError("as asked"), False),
        (KeyboardInterrupt(), True),
    ],
)
def test_an_error_in_a_forward_reaches_its_caller(error, where, first, grads):
    handle, plain = cached_and_plain("bert-sequence", 2)
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
        assert_same(gradients(model, batch), gradients(plain.model, batch))
    assert dict(model.named_modules()) == modules
    assert handle.freezer.proved
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]


def test_a_forward_that_ends_before_the_model_leaves_every_module_in_its_place():
    handle, plain = cached_and_plain("bert-sequence", 2, packing="off")
    inputs = tiny_inputs("bert-sequence")
    modules = dict(handle.model.named_modules())
    for _ in range(2):
        gradients(handle.model, inputs)

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
    assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert dict(handle.model.named_modules()) == modules


def test_the_report_of_the_truncation_runs_the_prefix():
    handle = patched_at(tiny_model("bert-sequence"), 2, cache=cpu_cache())
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(handle.model, inputs)
    before = handle.cache_report()
    with counted_runs(blocks_of(handle)) as runs:
        report = handle.truncation_report()
    report.assert_truncated()
    assert [runs[i] for i in range(BLOCKS)] == [1] * BLOCKS
    assert handle.cache_report() == before
    assert "cache: on at block 2" in str(report)


def test_a_small_budget_computes_the_rest():
    row = 11 * 32 * 4
    cache = PrefixCache(4 * row, device="cpu")
    handle = patched_at(tiny_model("bert-sequence"), 2, cache=cache)
    plain = patched_at(tiny_model("bert-sequence"), 2)
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2, 3)]
    for inputs in batches * 3:
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs), exact=False)
    report = handle.cache_report()
    assert 0 < report.nbytes <= 4 * row and report.served_steps


def test_positional_arguments():
    handle, plain = cached_and_plain("bert-sequence", 2)
    inputs = tiny_inputs("bert-sequence")
    several = joined(inputs, tiny_inputs("bert-sequence", seed=2))
    for rows in ((0, 1, 2), (0, 1, 2, 3), (3, 0)):
        batch = take_rows(several, rows)
        found = []
        for model in (handle.model, plain.model):
            model.zero_grad()
            output = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
            output.loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert_same(*found, exact=False)
    assert handle.cache_report().served_steps == 2
