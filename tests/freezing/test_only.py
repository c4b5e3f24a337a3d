"""A mask beside the plan: parameters that do not match a regular expression never train."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from proofs import frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    CheckpointError,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    UnsupportedModelError,
    load_checkpoint,
    patch_model,
    plan_training,
    save_checkpoint,
)

BERT, LLAMA = "bert-sequence", "llama-causal-lm"


def _names(model, only):
    return {n for n, _ in model.named_parameters() if re.search(only, n)}


def _start(name, schedule, only, **options):
    handle = patch_model(tiny_model(name), schedule, only=only, **options)
    groups = handle.param_groups(lr=3e-3, weight_decay=0.1)
    return handle, MaskedAdamW(groups, max_grad_norm=1.0)


def _step(handle, optimizer, name, seed):
    handle.model(**tiny_inputs(name, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return handle.advance()


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize(
    ("name", "only", "boundaries"),
    [
        (BERT, r"output\.dense|classifier", [0, 2, 3]),
        (BERT, r"layer\.[2-3]\..*bias$|pooler", [2, 2, 3]),  # nothing in blocks 0 and 1
        (LLAMA, r"mlp|lm_head", [0, 2, 3]),
        (LLAMA, r"embed_tokens|layers\.3", [0, 3, 3]),
    ],
)
def test_what_matches_trains_as_plain_freezing_has_it_and_the_rest_stays(name, only, boundaries):
    schedule = FixedBlockSchedule({0: "embeddings,0--1", 2: "2-3", 4: "3"})
    handle, optimizer = _start(name, schedule, only)
    wanted, seen = _names(handle.model, only), []
    for step in range(6):
        inputs = tiny_inputs(name, seed=step)
        twin = tiny_model(name)
        twin.load_state_dict(handle.model.state_dict())
        for n, p in twin.named_parameters():
            p.requires_grad_(n in wanted)
        expected = frozen_by_hand(twin, handle.plan, inputs)
        found = gradients(handle.model, inputs)
        assert found.keys() == expected.keys() and expected
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        handle.truncation_report().assert_truncated()
        before = {n: p.detach().clone() for n, p in handle.model.named_parameters()}
        optimizer.step()
        for n, p in handle.model.named_parameters():
            assert torch.equal(p, before[n]) == (n not in expected), n
            assert bool(optimizer.state.get(p)) == (n in expected), n
        optimizer.zero_grad()
        seen.append(handle.boundary)
        handle.advance()
    assert seen[::2] == boundaries
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, handle.model.parameters())}


def test_flags_come_back_but_for_what_the_user_switched():
    model = tiny_model(BERT)
    first, second, *_ = names = [n for n, _ in model.named_parameters() if "query.weight" in n]
    model.get_parameter(first).requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with patch_model(model, ProgressiveSchedule(2, 4), only="output|classifier") as handle:
        line = handle.truncation_report().only
        assert "only='output|classifier': freezes" in line and line in str(
            handle.truncation_report()
        )
        frozen = sum(p.numel() for n, p in model.named_parameters() if before[n])
        frozen -= sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
        assert f" {frozen:,} parameters" in line
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before

    handle = patch_model(model, MilestoneSchedule({0: 1}), only="output|classifier")
    for name in names[:3]:  # below the boundary, in the lowest active block, and above it
        model.get_parameter(name).requires_grad_(True)
    found = gradients(model, tiny_inputs(BERT))
    assert found and not set(names) & found.keys()
    handle.advance()
    assert not any(model.get_parameter(name).requires_grad for name in names)
    handle.unpatch()
    assert model.get_parameter(first).requires_grad and model.get_parameter(second).requires_grad


def test_a_cache_has_its_prefix_where_the_mask_leaves_nothing():
    schedule = MilestoneSchedule({0: 1}, embeddings="never")
    only = r"layer\.[2-3]|classifier"
    plain, cached = (
        _start(BERT, schedule, only, cache=cache) for cache in (None, PrefixCache(2**24))
    )
    for handle, optimizer in (plain, cached):
        for step in range(6):
            _step(handle, optimizer, BERT, step % 2)
    assert cached[0].boundary == 2 and sum(cached[0].cache_report().rows.values()) == 6
    for p, q in zip(plain[0].model.parameters(), cached[0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_adapters_and_wrapped_blocks_match_by_their_names():
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(LLAMA), config)
    handle = patch_model(model, MilestoneSchedule({0: 1}), only=r"^base_model\.model\..*v_proj")
    active = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(active) == 6 and all("v_proj.lora_" in n for n in active)
    model.add_adapter("other", copy.deepcopy(config))
    model.set_adapter("other")
    found = gradients(model, tiny_inputs(LLAMA))
    assert len(found) == 6 and all("v_proj.lora_" in n and "other" in n for n in found)
    handle.unpatch()
    other = [p for n, p in model.named_parameters() if "other" in n]
    assert len(other) == 16 and all(p.requires_grad for p in other)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"'mlp' matches 12 parameters, .*none of them was train"):
        patch_model(model, MilestoneSchedule({}), only="mlp")

    model = tiny_model(LLAMA)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    assert any("._orig_mod." in n for n, _ in model.named_parameters())
    handle = patch_model(model, MilestoneSchedule({}), only=r"^model\.layers\.1\.mlp")
    assert handle.boundary == 1 and handle.active_params == 3 * 32 * 48


def test_a_tied_weight_goes_by_its_first_name_and_says_so():
    name = "gpt2-causal-lm"
    with pytest.warns(UserWarning, match=r"lm_head.weight goes by the name transformer.wte.weight"):
        handle = patch_model(tiny_model(name), MilestoneSchedule({}), only="mlp|lm_head")
    model = handle.model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == _names(model, "mlp")
    assert "it is frozen (only='mlp|lm_head')" in str(handle.truncation_report())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = patch_model(
            tiny_model(name), MilestoneSchedule({0: 2}), only="mlp|wte", tied="head_only"
        )
    assert handle.model.lm_head.weight.requires_grad and handle.boundary == 2


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        ("(mlp", ValueError, "is no regular expression: missing \\)"),
        (3, TypeError, "only must be a regular expression, a text, got 3"),
        ("mlp", ValueError, "of names like bert.embeddings.* and bert.encoder.layer"),
        (r"layer\.0", ValueError, "boundary 4 of 4 blocks freezes everything .* only='layer"),
    ],
)
def test_what_cannot_train_is_refused(only, error, message):
    model = tiny_model(BERT)
    with pytest.raises(error, match=message) as caught:
        patch_model(model, MilestoneSchedule({3: 4}), only=only)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_plan_in_the_middle_of_a_run_is_refused_before_it():
    schedule = CyclicBlockSchedule(1, 2, head="never").bind(8)
    with pytest.raises(ValueError, match="freezes everything"):
        patch_model(tiny_model(BERT), schedule, only=r"layer\.[013]")
    config = peft.AdaLoraConfig(total_step=7, tinit=0, tfinal=6, target_modules=["query", "value"])
    model = peft.get_peft_model(tiny_model(BERT), config)
    with pytest.raises((ValueError, UnsupportedModelError), match="AdaLoRA moves ranks"):
        patch_model(model, MilestoneSchedule({}, embeddings="always"), only=r"layer\.[1-3]")


def test_a_run_goes_on_with_the_same_mask_only(tmp_path):
    def start(only):
        return _start(BERT, ProgressiveSchedule(2, 6), only)

    straight, half, again = (start("output|classifier") for _ in range(3))
    for step in range(6):
        _step(*straight, BERT, step)
    for step in range(2):
        _step(*half, BERT, step)
    save_checkpoint(tmp_path, *half)
    load_checkpoint(tmp_path, *again)
    for step in range(2, 6):
        _step(*again, BERT, step)
    expected = straight[0].model.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in again[0].model.state_dict().items())
    for only in (None, "output"):
        other, optimizer = start(only)
        with pytest.raises((CheckpointError, ValueError), match="saved with only='output\\|class"):
            load_checkpoint(tmp_path, other, optimizer)
    state = start(None)[0].state_dict()
    with pytest.raises(ValueError, match="saved with only=None, this run has only='output"):
        again[0].load_state_dict(state)


def test_the_planner_counts_what_matches():
    model, only = tiny_model(BERT), r"intermediate|classifier"
    schedule = ProgressiveSchedule(2, 8)
    plan = plan_training(model, schedule, batch_size=2, seq_len=8, only=only)
    with patch_model(tiny_model(BERT), schedule, only=only) as handle:
        for stage in plan.stages:
            handle.seek(stage.first_step)
            assert stage.trainable_params == handle.active_params
            assert stage.boundary == handle.boundary
            assert stage.gradient_bytes == 4 * handle.active_params
    # backward of what is frozen beside it costs half
    assert plan.stages[0].step_ratio < 0.9
    assert plan.full.trainable_params == sum(p.numel() for p in model.parameters())
    assert "only='intermediate|classifier': freezes" in str(plan)


def test_rows_train_beside_the_mask():
    rows = {"embed_tokens": [5, 6], "lm_head": [5]}
    handle = patch_model(
        tiny_model(LLAMA), FixedBlockSchedule("-1", embeddings="always"), only="mlp", rows=rows
    )
    found = gradients(handle.model, tiny_inputs(LLAMA))
    beside = {"model.embed_tokens.weight_rows", "lm_head.weight_rows"}
    assert {n for n in found if "mlp" not in n} == beside and len(found) == 5
    handle.unpatch()
    with pytest.raises(ValueError, match="matches no parameter"):  # a slip of the pen
        patch_model(tiny_model(LLAMA), FixedBlockSchedule("-1"), only="mpl", rows=rows)
    handle = patch_model(tiny_model(LLAMA), FixedBlockSchedule("-1"), only="lm_head", rows=rows)
    assert handle.active_params == 32 and handle.boundary == 4  # the row of the head
