"""Builds copies of the tree as pip does, with and without compilers; checks the rules of csrc."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from progtuning_kernels.cli import cuda_toolkit, doctor

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("*.cu"))
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++")
COMPILERS, BINUTILS = ("gcc", "g++", "cc", "c++"), ("as", "ld")
PIP_WHEEL = "wheel -v --no-build-isolation --no-deps --no-index -w dist ."

needs_cxx = pytest.mark.skipif(CXX is None, reason="no g++")
needs_nvcc = pytest.mark.skipif(NVCC is None or CXX is None, reason="no nvcc")


def copy_tree(to: Path) -> Path:
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, to)
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "progtuning_kernels"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    (to / "README.md").touch()
    # what this machine has besides is found by tests of find_toolkit alone
    with (to / "progtuning_kernels" / "cli" / "cuda_toolkit.py").open("a") as file:
        file.write(ONLY_NAMED_NVCC)
    return to


def environment(path: str, **changes: str) -> dict[str, str]:
    ours = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "PROGTUNING_BUILD")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PATH": path, **changes}


ONLY_NAMED_NVCC = """

_everywhere = _places


def _places():
    return {nvcc: named_by for nvcc, named_by in _everywhere().items() if named_by}
"""
# Nothing that is asked of a wheel here depends on how well its host code is optimised.
HASTY_COMPILER = """#!/bin/sh
exec {compiler} "$@" -O0
"""
# In the place of nvcc: writes down what ptxas says of every kernel.
RECORDING_NVCC = """#!{python}
import os, subprocess, sys

arguments, environment = sys.argv[1:], {{**os.environ, "PATH": {path!r}}}
if "-c" not in arguments:
    os.execve({nvcc!r}, [{nvcc!r}, *arguments], environment)
command = [{nvcc!r}, *arguments, "-Xptxas", "-v"]
done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
source = os.path.basename(arguments[arguments.index("-c") + 1])
with open({reports!r} + "/" + source, "w") as file:
    file.write(done.stderr)
