"""The live bar of a run; plain lines where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class TrainProgress:
    """Shows stage, loss and tokens/s of one run after another."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def running(self, name: str, step: int, total_steps: int, stages: int | None) -> Iterator[None]:
        """Show a run from `step` on; `stages` is None where their number is not known."""
        self._name, self._total, self._stages = name, total_steps, stages
        self._next_line = step
        if step:
            self.note(f"{name}: goes on after step {step} of {total_steps}")
        if not self._console.is_terminal:
            yield
            return
        bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("stage {task.fields[stage]}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = bar.add_task(
            name, total=total_steps, completed=step, stage="-", loss="-", speed="-"
        )
        with bar:
            self._bar = bar
            yield
        self._bar = None

    def update(self, stage: int, record: dict[str, Any], tokens_per_second: float) -> None:
        stage_text = self._stage_text(stage)
        loss, speed = f"{record['loss']:.4f}", f"{tokens_per_second:,.0f}"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=record["step"], stage=stage_text, loss=loss, speed=speed
            )
        elif record["step"] >= self._next_line:
            self._next_line = record["step"] + max(1, self._total // 10)
            self.note(
                f"{self._name}: step {record['step']}/{self._total}, stage {stage_text}, "
                f"loss {loss}, {speed} tokens/s"
            )

    def _stage_text(self, stage: int) -> str:
        return f"{stage + 1}" if self._stages is None else f"{stage + 1}/{self._stages}"

    def evaluated(self, stage: int, evaluation: dict[str, Any]) -> None:
        self.note(
            f"{self._name}: stage {self._stage_text(stage)} done after step {evaluation['step']}, "
            f"validation {evaluation['metric']:.4f}, loss {evaluation['loss']:.4f}"
        )
