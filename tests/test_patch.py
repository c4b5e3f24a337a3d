"""Invariants 1 and 3: gradients as without patching, nothing below the boundary, nothing left."""

from __future__ import annotations

import abc
import copy
import pickle
import types
from typing import Any

import pytest
import torch
from proofs import FixedPlan, frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from progtuning_kernels import (
    AdaptiveSchedule,
    FreezePlan,
    MilestoneSchedule,
    ProgressiveSchedule,
    annealed_lr,
    patch_model,
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


def test_an_exception_in_the_forward_leaves_autograd_on():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    patch_model(model, MilestoneSchedule({0: 2}))
    with pytest.raises(Exception):  # noqa: B017  (whatever transformers raises)
        model(input_ids=inputs["input_ids"] + 10_000)
    assert torch.is_grad_enabled()
    model(**inputs).loss.backward()
    assert model.classifier.weight.grad is not None


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
def test_a_model_compiled_whole_trains_alike_and_compiles_once_a_plan():
    torch._dynamo.reset()
    counter = CompileCounter()
    models = [tiny_model("bert-sequence") for _ in range(2)]
    handles = [patch_model(m, ProgressiveSchedule(4, 4, embeddings="never")) for m in models]
    compiled = torch.compile(models[0], backend=counter)
    inputs = tiny_inputs("bert-sequence")
    for stage in range(4):
        found = []
        for call, model in zip((compiled, models[1]), models, strict=True):
            model.zero_grad()
            call(**inputs).loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(gradient, found[1][n]) for n, gradient in found[0].items())
        assert counter.frame_count == stage + 1
        for handle in handles:
            handle.advance()


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
