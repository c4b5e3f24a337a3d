"""A bucket of active tensors and their state, and what a step brings; see README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backend
from .low_precision import QUANT_BLOCK

# more gradients do not fit into one launch's parameters: 32,764 bytes on every CUDA architecture
TENSORS_PER_LAUNCH, GROUPS_PER_LAUNCH = 4032, 8
_EMPTY = 16  # an address like that of any tensor: a multiple of 16


class Hyper(NamedTuple):
    """Hyper-parameters of one group: lr a float or a 0-dim tensor, the others floats."""

    lr: float | Tensor
    weight_decay: float
    eps: float
    beta1: float
    beta2: float


class Step(NamedTuple):
    """What a step brings beside gradients and hyper-parameters; see `Bucket.update`."""

    grad_factor: Tensor | None = None
    found_inf: Tensor | None = None
    seed: int = 0
    zero_grads: bool = False


@dataclass
class Gradients:
    """The gradients of a step for one bucket.

    Attributes:
        given: by the caller; None where there is none.
        ordered: the same, or copies, in their parameter's dtype and order of memory.
        addresses: where `ordered` lie; 0 where there is none.
        on_device: the addresses, for kernels that read them there.
    """

    given: Sequence[Tensor | None]
    ordered: Sequence[Tensor | None]
    addresses: list[int]
    on_device: Tensor | None = None


class Moments(NamedTuple):
    """Both moments of one tensor; scales (float32, one per 256 elements) where they are codes."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None


def _by_stride(t: Tensor) -> Tensor:
    if t.is_contiguous():
        return t
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True))


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    return _by_stride(t).is_contiguous()


def in_memory_order(t: Tensor) -> Tensor:
    """(n,) view of a dense tensor in the order of its memory; any other tensor as it is."""
    ordered = _by_stride(t)
    return ordered.view(-1) if ordered.is_contiguous() else t


def is_coded(moments: Moments) -> bool:
    """Whether the moments are 8-bit codes."""
    return moments.exp_avg_scale is not None


