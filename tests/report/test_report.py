import ast
import html
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
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs
from rich.console import Console

from progtuning_kernels import report
from progtuning_kernels.report import (
    Run,
    charts,
    comparison_table,
    document,
    findings,
    load_run,
    markdown_table,
    write_report,
)

NUM_PARAMS = 22_700_000
ALL_BLOCKS_PARAMS = 10_646_784
EMBEDDING_PARAMS = 11_900_000
ALL_CHARTS = ["metric", "loss", "seconds", "memory"]


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
            | {"trainable": [block >= boundary for block in range(num_blocks)], "head": True}
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
        (json.dumps(without("summary")), "'summary' is missing"),
        (json.dumps(make_metrics() | {"summary": []}), "'summary' is not what a run stores there"),
        (json.dumps(make_metrics() | {"steps": [1]}), "'steps' is not what a run stores there"),
        (json.dumps(make_metrics() | {"stages": [{}]}), "a stage does not say what it trains"),
        ('{"log_history": 7}', "'log_history' is no list of the Trainer's logs"),
        ('{"log_history": [3]}', "'log_history' is no list of the Trainer's logs"),
        ('{"log_history": [{"loss": 1.0}]}', "'log_history' is no list of the Trainer's logs"),
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
    page = write_report(runs, tmp_path / "out").read_text()
    assert "nan" not in page.split("<h2>What the runs")[0]
    charts_of(write_report(runs, tmp_path / "out"))


