"""Captured training forwards on a GPU: the losses and weights of eager ones."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import MaskedAdamW, PrefixCache, ProgressiveSchedule, patch_model

pytestmark = [pytest.mark.gpu, pytest.mark.captures]
STAGES, STEPS = 3, 18


def _trained(name: str, graph: str, **options):
    torch.manual_seed(0)
    model = tiny_model(name).cuda().train()
    options = {"kernels": "off", "packing": "off", **options}
    handle = patch_model(model, ProgressiveSchedule(STAGES, STEPS), graph=graph, **options)
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
    losses = []
    for step in range(STEPS):
        batch = {k: v.cuda() for k, v in tiny_inputs(name, seed=step % 4).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        losses.append(loss.detach())
    return torch.stack(losses).cpu(), [p.detach().cpu() for p in model.parameters()], handle


@pytest.mark.parametrize(
    "name", ["bert-sequence", "gpt2-causal-lm", "llama-causal-lm", "vit-image"]
)
@pytest.mark.parametrize("kernels", ["off", "on"])
def test_captured_forwards_train_as_eager_ones_do(name, kernels):
    own, eager = (_trained(name, graph, kernels=kernels) for graph in ("on", "off"))
    torch.testing.assert_close(own[0], eager[0], rtol=2e-5, atol=1e-6)
    for weight, expected in zip(own[1], eager[1], strict=True):
        # AdamW's first steps go by the sign of a gradient, which rounding may turn
        assert (weight - expected).norm() <= 1e-3 * expected.norm() + 1e-4
    report = own[2].graph_report()
    assert report.replays >= STEPS - STAGES or report.block_replays, str(report)
    assert report.nbytes


@pytest.mark.parametrize("cached", [False, True])
def test_packed_and_cached_forwards_are_captured(cached):
    cache = PrefixCache(max_bytes=1 << 24) if cached else None
    losses, _, handle = _trained("bert-sequence", "on", packing="on", cache=cache)
    assert losses.isfinite().all()
    report = handle.graph_report()
    assert report.replays >= 8, str(report)
    assert handle.packing_report().batches == STEPS


def test_dropout_is_drawn_anew_in_every_replay():
    model = tiny_model("bert-sequence", dropout=True).cuda().train()
    handle = patch_model(
        model, ProgressiveSchedule(1, 100), kernels="off", packing="off", graph="on"
    )
    batch = {k: v.cuda() for k, v in tiny_inputs("bert-sequence").items()}
    losses = set()
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        losses.add(loss.item())
    assert len(losses) == 6
    assert handle.graph_report().replays == 5


def test_a_read_in_a_forward_is_named_and_its_blocks_are_captured():
    model = tiny_model("bert-sequence").cuda().train()
    head = model.classifier.forward
    model.classifier.forward = lambda x: head(x) * (1 if x.sum().item() < 1e9 else 0)
    handle = patch_model(
        model, ProgressiveSchedule(1, 100), kernels="off", packing="off", graph="on"
    )
    batch = {k: v.cuda() for k, v in tiny_inputs("bert-sequence").items()}
    with pytest.warns(UserWarning, match="it cannot be captured"):
        for _ in range(6):
            model(**batch).loss.backward()
            model.zero_grad()
    report = handle.graph_report()
    assert not report.replays and report.block_replays and __file__ in str(report)


def test_memory_of_a_stage_is_given_back():
    def used() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    _, _, handle = _trained("bert-sequence", "on")
    assert handle.graph_report().nbytes
    before = used()
    handle.unpatch()
    assert used() < before and not handle.graph_report().nbytes
