"""benchmarks/rows.py: five ways to train new rows, tiny; no number without a green gate."""

from __future__ import annotations

import pytest
from benchmark_scripts import load_script

from progtuning_kernels.bench import Refused


def test_five_ways_are_measured_and_ours_moves_no_other_row(monkeypatch):
    script = load_script("rows")
    sizes = {"vocabulary": 203, "new": 7, "width": 32, "blocks": 1, "tokens": 16, "rounds": 1}
    settings = script.Settings(**sizes)
    found = {way["way"]: way for way in script.measure(settings, tied=False)}
    weight, rows = 4 * 210 * 32, 4 * 7 * 32
    whole = found[script.BASELINE]
    assert whole["gradient_bytes"] == 2 * weight and whole["state_bytes"] == 4 * weight + 8
    assert whole["others_moved"] == 2 * 203
    ours = [found[name] for name in found if name.startswith("this library")]
    for way in (*ours, found["PEFT, `trainable_token_indices`"]):
        assert way["row_error"] < 1e-4 and way["others_moved"] == 0
        assert way["gradient_bytes"] == 2 * rows
        assert 4 * rows <= way["state_bytes"] <= 4 * rows + 64
        assert way["peak_bytes"] > 0
    assert script.table({"settings": sizes, "ways": list(found.values())}).count("\n") == 7

    def forgets_the_head(settings, *, tied):
        way = script.full(settings, tied=tied)
        way.optimizer.param_groups[0]["params"].pop()
        return way

    monkeypatch.setattr(script, "WAYS", {"this library, `rows=`": forgets_the_head})
    with pytest.raises(Refused, match="gate is red: this library"):
        list(script.measure(settings, tied=False))
