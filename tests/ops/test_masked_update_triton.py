"""masked_update in Triton: the reference's bits in the interpreter, and compiled for four GPUs.

TRITON_INTERPRET counts only where it is set before triton is imported, so the functions named
check_* run in one process of their own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from types import FunctionType

import pytest
import test_gpu_masked_update as on_a_gpu
import torch
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from torch import Tensor
from triton_builds import ARCHITECTURES, compile_for, resources

from progtuning_kernels import MaskedAdamW, backend
from progtuning_kernels.ops import masked_norm
from progtuning_kernels.ops.masked_update import grad_decision, low_precision
from progtuning_kernels.ops.masked_update.bucket import Bucket, Hyper, Moments, Step, record_table
from progtuning_kernels.ops.masked_update.reference import one_minus_power, update_plain

triton = pytest.importorskip("triton")

from progtuning_kernels.ops.masked_norm import triton as masked_norm_triton  # noqa: E402  (needs triton)
from progtuning_kernels.ops.masked_update import triton as mut  # noqa: E402  (needs triton)

# lr and decay of 0.1, eps of 1e-3: at the defaults, other orders of the formula differ by 1e-7
HYPERS = [Hyper(0.1, 0.1, 1e-3, 0.8, 0.95), Hyper(0.03, 0.2, 1e-2, 0.9, 0.99)]
SEED = 0x9E3779B97F4A7C15  # both words, and negative as int64
SIZES = (0, 1, 63, 255, 257, 4097)
UNALIGNED_SIZES = (1, 2049)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
PARAMS = {  # stored as, with a master, rounded stochastically
    "float32": (FLOAT32, False, False),
    "bfloat16": (BFLOAT16, False, False),
    "bfloat16-stochastic": (BFLOAT16, False, True),
    "bfloat16-master": (BFLOAT16, True, False),
    "float16-master": (FLOAT16, True, False),
}
MOMENTS = ("float32", "bfloat16", "8bit")


def _bucket(
    params: str, moments: str, sizes=SIZES, shift: int = 0, device: str = "cpu"
) -> tuple[Bucket, list[Tensor]]:
    """The same at every call. shift: elements by which everything is off its alignment."""
    dtype, master, stochastic = PARAMS[params]
    generator = torch.Generator().manual_seed(3)

    def stored(x: Tensor, kind: torch.dtype) -> Tensor:
        return torch.empty(x.numel() + shift, dtype=kind, device=device)[shift:].copy_(x)

    def draw(size: int, scale: float) -> Tensor:
        return torch.randn(size, generator=generator) * scale

    states = []
    for i, size in enumerate(sizes):
        m, v = draw(size, 0.1), draw(size, 0.1).square()
        if moments == "8bit" and i % 3 != 1:  # float32 moments in between, as in small tensors
            random = torch.randint(0, 65536, (size,), generator=generator)
            m, m_scale = low_precision.encode_exp_avg(m)
            v, v_scale = low_precision.encode_exp_avg_sq(v, random)
            scales = m_scale.to(device), v_scale.to(device)
            states.append(Moments(stored(m, m.dtype), stored(v, v.dtype), *scales))
        else:
            kind = BFLOAT16 if moments == "bfloat16" else FLOAT32
            states.append(Moments(stored(m, kind), stored(v, kind)))
    exact = [draw(size, 1.0) for size in sizes]
    bucket = Bucket(
        [stored(p, dtype) for p in exact],
        states,
        [torch.tensor(6.0 * (i % 2), device=device) for i in range(len(sizes))],  # steps 1 and 7
        masters=[stored(p, FLOAT32) for p in exact] if master else None,
        indices=[7 * i + 3 for i in range(len(sizes))],
        groups=[i // 2 % 2 for i in range(len(sizes))],
        stochastic_rounding=stochastic,
        implementation="reference",
    )
    return bucket, [stored(draw(size, 0.3), dtype) for size in sizes]


def _state(bucket: Bucket) -> dict[str, Tensor]:
    named = {}
    for i, moments in enumerate(bucket.moments):
        master = None if bucket.masters is None else bucket.masters[i]
        tensors = {"param": bucket.params[i], "master": master, "step": bucket.steps[i]}
        for name, tensor in {**tensors, **moments._asdict()}.items():
            if tensor is not None:
                named[f"{name} {i}"] = tensor
    return named


def _copies(bucket: Bucket) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _state(bucket).items()}


def _assert_equal(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            mine[name].cpu(), tensor, rtol=0, atol=0, equal_nan=True, msg=name
        )


def _plain(bucket, grads, hypers=HYPERS, *, grad_factor=None, found_inf=None, seed=SEED) -> None:
    """The specification."""
    update_plain(bucket, grads, hypers, Step(grad_factor, found_inf, seed))


def _update(bucket, grads, hypers=HYPERS, **keywords) -> None:
    mut.update(bucket, bucket.gather(grads), hypers, Step(**{"seed": SEED, **keywords}))


def _compare_with(
    params: str, moments: str, sizes: tuple[int, ...], shift: int, device: str = "cpu"
) -> None:
    mine, grads = _bucket(params, moments, sizes, shift, device)
    theirs, same = _bucket(params, moments, sizes, shift)
    factor = torch.tensor(0.5)
    _plain(theirs, same, grad_factor=factor)
    _update(mine, grads, grad_factor=factor.to(device), zero_grads=True)
    _assert_equal(_state(mine), _state(theirs))
    assert not any(grad.any() for grad in grads)


def _compare_where_gradients_are_missing(device: str = "cpu") -> None:
    sizes = [3] * (mut.TENSORS + 2)  # two programs of prepare_kernel
    mine, grads = _bucket("bfloat16", "float32", sizes, device=device)
    theirs, same = _bucket("bfloat16", "float32", sizes)
    for each in (grads, same):
        each[2:-1] = [None] * (len(sizes) - 3)
    before = _copies(mine)
    versions = [p._version for p in mine.params]
    _plain(theirs, same)
    _update(mine, grads, zero_grads=True)
    _assert_equal(_state(mine), _state(theirs))
    assert torch.equal(mine.params[2], before["param 2"]) and mine.steps[2] == before["step 2"]
    assert all(p._version == v + 1 for p, v in zip(mine.params, versions, strict=True))

    empty, grads = _bucket("float32", "float32", (0,), device=device)
    _update(empty, grads)
    assert empty.steps[0] == 1


def _compare_where_a_step_is_skipped(found: float, zero_grads: bool, device: str = "cpu") -> None:
    bucket, grads = _bucket("bfloat16-stochastic", "8bit", (5, 700, 2048), device=device)
    grads[1][5] = math.nan
    before, copies = _copies(bucket), [grad.clone() for grad in grads]
    found_inf = torch.tensor(found, device=device)
    _update(bucket, copies, found_inf=found_inf, zero_grads=zero_grads)
    _assert_equal(_state(bucket), {name: tensor.cpu() for name, tensor in before.items()})
    for grad, copy in zip(grads, copies, strict=True):
        expected = torch.zeros_like(grad) if zero_grads else grad
        torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)


class InterpretedGpu:
    """For the tests of test_gpu_masked_update.py: tensors stay on the CPU."""

    name, implementation = "cpu", "triton"

    def bucket(self, *args, **options) -> Bucket:
        bucket = Bucket(*args, implementation="reference", **options)
        bucket.implementation = backend.Implementation("triton", mut.update, decide=mut.decide)
        return bucket

    def norm(self, tensors: list[Tensor]) -> Tensor:
        return masked_norm(tensors, implementation="triton")

    def chunks(self, bucket: Bucket) -> Tensor:
        return mut.tables_of(bucket).chunks

    def sums(self, *args) -> None:
        on_a_gpu.sums("triton", 0, *args)

    def decided(self, *args) -> None:
        on_a_gpu.decided("triton", 0, *args)


@pytest.fixture
def interpreted_gpu(monkeypatch):
    """In the place of the GPU, as far as the optimizer asks, too."""

    def control_on(optimizer: MaskedAdamW, device: torch.device) -> Tensor:
        if optimizer._control is None:
            optimizer._control = torch.full((4,), math.nan)
            optimizer._control[3] = 0
        return optimizer._control

    monkeypatch.setattr(on_a_gpu, "GPU", InterpretedGpu())
    monkeypatch.setattr(grad_decision, "_decided_on_device", lambda buckets: True)
    monkeypatch.setattr(MaskedAdamW, "_control_on", control_on)
    monkeypatch.setenv("PROGTUNING_BACKEND", "triton")


def _check(name: str) -> Callable[..., None]:
    """A test of test_gpu_masked_update.py in the interpreter, with its own parameters."""
    test = getattr(on_a_gpu, f"test_{name}")
    # a function of its own, so that the mark is not on the other as well
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__)
    copy.pytestmark = list(getattr(test, "pytestmark", []))
    return pytest.mark.usefixtures("interpreted_gpu")(copy)


check_a_buckets_norm_is_masked_norm = _check("a_buckets_norm_is_masked_norm")
check_the_decision_is_that_of_torch = _check("the_decision_is_that_of_torch")
check_tiny_gradients_are_clipped_by_torchs_formula = _check(
    "tiny_gradients_are_clipped_by_torchs_formula"
)
check_a_list_of_norms_stays_what_it_was = _check("a_list_of_norms_stays_what_it_was")


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("params", PARAMS)
def check_bits_of_the_reference(params, moments):
    _compare_with(params, moments, SIZES, 0)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
@pytest.mark.parametrize("params", ["float32", "bfloat16-stochastic", "float16-master"])
def check_bits_of_the_reference_at_other_alignments(params, moments):
    _compare_with(params, moments, UNALIGNED_SIZES, 1)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("params", "moments"),
    [("float32", "float32"), ("bfloat16-stochastic", "8bit"), ("float16-master", "bfloat16")],
)
def check_bits_of_the_reference_in_programs_of_several_blocks(params, moments, shift, monkeypatch):
    monkeypatch.setattr(masked_norm_triton, "_PROGRAMS", 2)
    assert mut.blocks_per_program(11) == 4
    _compare_with(params, moments, (5001, 0, 4500, 300), shift)
    _compare_where_a_step_is_skipped(1.0, True)


def check_a_tensor_without_gradient_is_left_out():
    _compare_where_gradients_are_missing()


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("found", [1.0, math.nan])
def check_found_inf_changes_nothing(found, zero_grads):
    _compare_where_a_step_is_skipped(found, zero_grads)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("params", ["float32", "bfloat16-stochastic"])
def check_nan_and_infinity_stay(params, moments):
    (mine, grads), (theirs, _) = (_bucket(params, moments, (300, 2048)) for _ in range(2))
    grads[0][7], grads[1][9] = math.nan, math.inf
    if params == "float32":
        grads[0].view(torch.int32)[7] = 0x7FFFFFFF  # CUDA's NaN: a carry would give -0.0
    for bucket, run in ((theirs, _plain), (mine, _update)):
        run(bucket, grads, found_inf=torch.tensor(0.0))
    _assert_equal(_state(mine), _state(theirs))
    assert mine.params[0].isnan().sum() == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where float16 ends
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def check_nearest_rounding_of_ties_subnormals_and_large_numbers(dtype):
    """A master that does not change (lr 0) is rounded as torch rounds it."""
    halfway = torch.arange(1, 2**15, 64, dtype=torch.int32) << 16 | 0x8000
    odd = torch.arange(2**15 - 1, 0, -64, dtype=torch.int32) << 16 | 0x8000
    bits = torch.cat([halfway, odd, halfway + 1, halfway - 1, halfway >> 3 << 12 | 0x1000])
    floats = bits.view(FLOAT32)
    floats = torch.cat([floats[floats.isfinite()], torch.tensor([65504.0, 65519.0, 65520.0, 6e-8])])
    floats = torch.cat([floats, -floats])
    zeros = torch.zeros_like(floats)
    bucket = Bucket(
        [zeros.to(dtype)],
        [Moments(zeros.clone(), zeros.clone())],
        [torch.zeros(())],
        masters=[floats.clone()],
        implementation="reference",
    )
    _update(bucket, [zeros.to(dtype)], [Hyper(0.0, 0.0, 1e-3, 0.9, 0.99)])
    assert torch.equal(bucket.masters[0], floats)
    assert torch.equal(bucket.params[0], floats.to(dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def check_what_lies_behind_the_end_is_in_no_block():
    bucket, grads = _bucket("float32", "8bit", (300,))
    _update(bucket, [grad.abs() + 1 for grad in grads], grad_factor=torch.tensor(math.inf))
    moments = bucket.moments[0]  # with the zeros behind the end, 0 * inf, they would be NaN
    assert moments.exp_avg_scale.isinf().all() and moments.exp_avg_sq_scale.isinf().all()


def check_other_memory_orders_and_a_learning_rate_in_a_tensor():
    generator = torch.Generator().manual_seed(4)

    def draw() -> Tensor:
        return torch.randn(6, 7, generator=generator).t()

    state = [draw() for _ in range(3)]
    grad = torch.randn(7, 6, generator=generator)
    buckets = []
    for _ in range(2):
        p, m, v = (x.clone() for x in state)
        assert p.stride() == (1, 7)
        moments = [Moments(m, v.abs())]
        buckets.append(Bucket([p], moments, [torch.zeros(())], implementation="reference"))
    _plain(buckets[0], [grad], [Hyper(0.1, 0.1, 1e-3, 0.0, 0.95)])
    _update(buckets[1], [grad], [Hyper(torch.tensor(0.1), 0.1, 1e-3, 0.0, 0.95)], zero_grads=True)
    _assert_equal(_state(buckets[1]), _state(buckets[0]))
    assert not grad.any()


def check_bias_corrections_at_every_step():
    counts = [*range(24), 50, 76, 100, *range(140, 180), 999, 10**4, 10**6]
    hyper = Hyper(1.0, 0.0, 1e-8, 0.9, 0.999)
    p = [torch.ones(1) for _ in counts]
    moments = [Moments(torch.ones(1), torch.ones(1)) for _ in counts]
    steps = [torch.tensor(float(count)) for count in counts]
    bucket = Bucket(p, moments, steps, implementation="reference")
    _update(bucket, [torch.ones(1) for _ in counts], [hyper])
    numbers = bucket.tables.numbers
    updates = torch.tensor(counts) + 1.0
    root = torch.sqrt(one_minus_power(0.999, updates).double()).float()
    assert torch.equal(numbers[:, 6], 1.0 / one_minus_power(0.9, updates))
    assert torch.equal(numbers[:, 7], 1.0 / root)
    assert torch.equal(numbers[:, 9], updates)


@pytest.mark.unpoisoned
def check_elements_beyond_32_bits():
    """2**36 elements of which the last 4091 exist: the addresses begin far below the memory."""
    first, n, index, step = 2**36, 4091, 5, 3.0
    p = torch.randn(n).to(BFLOAT16)
    m, v, grad = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=BFLOAT16)
    bucket = Bucket(
        [p], [Moments(m, v)], [torch.tensor(step - 1)],
        indices=[index], stochastic_rounding=True, implementation="reference",
    )  # fmt: skip
    expected = p.float() - torch.tensor(0.1) * torch.tensor(0.1) * p.float()
    eighths = first // 8 + torch.arange(n // 8 + 1)
    counter = (eighths & 0xFFFFFFFF, eighths >> 32, torch.full_like(eighths, index))
    drawn = low_precision.philox(SEED, (*counter, torch.full_like(eighths, int(step))))
    words = torch.stack(drawn, dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:n]
    expected = low_precision.stochastic_bfloat16(expected, halves)

    tables = mut.tables_of(bucket)
    record = record_table(bucket)[0].tolist()
    record[:3] = record[0] - 2 * first, record[1] - 4 * first, record[2] - 4 * first
    record[7] += first
    tables.records = torch.tensor([record])
    tables.chunks += torch.tensor([0, first // mut.BLOCK], dtype=torch.int32)
    address = torch.tensor([grad.data_ptr() - 2 * first])
    mut.launch(bucket, address, mut._step_words(bucket, HYPERS[:1], SEED), Step())
    assert torch.equal(p, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("params", PARAMS)
def test_bits_of_the_reference_on_a_gpu(params, moments):
    _compare_with(params, moments, SIZES, 0, "cuda")
    _compare_with(params, moments, UNALIGNED_SIZES, 1, "cuda")


@pytest.mark.gpu
def test_missing_gradients_on_a_gpu():
    _compare_where_gradients_are_missing("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("found", [1.0, math.nan])
def test_found_inf_changes_nothing_on_a_gpu(found, zero_grads):
    _compare_where_a_step_is_skipped(found, zero_grads, "cuda")


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tl = triton.language
    names = {"table": "*i64", "addresses": "*i64", "words": "*i64", "numbers": "*fp32"}
    names |= {"chunks": "*i32", "partials": "*fp32", "control": "*fp32", "out": "*fp32"}
    names |= {"grad_factor": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32"}
    names |= {"max_norm": "fp32"}
    integers = ("num_tensors", "first_partial", "blocks", "count", "halvings")

    def compiled_for(kernel, constants, options):
        kinds = {n: names.get(n, "i32" if n in integers else None) for n in kernel.arg_names}
        kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        return compile_for(kernel, kinds, constants, architecture, options)

    # a thread's 8 elements: two accesses of 16 bytes in float32, one in bfloat16, one of 8 in codes
    variants = [  # parameter, moments, stochastic, 16-byte loads, 8-byte loads
        (tl.float32, tl.float32, False, 8, 0),
        (tl.bfloat16, tl.bfloat16, True, 4, 0),
        (tl.bfloat16, tl.int8, False, 2 + 2 + 4, 2),  # with codes, with float32 moments
    ]
    compiled, most = [], []
    for param, moment, stochastic, in_16, in_8 in variants:
        constants = dict(PARAM_TYPE=param, MOMENT_TYPE=moment, STOCHASTIC=stochastic)
        constants |= dict(MASTER=False, ZERO_GRADS=True, BLOCK=mut.BLOCK)
        options = mut.options(param, moment, False, stochastic)
        kernel = compiled_for(mut.masked_update_kernel, constants, options)
        ptx = kernel.asm["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == in_16
        assert len(re.findall(r"ld\.global\S*\.v2\.b32", ptx)) == in_8
        assert not re.search(r"\bfma\.|approx|div\.full", ptx)
        compiled.append(kernel)
        most.append(options["maxnreg"])
    of_sums = dict(TYPE=tl.bfloat16, BLOCK=mut.BLOCK, SUMMED=mut.SUMMED, SKIP_NONFINITE=True)
    for kernel, constants, options in (
        (mut.prepare_kernel, {"TENSORS": mut.TENSORS}, mut.PREPARE_OPTIONS),
        (mut.gradient_partials_kernel, of_sums, mut.PARTIALS_OPTIONS),
        (masked_norm_triton.partials_kernel, of_sums, mut.PARTIALS_OPTIONS),
        (mut.decision_kernel, of_sums, mut.SUM_OPTIONS),
        (masked_norm_triton.sum_kernel, of_sums, mut.SUM_OPTIONS),
    ):
        compiled.append(compiled_for(kernel, constants, options))
        most.append(64)
        reads_gradients = "TYPE" in kernel.arg_names
        in_16 = re.findall(r"ld\.global\S*\.v4\.b32", compiled[-1].asm["ptx"])
        assert len(in_16) == reads_gradients
    for kernel, registers in zip(compiled, most, strict=True):
        used = resources(kernel, tmp_path)
        assert used.get("STACK", 0) == used.get("LOCAL", 0) == 0
        assert used.get("REG", 0) <= registers
    assert capfd.readouterr() == ("", "")
