"""The plots of a report: each draws grouped runs, or returns None where none has the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .runs import Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, made for colour-blind readers; by the place of a row in the table
_COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")  # of the first seven rows, the next seven, ...
_HATCHES = ("", "///", "...", "xxx")


def _figure(height: float, lines: int = 1) -> tuple[Figure, list[Axes]]:
    """`lines` squared panels in a figure 8 inches wide."""
    from matplotlib.figure import Figure  # not pyplot, which would hold and show the figures

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = list(figure.subplots(lines, lines, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(row: Row) -> str:
    label = f"{row.label} (mean of {len(row.runs)} runs)" if row.runs[1:] else row.label
    # matplotlib reads text between two $ as maths, and leaves "_..." out of legends
    return label.replace("$", r"\$") if label[0] != "_" else f" {label}"


def _legend(figure: Figure, ax: Axes) -> Figure:
    handles, labels = ax.get_legend_handles_labels()
    columns = max(1, min(len(labels), 105 // (max(map(len, labels)) + 5)))  # 105 in 8 inches
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=9)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a 30th of the run, at least 5 steps; the ends use what is there."""
    window = min(max(5, len(values) // 30) | 1, len(values))
    kernel, half = np.ones(window), window // 2
    sums = np.convolve(values, kernel)[half : half + len(values)]
    return sums / np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]


def _curve_plot(
    rows: Sequence[Row], field: str, x: str, y: str, label: str, *, is_noisy: bool
) -> Figure | None:
    """A line per row over the faint lines of its runs; dotted: stages of its first run begin."""
    figure, (ax,) = _figure(4.2)
    for row in rows:
        pairs = [[(number(e, x), number(e, y)) for e in getattr(r, field)] for r in row.runs]
        found = [np.array([pair for pair in run if None not in pair]).T for run in pairs]
        curves = [curve for curve in found if curve.size]  # (2, points) each
        colour, line = _COLOURS[row.place % 7], _LINES[row.place // 7 % 4]
        for curve in curves:
            ax.plot(*curve, color=colour, alpha=0.18, linewidth=0.8)
        # runs with other points (one that was not evaluated so often) have no mean
        same = len({curve.shape for curve in curves}) == 1
        for at, (xs, ys) in enumerate([np.mean(curves, axis=0)] if same else curves):
            marker = "o" if len(xs) == 1 or not is_noisy else None
            ys = smooth(ys) if is_noisy else ys
            name = None if at else _label(row)
            ax.plot(xs, ys, line, color=colour, linewidth=1.8, marker=marker, ms=4, label=name)
        for stage in row.runs[0].stages[1:16] if x == "step" else ():
            ax.axvline(stage["first_step"] - 0.5, color=colour, linewidth=0.8, linestyle=":")
    xlabel = "optimizer step" if x == "step" else "training time (s)"
    ax.set(xlabel=xlabel, ylabel=label.replace("$", r"\$"))
    ax.margins(x=0.01)
    return _legend(figure, ax) if ax.get_legend_handles_labels()[1] else None


def _loss_plot(rows: Sequence[Row]) -> Figure | None:
    return _curve_plot(rows, "steps", "step", "loss", "training loss", is_noisy=True)


def _metric_plot(rows: Sequence[Row]) -> Figure | None:
    entries = [entry for row in rows for run in row.runs for entry in run.evaluations]
    is_timed = all(number(entry, "train_seconds") is not None for entry in entries)
    x, name = "train_seconds" if is_timed else "step", rows[0].runs[0].metric_name
    return _curve_plot(rows, "evaluations", x, "metric", f"validation {name}", is_noisy=False)


def _stage_plot(rows: Sequence[Row]) -> Figure | None:
    panels = {
        "step_ms_median": ("step, median (ms)", 1.0),
        "state_bytes": ("optimizer state (MiB)", 2**-20),
        "gradient_bytes": ("gradients (MiB)", 2**-20),
        "activation_bytes": ("saved activations (MiB)", 2**-20),
    }
    rows = [row for row in rows if any(panels.keys() & stage for stage in row.runs[0].stages)]
    if not rows:
        return None
    figure, axes = _figure(6.4, lines=2)
    counts = [len(row.runs[0].stages) for row in rows]
    starts = np.cumsum([0, *(count + 0.6 for count in counts)])
    deepest = max(stage["boundary"] for row in rows for stage in row.runs[0].stages)
    # under half of 8 inches 12 numbers of two digits fit
    every = -(-sum(counts) // (12 if deepest > 9 else 24))
    for ax, (key, (label, scale)) in zip(axes, panels.items(), strict=True):
        ticks = {}
        for row, start, count in zip(rows, starts, counts, strict=False):
            runs = [run for run in row.runs if len(run.stages) == count]
            stored = [[number(stage, key) for stage in run.stages] for run in runs]
            figures = scale * np.array(stored, dtype=float)  # nan, a gap, where there is none
            errors = np.std(figures, axis=0, ddof=1) / len(runs) ** 0.5 if runs[1:] else None
            at, colour = start + np.arange(count), _COLOURS[row.place % 7]
            style = {"color": colour, "hatch": _HATCHES[row.place // 7 % 4], "edgecolor": "white"}
            ax.bar(at, figures.mean(0), 0.85, yerr=errors, capsize=2, label=_label(row), **style)
            for x, stage in list(zip(at, row.runs[0].stages, strict=True))[::every]:
                ticks[x] = stage["boundary"]
        ax.set_xticks([*ticks], [*ticks.values()], fontsize=8)
        ax.set(ylabel=label, xlabel="boundary k of each stage")
    return _legend(figure, axes[0])


# by name of the file: caption, and what draws it
PLOTS: dict[str, tuple[str, Callable[[Sequence[Row]], Figure | None]]] = {
    "loss": ("Training loss; faint: every step; dotted: where stages begin.", _loss_plot),
    "metric": ("Validation metric; faint: single runs.", _metric_plot),
    "stages": ("What a step costs in every stage; error bars: standard error.", _stage_plot),
}
