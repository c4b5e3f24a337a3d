"""What happened, from stored runs and nothing else: tables, PNG plots, one HTML file.

A run is a folder with a `metrics.json` (format 1). Runs whose names differ only in `-seed<N>` are
repeats of each other: they share a row, and figures become mean ± standard error. Byte counts are
shown in MiB (2**20 bytes).
"""

from .document import (
    ReportPaths,
    comparison_table,
    markdown_table,
    notices,
    stage_table,
    write_contribution_plot,
    write_report,
)
from .runs import FORMAT, MISSING, Run, load_run

__all__ = [
    "FORMAT",
    "MISSING",
    "ReportPaths",
    "Run",
    "comparison_table",
    "load_run",
    "markdown_table",
    "notices",
    "stage_table",
    "write_contribution_plot",
    "write_report",
]
