"""Tables for the terminal and a README, and one HTML file with the plots inside."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .plots import PLOTS, contribution_figure
from .runs import (
    MISSING,
    Row,
    Run,
    cache_hit_share,
    cache_of,
    data_line,
    differences,
    distinct,
    expected_step_ratio,
    full_row,
    full_step_ms,
    group_runs,
    mean,
    number,
    numbers,
    ratio,
    show,
    standard_error,
)

if TYPE_CHECKING:
    from rich.table import Table

_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass(frozen=True)
class ReportPaths:
    """Files that `write_report` wrote; `plots` maps a plot's name to its PNG."""

    html: Path
    plots: dict[str, Path]


@dataclass(frozen=True)
class _Cells:
    """A table as text: the terminal, markdown and HTML show the same characters."""

    headers: list[str]
    rows: list[list[str]]


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row per method: metric, seconds, updates saved, peak bytes; mean ± standard error."""
    return _rich_table("Methods compared", _comparison(runs))


def stage_table(runs: Sequence[Run]) -> Table:
    """One row per stage of each run, with the expected and the measured relative step cost.

    report.html has the steps, tokens per second and gradient bytes of each stage as well.
    """
    cells = _stage_cells(runs)
    left_out = ("Steps", "Tokens / s", "Gradients (MiB)")
    kept = [i for i, name in enumerate(cells.headers) if name not in left_out]
    narrow = [[line[i] for i in kept] for line in (cells.headers, *cells.rows)]
    return _rich_table("Stages (k: the boundary)", _Cells(narrow[0], narrow[1:]))


def markdown_table(runs: Sequence[Run]) -> str:
    """The figures of `comparison_table` for a README."""
    cells = _comparison(runs)
    lines = [cells.headers, ["---", *["---:"] * (len(cells.headers) - 1)], *cells.rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def write_report(runs: Sequence[Run], out_dir: str | Path) -> ReportPaths:
    """Write report.html, which needs no other file, and its plots as PNG files beside it.

    A plot that no run has figures for is left out.

    Raises:
        ValueError: no run at all, one run twice, or runs of different metrics.
        ImportError: matplotlib or jinja2 is missing; one line that names the extra.
    """
    rows = group_runs(runs)
    jinja2, mpl_style = _need("jinja2"), _need("matplotlib.style")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Path] = {}
    figures = []
    for name, title, caption, draw in PLOTS:
        with mpl_style.context("default"):  # a user's matplotlibrc does not change a report
            figure = draw(rows)
            if figure is None:
                continue
            plots[name] = out / f"{name}.png"
            figure.savefig(plots[name], dpi=140)
        encoded = base64.b64encode(plots[name].read_bytes()).decode("ascii")
        figures.append({"title": title, "caption": caption, "base64": encoded})
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    )
    shared, differing = _options(rows)
    html = out / "report.html"
    html.write_text(
        template.render(
            headlines=_headlines(rows),
            notices=notices(runs),
            comparison=_comparison(runs),
            stages=_stage_cells(runs),
            cache=_cache_cells(runs),
            figures=figures,
            shared_options=shared,
            differing_options=differing,
            data=distinct(data_line(run) for run in runs),
            models=distinct(_model_line(run) for run in runs),
            provenance=_provenance(rows),
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        ),
        encoding="utf-8",
    )
    return ReportPaths(html=html, plots=plots)


def write_contribution_plot(
    panels: Sequence[tuple[str, str, Sequence[float]]], path: str | Path
) -> Path:
    """Write bars of what every block contributes, a panel per measure, as a PNG file.

    Args:
        panels: measure ("train", "skip" or "gradient"), label of its axis, one value per block.

    Raises:
        ImportError: matplotlib is missing; one line that names the extra.
    """
    with _need("matplotlib.style").context("default"):
        contribution_figure(panels).savefig(path, dpi=140)
    return Path(path)


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"a report needs {module.split('.')[0]} ({error}): "
            'pip install "progtuning_kernels[train]"'
        ) from None


def _show_mean(values: Sequence[float | None], spec: str, scale: float = 1.0) -> str:
    error = standard_error(values)
    shown = show(mean(values), spec, scale)
    if error:  # counts are the same for every seed: "± 0.0" would say nothing
        shown += f" ± {show(error, spec, scale)}"
    known = len(numbers(values))
    return shown if known in (0, len(values)) else f"{shown} ({known} of {len(values)})"


def _summary(row: Row, key: str) -> list[float | None]:
    return [number(run.summary, key) for run in row.runs]


def _metric_spec(run: Run) -> str:
    return ".2f" if run.metric_name == "perplexity" else ".4f"


def _seconds_ratio(rows: Sequence[Row], row: Row) -> float | None:
    """Training seconds over those of the full runs of the same work."""
    full = full_row(rows, row)
    if full is None:
        return None
    return ratio(*(mean(_summary(r, "train_seconds")) for r in (row, full)))


def _comparison(runs: Sequence[Run]) -> _Cells:
    rows = group_runs(runs)
    metric = runs[0].metric_name
    mib = 1 / 2**20
    return _Cells(
        headers=[
            "Method",
            "Runs",
            f"{metric}, lower is better" if metric in _LOWER_IS_BETTER else metric,
            "Training (s)",
            "Training / full",
            "Updates saved (%)",
            "Peak state (MiB)",
            "Peak saved activations (MiB)",
        ],
        rows=[
            [
                row.label,
                str(len(row.runs)),
                _show_mean(_summary(row, "metric"), _metric_spec(runs[0])),
                _show_mean(_summary(row, "train_seconds"), ".1f"),
                show(_seconds_ratio(rows, row), ".3f"),
                _show_mean(_summary(row, "updates_saved_share"), ".1f", 100),
                _show_mean(_summary(row, "peak_state_bytes"), ",.1f", mib),
                _show_mean(_summary(row, "peak_activation_bytes"), ",.1f", mib),
            ]
            for row in rows
        ],
    )


def _stage_cells(runs: Sequence[Run]) -> _Cells:
    rows = group_runs(runs)
    mib = 1 / 2**20

    def cells(row: Row, run: Run, stage: Mapping[str, Any]) -> list[str]:
        base_ms = full_step_ms(full_row(rows, row))
        return [
            row.label if len(row.runs) == 1 else run.name,
            str(stage["stage"] + 1),
            str(stage["boundary"]),
            f"{stage['first_step']}-{stage['last_step']}",
            show(number(stage, "active_params"), ",.2f", 1e-6),
            show(number(stage, "step_ms_median"), ",.1f"),
            show(ratio(number(stage, "step_ms_median"), base_ms), ".3f"),
            show(expected_step_ratio(run, stage), ".3f"),
            show(number(stage, "tokens_per_second"), ",.0f"),
            show(number(stage, "state_bytes"), ",.1f", mib),
            show(number(stage, "gradient_bytes"), ",.1f", mib),
            show(number(stage, "activation_bytes"), ",.1f", mib),
            show(number(stage, "metric"), _metric_spec(run)),
        ]

    return _Cells(
        headers=[
            "Run",
            "Stage",
            "k",
            "Steps",
            "Active params (M)",
            "Step (ms)",
            "Step / full, measured",
            "Step / full, expected from block FLOPs",
            "Tokens / s",
            "State (MiB)",
            "Gradients (MiB)",
            "Saved activations (MiB)",
            runs[0].metric_name,
        ],
        rows=[cells(row, run, stage) for row in rows for run in row.runs for stage in run.stages],
    )


def _cache_cells(runs: Sequence[Run]) -> _Cells:
    """One row per stage that had a prefix cache; no rows where no run had one."""
    rows = group_runs(runs)
    return _Cells(
        headers=[
            "Run",
            "Stage",
            "State",
            "Stored rows",
            "Rows read",
            "Rows computed",
            "Read (%)",
            "Size (MiB)",
            "Computing a row (ms)",
            "Reading a row (ms)",
            "Why not on",
        ],
        rows=[
            [
                row.label if len(row.runs) == 1 else run.name,
                str(stage["stage"] + 1),
                str(cache.get("state") or MISSING),
                show(_stored_rows(cache), ",.0f"),
                show(number(cache, "hits"), ",.0f"),
                show(number(cache, "misses"), ",.0f"),
                show(cache_hit_share(stage), ".1f", 100),
                show(number(cache, "nbytes"), ",.1f", 1 / 2**20),
                show(number(cache, "prefix_ms"), ".3f"),
                show(number(cache, "read_ms"), ".3f"),
                str(cache.get("reason") or ""),
            ]
            for row in rows
            for run in row.runs
            for stage in run.stages
            if (cache := cache_of(stage)) is not None
        ],
    )


def _stored_rows(cache: Mapping[str, Any]) -> float | None:
    levels = cache.get("rows")
    if not isinstance(levels, dict):
        return None
    return sum(numbers([number(levels, level) for level in levels]))


def _rich_table(title: str, cells: _Cells) -> Table:
    _need("rich.table")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(Text(cells.headers[0]), overflow="fold", min_width=9)
    for index, header in enumerate(cells.headers[1:], start=1):
        # Headers wrap between words and figures never, so that both tables fit into 80 characters;
        # in a narrower terminal, or with long names, the first column gives way.
        words = [*header.split(), *(row[index] for row in cells.rows)]
        table.add_column(Text(header), justify="right", width=max(map(len, words)))
    for row in cells.rows:
        table.add_row(*map(Text, row))  # Text, because a run name is not console markup
    return table


def _headlines(rows: Sequence[Row]) -> list[str]:
    run = rows[0].runs[0]

    def metric(row: Row) -> str:
        return _show_mean(_summary(row, "metric"), _metric_spec(run))

    return [
        f"{row.label}: {run.metric_name} {metric(row)} against {metric(full)} of {full.label}, "
        f"in {show(_seconds_ratio(rows, row), '.2f')} of its "
        f"training seconds, with {show(mean(_summary(row, 'updates_saved_share')), '.0f', 100)} "
        "% fewer parameter updates than training everything in every step."
        for row in rows
        if (full := full_row(rows, row)) not in (None, row)
    ]


def notices(runs: Sequence[Run]) -> list[str]:
    """What makes the runs hard to compare, a sentence each."""
    rows = group_runs(runs)
    lines = []
    for what, values in (
        *differences(runs).items(),
        ("commits", distinct(run.meta.get("commit") for run in runs)),
        ("versions", distinct(_versions(run) for run in runs)),
    ):
        if len(values) > 1:
            lines.append(f"The runs differ in their {what}: {'; '.join(values)}.")
    for run in runs:
        if run.summary.get("failure"):
            lines.append(f"{run.name} learnt nothing: {run.summary['failure']}.")
    dirty = [run.name for run in runs if run.meta.get("dirty")]
    if dirty:
        lines.append(f"Run from a changed working tree: {', '.join(dirty)}.")
    full = [row.label for row in rows if row.method == "full"]
    if not full:
        lines.append("No run of the method full: nothing to relate seconds and step cost to.")
    if len(full) > 1:
        lines.append(
            f"Full means the first of {', '.join(full)} that did the same work, wherever a figure "
            "is relative to full."
        )
    alone = [row.label for row in rows if full and full_row(rows, row) is None]
    if alone:
        lines.append(f"Without a ratio to full, whose work was another: {', '.join(alone)}.")
    single = [row.label for row in rows if len(row.runs) == 1]
    if single:
        lines.append(
            f"One seed only, so without a standard error: {', '.join(single)}. Another seed can "
            "change the metric as much as a method does."
        )
    return lines


def _versions(run: Run) -> str:
    versions = run.meta.get("versions")
    if not isinstance(versions, dict) or not versions:
        return MISSING
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _model_line(run: Run) -> str:
    params = show(number(run.model, "num_params"), ",.0f")
    active = show(number(run.model, "active_params"), ",.0f")
    return (
        f"{run.method}: {run.model.get('name', MISSING)}, {run.model['num_blocks']} blocks, "
        f"{params} parameters, {active} active at the start"
    )


def _options(rows: Sequence[Row]) -> tuple[list[tuple[str, str]], _Cells]:
    """Options that all runs share, and a table of those that differ between them."""
    keys = sorted({key for row in rows for run in row.runs for key in run.config})
    values = {
        key: [distinct(run.config.get(key, MISSING) for run in row.runs) for row in rows]
        for key in keys
    }
    same = [key for key in keys if len({shown for row in values[key] for shown in row}) == 1]
    return (
        [(key, values[key][0][0]) for key in same],
        _Cells(
            headers=["Option", *(row.label for row in rows)],
            rows=[
                [key, *(", ".join(shown) for shown in values[key])]
                for key in keys
                if key not in same
            ],
        ),
    )


def _provenance(rows: Sequence[Row]) -> _Cells:
    def cells(run: Run) -> list[str]:
        commit = str(run.meta.get("commit") or MISSING)[:12]
        return [
            run.name,
            str(run.meta.get("date") or MISSING),
            str(run.meta.get("device") or MISSING),
            f"{commit}, changed" if run.meta.get("dirty") else commit,
            _versions(run),
        ]

    return _Cells(
        headers=["Run", "Date", "Device", "Commit", "Versions"],
        rows=[cells(run) for row in rows for run in row.runs],
    )