sys.exit(done.returncode)
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Wheel:
    """A wheel under construction; the properties wait for it."""

    def __init__(self, tree: Path, env: dict[str, str]) -> None:
        self.tree, self._log = tree, (tree / "log").open("w+")
        command = [sys.executable, "-m", "pip", *PIP_WHEEL.split()]
        self._process = subprocess.Popen(
            command, cwd=tree, env=env, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def log(self) -> str:
        self._process.wait()
        return (self.tree / "log").read_text()

    @property
    def file(self) -> Path:
        assert self._process.wait() == 0, self.log
        (wheel,) = (self.tree / "dist").glob("*.whl")
        return wheel

    @property
    def tag(self) -> str:
        return self.file.stem.split("-", 2)[2]

    @property
    def package(self) -> Path:
        """The unpacked wheel's package."""
        zipfile.ZipFile(self.file).extractall(self.tree / "unpacked")
        return self.tree / "unpacked" / "progtuning_kernels"

    @property
    def record(self) -> dict:
        return json.loads((self.package / "_build.json").read_text())

    @property
    def extensions(self) -> list[Path]:
        return list(self.package.glob("_C.*"))

    def run(self, code: str) -> str:
        """Output of `code` in a fresh process that finds `_C` in the wheel, and not torch."""
        code = f"import sys; sys.path.insert(0, {str(self.package)!r}); import _C; {code}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.tree)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


class Wheels(NamedTuple):
    by_tools: dict[str, Wheel]
    reports: Path  # of RECORDING_NVCC, by name of the source


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Wheels:
    """All wheels, built side by side: most of a build is one compiler on one core."""
    folder = tmp_path_factory.mktemp("build")
    compilers, nvcc, reports = (folder / name for name in ("compilers", "nvcc/bin", "reports"))
    for path in (compilers, nvcc, reports):
        path.mkdir(parents=True)
    for tool in filter(shutil.which, COMPILERS):
        write_program(compilers / tool, HASTY_COMPILER.format(compiler=shutil.which(tool)))
    for tool in filter(shutil.which, BINUTILS):
        (compilers / tool).symlink_to(shutil.which(tool))
    empty = folder / "empty"
    empty.mkdir()
    nothing = environment(str(empty), CC="/nonexistent/cc", CXX="/nonexistent/c++")
    started = {"no compiler": Wheel(copy_tree(folder / "none"), nothing)}
    if CXX:
        cpu = environment(str(compilers))
        started["no nvcc"] = Wheel(copy_tree(folder / "cpu"), cpu)
    if CXX and NVCC:
        path = os.environ["PATH"]
        places = {"python": sys.executable, "nvcc": NVCC, "path": path, "reports": str(reports)}
        write_program(nvcc / "nvcc", RECORDING_NVCC.format(**places))
        tools = os.pathsep.join([str(compilers), path])
        cuda = environment(tools, CUDA_HOME=str(nvcc.parent))
        started["nvcc"] = Wheel(copy_tree(folder / "cuda"), cuda)
    return Wheels(started, reports)


@pytest.fixture
def wheels(built) -> dict[str, Wheel]:
    return built.by_tools


def test_without_a_compiler_the_wheel_says_why(wheels):
    wheel = wheels["no compiler"]
    assert wheel.extensions == [] and wheel.tag == "py3-none-any"
    assert wheel.record["native"] is False and wheel.record["cuda"] is False
    assert "/nonexistent/c++" in wheel.record["reason"]
    assert wheel.record["cuda_reason"] == "nvcc not found"
    told = [line for line in wheel.log.splitlines() if "without the native extension" in line]
    assert len(told) == 1 and wheel.record["reason"] in told[0]


@needs_cxx
def test_without_nvcc_the_extension_is_for_the_cpu(wheels):
    wheel = wheels["no nvcc"]
    assert len(wheel.extensions) == 1 and wheel.tag.startswith(f"cp3{sys.version_info.minor}-")
    assert wheel.record["native"] is True and wheel.record["reason"] == ""
    assert wheel.record["cuda"] is False and wheel.record["cuda_reason"] == "nvcc not found"
    code = "print(_C.cuda_built, _C.cuda_device_count(), hasattr(_C, 'masked_norm_cuda'))"
    assert wheel.run(code) == "False 0 False"
    assert wheel.run("print(_C.openmp)") == str(wheel.record["openmp"])


@needs_nvcc
def test_with_nvcc_the_kernels_are_in_and_import_needs_no_driver(wheels):
    wheel = wheels["nvcc"]
    assert wheel.record["native"] is True and wheel.record["cuda"] is True
    archs = wheel.record["cuda_archs"].split()
    assert {"sm_80", "sm_90"} <= set(archs) and "compute_80" in archs
    assert wheel.run("print(_C.cuda_built, _C.cuda_archs)") == f"True {' '.join(archs)}"
    (library,) = wheel.extensions
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "cudart" not in needed and "libcuda.so" not in needed
    if not torch.cuda.is_available():
        code = "\ntry: _C.cuda_device_count()\nexcept RuntimeError as error: print(error)"
        assert wheel.run(code).startswith("cuda_device_count: ")


def build_hook(tree: Path, hook: str, **env: str) -> subprocess.CompletedProcess:
    code = f"from setuptools import build_meta; build_meta.{hook}('dist')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment(os.environ["PATH"], **env),
        capture_output=True,
        text=True,
    )


