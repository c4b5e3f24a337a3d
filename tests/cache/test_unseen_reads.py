"""What reads, or changes, what a prefix cache leaves out is found where outputs do not show it."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from proofs import FixedPlan
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import BertConfig, BertModel

from progtuning_kernels import FreezePlan, PrefixCache, patch_model

BERT = "bert-token"


def _pair(make, **options):
    """The same model twice, patched at block 2: with a cache, and without."""
    plan = FixedPlan(FreezePlan.from_boundary(2, 4, embeddings=False))
    options = {"packing": "off", **options}
    cache = options.pop("cache", None) or PrefixCache(1 << 24, device="cpu")
    cached = patch_model(make(), plan, kernels="off", cache=cache, **options)
    return cached, patch_model(make(), plan, kernels="off", packing="off")


def _step(handle, loss, inputs):
    """Loss and gradients of a step."""
    handle.model.zero_grad()
    value = loss(handle.model(**inputs))
    value.backward()
    handle.advance()
    named = handle.model.named_parameters()
    return [value.detach(), *(p.grad for _, p in named if p.grad is not None)]


def _assert_same(cached, plain, loss, inputs):
    pairs = zip(_step(cached, loss, inputs), _step(plain, loss, inputs), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def _mean_of_all(output, *, factor=1.0):
    return output.logits.mean(1).pow(2).sum() * factor


def _inputs(spans=(9, 4, 6)):
    mask = (torch.arange(9) < torch.tensor(spans)[:, None]).long()
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(len(set(spans))))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_loop_that_reads_padding_is_told_so_and_served_no_more(packing):
    cached, plain = _pair(lambda: tiny_model(BERT), packing=packing)
    with pytest.warns(UserWarning, match="the prefix cache is off .* reads .* at padding"):
        for _ in range(3):
            _step(cached, _mean_of_all, _inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _assert_same(cached, plain, _mean_of_all, _inputs())
    cached.freezer.freeze(cached.plan)  # a stage begins
    _assert_same(cached, plain, _mean_of_all, _inputs())
    assert cached.cache_report().state == "off" and not cached.cache_report().served_steps


def test_gradients_that_show_nothing_are_no_look():
    cached, _ = _pair(lambda: tiny_model(BERT))
    for factor in (0.0, float("inf"), 0.0, float("nan"), 0.0):
        _step(cached, partial(_mean_of_all, factor=factor), _inputs())
    with pytest.warns(UserWarning, match="the prefix cache is off .* reads .* at padding"):
        for _ in range(2):
            _step(cached, _mean_of_all, _inputs())


def test_a_loop_that_reads_tokens_alone_is_served():
    cached, plain = _pair(lambda: tiny_model(BERT))
    inputs = {
        **_inputs(),
        "labels": (_inputs()["input_ids"] % 3).masked_fill_(_inputs()["attention_mask"] == 0, -100),
    }
    for _ in range(6):
        _assert_same(cached, plain, lambda output: output.loss, inputs)
    assert cached.cache_report().served_steps == 5


def test_a_prehook_that_comes_below_the_boundary_is_noticed():
    handles = _pair(lambda: tiny_model(BERT))
    inputs = tiny_inputs(BERT)
    for _ in range(3):
        _assert_same(*handles, lambda output: output.loss, inputs)
    assert handles[0].cache_report().served_steps
    for handle in handles:
        handle.model.bert.encoder.layer[0].register_forward_pre_hook(
            lambda module, args: (args[0] + 2.0, *args[1:])
        )
    for _ in range(3):
        _assert_same(*handles, lambda output: output.loss, inputs)


class _Own(nn.Module):
    """A model without a config of its own, whose head reads embeddings through a gate, too, if it
    is `gated`: one that is closed at first.
    """

    def __init__(self, *, gated=False, activation="gelu") -> None:
        super().__init__()
        torch.manual_seed(0)
        size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        free = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(
            vocab_size=97, num_hidden_layers=4, hidden_act=activation, **size, **free
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.gate = nn.Parameter(torch.zeros(16)) if gated else None
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        embedded = None if self.gate is None else self.bert.embeddings(input_ids)[:, 0]
        hidden = self.bert(input_ids, attention_mask).last_hidden_state[:, 0]
        return self.head(hidden if embedded is None else hidden + self.gate * embedded)


def test_a_gate_that_is_still_closed_is_found():
    handles = _pair(lambda: _Own(gated=True))
    optimizers = [torch.optim.SGD(handle.model.parameters(), lr=0.1) for handle in handles]
    for _ in range(4):
        _assert_same(*handles, lambda output: output.pow(2).sum(), _inputs())
        for optimizer in optimizers:
            optimizer.step()
    assert handles[0].model.gate.abs().min() > 0
    assert handles[0].cache_report().state == "bypassed"


def test_rows_that_another_function_left_on_disk_are_dropped(tmp_path):
    reports = []
    for activation in ("gelu", "gelu", "relu"):
        cache = PrefixCache(1 << 24, device="disk", path=tmp_path)
        handles = _pair(partial(_Own, activation=activation), cache=cache)
        for _ in range(3):
            _assert_same(*handles, lambda output: output.pow(2).sum(), _inputs())
        reports.append(handles[0].cache_report())
        handles[0].unpatch()
    assert [report.misses for report in reports[:2]] == [3, 0]  # the second run finds the rows
    assert "stored rows did not fit" in str(reports[2])
