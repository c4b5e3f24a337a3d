import ctypes
import math
import shutil

import pytest
import torch
from accuracy import assert_at_least_as_accurate, in_fp64, relative_error
from csrc_builds import one_per_instruction_set
from own_process import interpreted as own_process  # noqa: F401
from torch import Tensor

from progtuning_kernels import backend
from progtuning_kernels.ops import masked_norm
from progtuning_kernels.ops.contract import DTYPES
from progtuning_kernels.ops.masked_norm import masked_norm_op

CPU = torch.device("cpu")
# Nothing here divides the 32 lanes or the 8192 elements of a chunk without a rest, or it just does.
SIZES = [0, 1, 3, 31, 32, 63, 255, 257, 4097, 8191, 8192, 8193, 2**20 + 3]
LISTS = {
    "block": [768] * 8 + [768 * 768] * 2 + [3072, 768 * 3072],
    "tiny": [n % 37 for n in range(199)],
    "chunks": [8192, 1, 8193, 0, 16384, 8191],
    "empty": [0, 0],
}

native_only = pytest.mark.skipif(
    backend.native_reason(CPU) is not None, reason=str(backend.native_reason(CPU))
)
both = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=native_only), "reference"]
)


def random_list(sizes, dtype=torch.float32, device="cpu", seed=0) -> list[Tensor]:
    # Gradients of one model differ by orders of magnitude between tensors.
    generator = torch.Generator().manual_seed(seed)
    scales = [10.0 ** (-(i % 4)) for i in range(len(sizes))]
    return [
        (torch.randn(n, generator=generator) * scale).to(device, dtype)
        for n, scale in zip(sizes, scales, strict=True)
    ]


def truth(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in in_fp64(tensors)]).sum().sqrt()


def torch_norm(tensors: list[Tensor]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, dtype=wide) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def check(name: str, tensors: list[Tensor], implementation: str) -> None:
    norm = masked_norm(tensors, implementation=implementation)
    assert norm.shape == () and norm.dtype == torch.float32 and norm.device == tensors[0].device
    assert_at_least_as_accurate(name, norm, torch_norm(tensors), truth(tensors))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_one_tensor(implementation, dtype):
    for n in SIZES:
        check(f"{n} elements", random_list([n], dtype), implementation)


@both
@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_of_many_tensors(implementation, dtype, sizes):
    check("norm", random_list(sizes, dtype), implementation)


@native_only
def test_native_rounds_once():
    # Float64 inside; torch's float32 sum of 1 M elements is about 1e-5 away.
    for seed in range(5):
        tensors = random_list([2**20 + 3, 4097], seed=seed)
        assert masked_norm(tensors, implementation="native") == truth(tensors).float()


def test_the_reference_does_not_lose_long_tensors():
    # torch's own float32 norm of these is off by 6e-5.
    tensors = random_list([3_000_000])
    norm = masked_norm(tensors, implementation="reference")
    assert relative_error(norm, truth(tensors)) < 5e-6


@native_only
def test_native_takes_what_overflows_a_float32_square():
    for value in (1e25, 1e-30):
        x = torch.full((9000,), value)
        norm = masked_norm([x], implementation="native").item()
        assert norm == pytest.approx(value * math.sqrt(9000), rel=1e-6)


# The squares of the first four add up to (1 + 2^-24)^2: a norm half way between two float32, which
# rounds down to 1. The square of GRAIN is a quarter of float64's spacing there: added one by one,
# grains vanish; summed among themselves first, a few of them tip the rounding.
HALF_WAY = [1.0, 2.0**-12, 2.0**-12, 2.0**-24]
GRAIN = 2.0**-27
NEXT_FLOAT32 = 1 + 2.0**-23
CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def order_probe(stride: int, dtype: torch.dtype) -> Tensor:
    """One chunk whose norm tells whether elements `stride` apart are added to the same sum."""
    x = torch.zeros(8192, dtype=dtype)
    x[::stride] = GRAIN
    x[: 4 * stride : stride] = torch.tensor(HALF_WAY, dtype=dtype)
    return x


ORDER = {64: 1.0, 32: 1.0, 16: NEXT_FLOAT32, 1: NEXT_FLOAT32}


@native_only
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_the_order_of_summation_is_fixed(dtype):
    for stride, expected in ORDER.items():
        probe = order_probe(stride, dtype)
        for offset in range(9):
            # At every alignment: an address must not decide which elements are summed first.
            buffer = torch.zeros(8192 + 9, dtype=dtype)
            view = buffer[offset : offset + 8192].copy_(probe)
            assert masked_norm([view], implementation="native").item() == expected


