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
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_facts() -> dict[str, str]:
    """The last processor of /proc/cpuinfo, such as its "model name" and "flags"; may be empty."""
    file = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in file.open()) if file.exists() else ()
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
    on_gpu = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_in_words()
    packages = ("progtuning_kernels", "transformers", "triton", "peft", "numpy")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({} if device is None else {"device": name}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"cuda": torch.version.cuda} if on_gpu else {}),
            **{name: installed_version(name) for name in packages},
        },
    }
