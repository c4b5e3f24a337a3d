"""What happened, from stored runs and nothing else: tables, PNG plots, one HTML file.

A run is a folder with a `metrics.json` (format 1). Runs whose names differ only in `-seed<N>` are
repeats of each other: they share a row, and figures become mean ± standard error. A figure that a
run did not store is shown as "–", never guessed. Byte counts are shown in MiB (2**20 bytes).
"""

from __future__ import annotations

import base64
import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = 1
MISSING = "–"

_METHODS = ("full", "progressive", "lora")
# Okabe and Ito's palette, made for colour-blind readers: one colour and one marker per method.
_STYLES = {"full": ("#0072B2", "o"), "progressive": ("#D55E00", "s"), "lora": ("#009E73", "^")}
_SPARE_STYLES = (("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P"))
_LINES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
_EXPECTED = "expected from block FLOPs"
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
_FIELDS = {
    **{"name": str, "method": str, "seed": int, "metric_name": str},
    **{"config": dict, "meta": dict, "data": dict, "model": dict, "summary": dict},
    **{"steps": list, "evaluations": list, "stages": list},
}
_ENTRY_FIELDS = {
    "steps": ("step",),
    "evaluations": ("step",),
    "stages": ("stage", "boundary", "first_step", "last_step"),
}


@dataclass(frozen=True)
class Run:
    """One stored run: the fields of its metrics.json."""

    path: Path
    name: str
    method: str
    seed: int
    metric_name: str
    config: dict[str, Any]
    meta: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass(frozen=True)
class ReportPaths:
    """Files that `write_report` wrote; `plots` maps a plot's name to its PNG."""

    html: Path
    plots: dict[str, Path]


@dataclass(frozen=True)
class _Row:
    """The repeats of one method."""

    label: str
    method: str
    variant: int
    runs: list[Run]

    @property
    def style(self) -> tuple[str, str]:
        """Colour and marker: of the method alone, so the same in every plot of every report."""
        spare = sum(self.method.encode()) % len(_SPARE_STYLES)
        return _STYLES.get(self.method, _SPARE_STYLES[spare])


@dataclass(frozen=True)
class _Cells:
    """A table as text: the terminal, markdown and HTML show the same characters."""

    headers: list[str]
    rows: list[list[str]]


