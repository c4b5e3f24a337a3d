"""The table for the terminal and a README, and one HTML file with the charts inside."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from .charts import CHARTS
from .runs import MISSING, Row, Run, differences, distinct, full_row, group_runs, known, show

if TYPE_CHECKING:
    from rich.table import Table

_LOWER_IS_BETTER = {"loss": "loss, lower is better", "perplexity": "perplexity, lower is better"}


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row per method: metric, seconds, updates saved, peak bytes; mean ± standard error.

    Args:
        runs: in any order.

    Raises:
        ValueError: as `group_runs`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head, *rows = _comparison(runs)
    table = Table(title="Methods compared", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(Text(head[0]), overflow="fold", min_width=9)
    for header, *cells in zip(*(line[1:] for line in (head, *rows)), strict=True):
        # heads wrap between words and figures never: 80 columns are enough
        table.add_column(Text(header), justify="right", width=max(map(len, header.split() + cells)))
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because a run name is not console markup
    return table


def markdown_table(runs: Sequence[Run]) -> str:
    """`comparison_table` in Markdown.

    Args:
        runs: in any order.

    Raises:
        ValueError: as `group_runs`.
    """
    head, *rows = _comparison(runs)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def check_packages() -> None:
    """Raise an ImportError that says what to install, where a report cannot be written."""
    try:
        import jinja2  # noqa: F401 - to see whether it is installed
        import plotly.offline  # noqa: F401 - to see whether it is installed
    except ImportError as error:
        raise ImportError(f"a report needs {error.name}: pip install plotly jinja2") from None


def write_report(runs: Sequence[Run], out_dir: str | Path) -> Path:
    """Write report.html, which needs no other file and no network: plotly.js (5 MB) is in it.

    A chart that no run has figures for is left out.

    Args:
        runs: in any order.
        out_dir: folder to write to; it is made where it is missing.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no run at all, one run twice, or runs of different metrics.
        ImportError: plotly or jinja2 is missing; one line that says what to install.
    """
    rows = group_runs(runs)
    check_packages()
    import jinja2
    from plotly.offline import get_plotlyjs

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    charts = [(name, *text, make(rows)) for name, (*text, make) in CHARTS.items()]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    )
    stored = ("meta", "data", "model", "config", "summary", "stages")
    page = template.render(
        findings=findings(runs),
        notices=notices(runs),
        table=_comparison(runs),
        charts=[chart for chart in charts if chart[-1] is not None],
        plotly_js=get_plotlyjs(),
        runs=[(run.name, {name: getattr(run, name) for name in stored}) for run in runs],
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _show_mean(values: Sequence[float | None], spec: str, scale: float = 1.0) -> str:
    found = [scale * value for value in known(values)]
    shown = show(statistics.fmean(found) if found else None, spec)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    if error:  # counts are the same for every seed: "± 0.0" would say nothing
        shown += f" ± {show(error, spec)}"
    return shown if len(found) in (0, len(values)) else f"{shown} ({len(found)} of {len(values)})"


def _share_of_full(rows: Sequence[Row], row: Row) -> float | None:
    """Training time over that of full training with the same work."""
    full, own_s = full_row(rows, row), known(row.values("train_seconds"))
    full_s = known(full.values("train_seconds")) if full else []
    return statistics.fmean(own_s) / statistics.fmean(full_s) if own_s and full_s else None


def _comparison(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, its head first: terminal, Markdown and HTML show the same characters."""
    rows, metric = group_runs(runs), runs[0].metric_name

    def cells(row: Row) -> list[str]:
        return [
            row.label,
            str(len(row.runs)),
            _show_mean(row.values("metric"), ".2f" if metric == "perplexity" else ".4f"),
            _show_mean(row.values("train_seconds"), ".1f"),
            show(_share_of_full(rows, row), ".3f"),
            _show_mean(row.values("updates_saved_share"), ".1f", 100),
            _show_mean(row.values("peak_state_bytes"), ",.1f", 2**-20),
            _show_mean(row.values("peak_activation_bytes"), ",.1f", 2**-20),
        ]

    head = ["Method", "Runs", _LOWER_IS_BETTER.get(metric, metric), "Training (s)"]
    head += ["Training / full", "Updates saved (%)", "Peak state (MiB)"]
    return [[*head, "Peak saved activations (MiB)"], *map(cells, rows)]


