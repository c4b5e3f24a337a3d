"""Finds an nvcc that can build the CUDA kernels.

setup.py runs this file as it stands, before torch is there: it needs the standard library alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

OLDEST_NVCC = (12, 1)  # kernel parameters over 4 KiB
USUAL_HOME = "/usr/local/cuda"


class Unavailable(Exception):
    """Why something is left out of the build, in one line."""


class Toolkit(NamedTuple):
    """An nvcc that runs and is new enough, and the library that its programs are linked with."""

    nvcc: str
    cudart: str

    @property
    def home(self) -> str:
        """What CUDA_HOME is called."""
        return str(Path(self.nvcc).parent.parent)


def find_toolkit() -> Toolkit:
    """The first one that can build the kernels, in the order of `_places`.

    Raises:
        Unavailable: there is none; with the reason against each nvcc that is there.
    """
    reasons = []
    for nvcc, named_by in _places().items():
        if not os.access(nvcc, os.X_OK):
            reasons += [f"no nvcc in {named_by}"] if named_by else []
            continue
        try:
            return _checked(nvcc)
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable("; ".join(reasons) or "nvcc not found")


def _places() -> dict[str, str]:
    """Where an nvcc may lie, in order, with the environment variable that says so, if one does."""
    found = {}
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            found.setdefault(str(Path(home, "bin", "nvcc")), f"{variable}={home}")
    homes = [Path(USUAL_HOME)]
    # pip's nvidia-cuda-nvcc; an environment that pip builds in does not have it, its parent may
    for prefix in filter(None, (sys.prefix, os.environ.get("VIRTUAL_ENV"), sys.base_prefix)):
        for kind in ("purelib", "platlib"):
            packages = sysconfig.get_path(kind, vars={"base": prefix, "platbase": prefix})
            homes += sorted(Path(packages, "nvidia").glob("cu[0-9]*"), reverse=True)
    nvccs = [*(str(home / "bin" / "nvcc") for home in homes), shutil.which("nvcc")]
    return found | {nvcc: "" for nvcc in nvccs if nvcc and nvcc not in found}


def _checked(nvcc: str) -> Toolkit:
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < OLDEST_NVCC:
        raise Unavailable(f"{nvcc} is {version[0]}.{version[1]}, older than 12.1")
    return Toolkit(nvcc, _static_cudart(nvcc))


def _static_cudart(nvcc: str) -> str:
    """The static runtime: `_C` then imports where there is no driver and no libcudart."""
    plan = run([nvcc, "--dryrun", "unused.cu"])  # as nvcc itself would link
    folders = [w[2:] for line in re.findall(r"LIBRARIES=(.*)", plan) for w in shlex.split(line)]
    folders += [f"{top}/{lib}" for top in re.findall(r"TOP=(.*)", plan) for lib in ("lib64", "lib")]
    for library in (Path(folder, "libcudart_static.a") for folder in folders):
        if library.exists():
            return str(library)
    raise Unavailable(f"{nvcc} has no libcudart_static.a")


def run(command: Sequence[str], *, on_failure: Callable[[str], object] | None = None) -> str:
    """What a command prints.

    Args:
        on_failure: is called with all of it where the command fails.

    Raises:
        Unavailable: it does not run, or fails; with its last line.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode != 0:
        if on_failure is not None:
            on_failure(done.stdout)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Unavailable(f"{Path(command[0]).name} failed: {last}")
    return done.stdout
