"""Invariants 1 and 3: gradients as without patching, nothing below the boundary, nothing left."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from proofs import FixedPlan, frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from progtuning_kernels import (
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    TruncationError,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.derived_classes import root_of
from progtuning_kernels.patch import handle_of


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-sequence", "llama-causal-lm"])
@pytest.mark.parametrize("trainable", [(0, 1, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0)])
def test_frozen_blocks_inside_the_suffix_pass_gradients_on(name, trainable):
    plan = FreezePlan(tuple(map(bool, trainable)))
    expected = frozen_by_hand(tiny_model(name), plan, tiny_inputs(name))
    model = tiny_model(name)
    handle = patch_model(model, FixedPlan(plan))
    found = gradients(model, tiny_inputs(name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert handle.boundary == trainable.index(1)


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "llama-qa"])
def test_unpatch_leaves_every_module_as_found(name):
    def snapshot(model: nn.Module) -> dict:
        return {
            path: (type(module), {k: copy.copy(v) for k, v in vars(module).items()})
            for path, module in model.named_modules()
        }

    model = tiny_model(name)
    model(**tiny_inputs(name))  # transformers notes the kind of problem in its config
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with patch_model(model, ProgressiveSchedule(4, 8)) as handle:
        for _ in range(7):
            gradients(model, tiny_inputs(name))
            handle.advance()
        assert handle_of(model) is handle
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    handle.unpatch()
    assert snapshot(model) == before


def test_mode_asked_for_while_frozen_is_what_the_model_has_after_unpatch():
    model = tiny_model("bert-sequence", dropout=True).eval()
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model.train()
    blocks = list(model.bert.encoder.layer)
    modes = [{m.training for m in block.modules()} for block in blocks]
    assert modes == [{False}, {False}, {True}, {True}]
    assert not model.bert.embeddings.dropout.training
    handle.unpatch()
    assert all(module.training for module in model.modules())


def test_frozen_prefix_is_a_fixed_function_unless_asked_otherwise():
    inputs = tiny_inputs("bert-sequence")
    for mode, fixed in (("eval", True), ("train", False)):
        model = tiny_model("bert-sequence", dropout=True)
        patch_model(model, MilestoneSchedule({0: 3}), frozen_mode=mode)
        model.train()
        outputs = [model(**inputs, output_hidden_states=True).hidden_states[3] for _ in range(2)]
        assert torch.equal(*outputs) == fixed


def test_a_frozen_head_keeps_its_mode():
    model = tiny_model("bert-sequence", dropout=True)
    for part in (model.bert.pooler, model.classifier):
        part.requires_grad_(False)
    patch_model(model, MilestoneSchedule({0: 2}))
    model.train()
    assert model.dropout.training and model.classifier.training and model.bert.pooler.training
    assert not model.bert.encoder.layer[1].training


def test_two_models_do_not_know_of_each_other():
    first, second = tiny_model("bert-sequence"), tiny_model("bert-sequence")
    patch_model(first, MilestoneSchedule({0: 3}))
    assert type(second.bert.encoder.layer[0]) is type(second.bert.encoder.layer[3])
    handle = patch_model(second, MilestoneSchedule({0: 1}))
    assert handle.boundary == 1 and handle_of(first).boundary == 3
    handle.unpatch()
    assert not next(first.bert.encoder.layer[2].parameters()).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_ordinary_models(copied):
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model(inputs_embeds=model.bert.embeddings.word_embeddings(inputs["input_ids"]) * 1.0)
    model(**inputs)
    marker = inputs["input_ids"].numpy().tobytes()
    assert marker not in pickle.dumps(model)  # no batch travels with a saved model
    twin = copied(model)
    assert handle_of(twin) is None and handle.last_forward is not None
    assert {type(block) for block in twin.bert.encoder.layer} == {type(model.bert.encoder.layer[3])}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(**inputs).logits.abs().max() == 0
        assert model(**inputs).logits.abs().max() > 0
    patch_model(twin, MilestoneSchedule({0: 1}))


def test_what_the_user_froze_stays_frozen_and_moves_the_effective_boundary():
    model = tiny_model("bert-sequence")
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    for parameter in model.bert.encoder.layer[:2].parameters():
        parameter.requires_grad_(False)
    handle = patch_model(model, MilestoneSchedule({1: 3, 2: 0}))
    boundaries = [handle.boundary]
    for _ in range(2):
        handle.advance()
        boundaries.append(handle.boundary)
    assert boundaries == [2, 3, 2] and handle.plan.boundary == 0
    handle.unpatch()
    assert not any(p.requires_grad for p in model.bert.encoder.layer[0].parameters())
    assert all(p.requires_grad for p in model.bert.encoder.layer[2].parameters())


def test_tied_head_only_trains_with_the_gradient_of_an_untied_head():
    model, inputs = tiny_model("gpt2-causal-lm"), tiny_inputs("gpt2-causal-lm")
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    expected = gradients(untied, inputs)["lm_head.weight"]

    handle = patch_model(model, MilestoneSchedule({0: 2}), tied="head_only")
    assert torch.equal(gradients(model, inputs)["transformer.wte.weight"], expected)
    report = handle.truncation_report()
    report.assert_truncated()
    assert "it trains (head_only)" in str(report)
    handle.unpatch()

    handle = patch_model(model, MilestoneSchedule({0: 2}))
    assert "transformer.wte.weight" not in gradients(model, inputs)
    assert "it is frozen (frozen)" in str(handle.truncation_report())


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


def test_a_replaced_forward_is_caught():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}), tied="head_only")
    block = model.bert.encoder.layer[0]
    bias = torch.zeros(32, requires_grad=True)
    for i in (0, 1):
        block = model.bert.encoder.layer[i]
        base = root_of(type(block))
        block.forward = lambda *a, base=base, b=block, **k: base.forward(b, *a, **k) + bias
    model(**inputs)
    with pytest.raises(TruncationError, match="block 0.*patch the model last"):
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


def test_a_tensor_that_the_user_froze_later_stays_frozen():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({3: 2, 5: 0}))
    later = model.bert.encoder.layer[3].output.dense.weight
    later.requires_grad_(False)
    for _ in range(6):
        handle.advance()
        assert not later.requires_grad
    assert model.bert.encoder.layer[0].output.dense.weight.requires_grad
    handle.unpatch()
    assert not later.requires_grad


def test_unpatch_does_not_thaw_what_the_user_froze_within_a_stage():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({9: 2}))
    later = model.bert.encoder.layer[3].output.dense.weight
    later.requires_grad_(False)
    handle.advance()
    handle.unpatch()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "bert.encoder.layer.3.output.dense.weight"
    ]


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


def test_an_exception_in_the_forward_leaves_autograd_on():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    patch_model(model, MilestoneSchedule({0: 2}))
    with pytest.raises(Exception):  # noqa: B017  (whatever transformers raises)
        model(input_ids=inputs["input_ids"] + 10_000)
    assert torch.is_grad_enabled()
    model(**inputs).loss.backward()
    assert model.classifier.weight.grad is not None


def test_a_class_forward_bound_on_the_instance_does_not_outlive_the_freeze():
    # what transformers 5.0 leaves behind when it has captured hidden states
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2, 1: 0}, embeddings="never"))
    for block in model.bert.encoder.layer:
        block.forward = block.forward
    handle.advance()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.bert.encoder.layer[0].parameters())
    assert not any("forward" in vars(block) for block in model.bert.encoder.layer[:2])


@pytest.mark.filterwarnings("error:Dynamo does not know")
@pytest.mark.parametrize(("whole", "graphs"), [(False, [2, 3, 3, 3]), (True, [1, 2, 3, 4])])
def test_compiled_models_train_alike_and_blocks_compile_three_times(whole, graphs):
    torch._dynamo.reset()
    counter = CompileCounter()
    models = [tiny_model("bert-sequence") for _ in range(2)]
    handles = [patch_model(m, ProgressiveSchedule(4, 4, embeddings="never")) for m in models]
    calls = list(models)
    if whole:
        calls[0] = torch.compile(models[0], backend=counter)
    else:
        for block in models[0].bert.encoder.layer:
            block.compile(backend=counter)
    inputs, counts = tiny_inputs("bert-sequence"), []
    for _ in range(4):
        found = []
        for call, model in zip(calls, models, strict=True):
            model.zero_grad()
            call(**inputs).loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(gradient, found[1][n]) for n, gradient in found[0].items())
        counts.append(counter.frame_count)
        if not whole:  # the report runs eagerly and compiles nothing
            reports = [handle.truncation_report() for handle in handles]
            assert reports[0].units == reports[1].units
        for handle in handles:
            handle.advance()
    assert counts == graphs


def test_bad_calls_are_named():
    model = tiny_model("bert-sequence")
    with pytest.raises(ValueError, match="more than the 4 blocks"):
        patch_model(model, ProgressiveSchedule(5, 50))
    with pytest.raises(ValueError, match="frozen_mode must be"):
        patch_model(model, ProgressiveSchedule(2, 4), frozen_mode="off")
    with pytest.raises(ValueError, match="tied must be"):
        patch_model(model, ProgressiveSchedule(2, 4), tied="cut")
    assert handle_of(model) is None
    patch_model(model, ProgressiveSchedule(2, 4))
    with pytest.raises(ValueError, match="patched already"):
        patch_model(model, ProgressiveSchedule(2, 4))


def test_a_plan_that_freezes_everything_is_refused_before_training():
    model = tiny_model("bert-sequence")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.0." in name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="freezes everything"):
        patch_model(model, ProgressiveSchedule(2, 4))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert handle_of(model) is None


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


def test_report_before_a_forward_has_no_measurements():
    handle = patch_model(tiny_model("bert-sequence"), MilestoneSchedule({0: 2}))
    report = handle.truncation_report()
    assert report.saved_bytes is None and report.nodes is None
    assert sum(u.params for u in report.units) == sum(p.numel() for p in handle.model.parameters())
    assert sum(u.active for u in report.units) == handle.active_params
    with pytest.raises(TruncationError, match="run a forward"):
        report.assert_truncated()


def test_measuring_changes_neither_random_numbers_norgradients():
    model, inputs = tiny_model("bert-sequence", dropout=True), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    model(**inputs).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    handle.truncation_report()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in gradients.items())