@native_only
def test_the_number_of_threads_does_not_change_the_bits():
    # The last tensor is there to make the list long enough for more than one thread.
    tensors = [torch.tensor([x]) for x in HALF_WAY + 1000 * [GRAIN]] + [torch.zeros(100_000)]
    pointers, sizes = [x.data_ptr() for x in tensors], [x.numel() for x in tensors]
    code, out = backend.dtype_code(torch.float32), torch.zeros(())
    for threads in (1, 2, 2, 2, 3, 7):
        backend.native_extension().masked_norm_cpu(pointers, sizes, code, out.data_ptr(), threads)
        assert out.item() == 1.0, f"{threads} threads"


SHIM = """
#include "launchers.h"
extern "C" bool norm(const void* x, int64_t n, int dtype, float* out) {
  return progtuning::masked_norm_cpu(&x, &n, 1, static_cast<progtuning::DType>(dtype),
                                     out, 1);
}
"""


@native_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_instruction_sets_do_not_change_the_bits(tmp_path):
    for isa, library in one_per_instruction_set(tmp_path, SHIM, "masked_norm_cpu.cpp"):
        norm = library.norm
        norm.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
        for dtype in CPU_DTYPES:
            code, out = backend.dtype_code(dtype), torch.zeros(())
            for stride, expected in ORDER.items():
                x = order_probe(stride, dtype)
                norm(x.data_ptr(), x.numel(), code, out.data_ptr())
                assert out.item() == expected, f"{isa}, {dtype}, stride {stride}"
            x = random_list([100_003], dtype)[0]
            norm(x.data_ptr(), x.numel(), code, out.data_ptr())
            assert out == masked_norm([x], implementation="native"), f"{isa}, {dtype}"


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_anywhere_comes_through(implementation, bad):
    for dtype in (torch.float32, torch.bfloat16):
        for position in (0, 40, 8191, 8192, 8199):
            tensors = random_list([100, 8200, 0], dtype)
            tensors[1][position] = bad
            norm = masked_norm(tensors, implementation=implementation).item()
            assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@both
def test_nan_wins_over_inf(implementation):
    assert masked_norm([torch.tensor([math.inf, math.nan])], implementation=implementation).isnan()


def test_empty_list():
    assert torch.equal(masked_norm([]), torch.zeros(()))


@both
def test_views_mixed_dtypes_and_parameters(implementation):
    base = torch.randn(6, 50)
    strided = base.t()[::2]
    expanded = torch.randn(3, 1).expand(3, 5)
    parameter = torch.nn.Parameter(torch.randn(7))
    tensors = [strided, expanded, parameter, torch.randn(11).bfloat16(), torch.randn(4).double()]
    norm = masked_norm(tensors, implementation=implementation)
    assert not norm.requires_grad
    assert norm.item() == pytest.approx(truth(tensors).item(), rel=1e-6)


def test_nothing_is_mutated():
    tensors = random_list([100, 8193])
    copies, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    masked_norm(tensors)
    assert all(map(torch.equal, tensors, copies)) and versions == [x._version for x in tensors]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([torch.ones(2), None], TypeError, "expected tensors, got NoneType"),
        (torch.ones(2), TypeError, "expected a list of tensors"),
        ([torch.ones(2, dtype=torch.int64)], ValueError, "got torch.int64"),
        ([torch.ones(2, dtype=torch.complex64)], ValueError, "got torch.complex64"),
        ([torch.ones(2).to_sparse()], ValueError, "expected dense tensors, got torch.sparse_coo"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, "tensors on cpu and meta"),
    ],
)
def test_a_broken_contract_is_one_line(tensors, error, message):
    with pytest.raises(error, match=message) as caught:
        masked_norm(tensors)
    assert "\n" not in str(caught.value)


def test_a_dtensor_is_refused():
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = distributed.distribute_tensor(torch.ones(4), mesh)
        with pytest.raises(ValueError, match="to_local"):
            masked_norm([sharded])
    finally:
        torch.distributed.destroy_process_group()


@native_only
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], [1, 2], 0, 8, 1), "1 tensors but 2 sizes"),
        (([0], [1], 0, 8, 1), "tensor 0 has a negative size or no storage"),
        (([8], [-1], 0, 8, 1), "tensor 0 has a negative size or no storage"),
        (([], [], 0, 0, 1), "the output has no storage"),
        (([], [], 0, 8, 0), "num_threads must be positive"),
        (([], [], 9, 8, 1), "no CPU kernel for dtype code 9"),
    ],
)
def test_the_binding_refuses_what_it_can_see_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        backend.native_extension().masked_norm_cpu(*arguments)


@both
def test_custom_op(implementation):
    tensors = random_list([5, 8193])
    torch.library.opcheck(torch.ops.progtuning.masked_norm, (tensors, implementation))
    expected = masked_norm(tensors, implementation=implementation)
    assert masked_norm_op(tensors, implementation) == expected


