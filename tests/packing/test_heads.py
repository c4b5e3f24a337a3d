"""Heads that see every token compute on kept ones alone, and give what they gave."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from proofs import FixedPlan
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from progtuning_kernels import FreezePlan, PatchHandle, patch_model
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.packing import heads
from progtuning_kernels.swaps.deferred_logits import DeferredLogits

HEADS = {
    "gpt2-causal-lm": "lm_head",
    "llama-causal-lm": "lm_head",
    "bert-masked-lm": "cls",
    "t5-seq2seq-lm": "lm_head",
}
GPT2, LLAMA, BERT, T5 = HEADS
COLUMNS = 11
RIGHT = ((0, 11), (0, 6), (0, 3), (0, 1))  # columns of each row's tokens: from, to
MIXED = ((0, 11), (0, 3), (7, 11), (5, 6))


def batch(name: str, spans: Sequence[tuple[int, int]] = MIXED, *, seed: int = 1) -> dict[str, Any]:
    """Labels count at every token, and T5's decoder has a mask of its own."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(spans), COLUMNS, dtype=torch.long)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = 1
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator) * mask
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == T5:
        columns = 9
        shorter = mask.flip(0)[:, :columns].clone()
        shorter[shorter.sum(1) == 0, 0] = 1
        labels = torch.randint(3, VOCABULARY, shorter.shape, generator=generator)
        inputs |= {"decoder_attention_mask": shorter, "decoder_input_ids": labels}
        return inputs | {"labels": labels.masked_fill(shorter == 0, -100)}
    return inputs | {"labels": ids.masked_fill(mask == 0, -100)}


def real_places(inputs: dict[str, Any]) -> Tensor:
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]) != 0


def patched(model: nn.Module, boundary: int = 0, **options: Any) -> PatchHandle:
    blocks = find_layout(model).num_blocks
    plan = FreezePlan.from_boundary(boundary, blocks, embeddings=boundary == 0)
    options = {"packing": "on", "kernels": "off", **options}
    return patch_model(model, FixedPlan(plan), **options)


