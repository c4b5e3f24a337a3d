"""Invariants 1 and 3: gradients as without patching, nothing below the boundary, nothing left."""

from __future__ import annotations

import abc
import contextlib
import copy
import pickle
import types
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from proofs import FixedPlan, frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, prune
from transformers import BatchEncoding

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
    TruncationError,
    annealed_lr,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.patch import handle_of


@pytest.mark.usefixtures("padded")
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
    assert handle_of(twin) is None and handle.forwards.last is not None
    assert {type(block) for block in twin.bert.encoder.layer} == {
        root_of(type(model.bert.encoder.layer[3]))
    }
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


_registry: dict[str, type] = {}


def _register(cls: type) -> None:
    if cls.__name__ in _registry:
        raise ValueError(f"there is a {cls.__name__} already")
    _registry[cls.__name__] = cls


class _Registers:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)


class _WantsAKind:
    def __init_subclass__(cls, *, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind


class _RegisteringMeta(type):
    def __init__(cls, name: str, bases: tuple, namespace: dict, **kwargs: Any) -> None:
        super().__init__(name, bases, namespace)
        _register(cls)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


@pytest.mark.parametrize(
    ("bases", "options"),
    [
        ((_Registers, _Block), {}),
        ((_Block, _Registers), {}),
        ((_Block, _WantsAKind), {"kind": "wide"}),
        ((_Block,), {"metaclass": _RegisteringMeta}),
        ((_Block, abc.ABC), {}),
    ],
    ids=["registered first", "registered last", "keyword", "metaclass", "abstract"],
)
def test_no_registry_of_classes_hears_of_a_patch(bases, options, monkeypatch):
    monkeypatch.setattr("test_patch._registry", registry := {})
    cls = types.new_class("Custom", bases, options)
    known = dict(registry)
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList(cls() for _ in range(3)), nn.Linear(8, 1))
    model.forward = lambda x: model[2](model[1][2](model[1][1](model[1][0](model[0](x))))).sum()
    with patch_model(model, ProgressiveSchedule(3, 3)) as handle:
        for boundary in range(3):
            model(torch.ones(1, 8)).backward()
            assert type(model[1][0]) is not cls or not boundary
            for i, block in enumerate(model[1]):
                assert (block.linear.weight.grad is not None) == (i >= boundary)
                assert isinstance(block, cls)
            model.zero_grad()
            handle.advance()
        assert getattr(model[1][0], "kind", "wide") == "wide"
        assert not isinstance(model[1][2], type(model[1][0]))
    assert {type(block) for block in model[1]} == {cls} and registry == known


@pytest.mark.usefixtures("padded")
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


@pytest.mark.parametrize("make", [lambda s: patch_model(nn.Linear(2, 2), s), ProgtuningCallback])
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("progressive", "takes a schedule, e.g. ProgressiveSchedule.*got 'progressive'"),
        (ProgressiveSchedule, r"not its class: pass ProgressiveSchedule\(...\)"),
        (None, "got None"),
        (3, "got 3"),
    ],
)
def test_what_is_no_schedule_is_named_at_once(make, schedule, message):
    with pytest.raises(TypeError, match=message):
        make(schedule)
    if not isinstance(schedule, type):
        with pytest.raises(TypeError, match=message):
            annealed_lr(schedule, [], 4)


def test_what_is_no_model_and_options_that_are_none_are_named_at_once():
    schedule = ProgressiveSchedule(2, 4)
    with pytest.raises(TypeError, match="takes a model, an nn.Module, and a schedule"):
        patch_model(schedule, tiny_model("bert-sequence"))
    for options in ({"frozenmode": "eval"}, {"step": 3}):
        with pytest.raises(
            TypeError, match=f"no option '{next(iter(options))}'; it has frozen_mode, tie"
        ):
            ProgtuningCallback(schedule, **options)
    for options in ({"frozen_mode": "off"}, {"kernels": True}, {"cache": "always"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            ProgtuningCallback(schedule, **options)


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


class _Told:
    """The warnings about missed steps that came inside."""

    def __enter__(self) -> list[str]:
        self._caught = warnings.catch_warnings(record=True)
        self._messages = self._caught.__enter__()
        warnings.simplefilter("always")
        self.about: list[str] = []
        return self.about

    def __exit__(self, *exc: object) -> None:
        self._caught.__exit__(*exc)
        self.about += [text for m in self._messages if "handle.advance" in (text := str(m.message))]


def _loop(schedule, step, *, optimizer=torch.optim.SGD, steps=8) -> list[str]:
    """What is told while `step(handle, backward, optimizer)` makes each of some steps."""
    handle = patch_model(tiny_model("bert-sequence"), schedule)
    inputs = tiny_inputs("bert-sequence")
    made = optimizer(handle.model.parameters(), lr=0.01)

    def backward():
        made.zero_grad()
        loss = handle.model(**inputs).loss
        loss.backward()
        return loss

    with handle, _Told() as told:
        for _ in range(steps):
            step(handle, backward, made)
    return told


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, MaskedAdamW])
@pytest.mark.parametrize(
    "schedule",
    [
        ProgressiveSchedule(4, 8),
        ProgressiveSchedule(4),
        MilestoneSchedule({100: 2}),
        RandomBlockSchedule(1, 5),
        AdaptiveSchedule(5),
    ],
    ids=repr,
)
def test_a_loop_without_advance_is_told_so_once(schedule, optimizer):
    def step(handle, backward, made):
        backward()
        made.step()

    (message,) = _loop(schedule, step, optimizer=optimizer)
    assert "still at step 0: call handle.advance() once per optimizer step" in message


