"""Triton without a GPU, for its kernels' tests: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


def run_checks(file: str) -> None:
    """The functions of a test file named check_*, in one process with Triton's interpreter.

    TRITON_INTERPRET counts only where it is set before triton is imported.
    """
    command = [sys.executable, "-m", "pytest", file, "-o", "python_functions=check_*"]
    command += ["-p", "no:cacheprovider", "-W", "error"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(file).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def compile_for(
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    options: dict[str, Any],
    *,
    divisible: Collection[str] = (),
) -> Any:
    """A kernel for one architecture, specialised as at a launch.

    Args:
        kinds: of the arguments that are no constants, "*fp32", "i32", ...
        constants: the others; one that is missing is None.
        divisible: integers that are multiples of 16 beside the addresses, which all are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: constants.get(name) for name, kind in full.items() if kind == "constexpr"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(full.items())
        if kind[0] == "*" or name in divisible
    }
    source = ASTSource(kernel, full, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers ("REG"), stack and local memory of a compiled kernel; empty without cuobjdump."""
    import triton

    tool = shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool is None and not bundled.exists():
        return {}
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [tool or str(bundled), "-res-usage", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
