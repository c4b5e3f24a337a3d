"""`progtuning report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import report
from .errors import UserError, as_user_error


def run(paths: Sequence[Path], output: Path, *, markdown: bool) -> None:
    """Compare the runs in `paths`; folders without a metrics.json (other reports) are left out."""
    kept = [p for p in paths if not p.is_dir() or (p / "metrics.json").exists()]
    if not kept:
        raise UserError("none of these folders has a metrics.json")
    console = Console()
    with as_user_error():
        runs = [report.load_run(path) for path in kept]
        console.print(report.stage_table(runs))
        console.print(report.comparison_table(runs))
        for line in report.notices(runs):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        if markdown:
            print(report.markdown_table(runs))
        console.print(f"report: {report.write_report(runs, output).html}", soft_wrap=True)
