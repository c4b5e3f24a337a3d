"""benchmarks/budget.py, tiny: every plan passes the gate and is timed; a wrong one is refused."""

from __future__ import annotations

import pytest
import torch
from benchmark_scripts import load_script

from progtuning_kernels.bench import Refused
from progtuning_kernels.planner import calibration


def test_budgets_are_predicted_and_timed(monkeypatch):
    script = load_script("budget")
    monkeypatch.setattr(calibration, "_SECONDS", 0.0)
    settings = script.Settings(rows=2, tokens=8, rounds=1)
    content = {"shapes": {"tiny BERT": script.measure("tiny BERT", settings)}}
    rows = content["shapes"]["tiny BERT"]["rows"]
    assert {"full", "budget 0.85", "by hand 0.85", "stage 1", "stage 3"} <= rows.keys()
    for name, row in rows.items():
        if name.startswith(("budget", "by hand")):
            assert row["predicted"] <= float(name.rpartition(" ")[2])
    assert rows["full"]["measured"] == rows["full"]["predicted"] == rows["full"]["importance"] == 1
    lines = script.table(content).splitlines()
    assert len(lines) == 3 + len(rows) - 1 + 2
    assert lines[-1].startswith("largest error of a prediction: ")


def test_a_plan_that_is_not_the_one_by_hand_is_refused(monkeypatch):
    script = load_script("budget")
    work = script.Work("tiny BERT", "fp32", 2, 8, 1, 1, 1, torch.device("cpu"))
    plans = [script.FreezePlan.from_boundary(k, 6, embeddings=False) for k in (1, 2)]
    by_hand = script._by_hand
    monkeypatch.setattr(
        script, "_by_hand", lambda work, choices, **more: by_hand(work, choices[::-1], **more)
    )
    with pytest.raises(Refused, match="tensors have a gradient and should not"):
        script._gate(work, [script.Choice("budget", plan) for plan in plans])
