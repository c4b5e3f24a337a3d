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
from typing import Any

import pytest

REPORTS = "PROGTUNING_CHECK_REPORTS"  # environment variable of such a process: the file for them
# file -> failures by check that ran (None: none), and the output of the process
_found: dict[str, tuple[dict[str, str | None], str]] = {}


class CheckFailed(Exception):
    """With the report of the other process."""


class Check(pytest.Item):
    """In the place of the function, in the process that starts the other one."""

    def __init__(self, *, checked: pytest.Function, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.checked = checked

    def runtest(self) -> None:
        file = self.nodeid.partition("::")[0]
        if file not in _found:
            checks = [item for item in self.session.items if isinstance(item, Check)]
            ids = [item.nodeid for item in checks if item.nodeid.partition("::")[0] == file]
            _found[file] = _run(self.checked.module.own_process, ids, self.config.rootpath)
        failures, output = _found[file]
        if self.nodeid not in failures:
            raise CheckFailed(f"it did not run there\n{output}")
        if failures[self.nodeid] is not None:
            raise CheckFailed(failures[self.nodeid])

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> Any:
        failed = isinstance(excinfo.value, CheckFailed)
        return str(excinfo.value) if failed else super().repr_failure(excinfo)

    def reportinfo(self) -> Any:
        return self.checked.reportinfo()


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str) -> list | None:
    """Functions named check_* elsewhere are helpers."""
    if not name.startswith("check_"):
        return None
    return None if hasattr(collector.getparent(pytest.Module).obj, "own_process") else []


@pytest.hookimpl(trylast=True)  # after what was not selected has gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's `left_out`, a regular expression, says which of its checks take too long there."""
    if REPORTS in os.environ:
        return
    kept: list[pytest.Item] = []
    for item in items:
        if not getattr(item, "originalname", "").startswith("check_"):
            kept.append(item)
            continue
        left_out = getattr(item.module, "left_out", None)
        if left_out is None or not left_out.search(item.name):
            kept.append(Check.from_parent(item.parent, name=item.name, checked=item))
    items[:] = kept


def interpreted(folder: Path) -> dict[str, str]:
    """The environment of Triton's interpreter."""
    pytest.importorskip("triton")
    return {"TRITON_INTERPRET": "1"}


def _run(own_process: Any, checks: list[str], root: Path) -> tuple[dict[str, str | None], str]:
    with tempfile.TemporaryDirectory() as folder:
        environment = own_process(Path(folder))
        reports = Path(folder, "reports")
        # --capture=sys: the message of a process that ends is then seen
        command = [sys.executable, "-m", "pytest", *checks, "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-W", "error", "--capture=sys"],
            env={**os.environ, **environment, REPORTS: str(reports)},
            cwd=root,
            capture_output=True,
            text=True,
        )
        lines = reports.read_text().splitlines() if reports.exists() else []
    failures: dict[str, str | None] = {}
    for check, failure in map(json.loads, lines):
        failures[check] = failures.get(check) or failure
    return failures, done.stdout + done.stderr


class WriteReports:
    """In the other process: what happened to each check, for the process that started it."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        failure = None if report.passed else report.longreprtext or str(report.longrepr)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps([report.nodeid, failure]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(WriteReports())
