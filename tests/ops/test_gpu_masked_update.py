"""masked_update on a GPU against the CPU, bit for bit, and the norm that decides on a step.

In this order a fault shows where it is cheapest to find; `-x` stops at the first, because a wrong
address leaves the process without a usable device.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, backend
from progtuning_kernels.ops import masked_norm
from progtuning_kernels.ops.masked_update import native
from progtuning_kernels.ops.masked_update.bucket import Bucket, Hyper, Moments
from progtuning_kernels.ops.masked_update.low_precision import encode_exp_avg, encode_exp_avg_sq

pytestmark = pytest.mark.gpu

SIZES = [1, 3, 255, 257, 4097, 8191, 8193, 2**20 + 3]
SEED = 2**63 + 12345
# of such size that formulas, groups and roundings differ visibly
HYPERS = [Hyper(0.1, 0.1, 1e-3, 0.8, 0.95), Hyper(0.01, 0.0, 1e-8, 0.0, 0.999)]
PRECISIONS = [
    (dtype, moments, extra)
    for dtype, extra in (
        (torch.float32, ""),
        (torch.bfloat16, ""),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "master"),
        (torch.float16, "master"),
    )
    for moments in (torch.float32, torch.bfloat16, torch.int8)
]
every_precision = pytest.mark.parametrize(
    "precision", PRECISIONS, ids=lambda p: "-".join(str(x).removeprefix("torch.") for x in p if x)
)
FLOAT32, EIGHT_BIT = PRECISIONS[0], PRECISIONS[5]


def module_of(implementation: Literal["native", "triton"]) -> ModuleType:
    return importlib.import_module(f"progtuning_kernels.ops.masked_update.{implementation}")


class Gpu:
    """What these tests ask of a GPU and its kernels; test_cuda_emulated.py has another, and
    test_masked_update_triton.py a third.
    """

    name = "cuda"

    def __init__(self, implementation: Literal["native", "triton"]) -> None:
        self.implementation = implementation

    def bucket(self, *args, **options) -> Bucket:
        return Bucket(*args, implementation=self.implementation, **options)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return masked_norm(tensors, implementation=self.implementation)

    def chunks(self, bucket: Bucket) -> Tensor:
        """The table of the norm's chunks, on the GPU from now on."""
        tables = module_of(self.implementation).tables_of(bucket)
        return tables.norm_chunks if self.implementation == "native" else tables.chunks

    def sums(self, bucket: Bucket, grads: Sequence[Tensor | None], partials: Tensor) -> None:
        """Sums of squares of the gradients' chunks."""
        sums(self.implementation, self.stream(), bucket, grads, partials)

    def decided(self, *args) -> None:
        decided(self.implementation, self.stream(), *args)

    def stream(self) -> int:
        return backend.cuda_stream(torch.device(self.name, torch.cuda.current_device()))

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """What replays a graph of `step`, whose kernels have been loaded before."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def sums(
    implementation: str, stream: int, bucket: Bucket, grads: Sequence[Tensor | None], out: Tensor
) -> None:
    gradients = bucket.gather(grads)
    if implementation == "triton":
        triton = module_of("triton")
        triton.launch_partials(bucket, triton.addresses_on_device(bucket, gradients), out)
        return
    dtype = backend.dtype_code(bucket.dtype)
    backend.native_extension().bucket_norm_partials_cuda(
        *(native.tables_of(bucket).for_norm(), gradients.addresses, dtype, out.data_ptr(), stream)
    )


def decided(
    implementation: str,
    stream: int,
    partials: Tensor,
    control: Tensor,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skip_nonfinite: bool,
) -> None:
    if implementation == "triton":
        given = (max_norm, skip_nonfinite, grad_scale, found_inf)
        module_of("triton").launch_decision(partials, control, *given)
        return
    optional = (0 if t is None else t.data_ptr() for t in (grad_scale, found_inf))
    backend.native_extension().norm_decision_cuda(
        *(partials.data_ptr(), len(partials), *optional, max_norm, skip_nonfinite),
        *(control.data_ptr(), stream),
    )


GPU = Gpu("native")


@pytest.fixture(autouse=True, params=["native", "triton"])
def on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with both kinds of kernels."""
    if request.param == "native" and (reason := backend.native_reason(torch.device("cuda", 0))):
        pytest.skip(reason)
    monkeypatch.setattr(sys.modules[__name__], "GPU", Gpu(request.param))
    monkeypatch.setenv("PROGTUNING_BACKEND", request.param)