class HeadRows(TorchDispatchMode):
    """Rows of the matrix products that give scores of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm") and found.shape[-1] == VOCABULARY:
            self.rows.append(found.shape[0])
        return found


def rows_of_head(model: nn.Module, inputs: dict[str, Any]) -> int:
    with HeadRows() as seen:
        model(**inputs)
    return seen.rows[-1]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, batches: Sequence[dict[str, Any]], boundary: int = 0) -> PatchHandle:
    """In fp64, which leaves no doubt: outputs at real tokens, loss, gradients; all batches before
    one backward.
    """
    model = model.double().train()
    plain = copy.deepcopy(model)
    handle, other = patched(model, boundary), patched(plain, boundary, packing="off")
    total, expected_total = 0.0, 0.0
    for inputs in batches:
        expected, found = plain(**inputs), model(**inputs)
        real = real_places(inputs)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            found.logits[real], expected.logits[real], rtol=1e-11, atol=1e-11
        )
        total, expected_total = total + found.loss, expected_total + expected.loss
    total.backward()
    expected_total.backward()
    assert gradients(model).keys() == gradients(plain).keys()
    for name, truth in gradients(plain).items():
        scale = truth.abs().max().clamp_min(1e-6)
        assert (gradients(model)[name] - truth).abs().max() <= 1e-10 * scale, name
    other.unpatch()
    return handle


@pytest.mark.parametrize("boundary", [0, 2, 4])
@pytest.mark.parametrize("name", HEADS)
def test_logits_loss_and_gradients_are_those_of_the_padded_model(name, boundary):
    handle = compare(tiny_model(name), [batch(name), batch(name, RIGHT, seed=2)], boundary)
    report = str(handle.packing_report())
    assert f"{HEADS[name]} too" in report and handle.packing_report().batches == 2, report


@pytest.mark.parametrize("name", HEADS)
def test_in_fp32_the_forward_is_the_same_to_the_bit(name):
    model, inputs = tiny_model(name), batch(name)
    plain = copy.deepcopy(model)
    patched(model).freezer.packer.groups = 1
    model(**inputs)
    expected, found, real = plain(**inputs), model(**inputs), real_places(inputs)
    # of matrix products with fewer rows, some sum in another order
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_computes_kept_tokens_alone(name):
    model, inputs = tiny_model(name), batch(name)
    real = real_places(inputs)
    assert rows_of_head(model, inputs) == real.numel()
    handle = patched(model)
    model(**inputs)
    assert int(real.sum()) <= rows_of_head(model, inputs) <= heads.MOST_REAL * real.numel()
    output = model(**inputs)
    assert output.logits.shape == (*real.shape, VOCABULARY)
    assert output.logits[real].any(1).all()
    assert output.logits.flatten(0, 1).any(1).sum() <= rows_of_head(model, inputs)  # the rest is 0
    handle.unpatch()
    assert rows_of_head(model, inputs) == real.numel()


def test_labels_at_padding_that_count_do_count():
    inputs = batch(LLAMA)
    inputs["labels"][1, 8] = 7  # the token before it predicts it
    handle = compare(tiny_model(LLAMA), [inputs])
    assert handle.packing_report().batches == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, COLUMNS), min_size=2, max_size=6), st.booleans())
def test_any_lengths(lengths, left):
    if sum(lengths) == COLUMNS * len(lengths):
        return
    spans = [(COLUMNS - n, COLUMNS) if left else (0, n) for n in lengths]
    model = tiny_model(LLAMA).double()
    plain = copy.deepcopy(model)
    patched(model)
    model(**{k: v for k, v in batch(LLAMA).items()})  # here packing is tried
    inputs = batch(LLAMA, spans)
    expected, found = plain(**inputs), model(**inputs)
    if inputs["labels"][:, 1:].ne(-100).any():
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    real = real_places(inputs)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-11, atol=1e-11)


def test_little_padding_is_not_worth_it():
    model = tiny_model(LLAMA)
    patched(model)
    model(**batch(LLAMA))
    full = batch(LLAMA, ((0, 11), (0, 10), (0, 9)))
    assert rows_of_head(model, full) == 33


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-token", "llama-sequence"])
def test_small_heads_are_left_alone(name):
    model, inputs = tiny_model(name), batch(name)
    labels = torch.zeros_like(inputs["labels"]) if name.endswith("token") else torch.arange(4) % 3
    handle = patched(model)
    model(**inputs | {"labels": labels})
    report = handle.packing_report()
    assert report.packs and "too" not in str(report)


def test_a_part_of_the_columns_is_left_alone():
    model, inputs = tiny_model(LLAMA).eval(), batch(LLAMA, RIGHT)
    del inputs["labels"]
    plain = copy.deepcopy(model)
    handle = patched(model)
    model(**inputs)
    for wanted in (1, 3):
        with torch.no_grad():
            found = model(**inputs, logits_to_keep=wanted, use_cache=False).logits
            expected = plain(**inputs, logits_to_keep=wanted, use_cache=False).logits
        assert found.shape == expected.shape == (4, wanted, VOCABULARY)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert handle.packing_report().batches == 2


def test_one_row_with_as_many_columns_wanted_as_it_has_tokens():
    model = tiny_model(LLAMA)
    plain = copy.deepcopy(model)
    patched(model)
    model(**batch(LLAMA))
    inputs = batch(LLAMA, ((5, 11),))
    del inputs["labels"]
    found, expected = model(**inputs, logits_to_keep=6), plain(**inputs, logits_to_keep=6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


class _KnowsPlaces(nn.Module):
    """Adds something to every column: a head that cannot run on (1, N, C)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.bias = nn.Parameter(torch.linspace(-1, 1, 64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) + self.bias[: hidden.shape[1], None]


def test_a_head_that_knows_places_stays_padded():
    model = tiny_model(BERT)
    model.cls = _KnowsPlaces(model.cls)
    handle = compare(model, [batch(BERT)])
    report = handle.packing_report()
    assert report.batches == 1 and "too" not in str(report)


def test_a_hook_of_others_sees_what_it_saw():
    model, inputs, seen = tiny_model(LLAMA), batch(LLAMA), []
    handle = patched(model)
    model(**inputs)
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    model(**inputs)
    assert seen == [(4, COLUMNS, 32)]
    assert f"not lm_head: a hook of {__name__}" in str(handle.packing_report())
    hook.remove()
    assert "lm_head too" in str(handle.packing_report())


def test_a_head_of_adapters():
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(LLAMA), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    handle = compare(model, [batch(LLAMA)])
    assert "lm_head too" in str(handle.packing_report())


def test_generation_is_as_before():
    model = tiny_model(LLAMA)
    inputs = batch(LLAMA, ((0, 11), (5, 11), (10, 11)))
    patched(model)
    model(**inputs)
    model.eval()
    del inputs["labels"]
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = tiny_model(LLAMA).eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


@contextmanager
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_shards():
    from torch.distributed.fsdp import fully_shard

    plain, inputs = tiny_model(LLAMA), batch(LLAMA)
    with _one_rank():
        model = tiny_model(LLAMA)
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module)
        handle = patched(model)
        model(**inputs).loss.backward()
        plain(**inputs).loss.backward()
        for name, truth in gradients(plain).items():
            found = gradients(model)[name].full_tensor()
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
        handle.unpatch()


def test_unpatching_leaves_no_hook():
    model = tiny_model(LLAMA)
    before = dict(model.lm_head.__dict__)
    handle = patched(model)
    model(**batch(LLAMA))
    assert model.lm_head._forward_hooks
    handle.unpatch()
    assert model.lm_head.__dict__.keys() == before.keys()
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def check_a_deferred_head_is_left_alone():
    config = tiny_model(LLAMA).config
    config.num_hidden_layers = 2  # the interpreter takes 6 ms a launch
    model = type(tiny_model(LLAMA))(config).train()
    plain, inputs = copy.deepcopy(model), batch(LLAMA, ((0, 11), (9, 11)))
    handle = patched(model, kernels="auto")
    assert "language-model head and loss" in {r.kind for r in handle.kernel_report().rows}
    output = model(**inputs)
    logits = output.logits
    assert isinstance(logits, DeferredLogits) and logits.shape == (2, COLUMNS, VOCABULARY)
    assert logits._logits is None  # nothing has computed them
    expected = plain(**inputs)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    output.loss.backward()
    expected.loss.backward()
    for name, truth in gradients(plain).items():
        scale = truth.abs().max().clamp_min(1e-3)
        assert (gradients(model)[name] - truth).abs().max() <= 1e-4 * scale, name
    report = handle.packing_report()
    assert report.batches == 1
    assert "not lm_head: its logits are computed where they are read" in str(report)
