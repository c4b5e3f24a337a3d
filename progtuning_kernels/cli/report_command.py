"""`progtuning report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import report
from .errors import UserError, as_user_error


def run(paths: Sequence[Path], output: Path, *, markdown: bool) -> None:
    """Compare the runs in `paths`; folders without a run (other reports) are left out."""
    kept = [path for path in paths if not path.is_dir() or report.find_run(path)]
    if not kept:
        raise UserError("none of these folders has a metrics.json or a trainer_state.json")
    console = Console()
    with as_user_error():
        runs = [report.load_run(path) for path in kept]
        console.print(report.comparison_table(runs))
        for line in (*report.findings(runs)[1:], *report.notices(runs)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        if markdown:
            print(report.markdown_table(runs))
        console.print(f"report: {report.write_report(runs, output)}", soft_wrap=True)
