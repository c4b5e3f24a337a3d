"""What users do around training: mixed precision, compile, modes, generation, other outputs."""

from __future__ import annotations

import pytest
import torch
from proofs import frozen_by_hand, gradients
from tiny_models import GENERATING, IN_EVERY_MODE, tiny_inputs, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, ProgressiveSchedule, patch_model
from progtuning_kernels.model.layout import find_layout

pytestmark = pytest.mark.usefixtures("padded")  # bits are compared

STAGES = ProgressiveSchedule(4, 4)


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IN_EVERY_MODE)
def test_autocast(name, dtype):
    inputs, model = tiny_inputs(name), tiny_model(name)
    handle = patch_model(model, STAGES)
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype):
            expected = frozen_by_hand(tiny_model(name), handle.plan, inputs)
            _equal(gradients(model, inputs), expected)
        report = handle.truncation_report()  # repeats the forward under the same autocast
        report.assert_truncated()
        assert report.boundary == handle.boundary
        handle.advance()


@pytest.mark.parametrize("optimizer_class", [MaskedAdamW, torch.optim.AdamW])
def test_fp16_with_a_gradient_scaler_trains_every_stage(optimizer_class):
    inputs, model = tiny_inputs("bert-sequence"), tiny_model("bert-sequence")
    handle = patch_model(model, ProgressiveSchedule(4, 8))
    optimizer = optimizer_class(handle.param_groups(lr=1e-2, weight_decay=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    skipped = 0
    for step in range(8):
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        scale = scaler.get_scale()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = model.classifier.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert torch.equal(model.classifier.weight, before)
        else:
            assert not torch.equal(model.classifier.weight, before)
        assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
        optimizer.zero_grad()
        handle.advance()
        assert step or skipped == 1  # the scale was chosen to overflow once at least
    assert 0 < skipped < 8


@pytest.mark.parametrize("name", IN_EVERY_MODE)
def test_pure_bf16(name):
    inputs, model = tiny_inputs(name), tiny_model(name).bfloat16()
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].bfloat16()
    handle = patch_model(model, STAGES)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2, weight_decay=0.1))
    for _ in range(4):
        twin = tiny_model(name).bfloat16()
        twin.load_state_dict(model.state_dict())
        _equal(gradients(model, inputs), frozen_by_hand(twin, handle.plan, inputs))
        handle.truncation_report().assert_truncated()
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer.step()
        assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
        handle.advance()


@pytest.mark.filterwarnings("error:Dynamo does not know")
@pytest.mark.parametrize("compiled", ["before patching", "after patching"])
@pytest.mark.parametrize("name", ["llama-causal-lm", "vit-image"])
def test_blocks_compiled_one_by_one_need_three_graphs_for_all_stages(name, compiled):
    torch._dynamo.reset()
    counter = CompileCounter()
    inputs, model = tiny_inputs(name), tiny_model(name)
    if name == "llama-causal-lm":
        inputs["use_cache"] = False  # keys and values make one graph a block
    blocks = [model.get_submodule(path) for path in find_layout(model).block_paths]
    if compiled == "before patching":
        for block in blocks:
            block.compile(backend=counter)
    handle = patch_model(model, ProgressiveSchedule(4, 4, embeddings="never"))
    if compiled == "after patching":
        for block in blocks:
            block.compile(backend=counter)
    counts, hooks = [], []
    model.register_forward_pre_hook(
        lambda *_: hooks.extend(len(b._forward_pre_hooks) for b in blocks)
    )
    for step in (0, 1, 2, 3, 1, 0, 3):
        handle.seek(step)
        expected = frozen_by_hand(tiny_model(name), handle.plan, inputs)
        for _ in range(2):  # the first forward under a plan is the one that is watched
            _equal(gradients(model, inputs), expected)
        counts.append(counter.frame_count)
        assert not any(hooks), "a hook would be compiled into the graph, and stay there"
        handle.truncation_report().assert_truncated()
        hooks.clear()  # the report runs eagerly, with hooks
        assert counter.frame_count == counts[-1]
    assert counts == [2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("name", GENERATING)
def test_generation_between_stages_changes_nothing(name):
    inputs, model = tiny_inputs(name), tiny_model(name)
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    if name == "whisper-speech-lm":
        prompt = {"input_features": inputs["input_features"], "attention_mask": torch.ones(3, 16)}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    handle = patch_model(model, STAGES)
    for _ in range(4):
        expected = frozen_by_hand(tiny_model(name), handle.plan, inputs)
        _equal(gradients(model, inputs), expected)
        model.eval()
        written = [m.generate(**prompt, **options) for m in (model, tiny_model(name).eval())]
        assert torch.equal(*written)
        model.train()
        _equal(gradients(model, inputs), expected)
        handle.truncation_report().assert_truncated()
        handle.advance()


def test_train_and_eval_reach_what_is_not_frozen():
    model = tiny_model("t5-seq2seq-lm")
    handle = patch_model(model, MilestoneSchedule({0: 3}))
    for mode in (False, True, False, True):
        model.train(mode)
        modes = [model.get_submodule(p).training for p in handle.layout.block_paths]
        assert modes == [False, False, False, mode]
        assert not model.encoder.final_layer_norm.training
        assert model.decoder.final_layer_norm.training == model.lm_head.training == mode


@pytest.mark.parametrize("name", IN_EVERY_MODE)
def test_all_hidden_states_and_caches_do_not_bring_the_graph_back(name):
    inputs, model = tiny_inputs(name), tiny_model(name)
    inputs |= {"output_hidden_states": True}
    if name != "bert-sequence":
        inputs |= {"use_cache": True}
    handle = patch_model(model, MilestoneSchedule({0: 3}))
    outputs = model(**inputs)
    if "seq2seq" in name or "speech" in name:
        states = [*outputs.encoder_hidden_states, *outputs.decoder_hidden_states]
        assert [h.requires_grad for h in states] == [False] * 3 + [False] * 2 + [True]
    else:
        assert [h.requires_grad for h in outputs.hidden_states] == [False] * 4 + [True]
    _equal(gradients(model, inputs), frozen_by_hand(tiny_model(name), handle.plan, inputs))
    handle.truncation_report().assert_truncated()


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "llama-causal-lm"])
def test_inputs_embeds(name):
    model = tiny_model(name)

    def inputs(of: nn.Module) -> dict:
        given = tiny_inputs(name)
        embedded = of.get_input_embeddings()(given.pop("input_ids")).detach()
        return given | {"inputs_embeds": embedded}

    handle = patch_model(model, STAGES)
    for _ in range(4):
        twin = tiny_model(name)
        _equal(gradients(model, inputs(model)), frozen_by_hand(twin, handle.plan, inputs(twin)))
        handle.truncation_report().assert_truncated()
        handle.advance()


def test_a_model_loaded_with_a_device_map(tmp_path):
    name = "llama-causal-lm"
    tiny_model(name).save_pretrained(tmp_path)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where).train()
        for where in ("cpu", None)
    ]
    handle = patch_model(loaded[0], MilestoneSchedule({0: 2}))
    inputs = tiny_inputs(name)
    _equal(gradients(loaded[0], inputs), frozen_by_hand(loaded[1], handle.plan, inputs))
    handle.truncation_report().assert_truncated()
