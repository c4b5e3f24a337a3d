"""Kernels for a GPU that are chosen, compiled and called, and not launched; see pretend_cuda.py.

Triton gets a driver that compiles for sm_90 and launches nothing, `_C` functions for CUDA that do
nothing. The reference of each op then computes what the kernel would have, so that training goes on
with real values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from pretend_cuda import GPU, H200, STREAM, PretendCuda, on_gpu
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from progtuning_kernels import backend
from progtuning_kernels.ops import kept_launches
from progtuning_kernels.ops.masked_norm import reference as norms
from progtuning_kernels.ops.norm import reference as norm_reference

_WARP, _MAX_THREADS = 32, 1024


class Kernels:
    """What was chosen, compiled and called while `unlaunched` was in force.

    Attributes:
        choices: (op, implementation, "cuda" or "cpu") of each choice.
        variants: compiled kernels of Triton, by module and name: "norm.forward_kernel".
        launches: of Triton's kernels, and of functions of `_C` for CUDA.
        cpu_calls: of functions of `_C` for CPU tensors.
    """

    def __init__(self) -> None:
        self.choices: Counter[tuple[str, str, str]] = Counter()
        self.variants: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.cpu_calls: Counter[str] = Counter()


@contextlib.contextmanager
def unlaunched(pretend: PretendCuda, *, native: bool) -> Iterator[Kernels]:
    """Inside `pretend`. native: `_C` seems to be built with CUDA, else without."""
    kernels = Kernels()
    extension = _Extension(backend.native_extension(), kernels)

    def launcher(source: Any, metadata: Any) -> _Launcher:
        return _Launcher(kernels, _name(source.fn))

    against = None if native else "the extension was built without CUDA: this test says so"
    patches = [
        # since Triton 3.6 at the latest `active` is a property
        (driver, "_active" if "_active" in vars(driver) else "active", StandInDriver(launcher)),
        (backend, "_load_native", lambda: (extension, None)),
        (backend, "_native_cuda_reason", lambda index: against),
        (backend, "select", _select(pretend, kernels)),
        (backend, "cuda_stream", lambda device: STREAM),
    ]
    for name in ("forward", "backward"):
        module = importlib.import_module("progtuning_kernels.ops.norm.triton")
        patches.append((module, name, _norm_results(pretend, getattr(module, name), name)))
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        # by GPU, why a first kernel did not run there
        trials = mock.patch.object(backend, "triton_trials", {0: None}, create=True)
        stack.enter_context(trials)
        # else a kernel of before would not count, and one of here would be launched later
        _forget_compiled()
        stack.callback(_forget_compiled)
        yield kernels


def _forget_compiled() -> None:
    kept_launches.forget()
    for name, module in list(sys.modules.items()):
        if name.startswith("progtuning_kernels."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


class StandInDriver:
    """Triton's, of one H200, as far as Triton asks.

    launcher_cls: makes of a source and its metadata what is called at each launch.
    """

    def __init__(self, launcher_cls: Callable[[Any, Any], Callable[..., None]]) -> None:
        self.utils, self.launcher_cls = _Utilities(), launcher_cls

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, _WARP)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For Triton's autotuner, of which other people's kernels make use: all are alike."""
        return lambda call, quantiles: [1.0 for _ in quantiles if call() is None]


def _name(kernel: JITFunction) -> str:
    module = kernel.fn.__module__.removesuffix(".triton").rpartition(".")[2]
    return f"{module}.{kernel.fn.__name__}"


class _Utilities:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 2, 32, 0, _MAX_THREADS  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        count = H200["multi_processor_count"]
        return {"max_shared_mem": 232_448, "multiprocessor_count": count, "warpSize": _WARP}


class _Launcher:
    """Made once for each compiled kernel."""

    def __init__(self, kernels: Kernels, name: str) -> None:
        kernels.variants[name] += 1
        self._kernels, self._name = kernels, name

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *others: Any) -> None:
        for i, value in enumerate(others):
            if isinstance(value, Tensor) and not on_gpu(value):
                raise ValueError(f"{self._name}: argument {i} is a tensor of the CPU")
        self._kernels.launches[self._name] += 1


class _Extension:
    """`_C` as if built with CUDA, or for the CPU alone."""

    cuda_built, cuda_archs = True, "sm_80 sm_90"

    def __init__(self, own: Any, kernels: Kernels) -> None:
        self._own, self._kernels = own, kernels

    def masked_update_slots_cuda(self, variant: tuple, num_tensors: int) -> int:
        return 6 * 132  # of an H200

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._own, name, None)
        if name.endswith("_cuda"):
            return lambda *args: self._kernels.launches.update([name])
        if name.endswith("_cpu"):

            def call(*args: Any) -> Any:
                self._kernels.cpu_calls[name] += 1
                return found(*args)

            return call
        if found is None:
            raise AttributeError(name)
        return found


