"""Packing leaves no trace: in a model that is put back, in copies of one, in what is saved."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
import transformers as hf
from packed_models import MIXED, RIGHT, batch_of, packed_forwards, patched, run
from proofs import enable_checkpointing
from tiny_models import tiny_model
from torch import nn

NAMES = [
    "bert-sequence",
    "llama-causal-lm",
    "t5-seq2seq-lm",
    "mpnet-sequence",
    "qwen2-moe-causal-lm",
]


def _snapshot(model):
    """Class, attributes, hooks and parts of every module, by object where they are objects."""
    found = {}
    for name, module in model.named_modules():
        own = dict(vars(module))
        for key in ("_require_grads_hook", "_require_grads_hooks"):
            own.pop(key, None)  # transformers makes them anew with its checkpointing
        for key in ("_modules", "_parameters", "_buffers"):
            own[key] = dict(own[key])
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            own[key] = [getattr(hook, "__qualname__", hook) for hook in own[key].values()]
        found[name] = type(module), own
    return found


def _assert_as_found(before, after):
    assert before.keys() == after.keys()
    for name, (cls, own) in before.items():
        assert after[name][0] is cls, name
        assert after[name][1].keys() == own.keys(), name
        for key, value in own.items():
            found = after[name][1][key]
            assert found is value or found == value, (name, key)


@pytest.mark.parametrize(
    "mode", ["train", "eval", "checkpointed", "eager", "never run", "autocast"]
)
@pytest.mark.parametrize("name", NAMES)
def test_unpatch_leaves_everything_as_found(name, mode):
    model = tiny_model(name)
    if mode == "checkpointed":
        if name.startswith("mpnet"):
            pytest.skip("MPNet has no gradient checkpointing")
        enable_checkpointing(model)
    if mode == "eager":
        model.set_attn_implementation("eager")
    batch = batch_of(name, RIGHT)
    run(model, batch)  # transformers leaves traces of its own in the first forward
    model.zero_grad()
    before = _snapshot(model)
    handle = patched(model, 1)
    if mode != "never run":
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            run(model, batch)
            if mode == "eval":
                with torch.no_grad():
                    model.eval()(**batch)
                model.train()
        assert packed_forwards(handle)
    handle.unpatch()
    model.zero_grad()
    _assert_as_found(before, _snapshot(model))


@pytest.mark.parametrize("name", NAMES)
def test_after_a_trial_that_says_no(name):
    model = tiny_model(name)
    batch = batch_of(name, RIGHT)
    run(model, batch)
    before = _snapshot(model)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]

    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e-3 * torch.rand(x.shape[0], *[1] * (x.ndim - 1))

    # the last is beside the attention, which could run padded with all that it draws
    *_, linear = (m for m in block.modules() if isinstance(m, nn.Linear))
    linear.__class__ = Draws
    handle = patched(model)
    run(model, batch)
    assert not packed_forwards(handle)
    handle.unpatch()
    linear.__class__ = nn.Linear
    _assert_as_found(before, _snapshot(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_an_ordinary_model(name, how):
    model, padded = tiny_model(name), tiny_model(name)
    handle = patched(model)
    batch = batch_of(name, RIGHT)
    run(model, batch)
    assert packed_forwards(handle) == 1
    if how == "deepcopy":
        made = copy.deepcopy(model)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    classes = {n: type(m) for n, m in padded.named_modules()}
    assert {n: type(m) for n, m in made.named_modules()} == classes
    assert all("progtuning" not in repr(type(v)) for m in made.modules() for v in vars(m).values())
    other = batch_of(name, MIXED, seed=5)
    found, expected = run(made, other), run(padded, other)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())
    # and the model that was copied packs on
    run(model, other)
    assert packed_forwards(handle) == 2
    # a copy can be patched by itself
    again = patched(made)
    run(made, other)
    assert packed_forwards(again) == 1


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_what_is_saved_is_that_of_an_unpatched_model(name, tmp_path):
    model, padded = tiny_model(name), tiny_model(name)
    patched(model)
    run(model, batch_of(name, RIGHT))
    run(padded, batch_of(name, RIGHT))
    for folder, each in (("packed", model), ("padded", padded)):
        each.save_pretrained(tmp_path / folder)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("packed", "padded")]
    assert configs[0] == configs[1]
    weights = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("packed", "padded")]
    assert weights[0] == weights[1]
    assert model.state_dict().keys() == padded.state_dict().keys()
    made = type(model).from_pretrained(tmp_path / "packed")
    batch = batch_of(name, MIXED)
    with torch.no_grad():
        assert torch.equal(made(**batch).logits, padded.eval()(**batch).logits)


def test_no_class_or_module_of_transformers_is_touched():
    from transformers.models.bert import modeling_bert

    before = dict(vars(modeling_bert))
    members = {n: dict(vars(c)) for n, c in before.items() if isinstance(c, type)}
    model = tiny_model("bert-sequence")
    handle = patched(model)
    run(model, batch_of("bert-sequence", RIGHT))
    assert dict(vars(modeling_bert)) == before
    for name, own in members.items():
        assert dict(vars(getattr(modeling_bert, name))) == own
    assert packed_forwards(handle)
    # another model of the same classes, and one made meanwhile, run padded
    other = hf.BertModel(hf.BertConfig(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    seen = []
    hook = other.encoder.layer[0].register_forward_hook(lambda m, a, out: seen.append(out))
    batch = batch_of("bert-sequence", RIGHT)
    other(batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    hidden = seen[0] if torch.is_tensor(seen[0]) else seen[0][0]
    assert hidden.shape == (4, 11, 32)
