"""What every kernel takes of a multiprocessor: registers, shared memory, spills; no GPU is needed.

    python benchmarks/kernel_resources.py            # compile for eight architectures, 4 minutes
    python benchmarks/kernel_resources.py --table    # the table of docs/tables/kernels.md

A Triton kernel is compiled ahead of time as its op launches it: the ops run forward and backward on
small tensors on the CPU, every launch is recorded instead of made, and its arguments are
specialised as Triton does it, so block sizes, warps and constants are the ops' own. CUDA kernels
are read from the extension if it was built with CUDA, else compiled with setup.py's flags.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.progress import track
from stored_results import store
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from triton_builds import WAVES, compile_for, resources, rocm_resources, usage

from progtuning_kernels import backend, ops
from progtuning_kernels.cli.cuda_toolkit import Unavailable, find_toolkit
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.ops.masked_update.bucket import Bucket, Moments

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compiled" / "kernel_resources.json"
ARCHITECTURES = (80, 90, 100, 120)
WIDTHS = (768, 2048, 4096, 8192)  # of norms, whose rows lie in registers
ROWS, CLASSES, EPS = 32, 128_256, 1e-6
# bytes of shared memory that are the system's from sm_90 on, and reported with ours
RESERVED = 1024
KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what Triton would compile it for; see `compile_for`.

    Args:
        variant, width: what ran it. width: of a norm; else None.
        programs: of the grid. arguments: with their values, by name.
    """

    kernel: Any
    variant: str
    width: int | None
    kinds: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]
    programs: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        module = self.kernel.fn.__module__.removesuffix(".triton").rpartition(".")[2]
        return f"{module}.{self.kernel.fn.__name__}"

    def same_code(self) -> str:
        """Equal where Triton would compile once."""
        parts = (self.kinds, self.constants, self.divisible, self.options)
        return f"{self.name} {parts}"


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, tuple[str, ...]]:
    """Kinds, constants and divisible integers of a launch, by Triton's rules.

    1 and None are constants, multiples of 16 are known as such; neither where the kernel says
    do_not_specialize. Addresses are multiples of 16, as the caching allocator gives them.
    """
    kinds, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        fixed = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and fixed)
        ):
            constants[name] = value
        elif isinstance(value, Tensor):
            kinds[name] = KINDS[value.dtype]
        elif isinstance(value, int):
            kinds[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if fixed and value % 16 == 0:
                divisible.append(name)
        else:
            kinds[name] = "fp32"
    return kinds, constants, tuple(divisible)


@contextmanager
def recording(variant: str, width: int | None) -> Iterator[list[Launch]]:
    """Triton's implementations run on the CPU, and their launches are put into the list."""
    from triton.runtime.jit import JITFunction

    from progtuning_kernels.ops import kept_launches

    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
        of_kernel = {k: v for k, v in keywords.items() if k in kernel.arg_names}
        bound = kernel.signature.bind(*arguments, **of_kernel).arguments
        programs = math.prod(grid) if isinstance(grid, (tuple, list)) else grid
        made = specialised(kernel, bound)
        launches.append(Launch(kernel, variant, width, *made, options, programs, bound))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(kept_launches, "_KNOWN_TRITON", False),
        mock.patch.object(backend, "triton_reason", return_value=None),
    ):
        yield launches


def _run(function: Callable[..., Any], **tensors: Tensor) -> None:
    """Forward, and backward where a tensor demands it, with gradients that have no gaps."""
    results = function(**tensors)
    results = [y for y in (results if isinstance(results, tuple) else [results]) if y.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.ones_like(y) for y in results])


