"""Captured training forwards train as eager ones do, bit for bit, whatever comes in between."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from graph_pairs import STAGES, STEPS, Pair, bert_batch, optimizer_of, patched
from graph_recorder import RecorderPool
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    PrefixCache,
    ProgressiveSchedule,
    plan_training,
)
from progtuning_kernels.graphs import StageGraphs, captured_module

REPLAYS = STEPS - STAGES  # the first forward of a stage is eager


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


class Run(NamedTuple):
    losses: list[float]
    weights: dict[str, torch.Tensor]
    handle: Any


def _trained(
    name: str, graph: str, *, dropout: bool = True, masked: bool = True, **options: Any
) -> Run:
    torch.manual_seed(0)
    model = tiny_model(name).train()
    model = model if dropout else _without_dropout(model)
    handle = patched(model, graph, **options)
    optimizer = optimizer_of(handle, masked)
    torch.manual_seed(1)
    losses = []
    for step in range(STEPS):
        loss = model(**tiny_inputs(name, seed=step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        losses.append(loss.item())
    return Run(losses, {n: p.detach().clone() for n, p in model.named_parameters()}, handle)


def _assert_same(run: Run, eager: Run) -> None:
    assert run.losses == eager.losses
    assert all(torch.equal(run.weights[name], eager.weights[name]) for name in eager.weights)


class Case(NamedTuple):
    model: str
    dropout: bool
    masked: bool  # the optimizer
    packed: bool
    cached: bool


# every two values of two fields come together in one of these
CASES = [
    Case("bert-sequence", False, True, True, False),
    Case("bert-sequence", True, False, False, True),
    Case("bert-sequence", True, True, True, True),
    Case("gpt2-causal-lm", False, False, True, True),
    Case("gpt2-causal-lm", True, True, False, False),
    Case("llama-causal-lm", False, True, False, True),
    Case("llama-causal-lm", True, False, True, False),
    Case("llama-causal-lm", False, True, True, True),
    Case("vit-image", False, True, False, True),
    Case("vit-image", True, False, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_captured_forwards_train_as_eager_ones_do(case, pools, monkeypatch):
    def trained(graph):
        cache = PrefixCache(max_bytes=1 << 22) if case.cached else None
        packing = "on" if case.packed else "off"
        options = dict(dropout=case.dropout, masked=case.masked, packing=packing, cache=cache)
        return _trained(case.model, graph, **options)

    run = trained("on")
    # the same tokens: a packed forward computes some padding for the sake of graphs
    monkeypatch.setattr(StageGraphs, "captures", property(lambda self: case.packed))
    _assert_same(run, trained("off"))
    report = run.handle.graph_report()
    cached = 2 * case.cached  # the first forward that is served, in the later stages
    padded = case.cached and case.model != "vit-image"
    looks = 2 * (case.packed or padded)  # of the first three that show it, for what reads padding
    assert report.replays == REPLAYS - cached - looks
    assert sum(report.eager.values()) == STEPS - report.replays
    if case.packed:
        assert run.handle.packing_report().batches == STEPS
    if case.cached:
        assert run.handle.cache_report().served_steps


def test_every_stage_has_a_pool_of_its_own_and_leaves_nothing(pools):
    refs = []
    model = tiny_model("bert-sequence").train()
    handle = patched(model, "on")
    optimizer = optimizer_of(handle)
    for step in range(STEPS):
        model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = handle.graph_report()
        handle.advance()
        if handle.stage > len(refs):
            assert report.captured == 1 and report.nbytes > pools[-1].nbytes > 0
            refs.append(weakref.ref(pools.pop()))
            gc.collect()
            assert refs[-1]() is None
    assert len(refs) == STAGES - 1
    handle.unpatch()
    refs.append(weakref.ref(pools.pop()))
    gc.collect()
    assert refs[-1]() is None and type(model) is type(tiny_model("bert-sequence"))
    assert "forward" not in model.__dict__ and "_progtuning_graphs" not in model.__dict__


@settings(max_examples=5)
@given(
    st.lists(
        st.sampled_from(
            "step small accumulate evaluate twice lost keep zeros autocast frozen".split()
        ),
        min_size=4,
        max_size=12,
    )
)
def test_whatever_a_loop_does_the_bits_are_those_of_eager(events):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_module, "pool_on", RecorderPool)
        pair, kept = Pair(optimizer={"max_grad_norm": None}), ([], [])
        pair.steps(2)
        for i, event in enumerate(events):
            batch = bert_batch(2 if event == "small" else 3, i)
            pair.both(lambda m, o, h, event=event, batch=batch: _do(event, m, o, h, batch, kept))
            pair.check()
        for own, other in zip(*kept, strict=True):
            assert torch.equal(own, other)


def _do(event, model, optimizer, handle, batch, kept) -> None:
    captured = handle.graph_report().state == "on"
    keep = kept[0 if captured else 1]
    if event == "evaluate":
        model.eval()
        with torch.no_grad():
            keep.append(model(**batch).logits)
        model.train()
        return
    if event == "frozen":
        weight = model.get_parameter("classifier.weight")
        weight.requires_grad_(not weight.requires_grad)
        return
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=event == "autocast")
    with autocast:
        output = model(**batch)
        if event == "twice":
            (output.loss + model(**batch).loss).backward()
        elif event != "lost":
            output.loss.backward()
    if event == "keep":
        keep += [p.grad for p in model.parameters() if p.grad is not None]
    if event not in ("accumulate", "lost"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=event != "zeros")
        handle.advance()
    keep.append(output.loss.detach())


def test_gradients_add_up_over_batches(pair):
    pair.steps()
    for i in range(3):
        pair.both(lambda m, o, h, i=i: m(**bert_batch(seed=i)).loss.backward())
    grads = pair.both(
        lambda m, o, h: [p.grad.clone() for p in m.parameters() if p.grad is not None]
    )
    assert all(map(torch.equal, *grads))
    assert pair.report.replays == 5
    pair.step()
    pair.check()


def test_the_last_batch_is_another_kind(pair):
    for seed in range(4):
        pair.step(seed)
        pair.step(seed, rows=2)
    pair.check()
    assert (pair.report.captured, pair.report.replays) == (2, 6)


def test_evaluation_in_between_is_eager(pair):
    def evaluate(model, optimizer, handle):
        model.eval()
        with torch.no_grad():
            logits = model(**bert_batch()).logits
        model.train()
        return logits

    pair.steps()
    assert torch.equal(*pair.both(evaluate))
    with torch.no_grad():  # in training mode, as some loops do
        assert torch.equal(*pair.both(lambda m, o, h: m(**bert_batch()).loss))
    pair.steps()
    pair.check()
    assert pair.report.replays == 5


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_is_part_of_the_kind(cache_enabled, pools):
    pair = Pair(model=tiny_model("bert-sequence", dropout=True))

    def do(model, optimizer, handle):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            loss = model(**bert_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    pair.steps()
    losses = [pair.both(do) for _ in range(4)]
    assert all(own == other for own, other in losses)
    pair.steps()
    pair.check()
    assert (pair.report.captured, pair.report.replays) == (2, 2 + 3 + 3)


def test_a_loss_scale(pair):
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]

    def do(model, optimizer, handle, scaler):
        loss = model(**bert_batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scalers = iter(scalers * 4)
    for _ in range(4):
        pair.both(lambda m, o, h: do(m, o, h, next(scalers)))
    pair.check()
    assert pair.report.replays == 3


def test_updates_inside_backward(pools):
    pair = Pair(optimizer={"in_backward": True, "max_grad_norm": None})
    pair.steps(5)
    pair.check()
    assert pair.report.replays == 4


def test_a_loop_with_a_loss_of_its_own_starts_from_logits(pools):
    pair = Pair()

    def do(model, optimizer, handle):
        batch = bert_batch()
        labels = batch.pop("labels")
        loss = nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        pair.both(do)
    pair.check()
    assert pair.report.replays == 3


def test_outputs_and_gradients_that_are_kept_stay_as_they_are(pair):
    pair.steps()

    def do(model, optimizer, handle):
        output = model(**bert_batch())
        output.loss.backward()
        kept = [output.loss.detach(), output.logits.detach()]
        kept += [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return kept

    kept = pair.both(do)
    pair.steps()
    assert all(map(torch.equal, *kept))
    pair.check()
    assert pair.report.replays == 6


def test_a_copy_of_the_model_is_an_ordinary_model(pair):
    pair.steps()
    twin = copy.deepcopy(pair.models[0])
    with contextlib.suppress(AttributeError):
        assert twin.__dict__["_progtuning_graphs"] is None
    assert torch.equal(
        twin.eval()(**bert_batch()).logits, pair.models[1].eval()(**bert_batch()).logits
    )


def test_what_a_stage_keeps_is_what_was_planned(pools):
    model = tiny_model("bert-sequence").train()
    schedule = ProgressiveSchedule(STAGES, STEPS)
    batch = bert_batch()
    plan = plan_training(model, schedule, batch_size=3, seq_len=11)
    handle = patched(model, "on", schedule=schedule)
    compared = set()
    for _ in range(STEPS):
        model(**batch).loss.backward()
        model.zero_grad()
        stage, whole = plan.stages[handle.stage], handle.freezer.graphs._whole
        if whole.captured:
            assert whole._gradients.nbytes == stage.gradient_bytes
            # the recorder gives no memory back within a recording: temporaries count, too
            assert handle.graph_report().nbytes > stage.graph_bytes
            compared.add(handle.stage)
        handle.advance()
    assert len(compared) == STAGES
