"""The charts of a report: each makes a plotly figure of grouped runs, or None without figures.

A figure is the dict that plotly.js draws, {"data": traces, "layout": layout}. Texts that come from
runs are escaped: plotly.js reads tags and entities in them as HTML.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from .runs import Row, Run, number

Figure = dict[str, Any]

# After Okabe and Ito, for colour-blind readers; legible on white and on black. By place of the row.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3A9BD9", "#808080")
_LINES = ("solid", "dash", "dot", "dashdot")  # of the first seven rows, the next seven, ...
_MEMORY = {
    "state_bytes": ("optimizer state", "#4C5F8A"),
    "gradient_bytes": ("gradients", "#9AA9CC"),
    "activation_bytes": ("saved activations", "#C58B2A"),
}
_MOST_POINTS = 1000  # of a line: more than a screen shows
_MOST_STAGES = 8  # of a method, in the chart of memory


def _layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    grey = "rgba(128, 128, 128, 0.3)"  # seen on white and on black
    axis = {"gridcolor": grey, "zerolinecolor": grey, "automargin": True}
    return {
        "height": height,
        "xaxis": axis | {"title": {"text": escape(x)}},
        "yaxis": axis | {"title": {"text": escape(y)}} | more.pop("yaxis", {}),
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "dragmode": False,  # a finger on a chart scrolls the page
        **more,
    }


def _colour(row: Row) -> str:
    return _COLOURS[row.place % len(_COLOURS)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a 30th of the run, at least 5 steps; the ends use what is there."""
    window = min(max(5, len(values) // 30) | 1, len(values))
    kernel, half = np.ones(window), window // 2
    sums = np.convolve(values, kernel)[half : half + len(values)]
    return sums / np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]


def trains(run: Run, stage: dict[str, Any]) -> str:
    """What a stage trains, in words: "all", "blocks 2–5, head", "LoRA in blocks 2–5, head"."""
    flags = stage.get("trainable")
    if flags is None:  # a log of the Trainer
        return f"from block {stage['boundary']} on"
    on = [i for i, flag in enumerate(flags) if flag]
    if stage.get("embeddings") and len(on) == len(flags) and stage.get("head"):
        return "all"
    # numbers in a row have the same distance to their places
    spans = [[i for _, i in span] for _, span in groupby(enumerate(on), lambda at: at[1] - at[0])]
    shown = ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}–{s[-1]}" for s in spans)
    blocks = f"block{'s' if on[1:] else ''} {shown}" if spans[:3] == spans else f"{len(on)} blocks"
    lora = "LoRA in " if "lora" in run.method else ""
    parts = {"embeddings": stage.get("embeddings"), lora + blocks: on, "head": stage.get("head")}
    return ", ".join(part for part, trained in parts.items() if trained) or "nothing"


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else statistics.fmean(found)


def stages_of(row: Row) -> list[dict[str, Any]]:
    """What each stage trained, its first step, and means over the runs of what it took.

    Stages in a row that train the same, as those of full training do, are one.
    """
    repeats = [run.stages for run in row.runs if len(run.stages) == len(row.runs[0].stages)]
    stages: list[dict[str, Any]] = []
    for stored in zip(*repeats, strict=True):
        found = {key: _mean(number(s, key) for s in stored) for key in ("train_seconds", *_MEMORY)}
        label = trains(row.runs[0], stored[0])
        if stages and stages[-1]["trains"] == label:
            seconds = (stages[-1]["train_seconds"], found["train_seconds"])
            stages[-1]["train_seconds"] = None if None in seconds else sum(seconds)
        else:
            stages.append(found | {"trains": label, "first_step": stored[0]["first_step"]})
    return stages


