"""`progtuning doctor`: what runs on this machine, and what would make it faster.

It prints on any machine and exits with 0: what is missing is a line of the report, no error. The
summary fits a screen of 24 lines of 80 columns.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__, backend, ops
from .cuda_toolkit import Unavailable, find_toolkit
from .provenance import cpu_facts, cpu_in_words, cpu_name, installed_version

_PACKAGES = ("transformers", "triton", "numpy", "peft", "accelerate")
_OPENMP_NAMES = ("libgomp", "libomp", "libiomp5")
# what docs/install.md installs; `cuda_toolkit.py` looks where pip puts it
_TOOLKIT_OF_PIP = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")
_TOOLKIT_OF_PIP += ("nvidia-cuda-runtime", "nvidia-cuda-cccl")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def run(*, everything: bool = False) -> None:
    """Print a summary, or with it versions, the extension, the machine, and every op's reasons."""
    tables = [_table("What runs here", _summary())]
    if everything:
        names = ("device", "implementation", "runs", "ops", "because")
        tables += [
            _table("Versions", _versions()),
            _table("Native extension", _extension()),
            _table("Machine", _machine()),
            _table("Implementations", _implementations(), names),
        ]
    Console().print(*tables, sep="\n")


def _summary() -> list[tuple[str, str]]:
    """What training would use on this machine, and what would make it faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = cpu_in_words() if device.type == "cpu" else _attempt(lambda: _gpu(0))
    return [
        ("version", f"{__version__}, with torch {torch.__version__}"),
        ("device", f"{device.type}: {where}"),
        ("native extension", _native_in_words(device)),
        ("Triton", _triton_in_words(device)),
        ("ops", _ops_in_words(device)),
        ("to make it faster", "\n".join(_advice(device)) or "nothing is missing for this device"),
    ]


def _native_in_words(device: torch.device) -> str:
    reason = backend.native_reason(device)
    if reason is None:
        return f"loaded, with kernels for {device.type}"
    return reason if backend.native_extension() is None else f"loaded, but {reason}"


def _triton_in_words(device: torch.device) -> str:
    version, reason = installed_version("triton"), backend.triton_reason(device)
    if version is None:
        return "not installed"
    if reason is not None:
        return f"{version}, {'its kernels need a GPU' if device.type == 'cpu' else reason}"
    rocm = "; for AMD GPUs its kernels are compiled in tests, and have never run"
    return f"{version}, usable{rocm if torch.version.hip else ''}"


def _ops_in_words(device: torch.device) -> str:
    """Names of the ops by the implementation that they use on `device`."""
    names = defaultdict(list)
    for op in backend.OPS:
        names[_used(op, device.type)].append(op)
    called = {"native": "native", "triton": "Triton", "reference": "plain PyTorch", None: "none"}
    return "\n".join(
        f"{called[name]}: {', '.join(names[name])}" for name in called if name in names
    )


def _advice(device: torch.device) -> list[str]:
    """What is missing for the fastest code, with what brings it; empty where nothing is."""
    extension = backend.native_extension()
    lines = []
    if device.type == "cpu" and shutil.which("nvidia-smi") and not torch.backends.cuda.is_built():
        lines.append("a CUDA build of torch: this one is for CPUs only, and there is a GPU driver")
    if extension is None:
        lines.append("the native extension: with a C++17 compiler, `pip install .` in a clone")
    elif not extension.openmp:
        lines.append("OpenMP: native CPU ops use one thread; `pip install .` in a clone with g++")
    needs_cuda = device.type == "cuda" and torch.version.hip is None
    if needs_cuda and extension is not None and not extension.cuda_built:
        lines.append(f"CUDA kernels: {_rebuild()}")
    if device.type == "cuda" and (reason := backend.triton_reason(device)) is not None:
        installed = installed_version("triton") is not None
        lines.append(f"Triton: {reason if installed else '`pip install triton`'}")
    if forced := os.environ.get(backend.ENVIRONMENT_VARIABLE):
        lines.append(f"{backend.ENVIRONMENT_VARIABLE} unset: it is {forced!r}")
    if len(openmp_pools()) > 1:
        lines.append("OMP_WAIT_POLICY=passive: several OpenMP runtimes are loaded")
    return lines


def _rebuild() -> str:
    """The command that builds the CUDA kernels with an nvcc of this machine, or that brings one."""
    clone = Path(__file__).parents[2]
    where = f"-e {clone}" if (clone / "setup.py").exists() else ". (in a clone)"
    install = f"pip install --force-reinstall --no-deps {where}"
    try:
        return f"`CUDA_HOME={shlex.quote(find_toolkit().home)} {install}`"
    except Unavailable as reason:
        parts = " ".join(f"{part}==13.0.*" for part in _TOOLKIT_OF_PIP)
        return f"{reason}; `pip install {parts}`, then `{install}`"


def openmp_pools(maps: str | None = None) -> list[str]:
    """Paths of the OpenMP runtimes that `maps` lists; None reads this process's."""
    file = Path("/proc/self/maps")
    if maps is None:
        maps = file.read_text() if file.exists() else ""
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
    return sorted(path for path in paths if Path(path).name.startswith(_OPENMP_NAMES))


