"""What happened, from stored runs and nothing else: one table, and one HTML file with charts.

Runs of one method and work whose names differ only in `-seed<N>` are repeats of each other: they
share a row, and figures become mean ± standard error. Byte counts are shown in MiB (2**20 bytes).
"""

from .charts import CHARTS
from .document import comparison_table, findings, markdown_table, notices, write_report
from .runs import Run, find_run, group_runs, load_run

__all__ = [
    "CHARTS",
    "Run",
    "comparison_table",
    "find_run",
    "findings",
    "group_runs",
    "load_run",
    "markdown_table",
    "notices",
    "write_report",
]
