"""Blocks of unusual forms: several streams of hidden states, ids of words, mixers in attention."""

from __future__ import annotations

import types

import pytest
import torch
from packed_models import LEFT, MIXED, RIGHT, batch_of, packed_forwards, patched
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from progtuning_kernels.model.outputs import difference

WIDTH, STREAMS, WORDS = 24, 2, 97


class _Mixer(nn.Module):
    """Adds the token before, if it is real."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden, mask):
        real = hidden * mask[..., None]
        return hidden + self.weight * torch.cat((torch.zeros_like(real[:, :1]), real[:, :-1]), 1)


class _Attention(nn.Module):
    """Its bias has as many rows as it gets tokens."""

    def __init__(self, config, mixes):
        super().__init__()
        self.config = config
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixer = _Mixer() if mixes else None
        self.bias = nn.Parameter(torch.randn(64)) if mixes else None

    def forward(self, hidden, mask):
        count = hidden.shape[1]
        keys = mask[:, None, None, :].bool()
        if self.mixer is not None:
            hidden = self.mixer(hidden, mask)
            places = torch.arange(count)
            bias = self.bias[(places[:, None] - places).abs()]
            keys = bias.masked_fill(~keys, torch.finfo(bias.dtype).min)
        heads = self.project(hidden).view(*hidden.shape[:2], 4, -1).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, _ = attend(self, *heads.chunk(3, -1), keys, dropout=0.0)
        return found.reshape(*hidden.shape)


class _Block(nn.Module):
    def __init__(self, config, form):
        super().__init__()
        self.attention = _Attention(config, mixes=form == "mixer in attention")
        self.by_word = nn.Embedding(WORDS, WIDTH) if form == "word ids" else None
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, mask, words=None):
        x = hidden if hidden.ndim == 3 else hidden.mean(2)
        x = x + self.attention(x, mask)
        if self.by_word is not None:
            x = x + self.by_word(words)
        x = x + self.dense(x).tanh()
        return x if hidden.ndim == 3 else hidden + x.unsqueeze(2)


class _Model(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed = nn.Embedding(WORDS, WIDTH)
        config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.layers = nn.ModuleList(_Block(config, form) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)  # (B, T, C)
        if self.form == "streams":
            hidden = hidden.unsqueeze(2) * torch.tensor([1.0, -0.5]).view(1, 1, STREAMS, 1)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, input_ids)
        return self.head(hidden if hidden.ndim == 3 else hidden.mean(2))


def _run(model, batch):
    model.zero_grad()
    real = model(**batch)[batch["attention_mask"].bool()]
    real.square().sum().backward()
    return [real.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("form", ["streams", "word ids", "mixer in attention"])
def test_packed_and_equal(form):
    model, padded = _Model(form), _Model(form)
    handle = patched(model)
    for spans in (MIXED, LEFT, RIGHT):
        batch = {k: batch_of("bert-sequence", spans)[k] for k in ("input_ids", "attention_mask")}
        for one, other in zip(_run(padded, batch), _run(model, batch), strict=True):
            assert difference(one, other) <= 1e-5
    assert packed_forwards(handle) == 3, handle.packing_report()