def _device_of(tensors: Any) -> str:
    given = getattr(tensors, "params", tensors)
    return "cuda" if any(isinstance(t, Tensor) and on_gpu(t) for t in given) else "cpu"


def _select(pretend: PretendCuda, kernels: Kernels) -> Callable[..., backend.Implementation]:
    chosen_by = backend.select
    # a choice stays the same object, as its own is
    watched: dict[tuple[str, str], backend.Implementation] = {}

    def select(
        op: backend.Op, tensors: Any, implementation: str | None = None
    ) -> backend.Implementation:
        chosen = chosen_by(op, tensors, implementation)
        device = _device_of(tensors)
        kernels.choices[op.name, chosen.name, device] += 1
        # norm's functions in Triton are of autograd: `_norm_results` takes what they call
        by_autograd = op.name in ("layer_norm", "rms_norm")
        if device == "cpu" or chosen is op.reference or by_autograd:
            return chosen
        if (op.name, chosen.name) in watched:
            return watched[op.name, chosen.name]
        changed: dict[str, Any] = {"function": op.reference.function}
        changed |= {name: getattr(op.reference, name) for name in ("backward", "scale")}
        changed["decide"] = _decide
        watched[op.name, chosen.name] = dataclasses.replace(
            chosen,
            **{
                name: _both(pretend, own, computes)
                for name, computes in changed.items()
                if (own := getattr(chosen, name)) is not None
            },
        )
        return watched[op.name, chosen.name]

    return select


def _both(
    pretend: PretendCuda, launches: Callable[..., Any], computes: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        launches(*args, **kwargs)
        with pretend.unwatched():
            return computes(*args, **kwargs)

    return call


def _decide(
    buckets: Sequence[Any],
    gradients: Sequence[Any],
    *,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    control: Tensor,
) -> None:
    """What the kernels of a decision write to `control`."""
    norm = norms.norm([grad for some in gradients for grad in some.given if grad is not None])
    norm = norm if grad_scale is None else norm / grad_scale
    bad = torch.zeros_like(norm) if found_inf is None else found_inf.view(()) != 0
    if skip_nonfinite:
        bad = bad.bool() | ~norm.isfinite()
    factor = torch.ones_like(norm)
    if max_grad_norm is not None:
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = factor if grad_scale is None else factor / grad_scale
    for i, value in enumerate((norm, factor, bad.float(), control[3] + bad.float())):
        control[i].copy_(value.view(()))


def _norm_results(
    pretend: PretendCuda, launches: Callable[..., Any], name: str
) -> Callable[..., Any]:
    """`forward` or `backward` of the norms in Triton, whose results plain torch fills in."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = launches(*args, **kwargs)
        with pretend.unwatched(), torch.no_grad():
            computed = _COMPUTED[name](*args, **kwargs)
            for target, value in zip(found, computed, strict=True):
                if target is not None:
                    target.view_as(value).copy_(value)
        return found

    return call


def _forward(inputs: Any, norm: Any, **options: Any) -> tuple[Tensor, ...]:
    """y, h, mean and rstd."""
    if options["dropout"].seed is not None:
        raise NotImplementedError("set dropout to 0: the mask is made in the kernel alone")
    h = inputs.x if inputs.residual is None else inputs.x + inputs.residual
    wide = h.float()
    mean = wide.mean(-1)
    centered = wide - mean[..., None] if norm.center else wide
    rstd = (centered.square().mean(-1) + norm.eps).rsqrt()
    return norm_reference.normalise(h, inputs.weight, inputs.bias, norm), h, mean, rstd


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: Any,
    *others: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h, weight and bias, whatever is demanded."""
    dy = dy.float()
    d_bias = dy.flatten(0, -2).sum(0)
    if h is None:
        return None, None, None, d_bias
    of_rows = (*h.shape[:-1], 1)
    rstd = rstd.view(of_rows)
    normalised = (h.float() if mean is None else h.float() - mean.view(of_rows)) * rstd
    d_weight = (dy * normalised).flatten(0, -2).sum(0)
    g = dy if weight is None else dy * (weight.float() + norm.offset)
    dh = g - normalised * (g * normalised).mean(-1, keepdim=True)
    dh = dh - g.mean(-1, keepdim=True) if norm.center else dh
    dh = dh * rstd
    dh = dh if dsum is None else dh + dsum
    return dh, dh, d_weight, d_bias


_COMPUTED = {"forward": _forward, "backward": _backward}
