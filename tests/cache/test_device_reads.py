"""What recognising the samples of a batch costs on a GPU: the host waits for it once a forward."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor

from progtuning_kernels import MilestoneSchedule, PrefixCache, patch_model
from progtuning_kernels.cache.content_keys import digest_rows, read_content
from progtuning_kernels.model.call import Call
from progtuning_kernels.model.host_copies import HostCopies

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64),
    torch.complex64,
)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(5).to(dtype)


def _arguments(mask: torch.dtype) -> dict[str, Any]:
    """Of three rows: one padded on the right, one on the left, one with a hole in its mask."""
    on = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    return {
        "input_ids": _numbers((3, 5), torch.int64),
        "attention_mask": on.to(mask),
        "token_type_ids": _numbers((3, 5), torch.int32),
        "position_ids": _numbers((5, 3), torch.int64).T,
        "labels": _numbers((3,), torch.int64),
        "start_positions": _numbers((3, 2), torch.int64),
        "num_items_in_batch": torch.tensor(7),
        "table": _numbers((2, 3), torch.float32).requires_grad_(),
        "nothing": torch.empty(3, 0),
        "scale": 0.5,
        **{f"{dtype}".removeprefix("torch."): _numbers((3, 3), dtype) for dtype in DTYPES},
    }


def _digest(call: Call) -> str:
    found = hashlib.sha256()
    for unpadded in (False, True):
        for consumed in ((), ("labels",)):
            rows = digest_rows(call, b"salt", unpadded=unpadded, consumed=consumed)
            found.update(b"".join(rows.digests) + repr(rows.spans).encode())
    return found.hexdigest()[:16]


# A folder of rows that an earlier run has written is read by these keys.
KEYS = {
    torch.bool: "7538c2eaa8d8b966",
    torch.int64: "32b8aff5e232dc2f",
    torch.float32: "1eb4a73b72c8a0df",
}


@pytest.mark.parametrize("mask", KEYS, ids=str)
@pytest.mark.parametrize("ahead", [False, True])
def test_keys_are_the_same_on_every_device_and_in_every_release(mask, ahead):
    arguments = _arguments(mask)
    assert _digest(Call((), (), arguments)) == KEYS[mask]
    with PretendCuda() as pretend:
        call = Call((), (), pretend.put(arguments))
        if ahead:
            read_content(call, {"labels"})
            assert pretend.lines("read").total() == 1
        assert _digest(call) == KEYS[mask]
        # what the caller does not read ahead, is read one by one
        assert (pretend.lines("read").total() == 1) == ahead


def test_a_batch_on_the_host_is_not_copied():
    with PretendCuda() as pretend:
        call = Call((), (), _arguments(torch.int64))
        read_content(call)
        _digest(call)
        assert not pretend.events
        ids = call.tensors["input_ids"]
        assert call.host.known(ids).data_ptr() == ids.data_ptr()


def test_a_tensor_that_is_written_into_is_read_again():
    with PretendCuda() as pretend:
        first, second = pretend.put([torch.tensor([1, 2]), torch.tensor([True])])
        host = HostCopies()
        host.read([first, second])
        first.add_(1)
        assert host.known(first) is None and host.known(second).tolist() == [True]
        assert host.of(first).tolist() == [2, 3]
        assert pretend.lines("read").total() == 2


def _mixed(batch: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first row of one batch and the rest of another."""
    return {k: torch.cat([v[:1], other[k][1:]]) if v.ndim else v for k, v in batch.items()}


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "t5-seq2seq-lm", "vit-image"])
def test_a_forward_reads_once(name, packing):
    with PretendCuda() as pretend:
        model = pretend.put(tiny_model(name))
        cache = PrefixCache(1 << 26)
        handle = patch_model(
            model, MilestoneSchedule({0: 2}), cache=cache, packing=packing, kernels="off"
        )
        batches = [pretend.put(tiny_inputs(name, seed=seed)) for seed in range(3)]
        missing, served = batches[1], batches[0]
        model(**batches[0]).loss.backward()  # which tries both
        # a backward looks once whether the loop reads padding, which packing has done by now
        looks = packing == "off" and name != "vit-image"
        for batch in (missing, served, _mixed(batches[2], served)):
            pretend.events.clear()
            model(**batch).loss.backward()
            assert pretend.lines("read", "ours").total() == 1 + looks
            looks = False
            assert not pretend.lines("pageable", "ours")
            if packing == "on":  # what transformers asks of a mask is answered from the copy
                assert not pretend.lines("read", "transformers")
        report = handle.cache_report()
    assert (report.hits, report.misses, report.bypasses) == (5, 7, {})


def test_a_model_that_is_not_served_is_asked_for_its_mask_alone(monkeypatch):
    read = []
    monkeypatch.setattr(HostCopies, "read", lambda self, tensors: read.append(list(tensors)))
    monkeypatch.setattr(HostCopies, "known", lambda self, tensor: tensor)
    model = tiny_model("bart-sequence")
    model.model.encoder.dropout = 0.5
    handle = patch_model(
        model, MilestoneSchedule({0: 2}), cache=PrefixCache(1 << 26), packing="off"
    )
    for seed in range(2):
        read.clear()
        inputs = tiny_inputs("bart-sequence", seed=seed)
        model(**inputs).loss.backward()
    assert "no fixed function" in handle.cache_report().reason
    assert [id(value) for values in read for value in values] == [id(inputs["attention_mask"])]


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_in_inference_mode_packs(cached):
    with PretendCuda() as pretend:
        model = pretend.put(tiny_model("bert-sequence"))
        cache = PrefixCache(1 << 26) if cached else None
        handle = patch_model(
            model, MilestoneSchedule({0: 2}), cache=cache, packing="on", kernels="off"
        )
        inputs = tiny_inputs("bert-sequence")
        model(**pretend.put(inputs)).loss.backward()
        before = handle.packing_report().batches
        model.eval()
        with torch.no_grad():
            expected = model(**inputs).logits
        with torch.inference_mode():
            copies = {name: value.clone() for name, value in inputs.items()}
            model(**copies)
            pretend.events.clear()
            assert torch.equal(model(**copies).logits, expected)
        assert handle.packing_report().batches == before + 3
        assert pretend.lines("read", "ours").total() == 1
