"""Folders of tiny models as a hub would give them, and rows to train on; nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over 90 words, w0 to w89."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(90))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=32,
    )


def save_model(folder: Path, name: str, *, dropout: bool = True) -> Path:
    """A model of `tiny_models` and the tokenizer."""
    model = tiny_model(name)
    if not dropout:
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_rows(folder: Path, sizes: dict[str, int]) -> list[Path]:
    """JSONL files by name; a row's label is whether a word below w45 leads."""
    draw, paths = random.Random(0), []
    for name, count in sizes.items():
        lines = []
        for i in range(count):
            first = draw.randrange(45) + 45 * (i % 2)
            rest = [draw.randrange(90) for _ in range(draw.randrange(3, 12))]
            text = " ".join(f"w{w}" for w in (first, *rest))
            lines.append(json.dumps({"text": text, "label": ["low", "high"][i % 2]}))
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer over 90 words with [CLS] and [SEP] round its texts, as BERT's, and [MASK]."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer
