"""Stored runs, grouped by method, and the figures taken from them.

A figure that a run did not store is None and shown as "–", never guessed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1

MISSING = "–"

_METHODS = ("full", "progressive", "progressive-cache", "lora", "progressive-lora")

# Okabe and Ito's palette, made for colour-blind readers: one colour and one marker per method.
_STYLES = {
    "full": ("#0072B2", "o"),
    "progressive": ("#D55E00", "s"),
    "progressive-cache": ("#E69F00", "P"),
    "lora": ("#009E73", "^"),
    "progressive-lora": ("#CC79A7", "D"),
}

_SPARE_STYLES = (("#56B4E9", "v"), ("#000000", "X"))

EXPECTED = "expected from block FLOPs"

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
class Row:
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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def group_runs(runs: Sequence[Run]) -> list[Row]:
    if not runs:
        raise ValueError("no runs to report")
    metrics = distinct(run.metric_name for run in runs)
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
            Row(base if len(bases) > 1 else method, method, variant, groups[method, base])
            for variant, base in enumerate(bases)
        ]
    return rows


def _has_seed(runs: Sequence[Run] | None, seed: int) -> bool:
    return any(run.seed == seed for run in runs or ())


def number(figures: Mapping[str, Any], key: str) -> float | None:
    value = figures.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Sequence[float | None]) -> float | None:
    known = numbers(values)
    return statistics.fmean(known) if known else None


def standard_error(values: Sequence[float | None]) -> float | None:
    known = numbers(values)
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def show(value: float | None, spec: str, scale: float = 1.0) -> str:
    return MISSING if value is None else format(value * scale, spec)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What differs in the work of these runs, beyond method, settings of it, and seed."""

    def of(name: str, source: str, *keys: str) -> tuple[str, list[str]]:
        return name, distinct(
            " x ".join(str(getattr(run, source).get(key, MISSING)) for key in keys) for run in runs
        )

    found = dict(
        (
            of("devices", "meta", "device"),
            ("data", _different_data(runs)),
            ("models", distinct(_model(run) for run in runs)),
            of("epochs", "config", "epochs"),
            of("steps", "summary", "steps"),
            of("batch sizes", "config", "batch_size", "accumulate"),
            of("sequence lengths", "config", "max_length"),
            of("precisions", "config", "precision"),
        )
    )
    return {name: values for name, values in found.items() if len(values) > 1}


def _model(run: Run) -> str:
    parameters = show(number(run.model, "num_params"), ",.0f")
    return f"{run.model.get('name', MISSING)}, {parameters} parameters"


def data_line(run: Run) -> str:
    rows = [show(number(run.data, key), ",.0f") for key in ("train_rows", "validation_rows")]
    description = run.data.get("description") or MISSING
    labels = run.data.get("label_names")
    line = f"{description} ({rows[0]} to train, {rows[1]} to validate)"
    return f"{line}; labels: {', '.join(map(str, labels))}" if labels else line


def _different_data(runs: Sequence[Run]) -> list[str]:
    """More than one line if methods saw different data; a seed may choose its own rows."""
    digests = all(run.data.get("digest") for run in runs)

    def line(run: Run) -> str:
        return data_line(run) + (f", content {run.data['digest'][:8]}" if digests else "")

    for seed in {run.seed for run in runs}:
        lines = distinct(line(run) for run in runs if run.seed == seed)
        if len(lines) > 1:
            return lines
    keys = ("train_rows", "validation_rows", "label_names")
    return distinct(", ".join(str(run.data.get(key)) for key in keys) for run in runs)


def full_row(rows: Sequence[Row], row: Row) -> Row | None:
    """The first row of the method full that did the same work: what `row` may be related to.

    None where one of them has a run that learnt nothing.
    """

    def failed(row: Row) -> bool:
        return any(run.summary.get("failure") for run in row.runs)

    full = (other for other in rows if other.method == "full" and not failed(other))
    if failed(row):
        return None
    return next((other for other in full if not differences([*other.runs, *row.runs])), None)


def full_step_ms(full: Row | None) -> float | None:
    """Median over all steps of the full runs, so that one stage on a busy machine counts little."""
    for entries, key in (("steps", "step_ms"), ("stages", "step_ms_median")):
        runs = [] if full is None else full.runs
        step_ms = numbers([number(x, key) for run in runs for x in getattr(run, entries)])
        if step_ms:
            return statistics.median(step_ms)
    return None


def trainable_units(run: Run, stage: Mapping[str, Any]) -> list[bool]:
    """Embeddings, blocks 0..L-1, head.

    A boundary says all about a plan that trains a suffix; other plans (embeddings that always
    train, blocks drawn at random) store their per-block flags as `trainable`.
    """
    num_blocks = run.model["num_blocks"]
    blocks = stage.get("trainable")
    if not isinstance(blocks, list) or len(blocks) != num_blocks:
        blocks = [block >= stage["boundary"] for block in range(num_blocks)]
    return [bool(stage.get("embeddings")), *map(bool, blocks), bool(stage.get("head", True))]


def axis_positions(run: Run, axis: str) -> dict[int, float]:
    """Where the end of each step lies on an axis, up to the first step without the figure.

    Args:
        axis: "step", its number; "train_seconds" or "updates", which add up: seconds of training,
            and parameters updated (those active in the step's stage, as the stage stored them).
    """
    active = {stage["stage"]: number(stage, "active_params") for stage in run.stages}
    positions: dict[int, float] = {}
    total = 0.0
    for entry in run.steps:
        if axis == "step":
            total = float(entry["step"])
        else:
            step_ms = number(entry, "step_ms")
            seconds = None if step_ms is None else step_ms / 1e3
            more = seconds if axis == "train_seconds" else active.get(entry.get("stage"))
            if more is None:
                break
            total += more
        positions[entry["step"]] = total
    return positions


def expected_step_ratio(run: Run, stage: Mapping[str, Any]) -> float | None:
    """Step cost relative to the full step, counting block FLOPs only.

    Forward, input gradient and weight gradient cost a third each. A frozen block below the boundary
    saves the two gradients (1 - 2f/3 when all of them are there), one above it the weight gradient
    (1 - f/3), and one below it the forward as well for rows that came from the cache (1 - f).
    Adapters change what a block computes, so the rule says nothing about them.
    """
    methods = ("full", "progressive", "progressive-cache")
    if run.method not in methods or run.model["num_blocks"] == 0:
        return None
    embeddings, *blocks, _ = trainable_units(run, stage)
    below = 0 if embeddings else next((i for i, on in enumerate(blocks) if on), len(blocks))
    inside = blocks[below:].count(False)
    cached = below * (cache_hit_share(stage) or 0.0)
    return 1 - (2 * below + inside + cached) / (3 * len(blocks))


def cache_of(stage: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the prefix cache did in the stage; None where there was none."""
    cache = stage.get("cache")
    return cache if isinstance(cache, dict) else None


def cache_hit_share(stage: Mapping[str, Any]) -> float | None:
    """Share of the stage's rows that came from the cache; None where none was asked for one."""
    cache = cache_of(stage) or {}
    hits, misses = number(cache, "hits"), number(cache, "misses")
    return None if hits is None or misses is None else ratio(hits, hits + misses)


def distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(MISSING if value is None else str(value) for value in values))