@pytest.mark.parametrize("call", [comparison_table, markdown_table])
def test_runs_that_cannot_be_compared_are_one_clear_error(
    store: Callable[[dict[str, Any]], Run], call: Callable[[list[Run]], object]
) -> None:
    with pytest.raises(ValueError, match="no runs to report"):
        call([])
    run, other = store(make_metrics()), store(make_metrics("full") | {"metric_name": "perplexity"})
    with pytest.raises(ValueError, match=r"different metrics \(accuracy, perplexity\)"):
        call([run, other])
    cut = run.path / "checkpoint-5"
    cut.mkdir()
    (cut / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(ValueError, match=r"\(accuracy, loss; of .*run0 there is only a checkpoint"):
        call([run, load_run(cut)])
    with pytest.raises(ValueError, match="run0: this run, or one like it, is given twice"):
        call([run, run, run])


def test_tables_fit_into_a_narrow_terminal(store: Callable[[dict[str, Any]], Run]) -> None:
    runs = [store(make_metrics(method, seed)) for method in ("full", "lora") for seed in range(3)]
    for table in (comparison_table(runs), comparison_table([*runs, store(make_metrics())])):
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
        self.tags: list[str] = []
        self.loaded: list[str] = re.findall(r"url\(|@import|https?:", page)
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.loaded.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def own_part(page: Path) -> str:
    """The source of a report less plotly.js."""
    return page.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def charts_of(page: Path) -> dict[str, dict[str, Any]]:
    """The figures in a report by name, in the order of the page, all known to plotly."""
    calls = re.findall(r'^draw\("(\w+)", (.*)\);$', own_part(page), re.MULTILINE)
    figures = {name: json.loads(figure) for name, figure in calls}
    for figure in figures.values():
        Figure(figure)  # which refuses what plotly.js has not
    return figures


def test_report_is_one_file_that_needs_no_network(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    stored = [make_metrics(method, seed) for method in ("full", "progressive") for seed in range(3)]
    runs = [store(metrics) for metrics in stored]
    path = write_report(runs, tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert get_plotlyjs() in path.read_text(encoding="utf-8")
    assert list(charts_of(path)) == ALL_CHARTS
    page = References(own_part(path))
    assert page.loaded == []
    assert page.tags.count("script") == 2
    assert not {*page.tags} & {"link", "iframe", "object", "img"}
    header, *rows = cells(comparison_table(runs))
    assert all(cell in page.text for row in (header, *rows) for cell in row)
    assert all(line in page.text for line in findings(runs))
    for stage in stored[-1]["stages"]:
        assert str(stage["gradient_bytes"]) in page.text
    for text in ("1f0c2a9d7e5b", '"torch": "2.13.0"', "all-minilm-l6-v2", '"batch_size": 16'):
        assert text in page.text


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ([make_metrics("progressive")], ALL_CHARTS),
        ([make_metrics("full")], ALL_CHARTS[:2]),  # one bar is no chart
        ([make_metrics("full"), make_metrics("lora")], ALL_CHARTS),
        ([make_metrics("full") | {"stages": [], "summary": {}}], ALL_CHARTS[:2]),
        ([make_metrics() | {"steps": [], "evaluations": []}], ALL_CHARTS[2:]),
        ([make_metrics() | {"steps": [], "evaluations": [], "stages": []}], []),
    ],
    ids=["one run", "one bar", "two bars", "no stages", "stages only", "nothing"],
)
def test_charts_without_figures_are_left_out(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    chosen: list[dict[str, Any]],
    shown: list[str],
) -> None:
    page = write_report([store(metrics) for metrics in chosen], tmp_path / "out")
    assert list(charts_of(page)) == shown
    assert References(own_part(page)).tags.count("figure") == len(shown)


def test_text_of_a_run_stays_text(store: Callable[[dict[str, Any]], Run], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $\\frac{$ [bold red]x[/] | y"
    metrics = make_metrics() | {"name": evil, "metric_name": "a<b>&$_{$"}
    metrics["data"]["description"] = metrics["model"]["name"] = evil
    metrics["meta"]["device"] = metrics["config"]["note"] = "<img src=x onerror=alert(1)>"
    # a second name, so that names are labels
    other = make_metrics(seed=1) | {"metric_name": "a<b>&$_{$"}
    runs = [store(metrics), store(other)]
    path = write_report(runs, tmp_path / "out")
    page = References(own_part(path))
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.loaded == []
    assert evil in page.text and "a<b>&$_{$" in page.text
    shown = charts_of(path)
    (name,) = {trace["name"] for trace in shown["metric"]["data"]} - {"progressive"}
    assert "<" not in name and html.unescape(name) == evil
    assert shown["metric"]["layout"]["yaxis"]["title"]["text"] == "validation a&lt;b&gt;&amp;$_{$"
    for chart in ("seconds", "memory"):
        above = [label["text"] for label in shown[chart]["layout"]["annotations"]]
        assert any(name in text for text in above) and not any(evil in text for text in above)
        assert any(name in about for about in shown[chart]["data"][0]["customdata"])
    assert evil in [row[0] for row in cells(comparison_table(runs))]
    assert evil.replace("|", "\\|") in markdown_table(runs)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    assert "[bold red]x[/]" in console.export_text()


def test_charts_show_the_stored_figures(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    stored = [make_metrics(method, seed) for method in ("full", "progressive") for seed in range(2)]
    shown = charts_of(write_report([store(metrics) for metrics in stored], tmp_path / "out"))

    mean, *singles = [t for t in shown["metric"]["data"] if t["name"] == "progressive"]
    for axis, key in (("x", "train_seconds"), ("y", "metric")):
        repeats = [[entry[key] for entry in metrics["evaluations"]] for metrics in stored[2:]]
        assert mean[axis] == pytest.approx([sum(pair) / 2 for pair in zip(*repeats, strict=True)])
        assert [single[axis] for single in singles] == repeats
    assert all(single["opacity"] < mean["opacity"] for single in singles)
    titles = [shown["metric"]["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert titles == ["training time (s)", "validation accuracy"]

    (loss,) = [t for t in shown["loss"]["data"] if t["name"] == "progressive"]
    losses = np.mean([[step["loss"] for step in metrics["steps"]] for metrics in stored[2:]], 0)
    assert loss["x"] == [*range(1, 151)] and loss["y"] == pytest.approx(charts.smooth(losses))
    assert loss["text"][49:51] == ["stage 1 trains all", "stage 2 trains blocks 2–5, head"]
    starts = [(line["x0"], line["label"]["text"]) for line in shown["loss"]["layout"]["shapes"]]
    assert starts == [(50.5, "stage 2"), (100.5, "stage 3")]  # full training has one stage

    def mean_of(first: int, stage: int, key: str) -> float:
        return sum(metrics["stages"][stage][key] for metrics in stored[first : first + 2]) / 2

    parts = {
        (y, place): (x, text)
        for place, trace in enumerate(shown["seconds"]["data"])
        for y, x, text in zip(trace["y"], trace["x"], trace["text"], strict=True)
    }
    full_s = sum(mean_of(0, stage, "train_seconds") for stage in range(3))
    assert parts[0, 0] == (pytest.approx(full_s), "all") and len(parts) == 4
    for stage, text in enumerate(("all", "blocks<br>2–5<br>head", "blocks<br>4–5<br>head")):
        assert parts[1, stage] == (pytest.approx(mean_of(2, stage, "train_seconds")), text)
    above = [label["text"] for label in shown["seconds"]["layout"]["annotations"]]
    assert above[0] == f"<b>full</b>, {full_s:.1f} s"

    for key, trace in zip(charts._MEMORY, shown["memory"]["data"], strict=True):
        bars = [(0, 0), (2, 0), (2, 1), (2, 2)]
        assert trace["x"] == pytest.approx([mean_of(*bar, key) / 1024**2 for bar in bars])
    assert [label["text"] for label in shown["memory"]["layout"]["annotations"]] == [
        "<b>full</b>: all",
        "<b>progressive</b>: all",
        "blocks 2–5, head",
        "blocks 4–5, head",
    ]


def test_methods_with_the_same_losses_share_a_line(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    progressive = make_metrics()
    cached = progressive | {"method": "progressive-cache", "name": "progressive-cache-seed0"}
    cached["steps"] = [step | {"loss": step["loss"] + 1e-7} for step in progressive["steps"]]
    runs = [store(metrics) for metrics in (make_metrics("full"), progressive, cached)]
    shown = charts_of(write_report(runs, tmp_path / "out"))
    names = [trace["name"] for trace in shown["loss"]["data"]]
    assert names == ["full", "progressive = progressive-cache"]
    others = [store(cached | {"method": f"other-{i}", "name": f"other-{i}"}) for i in range(5)]
    shown = charts_of(write_report([*runs, *others], tmp_path / "out"))
    names = [trace["name"] for trace in shown["loss"]["data"]]
    assert names == ["full", "progressive = progressive-cache = 5 more"]


def test_missing_figure_is_a_gap_in_a_chart_not_a_zero(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    metrics = make_metrics()
    del metrics["stages"][1]["state_bytes"]
    shown = charts_of(write_report([store(metrics)], tmp_path / "out"))
    state, gradients, _ = shown["memory"]["data"]
    assert [x is None for x in state["x"]] == [False, True, False] and None not in gradients["x"]


def test_a_method_has_one_colour_in_every_chart(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    colours: dict[str, set[str]] = {}
    methods = ("full", "progressive", "lora", "adapter")
    stored = [make_metrics(method) for method in methods]
    stored[1]["stages"] = []  # it is in no chart of stages
    shown = charts_of(write_report([store(metrics) for metrics in stored], tmp_path / "out"))
    for trace in shown["metric"]["data"] + shown["loss"]["data"]:
        colours.setdefault(trace["name"], set()).add(trace["line"]["color"].lower())
    first = shown["seconds"]["data"][0]
    for (name, _), colour in zip(first["customdata"], first["marker"]["color"], strict=True):
        colours[name].add(colour)
    assert set(colours) == set(methods) and all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 4


@pytest.mark.parametrize(
    ("method", "blocks", "embeddings", "head", "text"),
    [
        ("full", "111111", True, True, "all"),
        ("progressive", "111111", False, True, "blocks 0–5, head"),
        ("progressive", "000001", False, False, "block 5"),
        ("random", "101100", True, True, "embeddings, blocks 0,\u00a02–3, head"),
        ("random", "1010101", False, True, "4 blocks, head"),
        ("lora", "001111", False, True, "LoRA in blocks 2–5, head"),
        ("progressive", "000000", False, True, "head"),
        ("progressive", "000000", False, False, "nothing"),
    ],
)
def test_a_stage_says_what_trains(
    store: Callable[[dict[str, Any]], Run],
    method: str,
    blocks: str,
    embeddings: bool,
    head: bool,
    text: str,
) -> None:
    stage = {"trainable": [flag == "1" for flag in blocks], "embeddings": embeddings, "head": head}
    assert charts.trains(store(make_metrics(method)), stage) == text


def test_a_run_of_many_stages_has_few_bars(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    runs = [store(make_metrics(method, stages=50, num_blocks=100)) for method in ("full", "other")]
    runs.append(store(make_metrics(stages=50, num_blocks=100)))
    shown = charts_of(write_report(runs, tmp_path / "out"))
    assert len(shown["memory"]["data"][0]["x"]) == 2 + 8 and "shapes" not in shown["loss"]["layout"]
    assert len(shown["seconds"]["data"]) == 50


def test_result_is_said_in_words(store: Callable[[dict[str, Any]], Run]) -> None:
    def stored(method: str, seed: int, metric: float, seconds: float) -> Run:
        metrics = make_metrics(method, seed)
        metrics["summary"] |= {"metric": metric, "train_seconds": seconds}
        return store(metrics)

    runs = [stored("full", 0, 0.63, 90.0), stored("full", 1, 0.65, 110.0)]
    runs += [stored("progressive", 0, 0.62, 70.0), stored("progressive", 1, 0.64, 70.0)]
    assert findings(runs) == [
        "Methods compared: full, progressive. Runs: 2 each. Model: all-minilm-l6-v2. "
        "Data: docstrings of 4 installed packages. Device: CPU, 2 cores.",
        # variances 0.0002 of both, so an error of sqrt(2 * 0.0002 / 2)
        "progressive: 0.70 of full training's time, accuracy 0.0100 lower "
        "(0.7 standard errors of the difference).",
    ]
    assert findings([runs[0], runs[2]])[1].endswith("time, accuracy 0.0100 lower.")
    assert len(findings(runs[2:])) == 1  # nothing to relate to


def test_moving_mean_keeps_constants_and_the_middle_of_a_line() -> None:
    assert list(charts.smooth(np.full(7, 2.5))) == pytest.approx([2.5] * 7)
    line = np.arange(300.0)
    assert list(charts.smooth(line)[10:-10]) == pytest.approx(list(line[10:-10]))
    assert list(charts.smooth(line[:1])) == [0.0]


def test_what_makes_runs_hard_to_compare_is_said(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "CHARTS", {})
    full, progressive = make_metrics("full"), make_metrics()
    same = References(
        write_report([store(full), store(progressive)], tmp_path / "same").read_text()
    ).text
    assert "The runs differ" not in same and "uncommitted" not in same
    assert "One run only, so its metric may differ by chance: full, progressive." in same
    progressive["meta"] |= {"device": "one GPU", "dirty": True}
    progressive["meta"]["versions"] = full["meta"]["versions"] | {"torch": "2.10.0"}
    progressive["config"] |= {"lr": 5e-5}
    runs = [store(full), store(progressive)]
    page = References(write_report(runs, tmp_path / "out").read_text()).text
    assert "The runs differ in their devices: CPU, 2 cores; one GPU." in page
    assert "Run from a working tree with uncommitted changes: progressive-seed0." in page
    assert "option lr" not in same
    assert "The runs differ in their option lr: 2e-05; 5e-05." in page
    assert "The runs differ in their version of torch: 2.13.0; 2.10.0." in page
    assert "version of peft" not in page
    alone = References(write_report([store(make_metrics())], tmp_path / "one").read_text())
    assert "No run of full training: training times have no ratio." in alone.text


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
    monkeypatch.setattr(document, "CHARTS", {})
    other = make_metrics("progressive", seed)
    other["data"] |= changed
    runs = [store(make_metrics("full")), store(other)]
    text = References(write_report(runs, tmp_path / "out").read_text()).text
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

    monkeypatch.setattr(document, "CHARTS", {})
    stored = [make_metrics("full"), make_metrics("full", 1), make_metrics(), make_metrics(seed=1)]
    for metrics in stored:
        metrics["data"]["digest"] = "one"
        if metrics["method"] == "progressive":
            metrics[field] = metrics[field] | changed
    runs = [store(metrics) for metrics in stored]
    full, progressive = cells(comparison_table(runs))[1:]
    assert full[4] == "1.000" and (progressive[4] == "–") is (what is not None)
    out = tmp_path / "out"
    main(["report", *(str(run.path) for run in runs), "--output", str(out)])
    text = References((out / "report.html").read_text()).text
    for page in (capsys.readouterr().out, text):
        unrelated = "Not related to full training, which did other work or learnt nothing: prog"
        assert (unrelated in page) is (what is not None)
        assert (f"The runs differ in their {what}" in page) is (what is not None)


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


def test_seeds_that_did_other_work_are_rows_of_their_own(
    store: Callable[[dict[str, Any]], Run], tmp_path: Path
) -> None:
    stored = [make_metrics("progressive", seed) for seed in range(4)]
    for metrics in stored[2:]:
        metrics["config"]["epochs"] = 1
        metrics["summary"]["steps"] = 50
    runs = [store(metrics) for metrics in [*stored, make_metrics("full", 7)]]
    rows = {row[0]: row for row in cells(comparison_table(runs))[1:]}
    assert {name: row[1] for name, row in rows.items()} == {
        "full": "1",
        "progressive, epochs 3, steps 150": "2",
        "progressive, epochs 1, steps 50": "2",
    }
    for (name, row), metrics in zip(list(rows.items())[1:], (stored[:2], stored[2:]), strict=True):
        assert row[2] == mean_and_error([run["summary"]["metric"] for run in metrics], 4)
        assert (row[4] == "–") is ("epochs 1" in name)
    shown = charts_of(write_report(runs, tmp_path / "out"))
    assert shown["loss"]["data"][2]["name"] == "progressive, epochs 1, steps 50"


def test_a_run_that_learnt_nothing_is_named(store: Callable[[dict[str, Any]], Run]) -> None:
    metrics = make_metrics()
    metrics["summary"] |= {"failure": "the validation loss is nan", "metric": None}
    lines = report.notices([store(make_metrics("full")), store(metrics)])
    assert "progressive-seed0 learnt nothing: the validation loss is nan." in lines


def make_trainer_state(*, with_callback: bool, steps: int = 12) -> dict[str, Any]:
    """What transformers' Trainer stores; a log every 2 steps, an evaluation every 4."""
    logs: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        stage = 1 + (step > 6)
        plan = {"stage": stage, "boundary": 2 * (stage - 1), "active_share": 1 / stage}
        logs.append({"step": step, "loss": 1 / step, "epoch": step / 4, "learning_rate": 1e-3})
        logs[-1] |= plan if with_callback else {}
        if step % 4 == 0:
            speeds = {"eval_runtime": 0.1, "eval_samples_per_second": 9, "eval_steps_per_second": 1}
            logs.append({"step": step, "eval_loss": 1.5, **speeds, "eval_f1": step / 100})
    logs.append({"step": steps, "train_runtime": 20.0, "train_loss": 0.3})
    sizes = {"num_train_epochs": 3, "train_batch_size": 8, "global_step": steps, "max_steps": steps}
    return {"log_history": logs, **sizes}


def test_runs_of_the_trainer_are_read_from_its_state(tmp_path: Path) -> None:
    for name, with_callback in (("full", False), ("mine-seed0", True), ("mine-seed3", True)):
        state = make_trainer_state(with_callback=with_callback)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps(state))
    runs = [load_run(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert [(run.method, run.seed, run.metric_name) for run in runs] == [
        ("full", 0, "f1"),
        ("mine", 0, "f1"),
        ("mine", 3, "f1"),
    ]
    assert runs[0].stages == [] and runs[1].stages == [
        {"stage": 0, "boundary": 0, "first_step": 1, "last_step": 6},
        {"stage": 1, "boundary": 2, "first_step": 7, "last_step": 12},
    ]
    full, mine = cells(comparison_table(runs))[1:]
    assert full == ["full", "1", "0.1200", "20.0", "1.000", "–", "–", "–"]
    assert mine == ["mine", "2", "0.1200", "20.0", "1.000", "–", "–", "–"]
    shown = charts_of(write_report(runs, tmp_path / "out"))
    assert list(shown) == ["metric", "loss"]
    # the Trainer stores no seconds of evaluations
    assert shown["metric"]["layout"]["xaxis"]["title"]["text"] == "optimizer step"
    assert shown["metric"]["data"][0]["x"] == [4, 8, 12]
    assert shown["loss"]["layout"]["shapes"][0]["x0"] == 6.5
    assert shown["loss"]["data"][0]["name"] == "full = mine"  # made of the same numbers
    assert charts.stages_of(report.group_runs(runs)[1])[1]["trains"] == "from block 2 on"


def test_newest_checkpoint_of_the_trainer_counts(tmp_path: Path) -> None:
    for step in (8, 12, 4):
        folder = tmp_path / "lora-seed2" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = make_trainer_state(with_callback=True, steps=step)
        state["log_history"].pop()  # seconds are logged after the last checkpoint
        (folder / "trainer_state.json").write_text(json.dumps(state))
    run = load_run(tmp_path / "lora-seed2")
    assert (run.name, run.method, run.seed) == ("lora-seed2", "lora", 2)
    assert run.summary == {"steps": 12, "train_seconds": None, "metric": 0.12}


@pytest.mark.parametrize("module", ["plotly", "jinja2"])
def test_missing_package_is_one_line_that_says_what_to_install(
    store: Callable[[dict[str, Any]], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install plotly jinja2$") as e:
        write_report([store(make_metrics())], tmp_path / "out")
    assert str(e.value).startswith(f"a report needs {module}") and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_report_reads_stored_runs_with_nothing_of_the_training_stack() -> None:
    lazy = {"plotly", "jinja2", "rich"}
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
