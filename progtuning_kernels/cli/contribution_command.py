"""`progtuning contribution`."""

from __future__ import annotations

import dataclasses
import time

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..contribution import Batch, measure_contribution
from .errors import as_user_error
from .options import TrainOptions
from .preparation import read_rows
from .provenance import provenance
from .train import Run, write_json


def run(options: TrainOptions) -> None:
    """Measure from the model as it is loaded, print, and write contribution.json.

    The score is minus the loss over the validation rows; the metric is noted beside it.
    """
    options = dataclasses.replace(
        options,
        method="full",
        stages=1,
        trainer={**options.trainer, "save_strategy": "no", "disable_tqdm": True},
    )
    console = Console()
    rows = read_rows(options)
    options.output.mkdir(parents=True, exist_ok=True)
    run = Run(options, rows, name="contribution", console=console)
    prepared, trainer, steps = run.prepared, run.trainer, run.total_steps
    console.print(f"{options.model}, {prepared.layout.num_blocks} blocks", soft_wrap=True)
    for note in (rows.summary(), *prepared.notes):
        console.print(note, soft_wrap=True, markup=False)
    batches: list[Batch] = []
    for epoch in range(-(-steps // len(run.batches))):
        run.batches.set_epoch(epoch)
        batches += [prepared.batch([prepared.encoded["train"][i] for i in b]) for b in run.batches]
    metrics: list[float] = []

    def score(model: nn.Module) -> float:
        figures = run.figures_of(trainer.evaluate())
        metrics.append(figures["metric"])
        return -figures["loss"]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with trainer.compute_loss_context_manager():
            return model(**batch).loss

    # before: the commit that is measured, not one that is checked out in the meantime
    meta, started = provenance(run.args.device), time.perf_counter()
    with as_user_error(), Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training each block", total=None)
        found = measure_contribution(
            prepared.model,
            batches[:steps],
            score=score,
            loss=loss,
            steps=steps,
            lr=run.args.learning_rate,
            max_grad_norm=run.args.max_grad_norm,
            blocks=[stack.path for stack in prepared.layout.stacks],
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    measured = {
        "values": list(found.values),
        "weights": list(found.weights) if max(found.values) > 0 else None,
        "baseline": found.baseline,
        "metric_values": [metric - metrics[0] for metric in metrics[1:]],
        "seconds": time.perf_counter() - started,
    }
    content = {
        "model": options.model,
        "num_blocks": prepared.layout.num_blocks,
        "metric_name": run.metric_name,
        "measures": {"train": measured},
        "config": run.config() | {"steps": steps},
        "data": run.data(),
        "meta": meta,
    }
    write_json(options.output / "contribution.json", content)
    console.print("score: minus the loss over the validation rows", highlight=False)
    console.print(str(found), highlight=False, soft_wrap=True)
    console.print(f"figures: {options.output / 'contribution.json'}", soft_wrap=True)
