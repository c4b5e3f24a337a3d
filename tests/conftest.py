"""Shared by all tests: quiet, offline, one thread, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import gc
import os

import hypothesis
import own_process
import pytest
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
    why = {}
    if not torch.cuda.is_available():
        why["gpu"] = "no CUDA device"
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        why["captures"] = "launches that block cannot be captured"
    for item in items:
        for marker in why.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=why[marker]))


def pytest_collection_finish() -> None:
    """What has been imported is not searched for garbage again: 0.3 s at a time, every 20 tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else modules that count what is left at the end count all of it


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`patch_model` computes on padding, for tests that compare bits with an unpatched model."""
    monkeypatch.setitem(progtuning_kernels.patch_model.__kwdefaults__, "packing", "off")


@pytest.fixture
def no_accelerator_of_another_test():
    """Accelerate has one for the process; so has a test after this one."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def word_tokenizer():
    import tiny_folders

    return tiny_folders.word_tokenizer()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Folders of tiny random models as a hub would give them: {"bert": ..., "gpt2": ...}."""
    from tiny_folders import save_model

    folder = tmp_path_factory.mktemp("models")
    return {
        "bert": save_model(folder / "bert", "bert-masked-lm"),
        "gpt2": save_model(folder / "gpt2", "gpt2-causal-lm"),
        "bert-without-dropout": save_model(folder / "same", "bert-masked-lm", dropout=False),
    }


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """(train.jsonl, validation.jsonl)"""
    from tiny_folders import save_rows

    return save_rows(tmp_path_factory.mktemp("text"), {"train": 96, "validation": 40})