@dataclass
class State:
    """Everything that an update reads and writes, for tensors of one precision."""

    params: list[Tensor]
    grads: list[Tensor | None]
    moments: list[Moments]
    steps: list[Tensor]
    masters: list[Tensor] | None
    stochastic: bool
    gpu: bool = False

    @classmethod
    def random(cls, precision, sizes: Sequence[int], seed: int = 0) -> State:
        dtype, moment_dtype, extra = precision
        generator = torch.Generator().manual_seed(seed)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(n, generator=generator) * scale for n in sizes]

        moments = []
        for m, v in zip(draw(0.1), [x.square() for x in draw(0.1)], strict=True):
            if moment_dtype == torch.int8:
                halfway = torch.full(v.shape, 2**15)
                (m, m_scale), (v, v_scale) = encode_exp_avg(m), encode_exp_avg_sq(v, halfway)
                moments.append(Moments(m, v, m_scale, v_scale))
            else:
                moments.append(Moments(m.to(moment_dtype), v.to(moment_dtype)))
        params = draw(1.0)
        return cls(
            params=[p.to(dtype) for p in params],
            grads=[g.to(dtype) for g in draw(0.3)],
            moments=moments,
            steps=[torch.tensor(float(3 * i % 50)) for i in range(len(sizes))],
            masters=params if extra == "master" else None,
            stochastic=extra == "stochastic",
        )

    def mapped(self, f: Callable[[Tensor], Tensor]) -> State:
        def each(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else f(t) for t in tensors]

        return State(
            each(self.params),
            each(self.grads),
            [Moments(*each(m)) for m in self.moments],
            each(self.steps),
            None if self.masters is None else each(self.masters),
            self.stochastic,
            self.gpu,
        )

    def on_gpu(self) -> State:
        return replace(self.mapped(lambda t: t.to(GPU.name, copy=True)), gpu=True)

    def bucket(self) -> Bucket:
        make = GPU.bucket if self.gpu else partial(Bucket, implementation="native")
        return make(
            self.params,
            self.moments,
            self.steps,
            masters=self.masters,
            indices=[5 * i + 2 for i in range(len(self.params))],
            groups=[i % len(HYPERS) for i in range(len(self.params))],
            stochastic_rounding=self.stochastic,
        )

    def named(self) -> Iterator[tuple[str, Tensor]]:
        lists = [("param", self.params), ("step", self.steps), ("master", self.masters or [])]
        lists += [(field, [getattr(m, field) for m in self.moments]) for field in Moments._fields]
        for name, tensors in lists:
            for i, t in enumerate(tensors):
                if t is not None:
                    yield f"{name} {i}", t


def assert_same(one: State, other: State) -> None:
    """Every bit; of p and its master a last place where a GPU's native kernels take approximate
    roots for codes.
    """
    approximate = one.gpu != other.gpu and any(m.exp_avg_scale is not None for m in one.moments)
    approximate = approximate and GPU.implementation == "native"
    for (name, a), (_, b) in zip(one.named(), other.named(), strict=True):
        if approximate and name.startswith(("param", "master")):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(b.cpu(), a.cpu(), rtol=eps, atol=max(eps, 1e-6), msg=name)
        else:
            assert torch.equal(a.cpu(), b.cpu()), name


def number(x: float) -> Tensor:
    return torch.tensor(x, device=GPU.name)