def test_compiled_code_keeps_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(tensors):
        return masked_norm(tensors) * 2

    tensors = random_list([5, 8193])
    assert doubled(tensors) == masked_norm(tensors) * 2


KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("implementation", ["native", "triton"])


def _accurate(implementation: str, dtype: torch.dtype, device: str, most: float = math.inf) -> None:
    """Lists of at most so many tensors and elements."""
    for sizes in (*([n] for n in SIZES), *LISTS.values()):
        if max(sizes) <= most and len(sizes) <= most:
            check(f"{sizes[:3]}...", random_list(sizes, dtype, device), implementation)


def _of_many_tensors(implementation: str, count: int, device: str) -> None:
    check("norm", random_list([i % 300 for i in range(count)], device=device), implementation)


def _same_bits_at_every_alignment(implementation: str, dtype: torch.dtype, device: str) -> None:
    for n in (5, 257, 8193, 20000):
        buffer = random_list([n + 9], dtype, device)[0]
        for offset in range(1, 9):
            odd = buffer[offset : offset + n]
            norms = [masked_norm([x], implementation=implementation) for x in (odd, odd.clone())]
            assert torch.equal(*norms), f"{n} elements, offset {offset}"


@pytest.mark.gpu
@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_cuda_accuracy(implementation, dtype):
    _accurate(implementation, dtype, "cuda")


@pytest.mark.gpu
@kernels
@pytest.mark.parametrize("count", [1, 447, 448, 449, 897, 4033])
def test_cuda_lists_longer_than_one_launch(implementation, count):
    _of_many_tensors(implementation, count, "cuda")


@pytest.mark.gpu
@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_cuda_alignment_does_not_change_the_bits(implementation, dtype):
    _same_bits_at_every_alignment(implementation, dtype, "cuda")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def check_triton(dtype):
    _accurate("triton", dtype, "cpu", most=5000)


@pytest.mark.parametrize("count", [2, 31, 32, 33])
def check_triton_of_many_tensors(count):
    _of_many_tensors("triton", count, "cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN
@pytest.mark.parametrize("programs", [1, 2640])  # a program of all blocks, and of one
def check_triton_at_every_alignment_and_with_nan(programs, monkeypatch):
    from progtuning_kernels.ops.masked_norm import triton

    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    assert triton.blocks_per_program(20) == (16 if programs == 1 else 1)
    buffer = random_list([4100], torch.bfloat16)[0]
    for offset in (1, 2, 8):
        odd = buffer[offset : offset + 4000]
        assert masked_norm([odd], implementation="triton") == masked_norm(
            [odd.clone()], implementation="triton"
        )
    for bad in (math.nan, math.inf, -math.inf):
        test_a_non_finite_value_anywhere_comes_through("triton", bad)
    test_nan_wins_over_inf("triton")
    check("norm", random_list(LISTS["chunks"]), "triton")


@pytest.mark.gpu
@kernels
def test_cuda_runs_on_the_current_stream(implementation):
    x = torch.zeros(50_000_000, device="cuda")
    masked_norm([x], implementation=implementation)  # loads the kernels
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # About 100 ms of work in front: a norm on any other stream would still see zeros.
        torch.cuda._sleep(200_000_000)
        x.fill_(1.0)
        norm = masked_norm([x], implementation=implementation)
    stream.synchronize()
    assert norm.item() == pytest.approx(math.sqrt(50_000_000), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.captures
def test_cuda_graph_captures_no_list_with_triton():
    tensors = random_list([100, 8193], device="cuda")
    masked_norm(tensors, implementation="triton")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        norm = masked_norm(tensors, implementation="reference")
        with pytest.raises(RuntimeError, match="captured CUDA graph"):
            masked_norm(tensors, implementation="triton")
    assert norm.shape == ()


@pytest.mark.gpu
@pytest.mark.captures
def test_cuda_graph_replays_with_new_values():
    tensors = random_list([100, 8193, 70_000], device="cuda")
    masked_norm(tensors, implementation="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = masked_norm(tensors, implementation="native")
    for scale in (1.0, 3.0, math.nan, 0.5):
        replacement = [x * scale for x in random_list([100, 8193, 70_000], device="cuda", seed=2)]
        for x, y in zip(tensors, replacement, strict=True):
            x.copy_(y)
        graph.replay()
        expected = masked_norm(tensors, implementation="native")
        assert torch.equal(norm.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.gpu
@kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_cuda_second_device(implementation):
    check("norm", random_list([100, 8193], device="cuda:1"), implementation)
    assert torch.cuda.current_device() == 0
