"""C++ of csrc compiled alone, once for every instruction set that this processor runs."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def one_per_instruction_set(
    folder: Path, shim: str, source: str
) -> Iterator[tuple[str, ctypes.CDLL]]:
    """Names and libraries: `shim`, which has C names for what is tested, with a file of csrc.

    The extension picks a body when it is loaded; these have one body each, so that those for other
    processors run, too.
    """
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.exists() else ""
    (folder / "shim.cpp").write_text(shim)
    flags = {"default": []} | {isa: [f"-m{isa}"] for isa in ("avx2", "avx512f") if isa in known}
    builds = {}
    for isa, extra in flags.items():
        command = ["g++", "-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", *extra]
        command += ["-DPROGTUNING_ONE_ISA", f"-I{CSRC}", "shim.cpp", str(CSRC / source)]
        builds[isa] = subprocess.Popen([*command, "-o", f"{isa}.so"], cwd=folder)
    assert not any([build.wait() for build in builds.values()])
    for isa in builds:
        yield isa, ctypes.CDLL(str(folder / f"{isa}.so"))
