"""The charts of a report: each makes a plotly figure of grouped runs, or None without figures.

A figure is the dict that plotly.js draws, {"data": traces, "layout": layout}. Texts that come from
runs are escaped: plotly.js reads tags and entities in them as HTML.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from .runs import Row, Run, number

Figure = dict[str, Any]

# After Okabe and Ito, for colour-blind readers; legible on white and on black. By place of the row.
_COLOURS = ("#2080C0", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3A9BD9", "#808080")
_LINES = ("solid", "dash", "dot", "dashdot")  # of the first seven rows, the next seven, ...
_WIDTHS = (4.5, 3.6, 2.8, 2.1, 1.5)  # where lines meet, the one below still shows on both sides
_MEMORY = {
    "state_bytes": ("optimizer state", "#4C5F8A"),
    "gradient_bytes": ("gradients", "#9AA9CC"),
    "activation_bytes": ("saved activations", "#C58B2A"),
}
_MOST_POINTS = 1000  # of a line: more than a screen shows
_MOST_STAGES = 8  # of a method: more have no texts, and not all have a bar


def _text(name: str) -> str:
    return html.escape(name, quote=False)  # plotly.js would show &quot; as it stands


def _layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    grey = "rgba(128, 128, 128, 0.3)"  # seen on white and on black
    axis = {"gridcolor": grey, "zerolinecolor": grey, "automargin": True}
    return {
        "height": height,
        "xaxis": axis | {"title": {"text": _text(x)}},
        "yaxis": axis | {"title": {"text": _text(y)}} | more.pop("yaxis", {}),
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": "#000000"}},
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
    shown = ",\u00a0".join(str(s[0]) if len(s) == 1 else f"{s[0]}–{s[-1]}" for s in spans)
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


@dataclass
class _Curves:
    """The lines of a row, (2, points) each, and of rows whose lines would hide under these."""

    rows: list[Row]
    lines: list[np.ndarray]  # the mean of the runs, or each run where their points differ
    singles: list[np.ndarray]  # the runs of a mean

    def looks_like(self, lines: Sequence[np.ndarray]) -> bool:
        """Whether nobody would see a difference: it is under a 500th of the height."""
        if [line.shape for line in lines] != [line.shape for line in self.lines]:
            return False
        one, two = np.concatenate(lines, axis=1), np.concatenate(self.lines, axis=1)
        return bool((abs(one - two).max(axis=1) <= np.ptp(two, axis=1) / 500).all())


def _curves(rows: Sequence[Row], field: str, x: str, y: str) -> list[_Curves]:
    found: list[_Curves] = []
    for row in rows:
        pairs = [[(number(e, x), number(e, y)) for e in getattr(r, field)] for r in row.runs]
        arrays = [np.array([pair for pair in run if None not in pair]).T for run in pairs]
        runs = [array for array in arrays if array.size]
        is_mean = len(runs) > 1 and len({run.shape for run in runs}) == 1
        lines, singles = ([np.mean(runs, axis=0)], runs) if is_mean else (runs, [])
        same = next((other for other in found if other.looks_like(lines)), None)
        if same is not None:
            same.rows.append(row)
            same.singles.extend(singles)
        elif lines:
            found.append(_Curves([row], lines, singles))
    return found


def _curve_chart(found: Sequence[_Curves], x: str, label: str, *, is_loss: bool) -> Figure | None:
    """A line for each method; of losses, which are noisy, moving means without single runs."""
    if sum(line.shape[1] for curves in found for line in curves.lines) < 2:
        return None
    is_by_step = x == "step"
    place = "step %{x}" if is_by_step else "%{x:.1f} s"
    traces, starts = [], {}
    for curves in found:
        row, labels = curves.rows[0], [row.label for row in curves.rows]
        if labels[3:]:  # a legend does not break its lines
            labels[2:] = [f"{len(labels) - 2} more"]
        name = _text(" = ".join(labels))
        stages = max(map(stages_of, curves.rows), key=len)
        starts |= {s["first_step"] - 0.5: f"stage {i}" for i, s in enumerate(stages[1:], 2)}
        for at, (xs, ys) in enumerate(curves.lines + ([] if is_loss else curves.singles)):
            is_single = at >= len(curves.lines)
            what = " (one run)" if is_single else " (mean of runs)" if curves.singles else ""
            if is_loss:
                every = -(-len(xs) // _MOST_POINTS)
                xs, ys = xs[::every], smooth(ys)[::every]
            trace = {
                "type": "scatter",
                "mode": "lines" if is_loss else "lines+markers",
                "name": name,
                "x": xs.tolist(),
                "y": ys.tolist(),
                "line": {
                    "color": _colour(row),
                    "dash": _LINES[row.place // len(_COLOURS) % 4],
                    "width": 1 if is_single else _WIDTHS[row.place % 5],
                },
                "opacity": 0.3 if is_single else 1,
                "legendgroup": name,
                "showlegend": at == 0,
                "hovertemplate": f"<b>%{{fullData.name}}</b>{what}<br>{place}: %{{y:.4f}}",
            }
            if is_by_step:
                trace["text"] = [_stage_at(stages, step) for step in xs]
                trace["hovertemplate"] += "<br>%{text}"
            trace["hovertemplate"] += "<extra></extra>"
            traces.append(trace)
    layout = _layout("optimizer step" if is_by_step else "training time (s)", label, 400)
    if is_loss and len(starts) <= 2 * _MOST_STAGES:
        layout["shapes"] = [_stage_mark(at, text) for at, text in starts.items()]
    return {"data": traces, "layout": layout}


def _stage_at(stages: Sequence[dict[str, Any]], step: float) -> str:
    begun = [at for at, stage in enumerate(stages) if stage["first_step"] <= step]
    return f"stage {begun[-1] + 1} trains {stages[begun[-1]]['trains']}" if begun else ""


def _stage_mark(at: float, text: str) -> dict[str, Any]:
    label = {"text": text, "textposition": "start", "textangle": 0}
    return {
        "type": "line",
        "yref": "paper",
        **{"x0": at, "x1": at, "y0": 1, "y1": 0},
        "line": {"color": "#808080", "width": 1, "dash": "dot"},
        "label": {**label, "xanchor": "left", "yanchor": "top"},
        "layer": "below",
    }


def _metric_chart(rows: Sequence[Row]) -> Figure | None:
    entries = [entry for row in rows for run in row.runs for entry in run.evaluations]
    is_timed = all(number(entry, "train_seconds") is not None for entry in entries)
    x, name = "train_seconds" if is_timed else "step", rows[0].runs[0].metric_name
    found = _curves(rows, "evaluations", x, "metric")
    return _curve_chart(found, x, f"validation {name}", is_loss=False)


def _loss_chart(rows: Sequence[Row]) -> Figure | None:
    found = _curves(rows, "steps", "step", "loss")
    return _curve_chart(found, "step", "training loss", is_loss=True)


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
            {
                "type": "bar",
                "orientation": "h",
                "width": 0.64,
                "y": [y for y, *_ in shown],
                "x": [found[at]["train_seconds"] for *_, found in shown],
                "marker": {"color": [_tint(row, at / len(found)) for _, row, found in shown]},
                "text": [_bar_text(found[at]["trains"], len(found)) for *_, found in shown],
                "textposition": "inside",
                "textangle": 0,
                "insidetextanchor": "middle",
                "insidetextfont": {"color": "#000000"},
                "customdata": [[_text(row.label), found[at]["trains"]] for _, row, found in shown],
                "hovertemplate": f"<b>%{{customdata[0]}}</b>, stage {at + 1}"
                "<br>trains %{customdata[1]}<br>%{x:.1f} s<extra></extra>",
                "showlegend": False,
            }
        )
    labels = [
        f"<b>{_text(row.label)}</b>, {sum(s['train_seconds'] for s in stages):.1f} s"
        for row, stages in bars
    ]
    layout = _bar_layout("training time (s)", labels, [*range(len(bars))], height=84)
    return {"data": traces, "layout": layout}


def _bar_text(trains: str, num_stages: int) -> str:
    """Short lines, which a narrow part of a bar has room for; none where parts are many."""
    lines = trains.replace("LoRA in ", "LoRA in<br>").replace("blocks ", "blocks<br>")
    return lines.replace(", ", "<br>") if num_stages <= _MOST_STAGES else ""


def _tint(row: Row, share_of_white: float) -> str:
    """The colour of a row, mixed with up to two thirds of white."""
    parts = bytes.fromhex(_colour(row)[1:])
    return "#" + bytes(round(c + (255 - c) * share_of_white * 2 / 3) for c in parts).hex()


def _bar_layout(x: str, labels: list[str], places: list[float], *, height: int) -> dict[str, Any]:
    """Stacked bars with their labels above them: a narrow screen is too narrow for both."""
    above = {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    span = [places[-1] + 0.5, places[0] - 0.8]
    axis = {"range": span, "showticklabels": False, "showgrid": False, "zeroline": False}
    return {
        **_layout(x, "", 110 + round(height * (span[0] - span[1])), yaxis=axis),
        "barmode": "stack",
        "annotations": [
            {**above, "text": text, "y": at - 0.32} for text, at in zip(labels, places, strict=True)
        ],
    }


def _memory_chart(rows: Sequence[Row]) -> Figure | None:
    """A bar per stage of every row: state, gradients and saved activations, one after another."""
    bars: list[tuple[float, Row, dict[str, Any]]] = []
    labels = []
    for row in rows:
        stages = [s for s in stages_of(row) if any(s[key] is not None for key in _MEMORY)]
        every = max(1, -(-len(stages) // _MOST_STAGES))
        for at, stage in enumerate(stages[::every]):
            gap = 1.0 if at else 1.4  # a little more between methods
            bars.append((bars[-1][0] + gap if bars else 0.0, row, stage))
            name = "" if at else f"<b>{_text(row.label)}</b>: "
            labels.append(name + stage["trains"])
    if len(bars) < 2:
        return None
    about = [
        [_text(row.label), stage["trains"], sum(stage[key] or 0 for key in _MEMORY) / 2**20]
        for _, row, stage in bars
    ]
    places = [place for place, *_ in bars]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "width": 0.64,
            "name": name,
            "y": places,
            "x": [None if s[key] is None else s[key] / 2**20 for *_, s in bars],
            "marker": {"color": colour},
            "customdata": about,
            "hovertemplate": "<b>%{customdata[0]}</b><br>trains %{customdata[1]}"
            f"<br>{name}: %{{x:,.1f}} of %{{customdata[2]:,.1f}} MiB<extra></extra>",
        }
        for key, (name, colour) in _MEMORY.items()
    ]
    return {"data": traces, "layout": _bar_layout("MiB", labels, places, height=42)}


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
