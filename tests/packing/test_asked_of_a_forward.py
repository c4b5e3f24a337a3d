"""What a forward is given, and what it is asked for: packed where that is right, else padded with a
reason.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from packed_models import MIXED, batch_of, packed_forwards, patched, run
from tiny_models import T5, tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import MilestoneSchedule, PatchHandle, patch_model

BERT, LLAMA, GPT2 = "bert-sequence", "llama-causal-lm", "gpt2-causal-lm"
CLOSE = dict(rtol=1e-5, atol=1e-5)


def twins(name: str) -> tuple[PatchHandle, PatchHandle]:
    """Two handles of the same model, packed and padded, after one step of training's forward."""
    handles = []
    for packing in ("on", "off"):
        handle = patch_model(tiny_model(name), MilestoneSchedule({0: 1}), packing=packing)
        handle.model(**tiny_inputs(name)).loss.backward()
        handle.model.zero_grad()
        handles.append(handle)
    assert handles[0].packing_report().batches == 1, handles[0].packing_report()
    return handles[0], handles[1]


def outputs(handle: PatchHandle, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits at real tokens, and gradients where the forward trains."""
    handle.model.zero_grad()
    output = handle.model(**inputs)
    logits, mask = output.logits, inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and logits.shape[:2] == mask.shape:
        logits = logits[mask != 0]
    if logits.requires_grad:
        output.loss.backward()
    named = handle.model.named_parameters()
    return logits.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(packed: PatchHandle, padded: PatchHandle, **inputs: Any) -> None:
    (logits, gradients), (other, others) = (outputs(h, **inputs) for h in (packed, padded))
    torch.testing.assert_close(logits, other, **CLOSE)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], **CLOSE)


def last_reason(handle: PatchHandle) -> str:
    return str(handle.packing_report())


@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_evaluation(name):
    packed, padded = twins(name)
    for handle in (packed, padded):
        handle.model.eval()
    with torch.no_grad():
        assert_same(packed, padded, **tiny_inputs(name, seed=3), use_cache=False)
    assert packed.packing_report().batches == 2
    for handle in (packed, padded):
        handle.model.train()
    assert_same(packed, padded, **tiny_inputs(name, seed=4))
    assert packed.packing_report().batches == 3


@pytest.mark.parametrize("name", [GPT2, LLAMA, "t5-seq2seq-lm", "bart-seq2seq-lm"])
def test_generation_in_between(name):
    packed, padded = twins(name)
    inputs = {k: v for k, v in tiny_inputs(name, seed=3).items() if k != "labels"}
    found = []
    for handle in (packed, padded):
        handle.model.eval()
        found.append(
            handle.model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=1)
        )
        handle.model.train()
    assert torch.equal(*found)
    print(packed.packing_report())
    assert_same(packed, padded, **tiny_inputs(name, seed=4))


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_what_all_blocks_hold_is_not_packed(name, wanted, in_config):
    packed, padded = twins(name)
    for handle in (packed, padded):
        handle.model.set_attn_implementation("eager")
    inputs = tiny_inputs(name, seed=3)
    if in_config:
        for handle in (packed, padded):
            setattr(handle.model.config, wanted, True)
    else:
        inputs[wanted] = True
    key = wanted.removeprefix("output_")
    a, b = packed.model(**inputs)[key], padded.model(**inputs)[key]
    assert len(a) == len(b) >= 4
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert_same(packed, padded, **inputs)
    assert packed.packing_report().batches == 1
    assert wanted in last_reason(packed)


MASKS = {
    "bool": lambda mask: mask.bool(),
    "float": lambda mask: mask.float(),
    "int32": lambda mask: mask.int(),
    "left": lambda mask: mask.flip(1),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", [BERT, LLAMA, GPT2])
def test_masks(name, kind):
    packed, padded = twins(name)
    inputs = tiny_inputs(name, seed=3)
    inputs["attention_mask"] = MASKS[kind](inputs["attention_mask"])
    if kind == "left":
        inputs["input_ids"] = inputs["input_ids"].flip(1)
        if name != BERT:
            inputs["labels"] = inputs["labels"].flip(1)
    assert_same(packed, padded, **inputs)
    assert packed.packing_report().batches == 2, packed.packing_report()


@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_masks_that_do_not_say_which_tokens_are_real(name):
    packed, padded = twins(name)
    inputs = tiny_inputs(name, seed=3)
    mask = inputs["attention_mask"]
    real = mask[:, None, None, :].bool()
    if name == LLAMA:
        length = mask.shape[1]
        real = real & torch.ones(length, length).tril().bool()
    inputs["attention_mask"] = real.expand(-1, -1, mask.shape[1], -1)
    assert_same(packed, padded, **inputs)
    del inputs["attention_mask"]
    assert_same(packed, padded, **inputs)
    print(packed.packing_report())
    assert packed.packing_report().batches == 1
    assert "no attention_mask of shape (B, T) was passed" in last_reason(packed)


@pytest.mark.parametrize("name", [BERT, LLAMA, GPT2])
def test_positions_and_vectors_of_the_users(name):
    packed, padded = twins(name)
    inputs = tiny_inputs(name, seed=3)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) + 2).clamp(max=20)
    assert_same(packed, padded, **inputs, position_ids=positions)
    vectors = packed.model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_same(packed, padded, **inputs, inputs_embeds=vectors)
    assert packed.packing_report().batches == 3, packed.packing_report()


def _block(model: nn.Module) -> nn.Module:
    inner = model.get_decoder() if hasattr(model, "model") else model.bert.encoder
    return inner.layers[1] if hasattr(inner, "layers") else inner.layer[1]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_the_users_see_padded_tensors(inside, before):
    packed, padded = twins(BERT)
    shapes = []
    for handle in (packed, padded):
        block = _block(handle.model)
        module = block.intermediate.dense if inside else block
        if before:
            module.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
        else:
            module.register_forward_hook(lambda m, args, output: shapes.append(args[0].shape))
    assert_same(packed, padded, **tiny_inputs(BERT, seed=3))
    assert packed.packing_report().batches == 1
    assert set(shapes) == {(3, 11, 32)}
    assert "a hook of" in last_reason(packed)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_users_see_padded_gradients(kind):
    packed, padded = twins(BERT)
    shapes = []
    for handle in (packed, padded):
        module = _block(handle.model).intermediate.dense
        getattr(module, kind)(lambda m, *gradients: shapes.append(gradients[-1][0].shape))
    assert_same(packed, padded, **tiny_inputs(BERT, seed=3))
    assert set(shapes) == {(3, 11, 48)}
    assert "a hook of" in last_reason(packed)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [BERT, LLAMA, GPT2])
def test_attention_is_switched_after_the_first_forward(name, implementation):
    packed, padded = twins(name)
    for handle in (packed, padded):
        handle.model.set_attn_implementation(implementation)
    assert_same(packed, padded, **tiny_inputs(name, seed=3))
    assert packed.packing_report().batches == 2, packed.packing_report()
    assert packed.model.config._attn_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_the_model_gets_another_dtype(name, dtype):
    packed, padded = twins(name)
    for handle in (packed, padded):
        handle.model.to(dtype)
    inputs = tiny_inputs(name, seed=3)
    (logits, _), (expected, _) = (outputs(h, **inputs) for h in (packed, padded))
    close = CLOSE if dtype is torch.float64 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logits, expected, **close)
    assert packed.packing_report().batches == 2


def test_embeddings_are_resized_after_the_first_forward():
    packed, padded = twins(LLAMA)
    for handle in (packed, padded):
        torch.manual_seed(5)
        handle.model.resize_token_embeddings(130)
    inputs = tiny_inputs(LLAMA, seed=3)
    inputs["input_ids"][0, :4] = 120
    assert_same(packed, padded, **inputs)
    assert packed.packing_report().batches == 2, packed.packing_report()


def test_a_layer_is_replaced_after_the_first_forward():
    packed, padded = twins(BERT)
    for handle in (packed, padded):
        block = _block(handle.model)
        torch.manual_seed(5)
        block.intermediate.dense = nn.Linear(32, 24)
        block.output.dense = nn.Linear(24, 32)
    assert_same(packed, padded, **tiny_inputs(BERT, seed=3))
    assert packed.packing_report().batches == 2, packed.packing_report()


@pytest.mark.parametrize("name", [BERT, LLAMA, "mpnet-sequence"])
def test_a_copy_is_an_ordinary_model(name):
    packed, padded = twins(name)
    inputs = tiny_inputs(name, seed=3)
    made = copy.deepcopy(packed.model)
    assert not any("progtuning" in str(v) for m in made.modules() for v in vars(m).values())
    expected = padded.model(**inputs)
    torch.testing.assert_close(made(**inputs).loss, expected.loss, **CLOSE)


def test_arguments_of_which_no_trial_can_be_made_train_padded(monkeypatch):
    def fails(*_: Any) -> None:
        raise IndexError("an odd batch")

    monkeypatch.setattr("progtuning_kernels.packing.packer.trial_calls", fails)
    handle = patch_model(tiny_model(BERT), MilestoneSchedule({0: 1}), packing="on")
    handle.model(**tiny_inputs(BERT)).loss.backward()
    assert "no trial can be made of its arguments: IndexError" in str(handle.packing_report())
    monkeypatch.undo()
    handle.model(**tiny_inputs(BERT)).loss.backward()
    assert handle.packing_report().batches == 1


def test_layerdrop_may_leave_out_the_block_that_unpacks():
    name = "bart-seq2seq-lm"
    model, padded = tiny_model(name), tiny_model(name)
    handle = patched(model)
    batch = batch_of(name, MIXED)
    run(model, batch)
    assert packed_forwards(handle) == 1
    for one in (model, padded):
        one.train()
        one.model.decoder.layerdrop = 0.5
    for seed in range(4):  # the last block is left out in some
        torch.manual_seed(seed)
        found = run(model, batch)
        torch.manual_seed(seed)
        expected = run(padded, batch)
        assert found.gradients.keys() == expected.gradients.keys()
        assert torch.equal(found.loss, expected.loss)
    assert packed_forwards(handle) == 1
    assert "layerdrop of model.decoder" in str(handle.packing_report())


def test_experts_that_take_no_more_tokens_than_their_capacity():
    config = hf.SwitchTransformersConfig(
        **T5,
        num_experts=2,
        expert_capacity=24,
        router_jitter_noise=0.0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    torch.manual_seed(0)
    model = hf.SwitchTransformersForConditionalGeneration(config).train()
    padded = copy.deepcopy(model)
    handle = patched(model)
    # more tokens in all than two experts take, and fewer in a row
    batch = batch_of("t5-seq2seq-lm", [(0, 20), (0, 15), (0, 18), (0, 12)], columns=20)
    found, expected = run(model, batch), run(padded, batch)
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())
    assert "Router leaves tokens out" in str(handle.packing_report())


@pytest.mark.parametrize("value", [True, False, None, "On", ""])
def test_other_values_of_packing_are_refused(value):
    model = tiny_model("bert-sequence")
    with pytest.raises(ValueError, match="packing must be one of 'auto', 'on', 'off'"):
        patch_model(model, MilestoneSchedule({0: 0}), packing=value)
    patch_model(model, MilestoneSchedule({0: 0}), packing="off")  # nothing was left behind


def test_labels_that_count_at_padding_are_named_and_the_cure_packs():
    model, inputs = tiny_model("gpt2-causal-lm"), tiny_inputs("gpt2-causal-lm")
    handle = patch_model(model, MilestoneSchedule({0: 0}))
    model(**{**inputs, "labels": inputs["input_ids"]})
    assert [*handle.packing_report().padded] == [
        "labels count at all padding: set them to -100 there"
    ]
    model(**inputs)  # whose labels are -100 there
    assert handle.packing_report().batches == 1


def test_the_report_says_what_was_packed_after_unpatching():
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 0}))
    model(**inputs)
    before = handle.packing_report()
    handle.unpatch()
    assert before.stacks == handle.packing_report().stacks
    assert before.stacks["bert.encoder.layer"].startswith("packed")