def _tensors(demanded: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict:
    return {
        name: torch.zeros(shape, dtype=dtype).requires_grad_(name in demanded.split())
        for name, shape in shapes.items()
    }


def _norms() -> Iterator[tuple[str, int, Callable[[], None]]]:
    parameters = "weight bias"

    def layer_norm(x, weight, bias, **keywords):
        return ops.layer_norm(x, weight, bias, EPS, implementation="triton", **keywords)

    def rms_norm(x, weight, **keywords):
        return ops.rms_norm(x, weight, EPS, implementation="triton", **keywords)

    def pre_norm(x, weight, residual):
        return rms_norm(x, weight, residual=residual, return_sum=True)

    def gemma(x, weight):
        return rms_norm(x, weight, offset=1.0, cast="after_weight")

    def with_dropout(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual, dropout=0.1)

    def sum_alone(x, weight, bias, residual):
        keywords = dict(residual=residual, dropout=0.1, return_sum=True)
        return layer_norm(x, weight, bias, **keywords)[1]

    for width in WIDTHS:
        rows, columns = (ROWS, width), (width,)
        of_layer_norm = {"x": rows, "weight": columns, "bias": columns}
        of_rms_norm = {"x": rows, "weight": columns}
        post_norm, added = of_layer_norm | {"residual": rows}, of_rms_norm | {"residual": rows}
        every = f"x {parameters}"
        cases = [
            ("layer_norm, nothing demanded", layer_norm, "", of_layer_norm),
            ("layer_norm, all", layer_norm, every, of_layer_norm),
            ("layer_norm, dx", layer_norm, "x", of_layer_norm),
            ("layer_norm, dweight and dbias", layer_norm, parameters, of_layer_norm),
            ("layer_norm of x + residual, all", layer_norm, every, post_norm),
            ("layer_norm with dropout, all", with_dropout, f"residual {every}", post_norm),
            ("layer_norm with dropout, dx", with_dropout, "x residual", post_norm),
            ("layer_norm with dropout, its sum alone", sum_alone, "x residual", post_norm),
            ("layer_norm, float32, all", layer_norm, every, of_layer_norm),
            ("rms_norm, all", rms_norm, "x weight", of_rms_norm),
            ("rms_norm, dx", rms_norm, "x", of_rms_norm),
            ("rms_norm of x + residual and the sum, all", pre_norm, "x weight", added),
            ("rms_norm of x + residual and the sum, dx", pre_norm, "x", added),
            ("rms_norm of Gemma, all", gemma, "x weight", of_rms_norm),
        ]
        for variant, function, demanded, shapes in cases:
            dtype = torch.float32 if "float32" in variant else torch.bfloat16
            tensors = _tensors(demanded, shapes, dtype)
            yield variant, width, lambda f=function, t=tensors: _run(f, **t)


def _activations() -> Iterator[tuple[str, None, Callable[[], None]]]:
    shape, forced = (ROWS, 4096), dict(implementation="triton")
    both = {"gate": shape, "up": shape}

    def activation(name: str, **options: Any) -> Callable[..., Tensor]:
        return lambda **tensors: getattr(ops, name)(**tensors, **options, **forced)

    cases = [
        ("gelu, dx", activation("gelu"), "x", {"x": shape}),
        ("gelu, tanh, dx", activation("gelu", approximate="tanh"), "x", {"x": shape}),
        ("bias_gelu, all", activation("bias_gelu"), "x bias", {"x": shape, "bias": shape[1:]}),
        ("bias_gelu, dbias", activation("bias_gelu"), "bias", {"x": shape, "bias": shape[1:]}),
        ("swiglu, all", activation("swiglu"), "gate up", both),
        ("swiglu of Falcon-H1, all", activation("swiglu", gate_multiplier=0.7), "gate up", both),
        ("swiglu, dgate", activation("swiglu"), "gate", both),
        ("swiglu, dup", activation("swiglu"), "up", both),
        ("geglu, tanh, all", activation("geglu", approximate="tanh"), "gate up", both),
    ]
    for variant, function, demanded, shapes in cases:
        tensors = _tensors(demanded, shapes, torch.bfloat16)
        yield variant, None, lambda f=function, t=tensors: _run(f, **t)


def _losses() -> Iterator[tuple[str, None, Callable[[], None]]]:
    everything = dict(label_smoothing=0.1, softcap=30.0, z_loss=1e-4)
    everything["class_weight"] = torch.ones(CLASSES)
    returned = dict(z_loss=1e-4, return_z_loss=True, return_token_accuracy=True)
    cases = [
        ("loss alone", torch.bfloat16, "", {}),
        ("loss and gradients", torch.bfloat16, "hidden", {}),
        ("with smoothing, softcap, z-loss, class weights", torch.bfloat16, "hidden", everything),
        ("the same, float32", torch.float32, "hidden", everything),
        ("z-loss and accuracy returned", torch.bfloat16, "hidden", returned),
    ]
    for variant, dtype, demanded, options in cases:
        tensors = _tensors(demanded, {"hidden": (2, 16), "weight": (CLASSES, 16)}, dtype)
        tensors["labels"] = torch.zeros(2, dtype=torch.int64)

        def loss(o=options, **tensors):
            found = ops.linear_cross_entropy(**tensors, **o, implementation="triton")
            return found if isinstance(found, Tensor) else found.loss

        yield variant, None, lambda f=loss, t=tensors: _run(f, **t)


def _updates() -> Iterator[tuple[str, None, Callable[[], None]]]:
    float32, low = torch.float32, torch.bfloat16
    cases = [  # parameters, moments, master
        ("float32 parameters, float32 moments", float32, float32, False),
        ("float32 parameters, bfloat16 moments", float32, low, False),
        ("float32 parameters, 8-bit moments", float32, torch.int8, False),
        ("bfloat16 parameters, float32 moments", low, float32, False),
        ("bfloat16 parameters, bfloat16 moments", low, low, False),
        ("bfloat16 parameters, 8-bit moments", low, torch.int8, False),
        ("bfloat16 parameters with master, float32 moments", low, float32, True),
    ]
    for variant, dtype, moments, master in cases:
        rounded = dtype == low and not master
        if rounded:
            variant += ", rounded stochastically"

        def update(dtype=dtype, moments=moments, master=master, rounded=rounded):
            p, grad, copy = torch.zeros(512, dtype=dtype), torch.zeros(512, dtype=dtype), None
            states = [torch.zeros(512, dtype=moments) for _ in range(2)]
            scales: list[Any] = [None, None]
            if moments == torch.int8:
                states[1] = states[1].to(torch.uint8)
                scales = [[torch.ones(2)], [torch.ones(2)]]
            if master:
                copy = [torch.zeros(512)]
            ops.masked_update(
                *([p], [grad], [states[0]], [states[1]], [torch.zeros(())]),
                **dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
                **dict(exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1], masters=copy),
                **dict(stochastic_rounding=rounded, implementation="triton"),
            )

        yield variant, None, update


