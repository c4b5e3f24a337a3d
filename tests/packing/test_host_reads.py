"""A packed forward reads no more values from a GPU than a padded one; see pretend_cuda.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda
from proofs import FixedPlan
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from progtuning_kernels import FreezePlan, patch_model
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.packing import packer
from progtuning_kernels.packing.known_mask import KnownMask, known_mask

SEQUENCES = [
    "bert-sequence",
    "roberta-token",
    "distilbert-sequence",
    "gpt2-causal-lm",
    "llama-causal-lm",
    "modernbert-sequence",
    "opt-causal-lm",
    "bart-sequence",
    "t5-seq2seq-lm",
]


@pytest.fixture(autouse=True)
def pretend():
    with PretendCuda() as pretend:
        yield pretend


def _reads(pretend: PretendCuda, model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    pretend.events.clear()
    model(**inputs).loss.backward()
    return pretend.lines("read")


def _reads_of_both(
    pretend: PretendCuda, name: str, model: nn.Module, packing: str
) -> tuple[Counter[str], Counter[str]]:
    """Lines of a padded step, and of a packed one."""
    model, inputs = pretend.put(model), pretend.put(tiny_inputs(name))
    found = []
    for mode in ("off", packing):
        plan = FreezePlan.from_boundary(0, find_layout(model).num_blocks, embeddings=True)
        with patch_model(model, FixedPlan(plan), packing=mode, kernels="off") as handle:
            model(**inputs).loss.backward()  # here packing is tried
            found.append(_reads(pretend, model, inputs))
            report = handle.packing_report()
    assert report.batches == 2, report
    return found[0], found[1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_packed_step_reads_no_more_than_a_padded_one(pretend, name):
    padded, packed = _reads_of_both(pretend, name, tiny_model(name), "on")
    assert packed.total() <= padded.total(), (padded, packed)


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "t5-seq2seq-lm"])
def test_it_reads_once(pretend, name):
    _, packed = _reads_of_both(pretend, name, tiny_model(name), "on")
    assert packed.total() == 1, packed


def test_the_padded_model_reads_where_the_mask_is_not_known(pretend):
    padded, _ = _reads_of_both(pretend, "bert-sequence", tiny_model("bert-sequence"), "on")
    assert padded.total() == 1
    assert "masking_utils" in next(iter(padded))


def test_a_full_batch_is_read_once(pretend):
    name = "bert-sequence"
    model, inputs = pretend.put(tiny_model(name)), pretend.put(tiny_inputs(name))
    plan = FreezePlan.from_boundary(0, 4, embeddings=True)
    with patch_model(model, FixedPlan(plan), kernels="off") as handle:
        model(**inputs).loss.backward()
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        assert _reads(pretend, model, inputs).total() == 1
        assert handle.packing_report().padded == {"the batch has no padding": 1}


def test_a_model_that_asks_no_mask_pays_one_read(pretend):
    config = MODELS["llama-causal-lm"]().config
    config._attn_implementation = "eager"
    model = type(MODELS["llama-causal-lm"]())(config)
    padded, packed = _reads_of_both(pretend, "llama-causal-lm", model, "on")
    assert (padded.total(), packed.total()) == (0, 1)


def test_attention_that_may_read_lengths_runs_once_a_block(monkeypatch):
    calls = []

    def attention(module: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(module)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **options)

    AttentionInterface.register("sdpa_by_another_name", attention)
    AttentionMaskInterface.register("sdpa_by_another_name", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setattr(packer, "cost_of_group", lambda device, heads: 0.0)
    name = "bert-sequence"
    for implementation, times in (("sdpa", 0), ("sdpa_by_another_name", 4)):
        model, inputs = tiny_model(name), tiny_inputs(name)
        model.set_attn_implementation(implementation)
        plan = FreezePlan.from_boundary(0, 4, embeddings=True)
        with patch_model(model, FixedPlan(plan), packing="on") as handle:
            model(**inputs)
            calls.clear()
            model(**inputs)
            assert handle.packing_report().batches == 2
        assert len(calls) == times


def _known() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 0, 0], [1, 2, 1, 1]])
    return mask, known_mask(mask, (mask != 0).clone())


ASKED = [
    lambda m: m.all(),
    lambda m: m.any(),
    lambda m: m.to(torch.bool).all(),
    lambda m: m.to(device=m.device, dtype=torch.bool).sum() == 5,
    lambda m: m.bool()[:, :2].sum(),
    lambda m: (~m.bool()[:, 2:]).sum(),
    lambda m: (~m.bool()[1:]).any(),
    lambda m: m.view(4, -1)[:1].all(),
    lambda m: m.reshape((-1,)).all(),
    lambda m: torch.all(m != 0),
    lambda m: (m == 0).any(),
    lambda m: 0 in m,
]
NOT_KNOWN = [
    lambda m: m.sum(),
    lambda m: m.sum(1),
    lambda m: m.all(1),
    lambda m: m.all(dim=0),
    lambda m: (m == 1).all(),
    lambda m: 2 in m,
    lambda m: (1.0 - m.to(torch.float32)).sum(),
    lambda m: m[:, torch.tensor([0, 3])],
    lambda m: m.cumsum(1),
    lambda m: m.view(torch.int32),
    lambda m: ~m,
    lambda m: m.to(torch.uint8).sum(),
]


@pytest.mark.parametrize("ask", ASKED + NOT_KNOWN)
def test_a_known_mask_answers_what_the_mask_would(ask):
    mask, known = _known()
    expected, found = torch.as_tensor(ask(mask)), torch.as_tensor(ask(known))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


@pytest.mark.parametrize("ask", ASKED)
def test_a_known_mask_answers_from_the_host(pretend, ask):
    mask, known = _known()
    pretend.put(mask)
    bool(ask(known))
    assert not pretend.events
    bool(ask(mask))
    assert pretend.lines("read")


def test_a_mask_that_was_written_into_is_asked_itself():
    mask, known = _known()
    mask[0] = 1
    assert bool(known.all())
    mask, known = _known()
    known.zero_()
    assert not known.any() and not known.bool().any() and 0 in known


def test_what_is_computed_with_a_known_mask_is_plain():
    _, known = _known()
    for made in (known + 1, known[:, None], known.float(), known.unsqueeze(1) * 2.0):
        assert type(made) is Tensor
    assert type(known.bool()) is KnownMask


def test_a_dict_of_the_caller_gets_its_mask_back(pretend):
    class OfDicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("bert-sequence")

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            self.seen = type(features["attention_mask"])
            features["logits"] = self.inner(**features).logits
            return features

    model, inputs = pretend.put(OfDicts().train()), pretend.put(tiny_inputs("bert-sequence"))
    del inputs["labels"]
    plan = FreezePlan.from_boundary(0, 4, embeddings=True)
    with patch_model(model, FixedPlan(plan), packing="on") as handle:
        for _ in range(2):
            features = dict(inputs)
            model(features)
        assert handle.packing_report().batches == 2, handle.packing_report()
    assert model.seen is KnownMask
    assert features["attention_mask"] is inputs["attention_mask"]
    assert "logits" in features
