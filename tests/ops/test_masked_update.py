"""The AdamW update against fp64 truth, with hyper-parameters that tell formulas apart."""

from __future__ import annotations

import ctypes
import itertools
import math
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accuracy import assert_at_least_as_accurate, in_fp64, relative_error
from torch import Tensor

from progtuning_kernels import backend
from progtuning_kernels.ops import masked_update
from progtuning_kernels.ops.masked_update import reference
from progtuning_kernels.ops.masked_update.bucket import Bucket, Hyper, Moments, Step
from progtuning_kernels.ops.masked_update.low_precision import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    random_halves,
    residual_of,
    split_24_bits,
    stochastic_bfloat16,
    with_residual,
)
from progtuning_kernels.ops.masked_update.native import chunk_elements, tables_of
from progtuning_kernels.ops.masked_update.reference import one_minus_power

CPU = torch.device("cpu")
CSRC = Path(__file__).parents[2] / "csrc"
# lr and decay of 0.1, eps of 1e-3, step 7, scale 0.5: at the defaults, decay before and after the
# update differ by 1e-7 and a test cannot see which one is there
HYPER = dict(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
SIZES = [(1,), (63,), (255,), (257,), (17, 241), (0,), (2**16 + 3,)]

native_only = pytest.mark.skipif(
    backend.native_reason(CPU) is not None, reason=str(backend.native_reason(CPU))
)
both = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=native_only), "reference"]
)
# parameters, moments ("8bit": codes), what else is stored
PRECISIONS = [
    (torch.float32, torch.float32, ""),
    (torch.float32, torch.bfloat16, ""),
    (torch.float32, "8bit", ""),
    (torch.bfloat16, torch.float32, ""),
    (torch.bfloat16, torch.bfloat16, ""),
    (torch.bfloat16, "8bit", ""),
    (torch.bfloat16, torch.float32, "stochastic"),
    (torch.bfloat16, torch.bfloat16, "stochastic"),
    (torch.bfloat16, "8bit", "stochastic"),
    (torch.bfloat16, torch.float32, "master"),
    (torch.bfloat16, torch.bfloat16, "master"),
    (torch.bfloat16, "8bit", "master"),
    (torch.bfloat16, torch.float32, "residual"),
    (torch.bfloat16, torch.bfloat16, "residual"),
    (torch.bfloat16, "8bit", "residual"),
    (torch.float16, torch.float32, "master"),
    (torch.float16, torch.bfloat16, "master"),
    (torch.float16, "8bit", "master"),
    (torch.float64, torch.float64, ""),
]
every_precision = pytest.mark.parametrize(
    ("dtype", "moment_dtype", "extra"), PRECISIONS, ids=lambda x: str(x).removeprefix("torch.")
)


def draw(sizes, seed: int = 3) -> tuple[list[Tensor], ...]:
    """Parameters, gradients and both moments in fp32, of different scales."""
    generator = torch.Generator().manual_seed(seed)

    def some(scale: float) -> list[Tensor]:
        return [torch.randn(s, generator=generator) * scale for s in sizes]

    return some(1.0), some(0.3), some(0.1), [x.square() for x in some(0.1)]


def coded(m: Tensor, v: Tensor) -> Moments:
    halfway = torch.full(v.shape, 2**15)
    (m_code, m_scale), (v_code, v_scale) = encode_exp_avg(m), encode_exp_avg_sq(v, halfway)
    return Moments(m_code, v_code, m_scale, v_scale)


def make(
    dtype: torch.dtype,
    moment_dtype: torch.dtype | str,
    extra: str,
    implementation: str | None,
    sizes: Sequence[tuple[int, ...]] = SIZES,
    step: float = 6.0,
    **options,
) -> tuple[Bucket, list[Tensor]]:
    p, g, m, v = draw(sizes)
    torch.manual_seed(7)
    if moment_dtype == "8bit":  # small tensors keep fp32, in the same bucket
        moments = [
            coded(*mv) if mv[0].numel() >= 255 else Moments(*mv) for mv in zip(m, v, strict=True)
        ]
    else:
        moments = [
            Moments(a.to(moment_dtype), b.to(moment_dtype)) for a, b in zip(m, v, strict=True)
        ]
    masters = None
    if extra == "master":  # bits below those of p, which the master has and p lost
        masters = [x.to(dtype).float() * (1 + 2**-13) for x in p]
    elif extra == "residual":
        masters = [torch.randint_like(x, -128, 128).to(torch.int8) for x in p]
    bucket = Bucket(
        [x.to(dtype) for x in p],
        moments,
        [torch.tensor(step) for _ in sizes],
        masters=masters,
        indices=[5 * i + 2 for i in range(len(sizes))],
        stochastic_rounding=extra == "stochastic",
        implementation=implementation,
        **options,
    )
    return bucket, [x.to(dtype) for x in g]