def _curve_chart(
    rows: Sequence[Row], field: str, x: str, y: str, label: str, *, is_loss: bool
) -> Figure | None:
    """A line per row, the mean of its runs; rows whose lines would hide each other share one."""
    groups: list[tuple[list[Row], list[np.ndarray]]] = []
    for row in rows:
        pairs = [[(number(e, x), number(e, y)) for e in getattr(r, field)] for r in row.runs]
        found = [np.array([pair for pair in run if None not in pair]).T for run in pairs]
        curves = [curve for curve in found if curve.size]  # (2, points) each
        for others, drawn in groups:
            if _look_alike(curves, drawn):
                others.append(row)
                break
        else:
            groups += [([row], curves)] if curves else []
    if sum(curve.shape[1] for _, curves in groups for curve in curves) < 2:
        return None
    where = "step %{x}" if x == "step" else "%{x:.1f} s"
    traces, starts = [], {}
    for same, curves in groups:
        row, key = same[0], " = ".join(row.label for row in same)
        stages = stages_of(row)
        starts |= {s["first_step"] - 0.5: f"stage {i}" for i, s in enumerate(stages[1:], 2)}
        line = {"color": _colour(row), "dash": _LINES[row.place // len(_COLOURS) % 4]}
        # runs with other points (one that was not evaluated so often) have no mean
        is_mean = len(curves) > 1 and len({curve.shape for curve in curves}) == 1
        means = [np.mean(curves, axis=0)] if is_mean else curves
        singles = curves if is_mean and not is_loss else []
        for at, (xs, ys) in enumerate([*means, *singles]):
            is_single = at >= len(means)
            if is_loss:
                every = -(-len(xs) // _MOST_POINTS)
                xs, ys = xs[::every], smooth(ys)[::every]
            texts = [_stage_at(stages, step) for step in xs] if x == "step" else None
            traces.append(
                {"type": "scatter", "x": xs.tolist(), "y": ys.tolist(), "line": line}
                | {"mode": "lines" if is_loss else "lines+markers", "legendgroup": key}
                | {"name": escape(key), "showlegend": not at, "opacity": 0.3 if is_single else 1}
                | ({"text": texts} if texts else {})
                | {"hovertemplate": "<b>%{fullData.name}</b>"}
            )
            what = " (one run)" if is_single else f" (mean of {len(curves)} runs)" * is_mean
            after = "<br>%{text}" if texts else ""
            traces[-1]["hovertemplate"] += f"{what}<br>{where}: %{{y:.4f}}{after}<extra></extra>"
    layout = _layout("optimizer step" if x == "step" else "training time (s)", label, 400)
    if is_loss and len(starts) <= 2 * _MOST_STAGES:
        layout["shapes"] = [
            {"type": "line", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1}
            | {"line": {"color": "#808080", "width": 1, "dash": "dot"}, "layer": "below"}
            | {"label": {"text": name, "textposition": "end", "textangle": 0, "xanchor": "left"}}
            for at, name in starts.items()
        ]
    return {"data": traces, "layout": layout}


def _look_alike(curves: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    """Whether two lines differ by less than a 500th of their height, which nobody would see."""
    if not curves or [c.shape for c in curves] != [c.shape for c in others]:
        return False
    one, two = np.concatenate(curves, axis=1), np.concatenate(others, axis=1)
    return bool((abs(one - two).max(axis=1) <= np.ptp(two, axis=1) / 500).all())


def _stage_at(stages: Sequence[dict[str, Any]], step: float) -> str:
    begun = [at for at, stage in enumerate(stages) if stage["first_step"] <= step]
    return f"stage {begun[-1] + 1} trains {stages[begun[-1]]['trains']}" if begun else ""


def _metric_chart(rows: Sequence[Row]) -> Figure | None:
    entries = [entry for row in rows for run in row.runs for entry in run.evaluations]
    is_timed = all(number(entry, "train_seconds") is not None for entry in entries)
    x, name = "train_seconds" if is_timed else "step", rows[0].runs[0].metric_name
    return _curve_chart(rows, "evaluations", x, "metric", f"validation {name}", is_loss=False)


def _loss_chart(rows: Sequence[Row]) -> Figure | None:
    return _curve_chart(rows, "steps", "step", "loss", "training loss", is_loss=True)


def _seconds_chart(rows: Sequence[Row]) -> Figure | None:
    """A bar per row, its stages side by side in paler and paler tints of the row's colour."""
    bars = [(row, [s for s in stages_of(row) if s["train_seconds"] is not None]) for row in rows]
    bars = [(row, stages) for row, stages in bars if stages]
    if sum(len(stages) for _, stages in bars) < 2:
        return None
    traces = []
    for at in range(max(len(stages) for _, stages in bars)):
        shown = [(y, row, found) for y, (row, found) in enumerate(bars) if len(found) > at]
        traces.append(
            {"type": "bar", "orientation": "h", "y": [y for y, *_ in shown], "showlegend": False}
            | {"x": [found[at]["train_seconds"] for *_, found in shown]}
            | {"text": [found[at]["trains"].replace(", ", "<br>") for *_, found in shown]}
            | {"customdata": [[escape(row.label), found[at]["trains"]] for _, row, found in shown]}
            | {"marker": {"color": [_tint(row, at / len(found)) for _, row, found in shown]}}
            | {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0}
            | {"hovertemplate": f"<b>%{{customdata[0]}}</b>, stage {at + 1}"}
        )
        traces[-1]["hovertemplate"] += "<br>trains %{customdata[1]}<br>%{x:.1f} s<extra></extra>"
    labels = [
        f"{escape(row.label)}<br>{sum(s['train_seconds'] for s in stages):.1f} s"
        for row, stages in bars
    ]
    axis = {"tickvals": [*range(len(bars))], "ticktext": labels, "autorange": "reversed"}
    layout = _layout("training time (s)", "", 90 + 56 * len(bars), barmode="stack", yaxis=axis)
    # a text that does not fit its stage at this size is left to the hover
    return {"data": traces, "layout": layout | {"uniformtext": {"minsize": 10, "mode": "hide"}}}


def _tint(row: Row, share_of_white: float) -> str:
    """The colour of a row, mixed with up to two thirds of white."""
    parts = bytes.fromhex(_colour(row)[1:])
    return "#" + bytes(round(c + (255 - c) * share_of_white * 2 / 3) for c in parts).hex()


def _memory_chart(rows: Sequence[Row]) -> Figure | None:
    """A bar per stage of every row: state, gradients and saved activations on top of each other."""
    places, labels, names, stages, place = [], [], [], [], 0.0
    for row in rows:
        found = [s for s in stages_of(row) if any(s[key] is not None for key in _MEMORY)]
        for stage in found[:: -(-len(found) // _MOST_STAGES) or 1]:
            is_first = not names or names[-1] != row.label
            place += 1.4 if is_first else 1.0
            places.append(place)
            names.append(row.label)
            stages.append(stage)
            name = f"<b>{escape(row.label)}</b><br>" if is_first else ""
            labels.append(name + stage["trains"])
    if len(stages) < 2:
        return None
    about = [
        [escape(name), stage["trains"], sum(stage[key] or 0 for key in _MEMORY) / 2**20]
        for name, stage in zip(names, stages, strict=True)
    ]
    traces = [
        {"type": "bar", "orientation": "h", "y": places, "name": name, "marker": {"color": colour}}
        | {"x": [None if s[key] is None else s[key] / 2**20 for s in stages], "customdata": about}
        | {
            "hovertemplate": f"<b>%{{customdata[0]}}</b><br>trains %{{customdata[1]}}<br>{name}: "
            "%{x:,.1f} of %{customdata[2]:,.1f} MiB<extra></extra>"
        }
        for key, (name, colour) in _MEMORY.items()
    ]
    axis = {"tickvals": places, "ticktext": labels, "autorange": "reversed"}
    layout = _layout("MiB", "", 110 + round(34 * place), barmode="stack", yaxis=axis)
    return {"data": traces, "layout": layout}


# by name: title, what to know when reading it, and what makes it
CHARTS: dict[str, tuple[str, str, Callable[[Sequence[Row]], Figure | None]]] = {
    "metric": (
        "Validation metric against training time",
        "Strong lines are means over the runs of a method, faint lines are single runs. "
        "Training time leaves out evaluation.",
        _metric_chart,
    ),
    "loss": (
        "Training loss",
        "Moving means. Methods whose lines are the same share one line. Dotted lines show where "
        "a stage begins.",
        _loss_chart,
    ),
    "seconds": (
        "Training time by stage",
        "Each part of a bar is a stage, and its text says what trains in it.",
        _seconds_chart,
    ),
    "memory": (
        "Memory by stage",
        "What training keeps beside the weights, in a batch of the longest rows. The rows of a "
        "prefix cache are not counted. Of a method with more than "
        f"{_MOST_STAGES} stages some are left out.",
        _memory_chart,
    ),
}
