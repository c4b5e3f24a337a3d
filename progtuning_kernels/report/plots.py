"""The plots of a report: each draws grouped runs, or returns None where none has the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .runs import (
    EXPECTED,
    Row,
    Run,
    axis_positions,
    cache_hit_share,
    expected_step_ratio,
    full_row,
    full_step_ms,
    mean,
    number,
    numbers,
    ratio,
    show,
    standard_error,
    trainable_units,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--", ":", "-.")

_HATCHES = ("", "///", "...", "xxx")

# label and scale of what a curve can be drawn over
_AXES = {
    "step": ("optimizer step", 1.0),
    "train_seconds": ("training time (s)", 1.0),
    "updates": ("parameter updates (billions)", 1e-9),
}

# One colour per measure of contribution, of the same palette as the methods'.
_MEASURE_COLOURS = {"train": "#0072B2", "skip": "#D55E00", "gradient": "#009E73"}


def _figure(height: float, columns: int = 1, lines: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # not pyplot, which would hold and show the figures

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib reads text between two $ as maths


def _legend_label(row: Row) -> str:
    count = len(row.runs)
    return _plain(row.label if count == 1 else f"{row.label} (mean of {count} runs)")


def _points(entries: Sequence[Mapping[str, Any]], x: str, y: str) -> np.ndarray:
    """The entries that have both figures, as (2, n)."""
    pairs = [(number(entry, x), number(entry, y)) for entry in entries]
    return np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2).T


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a 30th of the run, at least 5 steps; the ends use what is there."""
    window = min(max(5, len(values) // 30) | 1, len(values))
    kernel = np.ones(window)
    half = window // 2
    sums = np.convolve(values, kernel)[half : half + len(values)]
    return sums / np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]


def _draw_curves(
    ax: Axes,
    rows: Sequence[Row],
    curves: Callable[[Run], np.ndarray],
    *,
    smooth: bool = False,
    marker: bool = False,
) -> bool:
    """One line per row over the faint lines of its runs; False if there was nothing to draw."""
    drawn = False
    for row in rows:
        found = [points for run in row.runs if (points := curves(run)).size]
        if not found:
            continue
        drawn = True
        colour, shape = row.style
        style = {"color": colour, "linestyle": _LINES[row.variant % len(_LINES)]}
        marks = {"marker": shape, "markersize": 4} if marker else {}
        if smooth or len(found) > 1:
            for x, y in found:
                ax.plot(x, y, color=colour, alpha=0.18, linewidth=0.8)
        # Runs that stopped at different points have no mean: each keeps its own line.
        repeats = len({points.shape for points in found}) == 1
        strong = [np.mean(found, axis=0)] if repeats else found
        for index, (x, y) in enumerate(strong):
            label = {} if index else {"label": _legend_label(row)}
            ax.plot(x, _smooth(y) if smooth else y, linewidth=1.8, **style, **marks, **label)
    return drawn


def _curve(run: Run, entries: Sequence[Mapping[str, Any]], axis: str, y: str) -> np.ndarray:
    """A figure of steps or evaluations over an axis, as (2, n)."""
    scale = _AXES[axis][1]
    at = axis_positions(run, axis)
    placed = [entry | {"at": scale * at[entry["step"]]} for entry in entries if entry["step"] in at]
    return _points(placed, "at", y)


def _shade_stages(ax: Axes, rows: Sequence[Row], axis: str) -> None:
    """Bands and boundary labels of the run with most plans, the labels above the axes.

    The limits of the axes stay as they are.
    """

    def plans(row: Row) -> int:
        run = row.runs[0]
        return len({tuple(trainable_units(run, stage)) for stage in run.stages})

    row = max(rows, key=plans)
    if plans(row) < 2:
        return
    left, right = ax.get_xlim()
    last_label, last = -math.inf, right
    for index, (stage, edges) in enumerate(_stage_spans(row.runs[0], axis)):
        first, last = (min(max(edge, left), right) for edge in edges)
        if index % 2:
            ax.axvspan(first, last, color="black", alpha=0.06, linewidth=0)
        middle = (first + last) / 2
        if middle - last_label >= (right - left) / 14:  # 14 labels of "k=12" fit into 8 inches
            last_label = middle
            ax.annotate(
                f"k={stage['boundary']}",
                (middle, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=row.style[0],
            )
    if last < right:  # other runs go on for longer, or with more updates
        ax.axvline(last, color="black", alpha=0.3, linewidth=0.8, linestyle=":")
    ax.set_xlim(left, right)


def _stage_spans(run: Run, axis: str) -> Iterator[tuple[Mapping[str, Any], tuple[float, float]]]:
    """The stages that the run's figures reach, and where each begins and ends on the axis."""
    scale = _AXES[axis][1]
    at = {0: 0.0} | axis_positions(run, axis)
    for stage in run.stages:
        first, last = stage["first_step"], stage["last_step"]
        if axis == "step":
            yield stage, (first - 0.5, last + 0.5)
        elif first - 1 in at and last in at:
            yield stage, (scale * at[first - 1], scale * at[last])


def _legend(figure: Figure, ax: Axes) -> None:
    # Methods first: matplotlib would list the line of what is expected before the bars.
    entries = zip(*ax.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda entry: entry[1] == EXPECTED), strict=True)
    columns = max(1, min(len(labels), 105 // (max(map(len, labels)) + 5)))  # 105 in 8 inches
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _loss_plot(rows: Sequence[Row], axis: str) -> Figure | None:
    figure, (ax,) = _figure(4.2)
    if not _draw_curves(ax, rows, lambda run: _curve(run, run.steps, axis, "loss"), smooth=True):
        return None
    ax.set(xlabel=_AXES[axis][0], ylabel="training loss")
    ax.margins(x=0.01)
    _shade_stages(ax, rows, axis)
    _legend(figure, ax)
    return figure


def _metric_plot(rows: Sequence[Row], axis: str) -> Figure | None:
    figure, (ax,) = _figure(4.2)

    def curve(run: Run) -> np.ndarray:
        if axis == "updates":
            return _curve(run, run.evaluations, axis, "metric")
        return _points(run.evaluations, axis, "metric")

    if not _draw_curves(ax, rows, curve, marker=True):
        return None
    ax.set(xlabel=_AXES[axis][0], ylabel=f"validation {_plain(rows[0].runs[0].metric_name)}")
    ax.set_xlim(left=0)
    _shade_stages(ax, rows, axis)
    _legend(figure, ax)
    return figure


_STEP_LABEL = "step, median (ms)"


def _stage_plot(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if row.runs[0].stages]
    if not rows:
        return None
    base_ms = [full_step_ms(full_row(rows, row)) for row in rows]
    panels: list[tuple[Callable[[Mapping[str, Any]], float | None], str, float]] = [
        (lambda stage: number(stage, "step_ms_median"), _STEP_LABEL, 1.0),
        (lambda stage: number(stage, "tokens_per_second"), "tokens per second", 1.0),
        (lambda stage: number(stage, "state_bytes"), "optimizer state (MiB)", 2**-20),
        (lambda stage: number(stage, "gradient_bytes"), "gradients (MiB)", 2**-20),
        (lambda stage: number(stage, "activation_bytes"), "saved activations (MiB)", 2**-20),
        (cache_hit_share, "rows read from the cache (%)", 100.0),
    ]
    figure, axes = _figure(9.0, columns=2, lines=3)
    if all(cache_hit_share(stage) is None for row in rows for stage in row.runs[0].stages):
        del panels[-1]
        axes.pop().remove()
    bars = sum(len(row.runs[0].stages) for row in rows)
    every = math.ceil(bars / 14)  # 14 numbers of two digits fit under half of 8 inches
    for ax, (figure_of, label, scale) in zip(axes, panels, strict=True):
        start, ticks = 0.0, {}
        for row, full_ms in zip(rows, base_ms, strict=True):
            stages = row.runs[0].stages
            at = start + np.arange(len(stages))
            repeats = [
                [figure_of(run.stages[i]) for run in row.runs if i < len(run.stages)]
                for i in range(len(stages))
            ]
            # nan, because a figure that is not there is a gap and not a zero.
            heights = [scale * (mean(known) if numbers(known) else math.nan) for known in repeats]
            errors = [scale * (standard_error(known) or math.nan) for known in repeats]
            ax.bar(
                at,
                heights,
                width=0.85,
                color=row.style[0],
                edgecolor="white",
                hatch=_HATCHES[row.variant % len(_HATCHES)],
                label=_legend_label(row),
            )
            ax.errorbar(at, heights, errors, fmt="none", ecolor="black", capsize=2, lw=1)
            expected = [expected_step_ratio(row.runs[0], stage) for stage in stages]
            if label is _STEP_LABEL and full_ms is not None and None not in expected:
                levels = full_ms * np.array(expected)
                lines = ax.hlines(levels, at - 0.45, at + 0.45, "black", linestyles=":", lw=1.6)
                if row is rows[0]:
                    lines.set_label(EXPECTED)
            for x, stage in list(zip(at, stages, strict=True))[::every]:
                if not ticks or x - max(ticks) > 0.7 * every:
                    ticks[x] = str(stage["boundary"])
            start = at[-1] + 1.6
        ax.set_xticks(list(ticks), list(ticks.values()))
        last = start - 1.6
        margin = max(0.8, (4 - last) / 2)  # a single bar is not as wide as the plot
        ax.set_xlim(-margin, last + margin)
        ax.tick_params(axis="x", labelsize=8, length=0)
        ax.set(ylabel=label, xlabel="boundary k of each stage")
        ax.set_ylim(bottom=0)
    _legend(figure, axes[0])
    return figure


def _unit_plot(rows: Sequence[Row]) -> Figure | None:
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.runs[0].stages]
    if not rows:
        return None
    units = max(row.runs[0].model["num_blocks"] for row in rows) + 2
    figure, axes = _figure(len(rows) * (0.9 + min(0.2 * units, 2.8)), lines=len(rows))
    for ax, row in zip(axes, rows, strict=True):
        run = row.runs[0]
        names = ["embeddings", *map(str, range(run.model["num_blocks"])), "head"]
        spans = [
            (stage["first_step"] - 0.5, stage["last_step"] - stage["first_step"] + 1)
            for stage in run.stages
        ]
        colours = {True: row.style[0], False: "#E4E4E4"}
        plans = [trainable_units(run, stage) for stage in run.stages]
        for unit, flags in enumerate(zip(*plans, strict=True)):
            ax.broken_barh(
                spans,
                (unit - 0.45, 0.9),
                facecolors=[colours[on] for on in flags],
                edgecolors="white",
                linewidth=0.8 if len(spans) < 40 else 0,
            )
        every = math.ceil(len(names) / 16)  # 16 names of 8 points fit into 2.8 inches
        count = len(names) - 2
        named = [b for b in range(0, count, every) if every == 1 or every <= b <= count - every]
        ticks = [0, *(block + 1 for block in named), count + 1]
        ax.set_yticks(ticks, [names[tick] for tick in ticks], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.set(ylabel="unit (block number)", ylim=(-0.6, len(names) - 0.4))
        ax.margins(x=0)
        share = ratio(number(run.model, "active_params"), number(run.model, "num_params"))
        ax.set_title(
            f"{_plain(row.label)}: {show(share, '.1f', 100)} % of the parameters active at the "
            "start",
            fontsize=9,
            loc="left",
        )
        keys = [
            Patch(color=colours[on], label="trainable" if on else "frozen")
            for on in (True, False)
            if any(on in plan for plan in plans)
        ]
        ax.legend(
            handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
        )
    axes[-1].set_xlabel("optimizer step")
    return figure


def contribution_figure(panels: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """One panel of bars per measure.

    Args:
        panels: name of the measure, label of its axis, one value per block.
    """
    figure, axes = _figure(3.2, columns=len(panels))
    for ax, (name, label, values) in zip(axes, panels, strict=True):
        ax.bar(range(len(values)), values, width=0.8, color=_MEASURE_COLOURS[name])
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name, xlabel="block (0 at the input)", ylabel=label)
        every = math.ceil(len(values) * len(panels) / 36)  # 36 numbers of two digits in 8 inches
        ax.set_xticks(range(0, len(values), every))
        ax.tick_params(axis="x", length=0)
    return figure


_BANDS = "Bands: the stages of the run with most plans; k: the boundary of each; dotted: its end."
_STRONG = "Strong line: moving mean over a 30th of the run; faint lines: every step of every run."

PLOTS: tuple[tuple[str, str, str, Callable[[Sequence[Row]], Any]], ...] = (
    (
        "loss",
        "Training loss over steps",
        f"{_STRONG} {_BANDS}",
        lambda rows: _loss_plot(rows, "step"),
    ),
    (
        "loss_over_seconds",
        "Training loss over time",
        f"Training seconds, evaluation left out. {_STRONG} {_BANDS}",
        lambda rows: _loss_plot(rows, "train_seconds"),
    ),
    (
        "loss_over_updates",
        "Training loss over parameter updates",
        f"A step updates as many parameters as are active in it. {_STRONG} {_BANDS}",
        lambda rows: _loss_plot(rows, "updates"),
    ),
    (
        "metric_over_seconds",
        "Validation metric over time",
        f"Training seconds, evaluation left out. Faint lines: single runs. {_BANDS}",
        lambda rows: _metric_plot(rows, "train_seconds"),
    ),
    (
        "metric_over_steps",
        "Validation metric over steps",
        f"The same evaluations over optimizer steps. Faint lines: single runs. {_BANDS}",
        lambda rows: _metric_plot(rows, "step"),
    ),
    (
        "metric_over_updates",
        "Validation metric over parameter updates",
        f"The same evaluations over parameters updated. Faint lines: single runs. {_BANDS}",
        lambda rows: _metric_plot(rows, "updates"),
    ),
    (
        "stages",
        "What a step costs, stage by stage",
        "One bar per stage, from the first to the last; error bars: standard error over seeds. "
        "Dotted: the full step times the expected relative cost, counted in block FLOPs, with the "
        "rows that the cache served.",
        _stage_plot,
    ),
    (
        "units",
        "Which units trained when",
        "One line per unit, from the input (embeddings) up to the head; first run of each method. "
        "Where adapters train, a trainable unit trains its adapters only.",
        _unit_plot,
    ),
)
