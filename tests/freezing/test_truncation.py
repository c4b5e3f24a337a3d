"""The report of the truncation: what it measures, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import BatchEncoding

from progtuning_kernels import MilestoneSchedule, TruncationError, patch_model


def test_report_before_a_forward_has_no_measurements():
    handle = patch_model(tiny_model("bert-sequence"), MilestoneSchedule({0: 2}))
    report = handle.truncation_report()
    assert report.saved_bytes is None and report.nodes is None
    assert sum(u.params for u in report.units) == sum(p.numel() for p in handle.model.parameters())
    assert sum(u.active for u in report.units) == handle.active_params
    with pytest.raises(TruncationError, match="run a forward"):
        report.assert_truncated()


def test_measuring_changes_neither_random_numbers_nor_gradients():
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