def findings(runs: Sequence[Run]) -> list[str]:
    """What was compared, then a sentence for each method that can be related to full training.

    Args:
        runs: in any order.

    Raises:
        ValueError: as `group_runs`.
    """
    rows = group_runs(runs)
    counts = {len(row.runs) for row in rows}
    count = f"{counts.pop()} each" if len(counts) == 1 else str(len(runs))
    found = [f"Methods compared: {', '.join(row.label for row in rows)}. Runs: {count}."]
    about = {
        "Model": (run.model.get("name") for run in runs),
        "Data": (run.data.get("description") for run in runs),
        "Device": (run.meta.get("device") for run in runs),
    }
    for what, values in about.items():
        value, *others = distinct(values)
        if value != MISSING and not others:  # where they differ, a notice says so
            found[0] += f" {what}: {value}."
    for row in rows:
        full, share = full_row(rows, row), _share_of_full(rows, row)
        if full is not None and full is not row:
            parts = [] if share is None else [f"{share:.2f} of full training's time"]
            parts += _metric_against(full, row, runs[0].metric_name)
            found += [f"{row.label}: {', '.join(parts)}."] if parts else []
    return found


def _metric_against(full: Row, row: Row, metric: str) -> list[str]:
    """How far the mean metric of a row is from that of full training, in words."""
    own, others = known(row.values("metric")), known(full.values("metric"))
    if not own or not others:
        return []
    difference = statistics.fmean(own) - statistics.fmean(others)
    if difference == 0:
        return [f"{metric} the same"]
    lower = difference < 0
    text = f"{metric} {abs(difference):.4f} {'lower' if lower else 'higher'}"
    if metric in _LOWER_IS_BETTER:
        text += f", which is {'better' if lower else 'worse'}"
    if len(own) > 1 and len(others) > 1:
        error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (own, others)))
        if error:
            text += f" ({abs(difference) / error:.1f} standard errors of the difference)"
    return [text]


def notices(runs: Sequence[Run]) -> list[str]:
    """What one should know when comparing the runs, a sentence each.

    Args:
        runs: in any order.

    Raises:
        ValueError: as `group_runs`.
    """
    rows = group_runs(runs)
    has_full = any(row.method == "full" for row in rows)
    options = sorted({key for run in runs for key in run.config} - {"seed", "output", "method"})
    apart = {f"option {key}": distinct(run.config.get(key) for run in runs) for key in options}
    apart["commits"] = distinct(run.meta.get("commit") for run in runs)
    versions = [run.meta.get("versions") or {} for run in runs]
    for name in sorted({name for own in versions for name in own}):
        apart[f"version of {name}"] = distinct(own.get(name) for own in versions)
    found = {
        f"The runs differ in their {what}": "; ".join(values) if len(values) > 1 else ""
        for what, values in (differences(runs) | apart).items()
    }
    for run in runs:
        found[f"{run.name} learnt nothing"] = run.summary.get("failure")
    dirty = [run.name for run in runs if run.meta.get("dirty")]
    alone = [row.label for row in rows if has_full and full_row(rows, row) is None]
    single = [row.label for row in rows if len(row.runs) == 1]
    skipped = {row.label: known(row.values("padding_skipped_share")) for row in rows}
    what = "Padding that packing left out, as a share of all token positions of the packed batches"
    found[what] = ", ".join(
        f"{label} {statistics.fmean(own):.0%}" for label, own in skipped.items() if any(own)
    )
    found["Run from a working tree with uncommitted changes"] = ", ".join(dirty)
    found["Not related to full training, which did other work or learnt nothing"] = ", ".join(alone)
    found["One run only, so its metric may differ by chance"] = ", ".join(single)
    found["No run of full training"] = "" if has_full else "training times have no ratio"
    return [f"{what}: {which}." for what, which in found.items() if which]