def test_an_editable_build_replaces_what_an_earlier_one_left(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    package = tree / "progtuning_kernels"
    (package / "_C.stale.so").touch()
    (package / "_build.json").write_text('{"native": true}')
    done = build_hook(tree, "build_editable", PROGTUNING_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert list(package.glob("_C.*")) == []
    record = json.loads((package / "_build.json").read_text())
    assert record["native"] is False and record["reason"].startswith("PROGTUNING_BUILD=off")
    assert "building without the native extension: PROGTUNING_BUILD=off" in done.stdout


def test_the_source_archive_has_what_a_wheel_needs_and_no_build(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "progtuning_kernels" / "_C.stale.so").touch()
    (tree / "progtuning_kernels" / "_build.json").write_text("{}")
    assert build_hook(tree, "build_sdist").returncode == 0
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    sources = {path.name for path in (unpacked / "csrc").iterdir()}
    assert sources == {path.name for path in CSRC.iterdir()}
    assert not list(unpacked.rglob("*.so")) and not list(unpacked.rglob("_build.json"))

    assert build_hook(unpacked, "build_wheel", PROGTUNING_BUILD="off").returncode == 0
    (wheel,) = (unpacked / "dist").glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if name.startswith("progtuning_kernels/")}
        record = json.loads(content.read("progtuning_kernels/_build.json"))
    package = tree / "progtuning_kernels"
    needed = {path for path in package.rglob("*.*") if path.suffix not in (".md", ".so")}
    assert names == {path.relative_to(tree).as_posix() for path in needed}
    assert record["native"] is False and "the wheel for macOS and Windows" in record["reason"]


def test_a_misspelt_build_mode_is_an_error(tmp_path):
    done = build_hook(copy_tree(tmp_path / "tree"), "build_wheel", PROGTUNING_BUILD="gpu")
    assert done.returncode != 0
    assert "PROGTUNING_BUILD must be auto, cpu or off, not 'gpu'" in done.stderr


def test_nvcc_named_by_cuda_home_must_exist(tmp_path):
    done = build_hook(
        copy_tree(tmp_path / "tree"),
        "build_wheel",
        CUDA_HOME="/nonexistent",
        CXX="/nonexistent/c++",
        CC="/nonexistent/cc",
    )
    assert done.returncode == 0, done.stderr
    assert "building for the CPU only: no nvcc in CUDA_HOME=/nonexistent" in done.stdout


FAKE_NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
--dryrun) echo "#$ TOP={home}" ;;
esac
"""


def fake_toolkit(home: Path, version: str = "13.0", library: str = "lib") -> str:
    """A CUDA toolkit that says which one it is, and compiles nothing; its nvcc."""
    (home / "bin").mkdir(parents=True)
    (home / library).mkdir()
    (home / library / "libcudart_static.a").touch()
    write_program(home / "bin" / "nvcc", FAKE_NVCC.format(version=version, home=home))
    return str(home / "bin" / "nvcc")


@pytest.fixture
def homes(tmp_path, monkeypatch) -> dict[str, Path]:
    """Where nvcc is looked for, in order: folders that are not there yet."""
    names = ("CUDA_HOME", "CUDA_PATH", "usual", "sys.prefix", "VIRTUAL_ENV", "base", "PATH")
    found = {name: tmp_path / name for name in names}
    for name in ("CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, str(found[name]))
    monkeypatch.setenv("PATH", str(found["PATH"] / "bin"))
    monkeypatch.setattr(cuda_toolkit, "USUAL_HOME", str(found["usual"]))
    monkeypatch.setattr(sys, "prefix", str(found["sys.prefix"]))
    monkeypatch.setattr(sys, "base_prefix", str(found["base"]))
    packages = Path("lib", f"python3.{sys.version_info.minor}", "site-packages")
    for name in ("sys.prefix", "VIRTUAL_ENV", "base"):
        found[name] = found[name] / packages / "nvidia" / "cu13"
    return found


def test_nvcc_is_looked_for_in_this_order(homes):
    toolkits = {name: fake_toolkit(home) for name, home in homes.items()}
    for nvcc in toolkits.values():
        found = cuda_toolkit.find_toolkit()
        assert found.nvcc == nvcc
        assert found.cudart == str(Path(found.home, "lib", "libcudart_static.a"))
        Path(nvcc).chmod(0o644)  # there, and not executable: it is passed over
    with pytest.raises(cuda_toolkit.Unavailable, match=r"^no nvcc in CUDA_HOME=.*; no nvcc in CU"):
        cuda_toolkit.find_toolkit()


def test_the_next_nvcc_is_taken_where_one_does_not_do(homes, monkeypatch):
    old = fake_toolkit(homes["CUDA_PATH"], "11.8")
    broken = fake_toolkit(homes["usual"])
    write_program(Path(broken), "#!/bin/sh\necho out of licences\nexit 1\n")
    partial = fake_toolkit(homes["sys.prefix"], library="other")
    with pytest.raises(cuda_toolkit.Unavailable) as none:
        cuda_toolkit.find_toolkit()
    reasons = [f"no nvcc in CUDA_HOME={homes['CUDA_HOME']}", f"{old} is 11.8, older than 12.1"]
    reasons += ["nvcc failed: out of licences", f"{partial} has no libcudart_static.a"]
    assert str(none.value) == "; ".join(reasons)
    newest = fake_toolkit(homes["sys.prefix"].with_name("cu14"), "14.0")
    assert cuda_toolkit.find_toolkit().nvcc == newest
    monkeypatch.delenv("CUDA_HOME")
    shutil.rmtree(homes["CUDA_PATH"])
    monkeypatch.delenv("CUDA_PATH")
    shutil.rmtree(homes["usual"])
    shutil.rmtree(homes["sys.prefix"].parent)
    with pytest.raises(cuda_toolkit.Unavailable, match="^nvcc not found$"):
        cuda_toolkit.find_toolkit()


def test_doctor_prints_the_command_that_rebuilds(homes):
    without = doctor._rebuild()
    assert without.startswith("no nvcc in CUDA_HOME=") and "nvidia-cuda-nvcc==13.0.*" in without
    fake_toolkit(homes["PATH"])
    command = f"`CUDA_HOME={homes['PATH']} pip install --force-reinstall --no-deps "
    assert doctor._rebuild().startswith(command)


def launches(source: str) -> list[list[str]]:
    """The launch arguments of every `<<<...>>>`, split at top-level commas."""
    code = re.sub(r"//[^\n]*", "", source)
    found = []
    for inside in re.findall(r"<<<(.*?)>>>", code, re.DOTALL):
        depth, arguments = 0, [""]
        for character in inside:
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                arguments.append("")
            else:
                arguments[-1] += character
        found.append([argument.strip() for argument in arguments])
    return found


def test_every_launch_names_its_stream():
    assert launches("k<<<dim3(a, b), 2>>>(x); // j<<<1>>>") == [["dim3(a, b)", "2"]]
    found = [arguments for path in KERNELS for arguments in launches(path.read_text())]
    assert len(found) >= 2
    for arguments in found:
        assert len(arguments) == 4 and arguments[3] == "stream", arguments


def test_every_cuda_launcher_takes_its_stream_last_and_has_no_default():
    declarations = re.findall(r"int (\w+_cuda)\(([^)]*)\)", (CSRC / "launchers.h").read_text())
    assert declarations
    for name, parameters in declarations:
        if name == "masked_update_slots_cuda":  # it asks the driver, and launches nothing
            continue
        assert parameters.split(",")[-1].split() == ["void*", "stream"], name
        assert "=" not in parameters


@pytest.fixture
def compiled(built) -> dict[str, str]:
    """ptxas's report of every .cu, as the wheel's build compiles it."""
    assert built.by_tools["nvcc"].record["cuda"]
    return {source.name: (built.reports / source.name).read_text() for source in KERNELS}


def entry_functions(report: str) -> list[tuple[str, str]]:
    """The name and the architecture of each kernel, once per template argument."""
    return re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_keep_everything_in_registers(source, compiled):
    report = compiled[source.name]
    used = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    entries = entry_functions(report)
    kernels = source.read_text().count("__global__")
    archs = {arch for _, arch in entries}
    assert len(used) >= len(entries) >= kernels * len(archs)
    assert kernels == 0 or {"sm_80", "sm_90"} <= archs
    assert all(numbers == ("0", "0", "0") for numbers in used), report
    assert " lmem" not in report


@needs_nvcc
def test_kernels_stay_few(compiled):
    """41 of them, for four architectures, took 62 s of one core."""
    per_arch = Counter(arch for report in compiled.values() for _, arch in entry_functions(report))
    assert 0 < max(per_arch.values()) <= 48, per_arch
