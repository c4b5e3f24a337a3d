"""`progtuning contribution`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..contribution import Batch, measure_contribution
from .engine import Run, write_json
from .errors import as_user_error
from .provenance import provenance
from .settings import TrainSettings
from .train import load_data


def run(options: Mapping[str, Any]) -> None:
    """Measure from the model as it is loaded, print, and write contribution.json.

    The score is minus the loss over the validation rows; the metric is noted beside it.
    """
    o = dict(options)
    steps = o.pop("steps")
    settings = TrainSettings(**o, method="full", stages=1, max_steps=steps)
    console = Console()
    data = load_data(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    trained = Run(settings, data, name="contribution")
    console.print(f"{settings.model}, {trained.layout.num_blocks} blocks", soft_wrap=True)
    for note in (data.summary(), *trained.notes):
        console.print(note, soft_wrap=True, markup=False)
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

    started = time.perf_counter()
    with as_user_error(), Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training each block", total=None)
        found = measure_contribution(
            trained.trained.model,
            batches,
            score=score,
            loss=loss,
            steps=steps,
            lr=settings.lr,
            max_grad_norm=settings.max_grad_norm,
            blocks=[stack.path for stack in trained.layout.stacks],
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    measured = {
        "values": list(found.values),
        "weights": list(found.weights) if max(found.values) > 0 else None,
        "baseline": found.baseline,
        "metric_values": [metric - metrics[0] for metric in metrics[1:]],
        "seconds": time.perf_counter() - started,
    }
    rows = {"train_rows": trained.encoded.train, "validation_rows": trained.encoded.validation}
    content = {
        "format": 1,
        "model": settings.model,
        "num_blocks": trained.layout.num_blocks,
        "metric_name": trained.metric_name,
        "measures": {"train": measured},
        "config": settings.flat() | {"steps": steps},
        "data": {k: len(v) for k, v in rows.items()} | {"description": data.description},
        "meta": provenance(trained.device),
    }
    write_json(settings.output / "contribution.json", content)
    console.print("score: minus the loss over the validation rows", highlight=False)
    console.print(str(found), highlight=False, soft_wrap=True)
    console.print(f"figures: {settings.output / 'contribution.json'}", soft_wrap=True)