def test_an_advance_once_in_a_while_is_no_advance_per_step():
    def step(handle, backward, made):
        for _ in range(4):
            backward()
            made.step()
        handle.advance()

    assert len(_loop(ProgressiveSchedule(4, 8), step)) == 1


def test_going_on_past_the_end_is_told_once():
    def step(handle, backward, made):
        for _ in range(2):  # per batch, where a step is two
            backward()
            handle.advance()
        made.step()

    (message,) = _loop(ProgressiveSchedule(4, 8), step)
    assert "past total_steps=8" in message and "handle.advance() once per optimizer" in message


def _accumulates(handle, backward, made):
    for _ in range(4):
        backward()
    made.step()
    handle.advance()


def _advances_first(handle, backward, made):
    backward()
    handle.advance()
    made.step()


def _looks_for_a_worse_place(handle, backward, made):  # as SAM does
    backward()
    with torch.no_grad():
        for p in handle.model.parameters():
            p.add_(0.01)
    backward()
    with torch.no_grad():
        for p in handle.model.parameters():
            p.sub_(0.01)
    made.step()
    handle.advance()


def _runs_a_closure(handle, backward, made):
    made.step(backward)
    handle.advance()


def _evaluates(handle, backward, made):
    backward()
    made.step()
    handle.model.load_state_dict(handle.model.state_dict())
    with torch.no_grad():
        for _ in range(3):
            handle.model(**tiny_inputs("bert-sequence"))
    handle.advance()


@pytest.mark.parametrize(
    ("step", "optimizer"),
    [
        (_accumulates, torch.optim.SGD),
        (_accumulates, MaskedAdamW),
        (_advances_first, torch.optim.SGD),
        (_looks_for_a_worse_place, torch.optim.SGD),
        (_runs_a_closure, torch.optim.LBFGS),
        (_evaluates, torch.optim.AdamW),
    ],
)
def test_loops_that_advance_are_told_nothing(step, optimizer):
    assert _loop(ProgressiveSchedule(4, 8), step, optimizer=optimizer) == []


def test_one_plan_for_all_steps_needs_no_advance():
    def step(handle, backward, made):
        backward()
        made.step()

    assert _loop(MilestoneSchedule({0: 2}), step) == []


def test_models_that_share_parameters_are_not_patched_together():
    model = tiny_model("bert-sequence")
    other = tiny_model("bert-sequence")
    other.bert = model.bert  # two heads on one backbone
    for first, second in ((model.bert, model), (model, model.bert), (model, other)):
        handle = patch_model(first, ProgressiveSchedule(2, 4))
        with pytest.raises(ValueError, match=r"patched already: call unpatch\(\) of its handle"):
            patch_model(second, ProgressiveSchedule(4, 4))
        handle.advance()
        patch_model(copy.deepcopy(second), ProgressiveSchedule(4, 4))
        handle.unpatch()
        with patch_model(second, ProgressiveSchedule(4, 4)) as handle:
            handle.seek(3)
        assert all(p.requires_grad for m in (model, other) for p in m.parameters())


def test_a_compiled_model_is_patched_inside():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    compiled = torch.compile(model, backend="eager")
    with patch_model(compiled, MilestoneSchedule({1: 2})) as handle:
        assert handle.model is model and handle_of(model) is handle
        for boundary in (0, 2):
            compiled(**inputs).loss.backward()
            grads = [block.output.dense.weight.grad for block in model.bert.encoder.layer]
            assert [g is None for g in grads] == [i < boundary for i in range(4)]
            model.zero_grad()
            handle.advance()


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


