"""A loop that reads what a model returns at padding is found out in its first backward."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from packed_models import LEFT, MIXED, RIGHT, batch_of, packed_forwards, patched
from proofs import FixedPlan
from tiny_models import tiny_model
from torch.nn import functional

from progtuning_kernels import FreezePlan, patch_model


def _mean_of_all(output, batch):
    return output.logits.mean(1).pow(2).sum()


def _every_label(output, batch):
    return functional.cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten() % 3)


def _last_column(output, batch):
    return output.logits[:, -1].exp().sum()


def _masked_mean(output, batch):
    mask = batch["attention_mask"][..., None]
    return ((output.logits * mask).sum(1) / mask.sum(1)).pow(2).sum()


def _labels_that_count(output, batch):
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    return functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def _first_column(output, batch):
    return output.logits[:, 0].pow(2).sum()


def _batch(spans, seed):
    batch = batch_of("bert-token", spans, seed=seed)
    del batch["labels"]
    return batch


def _step(model, loss, batch):
    model.zero_grad()
    loss(model(**batch), batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [_mean_of_all, _every_label, _last_column])
def test_it_warns_and_trains_padded_from_then_on(loss):
    model, padded = tiny_model("bert-token"), tiny_model("bert-token")
    handle = patched(model)
    with pytest.warns(UserWarning, match="the loss reads .* at padding"):
        _step(model, loss, _batch(RIGHT, seed=1))
    assert packed_forwards(handle) == 1
    assert "the loss reads" in str(handle.packing_report())
    assert not handle.packing_report().packs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (2, 3):
            batch = _batch(MIXED, seed)
            found, expected = _step(model, loss, batch), _step(padded, loss, batch)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert packed_forwards(handle) == 1

    resumed = patch_model(tiny_model("bert-token"), handle.schedule, packing="on", kernels="off")
    resumed.load_state_dict(handle.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(resumed.model, loss, _batch(RIGHT, seed=1))
    assert packed_forwards(resumed) == 0


@pytest.mark.parametrize("factor", [0.0, float("inf")])
def test_gradients_that_show_nothing_are_no_look(factor):
    model = tiny_model("bert-token")
    patched(model)
    for seed in range(4):  # as under a loss scale that is too large yet
        _step(model, lambda *given: _mean_of_all(*given) * factor, _batch(RIGHT, seed))
    with pytest.warns(UserWarning, match="the loss reads .* at padding"):
        _step(model, _mean_of_all, _batch(RIGHT, seed=1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("loss", "spans"),
    [(_masked_mean, LEFT), (_labels_that_count, MIXED), (_first_column, RIGHT)],
)
def test_what_leaves_padding_out_is_packed(loss, spans, attention):
    model = tiny_model("bert-token")
    model.set_attn_implementation(attention)
    handle = patched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            _step(model, loss, _batch(spans, seed))
    assert packed_forwards(handle) == 5


def test_forwards_without_a_backward_are_not_looked_at():
    model = tiny_model("bert-token")
    patched(model)
    for seed in range(5):
        model(**_batch(RIGHT, seed))
    with pytest.warns(UserWarning, match="at padding"):
        _step(model, _mean_of_all, _batch(RIGHT, seed=1))


@pytest.mark.parametrize("name", ["t5-seq2seq-lm", "bart-seq2seq-lm"])
def test_cross_attention_reads_no_padding(name):
    model = tiny_model(name)
    handle = patched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spans in (RIGHT, MIXED, LEFT):
            model(**batch_of(name, spans)).loss.backward()
    assert packed_forwards(handle) == 3


def test_a_base_model_whose_vectors_are_averaged():
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = hf.BertModel(config, add_pooling_layer=False)
    patch_model(model, FixedPlan(FreezePlan.from_boundary(0, 2, embeddings=True)))
    with pytest.warns(UserWarning, match="at padding"):
        model(**_batch(RIGHT, seed=1)).last_hidden_state.mean(1).pow(2).sum().backward()
