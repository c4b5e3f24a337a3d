"""What the user does to a patched model: freeze, replace, prune, add, take out."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from proofs import gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from progtuning_kernels import MilestoneSchedule, TruncationError, patch_model
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.patch import handle_of


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


def _first_dense(model: nn.Module) -> nn.Module:
    return model.bert.encoder.layer[0].intermediate.dense


def _drop_bias(model: nn.Module) -> None:
    _first_dense(model).bias = None


def _replace_head(model: nn.Module) -> None:
    model.classifier = nn.Linear(32, model.config.num_labels)


def _replace_part(model: nn.Module) -> None:
    model.bert.encoder.layer[0].output = copy.deepcopy(model.bert.encoder.layer[3].output)


def _drop_embedding_norm(model: nn.Module) -> None:
    model.bert.embeddings.LayerNorm = nn.Identity()


# what is done to a patched model, and how many parameters are new objects then
GOES_ON = {
    "prune": (lambda m: prune.l1_unstructured(_first_dense(m), "weight", 0.5), 0),
    "weight norm": (lambda m: parametrizations.weight_norm(_first_dense(m)), 2),
    "no bias": (_drop_bias, 0),
    "new head": (_replace_head, 2),
    "new part of a block": (_replace_part, 4),
    "no norm": (_drop_embedding_norm, 0),
    "more words": (lambda m: m.resize_token_embeddings(120), 0),
}


def _cut(model: nn.Module) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:3]


def _insert(model: nn.Module) -> None:
    model.bert.encoder.layer.insert(0, copy.deepcopy(model.bert.encoder.layer[3]))


BLOCKS_CHANGE = {"cut": _cut, "insert": _insert}


def _nothing_of_ours(*modules: nn.Module) -> bool:
    return all(root_of(type(part)) is type(part) for module in modules for part in module.modules())


@pytest.mark.filterwarnings("error:.*came into the model")
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("change", GOES_ON)
def test_training_goes_on_where_parts_came_or_went(change, step):
    act, new = GOES_ON[change]
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    kept_frozen = model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    parts = [*model.modules()]
    schedule = MilestoneSchedule({1: 2, 4: 0}, embeddings="never")
    handle = patch_model(model, schedule)
    for _ in range(step):
        gradients(model, inputs)
        handle.advance()
    act(model)
    told = pytest.warns(UserWarning, match=r"came into .* optimizer")
    with told if new and step else contextlib.nullcontext():
        handle.advance()
    for _ in range(4 - step):
        plan = schedule.plan(handle.step, 4)
        layout = handle.layout
        on = {-1: plan.embeddings, 4: plan.head, **dict(enumerate(plan.trainable))}
        found = gradients(model, inputs)
        for name, parameter in model.named_parameters():
            active = on[layout.unit_of(name)] and parameter is not kept_frozen
            assert parameter.requires_grad == active == (name in found), name
        handle.advance()
    handle.unpatch()
    assert [p for p in model.parameters() if not p.requires_grad] == [kept_frozen]
    assert _nothing_of_ours(model, *parts)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("change", [*GOES_ON, *BLOCKS_CHANGE])
def test_unpatch_puts_everything_back_whatever_was_taken_out(change, step):
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    parts = [*model.modules()]
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    for _ in range(step):
        gradients(model, inputs)
        handle.advance()
    (GOES_ON[change][0] if change in GOES_ON else BLOCKS_CHANGE[change])(model)
    handle.unpatch()
    assert handle_of(model) is None and _nothing_of_ours(model, *parts)
    assert all(p.requires_grad for part in (model, *parts) for p in part.parameters())
    assert all(part.training == model.training for part in parts)


@pytest.mark.parametrize("call", ["advance", "forward", "report"])
@pytest.mark.parametrize("change", BLOCKS_CHANGE)
def test_other_blocks_than_at_first_are_refused_and_the_cure_works(change, call):
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    schedule = MilestoneSchedule({1: 2})
    handle = patch_model(model, schedule)
    gradients(model, inputs)
    handle.advance()
    BLOCKS_CHANGE[change](model)
    calls = {
        "advance": handle.advance,
        "forward": lambda: model(**inputs),
        "report": handle.truncation_report,
    }
    with pytest.raises(
        RuntimeError, match=r"call handle.unpatch\(\) and then patch_model"
    ) as caught:
        calls[call]()
    assert "\n" not in str(caught.value)
    handle.unpatch()
    handle = patch_model(model, schedule, step=handle.step)
    assert handle.step == 1 and handle.boundary == 2
    gradients(model, inputs)
    handle.truncation_report().assert_truncated()


def test_a_unit_that_lost_its_module_is_named():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    model.bert.pooler = None
    for call in (handle.advance, handle.truncation_report):
        with pytest.raises(RuntimeError, match=r"bert.pooler is gone.*call handle.unpatch\(\)"):
            call()
    handle.unpatch()
    patch_model(model, MilestoneSchedule({1: 2})).advance()


@pytest.mark.parametrize("step", [0, 1])
def test_adapters_that_come_while_patched_are_what_trains(step):
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({1: 2, 3: 0}, embeddings="never"))
    for _ in range(step):
        handle.advance()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    for _ in range(3 - step):
        handle.advance()
        found = gradients(model, inputs)
        assert found and all("lora" in name for name in found)
        assert {int(n.split("layer.")[1][0]) for n in found} == {*range(handle.boundary, 4)}
    adapted.merge_and_unload()
    handle.unpatch()
    assert _nothing_of_ours(model) and not any(p.requires_grad for p in model.parameters())
