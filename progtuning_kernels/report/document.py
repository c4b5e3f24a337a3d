"""The table for the terminal and a README, and one HTML file with the plots inside."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from .plots import PLOTS
from .runs import Row, Run, differences, distinct, full_row, group_runs, known, number, show

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


def write_report(runs: Sequence[Run], out_dir: str | Path) -> Path:
    """Write report.html, which needs no other file, and its plots as PNG files beside it.

    A plot that no run has figures for is left out.

    Args:
        runs: in any order.
        out_dir: folder to write to; it is made where it is missing.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no run at all, one run twice, or runs of different metrics.
        ImportError: matplotlib or Jinja2 is missing; one line that says what to install.
    """
    rows = group_runs(runs)
    try:
        import jinja2
        from matplotlib import style
    except ImportError as error:
        raise ImportError(f"a report needs {error.name}: pip install matplotlib jinja2") from None
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, (caption, draw) in PLOTS.items():
        with style.context("default"):  # a user's matplotlibrc does not change a report
            if (figure := draw(rows)) is not None:
                figure.savefig(out / f"{name}.png", dpi=140)
                encoded = base64.b64encode((out / f"{name}.png").read_bytes()).decode("ascii")
                figures.append((caption, encoded))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    )
    stored = ("meta", "data", "model", "config", "summary", "stages")
    page = template.render(
        notices=notices(runs),
        table=_comparison(runs),
        figures=figures,
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


def _comparison(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, its head first: terminal, Markdown and HTML show the same characters."""
    rows, metric = group_runs(runs), runs[0].metric_name

    def cells(row: Row) -> list[str]:
        full, own_s = full_row(rows, row), known(row.values("train_seconds"))
        full_s = known(full.values("train_seconds")) if full else []
        share = statistics.fmean(own_s) / statistics.fmean(full_s) if own_s and full_s else None
        return [
            row.label,
            str(len(row.runs)),
            _show_mean(row.values("metric"), ".2f" if metric == "perplexity" else ".4f"),
            _show_mean(row.values("train_seconds"), ".1f"),
            show(share, ".3f"),
            _show_mean(row.values("updates_saved_share"), ".1f", 100),
            _show_mean(row.values("peak_state_bytes"), ",.1f", 2**-20),
            _show_mean(row.values("peak_activation_bytes"), ",.1f", 2**-20),
        ]

    head = ["Method", "Runs", _LOWER_IS_BETTER.get(metric, metric), "Training (s)"]
    head += ["Training / full", "Updates saved (%)", "Peak state (MiB)"]
    return [[*head, "Peak saved activations (MiB)"], *map(cells, rows)]


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
    apart["versions"] = distinct(run.meta.get("versions") for run in runs)
    found = {
        f"The runs differ in their {what}": "; ".join(values) if len(values) > 1 else ""
        for what, values in (differences(runs) | apart).items()
    }
    for run in runs:
        found[f"{run.name} learnt nothing"] = run.summary.get("failure")
    dirty = [run.name for run in runs if run.meta.get("dirty")]
    alone = [row.label for row in rows if has_full and full_row(rows, row) is None]
    single = [row.label for row in rows if len(row.runs) == 1]
    skipped = {run.name: number(run.summary, "padding_skipped_share") for run in runs}
    found["Padding that packing left out, of the places of packed batches"] = ", ".join(
        f"{name} {share:.0%}" for name, share in skipped.items() if share
    )
    found["Run from a changed working tree"] = ", ".join(dirty)
    found["Without a ratio to full, whose work was another"] = ", ".join(alone)
    found["One seed only; another can change the metric as much as a method"] = ", ".join(single)
    found["No run of the method full"] = "" if has_full else "nothing to relate seconds to"
    return [f"{what}: {which}." for what, which in found.items() if which]
