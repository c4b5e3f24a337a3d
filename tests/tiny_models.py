"""Tiny random models of the families, each with inputs that give it a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

BATCH, TOKENS, VOCABULARY = 3, 11, 97

_SIZES = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    max_position_embeddings=32,
)
_BERT = hf.BertConfig(**_SIZES, num_labels=3)
_ROBERTA = hf.RobertaConfig(**_SIZES, num_labels=3, pad_token_id=1)
_DISTILBERT = hf.DistilBertConfig(
    dim=32, n_layers=4, n_heads=4, hidden_dim=48, vocab_size=VOCABULARY, num_labels=3
)
_ELECTRA = hf.ElectraConfig(**_SIZES, embedding_size=16, num_labels=3)
_GPT2 = hf.GPT2Config(
    n_embd=32,
    n_layer=4,
    n_head=4,
    vocab_size=VOCABULARY,
    n_positions=32,
    bos_token_id=2,
    eos_token_id=2,
    pad_token_id=0,
    num_labels=3,
)
_LLAMA = hf.LlamaConfig(
    **_SIZES, num_key_value_heads=2, bos_token_id=2, eos_token_id=2, pad_token_id=0, num_labels=3
)


def _two_labels(config: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    """Question answering marks a start and an end."""
    config = copy.deepcopy(config)
    config.num_labels = 2
    return config


def _build(cls: type[nn.Module], config: hf.PreTrainedConfig) -> Callable[[], nn.Module]:
    """Every model gets a config of its own: tests change theirs."""
    return lambda: cls(copy.deepcopy(config))


_COMMON = dict(pad_token_id=0, bos_token_id=2, eos_token_id=2)
_GROUPED = dict(**_SIZES, **_COMMON, num_key_value_heads=2)
_XLM_ROBERTA = hf.XLMRobertaConfig(**_SIZES, num_labels=3, pad_token_id=1)
_MODERNBERT = hf.ModernBertConfig(**_SIZES, **_COMMON, num_labels=3, cls_token_id=2, sep_token_id=2)
_DEBERTA = hf.DebertaV2Config(
    **_SIZES,
    num_labels=3,
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm",
    share_att_key=True,
)
_OPT = hf.OPTConfig(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    ffn_dim=48,
    vocab_size=VOCABULARY,
    max_position_embeddings=32,
    word_embed_proj_dim=16,
    dropout=0.0,
    pad_token_id=0,
)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert-sequence": _build(hf.BertForSequenceClassification, _BERT),
    "bert-token": _build(hf.BertForTokenClassification, _BERT),
    "bert-qa": _build(hf.BertForQuestionAnswering, _two_labels(_BERT)),
    "bert-masked-lm": _build(hf.BertForMaskedLM, _BERT),
    "roberta-sequence": _build(hf.RobertaForSequenceClassification, _ROBERTA),
    "roberta-token": _build(hf.RobertaForTokenClassification, _ROBERTA),
    "distilbert-sequence": _build(hf.DistilBertForSequenceClassification, _DISTILBERT),
    "distilbert-qa": _build(hf.DistilBertForQuestionAnswering, _two_labels(_DISTILBERT)),
    "electra-sequence": _build(hf.ElectraForSequenceClassification, _ELECTRA),
    "electra-token": _build(hf.ElectraForTokenClassification, _ELECTRA),
    "gpt2-causal-lm": _build(hf.GPT2LMHeadModel, _GPT2),
    "gpt2-sequence": _build(hf.GPT2ForSequenceClassification, _GPT2),
    "xlm-roberta-sequence": _build(hf.XLMRobertaForSequenceClassification, _XLM_ROBERTA),
    "modernbert-sequence": _build(hf.ModernBertForSequenceClassification, _MODERNBERT),
    "mpnet-sequence": _build(
        hf.MPNetForSequenceClassification, hf.MPNetConfig(**_SIZES, num_labels=3)
    ),
    "deberta-sequence": _build(
        hf.DebertaForSequenceClassification,
        hf.DebertaConfig(
            **_SIZES, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
    ),
    "deberta-v2-sequence": _build(hf.DebertaV2ForSequenceClassification, _DEBERTA),
    "gpt-neox-causal-lm": _build(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_SIZES, **_COMMON)),
    "opt-causal-lm": _build(hf.OPTForCausalLM, _OPT),
    "mistral-causal-lm": _build(
        hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED, sliding_window=8)
    ),
    "qwen2-causal-lm": _build(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GROUPED)),
    "qwen3-causal-lm": _build(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma2-causal-lm": _build(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_GROUPED, head_dim=8)),
    "gemma3-causal-lm": _build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, head_dim=8)),
    "phi-causal-lm": _build(hf.PhiForCausalLM, hf.PhiConfig(**_SIZES, **_COMMON)),
    "phi3-causal-lm": _build(hf.Phi3ForCausalLM, hf.Phi3Config(**_SIZES, **_COMMON)),
    "mixtral-causal-lm": _build(
        hf.MixtralForCausalLM, hf.MixtralConfig(**_GROUPED, num_local_experts=4)
    ),
    "llama-causal-lm": _build(hf.LlamaForCausalLM, _LLAMA),
    "llama-sequence": _build(hf.LlamaForSequenceClassification, _LLAMA),
    "llama-token": _build(hf.LlamaForTokenClassification, _LLAMA),
    "llama-qa": _build(hf.LlamaForQuestionAnswering, _two_labels(_LLAMA)),
}


def tiny_model(name: str, *, seed: int = 0, dropout: bool = False) -> nn.Module:
    """A model in train mode, without dropout unless asked for."""
    torch.manual_seed(seed)
    model = MODELS[name]().train()
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for attribute in ("attention_dropout", "dropout_prob"):  # functional dropout in SDPA
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
    return model


def tiny_inputs(name: str, *, seed: int = 1) -> dict[str, Any]:
    """Ids (BATCH, TOKENS) with real right padding, and labels of the head's kind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, BATCH):
        mask[row, TOKENS - 2 * row :] = 0
    ids = ids.masked_fill(mask == 0, 1 if "roberta" in name else 0)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name.endswith("lm"):
        return inputs | {"labels": ids.masked_fill(mask == 0, -100)}
    if name.endswith("token"):
        labels = torch.randint(3, ids.shape, generator=generator)
        return inputs | {"labels": labels.masked_fill(mask == 0, -100)}
    if name.endswith("qa"):
        starts = torch.randint(0, 3, (BATCH,), generator=generator)
        return inputs | {"start_positions": starts, "end_positions": starts + 2}
    return inputs | {"labels": torch.arange(BATCH) % 3}