def updated(state: State, updates: int = 3, **step) -> State:
    bucket = state.bucket()
    for _ in range(updates):
        bucket.update(state.grads, HYPERS, seed=SEED, **step)
    return state


@every_precision
@pytest.mark.parametrize("n", SIZES)
def test_every_precision_and_size_equals_the_cpu(precision, n):
    cpu = State.random(precision, [n])
    gpu = cpu.on_gpu()
    factor = number(0.7)
    assert_same(updated(cpu, grad_factor=factor.cpu()), updated(gpu, grad_factor=factor))
    for state in (cpu, gpu):  # the second of them has no gradient left
        updated(state, updates=2, zero_grads=True)
        assert not state.grads[0].any()
    assert_same(cpu, gpu)


@every_precision
def test_every_pointer_may_lie_askew(precision):
    """One at a time; nothing in front of or behind the tensor is written."""
    sizes = [4097, 8192, 9001]
    expected = updated(State.random(precision, sizes).on_gpu())
    buffers: list[tuple[Tensor, int]] = []

    def askew(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 2,), 77, dtype=t.dtype, device=GPU.name)
        buffers.append((buffer, t.numel()))
        return buffer[1:-1].copy_(t)

    for pointer in ("params", "grads", "exp_avg", "exp_avg_sq", "masters"):
        state = State.random(precision, sizes).on_gpu()
        if pointer == "masters" and state.masters is None:
            continue
        buffers.clear()
        if pointer.startswith("exp"):
            moments = [m._replace(**{pointer: askew(getattr(m, pointer))}) for m in state.moments]
            state = replace(state, moments=moments)
        else:
            state = replace(state, **{pointer: [askew(t) for t in getattr(state, pointer)]})
        assert_same(updated(state), expected)
        for buffer, n in buffers:
            assert buffer[0] == 77 and buffer[n + 1] == 77, pointer
        updated(state, zero_grads=True)
        assert not any(g.any() for g in state.grads)
        for buffer, n in buffers:
            assert buffer[0] == 77 and buffer[n + 1] == 77, pointer


@pytest.mark.parametrize("count", [1, 448, 449, 4032])
def test_tensors_of_one_launch(count):
    cpu = State.random(FLOAT32, [i % 11 for i in range(count)])
    gpu = cpu.on_gpu()
    assert_same(updated(cpu), updated(gpu))


def test_more_than_a_launch_takes_is_refused():
    if GPU.implementation != "native":
        pytest.skip("no limit: addresses and groups lie in memory")
    with pytest.raises(ValueError, match="4033 tensors, a launch takes 4032"):
        updated(State.random(FLOAT32, [1] * 4033).on_gpu())
    state = State.random(FLOAT32, [3]).on_gpu()
    with pytest.raises(ValueError, match="9 groups, a launch takes 8"):
        state.bucket().update(state.grads, HYPERS[:1] * 9)


@pytest.mark.parametrize("precision", [FLOAT32, EIGHT_BIT], ids=str)
def test_programs_of_several_blocks(precision):
    """Of 24 M elements a program of Triton takes 8 blocks, of the first tensor's end fewer."""
    cpu = State.random(precision, [12_001_000, 12_000_007, 3])
    gpu = cpu.on_gpu()
    assert_same(updated(cpu, updates=1), updated(gpu, updates=1))
    torch.testing.assert_close(GPU.norm(gpu.grads).cpu(), masked_norm(cpu.grads))


def test_eight_bit_and_float32_moments_in_one_bucket():
    cpu = State.random(EIGHT_BIT, [8193, 300])
    plain = State.random(FLOAT32, [8193, 300])
    cpu.moments[1] = plain.moments[1]
    gpu = cpu.on_gpu()
    assert_same(updated(cpu), updated(gpu))


