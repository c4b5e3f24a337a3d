"""benchmarks/host_update.py, tiny: every way moves as it may; one that does not has no times."""

from __future__ import annotations

import dataclasses

from benchmark_scripts import load_script


def test_every_way_has_times_or_a_reason(monkeypatch):
    script = load_script("host_update")
    monkeypatch.setattr(script, "COPIED", 2**16)
    found = script.ways()
    wrong = dataclasses.replace(found[0], name="another lr", build=found[-1].build, tolerance=1e-9)
    monkeypatch.setattr(script, "ways", lambda: [*found, wrong])
    content = script.measure(hidden=64, blocks=1, rounds=2) | {"threads": 1}
    *rows, last = content["rows"]
    assert "gate is red" in last["reason"] and "step_ms" not in last
    missing = [row["name"] for row in rows if "reason" in row]
    assert all(name.startswith("CPUAdam") for name in missing)  # or all are installed
    assert all(row["share_of_copy"] > 0 for row in rows if "reason" not in row)
    assert script.table(content).count("\n") == len(content["rows"]) + 3
    assert len(script.verdicts(content)) == 4