class _Features(nn.Module):
    """Called with one dict, takes things out of it and writes others in: sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny_model("bert-sequence").bert

    def forward(self, features: dict) -> dict:
        inner = features["given"].pop()  # a list inside
        features.update(tokens=features.pop("input_ids"), more=torch.zeros(2, requires_grad=True))
        states = self.bert(features["tokens"], features["attention_mask"]).last_hidden_state
        features["sentence"] = states.mean(1) * inner
        return features


@dataclass
class _Output:
    found: dict


@pytest.mark.parametrize("kind", [dict, BatchEncoding, OrderedDict])
def test_a_report_repeats_the_forward_with_what_the_model_was_given(kind):
    inputs, model = tiny_inputs("bert-sequence"), _Features()
    model.register_forward_hook(lambda module, args, output: _Output(output))
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    features = kind({**inputs, "given": [torch.ones(1)]})
    out = model(features).found
    assert "tokens" in features and not features["given"]  # the caller's own
    out["sentence"].sum().backward()
    reports = [handle.truncation_report() for _ in range(2)]
    for report in reports:
        report.assert_truncated()
        assert report.nodes == reports[0].nodes > 0
    assert handle.forwards.last.args[0]["input_ids"] is inputs["input_ids"]


class _Sparse(nn.Module):
    """A block that saves sparse tensors, as the adapters of SHiRA and FRoD do."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.norm, self.layout = nn.LayerNorm(8), layout
        self.values = nn.Parameter(torch.randn(8, 8) * (torch.rand(8, 8) < 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C)
        if self.layout is torch._mkldnn:
            return self.norm(x) + (x.to_mkldnn() * x.to_mkldnn()).to_dense()
        return self.norm(x) + (self.values.to_sparse(layout=self.layout) @ x.T).T


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn])
def test_sparse_saved_tensors_count_what_they_hold(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(_Sparse(layout) for _ in range(3))))
    model.append(nn.Linear(8, 2))
    handle = patch_model(model, MilestoneSchedule({0: 1}), blocks="1")
    x = torch.randn(4, 8, requires_grad=True)
    model(x.detach()).sum().backward()
    report = handle.truncation_report()
    report.assert_truncated()
    found = report.units[3].saved_bytes
    if layout is torch._mkldnn:  # which shows no storage
        assert found > 0
        return
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()), lambda t: t):
        model[1][2](x)
    dense = sum(t.numel() * t.element_size() for t in saved if t.layout == torch.strided)
    entries = int(model[1][2].values.count_nonzero())
    # values of four bytes, indices of eight: two each, or one each and one per row
    held = entries * (4 + 8) + 8 * (entries if layout is torch.sparse_coo else 9)
    count = sum(t.layout == layout for t in saved)
    assert count and found == dense + count * held


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (CyclicBlockSchedule(1, 50), True),
        (MilestoneSchedule({0: 0, 1000: 3}), True),
        (MilestoneSchedule({0: 0, 17: 3}), False),
        (MilestoneSchedule({}), False),
        (ProgressiveSchedule(1), False),
        (ProgressiveSchedule(3), False),
        (AdaptiveSchedule(100), False),
    ],
)
def test_a_run_that_ends_before_its_schedule_changes_anything_is_told(schedule, told):
    schedule = copy.deepcopy(schedule).bind(18)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch_model(tiny_model("bert-sequence"), schedule).unpatch()
    assert [str(w.message) for w in caught if "within the 18 steps" in str(w.message)] == [
        f"{schedule!r} changes nothing within the 18 steps of the run: its first plan is in force "
        "to the end"
    ] * told
    assert not told or caught[0].filename == __file__


def test_blocks_are_named():
    model = tiny_model("bert-sequence")
    for blocks in (model.bert.encoder.layer, [model.bert.encoder.layer]):
        with pytest.raises(TypeError, match=r"names of modules, such as 'encoder\.layers'"):
            patch_model(model, ProgressiveSchedule(2, 4), blocks=blocks)


def test_a_derived_class_that_is_called_makes_the_original():
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList(Layer(8) for _ in range(3)))
    with patch_model(model, MilestoneSchedule({0: 2}), blocks="1"):
        found = {c.__name__: c for c in [Layer, *Layer.__subclasses__()]}["Layer"]
        assert found is not Layer
        made = found(width=4)
    assert type(made) is Layer
    assert made(torch.randn(2, 4)).requires_grad


def test_one_deciding_schedule_is_for_one_model():
    schedule = AdaptiveSchedule(3)
    with patch_model(tiny_model("bert-sequence"), schedule):
        with pytest.raises(ValueError, match="give each model its own"):
            patch_model(tiny_model("bert-sequence"), schedule)
    patch_model(tiny_model("bert-sequence"), schedule).unpatch()


def test_a_scripted_model_is_refused():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="patch the model that it was made from"):
        patch_model(model, ProgressiveSchedule(1, 2))


def test_a_report_leaves_buffers_and_inputs_as_they_are():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.embed(x)
            x -= 1
            for layer in self.layers:
                y = layer(y)
            return self.norm(y).sum()

    model, x = Counting(), torch.randn(4, 8)
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model(x).backward()
    before, given = copy.deepcopy(dict(model.named_buffers())), x.clone()
    handle.truncation_report().assert_truncated()
    assert torch.equal(x, given)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


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


@pytest.mark.parametrize("name", ["observe", "reassert", "accept_weights"])
def test_names_of_before_settle_warn_and_do_it(name):
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    weight = model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.warns(DeprecationWarning, match=f"PatchHandle.{name} .* settle"):
        getattr(handle, name)()
    assert not weight.requires_grad
    assert not hasattr(handle, "settled")
