"""The code blocks of README.md and docs/ are tests: they run as they stand, a page in one process.

Python blocks of a page share their names; of a diff block both sides run. Bash blocks run in the
same folder, where tiny models and rows stand in for what a page names (`STAND_INS`). What a page
takes for granted stands in an invisible block, and what cannot run here says so:
`<!-- skip: next "the reason" -->`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "Agg")

try:
    from sybil import Example, Sybil
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
except ImportError:  # a machine with a GPU and no network runs tests/ without it
    Sybil = None

# what pages call a model, and the tiny model of tests/support/tiny_models.py that it is here
STAND_INS = {
    "bert-base-uncased": "bert-masked-lm",
    "gpt2": "gpt2-causal-lm",
    "meta-llama/Llama-3.2-1B": "llama-causal-lm",
}


def enter_folder(namespace: dict[str, Any]) -> None:
    from tiny_folders import save_model, save_rows

    folder = Path(tempfile.mkdtemp(prefix="page-"))
    for name, tiny in STAND_INS.items():
        save_model(folder / name, tiny)
    save_rows(folder, {"train": 96, "dev": 40})
    namespace["_left"] = Path.cwd()
    os.chdir(folder)


def leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_left"])


# A thread of torch may drop a tensor while the interpreter ends, and then asks for the GIL, which
# aborts the process after its work is done: 2 of 28 runs of two ranks on a busy machine, both with
# `take_gil` below `ConcretePyInterpreterVTable::decref` (pytorch pull 179291).
ABORTED_AT_EXIT = "(SIGABRT)"  # as torchrun prints it


def run_shell(example: Example) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = Path.cwd()
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
        for _ in range(3):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", example.parsed],
                env=os.environ | {"PATH": tools, "COLUMNS": "100"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            if ABORTED_AT_EXIT not in done.stdout:
                break
            # what the aborted run left would meet the next one: checkpoints of later steps
            empty_folder(folder)
            shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}"


def empty_folder(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def run_both_sides(example: Example) -> None:
    for left_out in "+-":
        lines = [line[1:] for line in example.parsed.splitlines() if line[:1] != left_out]
        exec(compile("\n".join(lines), example.path, "exec"), example.namespace)


if Sybil is not None:
    pytest_collect_file = Sybil(
        parsers=[
            PythonCodeBlockParser(),
            CodeBlockParser("bash", run_shell),
            CodeBlockParser("diff", run_both_sides),
            SkipParser(),
        ],
        patterns=["README.md", "docs/*.md", "docs/*/*.md"],
        setup=enter_folder,
        teardown=leave_folder,
    ).pytest()
