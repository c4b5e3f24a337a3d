"""benchmarks/plot.py: tables and figures are those of the stored results."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from progtuning_kernels import report

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("training_plot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_plot"] = module
    spec.loader.exec_module(module)
    return module


def _entry(step_ms: list[float], run_s: float, *, state: list[int]) -> dict:
    stages = [
        {
            "later_epochs": {"step_ms": ms, "step_ms_p20": 0.9 * ms, "step_ms_p80": 1.2 * ms},
            "state_bytes": bytes_,
            "saved_bytes": 2 * bytes_,
            "gradient_bytes_after_backward": bytes_ // 2,
        }
        for ms, bytes_ in zip(step_ms, state, strict=True)
    ]
    runs = [{"epochs_per_stage": 1, "run_s": run_s, "first_steps_extra_s": 0.25}]
    return {"stages": stages, "whole_runs": runs, "last_epoch_loss": 0.5}


@pytest.fixture
def content() -> dict:
    mib = 2**20
    return {
        "experiment": {
            "title": "MiniLM",
            "device": "cpu",
            "rows": 32,
            "tokens": 64,
            "precision": "fp32",
            "stages": 2,
            "epochs_per_stage": [1],
            "targets": [{}],
        },
        "providers": {
            "full": _entry([100.0, 100.0], 10.0, state=[64 * mib, 64 * mib]),
            "ours": _entry([90.0, 40.4], 6.25, state=[64 * mib, 16 * mib]),
            "AdaLomo": {"reason": "needs a GPU"},
        },
        "verdicts": [{"target": "ours, 1.7 x", "met": False, "found": "1.600, -5.9% of 1.7"}],
    }


def _store(folder: Path, name: str, content: dict) -> None:
    (folder / "training").mkdir(exist_ok=True)
    (folder / "training" / f"{name}.json").write_text(json.dumps(content))


def test_table(plot, content):
    heads, rule, title, full, ours, absent = plot.table([content]).splitlines()
    assert "| x full, 1 ep. a stage |" in heads and heads.count("|") == rule.count("|")
    assert title.startswith("| **MiniLM, 32 x 64 tokens, fp32, 2 stages** |")
    assert full == "| full | 100 | 1.00 | 0.25 | 64.0 | 128.0 | 0.5000 |"
    assert ours == "| ours | 90 → 40 | 1.60 | 0.25 | 64.0 → 16.0 | 128.0 → 32.0 | 0.5000 |"
    assert absent.startswith("| AdaLomo: needs a GPU |") and absent.count("|") == heads.count("|")
    assert plot.verdict_lines([content]) == ["- **not met**: ours, 1.7 x: 1.600, -5.9% of 1.7"]


def test_table_of_a_gpu_and_of_unknown_bytes(plot, content):
    content["experiment"]["device"] = "cuda"
    for stage, peak in zip(content["providers"]["ours"]["stages"], (3 * 2**30, 2**30), strict=True):
        stage |= {"peak_allocated_bytes": peak, "saved_bytes": None}
    heads, *_, full, ours, _ = plot.table([content]).splitlines()
    assert heads.endswith("| peak (MiB) |") and full.endswith("| 0.5000 |  |")
    assert ours.endswith("| 64.0 → 16.0 |  | 0.5000 | 3072 |")


def test_order_and_other_numbers_of_epochs(plot, content, tmp_path):
    other = copy.deepcopy(content)
    other["experiment"] |= {"title": "Llama", "targets": [], "epochs_per_stage": [3]}
    for name in ("full", "ours"):
        other["providers"][name]["whole_runs"][0]["epochs_per_stage"] = 3
    _store(tmp_path, "a", other)
    _store(tmp_path, "b", content)
    contents = plot.load(tmp_path)
    assert [c["experiment"]["title"] for c in contents] == ["MiniLM", "Llama"]
    rows = plot.table(contents).splitlines()
    assert "| 1.60 |  |" in rows[4] and "|  | 1.60 |" in rows[8]


def test_figures_show_what_is_stored(plot, content):
    (ax,) = plot.run_figure([content]).axes
    assert [bar.get_width() for bar in ax.patches] == [0.625, 1.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "full"]
    times, state, gradients, saved = plot.stage_figure(content).axes
    assert [bar.get_height() for bar in times.patches] == [100, 100, 90, 40.4]
    assert [bar.get_height() for bar in state.patches] == [64, 64, 64, 16]
    assert [bar.get_height() for bar in gradients.patches] == [32, 32, 32, 8]
    assert [bar.get_height() for bar in saved.patches] == [128, 128, 128, 32]


def test_command(plot, content, tmp_path, monkeypatch, capsys):
    _store(tmp_path, "minilm", content)
    arguments = ["plot.py", str(tmp_path), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", arguments)
    plot.main()
    out = capsys.readouterr().out
    assert plot.table([content]) in out and "**not met**" in out
    for name in ("training.png", "training_stages.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="run benchmarks/run.py first"):
        plot.main()


def test_the_readme_s_figures_are_drawn_from_stored_results(plot, tmp_path):
    results = SCRIPT.parent / "results"
    drawn = {
        path.stem
        for device in sorted(results.iterdir())
        for path in plot.draw(device, tmp_path / device.name)
    }
    readme = (SCRIPT.parent.parent / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(docs/(\w+)\.png\)", readme))
    assert shown <= drawn


def test_figures_of_units_and_contributions_show_what_is_stored(plot):
    results = SCRIPT.parent / "results"
    (path,) = results.glob("*/contribution/sst2.json")
    stored = json.loads(path.read_text())
    axes = plot.contribution_figure(stored).axes
    for ax, (name, measure) in zip(axes, stored["measures"].items(), strict=True):
        assert ax.get_title() == name
        assert [bar.get_height() for bar in ax.patches] == measure["values"]
    (path,) = results.glob("*/demo/progressive-seed0.json")
    run = report.load_run(path)
    (ax,) = plot.unit_figure([run]).axes
    trains = [[to_hex(c) == to_hex(plot.OURS) for c in u.get_facecolor()] for u in ax.collections]
    plans = [[s["embeddings"], *s["trainable"], s["head"]] for s in run.stages]
    assert trains == [list(flags) for flags in zip(*plans, strict=True)]
