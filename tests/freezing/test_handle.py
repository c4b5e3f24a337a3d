"""The handle of a patched model: steps, groups, listeners, state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from proofs import gradients
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    AdaptiveSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    TruncationError,
    patch_model,
    release_frozen_state,
)


def test_advance_drops_gradients_and_puts_flags_right_again():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    model(**inputs).loss.backward()
    assert handle.advance() is True
    below = [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[:2].parameters()]
    assert all(p.grad is None and not p.requires_grad for p in below)
    assert model.classifier.weight.grad is not None
    for parameter in below:
        parameter.requires_grad_(True)
    with pytest.raises(TruncationError, match="embeddings.*call handle.advance"):
        handle.truncation_report().assert_truncated()
    assert handle.advance() is False
    assert not any(p.requires_grad for p in below)
    handle.truncation_report().assert_truncated()


def test_state_dict_resumes_and_refuses_another_run():
    handle = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(4, 8))
    for _ in range(5):
        handle.advance()
    saved = handle.state_dict()
    other = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(4, 8))
    other.load_state_dict(saved)
    assert (other.step, other.boundary, other.plan) == (5, handle.boundary, handle.plan)
    shorter = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(2, 8))
    with pytest.raises(ValueError, match="saved under ProgressiveSchedule"):
        shorter.load_state_dict(saved)
    with pytest.raises(ValueError, match="model of 12 blocks"):
        other.load_state_dict(saved | {"num_blocks": 12})


def test_listeners_are_told_and_can_release_any_optimizer():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, ProgressiveSchedule(4, 4))
    optimizer = torch.optim.AdamW(handle.param_groups())
    told = []
    handle.on_change(lambda h: told.append((h.boundary, release_frozen_state(optimizer))))
    model(**inputs).loss.backward()
    optimizer.step()
    for _ in range(3):
        handle.advance()
    assert [boundary for boundary, _ in told] == [1, 2, 3]
    assert all(released > 0 for _, released in told)


def test_a_handle_is_dead_after_unpatch():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, ProgressiveSchedule(4, 4))
    handle.unpatch()
    with pytest.raises(RuntimeError, match="not patched any more"):
        handle.advance()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("step", [2.0, np.int64(2), np.float32(2)])
def test_steps_are_numbers_of_any_library(step):
    handle = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(4, 4), step=step)
    assert (repr(handle.step), handle.boundary) == ("2", 2)
    handle.seek(step + 1)
    assert (repr(handle.step), handle.boundary) == ("3", 3)
    with pytest.raises(ValueError, match="step must be 0 or more"):
        handle.seek(-1)
    with pytest.raises(TypeError, match="step must be 0 or more"):
        handle.seek("2")


def test_param_groups_hold_every_parameter_once_whatever_the_stage():
    model = tiny_model("gpt2-causal-lm")
    handle = patch_model(model, ProgressiveSchedule(4, 4))
    first = handle.param_groups(lr=0.1, weight_decay=0.2)
    handle.seek(3)
    assert handle.param_groups(lr=0.1, weight_decay=0.2) == first
    ids = [id(p) for group in first for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [g["weight_decay"] for g in first] == [0.2, 0.0]
    assert {p.ndim for p in first[1]["params"]} == {1} and first[0]["lr"] == 0.1


@pytest.mark.parametrize("by_unit", [False, True])
def test_decay_is_left_to_the_optimizer_as_the_rate_is(by_unit):
    handle = patch_model(tiny_model("gpt2-causal-lm"), ProgressiveSchedule(4, 4))
    for make, own in ((MaskedAdamW, 0.0), (torch.optim.AdamW, 0.01), (torch.optim.SGD, 0)):
        for options, decay in (({}, own), ({"weight_decay": 0.3}, 0.3)):
            optimizer = make(handle.param_groups(by_unit=by_unit), lr=0.1, **options)
            for group in optimizer.param_groups:
                matrices = {p.ndim > 1 for p in group["params"]}
                assert group["weight_decay"] == (decay if matrices == {True} else 0.0)
                assert matrices in ({True}, {False}) and group["lr"] == 0.1


def test_settling_makes_the_model_what_a_checkpoint_must_hold_and_leaves_the_step():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    frozen, below = model.bert.encoder.layer[1].output.dense.weight, model.bert.embeddings
    for _ in range(2):
        gradients(model, inputs)
        frozen.grad = torch.ones_like(frozen)
        below.word_embeddings.weight.requires_grad_(True)
        handle.settle()
        assert (handle.step, handle.boundary) == (0, 2)
        assert frozen.grad is None and not below.word_embeddings.weight.requires_grad
        assert model.bert.encoder.layer[2].output.dense.weight.grad is not None
    handle.truncation_report().assert_truncated()
    handle.unpatch()
    with pytest.raises(RuntimeError, match="not patched any more"):
        handle.settle()


def test_settling_hands_the_norms_of_a_step_over_once():
    schedule = AdaptiveSchedule(1)
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, schedule)
    for step in range(3):
        gradients(model, inputs)
        assert len(schedule.decisions) == step
        handle.settle()
        state = handle.state_dict()
        assert len(schedule.decisions) == step + 1
        handle.settle()
        assert handle.state_dict() == state
        handle.advance()
        assert len(schedule.decisions) == step + 1
    with pytest.raises(RuntimeError, match="no gradient of any block was seen"):
        handle.settle()
