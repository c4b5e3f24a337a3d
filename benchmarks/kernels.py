"""The freeze-aware ops against torch, torch.compile, liger-kernel and cut-cross-entropy.

    python benchmarks/kernels.py [--output FOLDER]       # on the GPU, if there is one
    python benchmarks/kernels.py --device cpu            # gate and cost of a call, no kernels
    python benchmarks/kernels.py --only "rms_norm.*dx" --budget-s 500
    python benchmarks/kernels.py --table FOLDER          # the stored numbers in Markdown

A call is what training pays for: the forward, and the backward for the gradients demanded, nothing
else. `kernel_us` is the device's time per call, of about 20 calls replayed from one CUDA graph over
buffers of four times L2 in sum (`hot_us`: over one set of them); what waits for the device cannot
be captured, and is timed by events around the calls. `call_us` is what the call costs Python,
unsynchronised. Before any time there is the gate: results and gradients of 512 rows of the full
call against fp64. Ours may be no less accurate than plain torch in the same dtype, the others may
round more but not be wrong, and who fails gets no number.

On the CPU, and without Triton's interpreter, our ops run plain torch: the CPU form runs the gate
and measures what the call costs Python on tiny tensors, and says nothing of kernels.

Prediction. Norms and activations move bytes: `floor_bytes` is what any implementation has to move,
and a time below its share of a copy's bandwidth is a mistake of the benchmark. torch and its
compiler skip undemanded gradients of weights too, so gains there come from fusion alone; liger's
norms always compute them. The loss is bound by its 1 to 3 matmuls: level with the compiler, 1.2 x
eager, whose logits in float32 also take most of the memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from rich.progress import track
except ImportError:  # a machine that has torch and nothing else

    def track(sequence: Any, description: str) -> Any:
        return sequence


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from accuracy import in_fp64, relative_error  # noqa: E402
from optimizer import copy_gb_per_s, wait  # noqa: E402

from progtuning_kernels import backend, ops  # noqa: E402
from progtuning_kernels.cli.provenance import provenance  # noqa: E402
from progtuning_kernels.ops import activation, norm  # noqa: E402

ROUNDS, CALLS = 30, 20
WARM_UP_S = 0.5  # of every case, not recorded: clocks rise
BATCH_S = 0.025  # of the calls of one round; fewer calls than 20 if they are long
GATE_ROWS = 512
EPS, DROPOUT, IGNORED = 1e-6, 0.1, -100
PEERS = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}
# of ours, on a GPU: a silent fall back to plain torch would be measured as ours
IMPLEMENTATION = "triton"

Call = Callable[..., Any]
ROW_TENSORS = ("x", "residual", "gate", "up", "hidden", "labels")


class Shape(NamedTuple):
    """rows x width; vocabulary: of the loss, else 0."""

    rows: int
    width: int
    vocabulary: int = 0

    def __str__(self) -> str:
        return " x ".join(f"{size:,}" for size in self if size)


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernels.

    Args:
        build: imports what it needs and returns the call; raises where it is not installed.
        computes: the gradients that it computes whatever is demanded.
        overwrites: its backward writes into inputs or upstream gradients.
    """

    build: Callable[[], Call]
    computes: tuple[str, ...] = ()
    overwrites: bool = False


@dataclass(frozen=True)
class Operation:
    """What everybody computes. Calls take the tensors by name.

    Args:
        draw: shape, dtype, generator -> the tensors.
        results: names of what a call returns.
        demands: title -> names of the tensors whose gradients are demanded.
        eager: plain torch, as the models have it.
        ours: an implementation's name, or None -> the call.
        units: demanded -> elements that have to move, in rows x width of activations.
        truth: what the gate asks in fp64; eager if None. With `kept`, the dropout's mask.
        gate_options: keywords of all calls in the gate.
    """

    name: str
    draw: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Tensor]]
    results: tuple[str, ...]
    demands: dict[str, tuple[str, ...]]
    eager: Call
    ours: Callable[[str | None], Call]
    units: Callable[[Collection[str], Shape], float]
    peers: dict[str, Peer] = field(default_factory=dict)
    truth: Call | None = None
    gate_options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_loss(self) -> bool:
        return self.results == ("loss",)


def _randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _draw(rows: str, parameters: str) -> Callable[..., dict[str, Tensor]]:
    """Row tensors at a distance from 0, so that the gate sees which of them dropout keeps."""

    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = {}
        for name in rows.split():
            drawn = _randn(generator, dtype, shape.rows, shape.width)
            tensors[name] = drawn + 0.25 * drawn.sign()
        for name in parameters.split():
            tensors[name] = 0.1 * _randn(generator, dtype, shape.width) + (name == "weight")
        return tensors

    return draw


