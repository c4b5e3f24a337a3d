"""What undoes truncation or cuts a gradient off without a word: undone, or named with the cure."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import accelerate
import pytest
import torch
from proofs import FixedPlan, counted_runs, enable_checkpointing, frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from progtuning_kernels import (
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    TruncationError,
    UnsupportedModelError,
    patch_model,
    register_family,
)
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.model.families import FAMILIES

BERT, LLAMA, T5 = "bert-sequence", "llama-causal-lm", "t5-seq2seq-lm"
ABOVE_TWO = FreezePlan.from_boundary(2, 4, embeddings=False)


def _blocks(model: nn.Module, handle) -> list[nn.Module]:
    return [model.get_submodule(path) for path in handle.layout.block_paths]


@pytest.fixture
def families(monkeypatch):
    """A table of families that the test may add to."""
    monkeypatch.setattr("progtuning_kernels.model.families.FAMILIES", table := dict(FAMILIES))
    monkeypatch.setattr("progtuning_kernels.model.layout.FAMILIES", table)
    return table


class _Config:
    model_type = "homemade"


class _Homemade(nn.Module):
    """A user's own model: token embedding, norm, blocks, output; the loss is the mean square."""

    config = _Config()

    def __init__(self, *, order: str = "early norm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        if order == "early out":
            self.out = nn.Linear(8, 2)
        if order == "early norm":
            self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        if order != "early norm":
            self.norm = nn.LayerNorm(8)
        if order != "early out":
            self.out = nn.Linear(8, 2)
        self.config = _Config()
        self.passes = 1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> ()
        hidden = self.norm(self.embed(ids))
        for _ in range(self.passes):
            for layer in self.layers:
                hidden = layer(hidden)
        return self.out(hidden).square().mean()


IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("enabled", ["before", "after", "in a later stage"])
def test_enable_input_require_grads_does_not_undo_truncation(enabled):
    model, inputs = tiny_model(LLAMA), tiny_inputs(LLAMA)
    if enabled == "before":
        model.enable_input_require_grads()
    handle = patch_model(model, MilestoneSchedule({0: 1, 1: 2}, embeddings="never"))
    if enabled == "after":
        model.enable_input_require_grads()
    gradients(model, inputs)
    handle.advance()
    if enabled == "in a later stage":
        model.enable_input_require_grads()
    found = gradients(model, inputs)
    expected = frozen_by_hand(tiny_model(LLAMA), ABOVE_TWO, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    handle.truncation_report().assert_truncated()
    handle.unpatch()
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model.requires_grad_(False)
    model(**inputs)
    assert seen == [True], "unpatch did not put the hook back"


@pytest.mark.parametrize(
    ("name", "path"),
    [(BERT, "bert.embeddings.word_embeddings"), (LLAMA, "model.embed_tokens")],
)
def test_a_hook_that_makes_embeddings_require_grad_is_named(name, path):
    model = tiny_model(name)
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    embeddings = model.get_submodule(path)
    hook = embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_(True))
    model(**tiny_inputs(name))
    pattern = f"{re.escape(path)}.*call model.disable_input_require_grads"
    with pytest.raises(TruncationError, match=pattern) as caught:
        handle.truncation_report().assert_truncated()
    assert "\n" not in str(caught.value)
    hook.remove()
    handle.truncation_report().assert_truncated()


@pytest.mark.usefixtures("padded")
def test_a_hook_whose_protection_is_gone_is_named_with_the_nodes_it_costs():
    model = tiny_model(LLAMA)
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    for block in [model.model.embed_tokens, *model.model.layers]:
        block.__class__ = root_of(type(block))
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    model(**tiny_inputs(LLAMA))
    report = handle.truncation_report()
    assert report.units[1].nodes and report.units[2].nodes
    with pytest.raises(TruncationError, match="model.embed_tokens requires grad below boundary 2"):
        report.assert_truncated()


def test_a_trainable_embedding_is_named():
    model = tiny_model(BERT)
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    model(**tiny_inputs(BERT))
    with pytest.raises(
        TruncationError, match=r"bert.embeddings.word_embeddings.weight \(3,104 par"
    ):
        handle.truncation_report().assert_truncated()
    handle.advance()
    handle.truncation_report().assert_truncated()


@pytest.mark.usefixtures("padded")
@pytest.mark.filterwarnings("ignore:gradient checkpointing with use_reentrant=True")
def test_reentrant_checkpointing_below_frozen_embeddings_alone_trains_block_0():
    inputs, model = tiny_inputs(BERT), tiny_model(BERT)
    plan = FreezePlan.from_boundary(0, 4, embeddings=False)
    expected = frozen_by_hand(tiny_model(BERT), plan, inputs)
    patch_model(model, FixedPlan(plan))
    enable_checkpointing(model, use_reentrant=True)
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("when", ["before", "after", "in a later stage"])
@pytest.mark.parametrize("name", [BERT, LLAMA, T5])
def test_reentrant_checkpointing_becomes_the_other_kind(name, when):
    inputs = tiny_inputs(name)
    plain, model = tiny_model(name), tiny_model(name)
    enable_checkpointing(plain)
    expected = frozen_by_hand(plain, ABOVE_TWO, inputs)
    if when == "before":
        enable_checkpointing(model, use_reentrant=True)
    handle = patch_model(model, MilestoneSchedule({0: 1, 1: 2}, embeddings="never"))
    if when == "after":
        enable_checkpointing(model, use_reentrant=True)
    blocks = _blocks(model, handle)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gradients(model, inputs)
        handle.advance()
        if when == "in a later stage":
            enable_checkpointing(model, use_reentrant=True)
        found = gradients(model, inputs)
    assert [str(w.message)[:50] for w in told if "use_reentrant" in str(w.message)] == [
        "gradient checkpointing with use_reentrant=True tra"
    ]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    handle.truncation_report().assert_truncated()
    with counted_runs(blocks) as runs:
        gradients(model, inputs)
    assert [runs[i] for i in range(4)] == [1, 1, 2, 2]
    handle.unpatch()
    functions = [b._gradient_checkpointing_func for b in blocks]
    assert all(f.keywords["use_reentrant"] for f in functions)
    assert all(block.gradient_checkpointing for block in blocks)


@pytest.mark.usefixtures("padded")
def test_frozen_blocks_in_train_mode_are_not_checkpointed_either():
    model, inputs = tiny_model(BERT), tiny_inputs(BERT)
    handle = patch_model(model, FixedPlan(ABOVE_TWO), frozen_mode="train")
    enable_checkpointing(model)
    calls: Counter[int] = Counter()
    for i, block in enumerate(_blocks(model, handle)):
        function = block._gradient_checkpointing_func

        def counted(*args, function=function, i=i, **kwargs):
            calls.update([i])
            return function(*args, **kwargs)

        block._gradient_checkpointing_func = counted
    gradients(model, inputs)
    assert calls == {2: 1, 3: 1}
    handle.unpatch()
    assert all(block.gradient_checkpointing for block in model.bert.encoder.layer)


def test_a_users_own_reentrant_checkpoint_is_named():
    class Checkpointed(_Homemade):
        def forward(self, ids):
            hidden = self.norm(self.embed(ids))
            for layer in self.layers:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
            return self.out(hidden).square().mean()

    for reentrant in (True, False):
        model = Checkpointed()
        model.reentrant = reentrant
        patch_model(model, FixedPlan(ABOVE_TWO))
        if reentrant:
            with pytest.raises(RuntimeError, match="layers.2 trains but runs without autograd"):
                model(IDS)
        else:
            model(IDS).backward()
            assert all(p.grad is not None for p in model.layers[2].parameters())


def test_a_model_may_run_a_block_without_autograd_by_its_own_will():
    class Frugal(_Homemade):
        def forward(self, ids):
            with torch.no_grad():
                teacher = self.layers[2](self.norm(self.embed(ids)))
            return super().forward(ids) + teacher.mean()

    model = Frugal()
    patch_model(model, FixedPlan(ABOVE_TWO))
    model(IDS).backward()
    assert all(p.grad is not None for p in model.layers[2].parameters())


@pytest.mark.parametrize("name", [T5, "bart-seq2seq-lm"])
def test_stacks_in_the_wrong_order_are_found_before_anything_freezes(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    with patch_model(model, MilestoneSchedule({5: 2})) as handle:
        encoder, decoder = (stack.path for stack in handle.layout.stacks)
        model(**inputs)  # the right order is fine
    handle = patch_model(model, MilestoneSchedule({5: 2}), blocks=[decoder, encoder])
    pattern = rf"whose gradient freezing block 0 would cut off.*blocks=\['{encoder}', '{decoder}'\]"
    with pytest.raises(UnsupportedModelError, match=pattern) as caught:
        model(**inputs)
    assert "\n" not in str(caught.value)
    handle.unpatch()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("order", ["late norm", "early out"])
def test_a_norm_that_is_taken_for_head_is_named_and_the_cure_works(order, families):
    model = _Homemade(order=order)
    cures = []
    while len(cures) < 3:
        handle = patch_model(model, MilestoneSchedule({5: 2}))
        try:
            model(IDS)
            break
        except UnsupportedModelError as error:
            cures.append(re.search(r"register_family\(.*?'\)", str(error)).group())
        handle.unpatch()
        eval(cures[-1], {"register_family": register_family})
    assert len(cures) == 1 + (order == "early out")
    assert families["homemade"].embeddings == r"^norm\."
    handle.unpatch()
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model(IDS).backward()
    assert model.norm.weight.grad is None and model.layers[2][0].weight.grad is not None


def test_what_is_taken_for_embeddings_but_runs_later_is_named(families):
    model = _Homemade(order="early out")
    register_family("homemade", embeddings=r"norm\.")
    handle = patch_model(model, MilestoneSchedule({5: 2}))
    pattern = (
        r"out \(embeddings\) is computed from .*register_family\('homemade', head=r'\^out\\.'\)"
    )
    with pytest.raises(UnsupportedModelError, match=pattern):
        model(IDS)
    handle.unpatch()
    register_family("homemade", head=r"out\.")
    assert FAMILIES.get("homemade") is None and families["homemade"].embeddings == r"norm\."
    handle = patch_model(model, MilestoneSchedule({0: 4}))
    model(IDS).backward()
    assert model.out.weight.grad is not None


def test_blocks_that_run_in_a_loop_are_refused():
    model = _Homemade()
    patch_model(model, MilestoneSchedule({5: 2}))
    model(IDS)
    model = _Homemade()
    model.passes = 2
    patch_model(model, MilestoneSchedule({5: 2}))
    with pytest.raises(
        UnsupportedModelError, match=r"layers.0 \(block 0\).*no cure.*more than once"
    ):
        model(IDS)


@pytest.mark.usefixtures("padded")
def test_the_proof_is_made_once_under_every_plan():
    model, inputs = tiny_model(BERT), tiny_inputs(BERT)
    handle = patch_model(model, MilestoneSchedule({2: 2}))
    hooked = []
    watched = model.bert.encoder.layer[0]
    model.register_forward_pre_hook(lambda *_: hooked.append(len(watched._forward_pre_hooks)))
    for _ in range(4):
        gradients(model, inputs)
        handle.advance()
    assert hooked == [1, 0, 1, 0]
    assert not watched._forward_pre_hooks


def test_rules_of_a_family_are_checked():
    with pytest.raises(ValueError, match="unknown rule 'tail'"):
        register_family("homemade", tail="x")
    with pytest.raises(ValueError, match="no regular expression"):
        register_family("homemade", head="(")
    assert "homemade" not in FAMILIES


def test_a_forward_of_the_instance_runs_without_autograd_as_well():
    # what accelerate does to the modules of a model that it spreads over devices
    model, inputs = tiny_model(LLAMA), tiny_inputs(LLAMA)
    for block in model.model.layers:
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.AlignDevicesHook("cpu"))
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    bias = nn.Parameter(torch.zeros(32))  # without truncation, the gradient would get here
    model.model.layers[0].register_forward_pre_hook(lambda m, args: (args[0] + bias, *args[1:]))
    found = gradients(model, inputs)
    expected = frozen_by_hand(tiny_model(LLAMA), ABOVE_TWO, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bias.grad is None
    handle.truncation_report().assert_truncated()
    handle.unpatch()
    assert len({type(block) for block in model.model.layers}) == 1


class _Bare(_Homemade):
    """Bare parameters beside the blocks, each used at another place."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(3, 8))  # before block 0
        self.middle = nn.Parameter(torch.ones(8))  # enters at block 2
        self.prompts = nn.Parameter(torch.ones(4, 8))  # a row enters at every block
        self.pooling = nn.Parameter(torch.ones(4))  # over the outputs of all blocks
        self.scale = nn.Parameter(torch.ones(()))
        self.loss_weight = nn.Parameter(torch.ones(()))  # used by the loop alone

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> ()
        hidden = self.norm(self.embed(ids) + self.position)
        outputs = []
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden + self.prompts[i] + (self.middle if i == 2 else 0))
            outputs.append(hidden)
        pooled = torch.stack(outputs, -1) @ self.pooling
        return (self.out(pooled) * self.scale.exp()).square().mean()


USED_ABOVE = {"pooling", "scale", "loss_weight"}


@pytest.mark.parametrize("embeddings", ["first_stage", "never"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bare_parameter_trains_as_long_as_the_first_unit_that_reads_it(embeddings, compiled):
    torch.compiler.reset()
    model = _Bare()
    if compiled:  # no hook sees who reads what: as the order of registration has it
        for layer in model.layers:
            layer.compile(backend="eager")
    handle = patch_model(model, MilestoneSchedule({1: 1, 2: 2, 3: 4}, embeddings=embeddings))
    for boundary in (0, 1, 2, 4):
        (model(IDS) * model.loss_weight).backward()
        trained = {n for n, p in model.named_parameters() if "." not in n and p.grad is not None}
        early = boundary == 0 and embeddings == "first_stage"
        expected = USED_ABOVE | ({"position", "prompts"} if early else set())
        if boundary <= 2:
            expected |= {"middle"}
        if compiled:
            expected = expected | USED_ABOVE if early else set()
        assert trained == expected, f"boundary {boundary}"
        flags = {n for n, p in model.named_parameters() if "." not in n and p.requires_grad}
        assert flags == trained
        handle.truncation_report().assert_truncated()
        model.zero_grad()
        handle.advance()
    handle.unpatch()
    assert all(p.requires_grad for p in model.parameters())


def test_a_resumed_run_keeps_the_state_of_what_is_used_above_the_boundary():
    runs = []
    for resumed in (False, True):
        model = _Bare()
        schedule = MilestoneSchedule({0: 0, 2: 2})
        handle = patch_model(model, schedule)
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
        for step in range(5):
            if resumed and step == 3:
                saved = [model.state_dict(), handle.state_dict(), optimizer.state_dict()]
                handle.unpatch()
                model = _Bare()
                model.load_state_dict(saved[0])
                handle = patch_model(model, schedule)
                handle.load_state_dict(saved[1])
                optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
                optimizer.load_state_dict(saved[2])
            (model(IDS) * model.loss_weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        runs.append(dict(model.named_parameters()))
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name


def test_a_cache_serves_what_the_first_forward_shows_to_be_frozen():
    class Positions(_Homemade):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.ones(3, 8))

        def forward(self, ids):
            hidden = self.norm(self.embed(ids) + self.position)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.out(hidden).square().mean()

    model, untouched = Positions(), Positions()
    cache = PrefixCache(1 << 20)
    handle = patch_model(model, MilestoneSchedule({0: 2}, embeddings="never"), cache=cache)
    with mock.patch.object(BreakEven, "verdict", lambda self, rows: None):
        for _ in range(4):
            assert torch.equal(model(IDS), untouched(IDS))
    assert handle.cache_report().hits > 0
    with torch.no_grad():
        for each in (model, untouched):
            each.position += 1
    assert torch.equal(model(IDS), untouched(IDS))


def test_a_model_that_trains_nothing_but_what_enters_below_block_0_is_refused():
    model = _Bare().requires_grad_(False)
    model.prompts.requires_grad_(True)
    handle = patch_model(model, MilestoneSchedule({5: 2}))
    with pytest.raises(ValueError, match="freezes everything that was trainable"):
        model(IDS)
    handle.unpatch()
    assert model.prompts.requires_grad


class _Wrapped(nn.Module):
    """Two stacks; what runs before the encoder's blocks is registered after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.encoder = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.late = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)
        self.decoder = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out = nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.late(self.embed(ids)))
        for layer in [*self.encoder, *self.decoder]:
            hidden = layer(hidden).tanh()
        return self.out(hidden).mean()


def test_a_late_module_is_named_though_another_late_one_runs_between():
    for boundary in (0, 1):
        model = _Wrapped()
        patch_model(model, MilestoneSchedule({0: boundary}), blocks=["encoder", "decoder"])
        with pytest.raises(UnsupportedModelError, match=r"encoder.0 .*computed from late\."):
            model(IDS)


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_block_is_computed_from_is_found_in_an_object(plain):
    @dataclass
    class State:
        hidden: torch.Tensor

    class Plain:
        def __init__(self, hidden):
            self.hidden = hidden

    kind = Plain if plain else State

    class Block(nn.Linear):
        def forward(self, state):
            return kind(super().forward(state.hidden).tanh())

    class Stateful(_Wrapped):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(Block(8, 8) for _ in range(2))
            self.late = nn.Linear(8, 8)

        def forward(self, ids):
            state = kind(self.late(self.embed(ids)))
            for layer in self.encoder:
                state = layer(state)
            return self.out(state.hidden).mean()

    model = Stateful()
    patch_model(model, MilestoneSchedule({0: 1}), blocks="encoder")
    with pytest.raises(UnsupportedModelError, match=r"encoder.0 .*computed from late\."):
        model(IDS)


class _OfVectors(_Homemade):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> ()
        hidden = self.norm(vectors)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.out(hidden).square().mean()


def test_a_parameter_outside_the_model_that_freezing_would_cut_off_is_refused():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.inner = nn.Linear(8, 8), _OfVectors()

        def forward(self, vectors):
            return self.inner(self.project(vectors))

    vectors = torch.randn(2, 3, 8)
    for schedule in (MilestoneSchedule({5: 2}), MilestoneSchedule({0: 2}, embeddings="never")):
        outer = Outer()
        handle = patch_model(outer.inner, schedule)
        with pytest.raises(UnsupportedModelError, match="patch a module that holds both"):
            outer(vectors)
        handle.unpatch()
        handle = patch_model(outer, schedule)
        outer(vectors).backward()
        assert (outer.project.weight.grad is None) == (handle.boundary > 0)
        handle.unpatch()
        with patch_model(outer.inner, MilestoneSchedule({0: 0}, embeddings="always")):
            outer.zero_grad()
            outer(vectors).backward()
            assert outer.project.weight.grad is not None


def test_a_vector_that_a_hook_trains_below_the_boundary_is_refused():
    model, steering = _Homemade(), nn.Parameter(torch.zeros(8))
    model.layers[0].register_forward_hook(lambda module, args, output: output + steering)
    patch_model(model, FixedPlan(ABOVE_TWO))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 .*none of the model's"):
        model(IDS)


def test_an_input_that_wants_its_gradient_is_refused_below_the_boundary_alone():
    vectors = torch.randn(2, 3, 8, requires_grad=True)
    model = _OfVectors()
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    model(vectors * 2).backward()
    assert vectors.grad is not None
    handle.advance()
    with pytest.raises(RuntimeError, match=r"cuts off the gradient of an input"):
        model(vectors * 2)
    model(vectors.detach()).backward()


class _Direct(_Homemade):
    """Calls its blocks' `forward`, as SqueezeBERT does: no hook runs."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(ids))
        for layer in self.layers:
            hidden = layer.forward(hidden)
        return self.out(hidden).square().mean()


def test_blocks_whose_forward_is_called_directly_are_proved_and_reported_too():
    model = _Direct()
    handle = patch_model(model, FixedPlan(ABOVE_TWO))
    model(IDS).backward()
    report = handle.truncation_report()
    report.assert_truncated()
    assert [bool(unit.nodes) for unit in report.units] == [False] * 3 + [True] * 3
    assert not any("forward" in module.__dict__ for module in model.modules())
    handle.unpatch()
    model = _Direct(order="late norm")
    patch_model(model, MilestoneSchedule({5: 2}))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 .*computed from norm\."):
        model(IDS)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_stands_before_the_blocks_and_feeds_none_is_named_and_the_cure_works(families):
    class Labelled(_Homemade):
        def __init__(self):
            super().__init__()
            self._modules = {"labels": nn.Embedding(2, 2), **self._modules}

        def forward(self, ids):
            return super().forward(ids) * self.labels.weight.exp().sum()

    model = Labelled()
    handle = patch_model(model, MilestoneSchedule({0: 0}, embeddings="always"))
    model(IDS).backward()  # nothing is ever frozen, so nothing is lost
    handle.unpatch()
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    with pytest.raises(UnsupportedModelError, match=r"no block is computed from labels") as caught:
        model(IDS)
    handle.unpatch()
    cure = re.search(r"register_family\(.*?\)", str(caught.value)).group()
    eval(cure, {"register_family": register_family})
    handle = patch_model(model, MilestoneSchedule({1: 2}))
    for _ in range(2):
        model.zero_grad()
        model(IDS).backward()
        assert model.labels.weight.grad is not None
        handle.advance()


class _Pooled(nn.Module):
    """torch's own encoder below a head that pools over all places, padding included."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, 2)
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("frozen_mode", ["eval", "train"])
@pytest.mark.parametrize("boundary", [1, 2, 4])
def test_an_encoder_that_decides_by_its_first_layer_pads_as_when_frozen_by_hand(
    boundary, frozen_mode
):
    """It makes nested tensors for all layers if the first is in eval mode and frozen."""
    ids = torch.randint(0, 50, (4, 8))
    padding = torch.zeros(4, 8, dtype=torch.bool)
    padding[1, 5:] = padding[2, 3:] = True
    plain, model = _Pooled(), _Pooled()
    found = {n: dict(m.__dict__) for n, m in model.named_modules()}
    plain.embed.requires_grad_(False)
    plain.encoder.layers[:boundary].requires_grad_(False)
    with patch_model(model, MilestoneSchedule({0: boundary}), frozen_mode=frozen_mode):
        for each in (plain, model):
            each(ids, padding).square().sum().backward()
        for name, parameter in plain.named_parameters():
            own = model.get_parameter(name)
            assert (parameter.grad is None) == (own.grad is None), name
            assert own.grad is None or torch.equal(own.grad, parameter.grad), name
        with torch.no_grad():  # in evaluation, the nested tensors of torch's fast path
            assert torch.equal(model.eval()(ids, padding), plain.eval()(ids, padding))
        model(ids, padding).sum().backward()  # which cannot train, by hand neither
        model.train()
        model.encoder.use_nested_tensor = False
    assert type(model.encoder) is nn.TransformerEncoder
    assert model.encoder.use_nested_tensor is False
    model.encoder.use_nested_tensor = True
    assert {n: m.__dict__ for n, m in model.named_modules()} == found