def hypers() -> list[Hyper]:
    return [Hyper(0.1, 0.1, 1e-3, 0.8, 0.95)]


def wide(moments: Moments) -> tuple[Tensor, Tensor]:
    if moments.exp_avg_scale is None:
        return moments.exp_avg.double(), moments.exp_avg_sq.double()
    return (
        decode_exp_avg(moments.exp_avg, moments.exp_avg_scale).double(),
        decode_exp_avg_sq(moments.exp_avg_sq, moments.exp_avg_sq_scale).double(),
    )


def master_of(bucket: Bucket, i: int) -> Tensor:
    own = bucket.masters[i]
    return with_residual(bucket.params[i], own) if bucket.has_residuals else own


def truth(p, g, m, v, step: float, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = g * factor
    m = 0.8 * m + 0.2 * g
    v = 0.95 * v + 0.05 * g**2
    denominator = (v / (1 - 0.95**step)).sqrt() + 1e-3
    return p * (1 - 0.1 * 0.1) - 0.1 / (1 - 0.8**step) * m / denominator, m, v


def torchs(p, g, m, v, step: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch.optim.AdamW in p's dtype: what a user has in that precision."""
    p = torch.nn.Parameter(p.clone())
    p.grad = (g * factor).to(p.dtype)
    optimizer = torch.optim.AdamW(
        [p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, foreach=False
    )
    state = {"exp_avg": m.to(p.dtype), "exp_avg_sq": v.to(p.dtype)}
    optimizer.state[p] = {"step": torch.tensor(step - 1), **state}
    optimizer.step()
    return p, state["exp_avg"], state["exp_avg_sq"]


# an 8-bit code stands for its neighbourhood: half a step at 127 codes and a 4th power, a whole one
# (stochastic) at 255 codes and an 8th power, of what is large in a block
CODE_ERROR = {"m": 0.02, "v": 0.04}


@both
@every_precision
@pytest.mark.parametrize("factor", [None, 0.5])
def test_at_least_as_accurate_as_torch(implementation, dtype, moment_dtype, extra, factor):
    sizes = [*SIZES, (2**20 + 3,)] if implementation == "native" else SIZES
    bucket, grads = make(dtype, moment_dtype, extra, implementation, sizes)
    before = [
        in_fp64([p, g, *wide(m)])
        for p, g, m in zip(bucket.params, grads, bucket.moments, strict=True)
    ]
    stored = [p.clone() for p in bucket.params]
    for i, old in enumerate(before if extra in ("master", "residual") else []):
        old[0] = master_of(bucket, i).double()
    given = None if factor is None else torch.tensor(factor)
    bucket.update(grads, hypers(), grad_factor=given, seed=11)
    assert [step.item() for step in bucket.steps] == [7.0] * len(sizes)
    for i, (p, g, m, v) in enumerate(before):
        exact = truth(p, g, m, v, 7.0, factor or 1.0)
        plain = torchs(stored[i], grads[i].to(dtype), m, v, 7.0, factor or 1.0)
        size = tuple(p.shape)
        # two roundings: torch's decay and update are one each, ours one in all; stochastic rounding
        # may be off by a whole unit in the last place where the nearest is off by half
        roundings = 2.0 if extra != "stochastic" else 4.0
        new = bucket.params[i]
        assert_at_least_as_accurate(f"p of {size}", new, plain[0], exact[0], roundings=roundings)
        if bucket.masters is not None:
            error = relative_error(master_of(bucket, i), exact[0])
            # the last of 24 bits is rounded away from the nearest, too
            limit = 1e-6 if extra == "master" else 2**-15
            assert error <= limit, f"master of {size}: {error}"
        if bucket.moments[i].exp_avg_scale is None:
            for name, mine, theirs, x in zip(
                "mv", bucket.moments[i][:2], plain[1:], exact[1:], strict=True
            ):
                limit = 4.0 if mine.dtype == torch.bfloat16 else 2.0
                assert_at_least_as_accurate(
                    f"{name} of {size}", mine, theirs.to(mine.dtype), x, roundings=limit
                )
        else:
            for name, mine, x in zip("mv", wide(bucket.moments[i]), exact[1:], strict=True):
                assert relative_error(mine, x) < CODE_ERROR[name], f"{name} of {size}"


@native_only
@every_precision
def test_native_and_reference_draw_and_round_alike(dtype, moment_dtype, extra):
    ours, grads = make(dtype, moment_dtype, extra, "native", step=0.0)
    plain, _ = make(dtype, moment_dtype, extra, "reference", step=0.0)
    for _ in range(3):
        options = dict(grad_factor=torch.tensor(0.5), seed=2**40 + 7)
        ours.update(grads, hypers(), **options)
        with torch.no_grad():
            reference.update_plain(plain, grads, hypers(), Step(**options))
    for i in range(len(SIZES)):
        for mine, theirs in zip(ours.moments[i], plain.moments[i], strict=True):
            assert mine is theirs or torch.equal(mine, theirs)
        assert torch.equal(ours.steps[i], plain.steps[i])
        if dtype == torch.float64:  # torch's vectorised root of these is not correctly rounded
            torch.testing.assert_close(ours.params[i], plain.params[i], rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(ours.params[i], plain.params[i])
        if ours.masters is not None:
            assert torch.equal(ours.masters[i], plain.masters[i])


@both
@every_precision
def test_found_inf_changes_nothing_but_zeroes(implementation, dtype, moment_dtype, extra):
    bucket, grads = make(dtype, moment_dtype, extra, implementation)
    grads[1][5] = float("nan")
    everything = [*bucket.params, *bucket.steps, *(bucket.masters or [])]
    everything += [t for moments in bucket.moments for t in moments if t is not None]
    before = [t.clone() for t in everything]
    bucket.update(grads, hypers(), found_inf=torch.tensor(1.0), zero_grads=True)
    assert all(map(torch.equal, everything, before))
    assert not any(grad.any() for grad in grads)
    bucket.update(grads, hypers(), found_inf=torch.tensor(0.0))
    assert not torch.equal(bucket.params[0], before[0]) and bucket.steps[1] == 7


@both
def test_a_tensor_without_gradient_is_left_out(implementation):
    bucket, grads = make(torch.float32, torch.float32, "", implementation)
    before = [p.clone() for p in bucket.params]
    grads[2] = grads[5] = None  # the latter is empty
    bucket.update(grads, hypers(), zero_grads=True)
    assert torch.equal(bucket.params[2], before[2]) and not torch.equal(bucket.params[3], before[3])
    assert [int(step) for step in bucket.steps] == [7, 7, 6, 7, 7, 6, 7]
    assert not any(grad.any() for grad in grads if grad is not None)
    bucket.update([None] * len(grads), hypers(), zero_grads=True)  # other buckets may have some
    assert [int(step) for step in bucket.steps] == [7, 7, 6, 7, 7, 6, 7]


@both
def test_groups_and_steps_are_per_tensor(implementation):
    sizes = [(300,)] * 4
    bucket, grads = make(
        torch.float32, torch.float32, "", implementation, sizes, groups=[0, 1, 1, 0]
    )
    for step, value in zip(bucket.steps, (0.0, 6.0, 6.0, 99.0), strict=True):
        step.fill_(value)
    before = [
        in_fp64([p, g, *m[:2]])
        for p, g, m in zip(bucket.params, grads, bucket.moments, strict=True)
    ]
    no_decay = Hyper(0.05, 0.0, 1e-3, 0.8, 0.95)
    bucket.update(grads, [hypers()[0], no_decay])
    for i, step in enumerate((1.0, 7.0, 7.0, 100.0)):
        p, g, m, v = before[i]
        expected, _, new_v = truth(p, g, m, v, step)
        if i in (1, 2):
            _, m, _ = truth(p, g, m, v, step)
            expected = p - 0.05 / (1 - 0.8**step) * m / ((new_v / (1 - 0.95**step)).sqrt() + 1e-3)
        torch.testing.assert_close(bucket.params[i].double(), expected, rtol=1e-5, atol=1e-6)


@native_only
@every_precision
def test_alignment_and_threads_do_not_change_the_bits(dtype, moment_dtype, extra):
    sizes, results = [(70_003,), (257,)], []

    def unaligned(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].copy_(t.flatten()).view(t.shape)

    for threads, shift in ((1, False), (2, False), (7, True)):
        bucket, grads = make(dtype, moment_dtype, extra, "native", sizes)
        if shift:
            bucket = Bucket(
                [unaligned(p) for p in bucket.params],
                [Moments(*map(unaligned, moments)) for moments in bucket.moments],
                bucket.steps,
                masters=bucket.masters and [unaligned(m) for m in bucket.masters],
                indices=bucket.indices,
                stochastic_rounding=bucket.stochastic_rounding,
            )
            grads = [unaligned(grad) for grad in grads]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            bucket.update(grads, hypers(), seed=5)
        finally:
            torch.set_num_threads(before)
        results.append([*bucket.params, *(t for m in bucket.moments for t in m if t is not None)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


DRAW_SHIM = """
#include "random_run.h"
using namespace progtuning;
extern "C" bool draw(int version, uint64_t seed, uint64_t eighth, uint32_t tensor, uint32_t step,
                     uint16_t* random) {
  const RandomRun run{seed, eighth, RandomStream::kMoments, tensor, step};
  if (version == 0) {
    draw_run_plain(run, random);
    return true;
  }
#ifdef PROGTUNING_VERSIONS
  if (version == 1 && __builtin_cpu_supports("avx2")) {
    draw_run_avx2(run, random);
    return true;
  }
  if (version == 2 && __builtin_cpu_supports("avx512f")) {
    draw_run_avx512(run, random);
    return true;
  }
#endif
  return false;
}
"""
UPDATE_SHIM = """
#include "launchers.h"
using namespace progtuning;
extern "C" bool update(const UpdateRecord* table, int64_t count, void* const* grads, int param,
                       int moments, int master, bool stochastic, uint64_t seed) {
  const UpdateHyper hyper{0.1, 0.1, 1e-3, 0.8, 0.95, nullptr};
  const UpdateVariant variant{DType(param), DType(moments), Master(master), stochastic};
  const UpdateStep step{nullptr, nullptr, seed, false};
  return masked_update_cpu(table, count, grads, &hyper, variant, step, 1);
}
"""


def _compiled(folder: Path, name: str, source: str, *flags: str) -> subprocess.Popen:
    (folder / f"{name}.cpp").write_text(source)
    command = ["g++", "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno"]
    command += ["-ffp-contract=off", f"-I{CSRC}", *flags, f"{name}.cpp", "-o", f"{name}.so"]
    return subprocess.Popen(command, cwd=folder)


@native_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one version only")
def test_instruction_sets_do_not_change_the_bits(tmp_path):
    """The bodies for other processors than this one, which would never run here."""
    flags = Path("/proc/cpuinfo").read_text().split()
    one = ["-DPROGTUNING_ONE_ISA", str(CSRC / "masked_update_cpu.cpp")]
    builds = [
        _compiled(tmp_path, "draws", DRAW_SHIM),
        _compiled(tmp_path, "plain", UPDATE_SHIM, *one),
    ]
    names = ["plain"]
    if "avx2" in flags and "fma" in flags:
        names.append("avx2")
        builds.append(_compiled(tmp_path, "avx2", UPDATE_SHIM, "-mavx2", "-mfma", *one))
    assert not any(build.wait() for build in builds)

    draws = ctypes.CDLL(str(tmp_path / "draws.so")).draw
    kinds = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
    draws.argtypes, draws.restype = [*kinds, ctypes.c_void_p], ctypes.c_bool
    seed, index, step = 2**63 + 9, 2**32 - 2, torch.tensor(7.0)
    expected = random_halves(512, seed, "moments", index, step)[256:]
    for version in range(3):
        drawn = torch.zeros(256, dtype=torch.int16)
        if draws(version, seed, 32, index, 7, drawn.data_ptr()):
            assert torch.equal(drawn.to(torch.int64) & 0xFFFF, expected), version
    far = [torch.zeros(256, dtype=torch.int16) for _ in range(3)]  # beyond 2**32 eighths
    ran = [draws(v, seed, 2**37 + 2**32 - 32, 1, 2, far[v].data_ptr()) for v in range(3)]
    assert all(torch.equal(far[0], x) for x, there in zip(far, ran, strict=True) if there)

    for name in names:
        update = ctypes.CDLL(str(tmp_path / f"{name}.so")).update
        pointer, boolean = ctypes.c_void_p, ctypes.c_bool
        update.argtypes = [pointer, ctypes.c_int64, pointer, ctypes.c_int, ctypes.c_int]
        update.argtypes += [ctypes.c_int, boolean, ctypes.c_uint64]
        for dtype, moment_dtype, extra in PRECISIONS:
            ours, grads = make(dtype, moment_dtype, extra, "native")
            other, _ = make(dtype, moment_dtype, extra, "native")
            ours.update(grads, hypers(), seed=seed)
            records = tables_of(other).records
            addresses = torch.tensor(other.gather(grads).addresses)
            codes = map(backend.dtype_code, (dtype, other.moment_dtype))
            kind = (*codes, ("", "master", "residual").index(extra.replace("stochastic", "")))
            kind += (extra == "stochastic", seed)
            assert update(records.data_ptr(), len(grads), addresses.data_ptr(), *kind)
            for a, b in zip(ours.moments, other.moments, strict=True):
                assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True)), name
            assert all(map(torch.equal, ours.params, other.params)), (name, dtype, moment_dtype)
            assert all(map(torch.equal, ours.masters or [], other.masters or [])), name


@both
def test_views_with_gaps_and_transposed_gradients(implementation):
    """torch's fused kernel writes past such a view and reads such a gradient in memory order."""

    def check(p, g, m, v):
        exact = truth(*in_fp64([p, g, m, v]), 1.0)
        # a view with gaps is for the reference alone: asked of native, it says so
        whole = p.is_contiguous() or p.t().is_contiguous()
        chosen = implementation if whole and p.stride() == m.stride() else None
        masked_update([p], [g], [m], [v], [torch.zeros(())], **HYPER, implementation=chosen)
        for mine, x in zip((p, m, v), exact, strict=True):
            torch.testing.assert_close(mine, x.float(), rtol=1e-5, atol=1e-6)

    buffer = torch.randn(6, 8)
    around = buffer.clone()
    check(buffer[:, :3], torch.randn(3, 6).t(), torch.zeros(6, 3), torch.zeros(6, 3))
    assert torch.equal(buffer[:, 3:], around[:, 3:])

    whole = [torch.randn(6, 8).abs() for _ in range(4)]  # gaps in all four, at equal strides
    around = [x.clone() for x in whole]
    check(*(x[:, :3] for x in whole))
    assert all(torch.equal(x[:, 3:], y[:, 3:]) for x, y in zip(whole, around, strict=True))

    check(torch.randn(5, 5), torch.randn(5, 5).t(), torch.zeros(5, 5), torch.zeros(5, 5))
    grad = torch.randn(5, 5).t()
    bucket = Bucket(
        [torch.randn(5, 5)],
        [Moments(torch.zeros(5, 5), torch.zeros(5, 5))],
        [torch.zeros(())],
        implementation=implementation,
    )
    bucket.update([grad], hypers(), zero_grads=True)
    assert not grad.any()  # not the copy that the kernel read
    transposed = [torch.randn(4, 300).abs().t() for _ in range(3)]
    check(transposed[0], torch.randn(300, 4), transposed[1], transposed[2])


def test_chunks_on_cuda_fill_the_waves_of_thread_blocks():
    projections = [768 * 768] * 4 + [768 * 3072] * 2
    bert = projections + [768] * 9 + [3072]
    # H200, A100 and B200 run 6 blocks of float32 on each multiprocessor, H200 4 with 8-bit moments
    for slots, unit in ((6 * 132, 1024), (6 * 108, 1024), (6 * 148, 1024), (4 * 132, 2048)):
        chunk = chunk_elements(bert, slots, unit)
        assert sum(-(-size // chunk) for size in bert) <= slots  # one wave
        assert chunk <= 1.1 * sum(bert) / slots
    assert chunk_elements([8 * 768] * 48, 792, 1024) == 1024  # of a LoRA: as many blocks as can be
    assert chunk_elements([], 792, 2048) == 2048
    llama = chunk_elements([2048 * 8192] * 48, 792, 1024)
    blocks = 48 * -(-2048 * 8192 // llama)
    assert -(-blocks // 792) * llama <= 1.03 * 48 * 2048 * 8192 / 792


def test_a_view_with_gaps_is_not_for_native():
    wide_ones = [torch.zeros(6, 8)[:, :3] for _ in range(4)]
    reason = "a tensor with gaps" if backend.native_extension() else "the extension"
    with pytest.raises(RuntimeError, match=reason):
        masked_update(
            *([t] for t in wide_ones), [torch.zeros(())], **HYPER, implementation="native"
        )


def test_small_decay_is_not_lost():
    # lr * weight_decay = 1e-8: p * (1 - 1e-8) is p in fp32, however many steps are made
    zeros = torch.zeros(4, dtype=torch.float64)
    p = torch.full((4,), 3.0, dtype=torch.float64)
    hyper = dict(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=1e-4)
    masked_update([p], [zeros], [zeros.clone()], [zeros.clone()], [torch.zeros(())], **hyper)
    torch.testing.assert_close(p, torch.full_like(p, 3.0 * (1 - 1e-8)), rtol=1e-15, atol=0)


def test_bias_corrections_do_not_cancel():
    # 1 - powf(beta2, step) is off by 1e-5 here
    steps = torch.tensor([1.0, 2.0, 7.0, 100.0, 690.0, 5000.0, 1e6])
    for beta in (0.0, 0.8, 0.9, 0.95, 0.999, 0.9999):
        exact = torch.tensor(
            [-math.expm1(math.log(beta) * t) if beta else 1.0 for t in steps.tolist()]
        )
        torch.testing.assert_close(one_minus_power(beta, steps), exact, rtol=4e-7, atol=0)


def test_versions_are_bumped_so_that_autograd_notices():
    p = torch.ones(300, requires_grad=True)
    product = (p * p).sum()
    bucket = Bucket([p.detach()], [Moments(torch.zeros(300), torch.zeros(300))], [torch.zeros(())])
    bucket.update([torch.ones(300)], hypers())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_stochastic_rounding_is_unbiased_and_keeps_special_values():
    draws = 10**6
    for value in (1.0 + 2**-10, -3.14159, 1e-30, 65280.7):
        x = torch.full((draws,), value)
        random = random_halves(draws, 1, "param", 0, torch.tensor(1.0))
        rounded = stochastic_bfloat16(x, random).double()
        neighbours = rounded.unique()
        assert len(neighbours) == 2
        standard_error = rounded.std().item() / math.sqrt(draws)
        assert abs(rounded.mean().item() - x[0].item()) <= 4 * standard_error
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    everything = torch.full((5,), 0xFFFF)
    kept = stochastic_bfloat16(special, everything).float()
    assert kept[0].isnan() and torch.equal(kept[1:3], special[1:3])
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    assert stochastic_bfloat16(canonical, everything[:1]).isnan().all()


@both
def test_nan_and_infinity_survive_every_rounding(implementation):
    for moment_dtype, extra in itertools.product(
        (torch.bfloat16, "8bit"), ("stochastic", "residual")
    ):
        bucket, grads = make(torch.bfloat16, moment_dtype, extra, implementation, [(300,)])
        grads[0][3] = math.nan
        grads[0][290] = math.inf
        bucket.update(grads, hypers())
        assert bucket.params[0][3].isnan() and bucket.params[0][290].isnan()
        exp_avg, exp_avg_sq = wide(bucket.moments[0])
        assert not exp_avg_sq[3].isfinite() and not exp_avg_sq[290].isfinite()
        assert not exp_avg[3].isfinite() and not exp_avg[290].isfinite()


def test_24_bit_weights_are_as_exact_as_they_say():
    torch.manual_seed(0)
    x = torch.randn(20_000) * torch.logspace(-30, 30, 20_000)
    nearest = with_residual(*split_24_bits(x, torch.full(x.shape, 0x80)))
    assert ((nearest - x).double() / x.double()).abs().max() <= 2**-16
    p, residual = split_24_bits(x, torch.randint(0, 2**16, x.shape))
    joined = with_residual(p, residual)
    assert ((joined - x).double() / x.double()).abs().max() < 2**-15
    assert ((p.double() - joined.double()) / joined.double()).abs().max() <= 2**-8  # the nearest
    masters = with_residual(x.bfloat16(), residual_of(x.bfloat16(), x))
    assert ((masters - x).double() / x.double()).abs().max() < 2**-15  # ties go another way
    assert not residual_of(x.bfloat16() * 2, x).any()

    mean = split_24_bits(torch.full((2**16,), 1 + 2**-17), torch.arange(2**16))
    assert with_residual(*mean).double().mean() == 1 + 2**-17  # over all 16 bits exactly
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, math.nan])
    back = with_residual(*split_24_bits(special, torch.full(special.shape, 0x80)))
    assert torch.equal(back[:4], special[:4]) and back[5].isnan()
    assert back[4] == pytest.approx(3.4e38, rel=2**-16)
    stale = torch.tensor([-5, -7], dtype=torch.int8)  # of weights that were set to 0 since
    assert not with_residual(torch.tensor([0.0, -0.0]).bfloat16(), stale).any()


@both
def test_24_bit_weights_do_not_lose_tiny_updates(implementation):
    """1000 updates of 1e-5 of a weight: a bfloat16 stays where it is, fp32 masters are followed."""
    count, n = (1000, 4096) if implementation == "native" else (60, 512)
    torch.manual_seed(1)
    start = (torch.rand(n) + 0.5).bfloat16()
    gradient = torch.randn(n).sign().bfloat16()

    def trained(masters: list[Tensor] | None) -> Bucket:
        moments = Moments(torch.zeros(n), torch.zeros(n))
        bucket = Bucket(
            [start.clone()],
            [moments],
            [torch.zeros(())],
            masters=masters,
            implementation=implementation,
        )
        for _ in range(count):
            bucket.update([gradient], [Hyper(1e-5, 0.01, 1e-8, 0.9, 0.999)])
        return bucket

    exact = trained([start.float()]).masters[0].double()
    moved = (exact - start.double()).norm()
    assert torch.equal(trained(None).params[0], start)
    bucket = trained([torch.zeros(n, dtype=torch.int8)])
    error = master_of(bucket, 0).double() - exact
    # each update is off by less than 2^-15 of a weight, 0 on average: by the root of their number
    assert error.abs().max() < 5 * 2**-16 * math.sqrt(count) * 2
    assert error.norm() / moved < 0.15 * math.sqrt(1000 / count)
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(n)


def test_random_numbers_are_philox_and_independent():
    # Salmon et al.'s reference implementation, philox4x32-7, known answers
    from progtuning_kernels.ops.masked_update.low_precision import philox

    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = philox(0, (zero, zero, zero, zero))
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    words = philox(2**64 - 1, (ones, ones, ones, ones))
    assert [int(word) for word in words] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]

    step = torch.tensor(3.0)
    first = random_halves(10_000, 7, "param", 4, step)
    assert first.min() >= 0 and first.max() < 2**16
    assert torch.equal(first[:100], random_halves(100, 7, "param", 4, step))
    others = [
        random_halves(10_000, 8, "param", 4, step),
        random_halves(10_000, 7 + 2**32, "param", 4, step),
        random_halves(10_000, 7, "moments", 4, step),
        random_halves(10_000, 7, "param", 5, step),
        random_halves(10_000, 7, "param", 4, step + 1),
    ]
    for other in others:
        assert (first == other).float().mean() < 0.001
        pair = torch.stack((first, other)).double()
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.05


@both
def test_bfloat16_moments_fall_where_torchs_stay(implementation):
    """v decays by 1e-3 a step, half a unit in bfloat16's last place: the nearest never moves."""
    n, steps = 256, 3000
    hyper = [Hyper(1e-3, 0.0, 1e-8, 0.9, 0.999)]
    bucket = Bucket(
        [torch.zeros(n)],
        [Moments(torch.zeros(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16))],
        [torch.tensor(100.0)],
        implementation=implementation,
    )
    theirs = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([theirs], foreach=False)
    ones = torch.ones(n, dtype=torch.bfloat16)
    state = {"step": torch.tensor(100.0), "exp_avg": torch.zeros_like(ones), "exp_avg_sq": ones}
    optimizer.state[theirs] = state
    theirs.grad = torch.zeros_like(theirs)
    count = steps if implementation == "native" else 300
    for _ in range(count):
        bucket.update([torch.zeros(n)], hyper)
        optimizer.step()
    mean = bucket.moments[0].exp_avg_sq.double().mean().item()
    assert mean == pytest.approx(0.999**count, rel=0.05)
    assert state["exp_avg_sq"].eq(1.0).all()  # torch's own: off by a factor of 20 after 3000 steps


@both
def test_8bit_second_moments_fall_where_the_nearest_code_stays(implementation):
    count = 2000 if implementation == "native" else 200
    v = torch.ones(512)
    v[::2] = 2.0
    bucket = Bucket(
        [torch.zeros(512)],
        [coded(torch.zeros(512), v)],
        [torch.tensor(9.0)],
        implementation=implementation,
    )
    gradient = torch.zeros(512)
    gradient[::2] = math.sqrt(2.0)  # holds the largest of the block where it is
    for _ in range(count):
        bucket.update([gradient], [Hyper(0.0, 0.0, 1e-8, 0.9, 0.999)])
    fallen = wide(bucket.moments[0])[1][1::2].mean().item()
    assert fallen == pytest.approx(0.999**count, rel=0.15)


def test_8bit_codes_spread_over_many_orders_of_magnitude():
    magnitudes = torch.logspace(-6, 0, 256)
    m, v = magnitudes * (-1.0) ** torch.arange(256), magnitudes.square()
    moments = coded(m, v)
    decoded_m, decoded_v = (t.float() for t in wide(moments))
    assert torch.equal(decoded_m.sign(), m.sign())
    assert (decoded_m / m - 1).abs()[128:].max() < 0.2  # down to 1e-3 of the largest
    assert (decoded_v / v - 1).abs()[60:].max() < 0.6
    assert moments.exp_avg_sq.min() >= 1 and moments.exp_avg.max() <= 127
    # what is decoded has the same code again
    again = coded(decoded_m, decoded_v)
    assert torch.equal(again.exp_avg, moments.exp_avg)
    assert torch.equal(again.exp_avg_sq, moments.exp_avg_sq)


def test_triton_is_chosen_in_its_interpreter_and_says_why_not_elsewhere(monkeypatch):
    reason = "TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=reason):
        make(torch.float32, torch.float32, "", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bucket, _ = make(torch.float32, torch.float32, "", "triton")
    assert bucket.implementation.name == "triton"
    with pytest.raises(RuntimeError, match="no Triton kernel for torch.float64"):
        make(torch.float64, torch.float64, "", "triton")


def test_custom_op_and_compiled_code():
    def arguments():
        bucket, grads = make(torch.bfloat16, torch.bfloat16, "master", None, [(5,), (300,)])
        exp_avgs, exp_avg_sqs = ([m[i] for m in bucket.moments] for i in (0, 1))
        return (bucket.params, grads, exp_avgs, exp_avg_sqs, bucket.steps), bucket.masters

    lists, masters = arguments()
    hyper = (0.1, 0.1, 1e-3, 0.8, 0.95)
    rest = ([], [], masters, torch.tensor(0.5), None, hyper)
    torch.library.opcheck(torch.ops.progtuning.masked_update.default, (*lists, *rest))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(lists, masters):
        masked_update(*lists, masters=masters, grad_factor=torch.tensor(0.5), **HYPER)

    (ours, our_masters), (plain, plain_masters) = arguments(), arguments()
    compiled(ours, our_masters)
    masked_update(*plain, masters=plain_masters, grad_factor=torch.tensor(0.5), **HYPER)
    for mine, theirs in zip((*ours, our_masters), (*plain, plain_masters), strict=True):
        assert all(map(torch.equal, mine, theirs))


def test_empty_lists_and_bad_lists():
    masked_update([], [], [], [], [], **HYPER)
    one, step = [torch.zeros(3)], [torch.zeros(())]
    with pytest.raises(ValueError, match="lists differ in length"):
        masked_update(one, [], one, one, step, **HYPER)
    with pytest.raises(ValueError, match=r"a gradient of \(4,\)"):
        masked_update(one, [torch.zeros(4)], one, one, step, **HYPER)
    with pytest.raises(ValueError, match="shapes differ from the parameter's"):
        masked_update(one, one, [torch.zeros(4)], one, step, **HYPER)
    with pytest.raises(ValueError, match="several devices or dtypes"):
        masked_update(
            [torch.zeros(3), torch.zeros(3).double()],
            [torch.zeros(3), torch.zeros(3).double()],
            one * 2,
            one * 2,
            step * 2,
            **HYPER,
        )
    for name in ("grad_factor", "found_inf"):
        for wrong in (torch.zeros((), dtype=torch.bfloat16), torch.zeros(2)):
            with pytest.raises(ValueError, match=f"{name} is one float32 on cpu"):
                masked_update(one, one, one, one, step, **HYPER, **{name: wrong})
    codes, scale = torch.zeros(3, dtype=torch.int8), torch.zeros(1)
    for moments, extra, message in (
        ((one[0], one[0].double()), {}, "both moments of a tensor have one dtype"),
        ((codes, codes, scale, scale), {}, "int8 and uint8 codes"),
        ((codes, codes.to(torch.uint8), scale, scale[:0]), {}, "scale per 256 elements"),
        ((one[0], one[0]), {"masters": one}, "masters are for bfloat16 and float16"),
        (
            (one[0], one[0]),
            {"steps": [torch.zeros((), dtype=torch.int64)]},
            "steps and masters are",
        ),
        ((one[0], one[0]), {"masters": [codes]}, "residuals are for bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            Bucket(one, [Moments(*moments)], **{"steps": step, **extra})
    with pytest.raises(ValueError, match="moments of several dtypes"):
        Bucket(one * 2, [Moments(*one * 2), Moments(*[one[0].double()] * 2)], step * 2)
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        masked_update(one, one, one, one, step, **HYPER, stochastic_rounding=True)
    with pytest.raises(RuntimeError, match="float16 parameters without a master|the extension"):
        half = [torch.zeros(3).half()]
        masked_update(half, half, one, one, step, **HYPER, implementation="native")


@native_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": 0}, "no table"),
        ({"groups": []}, "tensor 0 is of a group that is not there"),
        ({"num_threads": 0}, "num_threads must be positive"),
        ({"variant": (2, 0, False, False)}, "no kernel for parameters of dtype code 2"),
        ({"variant": (0, 3, False, False)}, "with moments of code 3"),
        ({"variant": (0, 0, True, False)}, "and a master"),
    ],
)
def test_the_binding_refuses_what_it_can_see_is_wrong(change, message):
    bucket, grads = make(torch.float32, torch.float32, "", "native", [(3,)])
    records = tables_of(bucket).records
    arguments = dict(
        table=records.data_ptr(),
        grads=[grads[0].data_ptr()],
        groups=[(*hypers()[0], 0)],
        variant=(0, 0, False, False),
        step=(0, 0, 0, False),
        num_threads=1,
    )
    extension = backend.native_extension()
    assert extension.update_record_bytes == records.shape[1] * 8
    with pytest.raises(ValueError, match=message):
        extension.masked_update_cpu(*(arguments | change).values())