def test_tensors_without_gradient_are_left_out():
    cpu = State.random(EIGHT_BIT, [3, 8193, 0, 20_000, 255, 0])
    cpu.grads[1] = cpu.grads[2] = cpu.grads[4] = None
    gpu = cpu.on_gpu()
    assert_same(updated(cpu), updated(gpu))
    assert [s.item() for s in gpu.steps] == [3.0, 3.0, 6.0, 12.0, 12.0, 18.0]


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0]])
def test_empty_tensors_have_steps_too(sizes):
    gpu = updated(State.random(FLOAT32, sizes).on_gpu(), updates=2)
    assert [s.item() for s in gpu.steps] == [3 * i + 2 for i in range(len(sizes))]


@every_precision
def test_found_inf_skips_and_gradients_become_zero_all_the_same(precision):
    before = State.random(precision, [3, 8193])
    for zero_grads in (False, True):
        gpu = before.on_gpu()
        gpu.grads[1][8000] = math.nan
        updated(gpu, found_inf=number(1.0), zero_grads=zero_grads)
        assert_same(gpu, before)
        assert any(g.any() for g in gpu.grads) != zero_grads
    updated(gpu, found_inf=number(0.0), zero_grads=True)
    assert [s.item() for s in gpu.steps] == [s.item() + 3 for s in before.steps]


def test_lr_on_the_device():
    cpu = State.random(FLOAT32, [8193, 5])
    gpu = cpu.on_gpu()
    updated(cpu)
    lr = number(HYPERS[0].lr)
    for _ in range(3):
        gpu.bucket().update(gpu.grads, [HYPERS[0]._replace(lr=lr), HYPERS[1]], seed=SEED)
    assert_same(cpu, gpu)


