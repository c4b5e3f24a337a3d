"""When the prefix cache switches itself off."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from cached_models import assert_same, blocks_of, cached_and_plain, patched_at
from proofs import gradients
from tiny_models import BATCH, tiny_inputs, tiny_model

from progtuning_kernels import PrefixCache
from progtuning_kernels.cache.break_even import BreakEven


@pytest.fixture(autouse=True)
def always_on() -> None:
    """In the place of the one in conftest.py: here the cache may switch itself off."""


def test_it_switches_itself_off_where_reading_costs_more():
    handle, plain = cached_and_plain("bert-sequence", 2)
    read = handle.cache.rows.store.read

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.05)
        return read(*args, **kwargs)

    handle.cache.rows.store.read = slow
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in range(8)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for inputs in batches * 2:
            assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    assert sum("prefix cache is off" in str(w.message) for w in seen) == 1
    report = handle.cache_report()
    assert report.state == "off" and "reading a row takes" in report.reason
    assert report.rows == {} and report.served_steps == 0
    assert "off" in str(handle.truncation_report())


def test_it_stays_on_where_the_prefix_is_dear():
    handle, _ = cached_and_plain("bert-sequence", 2)
    hook = blocks_of(handle)[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in range(6)]
    for inputs in batches * 2:
        gradients(handle.model, inputs)
    hook.remove()
    report = handle.cache_report()
    assert report.state == "on" and report.served_steps == 6
    assert report.prefix_ms * BATCH > 20 > report.read_ms * BATCH


def test_data_that_never_comes_again():
    row = 11 * 32 * 4
    handle = patched_at(tiny_model("bert-sequence"), 2, cache=PrefixCache(3 * row, device="cpu"))
    hook = blocks_of(handle)[0].register_forward_pre_hook(lambda *_: time.sleep(0.005))
    with pytest.warns(UserWarning, match="others came without a hit"):
        for seed in range(6):
            gradients(handle.model, tiny_inputs("bert-sequence", seed=seed))
    hook.remove()
    assert handle.cache_report().state == "off"


def test_verdicts():
    counts = BreakEven()
    for _ in range(4):
        counts.add_prefix(30.0, 3)
        assert counts.verdict(0) is None
        counts.add_read(3.0, 3)
    assert counts.verdict(0) is None
    for _ in range(60):
        counts.add_read(28.0, 3)
    assert "reading a row takes 9.333 ms, computing it 10.000 ms" in counts.verdict(0)
    counts = BreakEven()
    counts.misses, counts.refused = 201, 1
    assert "budget holds 100 rows" in counts.verdict(100)
    counts.hits = 1
    assert counts.verdict(100) is None
    counts = BreakEven()
    counts.misses = 200_001
    assert "augmentation" in counts.verdict(200_001)
