"""Blocks that are compiled one by one run packed, by graphs that hold for every length; what cannot
stays padded and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from proofs import enable_checkpointing
from test_where import batch
from tiny_models import tiny_model
from torch import nn
from torch._dynamo.utils import counters

from progtuning_kernels import MilestoneSchedule, patch_model
from progtuning_kernels.model.layout import find_layout

BERT, LLAMA = "bert-sequence", "llama-causal-lm"


@pytest.fixture(autouse=True)
def _no_graphs_of_another_test():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(model: nn.Module, **options: Any) -> None:
    for path in find_layout(model).block_paths:
        model.get_submodule(path).compile(backend="eager", **options)


def train(name: str, packing: str, prepare: Callable[[nn.Module], Any] = lambda model: None) -> Any:
    """Losses, gradients and numbers of graphs of ten steps, boundary 0 and then 2."""
    model = tiny_model(name)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    prepared = prepare(model)
    called = model if prepared is None else prepared
    handle = patch_model(called, MilestoneSchedule({5: 2}), packing=packing, kernels="off")
    losses, gradients, graphs = [], [], []
    for step in range(10):
        inputs = batch(name, step)
        inputs = {k: v[:, step % 3 :].contiguous() if v.ndim == 2 else v for k, v in inputs.items()}
        loss = called(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients += [p.grad for p in called.parameters() if p.grad is not None]
        called.zero_grad()
        handle.advance()
        graphs.append(counters["stats"]["unique_graphs"])
    return handle, [*losses, *gradients], graphs


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [BERT, LLAMA, "gpt2-causal-lm"])
def test_a_compiled_block_has_graphs_for_all_lengths(name):
    _, expected, _ = train(name, "off")
    handle, found, graphs = train(name, "on", lambda m: compile_blocks(m, dynamic=True))
    assert handle.packing_report().batches == 10, handle.packing_report()
    assert_same(found, expected)
    # before attention, and after it, where that is not one with the code that calls it
    assert 0 < graphs[0] <= 5
    assert graphs[4] == graphs[0] and graphs[9] == graphs[5]


def _checkpointed(model: nn.Module) -> None:
    enable_checkpointing(model)
    compile_blocks(model)


def _regions(model: nn.Module) -> nn.Module:
    return compile_regions(model, backend="eager")


REFUSED = {
    "whole": (BERT, lambda m: torch.compile(m, backend="eager"), "torch.compile runs as a whole"),
    "one graph": (BERT, lambda m: compile_blocks(m, fullgraph=True), "fullgraph=True"),
    "checkpointed": (BERT, _checkpointed, "compiled, and checkpointed"),
    "padded inside": ("mpnet-sequence", compile_blocks, "modules inside would run padded"),
    "regions": (BERT, _regions, "has a forward of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_says_why(kind):
    name, prepare, reason = REFUSED[kind]
    _, expected, _ = train(name, "off")
    handle, found, _ = train(name, "on", prepare)
    report = handle.packing_report()
    assert report.batches == 0
    assert reason in str(report), report
    assert_same(found, expected)


def test_a_model_is_compiled_as_a_whole_after_it_ran_packed():
    handle, _, _ = train(BERT, "on")
    model, inputs = handle.model.eval(), batch(BERT, 3)
    assert handle.packing_report().batches == 10
    with torch.no_grad():
        logits = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
        handle.unpatch()
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