def test_runs_on_the_current_stream():
    cpu = State.random(FLOAT32, [50_000])
    gpu = cpu.on_gpu()
    gradient = gpu.grads[0].clone()
    gpu.grads[0].zero_()
    bucket = gpu.bucket()
    GPU.chunks(bucket)
    if GPU.implementation == "triton":  # loads the kernels, which may wait for the device
        updated(gpu.on_gpu(), updates=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # about 100 ms of work in front: an update on another stream would still see zeros
        torch.cuda._sleep(200_000_000)
        gpu.grads[0].copy_(gradient)
        bucket.update(gpu.grads, HYPERS, seed=SEED)
    stream.synchronize()
    assert_same(updated(cpu, updates=1), gpu)


class Decision:
    """The norm of a bucket's gradients and what it means, in two launches."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.partials = torch.full((len(GPU.chunks(bucket)),), math.nan, device=GPU.name)
        self.control = torch.zeros(4, device=GPU.name)

    def sums(self, grads: Sequence[Tensor | None]) -> Tensor:
        GPU.sums(self.bucket, grads, self.partials)
        return self.partials

    def decide(self, max_norm: float, grad_scale=None, found_inf=None, skip=True) -> Tensor:
        GPU.decided(self.partials, self.control, max_norm, grad_scale, found_inf, skip)
        return self.control


@pytest.mark.parametrize("precision", [PRECISIONS[0], PRECISIONS[3], PRECISIONS[12]], ids=str)
def test_a_buckets_norm_is_masked_norm(precision):
    gpu = State.random(precision, [0, 1, 8193, 300, 70_001]).on_gpu()
    gpu.grads[3] = torch.cat([gpu.grads[3], gpu.grads[3]])[1:301]  # one element askew
    decision = Decision(gpu.bucket())
    every = decision.sums(gpu.grads).clone()
    norm = decision.decide(max_norm=0.0)[0]
    assert torch.equal(norm, GPU.norm(gpu.grads))
    some = decision.sums([*gpu.grads[:2], None, *gpu.grads[3:]])
    tensors = GPU.chunks(decision.bucket)[:, 0]
    assert torch.equal(some, torch.where(tensors == 2, 0.0, every))


@pytest.mark.parametrize("largest", [3.0, math.inf, math.nan])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("grad_scale", [None, 4.0])
@pytest.mark.parametrize("max_norm", [0.0, 2.0, 1e9])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_the_decision_is_that_of_torch(largest, found_inf, grad_scale, max_norm, skip_nonfinite):
    partials = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 1
    partials[1234] = largest
    norm = partials.double().sum().sqrt().float() / (grad_scale or 1.0)
    clip = (torch.tensor(max_norm) / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones(())
    skip = bool(found_inf) or (skip_nonfinite and not math.isfinite(largest))
    expected = torch.stack([norm, clip / (grad_scale or 1.0), torch.tensor(float(skip))])
    control = torch.tensor([math.nan, math.nan, math.nan, 5.0], device=GPU.name)
    given = (None if x is None else number(x) for x in (grad_scale, found_inf))
    GPU.decided(partials.to(GPU.name), control, max_norm, *given, skip_nonfinite)
    torch.testing.assert_close(control[:3].cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert control[3] == 5 + skip


def test_tiny_gradients_are_clipped_by_torchs_formula():
    """The norm is 2e-6, and 1e-6 is added to it."""
    partials = torch.full((4,), 1e-12, device=GPU.name)
    control = torch.zeros(4, device=GPU.name)
    GPU.decided(partials, control, 1e-6, None, None, True)
    torch.testing.assert_close(control[1].item(), 1 / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
def test_a_list_of_norms_stays_what_it_was(nonfinite):
    """Every step writes its norm to the same place."""
    own = [nn.Parameter(torch.ones(n, device=GPU.name)) for n in (3, 300)]
    optimizer = MaskedAdamW(own, max_grad_norm=1.0, nonfinite=nonfinite)
    norms = []
    for step in range(3):
        for p in own:
            p.grad = torch.full_like(p, step + 1.0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert optimizer._control is not None  # a kernel has decided
    expected = math.sqrt(303) * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(torch.stack(norms).cpu(), expected)


@pytest.mark.captures
@pytest.mark.parametrize("tensors", [3, 449])
@pytest.mark.parametrize("precision", [FLOAT32, PRECISIONS[7], EIGHT_BIT], ids=str)
def test_graph_replays_with_new_values(precision, tensors):
    """Clip and update in a graph; lr, scale, found_inf and gradients change between replays."""
    sizes = [3, 8193, 50_000] + [5] * (tensors - 3)
    cpu = State.random(precision, sizes)
    gpu = cpu.on_gpu()
    warm = gpu.on_gpu()
    lr, scale, found_inf = number(0.1), number(1.0), number(0.0)

    def step(state: State, bucket: Bucket, decision: Decision) -> None:
        decision.sums(state.grads)
        control = decision.decide(1.5, scale, found_inf)
        given = [h._replace(lr=lr) for h in HYPERS]
        bucket.update(state.grads, given, grad_factor=control[1], found_inf=control[2], seed=SEED)

    buckets = [state.bucket() for state in (warm, gpu)]
    decisions = [Decision(bucket) for bucket in buckets]
    step(warm, buckets[0], decisions[0])  # kernels are loaded outside the capture
    replay_graph = GPU.captured(lambda: step(gpu, buckets[1], decisions[1]))
    bucket, control = cpu.bucket(), decisions[1].control

    skipped = 0
    for replay in range(20):
        lr.fill_(0.1 / (replay + 1))
        scale.fill_(2.0**replay)
        found_inf.fill_(float(replay == 11))
        gradients = State.random(precision, sizes, seed=replay).grads
        if replay == 5:
            gradients[1][8192] = math.nan
        for mine, theirs, gradient in zip(cpu.grads, gpu.grads, gradients, strict=True):
            mine.copy_(gradient)
            theirs.copy_(gradient)
        replay_graph()
        given = [h._replace(lr=lr.item()) for h in HYPERS]
        factor, skip = control[1].cpu(), control[2].cpu()
        bucket.update(cpu.grads, given, grad_factor=factor, found_inf=skip, seed=SEED)
        skipped += replay in (5, 11)
        assert control[3] == skipped and skip == (replay in (5, 11)), f"replay {replay}"
    assert_same(cpu, gpu)