def load_run(path: str | Path) -> Run:
    """Read a run folder, or its metrics.json itself.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no metrics.json here, so no run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: not a run of format {FORMAT} (format: {found!r})")
    for field, kind in _FIELDS.items():
        if not isinstance(stored.get(field), kind):
            raise ValueError(f"{file}: {field!r} is missing or not a {kind.__name__}")
    if not _is_count(stored["model"].get("num_blocks")):
        raise ValueError(f"{file}: 'model' has no whole number 'num_blocks'")
    for field, keys in _ENTRY_FIELDS.items():
        for index, entry in enumerate(stored[field]):
            for key in keys:
                if not isinstance(entry, dict) or not _is_count(entry.get(key)):
                    raise ValueError(f"{file}: {field}[{index}] has no whole number {key!r}")
    return Run(path=file.parent, **{field: stored[field] for field in _FIELDS})


def comparison_table(runs: Sequence[Run]) -> Table:
    """One row per method: metric, seconds, updates saved, peak bytes; mean ± standard error."""
    return _rich_table("Methods compared", _comparison(runs))


def stage_table(runs: Sequence[Run]) -> Table:
    """One row per stage of each run, with the expected and the measured relative step cost.

    report.html has the steps and the gradient bytes of each stage as well.
    """
    cells = _stage_cells(runs)
    kept = [i for i, name in enumerate(cells.headers) if name not in ("Steps", "Gradients (MiB)")]
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
    rows = _group(runs)
    jinja2, mpl_style = _need("jinja2"), _need("matplotlib.style")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Path] = {}
    figures = []
    for name, title, caption, draw in _PLOTS:
        with mpl_style.context("default"):  # a user's matplotlibrc does not change a report
            figure = draw(rows)
            if figure is None:
                continue
            plots[name] = out / f"{name}.png"
            figure.savefig(plots[name], dpi=140)
        encoded = base64.b64encode(plots[name].read_bytes()).decode("ascii")
        figures.append({"title": title, "caption": caption, "base64": encoded})
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    )
    shared, differing = _options(rows)
    html = out / "report.html"
    html.write_text(
        template.render(
            headlines=_headlines(rows),
            notices=_notices(rows),
            comparison=_comparison(runs),
            stages=_stage_cells(runs),
            figures=figures,
            shared_options=shared,
            differing_options=differing,
            data=_distinct(_data_line(run) for run in runs),
            models=_distinct(_model_line(run) for run in runs),
            provenance=_provenance(rows),
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        ),
        encoding="utf-8",
    )
    return ReportPaths(html=html, plots=plots)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"a report needs {module.split('.')[0]} ({error}): "
            'pip install "progtuning_kernels[train]"'
        ) from None


def _group(runs: Sequence[Run]) -> list[_Row]:
    if not runs:
        raise ValueError("no runs to report")
    metrics = _distinct(run.metric_name for run in runs)
    if len(metrics) > 1:
        raise ValueError(
            f"runs measure different metrics ({', '.join(metrics)}): report them apart"
        )
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        base = run.name.removesuffix(f"-seed{run.seed}")
        if _has_seed(groups.get((run.method, base)), run.seed):
            base = f"{run.path.resolve().parent.name}/{base}"  # the same name in another folder
        repeats = groups.setdefault((run.method, base), [])
        if _has_seed(repeats, run.seed):
            raise ValueError(f"{run.path}: this run, or one like it, is given twice")
        repeats.append(run)

    def order(method: str) -> tuple[int, str]:
        return (_METHODS.index(method) if method in _METHODS else len(_METHODS), method)

    rows = []
    for method in sorted({method for method, _ in groups}, key=order):
        bases = [base for group, base in groups if group == method]
        rows += [
            _Row(base if len(bases) > 1 else method, method, variant, groups[method, base])
            for variant, base in enumerate(bases)
        ]
    return rows


def _has_seed(runs: Sequence[Run] | None, seed: int) -> bool:
    return any(run.seed == seed for run in runs or ())


def _number(figures: Mapping[str, Any], key: str) -> float | None:
    value = figures.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _numbers(values)
    return statistics.fmean(known) if known else None


def _standard_error(values: Sequence[float | None]) -> float | None:
    known = _numbers(values)
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _show(value: float | None, spec: str, scale: float = 1.0) -> str:
    return MISSING if value is None else format(value * scale, spec)


def _show_mean(values: Sequence[float | None], spec: str, scale: float = 1.0) -> str:
    error = _standard_error(values)
    shown = _show(_mean(values), spec, scale)
    if error:  # counts are the same for every seed: "± 0.0" would say nothing
        shown += f" ± {_show(error, spec, scale)}"
    known = len(_numbers(values))
    return shown if known in (0, len(values)) else f"{shown} ({known} of {len(values)})"


def _summary(row: _Row, key: str) -> list[float | None]:
    return [_number(run.summary, key) for run in row.runs]


def _metric_spec(run: Run) -> str:
    return ".2f" if run.metric_name == "perplexity" else ".4f"


def _full_row(rows: Sequence[_Row]) -> _Row | None:
    return next((row for row in rows if row.method == "full"), None)


def _full_mean(rows: Sequence[_Row], key: str) -> float | None:
    full = _full_row(rows)
    return None if full is None else _mean(_summary(full, key))


def _comparison(runs: Sequence[Run]) -> _Cells:
    rows = _group(runs)
    metric = runs[0].metric_name
    full_seconds = _full_mean(rows, "train_seconds")
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
                _show(_ratio(_mean(_summary(row, "train_seconds")), full_seconds), ".3f"),
                _show_mean(_summary(row, "updates_saved_share"), ".1f", 100),
                _show_mean(_summary(row, "peak_state_bytes"), ",.1f", mib),
                _show_mean(_summary(row, "peak_activation_bytes"), ",.1f", mib),
            ]
            for row in rows
        ],
    )


def _stage_cells(runs: Sequence[Run]) -> _Cells:
    rows = _group(runs)
    full_step_ms = _full_step_ms(rows)
    mib = 1 / 2**20

    def cells(run: Run, stage: Mapping[str, Any]) -> list[str]:
        return [
            run.name,
            str(stage["stage"]),
            str(stage["boundary"]),
            f"{stage['first_step']}-{stage['last_step']}",
            _show(_number(stage, "active_params"), ",.2f", 1e-6),
            _show(_number(stage, "step_ms_median"), ",.1f"),
            _show(_ratio(_number(stage, "step_ms_median"), full_step_ms), ".3f"),
            _show(_expected_step_ratio(run, stage), ".3f"),
            _show(_number(stage, "state_bytes"), ",.1f", mib),
            _show(_number(stage, "gradient_bytes"), ",.1f", mib),
            _show(_number(stage, "activation_bytes"), ",.1f", mib),
            _show(_number(stage, "metric"), _metric_spec(run)),
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
            "State (MiB)",
            "Gradients (MiB)",
            "Saved activations (MiB)",
            runs[0].metric_name,
        ],
        rows=[cells(run, stage) for row in rows for run in row.runs for stage in run.stages],
    )


def _full_step_ms(rows: Sequence[_Row]) -> float | None:
    """Median over all steps of the full runs, so that one stage on a busy machine counts little."""
    full = _full_row(rows)
    for entries, key in (("steps", "step_ms"), ("stages", "step_ms_median")):
        runs = [] if full is None else full.runs
        step_ms = _numbers([_number(x, key) for run in runs for x in getattr(run, entries)])
        if step_ms:
            return statistics.median(step_ms)
    return None


def _trainable_units(run: Run, stage: Mapping[str, Any]) -> list[bool]:
    """Embeddings, blocks 0..L-1, head.

    A boundary says all about a plan that trains a suffix; other plans (embeddings that always
    train, blocks drawn at random) store their per-block flags as `trainable`.
    """
    num_blocks = run.model["num_blocks"]
    blocks = stage.get("trainable")
    if not isinstance(blocks, list) or len(blocks) != num_blocks:
        blocks = [block >= stage["boundary"] for block in range(num_blocks)]
    return [bool(stage.get("embeddings")), *map(bool, blocks), bool(stage.get("head", True))]


def _expected_step_ratio(run: Run, stage: Mapping[str, Any]) -> float | None:
    """Step cost relative to the full step, counting block FLOPs only.

    Forward, input gradient and weight gradient cost a third each. A frozen block below the boundary
    saves the two gradients (1 - 2f/3 when all of them are there), one above it the weight gradient
    (1 - f/3). Adapters change what a block computes, so the rule says nothing about them.
    """
    if run.method not in ("full", "progressive") or run.model["num_blocks"] == 0:
        return None
    embeddings, *blocks, _ = _trainable_units(run, stage)
    below = 0 if embeddings else next((i for i, on in enumerate(blocks) if on), len(blocks))
    inside = blocks[below:].count(False)
    return 1 - (2 * below + inside) / (3 * len(blocks))


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


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(MISSING if value is None else str(value) for value in values))


def _headlines(rows: Sequence[_Row]) -> list[str]:
    full = _full_row(rows)
    if full is None:
        return []
    seconds, run = _full_mean(rows, "train_seconds"), full.runs[0]

    def metric(row: _Row) -> str:
        return _show_mean(_summary(row, "metric"), _metric_spec(run))

    return [
        f"{row.label}: {run.metric_name} {metric(row)} against {metric(full)} of {full.label}, "
        f"in {_show(_ratio(_mean(_summary(row, 'train_seconds')), seconds), '.2f')} of its "
        f"training seconds, with {_show(_mean(_summary(row, 'updates_saved_share')), '.0f', 100)} "
        "% fewer parameter updates than training everything in every step."
        for row in rows
        if row is not full
    ]


def _notices(rows: Sequence[_Row]) -> list[str]:
    runs = [run for row in rows for run in row.runs]
    notices = []
    for what, values in (
        ("devices", _distinct(run.meta.get("device") for run in runs)),
        ("data", _different_data(runs)),
        ("models", _distinct(run.model.get("name") for run in runs)),
        ("commits", _distinct(run.meta.get("commit") for run in runs)),
        ("versions", _distinct(_versions(run) for run in runs)),
    ):
        if len(values) > 1:
            notices.append(f"The runs differ in their {what}: {'; '.join(values)}.")
    dirty = [run.name for run in runs if run.meta.get("dirty")]
    if dirty:
        notices.append(f"Run from a changed working tree: {', '.join(dirty)}.")
    full = [row.label for row in rows if row.method == "full"]
    if not full:
        notices.append("No run of the method full: nothing to relate seconds and step cost to.")
    if len(full) > 1:
        notices.append(f"Full means {full[0]} wherever a figure is relative to full.")
    single = [row.label for row in rows if len(row.runs) == 1]
    if single:
        notices.append(
            f"One seed only, so without a standard error: {', '.join(single)}. Another seed can "
            "change the metric as much as a method does."
        )
    return notices


def _versions(run: Run) -> str:
    versions = run.meta.get("versions")
    if not isinstance(versions, dict) or not versions:
        return MISSING
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _different_data(runs: Sequence[Run]) -> list[str]:
    """More than one line if methods saw different data; a seed may choose its own rows."""
    for seed in {run.seed for run in runs}:
        lines = _distinct(_data_line(run) for run in runs if run.seed == seed)
        if len(lines) > 1:
            return lines
    keys = ("train_rows", "validation_rows", "label_names")
    return _distinct(", ".join(str(run.data.get(key)) for key in keys) for run in runs)


def _data_line(run: Run) -> str:
    rows = [_show(_number(run.data, key), ",.0f") for key in ("train_rows", "validation_rows")]
    description = run.data.get("description") or MISSING
    labels = run.data.get("label_names")
    line = f"{description} ({rows[0]} to train, {rows[1]} to validate)"
    return f"{line}; labels: {', '.join(map(str, labels))}" if labels else line


def _model_line(run: Run) -> str:
    params = _show(_number(run.model, "num_params"), ",.0f")
    active = _show(_number(run.model, "active_params"), ",.0f")
    return (
        f"{run.method}: {run.model.get('name', MISSING)}, {run.model['num_blocks']} blocks, "
        f"{params} parameters, {active} active at the start"
    )


def _options(rows: Sequence[_Row]) -> tuple[list[tuple[str, str]], _Cells]:
    """Options that all runs share, and a table of those that differ between them."""
    keys = sorted({key for row in rows for run in row.runs for key in run.config})
    values = {
        key: [_distinct(run.config.get(key, MISSING) for run in row.runs) for row in rows]
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


def _provenance(rows: Sequence[_Row]) -> _Cells:
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


def _figure(height: float, columns: int = 1, lines: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # not pyplot, which would hold and show the figures

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib reads text between two $ as maths


def _legend_label(row: _Row) -> str:
    count = len(row.runs)
    return _plain(row.label if count == 1 else f"{row.label} (mean of {count} runs)")


def _points(entries: Sequence[Mapping[str, Any]], x: str, y: str) -> np.ndarray:
    """The entries that have both figures, as (2, n)."""
    pairs = [(_number(entry, x), _number(entry, y)) for entry in entries]
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
    rows: Sequence[_Row],
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


def _shade_stages(ax: Axes, rows: Sequence[_Row]) -> None:
    """Bands and boundary labels of the run with most plans, the labels above the axes."""

    def plans(row: _Row) -> int:
        run = row.runs[0]
        return len({tuple(_trainable_units(run, stage)) for stage in run.stages})

    row = max(rows, key=plans)
    stages = row.runs[0].stages
    if plans(row) < 2:
        return
    every = math.ceil(len(stages) / 14)  # 14 labels of "k=12" fit into 8 inches
    for index, stage in enumerate(stages):
        first, last = stage["first_step"] - 0.5, stage["last_step"] + 0.5
        if index % 2:
            ax.axvspan(first, last, color="black", alpha=0.06, linewidth=0)
        if index % every == 0:
            ax.annotate(
                f"k={stage['boundary']}",
                ((first + last) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=row.style[0],
            )


def _legend(figure: Figure, ax: Axes) -> None:
    # Methods first: matplotlib would list the line of what is expected before the bars.
    entries = zip(*ax.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda entry: entry[1] == _EXPECTED), strict=True)
    columns = max(1, min(len(labels), 105 // (max(map(len, labels)) + 5)))  # 105 in 8 inches
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _loss_plot(rows: Sequence[_Row]) -> Figure | None:
    figure, (ax,) = _figure(4.2)
    if not _draw_curves(ax, rows, lambda run: _points(run.steps, "step", "loss"), smooth=True):
        return None
    _shade_stages(ax, rows)
    ax.set(xlabel="optimizer step", ylabel="training loss")
    ax.margins(x=0.01)
    _legend(figure, ax)
    return figure


def _metric_plot(rows: Sequence[_Row], x: str, x_label: str) -> Figure | None:
    figure, (ax,) = _figure(4.2)
    if not _draw_curves(ax, rows, lambda run: _points(run.evaluations, x, "metric"), marker=True):
        return None
    if x == "step":
        _shade_stages(ax, rows)
    ax.set(xlabel=x_label, ylabel=f"validation {_plain(rows[0].runs[0].metric_name)}")
    ax.set_xlim(left=0)
    _legend(figure, ax)
    return figure


def _stage_plot(rows: Sequence[_Row]) -> Figure | None:
    rows = [row for row in rows if row.runs[0].stages]
    if not rows:
        return None
    full_step_ms = _full_step_ms(rows)
    figure, axes = _figure(6.4, columns=2, lines=2)
    panels = (
        ("step_ms_median", "step, median (ms)", 1.0),
        ("state_bytes", "optimizer state (MiB)", 2**-20),
        ("gradient_bytes", "gradients (MiB)", 2**-20),
        ("activation_bytes", "saved activations (MiB)", 2**-20),
    )
    bars = sum(len(row.runs[0].stages) for row in rows)
    every = math.ceil(bars / 14)  # 14 numbers of two digits fit under half of 8 inches
    for ax, (key, label, scale) in zip(axes, panels, strict=True):
        start, ticks = 0.0, {}
        for row in rows:
            stages = row.runs[0].stages
            at = start + np.arange(len(stages))
            repeats = [[_stage_number(run, i, key) for run in row.runs] for i in range(len(stages))]
            # nan, because a figure that is not there is a gap and not a zero.
            heights = [scale * (_mean(known) if _numbers(known) else math.nan) for known in repeats]
            errors = [scale * (_standard_error(known) or math.nan) for known in repeats]
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
            expected = [_expected_step_ratio(row.runs[0], stage) for stage in stages]
            if key == "step_ms_median" and full_step_ms is not None and None not in expected:
                levels = full_step_ms * np.array(expected)
                lines = ax.hlines(levels, at - 0.45, at + 0.45, "black", linestyles=":", lw=1.6)
                if row is rows[0]:
                    lines.set_label(_EXPECTED)
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


def _stage_number(run: Run, index: int, key: str) -> float | None:
    return _number(run.stages[index], key) if index < len(run.stages) else None


def _unit_plot(rows: Sequence[_Row]) -> Figure | None:
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
        plans = [_trainable_units(run, stage) for stage in run.stages]
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
        share = _ratio(_number(run.model, "active_params"), _number(run.model, "num_params"))
        ax.set_title(
            f"{_plain(row.label)}: {_show(share, '.1f', 100)} % of the parameters active at the "
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


_PLOTS: tuple[tuple[str, str, str, Callable[[Sequence[_Row]], Any]], ...] = (
    (
        "loss",
        "Training loss over steps",
        "Strong line: moving mean over a 30th of the run; faint lines: every step of every run. "
        "Bands: the stages of the run with most plans; k: the boundary of each.",
        _loss_plot,
    ),
    (
        "metric_over_seconds",
        "Validation metric over time",
        "Training seconds, evaluation left out. Faint lines: single runs.",
        lambda rows: _metric_plot(rows, "train_seconds", "training time (s)"),
    ),
    (
        "metric_over_steps",
        "Validation metric over steps",
        "The same evaluations over optimizer steps. Faint lines: single runs.",
        lambda rows: _metric_plot(rows, "step", "optimizer step"),
    ),
    (
        "stages",
        "What a step costs, stage by stage",
        "One bar per stage, from the first to the last; error bars: standard error over seeds. "
        "Dotted: the full step times the expected relative cost, counted in block FLOPs.",
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
