"""`progtuning contribution`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from .. import report
from ..contribution import Batch, Contribution, Method, measure_contribution
from .engine import Run, write_json
from .errors import as_user_error
from .metrics import rank_correlation
from .provenance import provenance
from .settings import TrainSettings
from .train import load_data

# In the order of the file and of the panels: the paper's measure first.
_AXES: dict[Method, str] = {
    "train": "fall in validation loss",
    "skip": "rise in validation loss",
    "gradient": "gradient norm",
}


@dataclass(frozen=True)
class _Measured:
    """One measure.

    Attributes:
        metrics: the metric's counterpart of the values; None for "gradient".
        seconds: what it took.
    """

    found: Contribution
    metrics: list[float] | None
    seconds: float

    def stored(self) -> dict[str, Any]:
        values = self.found.values
        return {
            "values": list(values),
            "weights": list(self.found.weights) if max(values) > 0 else None,
            "baseline": self.found.baseline,
            "metric_values": self.metrics,
            "seconds": self.seconds,
        }


class _Bar:
    """One bar after another; a few lines each where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def running(self, name: str) -> Iterator[Callable[[int, int], None]]:
        started, shown = time.perf_counter(), 0
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            TextColumn("[bold]{task.description}"),
            *columns,
            console=self._console,
            disable=not self._console.is_terminal,
        ) as bar:
            task = bar.add_task(name, total=None)

            def tell(done: int, total: int) -> None:
                nonlocal shown
                bar.update(task, completed=done, total=total)
                if bar.disable and done < total and 10 * done // total > shown:
                    shown = 10 * done // total
                    self._console.print(f"{name}: {done}/{total}", highlight=False)

            yield tell
        self._console.print(f"{name}: {time.perf_counter() - started:.1f} s", highlight=False)


def run(options: Mapping[str, Any]) -> None:
    """Measure, and write contribution.json and contribution.png.

    "train" starts from the model as it is loaded. For "skip" and "gradient" the whole model is
    fine-tuned first: a new head would make noise of both.
    """
    o = dict(options)
    measure, steps, tune_steps = o.pop("measure"), o.pop("steps"), o.pop("tune_steps")
    settings = TrainSettings(
        **o,
        method="full",
        stages=1,
        max_steps=(steps if tune_steps is None else tune_steps) or 1,
    )
    console = Console()
    data = load_data(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    trained = Run(settings, data, name="fine-tuning")
    console.print(f"{settings.model}, {trained.layout.num_blocks} blocks", soft_wrap=True)
    for note in (data.summary(), *trained.notes):
        console.print(note, soft_wrap=True, markup=False)
    bar = _Bar(console)
    methods: Sequence[Method] = list(_AXES) if measure == "all" else [measure]
    measured: dict[Method, _Measured] = {}
    for method in methods:
        if method != "train" and tune_steps != 0 and not trained.step:
            with bar.running(trained.name) as tell:
                trained.fit(lambda step, tell=tell: tell(step, trained.total_steps))
        with bar.running(method) as tell:
            measured[method] = _measure(trained, method, steps, tell)
    columns = _columns(trained.metric_name, measured)
    content = {
        "format": 1,
        "model": settings.model,
        "num_blocks": trained.layout.num_blocks,
        "metric_name": trained.metric_name,
        "measures": {method: m.stored() for method, m in measured.items()},
        "rank_correlations": [
            {"between": [a, b], "spearman": rank_correlation(columns[a], columns[b])}
            for a, b in combinations(columns, 2)
        ],
        "config": settings.flat() | {"measure": measure, "steps": steps, "tune_steps": tune_steps},
        "data": {
            "train_rows": len(trained.encoded.train),
            "validation_rows": len(trained.encoded.validation),
            "description": data.description,
        },
        "meta": provenance(trained.device),
    }
    path = settings.output / "contribution.json"
    write_json(path, content)
    with as_user_error():
        panels = [(m, _AXES[m], measured[m].found.values) for m in measured]
        picture = report.write_contribution_plot(panels, path.with_suffix(".png"))
    for table in (_value_table(columns), *_correlation_tables(columns)):
        console.print(table)
    for name, file in (("figures", path), ("plot", picture)):
        console.print(f"{name}: {file}", soft_wrap=True)


def _measure(
    trained: Run, method: Method, steps: int, tell: Callable[[int, int], None]
) -> _Measured:
    """Scores are minus the loss over the validation rows; the metric is noted beside them."""
    windows = list(trained.order.windows(0, steps))
    batches = [trained.batch([trained.encoded.train[i] for i in rows]) for (rows,) in windows]
    metrics: list[float] = []

    def score(model: nn.Module) -> float:
        evaluation = trained.evaluate()
        metrics.append(evaluation["metric"])
        return -evaluation["loss"]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with trained.autocast():
            return model(**batch).loss

    s, started = trained.settings, time.perf_counter()
    with as_user_error():
        found = measure_contribution(
            trained.trained.model,
            batches,
            method=method,
            score=score,
            loss=loss,
            steps=steps,
            lr=s.lr,
            max_grad_norm=s.max_grad_norm,
            blocks=[stack.path for stack in trained.layout.stacks],
            on_progress=tell,
        )
    seconds = time.perf_counter() - started
    if method == "gradient":
        return _Measured(found, None, seconds)
    sign = 1 if method == "train" else -1
    return _Measured(found, [sign * (value - metrics[0]) for value in metrics[1:]], seconds)


def _columns(metric_name: str, measured: Mapping[Method, _Measured]) -> dict[str, Sequence[float]]:
    """Figures by the head of their column."""
    columns: dict[str, Sequence[float]] = {}
    for method, m in measured.items():
        columns[method] = m.found.values
        if m.metrics is not None:
            columns[f"{method}, {metric_name}"] = m.metrics
    return columns


def _value_table(columns: Mapping[str, Sequence[float]]) -> Table:
    table = Table(title="Contribution of the blocks")
    for name in ("block", *columns):
        table.add_column(name, justify="right")
    for block, values in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(str(block), *(f"{value:.4f}" for value in values))
    table.caption = (
        "train: fall in validation loss when the block trains beside embeddings and head; skip: "
        "its rise when the block is skipped; gradient: norm over the block's parameters."
    )
    return table


def _correlation_tables(columns: Mapping[str, Sequence[float]]) -> Iterator[Table]:
    """Every pair of columns once; nothing where there is one column only."""
    if len(columns) < 2:
        return
    table = Table(title="Rank correlation (Spearman)")
    names = list(columns)
    for name in ("", *names[1:]):
        table.add_column(name, justify="right")
    for i, a in enumerate(names[:-1]):
        cells = [""] * i
        for b in names[i + 1 :]:
            value = rank_correlation(columns[a], columns[b])
            cells.append("-" if value is None else f"{value:+.2f}")
        table.add_row(a, *cells)
    yield table
