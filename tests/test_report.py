import ast
import base64
import io
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from progtuning_kernels import report
from progtuning_kernels.report import (
    Run,
    comparison_table,
    document,
    load_run,
    markdown_table,
    plots,
    stage_table,
    write_report,
)

NUM_PARAMS = 22_700_000
ALL_BLOCKS_PARAMS = 10_646_784
EMBEDDING_PARAMS = 11_900_000
PNG = b"\x89PNG\r\n\x1a\n"


def make_metrics(
    method: str = "progressive", seed: int = 0, *, stages: int = 3, num_blocks: int = 6
) -> dict[str, Any]:
    """A run of 150 steps as `progtuning train` stores it, with made-up but plausible figures."""
    rng = random.Random(f"{method} {seed}")
    steps_per_stage, full_ms = 150 // stages, 310.0
    head_params = NUM_PARAMS - EMBEDDING_PARAMS - ALL_BLOCKS_PARAMS
    steps, evaluations, stage_rows, seconds, updates = [], [], [], 0.0, 0
    for stage in range(stages):
        boundary = stage * (num_blocks // stages) if method == "progressive" else 0
        active = head_params + ALL_BLOCKS_PARAMS * (num_blocks - boundary) // num_blocks
        active += 0 if boundary else EMBEDDING_PARAMS
        cost = 1.06 - 2 * boundary / num_blocks / 3
        if method == "lora":
            active, cost = 310_000, 0.74
        first = stage * steps_per_stage + 1
        times = []
        for step in range(first, first + steps_per_stage):
            loss = 0.75 + 1.3 * math.exp(-step / 45) + rng.gauss(0, 0.12)
            times.append(full_ms * cost * rng.uniform(0.97, 1.2))
            seconds += times[-1] / 1000
            updates += active
            steps.append(
                {"step": step, "stage": stage, "loss": loss, "lr": 2e-5, "tokens": 512}
                | {"step_ms": times[-1]}
            )
            if step % 15 == 0 or step == first + steps_per_stage - 1:
                metric = 0.62 - 0.45 * math.exp(-step / 40) + rng.gauss(0, 0.006)
                evaluations.append(
                    {"step": step, "stage": stage, "metric": metric, "loss": loss}
                    | {"train_seconds": seconds, "accuracy": metric, "f1": metric - 0.01}
                )
        stage_rows.append(
            {"stage": stage, "boundary": boundary, "embeddings": not boundary, "first_step": first}
            | {"last_step": first + steps_per_stage - 1, "active_params": active}
            | {"train_seconds": sum(times) / 1000, "step_ms_median": statistics.median(times)}
            | {"tokens_per_second": 512 / statistics.median(times) * 1000}
            | {"state_bytes": 8 * active, "gradient_bytes": 4 * active, "saved_bytes": 9_000_000}
            | {"activation_bytes": int(180e6 * (1 - boundary / num_blocks)) + 4_000_000}
            | {"metric": evaluations[-1]["metric"], "loss": evaluations[-1]["loss"]}
        )
    updates_full = NUM_PARAMS * len(steps)
    return {
        "format": 1,
        "name": f"{method}-seed{seed}",
        "method": method,
        "seed": seed,
        "config": {"epochs": 3, "stages": stages, "lr": 2e-5, "batch_size": 16, "seed": seed},
        "meta": {
            "commit": "1f0c2a9d7e5b4c3a2b1c0d9e8f7a6b5c4d3e2f10",
            "dirty": False,
            "date": "2025-11-03T10:22:05+00:00",
            "device": "CPU, 2 cores",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": None},
        },
        "data": {
            "train_rows": 800,
            "validation_rows": 200,
            "label_names": ["networkx", "scipy", "sympy", "torch"],
            "description": "docstrings of 4 installed packages",
        },
        "model": {
            "name": "all-minilm-l6-v2",
            "num_blocks": num_blocks,
            "num_params": NUM_PARAMS,
            "active_params": stage_rows[0]["active_params"],
        },
        "metric_name": "accuracy",
        "steps": steps,
        "evaluations": evaluations,
        "stages": stage_rows,
        "summary": {
            "metric": evaluations[-1]["metric"],
            "metric_name": "accuracy",
            "train_seconds": seconds,
            "total_seconds": seconds * 1.2,
            "steps": len(steps),
            "updates": updates,
            "updates_full": updates_full,
            "updates_saved_share": 1 - updates / updates_full,
            "peak_state_bytes": max(row["state_bytes"] for row in stage_rows),
            "peak_activation_bytes": max(row["activation_bytes"] for row in stage_rows),
            "mean_tokens_per_second": 512 * len(steps) / seconds,
        },
    }


@pytest.fixture
def store(tmp_path: Path) -> Callable[[dict[str, Any]], Run]:
    def write_and_load(metrics: dict[str, Any]) -> Run:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        return load_run(folder)

    return write_and_load


def cells(table: Any) -> list[list[str]]:
    """Header and rows of a rich table as the strings it shows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def mean_and_error(values: list[float], digits: int) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def test_run_is_read_from_its_folder_or_its_file(tmp_path: Path) -> None:
    metrics = make_metrics(seed=3)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(metrics))
    run = load_run(tmp_path)
    assert run == load_run(str(file))
    assert (run.path, run.name, run.method, run.seed) == (
        tmp_path,
        "progressive-seed3",
        "progressive",
        3,
    )
    assert run.steps == metrics["steps"] and run.summary == metrics["summary"]


def without(field: str) -> dict[str, Any]:
    return {key: value for key, value in make_metrics().items() if key != field}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(make_metrics())[:5000], "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        ("[1, 2]", r"not a run of format 1 \(format: None\)"),
        ('{"accuracy": 0.9}', r"not a run of format 1 \(format: None\)"),
        (json.dumps(make_metrics() | {"format": 2}), r"not a run of format 1 \(format: 2\)"),
        (json.dumps(without("summary")), "'summary' is missing or not a dict"),
        (json.dumps(make_metrics() | {"steps": {}}), "'steps' is missing or not a list"),
        (json.dumps(make_metrics() | {"model": {"name": "x"}}), "no whole number 'num_blocks'"),
        (json.dumps(make_metrics() | {"steps": [{"step": 1}, {"loss": 1.0}]}), r"steps\[1\] has"),
        (json.dumps(make_metrics() | {"stages": [7]}), r"stages\[0\] has no whole number 'stage'"),
        (json.dumps(make_metrics() | {"evaluations": [{"step": "x"}]}), r"evaluations\[0\] has"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) and len(value) < 60 else "",
)
def test_file_that_is_no_run_is_one_clear_error(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "metrics.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_run(tmp_path)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_folder_without_a_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics.json here"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="absent: no metrics.json here"):
        load_run(tmp_path / "absent")


def test_comparison_shows_the_stored_figures(store: Callable[[dict[str, Any]], Run]) -> None:
    stored = {
        method: [make_metrics(method, seed) for seed in range(3)]
        for method in ("progressive", "lora", "full")
    }
    runs = [store(metrics) for repeats in stored.values() for metrics in repeats]
    header, *rows = cells(comparison_table(runs))
    assert header == [
        *("Method", "Runs", "accuracy", "Training (s)", "Training / full", "Updates saved (%)"),
        *("Peak state (MiB)", "Peak saved activations (MiB)"),
    ]
    assert [row[0] for row in rows] == ["full", "progressive", "lora"]

    def column(method: str, key: str) -> list[float]:
        return [metrics["summary"][key] for metrics in stored[method]]

    full_seconds = statistics.fmean(column("full", "train_seconds"))
    for row in rows:
        seconds = column(row[0], "train_seconds")
        assert row[1:] == [
            "3",
            mean_and_error(column(row[0], "metric"), 4),
            mean_and_error(seconds, 1),
            f"{statistics.fmean(seconds) / full_seconds:.3f}",
            f"{100 * column(row[0], 'updates_saved_share')[0]:.1f}",
            f"{column(row[0], 'peak_state_bytes')[0] / 1024**2:.1f}",
            f"{column(row[0], 'peak_activation_bytes')[0] / 1024**2:.1f}",
        ]
    markdown = markdown_table(runs).splitlines()
    assert [line.strip("| ").split(" | ") for line in markdown if "---" not in line] == [
        header,
        *rows,
    ]
    assert markdown[1] == "| --- |" + " ---: |" * 7


def test_one_seed_has_no_standard_error(store: Callable[[dict[str, Any]], Run]) -> None:
    metrics = make_metrics()
    (row,) = cells(comparison_table([store(metrics)]))[1:]
    assert row[1:5] == [
        "1",
        f"{metrics['summary']['metric']:.4f}",
        f"{metrics['summary']['train_seconds']:.1f}",
        "–",  # no full run to relate to
    ]


def test_names_without_the_seed_tell_rows_of_one_method_apart(
    store: Callable[[dict[str, Any]], Run],
) -> None:
    runs = [store(make_metrics("progressive", seed)) for seed in (0, 1)]
    cached = [make_metrics("progressive", seed) for seed in (0, 1)]
    runs += [store(run | {"name": f"progressive-cache-seed{run['seed']}"}) for run in cached]
    runs += [store(make_metrics("full", 5) | {"name": "my baseline"})]
    rows = cells(comparison_table(runs))[1:]
    assert [row[:2] for row in rows] == [
        ["full", "1"],
        ["progressive", "2"],
        ["progressive-cache", "2"],
    ]


def test_same_names_in_two_folders_are_two_rows(tmp_path: Path) -> None:
    runs = []
    for folder in ("before", "after"):
        for seed in (0, 1):
            path = tmp_path / folder / f"full-seed{seed}"
            path.mkdir(parents=True)
            (path / "metrics.json").write_text(json.dumps(make_metrics("full", seed)))
            runs.append(load_run(path))
    rows = cells(comparison_table(runs))[1:]
    assert [row[:2] for row in rows] == [["full", "2"], ["after/full", "2"]]


def test_figures_that_were_not_stored_are_shown_as_missing(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    stored = [make_metrics("progressive", seed) for seed in range(3)]
    values = [metrics["summary"]["metric"] for metrics in stored]
    stored[1]["summary"]["metric"] = None
    for metrics in stored:
        del metrics["summary"]["peak_state_bytes"]
        metrics["summary"]["train_seconds"] = float("nan")
        metrics["stages"][1]["step_ms_median"] = None
        del metrics["stages"][1]["state_bytes"]
        metrics["steps"][3]["loss"] = float("nan")
        del metrics["evaluations"][0]["metric"]
        metrics["meta"], metrics["data"], metrics["config"] = {}, {}, {}
    runs = [store(metrics) for metrics in stored]
    (row,) = cells(comparison_table(runs))[1:]
    assert row[2:5] == [f"{mean_and_error(values[::2], 4)} (2 of 3)", "–", "–"]
    assert row[6] == "–"
    stage = cells(stage_table(runs))[2]
    assert stage[1] == "2" and stage[4:8] == ["–", "–", "0.778", "–"]
    assert "nan" not in write_report(runs, tmp_path / "out").html.read_text().split("<h2>Plots")[0]


@pytest.mark.parametrize("call", [comparison_table, stage_table, markdown_table])
def test_runs_that_cannot_be_compared_are_one_clear_error(
    store: Callable[[dict[str, Any]], Run], call: Callable[[list[Run]], object]
) -> None:
    with pytest.raises(ValueError, match="no runs to report"):
        call([])
    run, other = store(make_metrics()), store(make_metrics("full") | {"metric_name": "perplexity"})
    with pytest.raises(ValueError, match=r"different metrics \(accuracy, perplexity\)"):
        call([run, other])
    with pytest.raises(ValueError, match="run0: this run, or one like it, is given twice"):
        call([run, run, run])


def test_stage_rows_show_expected_beside_measured_step_cost(
    store: Callable[[dict[str, Any]], Run],
) -> None:
    stored = [make_metrics(method) for method in ("full", "progressive", "lora")]
    header, *rows = cells(stage_table([store(metrics) for metrics in stored]))
    expected = header.index("Step / full, expected from block FLOPs")
    measured = header.index("Step / full, measured")
    assert [row[expected] for row in rows] == [
        *("1.000", "1.000", "1.000"),
        *("1.000", "0.778", "0.556"),
        *("–", "–", "–"),
    ]
    full_ms = statistics.median(step["step_ms"] for step in stored[0]["steps"])
    stages = [stage for metrics in stored for stage in metrics["stages"]]
    for row, stage in zip(rows, stages, strict=True):
        assert row[measured] == f"{stage['step_ms_median'] / full_ms:.3f}"
        assert row[1:5] == [
            str(stage["stage"] + 1),
            str(stage["boundary"]),
            f"{stage['active_params'] / 1e6:.2f}",
            f"{stage['step_ms_median']:.1f}",
        ]
        assert row[7:] == [
            f"{stage['state_bytes'] / 1024**2:.1f}",
            f"{stage['activation_bytes'] / 1024**2:.1f}",
            f"{stage['metric']:.4f}",
        ]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"boundary": 3, "embeddings": False}, 1 - 2 / 3 * 3 / 6),
        ({"boundary": 6, "embeddings": False}, 1 / 3),
        # Embeddings that train: backward runs through the frozen blocks, 1 - f/3.
        ({"boundary": 0, "embeddings": True, "trainable": [False] * 3 + [True] * 3}, 1 - 3 / 6 / 3),
        # Blocks 2 and 4 of 6: two below the boundary, two frozen above it.
        (
            {"boundary": 2, "embeddings": False}
            | {"trainable": [False, False, True, False, True, False]},
            1 - (2 * 2 + 2) / 18,
        ),
    ],
    ids=["truncated", "head only", "embeddings train", "two single blocks"],
)
def test_expected_step_cost_follows_the_plan(
    store: Callable[[dict[str, Any]], Run], plan: dict[str, Any], expected: float
) -> None:
    metrics = make_metrics(stages=1)
    del metrics["stages"][0]["embeddings"]
    metrics["stages"][0].update(plan)
    header, row = cells(stage_table([store(metrics)]))
    assert row[header.index("Step / full, expected from block FLOPs")] == f"{expected:.3f}"


def test_full_step_is_the_median_over_all_full_runs(
    store: Callable[[dict[str, Any]], Run],
) -> None:
    full = [make_metrics("full", seed) for seed in (0, 1)]
    progressive = store(make_metrics())

    def measured() -> str:
        header, *rows = cells(stage_table([progressive, *map(store, full)]))
        return rows[-1][header.index("Step / full, measured")]

    step_ms = progressive.stages[-1]["step_ms_median"]
    steps = [step["step_ms"] for metrics in full for step in metrics["steps"]]
    assert measured() == f"{step_ms / statistics.median(steps):.3f}"
    for metrics in full:
        metrics["steps"] = []
        metrics["stages"][0]["step_ms_median"] = 99_999.0
    stages = [stage["step_ms_median"] for metrics in full for stage in metrics["stages"]]
    assert measured() == f"{step_ms / statistics.median(stages):.3f}"


def test_tables_fit_into_a_narrow_terminal(store: Callable[[dict[str, Any]], Run]) -> None:
    runs = [store(make_metrics(method, seed)) for method in ("full", "lora") for seed in range(3)]
    for table in (comparison_table(runs), stage_table([*runs, store(make_metrics())])):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table)
        shown = console.export_text()
        assert "…" not in shown
        for row in cells(table)[1:]:
            assert all(cell in shown for cell in row[1:])


class References(HTMLParser):
    """Tags of a page, and everything in it that a browser would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = re.findall(r"url\(|@import", page)
        self.images: list[bytes] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "src" and value and value.startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href", "srcset", "data", "poster", "action"):
                self.loaded.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures of the last report by name, as they were when they were saved."""
    figures: dict[str, Any] = {}
    save = Figure.savefig

    def savefig(self: Figure, path: Path, **options: Any) -> None:
        save(self, path, **options)
        figures[path.stem] = self

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


ALL_PLOTS = [
    *("loss", "loss_over_seconds", "loss_over_updates"),
    *("metric_over_seconds", "metric_over_steps", "metric_over_updates", "stages", "units"),
]
# without stages nobody knows how many parameters a step has updated
WITHOUT_STAGES = [name for name in ALL_PLOTS[:6] if "updates" not in name]


def test_report_is_one_file_that_holds_its_plots(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    stored = [make_metrics(method, seed) for method in ("full", "progressive") for seed in range(3)]
    runs = [store(metrics) for metrics in stored]
    paths = write_report(runs, tmp_path / "new" / "folder")
    assert list(paths.plots) == ALL_PLOTS
    images = [path.read_bytes() for path in paths.plots.values()]
    assert all(image.startswith(PNG) for image in images)
    page = References(paths.html.read_text(encoding="utf-8"))
    assert page.images == images
    assert page.loaded == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    for header, *rows in (cells(comparison_table(runs)), cells(stage_table(runs))):
        assert all(cell in page.text for row in (header, *rows) for cell in row)
    for stage in stored[-1]["stages"]:
        assert f"{stage['tokens_per_second']:,.0f}" in page.text
        assert f"{stage['gradient_bytes'] / 1024**2:.1f}" in page.text
        assert f"{stage['first_step']}-{stage['last_step']}" in page.text
    share = 100 * stored[-1]["summary"]["updates_saved_share"]
    assert f"with {share:.0f} % fewer parameter updates" in page.text
    assert "peft" not in page.text
    for stored_text in ("1f0c2a9d7e5b", "torch 2.13.0", "all-minilm-l6-v2", "batch_size = 16"):
        assert stored_text in page.text


@pytest.mark.parametrize(
    ("chosen", "plots"),
    [
        ([make_metrics("progressive")], ALL_PLOTS),
        ([make_metrics("full", stages=1)], ALL_PLOTS),
        ([make_metrics("full") | {"stages": [], "summary": {}}], WITHOUT_STAGES),
        ([make_metrics() | {"steps": [], "evaluations": []}], ALL_PLOTS[6:]),
        ([make_metrics() | {"steps": [], "evaluations": [], "stages": []}], []),
    ],
    ids=["one run", "one stage", "no stages", "stages only", "nothing"],
)
def test_plots_without_figures_are_left_out(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    chosen: list[dict[str, Any]],
    plots: list[str],
) -> None:
    paths = write_report([store(metrics) for metrics in chosen], tmp_path / "out")
    assert list(paths.plots) == plots
    assert len(References(paths.html.read_text(encoding="utf-8")).images) == len(plots)


def test_text_of_a_run_stays_text(store: Callable[[dict[str, Any]], Run], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $\\frac{$ [bold red]x[/] | y"
    metrics = make_metrics() | {"name": evil, "metric_name": "a<b>&$_{$"}
    metrics["data"]["description"] = metrics["model"]["name"] = evil
    metrics["meta"]["device"] = metrics["config"]["note"] = "<img src=x onerror=alert(1)>"
    other = make_metrics() | {"metric_name": "a<b>&$_{$"}  # a second name, so that names are labels
    runs = [store(metrics), store(other)]
    source = write_report(runs, tmp_path / "out").html.read_text(encoding="utf-8")
    page = References(source)
    assert "<script" not in source and "<img src=x" not in source
    assert "script" not in page.tags and page.loaded == []
    assert evil in page.text and "a<b>&$_{$" in page.text
    assert evil in [row[0] for row in cells(comparison_table(runs))]
    assert evil.replace("|", "\\|") in markdown_table(runs)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    assert "[bold red]x[/]" in console.export_text()


def test_plots_show_the_stored_figures(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    stored = [make_metrics(method, seed) for method in ("full", "progressive") for seed in range(2)]
    write_report([store(metrics) for metrics in stored], tmp_path / "out")

    (ax,) = drawn["metric_over_seconds"].axes
    lines = {line.get_label(): line for line in ax.lines}
    line = lines["progressive (mean of 2 runs)"]
    for values, key in ((line.get_xdata(), "train_seconds"), (line.get_ydata(), "metric")):
        repeats = [[entry[key] for entry in metrics["evaluations"]] for metrics in stored[2:]]
        assert list(values) == pytest.approx([sum(pair) / 2 for pair in zip(*repeats, strict=True)])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training time (s)", "validation accuracy")

    heights = [
        [bar.get_height() for bar in ax.patches if bar.get_height()] for ax in drawn["stages"].axes
    ]
    keys = ("step_ms_median", "tokens_per_second", "state_bytes")
    for key, shown in zip((*keys, "gradient_bytes", "activation_bytes"), heights, strict=True):
        scale = 1024**2 if key.endswith("bytes") else 1
        pairs = [(stored[first], stored[first + 1], i) for first in (0, 2) for i in range(3)]
        means = [(a["stages"][i][key] + b["stages"][i][key]) / 2 / scale for a, b, i in pairs]
        assert shown == pytest.approx(means)
    segments = [
        segment
        for lines in drawn["stages"].axes[0].collections
        for segment in lines.get_segments()
        if segment[0][1] == segment[-1][1]  # error bars are vertical
    ]
    full_ms = statistics.median(x["step_ms"] for metrics in stored[:2] for x in metrics["steps"])
    shares = (1, 1, 1, 1, 1 - 4 / 18, 1 - 8 / 18)
    assert [segment[0][1] for segment in segments] == pytest.approx([full_ms * x for x in shares])

    loss = drawn["loss"].axes[0]
    assert [text.get_text() for text in loss.texts] == ["k=0", "k=2", "k=4"]
    assert {"optimizer step", "training loss"} == {loss.get_xlabel(), loss.get_ylabel()}
    raw = [entry["loss"] for entry in stored[2]["steps"]]
    assert any(list(line.get_ydata()) == raw and line.get_alpha() < 0.5 for line in loss.lines)

    run, steps = stored[2], stored[2]["steps"]
    seconds = np.cumsum([step["step_ms"] / 1e3 for step in steps])
    updates = np.cumsum([run["stages"][step["stage"]]["active_params"] for step in steps]) / 1e9
    assert updates[-1] == run["summary"]["updates"] / 1e9
    for name, ends in (("loss_over_seconds", seconds), ("loss_over_updates", updates)):
        (ax,) = drawn[name].axes
        faint = [line for line in ax.lines if list(line.get_ydata()) == raw]
        assert list(faint[0].get_xdata()) == pytest.approx(list(ends))
        assert [text.get_text() for text in ax.texts] == ["k=0", "k=2", "k=4"]
        edges = np.array([max(0, ax.get_xlim()[0]), *ends[[49, 99, 149]]])
        middles = (edges[1:] + edges[:-1]) / 2
        assert [text.xy[0] for text in ax.texts] == pytest.approx(list(middles))
    (ax,) = drawn["metric_over_updates"].axes
    line = next(x for x in ax.lines if x.get_label() == "progressive (mean of 2 runs)")
    at = [updates[entry["step"] - 1] for entry in run["evaluations"]]
    assert list(line.get_xdata()) == pytest.approx(at)
    assert ax.get_xlabel() == "parameter updates (billions)"

    trainable = [
        [colour == to_hex("#D55E00") for colour in map(to_hex, unit.get_facecolor())]
        for unit in drawn["units"].axes[1].collections
    ]
    first, second, third = [True, False, False], [True, True, False], [True] * 3
    assert trainable == [first] * 3 + [second] * 2 + [third] * 3
    edges = [path.get_extents().x0 for path in drawn["units"].axes[1].collections[0].get_paths()]
    assert edges == [0.5, 50.5, 100.5]


def with_cache(metrics: dict[str, Any]) -> dict[str, Any]:
    """The run as the method progressive-cache stores it: bypassed, then half, then all read."""
    stages = metrics["stages"]
    for stage, (state, hits) in zip(
        stages, (("bypassed", 0), ("on", 400), ("on", 800)), strict=True
    ):
        on = state == "on"
        stage["cache"] = {
            "state": state,
            "reason": "" if on else "nothing <is> frozen",
            "level": stage["boundary"],
            "rows": {str(stage["boundary"]): 1234} if on else {},
            "hits": hits,
            "misses": 800 - hits if on else 0,
            "nbytes": 5 * 2**20 if on else 0,
            "prefix_ms": 1.25 if on else None,
            "read_ms": 0.0625 if on else None,
        }
    return metrics | {"method": "progressive-cache", "name": "progressive-cache-seed0"}


def test_what_the_cache_did_is_shown_stage_by_stage(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    plain = [store(make_metrics(method)) for method in ("full", "progressive")]
    without = References(write_report(plain, tmp_path / "plain").html.read_text()).text
    assert "Prefix cache" not in without and len(drawn["stages"].axes) == 5
    cached = store(with_cache(make_metrics()))
    source = write_report([*plain, cached], tmp_path / "out").html.read_text()
    section = source.split("Prefix cache")[1].split("<h2>")[0]
    rows = [
        "bypassed 0 0 0 – 0.0 – – nothing <is> frozen",
        "on 1,234 400 400 50.0 5.0 1.250 0.062 ",
        "on 1,234 800 0 100.0 5.0 1.250 0.062 ",
    ]
    found = re.findall(r"<tr>(.*?)</tr>", section)[1:]
    texts = [[References(cell).text for cell in row.split("</td>")[:-1]] for row in found]
    assert [" ".join(row[2:]) for row in texts] == rows
    assert [row[:2] for row in texts] == [["progressive-cache", str(i)] for i in (1, 2, 3)]

    header, *lines = cells(stage_table([*plain, cached]))
    expected = header.index("Step / full, expected from block FLOPs")
    # a third of the blocks frozen and half of the rows read, two thirds and all
    shares = [1, 1 - (2 / 3 + 1 / 6) / 3, 1 - 2 / 3]
    assert [row[expected] for row in lines[6:]] == [f"{share:.3f}" for share in shares]
    axes = drawn["stages"].axes
    heights = [bar.get_height() for bar in axes[5].patches]
    assert axes[5].get_ylabel() == "rows read from the cache (%)"
    assert heights[-2:] == [50, 100] and all(map(math.isnan, heights[:-2]))


def test_contribution_of_blocks_is_drawn_a_panel_per_measure(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    panels = [
        ("train", "fall in validation loss", [0.1, -0.2, 0.3]),
        ("skip", "rise in validation loss", [1.0, 2.0, 3.0]),
        ("gradient", "gradient norm", [5.0, 4.0, 0.0]),
    ]
    path = report.write_contribution_plot(panels, tmp_path / "contribution.png")
    assert path.read_bytes().startswith(PNG)
    axes = drawn["contribution"].axes
    for ax, (name, label, values) in zip(axes, panels, strict=True):
        assert (ax.get_title(), ax.get_ylabel()) == (name, label)
        assert [bar.get_height() for bar in ax.patches] == values
    assert len({bar.get_facecolor() for ax in axes for bar in ax.patches}) == 3


def test_missing_figure_is_a_gap_in_a_plot_not_a_zero(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    metrics = make_metrics()
    del metrics["stages"][1]["state_bytes"]
    write_report([store(metrics)], tmp_path / "out")
    heights = [bar.get_height() for bar in drawn["stages"].axes[2].patches]
    assert len(heights) == 3 and math.isnan(heights[1])


def test_a_method_has_one_colour_in_every_plot_and_report(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    colours: dict[str, set[str]] = {}
    for methods in (("full", "progressive", "lora"), ("lora", "adapter", "progressive")):
        write_report([store(make_metrics(method)) for method in methods], tmp_path / "out")
        for figure in drawn.values():
            for ax in figure.axes:
                for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                    colour = getattr(handle, "get_color", None)
                    face = colour() if colour else handle.patches[0].get_facecolor()
                    colours.setdefault(label, set()).add(to_hex(face))
    named = {method: colours[method] for method in ("full", "progressive", "lora", "adapter")}
    assert all(len(found) == 1 for found in named.values())
    assert len(set.union(*named.values())) == 4


@pytest.mark.parametrize(("stages", "num_blocks"), [(3, 6), (12, 24), (50, 100)])
def test_labels_do_not_overlap(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    drawn: dict[str, Any],
    stages: int,
    num_blocks: int,
) -> None:
    runs = [
        store(make_metrics(method, stages=stages, num_blocks=num_blocks))
        for method in ("full", "progressive", "lora")
    ]
    variant = make_metrics(stages=stages, num_blocks=num_blocks)
    runs.append(store(variant | {"name": "progressive-with-a-long-name-and-a-cache-seed0"}))
    write_report(runs, tmp_path / "out")
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        for ax in figure.axes:
            for texts in (ax.get_xticklabels(), ax.get_yticklabels(), ax.texts):
                boxes = [text.get_window_extent() for text in texts if text.get_text()]
                for one, two in zip(boxes, boxes[1:], strict=False):
                    assert not one.overlaps(two), (name, texts)
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, name
            assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes), name


def test_moving_mean_keeps_constants_and_the_middle_of_a_line() -> None:
    assert list(plots._smooth(np.full(7, 2.5))) == pytest.approx([2.5] * 7)
    line = np.arange(300.0)
    assert list(plots._smooth(line)[10:-10]) == pytest.approx(list(line[10:-10]))
    assert list(plots._smooth(line[:1])) == [0.0]


def test_what_makes_runs_hard_to_compare_is_said(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "PLOTS", ())
    full, progressive = make_metrics("full"), make_metrics()
    same = References(
        write_report([store(full), store(progressive)], tmp_path / "same").html.read_text()
    ).text
    assert "The runs differ" not in same and "changed working tree" not in same
    assert "One seed only, so without a standard error: full, progressive." in same
    progressive["meta"] |= {"device": "one GPU", "dirty": True}
    progressive["config"] |= {"lr": 5e-5}
    runs = [store(full), store(progressive)]
    page = References(write_report(runs, tmp_path / "out").html.read_text()).text
    assert "The runs differ in their devices: CPU, 2 cores; one GPU." in page
    assert "Run from a changed working tree: progressive-seed0." in page
    assert "1f0c2a9d7e5b, changed" in page
    assert "lr = 2e-05" in same and "lr = 2e-05" not in page and "5e-05" in page
    alone = References(write_report([store(make_metrics())], tmp_path / "one").html.read_text())
    assert "No run of the method full" in alone.text


@pytest.mark.parametrize(
    ("seed", "changed", "warned"),
    [
        (1, {"description": "other rows"}, False),  # a seed may choose its own rows
        (0, {"description": "other rows"}, True),
        (1, {"label_names": ["a", "b"]}, True),
    ],
)
def test_methods_that_saw_different_data_are_told_apart_from_seeds_that_did(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    changed: dict[str, Any],
    warned: bool,
) -> None:
    monkeypatch.setattr(document, "PLOTS", ())
    other = make_metrics("progressive", seed)
    other["data"] |= changed
    runs = [store(make_metrics("full")), store(other)]
    text = References(write_report(runs, tmp_path / "out").html.read_text()).text
    assert ("The runs differ in their data" in text) is warned


@pytest.mark.parametrize(
    ("field", "changed", "what"),
    [
        ("config", {"epochs": 1}, "epochs: 3; 1"),
        ("summary", {"steps": 50}, "steps: 150; 50"),
        ("config", {"batch_size": 8}, "batch sizes: 16 x –; 8 x –"),
        ("config", {"accumulate": 2}, "batch sizes: 16 x –; 16 x 2"),
        ("config", {"max_length": 512}, "sequence lengths: –; 512"),
        ("config", {"precision": "bf16"}, "precisions: –; bf16"),
        ("model", {"name": "other"}, "models: all-minilm-l6-v2, 22,700,000 parameters; other"),
        ("data", {"train_rows": 400}, "data: "),
        ("data", {"digest": "another"}, "data: "),
        ("meta", {"device": "one GPU"}, "devices: CPU, 2 cores; one GPU"),
        ("config", {"lr": 1e-3, "stages": 5}, None),
    ],
)
def test_runs_whose_work_differs_have_no_ratio(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
    changed: dict[str, Any],
    what: str | None,
) -> None:
    from progtuning_kernels.cli.app import main

    monkeypatch.setattr(document, "PLOTS", ())
    stored = [make_metrics("full"), make_metrics("full", 1), make_metrics(), make_metrics(seed=1)]
    for metrics in stored:
        metrics["data"]["digest"] = "one"
        if metrics["method"] == "progressive":
            metrics[field] = metrics[field] | changed
    runs = [store(metrics) for metrics in stored]
    full, progressive = cells(comparison_table(runs))[1:]
    assert full[4] == "1.000" and (progressive[4] == "–") is (what is not None)
    header, *stages = cells(stage_table(runs))
    measured = [row[header.index("Step / full, measured")] for row in stages]
    assert "–" not in measured[:6] and (set(measured[6:]) == {"–"}) is (what is not None)
    out = tmp_path / "out"
    main(["report", *(str(run.path) for run in runs), "--output", str(out)])
    text = References((out / "report.html").read_text()).text
    for page in (capsys.readouterr().out, text):
        assert ("Without a ratio to full, whose work was another: progressive." in page) is (
            what is not None
        )
        assert (f"The runs differ in their {what}" in page) is (what is not None)
    assert ("of its training seconds" in text) is (what is None)


def test_each_row_is_related_to_the_full_runs_of_its_own_work(
    store: Callable[[dict[str, Any]], Run],
) -> None:
    runs = []
    for epochs in (1, 3):
        for method in ("full", "progressive"):
            metrics = make_metrics(method) | {"name": f"{method}-{epochs}-seed0"}
            metrics["config"]["epochs"] = epochs
            metrics["summary"]["train_seconds"] *= epochs
            runs.append(store(metrics))
    ratios = {row[0]: row[4] for row in cells(comparison_table(runs))[1:]}
    assert ratios["full-1"] == ratios["full-3"] == "1.000"
    assert ratios["progressive-1"] == ratios["progressive-3"] not in ("–", "1.000")
    assert any("the first of full-1, full-3" in line for line in report.notices(runs))


def test_a_run_that_learnt_nothing_is_named(store: Callable[[dict[str, Any]], Run]) -> None:
    metrics = make_metrics()
    metrics["summary"] |= {"failure": "the validation loss is nan", "metric": None}
    lines = report.notices([store(make_metrics("full")), store(metrics)])
    assert "progressive-seed0 learnt nothing: the validation loss is nan." in lines


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_missing_package_is_one_line_that_names_the_extra(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=re.escape('pip install "progtuning_kernels[train]"')
    ) as e:
        write_report([store(make_metrics())], tmp_path / "out")
    assert str(e.value).startswith(f"a report needs {module}") and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_report_reads_stored_runs_with_nothing_of_the_training_stack() -> None:
    lazy = {"matplotlib", "jinja2", "rich"}
    files = list(Path(report.__file__).parent.glob("*.py"))
    assert len(files) >= 3
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert getattr(node, "level", 0) <= 1  # nothing else of this package
                names = [alias.name for alias in node.names]
                modules = {(getattr(node, "module", None) or name).split(".")[0] for name in names}
                assert not modules & {"torch", "transformers", "peft", "accelerate"}
                assert not (modules & lazy and node in tree.body)
