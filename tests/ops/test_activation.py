"""Activations: as accurate as plain torch, only the demanded gradients, only the input saved.

The reference has plain torch's bits. The Triton kernels run in the interpreter, in one process of
their own (the functions named check_*), and are compiled for four GPUs.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_at_least_as_accurate, in_fp64
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from torch import Tensor
from triton_builds import ARCHITECTURES, compile_for, resources

from progtuning_kernels import backend
from progtuning_kernels.ops import activation
from progtuning_kernels.ops.activation.reference import Inputs

OPS = [
    ("gelu", "none"),
    ("gelu", "tanh"),
    ("bias_gelu", "none"),
    ("bias_gelu", "tanh"),
    ("swiglu", "silu"),
    ("geglu", "none"),
    ("geglu", "tanh"),
    ("swiglu", "silu, multiplied"),
]
GATE_MULTIPLIER = 0.7
DEMANDS = [
    (name, kind, demand)
    for name, kind in OPS
    for demand in itertools.product((True, False), repeat=1 if name == "gelu" else 2)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = (3, 5, 37)
LARGE = (18, 150)  # two pieces of rows, two blocks of 128 columns
in_interpreter = os.environ.get("TRITON_INTERPRET") == "1"


def _run(name: str, kind: str, tensors: list[Tensor], implementation: str | None = None) -> Tensor:
    keywords = {} if name == "swiglu" else {"approximate": kind}
    if kind == "silu, multiplied":
        keywords["gate_multiplier"] = GATE_MULTIPLIER
    return getattr(activation, name)(*tensors, **keywords, implementation=implementation)


def _plain(name: str, kind: str, tensors: list[Tensor]) -> Tensor:
    """What a model writes."""
    first = tensors[0] + tensors[1] if name == "bias_gelu" else tensors[0]
    first = first * GATE_MULTIPLIER if kind == "silu, multiplied" else first
    out = F.silu(first) if name == "swiglu" else F.gelu(first, approximate=kind)
    return out * tensors[1] if name in ("swiglu", "geglu") else out


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"gelu": [shape], "bias_gelu": [shape, shape[-1:]]}.get(name, [shape, shape])
    return [(2 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]


def _demanding(tensors: list[Tensor], demand: tuple[bool, ...]) -> list[Tensor]:
    return [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, demand, strict=True)]


def _gradients(out: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    if not any(t.requires_grad for t in tensors):
        assert not out.requires_grad
        return [None] * len(tensors)
    wanted = iter(torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grad))
    return [next(wanted) if t.requires_grad else None for t in tensors]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("name", "kind", "demand"), DEMANDS)
def test_the_reference_has_the_bits_of_plain_torch(name, kind, demand, dtype):
    tensors = _demanding(_draw(name, SMALL, dtype), demand)
    same = _demanding(tensors, demand)
    grad = torch.randn(SMALL).to(dtype)
    out, expected = _run(name, kind, tensors, "reference"), _plain(name, kind, same)
    assert torch.equal(out, expected)
    gradients = _gradients(out, tensors, grad)
    for mine, theirs in zip(gradients, _gradients(expected, same, grad), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind", "demand"), DEMANDS)
def check_at_least_as_accurate_as_plain_torch(name, kind, demand, dtype, monkeypatch):
    from progtuning_kernels.ops.activation import triton as activation_triton

    monkeypatch.setattr(activation_triton, "BLOCK", 128)  # the interpreter computes erf one by one
    # the interpreter truncates to bfloat16 where the GPU rounds: twice the error
    roundings = 2.0 if dtype == torch.bfloat16 else 1.0
    for shape in (SMALL, LARGE, (7, 1)) if dtype == torch.float32 else (SMALL, LARGE):
        tensors = _demanding(_draw(name, shape, dtype), demand)
        plain, true = _demanding(tensors, demand), _demanding(in_fp64(tensors), demand)
        grad = torch.randn(shape).to(dtype)
        results = []
        for run, given in ((_run, tensors), (_plain, plain), (_plain, true)):
            out = run(name, kind, given)
            results.append([out, *_gradients(out, given, grad.to(out.dtype))])
        for what, *three in zip(("out", "d first", "d second"), *results, strict=False):
            if three[1] is None:
                assert three[0] is None
                continue
            assert three[0].dtype == dtype and three[0].shape == three[1].shape
            assert_at_least_as_accurate(f"{what} {shape}", *three, roundings=roundings)


@pytest.mark.parametrize(("name", "kind"), OPS[:7])
def check_each_element_in_float32(name, kind):
    """No element is off by more than a few units of what it is made of: a cancellation shows."""
    x = torch.cat([torch.linspace(-12, 12, 1201), torch.tensor([-1e-30, 1e-30, -90.0, 90.0])])
    others = {"gelu": [], "bias_gelu": [torch.zeros_like(x)]}.get(name, [torch.full_like(x, 1.5)])
    tensors = _demanding([x, *others], (True,) * (1 + len(others)))
    true = _demanding(in_fp64(tensors), (True,) * len(tensors))
    out, expected = _run(name, kind, tensors), _plain(name, kind, true)
    pairs = [(out, expected)]
    gradients = _gradients(out, tensors, torch.ones_like(x))
    pairs += zip(gradients, _gradients(expected, true, torch.ones_like(expected)), strict=True)
    # as torch's, 1 + erf is as coarse below 0 as 1 is; the others keep their digits as they decay
    floor = 3e-7 * x.double().abs().clamp(min=1) * (1 if kind == "none" else x.double().sigmoid())
    for mine, truth in pairs:
        assert ((mine - truth).abs() <= 3e-6 * truth.abs() + floor).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), OPS[:7])
def check_zeros_infinities_and_the_largest(name, kind, dtype):
    largest = torch.finfo(dtype).max / 2
    values = [0.0, -0.0, largest, -largest, 1e4, -1e4, math.inf, -math.inf, math.nan]
    x = torch.tensor(values, dtype=dtype)
    others = {"gelu": [], "bias_gelu": [torch.zeros_like(x)]}.get(name, [torch.ones_like(x)])
    tensors = _demanding([x, *others], (True,) * (1 + len(others)))
    out = _run(name, kind, tensors)
    dx, *rest = _gradients(out, tensors, torch.ones_like(x))
    rounded = torch.where(x > 0, x, 0)  # beyond where A is x or 0
    rounded[-2:] = math.nan  # -inf * 0
    # of largest, bfloat16 and its truncation keep all bits
    torch.testing.assert_close(out, rounded, rtol=0, atol=0, equal_nan=True)
    nan = math.nan
    slope = torch.tensor([0.5, 0.5, 1, 0, 1, 0, nan, nan, nan], dtype=dtype)
    torch.testing.assert_close(dx, slope, rtol=0, atol=0, equal_nan=True)
    if name == "bias_gelu":
        torch.testing.assert_close(rest[0], slope, rtol=0, atol=0, equal_nan=True)
    elif rest:
        torch.testing.assert_close(rest[0], rounded, rtol=0, atol=0, equal_nan=True)


def check_a_half_product_that_overflows_in_float16():
    """grad * up is beyond float16 and the gradient is not."""
    gate = torch.tensor([-8.0], dtype=torch.float16, requires_grad=True)
    up, grad = torch.tensor([[300.0], [300.0]], dtype=torch.float16)
    activation.swiglu(gate, up).backward(grad)
    truth = 90000 * torch.sigmoid(torch.tensor(-8.0)) * (1 - 8 * torch.sigmoid(torch.tensor(8.0)))
    torch.testing.assert_close(gate.grad.float(), truth[None], rtol=1e-3, atol=0)


def _halves_and_copies(name: str, kind: str) -> None:
    fused = torch.randn(3, 5, 74)
    halves = _demanding(list(fused.chunk(2, -1)), (True, True))
    copies = _demanding([half.contiguous() for half in halves], (True, True))
    grad = torch.randn(SMALL)
    out, expected = _run(name, kind, halves), _run(name, kind, copies)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    both = zip(_gradients(out, halves, grad), _gradients(expected, copies, grad), strict=True)
    for mine, theirs in both:
        assert mine.is_contiguous() and torch.equal(mine, theirs)


def check_halves_of_one_tensor_are_read_where_they_are():
    from progtuning_kernels.ops.activation.triton import _as_rows

    gate, up = torch.randn(3, 5, 74).chunk(2, -1)
    rows, columns, views, strides = _as_rows([gate, up], one_row=True)
    assert (rows, columns, strides) == (15, 37, [74, 74])
    assert [view.data_ptr() for view in views] == [gate.data_ptr(), up.data_ptr()]
    for name, kind in OPS[4:]:
        _halves_and_copies(name, kind)


@pytest.mark.parametrize(("name", "kind"), OPS)
def check_other_memory_orders(name, kind):
    """A transposed input, a gradient spread from one number, and a tensor without dimensions."""
    tensors = _draw(name, (37, 6), torch.float32)
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    tensors, turned = (_demanding(some, (True,) * len(some)) for some in (tensors, turned))
    outs = [_run(name, kind, some) for some in (tensors, turned)]
    assert torch.equal(*outs) and outs[1].is_contiguous()
    grad = torch.tensor(0.5).expand(37, 6)
    both = (_gradients(out, some, grad) for out, some in zip(outs, (tensors, turned), strict=True))
    for mine, theirs in zip(*both, strict=True):
        assert torch.equal(mine, theirs)
    if name != "bias_gelu":
        one = [torch.tensor(2.0) for _ in tensors]
        torch.testing.assert_close(_run(name, kind, one), _plain(name, kind, one))


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("name", "kind"), [OPS[4], OPS[6], OPS[2], OPS[0]])
def check_rows_beyond_32_bits(name, kind):
    """The last of three rows begins at element 2**31 + 16; the memory between is never touched."""
    stride, cols = 2**30 + 8, 3
    spread, dense = [], []
    for _ in range(3):
        rows = torch.empty(2 * stride + cols, dtype=torch.float16).as_strided(
            (3, cols), (stride, 1)
        )
        dense.append(torch.randn(3, cols).half())
        spread.append(rows.copy_(dense[-1]))
    if name == "bias_gelu":
        spread[1] = dense[1] = torch.randn(cols).half()
    inputs = 1 if name == "gelu" else 2
    results = []
    for *tensors, grad in (spread, dense):
        given = _demanding(tensors[:inputs], (True,) * inputs)
        out = _run(name, kind, given)
        results.append([out, *_gradients(out, given, grad)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [79, 85])
def check_dbias_of_many_pieces(rows, monkeypatch):
    """40 pieces, two blocks of the sum; for 85 rows longer ones, of which the last 11 are empty."""
    from progtuning_kernels.ops import row_partials

    monkeypatch.setattr(row_partials, "MAX_PARTIALS", 40)
    monkeypatch.setattr(row_partials, "ROWS_PER_PARTIAL", 2)
    x, bias = 2 * torch.randn(rows, 3), torch.randn(3, requires_grad=True)
    grad = torch.randn(x.shape)
    true = _demanding(in_fp64([x, bias]), (False, True))
    first, second = (
        torch.autograd.grad(activation.bias_gelu(x, bias, approximate="tanh"), bias, grad)[0]
        for _ in range(2)
    )
    (truth,) = torch.autograd.grad(_plain("bias_gelu", "tanh", true), true[1], grad.double())
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), truth, rtol=2e-6, atol=1e-5)


def check_undemanded_gradients_take_no_memory(monkeypatch):
    from progtuning_kernels.ops.activation import triton as activation_triton

    made = []
    for make in ("empty", "empty_like", "zeros_like"):
        real = getattr(torch, make)

        def recorded(*arguments, real=real, **keywords):
            made.append(real(*arguments, **keywords))
            return made[-1]

        monkeypatch.setattr(activation_triton.torch, make, recorded)
    x, bias, grad = torch.randn(40, 7), torch.randn(7), torch.randn(40, 7)
    kind, whole, row, partials = "none", (40, 7), (7,), (3, 7)
    for demand in itertools.product((True, False), repeat=2):
        for with_bias in (True, False):
            made.clear()
            if with_bias:
                arguments = (grad, Inputs(x, bias), kind, (*demand, False))
                expected = [whole] * demand[0] + [partials, row] * demand[1]
            else:
                inputs = Inputs(x, up=x if demand[0] else None)
                arguments = (grad, inputs, kind, (demand[0], False, demand[1]))
                expected = [whole] * sum(demand)
            if any(demand):
                activation_triton.backward(*arguments)
                assert [tuple(t.shape) for t in made] == expected


def _saved(name: str, kind: str, demand: tuple[bool, ...]) -> tuple[list[Tensor], list[Tensor]]:
    tensors = _demanding(_draw(name, SMALL, torch.bfloat16), demand)
    if name in ("swiglu", "geglu"):
        halves = torch.cat(tensors, -1).detach().chunk(2, -1)
        tensors = _demanding(list(halves), demand)
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _run(name, kind, tensors)
    return tensors, saved


def _compare_saved() -> None:
    for name, kind, demand in DEMANDS:
        tensors, saved = _saved(name, kind, demand)
        expected = tensors if any(demand) else []
        if name in ("swiglu", "geglu") and not demand[0]:
            expected = expected[:1]
        assert [(t.data_ptr(), t.stride()) for t in saved] == [
            (t.data_ptr(), t.stride()) for t in expected
        ]
        assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in expected)


def check_only_the_input_is_saved():
    _compare_saved()


def test_only_the_input_is_saved():
    _compare_saved()


def _compare_empty() -> None:
    for (name, kind), shape in itertools.product(OPS, [(0, 4), (2, 0), (0,)]):
        tensors = _draw(name, shape, torch.float32)
        tensors = _demanding(tensors, (True,) * len(tensors))
        out = _run(name, kind, tensors)
        assert out.shape == shape
        for tensor, gradient in zip(tensors, _gradients(out, tensors, out.detach()), strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


def check_empty_tensors():
    _compare_empty()


def test_empty_tensors():
    _compare_empty()


def check_the_interpreter_runs_these():
    assert backend.select(activation.GELU, Inputs(torch.ones(1))).name == "triton"
    with pytest.raises(RuntimeError, match="no Triton kernel for torch.float64"):
        activation.gelu(torch.ones(1, dtype=torch.float64), implementation="triton")


@pytest.mark.skipif(in_interpreter, reason="Triton runs on the CPU there")
def test_why_triton_does_not_run_on_the_cpu():
    with pytest.raises(RuntimeError, match="implementation=triton cannot run: Triton runs on CPU"):
        activation.gelu(torch.ones(1), implementation="triton")


def test_neither_import_nor_use_needs_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from progtuning_kernels.ops import activation\n"
        "activation.gelu(torch.ones(2, requires_grad=True)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_does_not_fit_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="gelu: approximate must be one of .*, got 'erf'"):
        activation.gelu(x, approximate="erf")
    with pytest.raises(ValueError, match="gelu: x is torch.int64, expected one of float32"):
        activation.gelu(x.long())
    with pytest.raises(ValueError, match=r"bias_gelu: x \(2, 3\) and bias \(2,\) do not fit"):
        activation.bias_gelu(x, x[:, 0])
    with pytest.raises(ValueError, match=r"swiglu: gate is \(2, 3\), up is \(2, 2\)"):
        activation.swiglu(x, x[:, :2])
    with pytest.raises(ValueError, match="geglu: expected one dtype and device, got torch.float32"):
        activation.geglu(x, x.half())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(activation.gelu(x).square().sum(), x, create_graph=True)
        dx.sum().backward()


@pytest.mark.parametrize(("name", "kind", "demand"), DEMANDS)
def test_compiles_into_one_graph(name, kind, demand):
    tensors = _demanding(_draw(name, SMALL, torch.bfloat16), demand)
    same = _demanding(tensors, demand)
    torch.compiler.reset()
    compiled = torch.compile(_run, fullgraph=True, backend="aot_eager")
    out, expected = compiled(name, kind, tensors), _run(name, kind, same)
    assert torch.equal(out, expected)
    grad = torch.randn(SMALL).bfloat16()
    both = zip(_gradients(out, tensors, grad), _gradients(expected, same, grad), strict=True)
    for mine, theirs in both:
        assert mine is theirs is None or torch.equal(mine, theirs)


STRIDES = ("grad_stride", "x_stride", "up_stride")  # of rows, multiples of 16 in a model


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(in_interpreter, reason="compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, tmp_path, monkeypatch, capfd):
    pytest.importorskip("triton")
    from progtuning_kernels.ops import row_partials
    from progtuning_kernels.ops.activation import triton as at

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sizes = dict.fromkeys(("rows", "cols", "blocks", "rows_of_piece", "pieces"), "i32")
    sizes |= dict.fromkeys(STRIDES, "i32")
    compiled = []
    cases = [("none", "bias"), ("tanh", "bias"), ("silu", "up"), ("tanh", "up"), ("silu", "up")]
    for i, (kind, other) in enumerate(cases):
        constants = dict(KIND=kind, ALIGNED=True, BLOCK=at.BLOCK)
        pointers = dict.fromkeys(("out", "x", "grad", "dx", other), "*bf16")
        pointers |= {"partials": "*fp32"} if other == "bias" else {"dup": "*bf16"}
        for kernel, vectors in ((at.forward_kernel, 2), (at.backward_kernel, 3)):
            signature = {n: t for n, t in (sizes | pointers).items() if n in kernel.arg_names}
            if i == 4:
                signature["multiplier"] = "fp32"
            made = compile_for(
                kernel, signature, constants, architecture, at.OPTIONS, divisible=STRIDES
            )
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", made.asm["ptx"])) == vectors
            assert not re.search(r"ld\.global\S*\.b16", made.asm["ptx"])
            compiled.append(made)
    signature = dict(first="*bf16", partials="*fp32", n_partials="i32")
    constants = dict(C=3072, ROWS=row_partials.SUM_ROWS, COLUMNS=row_partials.SUM_COLUMNS)
    kernel = row_partials.sum_partials_kernel
    compiled.append(compile_for(kernel, signature, constants, architecture, row_partials.OPTIONS))
    for kernel in compiled:
        used = resources(kernel, tmp_path)
        assert used.get("STACK", 0) == used.get("LOCAL", 0) == 0
        assert used.get("REG", 0) <= 96
    assert capfd.readouterr() == ("", "")