def _gradient_norms() -> Iterator[tuple[str, None, Callable[[], None]]]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")

        def norm(dtype=dtype):
            ops.masked_norm([torch.zeros(512, dtype=dtype)], implementation="triton")

        def decision(dtype=dtype):
            p, grad = torch.zeros(512, dtype=dtype), torch.zeros(512, dtype=dtype)
            moments = Moments(torch.zeros(512), torch.zeros(512))
            bucket = Bucket([p], [moments], [torch.zeros(())], implementation="triton")
            bucket.implementation.decide(
                *([bucket], [bucket.gather([grad])]),
                **dict(max_grad_norm=1.0, skip_nonfinite=True, grad_scale=torch.ones(())),
                **dict(found_inf=torch.zeros(()), control=torch.zeros(4)),
            )

        yield f"a list of {name} tensors", None, norm
        yield f"clipping of {name} gradients, with GradScaler", None, decision


def launches() -> list[Launch]:
    """All that differ in code, under the first variant that makes them."""
    found: dict[str, Launch] = {}
    for cases in (_norms(), _activations(), _losses(), _updates(), _gradient_norms()):
        for variant, width, run in cases:
            with recording(variant, width) as made:
                run()
            for launch in made:
                found.setdefault(launch.same_code(), launch)
    return list(found.values())


def triton_rows(chosen: list[Launch], folder: Path) -> list[dict[str, Any]]:
    rows = []
    for launch in track(chosen, description="Triton"):
        targets = {}
        for architecture in ARCHITECTURES:
            compiled = compile_for(
                *(launch.kernel, launch.kinds, launch.constants, architecture, launch.options),
                divisible=launch.divisible,
            )
            used = resources(compiled, folder)
            if not used:
                raise SystemExit("cuobjdump is neither in PATH nor in triton's package")
            # asked for at the launch, and so not in the cubin
            targets[f"sm_{architecture}"] = _named(used, compiled.metadata.shared)
        rocm = {
            architecture: rocm_resources(
                compile_for(
                    *(launch.kernel, launch.kinds, launch.constants, architecture, launch.options),
                    divisible=launch.divisible,
                )
            )
            for architecture in WAVES
        }
        row = {"kernel": launch.name, "variant": launch.variant, "width": launch.width}
        rows.append(row | {"warps": launch.options["num_warps"], "targets": targets, "rocm": rocm})
    return rows


def _named(used: dict[str, int], shared_bytes: int) -> dict[str, int]:
    return {
        "registers": used["REG"],
        "shared_bytes": shared_bytes,
        "stack_bytes": used["STACK"],
        "local_bytes": used["LOCAL"],
    }


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines()


def _cuda_binaries(folder: Path) -> Iterator[Path]:
    """What the kernels can be read from."""
    if (extension := backend.native_extension()) is not None and extension.cuda_built:
        yield Path(extension.__file__)
        return
    with mock.patch("setuptools.setup"):
        build = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = build["find_toolkit"]().nvcc
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [a for a in build["CUDA_ARCHS"] if f"compute_{a}\n" in known]
    flags = [*build["CUDA_FLAGS"], *build["cuda_targets"](archs)]
    for source in track(sorted((ROOT / "csrc").glob("*.cu")), description="CUDA"):
        target = folder / f"{source.name}.o"
        subprocess.run([nvcc, *flags, "-c", source, "-o", target], check=True)
        yield target


class CudaKernel(NamedTuple):
    """An instantiation for one architecture.

    Attributes:
        key: in `binary`, as `triton_builds.usage` has it.
    """

    binary: Path
    key: str
    kernel: str
    variant: str
    target: str
    used: dict[str, int]


def cuda_kernels(folder: Path) -> Iterator[CudaKernel]:
    for binary in _cuda_binaries(folder):
        used = usage(binary)
        plain = _demangled([key.rpartition("@")[0] for key in used])
        for key, name, counts in zip(used, plain, used.values(), strict=True):
            # of "void space::kernel<A, 448>(...)" the kernel, and what it is instantiated for
            short = re.sub(r"\(anonymous namespace\)::|progtuning::|^void ", "", name)
            kernel, _, rest = short.partition("(")[0].partition("<")
            target, shared = key.rpartition("@")[2], counts["SHARED"]
            if int(target.removeprefix("sm_")) >= 90:
                shared = max(0, shared - RESERVED)
            variant = rest.removesuffix(">")
            yield CudaKernel(binary, key, kernel, variant, target, _named(counts, shared))


def cuda_rows(folder: Path) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for found in cuda_kernels(folder):
        row = {"kernel": found.kernel, "variant": found.variant, "targets": {}}
        of_kernel = rows.setdefault((found.kernel, found.variant), row)
        of_kernel["targets"][found.target] = found.used
    return [rows[key] for key in sorted(rows)]


def nvcc_version() -> str | None:
    try:
        nvcc = find_toolkit().nvcc
    except Unavailable:
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return (re.search(r"release [\d.]+, V([\d.]+)", printed) or [None, None])[1]


def _numbers(values: list[int]) -> str:
    return " / ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def table(content: dict[str, Any]) -> str:
    """Markdown of a stored kernel_resources.json."""
    targets = [f"sm_{architecture}" for architecture in ARCHITECTURES]
    widths = " / ".join(map(str, WIDTHS))
    rows = [*content["triton"], *content["cuda"]]
    counts = [used for row in rows for used in row["targets"].values()]
    spilt = sum(used["stack_bytes"] + used["local_bytes"] for used in counts)
    lines = [
        f"Registers per thread, with {spilt} bytes of stack and spills in all {len(counts)} "
        f"compiled kernels. Four numbers: rows of {widths} elements.",
        "",
        f"| Triton kernel | launched by | warps | {' | '.join(targets)} | shared bytes |",
        f"|---|---|---:|{'---:|' * len(targets)}---:|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["triton"]:
        groups.setdefault((row["kernel"], row["variant"]), []).append(row)
    for (kernel, variant), group in groups.items():
        cells = [_numbers([row["warps"] for row in group])]
        cells += [_numbers([row["targets"][t]["registers"] for row in group]) for t in targets]
        shared = [max(used["shared_bytes"] for used in row["targets"].values()) for row in group]
        lines.append(f"| `{kernel}` | {variant} | {' | '.join(cells)} | {_numbers(shared)} |")
    rocm = [used for row in content["triton"] for used in row["rocm"].values()]
    scratch, spilt = (sum(used[k] for used in rocm) for k in ("scratch_bytes", "spilt_registers"))
    lines += [
        "",
        f"For AMD, with {scratch} bytes of scratch memory and {spilt} spilt registers in all "
        f"{len(rocm)} compiled kernels; vector registers per thread.",
        "",
        f"| Triton kernel | launched by | warps | {' | '.join(WAVES)} | shared bytes |",
        f"|---|---|---:|{'---:|' * len(WAVES)}---:|",
    ]
    for (kernel, variant), group in groups.items():
        cells = [_numbers([row["warps"] for row in group])]
        cells += [_numbers([row["rocm"][gpu]["registers"] for row in group]) for gpu in WAVES]
        shared = [max(used["shared_bytes"] for used in row["rocm"].values()) for row in group]
        lines.append(f"| `{kernel}` | {variant} | {' | '.join(cells)} | {_numbers(shared)} |")
    lines += ["", f"| CUDA kernel | instantiations | {' | '.join(targets)} | shared bytes |"]
    lines.append(f"|---|---:|{'---:|' * len(targets)}---:|")
    groups = {}
    for row in content["cuda"]:
        groups.setdefault((row["kernel"], ""), []).append(row)
    for (kernel, _), group in groups.items():
        cells = [str(len(group))]
        cells += [_range([row["targets"][t]["registers"] for row in group]) for t in targets]
        used = [u["shared_bytes"] for row in group for u in row["targets"].values()]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {_range(used)} |")
    versions = content["meta"]["versions"]
    commit = (content["meta"]["commit"] or "no commit")[:9]
    changed = " with changes" if content["meta"]["dirty"] else ""
    nvcc = content["meta"]["nvcc"]
    lines += ["", f"Commit {commit}{changed}, Triton {versions['triton']}, nvcc {nvcc}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored table and stop")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.output.read_text())))
        return
    content: dict[str, Any] = {"meta": provenance(None) | {"nvcc": nvcc_version()}}
    with tempfile.TemporaryDirectory() as folder:
        content["triton"] = triton_rows(launches(), Path(folder))
        content["cuda"] = cuda_rows(Path(folder))
    store(content, arguments.output)
    print(table(content))


if __name__ == "__main__":
    main()