def _norm_units(
    *, residual: bool = False, returned: bool = False, dropout: bool = False
) -> Callable[[Collection[str], Shape], float]:
    """In activations. returned: the sum x + residual is a result, and has a gradient of its own."""

    def units(demanded: Collection[str], shape: Shape) -> float:
        moved = 2.0 + residual + returned  # forward: x, residual -> y, sum
        if not demanded:
            return moved
        moved += 1  # the upstream gradient
        if set(demanded) != {"bias"}:
            # the sum again; not returned, it is written once more, or both its terms are read
            moved += 1 + (residual and not returned)
        if "x" in demanded or "residual" in demanded:
            moved += 1 + returned  # dx, to which the sum's own upstream gradient is added
            # without dropout the gradient of the residual is that of x
            moved += dropout and "x" in demanded and "residual" in demanded
        return moved

    return units


def _activation_units(gated: bool) -> Callable[[Collection[str], Shape], float]:
    def units(demanded: Collection[str], shape: Shape) -> float:
        moved = 2.0 + gated  # forward: the inputs -> y
        if demanded:
            moved += 2 + sum(name in ("x", "gate", "up") for name in demanded)  # y's, x's, written
            moved += gated and "gate" in demanded  # dgate needs up, dup does not
        return moved

    return units


def _loss_units(demanded: Collection[str], shape: Shape) -> float:
    """hidden and weight in, what is demanded out: logits need not be stored by anybody."""
    heads = shape.vocabulary / shape.rows  # of weight, in activations
    return 1 + heads + ("hidden" in demanded) + heads * ("weight" in demanded)


def floor_flop(demanded: Collection[str], shape: Shape) -> float:
    """Of the loss: a matmul for the logits, and one per gradient."""
    return 2.0 * math.prod(shape) * (1 + len(demanded)) if shape.vocabulary else 0.0


def _liger(name: str, arrange: Call, **options: Any) -> Peer:
    def build() -> Call:
        from liger_kernel.transformers import functional

        function = getattr(functional, name)
        return lambda **tensors: arrange(function, **tensors)

    return Peer(build, **options)


def _layer_norms() -> Iterator[Operation]:
    settings = norm.Norm(EPS, center=True)

    def plain(x, weight, bias):
        return norm.reference.normalise(x, weight, bias, settings)

    def with_residual(x, residual, weight, bias):
        return norm.reference.normalise(x + residual, weight, bias, settings)

    def with_dropout(x, residual, weight, bias, return_sum=False):
        h = F.dropout(x, DROPOUT) + residual
        y = norm.reference.normalise(h, weight, bias, settings)
        return (y, h) if return_sum else y

    def truth_of_dropout(x, residual, weight, bias, kept, return_sum):
        h = x * kept / (1 - DROPOUT) + residual
        return norm.reference.normalise(h, weight, bias, settings), h

    def ours(**more: Any) -> Callable[[str | None], Call]:
        def build(implementation: str | None) -> Call:
            def call(x, weight, bias, **options):
                options |= more
                return ops.layer_norm(
                    x, weight, bias, EPS, implementation=implementation, **options
                )

            return call

        return build

    def liger(function, x, weight, bias, residual=None):
        return function(x if residual is None else x + residual, weight, bias, EPS)

    parameters = ("weight", "bias")
    peers = {"liger": _liger("liger_layer_norm", liger, computes=("x", *parameters))}
    demands = {
        "forward only": (),
        "dx only": ("x",),
        "all": ("x", *parameters),
        "parameters only": parameters,
    }
    # the post-norm of an encoder; the residual is an activation, too
    added = demands | {"dx only": ("x", "residual"), "all": ("x", "residual", *parameters)}
    draw, draw_both = _draw("x", "weight bias"), _draw("x residual", "weight bias")
    yield Operation(
        *("layer_norm", draw, ("y",), demands, plain, ours(), _norm_units(), peers),
    )
    units = _norm_units(residual=True)
    yield Operation(
        *("layer_norm, residual", draw_both, ("y",), added, with_residual, ours(), units, peers),
    )
    units = _norm_units(residual=True, dropout=True)
    yield Operation(
        *("layer_norm, dropout and residual", draw_both, ("y",), added, with_dropout),
        *(ours(dropout=DROPOUT), units),
        truth=truth_of_dropout,
        gate_options={"return_sum": True},
    )


def _rms_norms() -> Iterator[Operation]:
    kinds = {  # settings of ours, liger's casting mode
        "rms_norm": (dict(cast="before_weight"), "llama"),
        "rms_norm, weight before cast": (dict(cast="after_weight"), "gemma"),
        "rms_norm, Gemma": (dict(cast="after_weight", offset=1.0), "gemma"),
    }
    for name, (options, casting) in kinds.items():
        offset = options.get("offset", 0.0)
        settings = norm.Norm(EPS, False, offset, cast_first=options["cast"] == "before_weight")

        def plain(x, weight, settings=settings):
            return norm.reference.normalise(x, weight, None, settings)

        def with_residual(x, residual, weight, settings=settings):
            h = x + residual
            return norm.reference.normalise(h, weight, None, settings), h

        def ours(options: dict[str, Any]) -> Callable[[str | None], Call]:
            def build(implementation: str | None) -> Call:
                def call(x, weight, **more):
                    more |= options
                    return ops.rms_norm(x, weight, EPS, implementation=implementation, **more)

                return call

            return build

        def liger(function, x, weight, residual=None, offset=offset, casting=casting):
            inputs = (x,) if residual is None else (x, residual)
            return function(*inputs, weight, EPS, offset, casting)

        demands = {
            "forward only": (),
            "dx only": ("x",),
            "all": ("x", "weight"),
            "parameters only": ("weight",),
        }
        peer = _liger("liger_rms_norm", liger, computes=("x", "weight"), overwrites=True)
        yield Operation(
            *(name, _draw("x", "weight"), ("y",), demands, plain, ours(options), _norm_units()),
            {"liger": peer},
        )
        # the pre-norm of a decoder, which goes on with the sum as well
        demands = demands | {"dx only": ("x", "residual"), "all": ("x", "residual", "weight")}
        computed = ("x", "residual", "weight")
        peer = _liger("liger_fused_add_rms_norm", liger, computes=computed, overwrites=True)
        yield Operation(
            *(f"{name}, residual", _draw("x residual", "weight"), ("y", "h"), demands),
            *(with_residual, ours(options | {"return_sum": True})),
            _norm_units(residual=True, returned=True),
            {"liger": peer},
        )


