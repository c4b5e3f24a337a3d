"""Shared by all tests: quiet, offline, one thread, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import own_process
import quick_interpreter
import torch

import progtuning_kernels

quick_interpreter.install()

hypothesis.settings.register_profile("no deadline", deadline=None)  # machines are busy
hypothesis.settings.load_profile("no deadline")

# tiny tensors gain nothing from a second thread, and on a busy machine its barriers cost tenfold
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(own_process)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`patch_model` computes on padding, for tests that compare bits with an unpatched model."""
    monkeypatch.setitem(progtuning_kernels.patch_model.__kwdefaults__, "packing", "off")


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer over 90 words, made here: no file is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, word_tokenizer):
    """Folders of tiny random models as a hub would give them: {"bert": ..., "gpt2": ...}."""
    from tiny_models import tiny_model

    folders = {}
    for kind, name in (("bert", "bert-masked-lm"), ("gpt2", "gpt2-causal-lm")):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_model(name).save_pretrained(folders[kind])
        word_tokenizer.save_pretrained(folders[kind])
    kind = "bert-without-dropout"
    folders[kind] = tmp_path_factory.mktemp(kind)
    model = tiny_model("bert-masked-lm")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folders[kind])
    word_tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Rows whose label is whether a word below w45 leads: (train.jsonl, validation.jsonl)."""
    import json
    import random

    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    paths = []
    for name, count in (("train", 96), ("validation", 40)):
        lines = []
        for i in range(count):
            first = draw.randrange(45) + 45 * (i % 2)
            rest = [draw.randrange(90) for _ in range(draw.randrange(3, 12))]
            text = " ".join(f"w{w}" for w in (first, *rest))
            lines.append(json.dumps({"text": text, "label": ["low", "high"][i % 2]}))
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths
