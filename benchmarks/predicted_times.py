"""What every kernel should take on five GPUs, from its instructions and bytes; no GPU is needed.

    python benchmarks/predicted_times.py             # compile, predict, store, print: 2 minutes
    python benchmarks/predicted_times.py --table     # the table of docs/tables/kernels.md
    python benchmarks/predicted_times.py --compare benchmarks/results/NAME-OF-THE-GPU

Predicted, not measured. `--compare` sets beside it what `kernels.py` and `optimizer.py` measured.

A kernel runs in waves: a multiprocessor holds as many blocks as its registers, shared memory and
threads allow. Of a wave of n blocks, k to a multiprocessor, the longest of these counts:

    memory        n * bytes of a block / (REACHED * bandwidth)
    instructions  k * instructions of a block / (REACHED * what a pipe takes per clock), the worst
                  pipe of `hot_path.PIPES`, or all of them against the issue slots
    latency       the clocks of one block's warp that has the multiprocessor to itself

All waves are full but the last, and the last may be as long as a full one: the tail. A kernel costs
LAUNCH_US on top, as in a CUDA graph. The time of the CPU that launches it is not counted.

Bytes are those of the tensors that a kernel gets, each once; the loss's logits three times, as a
row of them is read again, after those of other rows, and written; of an update those per parameter
in optimizer.py. Nothing is found in L2. A matmul of torch takes its FLOP at REACHED_TENSOR_CORES,
and then its result is written, and read if it is added to; another operation of torch moves its
tensors. Instructions, registers and shared memory are the cubin's (`hot_path.py`).

Per clock and multiprocessor 128 instructions of a thread are issued, of which at most 64 are
integer or logic, 16 special functions, 32 accesses to memory, and 128 float32 (64 on A100): CUDA
C++ Programming Guide, "Arithmetic Instructions". Multiprocessors, clocks at boost, bandwidth and
bfloat16 FLOP without sparsity: NVIDIA's data sheets and architecture white papers of A100 (80 GB,
SXM), H100 (SXM), H200 (SXM), Ada (RTX 4090) and Blackwell (HGX B200; its 148 multiprocessors and
1.97 GHz as the driver reports them). Threads, blocks and shared memory of a multiprocessor: the
guide's "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

import kernel_operations as kernels  # noqa: E402 - a script's folder, above
import kernel_resources  # noqa: E402 - as above
import kernel_timing  # noqa: E402 - as above
import optimizer  # noqa: E402 - as above
from ceilings import DTYPE_CODES, launches_kernel  # noqa: E402 - as above
from hot_path import Part, hot_path, listings  # noqa: E402 - as above
from stored_results import store  # noqa: E402 - as above
from triton_builds import compile_for, find_cuobjdump, resources  # noqa: E402 - as above

from progtuning_kernels import backend  # noqa: E402 - as above
from progtuning_kernels.cli.provenance import provenance  # noqa: E402 - as above
from progtuning_kernels.ops.linear_cross_entropy import chunks  # noqa: E402 - as above

RESULT = ROOT / "benchmarks" / "results" / "compiled" / "predicted_times.json"
REACHED = 0.9  # of bandwidth and issue slots: copies reach 0.88 to 0.93 of these bandwidths
REACHED_TENSOR_CORES = 0.65  # of bfloat16's, by cuBLAS: 650 of 989 TFLOP/s on an H100
LAUNCH_US = 1.0
PER_CLOCK = {"issue": 128, "alu": 64, "special": 16, "memory": 32}
REGISTERS, WARP = 65_536, 32


@dataclass(frozen=True)
class Device:
    """fma: float32 per clock and multiprocessor. threads, blocks: that a multiprocessor holds."""

    name: str
    architecture: int
    multiprocessors: int
    ghz: float
    gb_per_s: float
    tflop_per_s: float
    fma: int = 128
    threads: int = 2048
    blocks: int = 32
    shared_kib: int = 228

    @property
    def native(self) -> int:
        """Of the cubins that setup.py builds, the one that runs."""
        return max(a for a in kernel_resources.ARCHITECTURES if a <= self.architecture)


DEVICES = (
    Device("A100", 80, 108, 1.41, 2039, 312, fma=64, shared_kib=164),
    Device("H100", 90, 132, 1.98, 3350, 989),
    Device("H200", 90, 132, 1.98, 4800, 989),
    Device("RTX 4090", 89, 128, 2.52, 1008, 165, threads=1536, blocks=24, shared_kib=100),
    Device("B200", 100, 148, 1.97, 8000, 2250),
)


SHOWN = "H200"  # of which the times of each kernel are stored


@dataclass(frozen=True)
class Code:
    """A kernel for one architecture."""

    threads: int
    registers: int
    shared_bytes: int
    parts: tuple[Part, ...]

    def slots(self, device: Device) -> int:
        """Blocks that a multiprocessor holds; registers are given to warps by 256."""
        warps = self.threads // WARP
        by_registers = REGISTERS // (-(-self.registers * WARP // 256) * 256) // warps
        shared = self.shared_bytes + (1024 if device.architecture >= 80 else 0)  # the system's
        by_shared = device.shared_kib * 1024 // shared
        return min(by_registers, by_shared, device.threads // self.threads, device.blocks)


@dataclass(frozen=True)
class Kernel:
    """A launch. bytes: of device memory. loaded: bytes that a block loads, its loops included."""

    name: str
    code: Code
    blocks: int
    bytes: float
    loaded: float = 0.0

    @property
    def rounds(self) -> float:
        """Of each loop, by what a thread loads in it."""
        parts = self.code.parts
        in_loops = sum(part.loaded_bytes for part in parts if part.loops)
        outside = sum(part.loaded_bytes for part in parts if not part.loops)
        return max(0.0, self.loaded / self.code.threads - outside) / in_loops if in_loops else 0.0

    def predict(self, device: Device) -> dict[str, Any]:
        slots = self.code.slots(device)
        at_once = slots * device.multiprocessors
        full, rest = divmod(self.blocks, at_once)
        waves = [(full, at_once), (1, rest)] if rest else [(full, at_once)]
        found = [(count, *self._wave(n, device)) for count, n in waves if count]
        return {
            "kernel": self.name,
            "blocks": self.blocks,
            "threads": self.code.threads,
            "registers": self.code.registers,
            "slots": slots,
            "waves": self.blocks / at_once,
            "bytes": self.bytes,
            "us": LAUNCH_US + sum(count * us for count, us, _ in found),
            "bound_by": found[0][2],
        }

    def _wave(self, n: int, device: Device) -> tuple[float, str]:
        lanes = PER_CLOCK | {"fma": device.fma}
        parts = [(part, self.rounds if part.loops else 1) for part in self.code.parts]
        of_block = {
            pipe: sum(part.pipes.get(pipe, 0) * rounds for part, rounds in parts)
            * self.code.threads
            / lanes[pipe]
            for pipe in lanes
        }
        alone = sum(part.clocks * rounds for part, rounds in parts)
        busy = -(-n // device.multiprocessors) * max(of_block.values()) / REACHED
        times = {
            "memory": n / self.blocks * self.bytes / (REACHED * device.gb_per_s * 1e3),
            "instructions": busy / device.ghz / 1e3,
            "latency": alone / device.ghz / 1e3,
        }
        bound_by = max(times, key=times.__getitem__)
        return times[bound_by], bound_by


@dataclass(frozen=True)
class TorchOperation:
    """A kernel of torch's. bytes: in and out; written: of them, after the FLOP of a matmul."""

    name: str
    flop: float
    bytes: float
    written: float

    def predict(self, device: Device) -> dict[str, Any]:
        per_us = REACHED * device.gb_per_s * 1e3
        times = {"memory": self.bytes / per_us}
        if self.flop:
            product = self.flop / (REACHED_TENSOR_CORES * device.tflop_per_s * 1e6)
            times["tensor cores"] = product + self.written / per_us
        bound_by = max(times, key=times.__getitem__)
        us = LAUNCH_US + times[bound_by]
        return {"kernel": self.name, "bytes": self.bytes, "us": us, "bound_by": bound_by}


class Compiled:
    """The code of kernels, made once for each architecture, in a folder for cubins."""

    def __init__(self, folder: Path) -> None:
        tool = find_cuobjdump()
        if tool is None:
            raise SystemExit("cuobjdump is neither in PATH nor in triton's package")
        self.folder, self.tool = folder, tool
        self.steps: dict[tuple[str, int, int], Steps] = {}
        self._triton: dict[tuple[str, int], Code] = {}

    def triton(self, launch: kernel_resources.Launch, architecture: int, through: str) -> Code:
        key = launch.same_code() + through, architecture
        if key not in self._triton:
            compiled = compile_for(
                *(launch.kernel, launch.kinds, launch.constants, architecture, launch.options),
                divisible=launch.divisible,
            )
            used = resources(compiled, self.folder)  # which writes the cubin
            (listing,) = listings(self.folder / "kernel.cubin", self.tool).values()
            parts = tuple(hot_path(listing, through))
            threads = WARP * launch.options["num_warps"]
            self._triton[key] = Code(threads, used["REG"], compiled.metadata.shared, parts)
        return self._triton[key]

    @functools.cached_property
    def natives(self) -> dict[tuple[str, str], Code]:
        """By kernel or instantiation, "update_float32_kernel<448>", and target."""
        found, read = {}, {}
        for kernel in kernel_resources.cuda_kernels(self.folder):
            if kernel.binary not in read:
                read[kernel.binary] = listings(kernel.binary, self.tool)
            name = kernel.kernel + (f"<{kernel.variant}>" if kernel.variant else "")
            # of the loops of an update with 8-bit moments that of the codes, which finds the
            # largest of a warp
            through = "REDUX|CREDUX" if "EightBit" in name else ""
            parts = tuple(hot_path(read[kernel.binary][kernel.key], through))
            threads = 1024 if kernel.kernel.startswith(("norm_decision", "norm_final")) else 256
            used = kernel.used
            code = Code(threads, used["registers"], used["shared_bytes"], parts)
            found[name, kernel.target] = code
        return found

    def native(self, name: str, device: Device) -> Code:
        return self.natives[name, f"sm_{device.native}"]


# What a program of a Triton kernel with loops loads in them: rounds as they are written, of which
# the compiler may make several one, elements of a round, and tensors. Others have no loop.
LOOPS: dict[str, Callable[[dict[str, Any], int], tuple[float, int, str]]] = {
    "norm.backward_kernel": lambda a, programs: (
        math.ceil(a["n_rows"] / programs),
        a["BLOCK"],
        "dy dsum h weight",
    ),
    "activation.backward_kernel": lambda a, programs: (
        a["rows_of_piece"],
        a["BLOCK"],
        "grad x up",
    ),
    "row_partials.sum_partials_kernel": lambda a, programs: (
        math.ceil(a["n_partials"] / a["ROWS"]),
        a["ROWS"] * a["COLUMNS"],
        "partials",
    ),
    "linear_cross_entropy.rows_kernel": lambda a, programs: (
        math.ceil(a["classes"] / a["BLOCK"]) * (1 + a["GRADIENT"]),  # of two loops
        a["BLOCK"],
        "logits",
    ),
}


def _triton_kernel(launch: kernel_resources.Launch, device: Device, compiled: Compiled) -> Kernel:
    arguments = launch.arguments
    moved = sum(t.numel() * t.element_size() for t in _tensors(arguments.values()))
    if launch.name == "linear_cross_entropy.rows_kernel":
        logits = arguments["logits"]
        moved += 2 * arguments["GRADIENT"] * logits.numel() * logits.element_size()
    code, loaded = compiled.triton(launch, device.architecture, ""), 0.0
    if launch.name in LOOPS:
        rounds, elements, names = LOOPS[launch.name](arguments, launch.programs)
        given = [arguments[name] for name in names.split() if arguments[name] is not None]
        loaded = rounds * elements * sum(t.element_size() for t in given)
    return Kernel(launch.name, code, launch.programs, moved, loaded)


def _tensors(values: Any) -> list[Tensor]:
    """Those in any containers, each once."""
    return list({id(t): t for t in tree_leaves(list(values)) if isinstance(t, Tensor)}.values())


class _TorchOperations(TorchDispatchMode):
    """What torch launches between the kernels of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[TorchOperation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if launches_kernel(func):
            name = func.overloadpacket.__name__
            overwrites = name in ("fill_", "zero_", "copy_")
            read, written = _bytes(args[1:] if overwrites else args), _bytes([results])
            flop, added = 0, 0
            if name in ("mm", "addmm"):
                *total, a, b = (t for t in args if isinstance(t, Tensor))
                flop, added = 2 * a.numel() * b.shape[-1], _bytes(total)
            self.found.append(TorchOperation(name, flop, read + written, written + added))
        return results


def _bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(values))


Steps = list[Any]  # of Kernel and TorchOperation


@contextlib.contextmanager
def _chosen(implementation: str) -> Iterator[None]:
    """Whatever the tensors are."""

    def select(op: backend.Op, tensors: Any, asked: str | None = None) -> backend.Implementation:
        return backend.find(op, implementation, tensors)[0]

    with mock.patch.object(backend, "select", select):
        yield


def of_call(case: kernels.Case, device: Device, compiled: Compiled) -> Steps:
    """A call of benchmarks/kernels.py."""
    torchs = _TorchOperations()
    recording = kernel_resources.recording(str(case), None)
    with FakeTensorMode(), _chosen("triton"), recording as launches:
        if case.operation.is_loss:
            # the sums of float32 are made otherwise on a GPU, and a tensor that is a GPU's to
            # autograd does not exist here: the forward, which forms the gradients, runs without it
            shape, dtype = case.shape, case.dtype
            hidden = torch.empty(shape.rows, shape.width, dtype=dtype)
            weight = torch.empty(shape.vocabulary, shape.width, dtype=dtype)
            labels = torch.empty(shape.rows, dtype=torch.int64)
            demand = [name in case.demanded for name in ("hidden", "weight", "bias")]

            def form(*args: Any, own: Any = chunks.form) -> Any:
                return own(*(demand if isinstance(arg, list) else arg for arg in args))

            forming = mock.patch.object(chunks, "form", form)
            with forming, mock.patch.object(FakeTensor, "is_cuda", True, create=True), torchs:
                case.operation.ours("triton")(hidden=hidden, weight=weight, labels=labels)
        else:
            given = kernel_timing.Given.drawn(case, torch.device("cpu"), seed=0)
            kernel_timing.run(case.operation.ours("triton"), given)
    ours = [_triton_kernel(launch, device, compiled) for launch in launches]
    return [*ours, *torchs.found]


class _Extension:
    """`_C`, whose functions for CUDA are noted in place of running."""

    cuda_built, cuda_archs, dtype_codes = True, "sm_80", DTYPE_CODES

    def __init__(self, device: Device, compiled: Compiled) -> None:
        self.device, self.compiled = device, compiled
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.endswith("_cuda"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, arguments))

    def masked_update_slots_cuda(self, variant: Any, tensors: int) -> int:
        """Blocks that the device holds at once."""
        code = self.compiled.native(instantiation(variant, tensors), self.device)
        return code.slots(self.device) * self.device.multiprocessors


_PARAMETERS = ("Float32", "BFloat16", "Float16")  # by backend.dtype_code
_MOMENTS = {0: "Float32", 1: "StochasticBFloat16", 4: "EightBit"}
_GRADIENTS = ("float", "__nv_bfloat16", "__half")


def instantiation(variant: tuple[int, int, bool, bool], tensors: int) -> str:
    """Of csrc/masked_update.cu, as its find_launcher chooses."""
    parameter, moments, master, stochastic = variant
    few = 448 if tensors <= 448 else 4032
    if (parameter, moments, master) == (0, 0, False):
        return f"update_float32_kernel<{few}>"
    name = ("Stochastic" if stochastic else "") + _PARAMETERS[parameter]
    return f"masked_update_kernel<{name}, {_MOMENTS[moments]}, {str(master).lower()}, {few}>"


@dataclass(frozen=True)
class Update:
    """A step of benchmarks/optimizer.py, clipping included where the case has it."""

    workload: str
    case: optimizer.Case
    provider: str
    implementation: str = "native"

    def __str__(self) -> str:
        shown = "" if self.implementation == "native" else f", {self.implementation}"
        return f"{self.workload}, {self.case.title}, {self.provider}{shown}"


def of_update(update: Update, device: Device, compiled: Compiled) -> Steps:
    from pretend_cuda import STREAM, PretendCuda

    provider = update.case.providers[update.provider]
    shapes = WORKLOADS[update.workload]
    elements = sum(map(math.prod, shapes))
    if update.implementation == "native":
        assert compiled.natives  # read now: below `_C` is a stand-in
    extension = _Extension(device, compiled)
    against = None if update.implementation == "native" else "this prediction is of Triton"
    recording = kernel_resources.recording(str(update), None)
    with (
        PretendCuda() as pretend,
        recording as launches,
        mock.patch.object(backend, "_load_native", lambda: (extension, None)),
        mock.patch.object(backend, "_native_cuda_reason", lambda index: against),
        mock.patch.object(backend, "cuda_stream", lambda device: STREAM),
    ):
        # memory that nobody touches is not there: 110 M parameters take none
        parameters = [nn.Parameter(torch.empty(s, dtype=update.case.dtype)) for s in shapes]
        gradients = [torch.empty_like(p) for p in parameters]
        pretend.put([parameters, gradients])
        step = provider.build(parameters, update.case.clip)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        step()
    found: Steps = []
    for launch in launches:
        if "prepare" in launch.name:
            code = compiled.triton(launch, device.architecture, "")
            found.append(Kernel(launch.name, code, launch.programs, 0.0))
            continue
        coded = "8-bit" in update.provider
        code = compiled.triton(launch, device.architecture, "SHFL|REDUX|CREDUX" if coded else "")
        found.append(_update_kernel(launch.name, code, launch.programs, elements, update))
    for name, arguments in extension.calls:
        found.append(_native_kernel(name, arguments, elements, update, device, compiled))
    return found


def _update_kernel(name: str, code: Code, blocks: int, elements: int, update: Update) -> Kernel:
    per_element = update.case.providers[update.provider].bytes_per_parameter
    # parameter, gradient and moments are read, all but the gradient written
    loaded = (int(per_element) + update.case.dtype.itemsize) // 2
    return Kernel(name, code, blocks, per_element * elements, loaded * elements / blocks)


def _native_kernel(
    name: str,
    arguments: tuple[Any, ...],
    elements: int,
    update: Update,
    device: Device,
    compiled: Compiled,
) -> Kernel:
    if name == "norm_decision_cuda":
        _, count, *_ = arguments
        code = compiled.native("norm_decision_kernel", device)
        return Kernel("norm_decision_kernel", code, 1, 4 * count, 4 * count)
    (_, _, blocks, *_), addresses, *others = arguments
    if name == "bucket_norm_partials_cuda":
        kind, few = _GRADIENTS[others[0]], 448 if len(addresses) <= 448 else 4032
        code = compiled.native(f"bucket_partials_kernel<{kind}, {few}>", device)
        moved = elements * (4 if kind == "float" else 2)
        return Kernel("bucket_partials_kernel", code, blocks, moved)
    if name != "masked_update_cuda":
        raise ValueError(f"{name} has no prediction")
    kernel = instantiation(others[1], len(addresses))
    code = compiled.native(kernel, device)
    return _update_kernel(kernel, code, blocks, elements, update)


WORKLOADS = {"BERT-base block, 16 tensors": optimizer.transformer(0, 768, 1, 0)[5:]}
WORKLOADS |= {name: optimizer.WORKLOADS[name] for name in optimizer.WORKLOADS}


def calls() -> list[kernels.Case]:
    """Those of models that the docs speak of: BERT-base, and Llama 3.2 1B."""
    by_name = {operation.name: operation for operation in kernels.operations()}
    bert, llama = kernels.Shape(4096, 768), kernels.Shape(8192, 2048)
    shapes = [(name, bert) for name in ("layer_norm", "layer_norm, residual")]
    shapes += [(name, llama) for name in ("rms_norm", "rms_norm, residual", "layer_norm")]
    shapes += [("bias_gelu, erf", kernels.Shape(4096, 3072)), ("swiglu", kernels.Shape(8192, 8192))]
    shapes += [("linear_cross_entropy", kernels.Shape(8192, 2048, 128_256))]
    return [
        kernels.Case(by_name[name], shape, torch.bfloat16, demand)
        for name, shape in shapes
        for demand in by_name[name].demands
        if demand != "parameters only"
    ]


def updates() -> list[Update]:
    clipped, _, moments, low = optimizer.cases(torch.device("cuda"))
    block, bert = next(iter(WORKLOADS)), next(name for name in WORKLOADS if "199" in name)
    found = [Update(w, clipped, "MaskedAdamW") for w in (block, bert)]
    for case in (moments, low):
        ours = [p for p in case.providers if not p.startswith("FlashOptim") and "Triton" not in p]
        found += [Update(w, case, provider) for w in (block, bert) for provider in ours]
        found += [Update(bert, case, provider, "triton") for provider in ours]
    return found


def predict(what: kernels.Case | Update, device: Device, compiled: Compiled) -> dict[str, Any]:
    """Microseconds, and the share of bandwidth, or of bfloat16's FLOP for a loss."""
    key = str(what), device.architecture, device.multiprocessors  # all that they depend on
    if key not in compiled.steps:
        make = of_update if isinstance(what, Update) else of_call
        compiled.steps[key] = make(what, device, compiled)
    steps = compiled.steps[key]
    found = [step.predict(device) for step in steps]
    us, moved = sum(f["us"] for f in found), sum(f["bytes"] for f in found)
    share = moved / us / 1e3 / device.gb_per_s
    if flop := sum(step.flop for step in steps if isinstance(step, TorchOperation)):
        share = flop / us / 1e6 / device.tflop_per_s
    return {"us": us, "share": share, "bytes": moved, "launches": len(found), "kernels": found}


def table(content: dict[str, Any]) -> str:
    """Markdown of a stored predicted_times.json."""
    names = list(content["devices"])
    lines = [
        "Predicted, not measured: microseconds, and the share of the GPU's bandwidth, or of its "
        "bfloat16 FLOP where a matmul is in it.",
        "",
        f"| Call, or step of the optimizer | MB | launches | {' | '.join(names)} |",
        f"|---|---:|---:|{'---:|' * len(names)}",
    ]
    for title, entry in content["results"].items():
        cells = [f"{entry[SHOWN]['bytes'] / 1e6:,.1f}", f"{entry[SHOWN]['launches']}"]
        cells += [f"{entry[name]['us']:,.1f} ({entry[name]['share']:.2f})" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The kernels of these on an {SHOWN}: what bounds a wave of blocks.",
        "",
        "| Kernel | in | blocks | per SM | waves | us | bound by |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    shown = set()
    for title, entry in content["results"].items():
        for kernel in entry[SHOWN]["kernels"]:
            key = kernel["kernel"], kernel["bytes"], kernel["bound_by"]
            if "slots" not in kernel or key in shown or kernel["blocks"] < 3:
                continue
            shown.add(key)
            cells = (f"{kernel['blocks']:,}", kernel["slots"], f"{kernel['waves']:.2f}")
            cells += (f"{kernel['us']:,.1f}", kernel["bound_by"])
            lines.append(f"| `{kernel['kernel']}` | {title} | {' | '.join(map(str, cells))} |")
    commit = (content["meta"]["commit"] or "no commit")[:9]
    changed = " with changes" if content["meta"]["dirty"] else ""
    return "\n".join([*lines, "", f"Commit {commit}{changed}, nvcc {content['meta']['nvcc']}."])


def compare(folder: Path, compiled: Compiled) -> str:
    """Markdown: what was measured there beside what is predicted for that GPU."""
    measured: list[tuple[kernels.Case | Update, float]] = []
    paths = {name: folder / f"{name}.json" for name in ("kernels", "optimizer")}
    contents = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not contents:
        raise SystemExit(f"no kernel times of a GPU in {folder}")
    names = ", ".join({content["meta"]["device"] for content in contents.values()})
    device = next((d for d in DEVICES if d.name in names), None)
    if device is None:
        known = ", ".join(d.name for d in DEVICES)
        raise SystemExit(f"{folder} was measured on {names}; predicted are times of {known}")
    if (content := contents.get("kernels")) is not None:
        cases = {str(case): case for case in kernels.cases(torch.device("cuda"))}
        for result in content["results"]:
            us = result["providers"].get("ours", {}).get("kernel_us")
            if us is not None:
                shape = kernels.Shape(*result["shape"])
                title = f"{result['operation']}, {result['demand']}, {shape} {result['dtype']}"
                if title in cases:  # a rehearsal has smaller ones
                    measured.append((cases[title], us))
    if (content := contents.get("optimizer")) is not None:
        cases = {case.title: case for case in optimizer.cases(torch.device("cuda"))}
        for result in content["results"]:
            case = cases[result["case"]]
            for provider, entry in result["providers"].items():
                ours = not provider.startswith(("torch", "FlashOptim"))
                if ours and "kernel_ms" in entry:
                    name = provider.removesuffix(", Triton")
                    implementation = "native" if name == provider else "triton"
                    update = Update(result["workload"], case, name, implementation)
                    measured.append((update, 1e3 * entry["kernel_ms"]))
    if not measured:
        raise SystemExit(f"no kernel times of a GPU in {folder}")
    lines = [f"| {device.name} | measured (us) | predicted | measured / predicted |"]
    lines.append("|---|---:|---:|---:|")
    for what, us in measured:
        predicted = predict(what, device, compiled)["us"]
        lines.append(f"| {what} | {us:.1f} | {predicted:.1f} | {us / predicted:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored table and stop")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="with a GPU's results")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.output.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        compiled = Compiled(Path(folder))
        if arguments.compare is not None:
            print(compare(arguments.compare, compiled))
            return
        results: dict[str, dict[str, Any]] = {}
        for what in track([*updates(), *calls()], description="predicting"):
            entry = {device.name: predict(what, device, compiled) for device in DEVICES}
            for name in entry.keys() - {SHOWN}:
                del entry[name]["kernels"]
            results[str(what)] = entry
    meta = provenance(None) | {"nvcc": kernel_resources.nvcc_version()}
    content = {"meta": meta, "devices": {d.name: vars(d) for d in DEVICES}, "results": results}
    store(content, arguments.output)
    print(table(content))


if __name__ == "__main__":
    main()