def _activations() -> Iterator[Operation]:
    def eager(kind: activation.Kind) -> Call:
        def call(x=None, bias=None, gate=None, up=None):
            return activation.reference.forward(
                activation.Inputs(gate if x is None else x, bias, up), kind
            )

        return call

    def ours(name: str, **options: Any) -> Callable[[str | None], Call]:
        def build(implementation: str | None) -> Call:
            function = getattr(ops, name)
            return lambda **t: function(**t, **options, implementation=implementation)

        return build

    def liger(function, gate, up):
        return function(gate, up)

    both = ("gate", "up")
    gated = {"forward only": (), "all": both, "gate only": ("gate",), "up only": ("up",)}
    x_alone = {"forward only": (), "all": ("x",)}
    with_bias = {
        "forward only": (),
        "dx only": ("x",),
        "all": ("x", "bias"),
        "parameters only": ("bias",),
    }
    peers = {"liger": _liger("liger_swiglu", liger, computes=both, overwrites=True)}
    yield Operation(
        *("swiglu", _draw("gate up", ""), ("y",), gated, eager("silu"), ours("swiglu")),
        *(_activation_units(True), peers),
    )
    tanh = dict(approximate="tanh")
    peers = {"liger": _liger("liger_geglu", liger, computes=both, overwrites=True)}
    yield Operation(
        *("geglu, tanh", _draw("gate up", ""), ("y",), gated, eager("tanh"), ours("geglu", **tanh)),
        *(_activation_units(True), peers),
    )
    for kind, options in (("none", {}), ("tanh", tanh)):
        title = "erf" if kind == "none" else kind
        yield Operation(
            *(f"bias_gelu, {title}", _draw("x", "bias"), ("y",), with_bias, eager(kind)),
            *(ours("bias_gelu", **options), _activation_units(False)),
        )
        yield Operation(
            *(f"gelu, {title}", _draw("x", ""), ("y",), x_alone, eager(kind)),
            *(ours("gelu", **options), _activation_units(False)),
        )


def _loss() -> Operation:
    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        rows, width, vocabulary = shape
        weight = _randn(generator, dtype, vocabulary, width).mul_(width**-0.5)
        labels = torch.randint(vocabulary, (rows,), generator=generator, device=generator.device)
        hidden = _randn(generator, dtype, rows, width)
        return {"hidden": hidden, "weight": weight, "labels": labels}

    def eager(hidden, weight, labels):
        """As transformers: logits in the model's dtype, and their copy in float32."""
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)

    def ours(implementation: str | None) -> Call:
        return lambda **t: ops.linear_cross_entropy(**t, implementation=implementation)

    def liger(function, hidden, weight, labels):
        return function(hidden, weight, labels)

    def cce() -> Call:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)

    demands = {
        "forward only": (),
        "all": ("hidden", "weight"),
        "hidden only": ("hidden",),
        "head only": ("weight",),
    }
    name = "liger_fused_linear_cross_entropy"
    peers = {"liger": _liger(name, liger, computes=("hidden",)), "cce": Peer(cce)}
    return Operation(
        *("linear_cross_entropy", draw, ("loss",), demands, eager, ours, _loss_units, peers)
    )


def operations() -> list[Operation]:
    """In order of importance, for runs on a budget."""
    rms, layer = list(_rms_norms()), list(_layer_norms())
    others = [*rms[2:], *_activations()]
    return [_loss(), *rms[:2], *layer, *others]


@dataclass(frozen=True)
class Case:
    operation: Operation
    shape: Shape
    dtype: torch.dtype
    demand: str

    @property
    def demanded(self) -> tuple[str, ...]:
        return self.operation.demands[self.demand]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation.name}, {self.demand}, {self.shape} {dtype}"


