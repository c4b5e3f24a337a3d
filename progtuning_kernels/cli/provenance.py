"""Where a result comes from: commit, dirty flag, versions, device, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def cpu_facts() -> dict[str, str]:
    """The last processor of /proc/cpuinfo, such as its "model name" and "flags"; may be empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_in_words() -> str:
    """The CPU, and how many threads torch uses on it."""
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"


def provenance(device: torch.device | None) -> dict[str, Any]:
    """The `meta` record of a stored result.

    `commit` and `dirty` are None where the package does not run from a git checkout of itself.

    Args:
        device: where the result is from; None leaves it out, for what is only compiled or counted.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if tracked else None
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    of_device, cuda = {}, {}
    if device is not None:
        of_device = {"device": cpu_in_words()}
        if device.type == "cuda":
            of_device = {"device": torch.cuda.get_device_name(device)}
            cuda = {"cuda": torch.version.cuda}
    packages = ("progtuning_kernels", "transformers", "triton", "peft", "numpy")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **of_device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **cuda,
            **{name: installed_version(name) for name in packages},
        },
    }
