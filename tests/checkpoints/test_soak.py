"""A run that is killed again and again ends as one that is left in peace; the long form of it is
`python tests/support/soak.py --kills 200`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "support" / "soak.py"


def test_killed_runs_end_bit_identical(tmp_path):
    # a process of its own: one that has trained has threads, and cannot be forked
    command = [sys.executable, str(SOAK), "--kills", "5", "--folder", str(tmp_path)]
    names = ("progressive", "random", "adaptive")
    for name in names:
        command += ["--run", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == [*names]
    assert all("5 kills" in line and line.endswith("bit-identical") for line in lines)
    writing = [int(re.search(r"(\d+) writing a checkpoint", line)[1]) for line in lines]
    assert sum(writing) >= 2