def cases(device: torch.device) -> list[Case]:
    """In order of importance, for runs on a budget."""
    low, float32 = torch.bfloat16, torch.float32
    loss, *others = operations()
    if device.type == "cpu":
        # small enough that a call is Python's time and not the arithmetic
        shapes = [(operation, Shape(8, 64), low) for operation in others]
        shapes.insert(0, (loss, Shape(8, 64, 256), low))
    else:
        shapes = [(loss, Shape(8192, 2048, 128_256), low), (loss, Shape(4096, 768, 30_522), low)]
        for dtype, rows in ((low, 8192), (low, 65_536), (float32, 8192), (float32, 65_536)):
            for width in (4096, 768, 2048, 8192):
                for operation in others:
                    if dtype == low or "norm" in operation.name:
                        shapes.append((operation, Shape(rows, width), dtype))
    return [Case(o, shape, dtype, demand) for o, shape, dtype in shapes for demand in o.demands]


@dataclass
class Given:
    """What one call gets: tensors that demand their gradients, upstream gradients of the results.

    An upstream gradient is None for a loss: autograd's 1.
    """

    tensors: dict[str, Tensor]
    upstream: list[Tensor | None]
    demanded: tuple[str, ...]

    @classmethod
    def drawn(cls, case: Case, device: torch.device, seed: int) -> Given:
        generator = torch.Generator(device).manual_seed(seed)
        operation, shape = case.operation, case.shape
        tensors = operation.draw(shape, case.dtype, generator)
        upstream: list[Tensor | None] = [None]
        if not operation.is_loss:
            upstream = [_randn(generator, case.dtype, *shape[:2]) for _ in operation.results]
        return cls({}, upstream, case.demanded).with_tensors(tensors)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Given:
        leaves = {n: t.detach().requires_grad_(n in self.demanded) for n, t in tensors.items()}
        return Given(leaves, self.upstream, self.demanded)

    def memory(self) -> list[Tensor]:
        """What lies in rows, of which the buffers' size consists and which a backward can spoil."""
        rows = [t for n, t in self.tensors.items() if n in ROW_TENSORS and t.is_floating_point()]
        return [*(t.detach() for t in rows), *(g for g in self.upstream if g is not None)]

    def only(self, rows: Tensor) -> Given:
        """A copy of which only these rows count: they alone have upstream gradients, or labels."""
        tensors = {name: t.detach().clone() for name, t in self.tensors.items()}
        if "labels" in tensors:
            ignored = torch.full_like(tensors["labels"], IGNORED)
            tensors["labels"] = ignored.index_copy(0, rows, tensors["labels"][rows])
        upstream = [
            None if g is None else torch.zeros_like(g).index_copy(0, rows, g[rows])
            for g in self.upstream
        ]
        return Given({}, upstream, self.demanded).with_tensors(tensors)

    def exact(self, rows: Tensor) -> Given:
        """These rows alone, in fp64."""
        tensors = {}
        for name, t in self.tensors.items():
            t = t[rows] if name in ROW_TENSORS else t
            tensors[name] = in_fp64([t])[0] if t.is_floating_point() else t
        upstream = [None if g is None else g[rows].double() for g in self.upstream]
        return Given({}, upstream, self.demanded).with_tensors(tensors)


