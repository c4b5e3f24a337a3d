"""What happened, from stored runs and nothing else: one table, PNG plots, one HTML file.

Runs of one method and work whose names differ only in `-seed<N>` are repeats of each other: they
share a row, and figures become mean ± standard error. Byte counts are shown in MiB (2**20 bytes).
"""

from .document import comparison_table, markdown_table, notices, write_report
from .plots import PLOTS
from .runs import Run, find_run, group_runs, load_run

__all__ = [
    "PLOTS",
    "Run",
    "comparison_table",
    "find_run",
    "group_runs",
    "load_run",
    "markdown_table",
    "notices",
    "write_report",
]
