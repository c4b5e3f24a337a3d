"""A packed forward reads no more values from a GPU than a padded one.

There is none here: CPU tensors stand for those of a GPU, and `HostReads` tells them from tensors of
the host, which are copies made by `cpu()` or of arrays, and what is made of these.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from proofs import FixedPlan
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from progtuning_kernels import FreezePlan, patch_model
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.packing import packer, tokens
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


_on_host: dict[int, Tensor] = {}  # by the address of their memory, which they keep


def _is_host(value: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return value.untyped_storage().data_ptr() in _on_host


def _mark(value: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        _on_host[value.untyped_storage().data_ptr()] = value
    return value


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]


class HostReads(TorchFunctionMode):
    """Lines that wait for a value of a tensor that is not of the host, with their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self._below = _Below(self)

    def __enter__(self) -> HostReads:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def note(self) -> None:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.lines[f"{frame.f_code.co_filename}:{frame.f_lineno}"] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cpu and not _is_host(args[0]):
            self.note()
            return _mark(func(*args, **kwargs).clone())  # else it is the tensor itself
        assert func is not Tensor.numpy or _is_host(args[0])
        return func(*args, **kwargs)


class _Below(TorchDispatchMode):
    """What reads below the functions of Python."""

    _READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if (name in self._READS or by_mask) and not _is_host(args[0]):
            self._reads.note()
        found = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        if given and all(map(_is_host, given)):
            for made in _tensors(found):
                _mark(made)
        return found


@pytest.fixture(autouse=True)
def _everything_is_far(monkeypatch):
    for module in (packer, tokens):
        monkeypatch.setattr(module, "waits_for", lambda device: True)


def _reads(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    with HostReads() as reads:
        model(**inputs).loss.backward()
    _on_host.clear()
    return reads.lines


def _reads_of_both(name: str, model: nn.Module, packing: str) -> tuple[Counter[str], Counter[str]]:
    """Lines of a padded step, and of a packed one."""
    inputs = tiny_inputs(name)
    found = []
    for mode in ("off", packing):
        plan = FreezePlan.from_boundary(0, find_layout(model).num_blocks, embeddings=True)
        with patch_model(model, FixedPlan(plan), packing=mode, kernels="off") as handle:
            model(**inputs).loss.backward()  # here packing is tried
            found.append(_reads(model, inputs))
            report = handle.packing_report()
    assert report.batches == 2, report
    return found[0], found[1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_packed_step_reads_no_more_than_a_padded_one(name):
    padded, packed = _reads_of_both(name, tiny_model(name), "on")
    assert packed.total() <= padded.total(), (padded, packed)


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "t5-seq2seq-lm"])
def test_it_reads_once(name):
    _, packed = _reads_of_both(name, tiny_model(name), "on")
    assert packed.total() == 1, packed


def test_the_padded_model_reads_where_the_mask_is_not_known():
    padded, _ = _reads_of_both("bert-sequence", tiny_model("bert-sequence"), "on")
    assert padded.total() == 1
    assert "masking_utils" in next(iter(padded))


def test_a_full_batch_is_read_once():
    name = "bert-sequence"
    model, inputs = tiny_model(name), tiny_inputs(name)
    with patch_model(model, FixedPlan(FreezePlan.from_boundary(0, 4, embeddings=True))) as handle:
        model(**inputs).loss.backward()
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        assert _reads(model, inputs).total() == 1
        assert handle.packing_report().padded == {"the batch has no padding": 1}


def test_a_model_that_asks_no_mask_pays_one_read():
    config = MODELS["llama-causal-lm"]().config
    config._attn_implementation = "eager"
    model = type(MODELS["llama-causal-lm"]())(config)
    padded, packed = _reads_of_both("llama-causal-lm", model, "on")
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
def test_a_known_mask_answers_from_the_host(ask):
    mask, known = _known()
    _mark(known._on)
    with HostReads() as reads:
        bool(ask(known))
    assert not reads.lines
    with HostReads() as reads:
        bool(ask(mask))
    assert reads.lines


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


def test_a_dict_of_the_caller_gets_its_mask_back():
    class OfDicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("bert-sequence")

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            self.seen = type(features["attention_mask"])
            features["logits"] = self.inner(**features).logits
            return features

    model, inputs = OfDicts().train(), tiny_inputs("bert-sequence")
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
