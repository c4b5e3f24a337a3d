"""With dropout packed tokens draw other numbers: equally distributed, and again from one seed."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from packed_models import MIXED, batch_of, packed_forwards, patched, run
from tiny_models import tiny_model

DRAWS, COPIES = 2_000, 40  # the batch stands so often in every forward: as many draws at once


def _model():
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=97,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        # of 0.02, as configured, dropout of attention changes no gradient that could be seen
        initializer_range=0.3,
    )
    return hf.BertForSequenceClassification(config).train()


def _projections(model, batch):
    """(forwards, tensors): mean gradients of many draws, each in a direction of its own."""
    generator = torch.Generator().manual_seed(7)
    directions = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    found = []
    for _ in range(DRAWS // COPIES):
        gradients = run(model, batch).gradients
        found.append([(gradients[n] * d).sum() for n, d in directions.items()])
    return torch.tensor(found, dtype=torch.float64)


def test_the_mean_gradient_is_that_of_the_padded_model():
    once = batch_of("bert-sequence", MIXED)
    batch = {n: v.repeat(COPIES, *(1 for _ in v.shape[1:])) for n, v in once.items()}
    model = _model()
    handle = patched(model, groups=4)
    torch.manual_seed(1)
    packed = _projections(model, batch)
    assert packed_forwards(handle) == DRAWS // COPIES
    torch.manual_seed(2)
    padded = _projections(_model(), batch)
    count = len(packed)
    error = ((packed.var(0) + padded.var(0)) / count).sqrt()
    # gradients that are 0 but for rounding (of key biases) have no error to speak of
    error = error.clamp_min(1e-6 * padded.abs().max())
    assert ((packed.mean(0) - padded.mean(0)).abs() <= 4 * error).all()
    # and they scatter alike: each ratio of 50 variances is within 4 standard errors of 1
    scatter = (packed.var(0) / padded.var(0)).log()[padded.std(0) > 1e-4 * padded.abs().max()]
    assert (scatter.abs() <= 4 * (4 / (count - 1)) ** 0.5).all()


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "t5-sequence"])
def test_the_same_numbers_from_one_seed(name):
    runs = []
    for _ in range(2):
        model = tiny_model(name, dropout=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        patched(model, groups=4)
        torch.manual_seed(5)
        runs.append([run(model, batch_of(name, MIXED, seed=s)) for s in (1, 2)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.loss, second.loss)
        assert all(torch.equal(second.gradients[n], g) for n, g in first.gradients.items())
    assert not torch.equal(runs[0][0].loss, runs[0][1].loss)


def test_a_trial_draws_nothing():
    """The first forward, before which packing is tried, draws what later ones would draw."""
    losses = []
    for warm in (False, True):
        model = _model()
        handle = patched(model)
        batch = batch_of("bert-sequence", MIXED)
        if warm:
            run(model, batch)
        torch.manual_seed(3)
        losses.append(run(model, batch).loss)
        assert packed_forwards(handle)
    assert torch.equal(*losses)
