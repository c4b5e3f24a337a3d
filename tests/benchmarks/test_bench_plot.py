"""benchmarks/plot.py, diagrams.py: tables and pictures show stored results and real schedules."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmark_scripts import load_script
from matplotlib.colors import to_hex

from progtuning_kernels import report

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.fixture(scope="module")
def plot():
    return load_script("plot")


@pytest.fixture(scope="module")
def diagrams():
    return load_script("diagrams")


def _entry(step_ms: list[float], run_s: float, *, state: list[int]) -> dict:
    stages = [
        {
            "boundary": 2 * stage,
            "later_epochs": {"step_ms": ms, "step_ms_p20": 0.9 * ms, "step_ms_p80": 1.2 * ms},
            "state_bytes": bytes_,
            "saved_bytes": 2 * bytes_,
            "gradient_bytes_after_backward": bytes_ // 2,
        }
        for stage, (ms, bytes_) in enumerate(zip(step_ms, state, strict=True))
    ]
    runs = [{"epochs_per_stage": 1, "run_s": run_s, "first_steps_extra_s": 0.25}]
    return {"stages": stages, "whole_runs": runs, "last_epoch_loss": 0.5}


@pytest.fixture
def content() -> dict:
    mib = 2**20
    return {
        "meta": {"device": "a machine"},
        "experiment": {
            "title": "MiniLM",
            "shape": "MiniLM",
            "steps_per_epoch": 75,
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


def _bars(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def test_whole_runs_of_the_figure(plot, content):
    assert plot.run_figure([content]) is None  # a panel of one bar shows nothing
    content["providers"]["naive"] = content["providers"]["ours"]
    (ax,) = plot.run_figure([content]).axes
    assert _bars(ax) == [1.6, 1.6]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "naive"]


def test_front_figure(plot, content):
    packing = plot.load_packing(RESULTS / "amd-epyc-2-threads")
    speeds, memory = plot.front_figure(packing, content).axes
    ways = ("HF + group_by_length", "ours", "ours + cache")
    assert _bars(speeds) == [c["ways"][way]["speedup"] for way in ways for c in packing]
    ours, full = memory.patches[:2], memory.patches[2]
    assert [bar.get_height() for bar in ours] == [64 + 32 + 128, 16 + 8 + 32]
    assert [*full.get_data().values] == [224, 224]
    shown = {" ".join(text.get_text().split()) for text in memory.texts}
    assert {"all", "blocks 2-5, head", "full: 224"} <= shown


def test_figures_of_the_demo_show_what_is_stored(plot):
    paths = sorted(RESULTS.glob("*/demo/*.json"))
    rows = report.group_runs([report.load_run(path) for path in paths])
    runs = {row.method: row.runs for row in rows}
    one = runs["progressive"][0]
    (memory,) = plot.memory_figure([one]).axes
    for kind, key in (
        ("optimizer state", "state_bytes"),
        ("saved activations", "activation_bytes"),
    ):
        bars = [
            bar
            for bars in memory.containers
            if bars.get_label().lstrip("_") == kind
            for bar in bars
        ]
        assert [b.get_height() for b in bars] == [s[key] / plot.MIB for s in one.stages]
        assert [b.get_width() for b in bars] == [75, 75, 75]
    assert [t.get_text().split("\n")[0] for t in memory.texts] == [
        "all",
        "blocks 2-5,",
        "blocks 4-5,",
    ]
    seconds = plot.stage_seconds_figure(rows).axes[0]
    at = [row.method for row in rows].index("progressive")
    bars = [bar for bar in seconds.patches if round(bar.get_y() + bar.get_height() / 2) == at]
    for number, bar in enumerate(bars):
        own = [run.stages[number]["train_seconds"] for run in runs["progressive"]]
        assert bar.get_width() == pytest.approx(sum(own) / len(own))
    assert len(bars) == 3


def test_command(plot, content, tmp_path, monkeypatch, capsys):
    content["providers"]["naive"] = content["providers"]["ours"]
    _store(tmp_path, "minilm", content)
    arguments = ["plot.py", str(tmp_path), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", arguments)
    plot.main()
    out = capsys.readouterr().out
    assert plot.table([content]) in out and "**not met**" in out
    assert (tmp_path / "docs" / "training.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="run benchmarks/run.py first"):
        plot.main()


def test_pictures_of_the_pages_are_drawn_by_these_scripts(plot, diagrams):
    drawn = {name for folder in RESULTS.iterdir() for name in plot.figures_of(folder)}
    shown = {
        Path(name)
        for page in PAGES
        for name in re.findall(r"pictures/([\w-]+\.(?:png|svg))", page.read_text(encoding="utf-8"))
    }
    stored = {Path(path.name) for path in (ROOT / "docs" / "pictures").iterdir()}
    assert {path.stem for path in shown | stored if path.suffix == ".png"} <= drawn
    how = {path.stem for path in shown | stored if path.stem.startswith("how-")}
    assert how == diagrams.DIAGRAMS.keys()


def test_picture_of_the_schedules_is_that_of_the_schedules(diagrams):
    picture = ElementTree.parse(ROOT / "docs" / "pictures" / "how-schedules.svg")
    (shown,) = picture.iter("{http://purl.org/dc/elements/1.1/}description")
    assert shown.text == diagrams.plans_in_words()
    axes = diagrams.schedules_figure().axes
    for ax, schedule in zip(axes, diagrams.schedules().values(), strict=False):
        by_step = [diagrams.flags(schedule.plan(step, 6)) for step in range(diagrams.STEPS)]
        for unit, collection in zip(zip(*by_step, strict=True), ax.collections, strict=True):
            seen = []
            for path, colour in zip(
                collection.get_paths(), collection.get_facecolor(), strict=True
            ):
                left, right = path.get_extents().intervalx
                seen += [to_hex(colour).upper() == diagrams.BLUE] * round(right - left)
            assert seen == [*unit]


def test_figure_of_contributions_shows_what_is_stored(plot):
    contents = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/contribution/*.json"))]
    axes = plot.contribution_figure(contents).axes
    for ax, stored in zip(axes, contents, strict=True):
        values = stored["measures"]["train"]["values"]
        assert [bar.get_height() for bar in ax.patches] == values


def test_whether_higher_blocks_contribute_more_is_tested_by_permutations(plot):
    order = sys.modules["result_tables"].order_of_blocks
    both = pytest.approx(2 / 24)  # of 24 orders, the rising and the falling one
    assert order([1.0, 2.0, 4.0, 8.0]) == (1.0, both)
    assert order([8.0, 4.0, 2.0, 1.0]) == (-1.0, both)
    spearman, p = order([0.0, 5.0, 1.0, 4.0, 2.0, 3.0, 2.5, 1.5])
    assert abs(spearman) < 0.5 and p > 0.2
