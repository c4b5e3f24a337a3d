"""How the kernels' benchmark measures a case: what a call gets, the gate, and the times.

`measure` makes the entry of one case. Times come after the gate, from everybody in turn: of kernels
by replays of a CUDA graph, of Python by the clock.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_operations import (
    DROPOUT,
    IGNORED,
    ROW_TENSORS,
    Case,
    draw_normal,
    floor_flop,
)
from kernel_peers import Call
from optimizer import copy_gb_per_s, reason, wait
from torch import Tensor

from progtuning_kernels import backend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from accuracy import in_fp64, relative_error

ROUNDS, CALLS = 30, 20
WARM_UP_S = 0.5  # of every case, not recorded: clocks rise
BATCH_S = 0.025  # of the calls of one round; fewer calls than 20 if they are long
GATE_ROWS = 512
MATMUL = 8192  # all three dimensions
# of ours, on a GPU: a silent fall back to plain torch would be measured as ours
IMPLEMENTATION = "triton"


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
            upstream = [draw_normal(generator, case.dtype, *shape[:2]) for _ in operation.results]
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
    """Best of 15, bfloat16."""
    size = MATMUL
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
            # a launch is then enqueued while the device still reads, and no call's data is in L2
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
        # a function is compiled for every case, and 8 are the limit; forgetting the others would
        # compile again what two cases share
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = sys.maxsize
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
