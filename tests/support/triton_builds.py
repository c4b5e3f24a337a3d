"""Triton without a GPU, for its kernels' tests: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

# all four take 14 s, these two 7; .github/workflows/nightly.yml compiles for them
ARCHITECTURES = [80, 90, 100, 120] if os.environ.get("EVERY_ARCHITECTURE") else [80, 100]
WAVES = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32}  # threads that run as one


def compile_for(
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    architecture: int | str,
    options: dict[str, Any],
    *,
    divisible: Collection[str] = (),
) -> Any:
    """A kernel for one architecture, specialised as at a launch.

    Args:
        kinds: of the arguments that are no constants, "*fp32", "i32", ...
        architecture: 90 is sm_90; one of `WAVES` is a GPU of AMD.
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
    target = GPUTarget("cuda", architecture, 32)
    if architecture in WAVES:
        target = GPUTarget("hip", architecture, WAVES[architecture])
        # ptxas's alone: under ROCm's torch no launch has it
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    return triton.compile(source, target=target, options=options)


def find_cuobjdump() -> str | None:
    """In PATH, or else the one that Triton brings."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


def usage(path: Path) -> dict[str, dict[str, int]]:
    """By mangled function and architecture ("f@sm_90"), what a cubin, object or library has.

    Registers ("REG"), stack, static shared and local memory; empty without cuobjdump.
    """
    if (tool := find_cuobjdump()) is None:
        return {}
    command = [tool, "-res-usage", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture = {}, ""
    for line in printed.splitlines():
        if named := re.search(r"arch = (sm_\w+)", line):
            architecture = named[1]
        elif named := re.search(r"Function (\S+):", line):
            function = f"{named[1]}@{architecture}"
        elif counts := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line):
            found[function] = {name: int(count) for name, count in counts}
    return found


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """`usage` of a compiled kernel of Triton."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    return next(iter(usage(path).values()), {})


def rocm_resources(kernel: Any) -> dict[str, int]:
    """What a kernel of Triton that is compiled for AMD takes, from its assembly's metadata.

    Vector registers, accumulation registers among them; bytes of scratch memory per thread, where
    spilt registers lie; and how many of both kinds of registers are spilt.
    """
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    found = dict(re.findall(rf"\.({names}):\s+(\d+)", kernel.asm["amdgcn"]))
    return {
        "registers": int(found["vgpr_count"]),
        "shared_bytes": kernel.metadata.shared,
        "scratch_bytes": int(found["private_segment_fixed_size"]),
        "spilt_registers": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
    }
