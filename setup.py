"""Builds `progtuning_kernels._C` from csrc: host compiler, nvcc if there is one, never torch.

A machine that cannot build it gets a working install without it: the reason is printed in one line
and kept in `progtuning_kernels/_build.json`, where `progtuning doctor` finds it.

Environment: PROGTUNING_BUILD=auto|cpu|off, CXX, CUDA_HOME (`cli/cuda_toolkit.py` says where else
nvcc is looked for).
"""

import functools
import json
import os
import re
import runpy
import shlex
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

NAME = "progtuning_kernels._C"
# No -ffast-math: linked into a shared object it may set flush-to-zero for the whole process. No
# contraction: fused multiply-adds would give the instruction sets different bits.
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
CXX_FLAGS += ["-fno-math-errno", "-ffp-contract=off"]
# --fmad=false for the same reason: the GPU then computes the bits that the CPU does.
CUDA_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-t", "0"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Cubins where nvcc knows the architecture (100 and 120 need 12.8); PTX of the oldest for the gaps.
# The cubins are made from that PTX too: in half the time, and masked_update then needs 64 registers
# on sm_100 and sm_120, where from their own PTX it needs 80.
CUDA_ARCHS = ["80", "90", "100", "120"]


# Which nvcc is found, `progtuning doctor` says too; importing it from the package needs torch.
HERE = Path(__file__).parent
TOOLKIT = runpy.run_path(str(HERE / "progtuning_kernels" / "cli" / "cuda_toolkit.py"))
find_toolkit, Unavailable = TOOLKIT["find_toolkit"], TOOLKIT["Unavailable"]
run = functools.partial(TOOLKIT["run"], on_failure=print)


def cuda_targets(archs):
    code = ",".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[0]}"])
    return ["-gencode", f"arch=compute_{archs[0]},code=[{code}]"]


def compile_cuda(build_temp):
    """Objects and libraries to link, and the architectures in them."""
    nvcc, cudart = find_toolkit()
    known = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise Unavailable(f"nvcc knows none of sm_{', sm_'.join(CUDA_ARCHS)}")
    flags = list(CUDA_FLAGS)
    host = shlex.split(os.environ.get("CXX", ""))
    if len(host) == 1:  # nvcc takes a program, not a command line such as "ccache g++"
        flags += ["-ccbin", host[0]]
    flags += cuda_targets(archs)
    objects = []
    Path(build_temp).mkdir(parents=True, exist_ok=True)
    for source in sorted(Path("csrc").glob("*.cu")):
        objects.append(str(Path(build_temp, source.name + ".o")))
        run([nvcc, *flags, "-c", str(source), "-o", objects[-1]])
    built = " ".join([f"sm_{arch}" for arch in archs] + [f"compute_{archs[0]}"])
    return [*objects, cudart], built


class BuildNative(build_ext):
    def run(self):
        self.force = True  # an up-to-date _C of another PROGTUNING_BUILD is not up to date
        self.record = {"native": False, "cuda": False, "openmp": False, "reason": ""}
        self.record |= {"cuda_reason": "", "cuda_archs": ""}
        super().run()
        places = [Path(self.build_lib)] + ([Path(".")] if self.inplace else [])
        for place in places:
            package = place / NAME.partition(".")[0]
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build.json").write_text(json.dumps(self.record, indent=2) + "\n")
            if not self.record["native"]:
                # One left by an earlier build would be imported as if this build had made it.
                for stale in package.glob("_C.*.so"):
                    stale.unlink()
        if not self.record["native"]:
            self.distribution.ext_modules = []

    def build_extension(self, ext):
        mode = os.environ.get("PROGTUNING_BUILD", "auto")
        if mode not in ("auto", "cpu", "off"):
            raise SystemExit(f"PROGTUNING_BUILD must be auto, cpu or off, not {mode!r}")
        try:
            if mode == "off":
                raise Unavailable("PROGTUNING_BUILD=off, as in the wheel for macOS and Windows")
            self.add_pybind11(ext)
            self.add_cuda(ext, mode)
            self.compile_and_link(ext)
            self.record["native"] = True
        except (Unavailable, CompileError, LinkError, PlatformError) as error:
            self.record |= {"cuda": False, "openmp": False, "cuda_archs": ""}
            self.record["reason"] = str(error)
            self.announce_reason("without the native extension", error)

    def add_pybind11(self, ext):
        try:
            import pybind11
        except ImportError as error:
            raise Unavailable("pybind11 is not installed") from error
        ext.include_dirs += ["csrc", pybind11.get_include()]

    def add_cuda(self, ext, mode):
        try:
            if mode == "cpu":
                raise Unavailable("PROGTUNING_BUILD=cpu")
            objects, archs = compile_cuda(self.build_temp)
        except Unavailable as error:
            self.record["cuda_reason"] = str(error)
            self.announce_reason("for the CPU only", error)
            return
        ext.extra_objects += objects
        ext.libraries += ["dl", "rt", "pthread"]
        ext.define_macros += [("PROGTUNING_CUDA", None), ("PROGTUNING_CUDA_ARCHS", f'"{archs}"')]
        self.record |= {"cuda": True, "cuda_archs": archs}

    def compile_and_link(self, ext):
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args = CXX_FLAGS + openmp
            ext.extra_link_args = openmp
            try:
                super().build_extension(ext)
                self.record["openmp"] = bool(openmp)
                return
            except (CompileError, LinkError):
                if not openmp:
                    raise

    def announce_reason(self, what, error):
        print(f"progtuning_kernels: building {what}: {error}", flush=True)


class Wheel(bdist_wheel):
    """Tagged py3-none-any where the build left the extension out: it then runs anywhere."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        self.skip_build = True  # done; installing into the wheel would compile a second time
        super().run()


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