def run(call: Call, given: Given, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results and demanded gradients, the latter in the order of `demanded`."""
    with torch.set_grad_enabled(bool(given.demanded)):
        results = call(**given.tensors, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    if not given.demanded:
        return results, []
    # in the gate there may be one result more than in a call that is timed
    pairs = [(y, g) for y, g in zip(results, given.upstream, strict=False) if y.requires_grad]
    if not pairs:
        raise RuntimeError("its results have no gradient")
    leaves = [given.tensors[name] for name in given.demanded]
    outputs, upstream = zip(*pairs, strict=True)
    return results, list(torch.autograd.grad(outputs, leaves, upstream))


class Gate:
    """Errors of everybody against fp64, on some rows of the full call."""

    def __init__(self, case: Case, given: Given) -> None:
        self.case, self.given = case, given
        n, device = case.shape.rows, next(iter(given.tensors.values())).device
        self.rows = torch.linspace(0, n - 1, min(n, GATE_ROWS), device=device).long().unique()
        self.eager: dict[str, float] = {}

    def _truth(self, found: list[Tensor]) -> dict[str, Tensor]:
        operation, exact = self.case.operation, self.given.exact(self.rows)
        call, options = operation.truth or operation.eager, dict(operation.gate_options)
        if operation.truth is not None:
            x, residual = (exact.tensors[name].detach() for name in ("x", "residual"))
            options["kept"] = kept = (found[1][self.rows].double() - residual) / x > 0.5
            share, spread = kept.double().mean().item(), (0.25 / kept.numel()) ** 0.5
            if abs(share - (1 - DROPOUT)) > 6 * spread:
                raise RuntimeError(f"gate is red: dropout keeps {share:.3f}, not {1 - DROPOUT}")
        return self._named(*run(call, exact, **options))

    def _named(self, results: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        named = dict(zip(self.case.operation.results, results, strict=False))
        return named | {f"d{n}": g for n, g in zip(self.case.demanded, gradients, strict=True)}

    def errors(self, call: Call) -> dict[str, float]:
        """Relative errors of results and gradients; inf where rows without upstream have some."""
        given = self.given.only(self.rows)
        found = run(call, given, **self.case.operation.gate_options)
        errors = {}
        for name, exact in self._truth(found[0]).items():
            value = self._named(*found)[name]
            if name == "loss":
                value = value.reshape(exact.shape)
            elif name.removeprefix("d") in (*ROW_TENSORS, "y", "h"):
                if name[0] == "d" and value.index_fill(0, self.rows, 0).any():
                    errors[name] = math.inf
                    continue
                value = value[self.rows]
            errors[name] = relative_error(value, exact)
        return errors

    def allowed(self, provider: str, name: str) -> float:
        eps = torch.finfo(self.case.dtype).eps
        if provider == "eager" or name not in self.eager:
            return 16 * eps
        if provider == "ours":
            return self.eager[name] + eps / 2
        return 8 * (self.eager[name] + eps / 2)

    def check(self, provider: str, call: Call) -> dict[str, float]:
        """Errors; raises if they are more than is allowed."""
        errors = self.errors(call)
        for name, error in errors.items():
            if not error <= self.allowed(provider, name):
                allowed = self.allowed(provider, name)
                raise RuntimeError(f"gate is red: {name} is {error:.1e} off, allowed {allowed:.1e}")
        if provider == "eager":
            self.eager = errors
        return errors


@dataclass(frozen=True)
class Machine:
    """What this process measured of its device; None on the CPU, except for the copy."""

    device: torch.device
    copy_gb_per_s: float
    matmul_tflop_per_s: float | None = None
    l2_bytes: int | None = None
    filler: Tensor | None = None  # four times L2

    @property
    def times_kernels(self) -> bool:
        return self.filler is not None

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        if device.type != "cuda":
            return cls(device, copy_gb_per_s(device))
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        filler = torch.ones(l2, device=device)  # float32
        return cls(device, copy_gb_per_s(device), _matmul_tflop_per_s(device), l2, filler)


def _matmul_tflop_per_s(device: torch.device) -> float:
    """Best of 15, bfloat16, 8,192 in all three dimensions."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return 2 * size**3 / best / 1e9


class Timer:
    """The calls of one provider, ready to be timed.

    Args:
        sets: what the calls get, in turn.
    """

    def __init__(self, call: Call, sets: list[Given], machine: Machine) -> None:
        self.call, self.sets, self.machine = call, sets, machine
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.not_captured = ""
        self.times: dict[str, list[float]] = {"kernel_us": [], "hot_us": [], "call_us": []}

    def warm_up(self) -> float:
        """Loads and tunes all kernels; seconds of a call."""
        for given in self.sets[:3] * 2:
            run(self.call, given)
        wait(self.machine.device)
        started = time.perf_counter()
        for _ in range(3):
            run(self.call, self.sets[0])
        wait(self.machine.device)
        return (time.perf_counter() - started) / 3

    def capture(self, calls: int, stream: torch.cuda.Stream, pool: Any) -> None:
        """Graphs of `calls` calls: over all sets, and over the first one.

        The warm-up has to be repeated on the capture's stream, where cuBLAS then has its workspace
        and autograd its nodes. What waits for the device is found before the capture: a capture
        that fails can leave the allocator capturing.
        """
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for given in self.sets[:3]:
                run(self.call, given)
            stream.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(self.call, self.sets[0])
            except RuntimeError as error:
                self.not_captured = backend.one_line(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        if self.not_captured:
            return
        try:
            for name, sets in (("kernel_us", self.sets), ("hot_us", self.sets[:1])):
                graph = torch.cuda.CUDAGraph()
                # results are dropped, so that a later call of the graph has their memory again
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    for i in range(calls):
                        run(self.call, sets[i % len(sets)])
                self.graphs[name] = graph
                if len(self.sets) == 1:
                    break
        except Exception as error:  # torch's, or Triton's own kinds
            self.not_captured = backend.one_line(error)
            self.graphs.clear()
            torch.cuda.synchronize()

    def time_kernels(self, calls: int) -> Iterator[tuple[str, float]]:
        for name in self.graphs or ("kernel_us",):
            # a launch is then enqueued before the device is done with reading, and L2 is nobody's
            self.machine.filler.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if name in self.graphs:
                self.graphs[name].replay()
            else:
                for i in range(calls):
                    run(self.call, self.sets[i % len(self.sets)])
            end.record()
            end.synchronize()
            yield name, start.elapsed_time(end) * 1e3 / calls

    def time_calls(self, calls: int) -> Iterator[tuple[str, float]]:
        wait(self.machine.device)
        started = time.perf_counter()
        for i in range(calls):
            run(self.call, self.sets[i % len(self.sets)])
        yield "call_us", (time.perf_counter() - started) * 1e6 / calls
        wait(self.machine.device)

    def extra_bytes(self) -> int:
        """Peak of one call beyond what was there before it, results and gradients included."""
        wait(self.machine.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run(self.call, self.sets[0])
        wait(self.machine.device)
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak


def _spread(times: list[float], name: str) -> dict[str, float]:
    # the least number of rounds has no quintiles
    low, high = min(times), max(times)
    if len(times) > 4:
        low, *_, high = statistics.quantiles(times, n=5)
    return {name: statistics.median(times), f"{name}_p20": low, f"{name}_p80": high}


def providers(case: Case, machine: Machine) -> dict[str, Callable[[], Call]]:
    """How to make everybody's call; may raise."""
    operation, implementation = case.operation, None
    if machine.times_kernels:
        implementation = IMPLEMENTATION

    def compiled() -> Call:
        if not machine.times_kernels:
            raise RuntimeError("left out on the CPU: compiling takes longer than all the rest")
        return torch.compile(operation.eager, dynamic=False, fullgraph=True)

    made: dict[str, Callable[[], Call]] = {"eager": lambda: operation.eager, "compile": compiled}
    made |= {name: peer.build for name, peer in operation.peers.items()}
    return made | {"ours": lambda: operation.ours(implementation)}


def _sets(case: Case, machine: Machine) -> list[Given]:
    """As many as sum up to four times L2, of which the loss has no need."""
    first = Given.drawn(case, machine.device, seed=0)
    count = 1
    if machine.times_kernels and not case.operation.is_loss:
        size = sum(t.numel() * t.element_size() for t in first.memory())
        count = math.ceil(4 * machine.l2_bytes / size)
    return [first, *(Given.drawn(case, machine.device, seed) for seed in range(1, count))]


def measure(case: Case, machine: Machine, rounds: int = ROUNDS) -> dict[str, Any]:
    """The entry of one case; a provider that fails has its reason there instead of numbers."""
    operation, device, demanded = case.operation, machine.device, case.demanded
    cuda = machine.times_kernels
    if cuda:
        torch._dynamo.reset()  # else a function is compiled for 8 shapes and no more
    sets = _sets(case, machine)
    gate, entries, timers = Gate(case, sets[0]), {}, {}
    restore = _restorer(case, sets)
    calls, capture = CALLS if cuda else CALLS // 4, {}
    if cuda:
        capture = {"stream": torch.cuda.Stream(), "pool": torch.cuda.graph_pool_handle()}
    for name, build in providers(case, machine).items():
        try:
            call = build()
            entries[name] = {"errors": gate.check(name, call)}
            timer = Timer(call, sets, machine)
            seconds = timer.warm_up()
            if cuda and not timers:
                # the same for all; every set at least once
                calls = max(len(sets), min(CALLS, math.ceil(BATCH_S / seconds)))
            if cuda and operation.is_loss:
                entries[name]["extra_bytes"] = timer.extra_bytes()
            if cuda:
                timer.capture(calls, **capture)
            timers[name] = timer
        except Exception as error:
            entries[name] = {"reason": reason(error)}
            wait(device)  # raises if the device is lost, and then nobody's numbers are any good
        restore()
    for name, why in _time_all(timers, calls, rounds, machine, restore).items():
        entries[name] = {"reason": why}
        del timers[name]
    elements = case.shape.rows * case.shape.width
    result: dict[str, Any] = {
        "operation": operation.name,
        "demand": case.demand,
        "demanded": list(demanded),
        "shape": [size for size in case.shape if size],
        "dtype": str(case.dtype).removeprefix("torch."),
        "calls": calls,
        "sets": len(sets),
        "floor_bytes": operation.units(demanded, case.shape) * elements * case.dtype.itemsize,
        "floor_flop": floor_flop(demanded, case.shape),
        "providers": entries,
    }
    for name, timer in timers.items():
        entry = entries[name]
        for kind, times in timer.times.items():
            if times:
                entry |= _spread(times, kind)
        if name in operation.peers:
            computed = set(operation.peers[name].computes)
            entry["undemanded"] = sorted(computed - set(demanded)) if demanded else []
        if "kernel_us" in entry:
            entry["timed_by"] = "graph" if timer.graphs else "events"
            if timer.not_captured:
                entry["not_captured"] = timer.not_captured
            entry |= _rates(result, entry["kernel_us"], machine)
    return result


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {backend.one_line(error)}"


def _restorer(case: Case, sets: list[Given]) -> Callable[[], None]:
    """What puts back what a peer's backward overwrites, before everybody's turn."""
    spoils = case.demanded and any(peer.overwrites for peer in case.operation.peers.values())
    used = [t for given in sets for t in given.memory()] if spoils else []
    pristine = [t.clone() for t in used]

    def restore() -> None:
        if used:
            torch._foreach_copy_(used, pristine)

    return restore


def _time_all(
    timers: dict[str, Timer],
    calls: int,
    rounds: int,
    machine: Machine,
    restore: Callable[[], None],
) -> dict[str, str]:
    """Rounds of everybody in turn; returns who failed, and why."""
    failed: dict[str, str] = {}
    for method in (Timer.time_kernels, Timer.time_calls):
        if method is Timer.time_kernels and not machine.times_kernels:
            continue
        started, recorded = time.perf_counter(), 0
        warm_up_s = WARM_UP_S if method is Timer.time_kernels else 0.0
        while recorded < rounds:
            record = time.perf_counter() - started >= warm_up_s
            for name in [name for name in timers if name not in failed]:
                restore()
                try:
                    for kind, microseconds in method(timers[name], calls):
                        if record:
                            timers[name].times[kind].append(microseconds)
                except Exception as error:
                    failed[name] = reason(error)
                    wait(machine.device)
            recorded += record
    return failed


def _rates(result: dict[str, Any], kernel_us: float, machine: Machine) -> dict[str, float]:
    gb_per_s = result["floor_bytes"] / kernel_us / 1e3
    rates = {"gb_per_s": gb_per_s, "share_of_ceiling": gb_per_s / machine.copy_gb_per_s}
    if result["floor_flop"]:
        rates["tflop_per_s"] = result["floor_flop"] / kernel_us / 1e6
        rates["share_of_ceiling"] = rates["tflop_per_s"] / machine.matmul_tflop_per_s
    return rates


def _title(result: dict[str, Any]) -> str:
    shape = " x ".join(f"{size:,}" for size in result["shape"])
    return f"{result['operation']}, {result['demand']}, {shape} {result['dtype']}"


def _ratio(result: dict[str, Any], other: str, key: str = "kernel_us") -> float | None:
    """The other's number over ours; None where either has none."""
    theirs, ours = (result["providers"].get(name, {}).get(key) for name in (other, "ours"))
    return theirs / ours if theirs and ours else None


def show(result: dict[str, Any], absent: Collection[str] = ()) -> None:
    """absent: of whom a reason has been printed."""
    print(f"\n{_title(result)}  (floor {result['floor_bytes'] / 1e6:,.1f} MB)")
    for name, entry in result["providers"].items():
        if "reason" in entry:
            if name not in absent:
                print(f"  {name:8} no numbers: {entry['reason']}")
            continue
        key = "kernel_us" if "kernel_us" in entry else "call_us"
        line = f"  {name:8}"
        if "kernel_us" in entry:
            spread = f"{entry['kernel_us_p20']:.1f}-{entry['kernel_us_p80']:.1f}"
            line += f" {entry['kernel_us']:9.1f} us ({spread})  {entry['gb_per_s']:7.0f} GB/s "
            line += f"({entry['share_of_ceiling']:.2f} of ceiling)"
            line += "" if entry["timed_by"] == "graph" else " by events"
        line += f"  hot {entry['hot_us']:.1f}" if "hot_us" in entry else ""
        line += f"  call {entry['call_us']:7.1f} us"
        if "extra_bytes" in entry:
            line += f"  {entry['extra_bytes'] / 2**20:,.0f} MiB"
        if name != "ours" and (ratio := _ratio(result, name, key)) is not None:
            line += f"  ours {ratio:.2f} x as fast"
        print(line)


@dataclass(frozen=True)
class Verdict:
    """met is None where nothing was measured that could say."""

    target: str
    met: bool | None
    found: str

    def __str__(self) -> str:
        word = {True: "met", False: "NOT met", None: "not measured"}[self.met]
        return f"{word}: {self.target}: {self.found}"


def _worst(target: str, limit: float, ratios: dict[str, float]) -> Verdict:
    """Ratios, theirs over ours, by case: the least has to reach the limit."""
    if not ratios:
        return Verdict(target, None, "no kernel times of both")
    worst = min(ratios, key=ratios.__getitem__)
    found = f"least {ratios[worst]:.3f} ({worst}), {ratios[worst] / limit - 1:+.1%} of {limit:.3f}"
    missed = sum(ratio < limit for ratio in ratios.values())
    return Verdict(target, not missed, f"{found}; missed in {missed} of {len(ratios)}")


def verdicts(results: list[dict[str, Any]]) -> list[Verdict]:
    against, wasted = {}, []
    eager, compiled, memory, below = {}, {}, {}, {}
    for result in results:
        if (share := result["providers"].get("ours", {}).get("share_of_ceiling")) is not None:
            below[_title(result)] = 1 / share
        is_loss = result["operation"] == "linear_cross_entropy"
        for name in result["providers"]:
            if name == "ours" or (ratio := _ratio(result, name)) is None:
                continue
            against[f"{_title(result)}, {name}"] = ratio
            undemanded = result["providers"][name].get("undemanded", [])
            if name == "liger" and not is_loss and {"weight", "bias"} & set(undemanded):
                wasted.append(ratio)
        if is_loss and result["demanded"]:
            for found, value in (
                (eager, _ratio(result, "eager")),
                (compiled, _ratio(result, "compile")),
                (memory, _ratio(result, "eager", "extra_bytes")),
            ):
                if value is not None:
                    found[_title(result)] = value
    target = "1.2 x liger-kernel, geometric mean, where weights are frozen and it computes for them"
    mean = statistics.geometric_mean(wasted) if wasted else None
    found = "no kernel times of both" if mean is None else f"{mean:.3f} over {len(wasted)} cases"
    if mean is not None:
        found += f", {mean / 1.2 - 1:+.1%}"
    # a ratio of 1 / 1.05 is a time that is 5 % longer
    return [
        _worst("kernels at most 5 % slower than anybody's", 1 / 1.05, against),
        Verdict(target, None if mean is None else mean >= 1.2, found),
        _worst("linear_cross_entropy 1.15 x eager", 1.15, eager),
        _worst("linear_cross_entropy level with compile, within 5 %", 1 / 1.05, compiled),
        _worst("linear_cross_entropy takes an eighth of eager's extra memory", 8.0, memory),
        # what is faster than its bytes allow is timed wrongly; 5 % are the copy's own spread
        _worst("no time of ours below what the copy or the matmul allows", 1 / 1.05, below),
    ]


def table(content: dict[str, Any]) -> str:
    """Markdown of a stored kernels.json: microseconds, of kernels where there are any."""
    results = content["results"]
    kernels = any("kernel_us" in e for r in results for e in r["providers"].values())
    key = "kernel_us" if kernels else "call_us"
    names = ["eager", "compile", *PEERS, "ours"]
    names = [n for n in names if any(key in r["providers"].get(n, {}) for r in results)]
    heads = [*names, *(["GB/s", "of ceiling", "call"] if kernels else [])]
    what = "kernels" if kernels else "Python's time of a call"
    lines = [f"| {what} (us) | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for result in results:
        cells = []
        for name in names:
            value = result["providers"].get(name, {}).get(key)
            cells.append("" if value is None else f"{value:.1f}")
        if kernels:
            ours = result["providers"]["ours"]
            for name, digits in (("gb_per_s", 0), ("share_of_ceiling", 2), ("call_us", 1)):
                cells.append(f"{ours[name]:.{digits}f}" if name in ours else "")
        lines.append(f"| {_title(result)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _peers() -> dict[str, str | None]:
    """Versions of what is installed."""
    found: dict[str, str | None] = {}
    for package in PEERS.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _device_state(device: torch.device) -> str | None:
    """Driver, clocks, power: what explains a number that does not repeat."""
    if device.type != "cuda":
        return None
    query = "driver_version,pstate,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {backend.one_line(error)}"
    return done.stdout.strip() or f"not known: {done.stderr.strip()}"


def store(content: dict[str, Any], folder: Path | None) -> None:
    """In one piece: a run that is killed leaves the last file whole."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "kernels.json.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / "kernels.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, the default with a GPU, or cpu")
    parser.add_argument("--only", default="", help="cases whose title this regex is found in")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no case after it")
    parser.add_argument("--output", type=Path, help="write kernels.json into this folder")
    parser.add_argument("--table", type=Path, help="print the table of this folder's results")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads((arguments.table / "kernels.json").read_text())))
        return
    started, device = time.monotonic(), torch.device(arguments.device)
    if device.type == "cpu":
        # a second thread gains nothing here, and where a core is taken its barriers take 40 ms
        torch.set_num_threads(1)
    chosen = [case for case in cases(device) if re.search(arguments.only, str(case))]
    if not chosen:
        raise SystemExit(f"no case has {arguments.only!r} in its title")
    machine, installed = Machine.measured(device), _peers()
    meta = provenance(device)
    meta["versions"] |= installed
    content: dict[str, Any] = {
        "meta": meta | {"device_state": _device_state(device)},
        "copy_gb_per_s": machine.copy_gb_per_s,
        "matmul_tflop_per_s": machine.matmul_tflop_per_s,
        "l2_bytes": machine.l2_bytes,
        "rounds": arguments.rounds,
        "results": [],
        "failed": {},
        "not_reached": [str(case) for case in chosen],
        "verdicts": [],
    }
    print(f"copy: {machine.copy_gb_per_s:.1f} GB/s")
    if device.type == "cuda":
        print(f"matmul: {machine.matmul_tflop_per_s:.0f} TFLOP/s, bfloat16")
    else:
        print("on the CPU, the gate and the overhead of a call: nothing here is a kernel's time")
    absent = {name for name, package in PEERS.items() if installed[package] is None}
    absent |= {"compile"} if device.type == "cpu" else set()
    for name in sorted(absent & PEERS.keys()):
        print(f"{name}: no numbers, {PEERS[name]} is not installed")
    for case in track(chosen, description="kernels"):
        if time.monotonic() - started > arguments.budget_s:
            break
        content["not_reached"].remove(str(case))
        try:
            content["results"].append(measure(case, machine, arguments.rounds))
            show(content["results"][-1], absent)
        except Exception as error:  # before anybody's call: the tensors do not fit
            content["failed"][str(case)] = reason(error)
            print(f"\n{case}: {reason(error)}")
            store(content, arguments.output)
            wait(device)
        content["verdicts"] = [vars(v) for v in verdicts(content["results"])]
        store(content, arguments.output)
        if device.type == "cuda":
            gc.collect()  # graphs hold their pools
            torch.cuda.empty_cache()
    content["meta"]["device_state_at_the_end"] = _device_state(device)
    store(content, arguments.output)
    if content["not_reached"]:
        print(f"\nout of budget: {len(content['not_reached'])} of {len(chosen)} cases not reached")
    print()
    for verdict in verdicts(content["results"]):
        print(verdict)


if __name__ == "__main__":
    main()
