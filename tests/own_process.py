"""Checks that need a process of their own, each a test with a name and a result of its own.

A test file that has a function `own_process(folder)`, which returns an environment, has its
functions named check_* run under it. TRITON_INTERPRET counts only where it is set before triton is
imported, and one process has room for one `_C`. The first check that runs starts the process, with
all checks of its file that are selected; every other one reports what it found there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

REPORTS = "PROGTUNING_CHECK_REPORTS"  # environment variable of such a process: the file for them
_found: dict[str, tuple[dict[str, list[dict]], str]] = {}  # file -> reports by check, output


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str) -> list | None:
    """Functions named check_* elsewhere are helpers."""
    if not name.startswith("check_"):
        return None
    return None if hasattr(collector.getparent(pytest.Module).obj, "own_process") else []


def _is_check(item: pytest.Item) -> bool:
    return getattr(item, "originalname", "").startswith("check_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what a file says takes too long there: `left_out`, a regular expression."""
    for item in [item for item in items if _is_check(item)]:
        left_out = getattr(item.module, "left_out", None)
        if left_out is not None and left_out.search(item.name):
            items.remove(item)


def interpreted(folder: Path) -> dict[str, str]:
    """The environment of Triton's interpreter."""
    pytest.importorskip("triton")
    return {"TRITON_INTERPRET": "1"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not _is_check(item) or REPORTS in os.environ:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    file = item.nodeid.partition("::")[0]
    if file not in _found:
        checks = [i for i in item.session.items if _is_check(i) and i.module is item.module]
        try:
            _found[file] = _run(item.module, [check.nodeid for check in checks], item.config)
        except pytest.skip.Exception as skipped:
            return [_report(item, "skipped", (file, 0, f"Skipped: {skipped}"))]
        except Exception as error:  # what it needs was not built
            _found[file] = {}, f"{type(error).__name__}: {error}"
    by_check, output = _found[file]
    reports = [
        item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        for data in by_check.get(item.nodeid, [])
    ]
    if not any(report.when == "call" or report.failed for report in reports):
        return [_report(item, "failed", f"it did not run there\n{output}")]
    return reports


def _report(item: pytest.Item, outcome: str, why: object) -> pytest.TestReport:
    keywords = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome, why, "call")


def _run(
    module: ModuleType, checks: list[str], config: pytest.Config
) -> tuple[dict[str, list[dict]], str]:
    with tempfile.TemporaryDirectory() as folder:
        environment = module.own_process(Path(folder))
        reports = Path(folder, "reports")
        # --capture=sys: the message of a process that ends is then seen
        command = [sys.executable, "-m", "pytest", *checks, "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-W", "error", "--capture=sys"],
            env={**os.environ, **environment, REPORTS: str(reports)},
            cwd=config.rootpath,
            capture_output=True,
            text=True,
        )
        lines = reports.read_text().splitlines() if reports.exists() else []
    found: dict[str, list[dict]] = {}
    for data in map(json.loads, lines):
        found.setdefault(data["nodeid"], []).append(data)
    return found, done.stdout + done.stderr


class WriteReports:
    """In such a process: what the process that started it reads."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and report.passed or report.when == "teardown" and report.passed:
            return
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(WriteReports(config))