class Bucket:
    """Active tensors of one device and dtype, with their state: what one call updates.

    It is built once per stage, chooses the implementation, and holds references to everything whose
    address is in its tables, so that this memory is given to no other tensor.

    Args:
        params: of one device and dtype, any shapes.
        moments: one per parameter, of its shape; codes (int8 and uint8, with scales) and float32
            may be mixed.
        steps: 0-dim float32 on the same device, updates so far.
        masters: of the parameters' shapes: float32, or int8 residuals of bfloat16 parameters, which
            are then the upper 16 of 24 bits; None: none.
        indices: of the tensors in their optimizer, for the random numbers; None: 0, 1, ...
        groups: index into the `hypers` of a call, per parameter; None: all 0.
        stochastic_rounding: of bfloat16 parameters without master.
        implementation: force one instead of the first that can run.

    Raises:
        ValueError: a contract above is broken.
        RuntimeError: a forced implementation that cannot run, with its reason.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        moments: Sequence[Moments],
        steps: Sequence[Tensor],
        *,
        masters: Sequence[Tensor] | None = None,
        indices: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        stochastic_rounding: bool = False,
        implementation: str | None = None,
    ) -> None:
        self.params, self.moments, self.steps = list(params), list(moments), list(steps)
        self.masters = None if masters is None else list(masters)
        self.has_residuals = bool(self.masters) and self.masters[0].dtype == torch.int8
        self.indices = list(range(len(self.params)) if indices is None else indices)
        self.groups = [0] * len(self.params) if groups is None else list(groups)
        self.stochastic_rounding = stochastic_rounding
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        deciding = next(filter(is_coded, self.moments), self.moments[0])
        self.moment_dtype = deciding.exp_avg.dtype
        self._check()
        self.contiguous = all(p.is_contiguous() for p in self.params)
        # per tensor: element and state lie alike in one run of memory
        self.flat = [
            is_dense(p) and all(t.stride() == p.stride() for t in self._elementwise(i))
            for i, p in enumerate(self.params)
        ]
        self.addresses = [p.data_ptr() for p in self.params]
        self.implementation = backend.select(backend.OPS["masked_update"], self, implementation)
        self.tables: Any = None  # what the implementation keeps for a stage

    def _check(self) -> None:
        lengths = {len(self.moments), len(self.steps), len(self.indices), len(self.groups)}
        lengths |= set() if self.masters is None else {len(self.masters)}
        if lengths != {len(self.params)}:
            raise ValueError("masked_update: the lists differ in length")
        for i, p in enumerate(self.params):
            others = self._elementwise(i)
            if any(other.shape != p.shape for other in others):
                raise ValueError(
                    f"masked_update: shapes differ from the parameter's {tuple(p.shape)}"
                )
            if (p.device, p.dtype) != (self.device, self.dtype):
                raise ValueError("masked_update: parameters of several devices or dtypes")
            if any(t.device != self.device for t in (*others, self.steps[i])):
                raise ValueError("masked_update: state on another device than its parameter")
        self._check_dtypes()
        if self.stochastic_rounding and (self.dtype != torch.bfloat16 or self.masters is not None):
            raise ValueError(
                "masked_update: stochastic rounding is for bfloat16 parameters without a master"
            )

    def _check_dtypes(self) -> None:
        plain = {m.exp_avg.dtype for m in self.moments if not is_coded(m)}
        if any(m.exp_avg.dtype != m.exp_avg_sq.dtype for m in self.moments if not is_coded(m)):
            raise ValueError("masked_update: both moments of a tensor have one dtype")
        if any(map(is_coded, self.moments)):
            if plain - {torch.float32}:
                raise ValueError("masked_update: beside 8-bit moments there are only float32 ones")
            for m in filter(is_coded, self.moments):
                blocks = -(-m.exp_avg.numel() // QUANT_BLOCK)
                kinds = [(t.dtype, t.numel()) for t in (m.exp_avg_scale, m.exp_avg_sq_scale)]
                if (m.exp_avg.dtype, m.exp_avg_sq.dtype) != (torch.int8, torch.uint8) or (
                    kinds != [(torch.float32, blocks)] * 2
                ):
                    raise ValueError(
                        "masked_update: 8-bit moments are int8 and uint8 codes, with a float32 "
                        "scale per 256 elements each"
                    )
        elif len(plain) > 1:
            raise ValueError("masked_update: moments of several dtypes")
        kept = torch.int8 if self.has_residuals else torch.float32
        if any(t.dtype != torch.float32 for t in self.steps) or (
            any(t.dtype != kept for t in self.masters or [])
        ):
            raise ValueError("masked_update: steps and masters are float32, residuals int8")
        if self.has_residuals and self.dtype != torch.bfloat16:
            raise ValueError("masked_update: residuals are for bfloat16 parameters")
        if self.masters is not None and self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError("masked_update: masters are for bfloat16 and float16 parameters")

    def _elementwise(self, i: int) -> list[Tensor]:
        """The state of tensor i that has its shape."""
        state = [self.moments[i].exp_avg, self.moments[i].exp_avg_sq]
        return state if self.masters is None else [*state, self.masters[i]]

    def gather(self, grads: Sequence[Tensor | None]) -> Gradients:
        """Collect what norm and update need of a step's gradients, once for both.

        Args:
            grads: of the parameters' shapes, any strides and dtype; None leaves a tensor out.
        """
        if self.contiguous and all(
            grad is None or (grad.is_contiguous() and grad.dtype == self.dtype) for grad in grads
        ):
            ordered = grads
        else:
            ordered = [
                grad if grad is None else alike(grad, p)
                for p, grad in zip(self.params, grads, strict=True)
            ]
        # an empty gradient has no address; it gets one that is not 0 and is never read
        addresses = [0 if grad is None else grad.data_ptr() or _EMPTY for grad in ordered]
        return Gradients(grads, ordered, addresses)

    def update(
        self,
        grads: Gradients | Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        *,
        grad_factor: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int = 0,
        zero_grads: bool = False,
    ) -> None:
        """One update; see README.md.

        Args:
            grads: gathered, or as for `gather`.
            hypers: of the groups.
            grad_factor, found_inf: 0-dim float32 on the bucket's device; None: 1 and 0.
            seed: of the random numbers, 64 bits.
            zero_grads: leave zeros in the gradients.

        Raises:
            ValueError: grad_factor or found_inf of another dtype, device or size.
        """
        for name, t in (("grad_factor", grad_factor), ("found_inf", found_inf)):
            if t is not None and (t.dtype, t.device, t.numel()) != (torch.float32, self.device, 1):
                raise ValueError(
                    f"masked_update: {name} is one float32 on {self.device}, got {t.numel()} of "
                    f"{t.dtype} on {t.device}"
                )
        gradients = grads if isinstance(grads, Gradients) else self.gather(grads)
        step = Step(grad_factor, found_inf, seed, zero_grads)
        self.implementation.function(self, gradients, hypers, step)


def written(bucket: Bucket, gradients: Gradients, *, zero_grads: bool) -> None:
    """Zero the gradients of which a kernel of ours got a copy, and bump all versions."""
    changed = list(bucket.params)
    if zero_grads:
        for grad, mine in zip(gradients.given, gradients.ordered, strict=True):
            if mine is not grad:  # the kernel zeroed a copy
                grad.zero_()
        changed += [grad for grad in gradients.given if grad is not None]
    torch.autograd.graph.increment_version(changed)


def record_table(bucket: Bucket) -> Tensor:
    """(tensors, 9) int64 on the bucket's device: UpdateRecord in csrc/launchers.h."""
    records = []
    for i, (p, moments) in enumerate(zip(bucket.params, bucket.moments, strict=True)):
        master = None if bucket.masters is None else bucket.masters[i]
        state = (p, moments.exp_avg, moments.exp_avg_sq, master, *moments[2:], bucket.steps[i])
        addresses = [0 if t is None else t.data_ptr() for t in state]
        records.append([*addresses, p.numel(), bucket.indices[i] | bucket.groups[i] << 32])
    return backend.sent(torch.tensor(records, dtype=torch.int64, device="cpu"), bucket.device)


def chunk_table(bucket: Bucket, elements: int) -> Tensor:
    """(chunks, 2) int32 on the bucket's device: tensor, and chunk of so many elements of it."""
    counts = [-(-p.numel() // elements) for p in bucket.params]
    tensors = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))
    chunks = torch.cat([torch.arange(count, device="cpu") for count in counts])
    return backend.sent(torch.stack((tensors, chunks), dim=1).to(torch.int32), bucket.device)


def alike(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient in p's dtype and order of memory: itself, or else a copy."""
    same = grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous())
    if same and grad.dtype == p.dtype:
        return grad
    return torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad)
