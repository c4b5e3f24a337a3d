"""What changes between two steps is seen before a replay: memory, modules, modes, weights."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_pairs import Normed, Pair, bert_batch, patched
from torch import nn

from progtuning_kernels import (
    ProgressiveSchedule,
)
from progtuning_kernels.graphs.captured_module import CapturedModule


def _moved_weights(model, optimizer, handle):
    for p in model.parameters():
        p.data = p.data.clone()


def _another_head(model, optimizer, handle):
    weight = model.classifier.weight.detach() * 2
    model.classifier.weight.data = weight


def _double_and_back(model, optimizer, handle):
    model.double().float()


def _switched(model, optimizer, handle):
    model.classifier.weight.requires_grad_(False)


def _buffer(model, optimizer, handle):
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.clone()


@pytest.mark.parametrize(
    "change", [_moved_weights, _another_head, _double_and_back, _switched, _buffer]
)
def test_what_was_moved_replaced_or_switched_is_captured_anew(change, pair, pools):
    pair.steps()
    before = len(pools)
    pair.both(change)
    pair.steps()
    pair.check()
    assert len(pools) == before + 1
    reason = "a parameter, buffer, module, attribute or hook was added, replaced, moved or switched"
    assert pair.report.eager.get(reason, 0) <= 1


def test_a_stale_address_would_show(pair, monkeypatch):
    pair.steps()
    monkeypatch.setattr(CapturedModule, "changed", False)
    pair.optimizers.clear()  # which keep the old memory alive
    pair.models[0].classifier.weight.data = pair.models[0].classifier.weight.detach().clone()
    assert pair.models[0](**bert_batch()).loss.isnan()


def test_modes_of_modules_are_part_of_the_kind(pair):
    pair.steps()
    for mode in (False, True, False):
        pair.both(lambda m, o, h, mode=mode: m.bert.encoder.layer[3].train(mode))
        pair.steps()
    pair.check()
    assert pair.report.captured == 2


def _hooked(model):
    model.bert.pooler.register_forward_hook(lambda module, args, output: output * 1.5)


def _hooked_backward(model):
    model.bert.pooler.register_full_backward_hook(lambda module, found, given: (found[0] * 2,))


def _other_dropout(model):
    model.bert.encoder.layer[3].output.dropout.p = 0.5


def _other_head(model):
    torch.manual_seed(3)
    model.classifier = nn.Linear(32, 3)


def _longer_output(model):
    dense = model.bert.encoder.layer[3].output.dense
    model.bert.encoder.layer[3].output.dense = nn.Sequential(dense, nn.Tanh())


def _other_forward(model):
    dense = model.bert.pooler.dense
    dense.forward = lambda x: nn.Linear.forward(dense, x) * 2


@pytest.mark.parametrize(
    "change",
    [_hooked, _hooked_backward, _other_dropout, _other_head, _longer_output, _other_forward],
)
def test_what_a_module_is_by_now_is_what_runs(change, pair):
    pair.steps()
    pair.both(lambda model, optimizer, handle: change(model))
    pair.steps(4)
    pair.check()
    assert sum(pair.report.eager.values()) > 2


def test_a_hook_that_was_removed_is_in_the_way_no_more(pair):
    hooks = [m.bert.pooler.register_forward_hook(lambda m, a, out: out * 1.5) for m in pair.models]
    pair.steps()
    for hook in hooks:
        hook.remove()
    pair.steps(4)
    pair.check()
    assert pair.report.replays >= 3


def test_buffers_that_a_forward_writes_get_new_versions(pools):
    pair = Pair(model=Normed())

    def do(model, optimizer, handle):
        model(torch.randn(5, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        before = [m.blocks[2][1].num_batches_tracked._version for m in pair.models]
        pair.both(do)
        after = [m.blocks[2][1].num_batches_tracked._version for m in pair.models]
        assert all(map(int.__gt__, after, before))
        pair.check()
    assert pair.report.replays == 3


def test_unpatching_and_patching_again(pair):
    pair.steps()
    pair.both(lambda m, o, h: h.unpatch())
    assert pair.models[0].__class__.__mro__ == pair.models[1].__class__.__mro__
    pair.handles = [
        patched(m, graph, schedule=ProgressiveSchedule(1, 1000))
        for m, graph in zip(pair.models, ("on", "off"), strict=True)
    ]
    pair.steps()
    pair.check()
    assert pair.report.replays == 2


def test_a_checkpoint_goes_on_to_the_bit(pair):
    pair.steps(4)
    saved = [
        copy.deepcopy((m.state_dict(), o.state_dict(), h.state_dict()))
        for m, o, h in zip(pair.models, pair.optimizers, pair.handles, strict=True)
    ]
    pair.steps(2)

    def load(parts):
        def do(model, optimizer, handle):
            weights, state, place = next(parts)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            handle.load_state_dict(place)

        return do

    replays = pair.report.replays
    pair.both(load(iter(saved)))
    pair.steps(3)
    pair.check()
    assert pair.report.replays == replays + 3  # weights are read where they lie


def test_a_weight_written_before_its_backward_raises_as_it_does_in_eager(pair):
    pair.steps()
    for model in pair.models:
        loss = model(**bert_batch()).loss
        with torch.no_grad():
            model.classifier.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
