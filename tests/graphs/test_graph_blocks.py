"""Blocks are captured one by one where a forward cannot be captured whole."""

from __future__ import annotations

import graph_pairs
import pytest
from graph_pairs import Pair, Reads, patched
from tiny_models import tiny_model

from progtuning_kernels import (
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
)


@pytest.mark.parametrize("name", ["bert-sequence", "llama-sequence", "gpt2-sequence"])
def test_blocks_are_captured_where_a_forward_cannot_be(name, pools):
    model = tiny_model(name)
    head = "classifier" if name.startswith("bert") else "score"
    setattr(model, head, Reads(getattr(model, head)))
    pair = Pair(name, model, schedule=ProgressiveSchedule(2, 12))
    with pytest.warns(UserWarning, match="runs eagerly: it cannot be captured") as warned:
        for seed in range(12):
            pair.step(seed % 3)
    pair.check()
    report = pair.report
    assert report.replays == 0
    # of six steps of a stage, one proves, one tries the whole, and one begins its blocks' kinds
    assert report.block_replays == 2 * 4 * 4
    assert report.captured == 4
    assert "by blocks" in str(report) and f"in {head}, {graph_pairs.__file__}:" in str(report)
    assert len(warned) == 2
    pair.handles[0].unpatch()
    assert all("_progtuning_graphs" not in m.__dict__ for m in model.modules())


def test_blocks_are_captured_above_cached_rows(pools):
    model = tiny_model("bert-sequence")
    model.classifier = Reads(model.classifier)
    cache = PrefixCache(max_bytes=1 << 22)
    pair = Pair(model=model, schedule=MilestoneSchedule({0: 2}))
    pair.both(lambda m, o, h: h.unpatch())
    pair.handles = [
        patched(m, graph, schedule=MilestoneSchedule({0: 2}), cache=c)
        for m, graph, c in zip(
            pair.models, ("on", "off"), (cache, PrefixCache(max_bytes=1 << 22)), strict=True
        )
    ]
    with pytest.warns(UserWarning, match="a BertForSequenceClassification runs eagerly") as warned:
        for _ in range(6):
            pair.step()
    pair.check()
    assert len(warned) == 1 and pair.handles[0].cache_report().served_steps
    assert pair.report.block_replays and pair.report.captured == 2


def test_a_block_that_cannot_be_captured_runs_as_it_is(pools):
    model = tiny_model("bert-sequence")
    block = model.bert.encoder.layer[3]
    block.output.dense = Reads(block.output.dense)
    pair = Pair(model=model)
    with pytest.warns(UserWarning, match="runs eagerly"):
        pair.steps(6)
    pair.check()
    assert pair.report.block_replays == 4 * 3
    assert any("in output.dense" in reason for reason in pair.report.eager)
