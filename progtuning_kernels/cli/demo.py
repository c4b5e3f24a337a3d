"""`progtuning demo`: a pretrained model, real text, fully and progressively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

from .. import backend, report
from ..report.document import check_packages
from .errors import as_user_error
from .models import check_peft
from .options import Method, TrainOptions
from .output import DEMO_FILES, empty_folder
from .preparation import read_rows
from .train import Run, fail_learning


def run(options: TrainOptions, *, methods: Sequence[Method], seeds: int, lora_lr: float) -> None:
    """Train with every method and seed, then compare.

    All methods see the same rows in the same order and the same initial head; learning rates are
    the same but for LoRA, which needs larger ones. `full` and `lora` use torch's fused AdamW and
    nothing of this library.
    """
    console, output = Console(), options.output
    console.print(f"Fine-tuning {options.model}: {', '.join(methods)} ({options.stages} stages).")
    missing = backend.native_reason(torch.device("cpu"))
    if missing is not None:
        console.print(f"Without the native extension ({missing}): slower.", soft_wrap=True)
    with as_user_error():  # before the minutes of training that would be lost
        check_packages()
    if any("lora" in method for method in methods):
        check_peft()
    empty_folder(output, DEMO_FILES)
    folders, failures = [], []
    data = read_rows(options)  # the same for every run
    console.print(data.summary(), soft_wrap=True, markup=False)
    first = options.of_trainer("seed")
    for seed in range(first, first + seeds):
        for method in methods:
            folder = output / f"{method}-seed{seed}"
            own = {"seed": seed, "output_dir": str(folder)}
            own |= {"learning_rate": lora_lr} if "lora" in method else {}
            settings = replace(options, method=method, trainer=options.trainer | own)
            trained = Run(settings, data, name=folder.name, console=console)
            if not folders:
                for note in trained.prepared.notes:
                    console.print(note, soft_wrap=True, markup=False)
            failure = trained.train(resumable=False)["summary"]["failure"]
            if failure is not None:
                failures.append(f"{folder.name}: {failure}")
            folders.append(folder)
    console.print()
    with as_user_error():
        runs = [report.load_run(folder) for folder in folders]
        console.print(report.comparison_table(runs))
        for line in report.findings(runs)[1:]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        page = report.write_report(runs, output / "report")
    console.print(f"report: {page}", soft_wrap=True)
    if failures:
        fail_learning(failures)