def _versions() -> list[tuple[str, str]]:
    rows = [("progtuning_kernels", __version__), ("python", platform.python_version())]
    rows.append(("torch", torch.__version__))  # names its build, +cpu or +cu130; its metadata not
    rows += [(package, installed_version(package) or "not installed") for package in _PACKAGES]
    if torch.version.hip is not None:
        return [*rows, ("ROCm of torch", torch.version.hip)]
    return [*rows, ("CUDA of torch", torch.version.cuda or "none (CPU-only build)")]


def _extension() -> list[tuple[str, str]]:
    extension = backend.native_extension()
    if extension is None:
        return [("loaded", f"no: {backend.native_reason(torch.device('cpu'))}")]
    rows = [("loaded", extension.__file__), ("compiler", extension.compiler)]
    if extension.cuda_built:
        # 13000 is 13.0
        runtime, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in extension.cuda_versions())
        rows += [
            ("CUDA", f"built with runtime {runtime}"),
            ("CUDA architectures", extension.cuda_archs),
            ("CUDA driver supports", "no driver" if driver == "0.0" else driver),
            ("CUDA devices", _attempt(lambda: str(extension.cuda_device_count()))),
        ]
    else:
        why = backend.build_record().get("cuda_reason") or "no record of the reason"
        rows.append(("CUDA", f"not built: {why}"))
    pools = openmp_pools()
    rows.append(("OpenMP", "yes" if extension.openmp else "no: native CPU ops use one thread"))
    rows.append(("OpenMP pools loaded", "\n".join(pools) or "none"))
    if len(pools) > 1:
        advice = "their idle threads spin against each other; OMP_WAIT_POLICY=passive helps"
        rows.append(("", f"{len(pools)} pools: {advice}"))
    return rows


def _machine() -> list[tuple[str, str]]:
    facts = cpu_facts()
    flags = (facts.get("flags") or facts.get("Features", "")).split()  # x86's, ARM's
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found = [(f"GPU {i}", _attempt(lambda i=i: _gpu(i))) for i in gpus]
    return [
        ("CPU", cpu_name()),
        ("CPU features", " ".join(name for name in _CPU_FEATURES if name in flags) or "none known"),
        ("threads of torch", str(torch.get_num_threads())),
        *(found or [("GPU", "none that torch can use")]),
    ]


def _gpu(index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    sm = f"sm_{device.major}{device.minor}"
    architecture = device.gcnArchName if torch.version.hip is not None else sm
    return f"{device.name}, {architecture}, {device.total_memory / 2**30:.0f} GiB"


def _implementations() -> list[tuple[str, ...]]:
    """A row for all ops of which the same is true."""
    found = defaultdict(list)
    for row in ops.backend_report().rows:
        used = row.implementation == _used(row.op, row.device)
        runs = "used" if used else "yes" if row.ok else "no"
        reason = (row.reason or "").removeprefix(f"{row.op} ")  # "has no native implementation"
        found[row.device, row.implementation, runs, reason].append(row.op)
    rows = [
        (*kind, "every op" if len(names) == len(backend.OPS) else " ".join(names), reason)
        for (*kind, reason), names in found.items()
    ]
    return sorted(rows, key=lambda row: (row[0], backend.PREFERENCE.index(row[1])))


def _used(op: str, device: str) -> str | None:
    """The implementation that the op runs with on ordinary tensors; None without any."""
    asked = backend.OPS[op]
    try:
        return backend.select(asked, asked.probe(torch.device(device))).name
    except Exception:  # no GPU, or PROGTUNING_BACKEND forces one that cannot run
        return None


def _table(title: str, rows: Iterable[Sequence[str]], names: Sequence[str] = ("", "")) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(names))
    for i, name in enumerate(names):
        table.add_column(name, no_wrap=i < max(1, len(names) - 2), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _attempt(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except Exception as error:
        return str(error)
