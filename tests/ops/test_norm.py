"""layer_norm and rms_norm: the models' bits, exactly the demanded gradients, and four GPUs' code.

Accuracy under dropout is that of plain torch with the mask that Triton drew.

TRITON_INTERPRET counts only where it is set before triton is imported, so the functions named
check_* run in one process of their own.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from accuracy import assert_at_least_as_accurate, in_fp64
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_builds import ARCHITECTURES, compile_for, resources

from progtuning_kernels.ops import norm as norms
from progtuning_kernels.ops.masked_update.low_precision import philox
from progtuning_kernels.ops.norm import layer_norm, rms_norm
from progtuning_kernels.ops.norm.reference import Inputs

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
EPS = 1e-2  # large enough to matter
# Rows and columns: no number of rows divides by 16, and few columns fill a block.
SHAPES = [(1, 1), (3, 1), (3, 3), (17, 63), (1, 257), (3, 768), (3, 1025)]
RESIDUALS = ("none", "inside", "returned")
INPUTS = ("x", "residual", "weight", "bias")
P = 0.3  # 1 / (1 - P) is no power of two


def _layer_norm(x, residual, weight, bias, **keywords):
    return layer_norm(x, weight, bias, EPS, residual=residual, **keywords)


def _rms_norm(x, residual, weight, bias, **keywords):
    return rms_norm(x, weight, EPS, residual=residual, **keywords)


def _gemma_norm(x, residual, weight, bias, **keywords):
    keywords |= dict(offset=1.0, cast="after_weight")
    return rms_norm(x, weight, EPS, residual=residual, **keywords)


def _ones_dropped_out(shape: tuple[int, ...], p: float = P) -> Tensor:
    """dropout(1), by Triton."""
    ones = torch.ones(shape)
    keywords = dict(residual=torch.zeros(shape), return_sum=True, implementation="triton")
    return layer_norm(ones, None, None, EPS, dropout=p, **keywords)[1]


@functools.cache
def _kept(shape: tuple[int, ...]) -> Tensor:
    """The first mask after a seed of 7."""
    torch.manual_seed(7)
    return _ones_dropped_out(shape) != 0


def _dropout_norm(x, residual, weight, bias, *, implementation, **keywords):
    """The reference is plain torch with Triton's mask."""
    keywords |= dict(implementation=implementation)
    if implementation == "triton":
        torch.manual_seed(7)
        return _layer_norm(x, residual, weight, bias, dropout=P, **keywords)
    x = torch.where(_kept(tuple(x.shape)), x * (1 / (1 - P)), 0.0)
    return _layer_norm(x, residual, weight, bias, **keywords)


OPS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "gemma": _gemma_norm}
IN_TRITON = OPS | {"dropout": _dropout_norm}
LAYER_NORMS = ("layer_norm", "dropout")
CASES = [pair for pair in itertools.product(IN_TRITON, RESIDUALS) if pair != ("dropout", "none")]


def _inputs(op: str, residual: str, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, r = draw(rows, columns) + 0.5, draw(rows, columns)
    weight, bias = draw(columns) + 1, draw(columns)
    return [x, None if residual == "none" else r, weight, bias if op in LAYER_NORMS else None]


def _upstream(results: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]


def _run(op, residual, tensors, upstream, demanded, implementation) -> dict[str, Tensor | None]:
    """Results and gradients by name; upstream: None, or gradients of the results."""
    leaves = []
    for name, tensor in zip(INPUTS, tensors, strict=True):
        wanted = name in demanded
        leaves.append(None if tensor is None else tensor.detach().requires_grad_(wanted))
    keywords = dict(implementation=implementation, return_sum=residual == "returned")
    results = IN_TRITON[op](*leaves, **keywords)
    results = list(results) if isinstance(results, tuple) else [results]
    named = dict(zip(("y", "h"), results, strict=False))
    upstream = _upstream(results) if upstream is None else upstream
    pairs = [(y, g) for y, g in zip(results, upstream, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    for name, leaf in zip(INPUTS, leaves, strict=True):
        named[f"d{name}"] = None if leaf is None else leaf.grad
    return named


def _compare(op, residual, tensors, demanded, roundings=1.0) -> dict[str, Tensor | None]:
    """Runs it, and compares with plain torch against the truth; returns what was found."""
    exact = [None if t is None else in_fp64([t])[0] for t in tensors]
    plain = _run(op, residual, tensors, None, demanded, "reference")
    upstream = _upstream([plain[name] for name in ("y", "h") if name in plain])
    truth = _run(op, residual, exact, in_fp64(upstream), demanded, "reference")
    mine = _run(op, residual, tensors, upstream, demanded, "triton")
    for name, expected in plain.items():
        if expected is None:
            assert mine[name] is None, name
            continue
        assert (mine[name].dtype, mine[name].shape) == (expected.dtype, expected.shape)
        case = f"{op}, {residual} residual, {tuple(tensors[0].shape)}, {demanded}: {name}"
        assert_at_least_as_accurate(case, mine[name], expected, truth[name], roundings=roundings)
    return mine


def _combinations(op: str, residual: str) -> list[tuple[str, ...]]:
    names = [name for name in INPUTS if (name, residual) != ("residual", "none")]
    names = [name for name in names if op in LAYER_NORMS or name != "bias"]
    counts = range(len(names) + 1)
    return [c for count in counts for c in itertools.combinations(names, count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, residual", CASES)
def check_at_least_as_accurate_as_torch(op, dtype, residual):
    for rows, columns in SHAPES:
        # In a row of one element the gradient is what cancellation leaves: 1 - normalised^2.
        roundings = 64.0 if columns == 1 and dtype == FLOAT32 else 1.0
        if (op, columns, dtype) == ("dropout", 3, FLOAT32):
            roundings = 8.0  # of the 6 or so elements kept; over many seeds Triton's error is less
        _compare(op, residual, _inputs(op, residual, rows, columns, dtype), INPUTS, roundings)


@pytest.mark.parametrize("op, residual", CASES)
def check_every_combination_of_demands(op, residual, monkeypatch):
    """What is not demanded is not computed, and nothing is kept for it."""
    from progtuning_kernels.ops.norm import triton as norm_triton

    computed, kept = [], []
    kernel, apply = norm_triton.backward_kernel, norm_triton._Norm.apply
    places = [kernel.arg_names.index(name) for name in ("dx", "dh", "dweight", "dbias", "seed")]

    class SpyOnKernel:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                computed.append([arguments[place] is not None for place in places])
                kernel[grid](*arguments, **options)

            return launch

    def spy_on_apply(*arguments):
        results = apply(*arguments)
        y = results[0] if isinstance(results, tuple) else results
        kept.append(y.grad_fn.saved_tensors)
        return results

    monkeypatch.setattr(norm_triton, "backward_kernel", SpyOnKernel())
    monkeypatch.setattr(norm_triton._Norm, "apply", spy_on_apply)
    for dtype, demanded in zip(itertools.cycle(DTYPES), _combinations(op, residual), strict=False):
        computed.clear()
        kept.clear()
        named = _compare(op, residual, _inputs(op, residual, 3, 63, dtype), demanded)
        drops = op == "dropout" and "x" in demanded
        demands_h = "x" in demanded or "residual" in demanded
        separately = "residual" in demanded if drops else demands_h  # where dx is not dh
        if not demanded:
            assert not computed and not kept
            continue
        parameters = ["weight" in demanded, "bias" in demanded]
        assert computed == [[drops, separately, *parameters, drops]]
        rows, weight, mean, rstd, seed = kept[0]
        statistics = demands_h or "weight" in demanded
        assert [t is not None for t in (rows, rstd)] == [statistics] * 2
        assert (mean is not None) == (statistics and op in LAYER_NORMS)
        assert (weight is not None) == demands_h
        assert (seed is not None) == drops
        if residual == "returned":
            assert named["h"].requires_grad == demands_h


@pytest.mark.parametrize("op", OPS)
def check_missing_parameters_and_unused_results(op):
    x, residual, weight, bias = _inputs(op, "returned", 17, 63, BFLOAT16)
    for parameters in ([None, None], [weight, None], [None, bias]):
        _compare(op, "returned", [x, residual, *parameters], INPUTS)
    for used in (0, 1):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
        results = OPS[op](*leaves, bias, return_sum=True, implementation="triton")
        results[used].sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert (leaves[2].grad is None) == (used == 1)
        if used == 1:
            assert torch.equal(leaves[0].grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("op", IN_TRITON)
def check_rounds_where_the_models_do(op, dtype):
    """One rounding more or less would change a tenth of the results, a sum's order very few."""
    tensors = _inputs(op, "inside", 3, 1025, dtype)
    mine = _run(op, "inside", tensors, None, (), "triton")
    plain = _run(op, "inside", tensors, None, (), "reference")
    assert (mine["y"] == plain["y"]).double().mean() > 0.99


def check_a_row_of_other_dtype():
    x, residual, weight, bias = _inputs("layer_norm", "returned", 17, 63, FLOAT32)
    for op in LAYER_NORMS:
        _compare(op, "returned", [x.to(BFLOAT16), residual, weight, bias], INPUTS)
        _compare(op, "inside", [x, residual.to(FLOAT16), weight, bias], INPUTS)
    for op in ("rms_norm", "gemma"):  # float32 norms in a bfloat16 model
        mixed = [x.to(BFLOAT16), residual.to(BFLOAT16), weight, None]
        found = _compare(op, "returned", mixed, INPUTS)
        assert found["y"].dtype == (FLOAT32 if op == "rms_norm" else BFLOAT16)


@pytest.mark.parametrize("op", IN_TRITON)
def check_other_strides(op):
    x, residual, weight, bias = _inputs(op, "returned", 30, 63, FLOAT32)
    wide = torch.randn(30, 126)
    shapes = [
        (x.T.contiguous().T, residual),
        (wide[:, :63], wide[:, 63:]),
        (wide[:, ::2], residual[:1].expand(30, 63)),
        (x.view(2, 15, 63).transpose(0, 1), residual.view(15, 2, 63)),
        (x.view(2, 3, 5, 63).transpose(1, 2), residual.view(2, 5, 3, 63)),
    ]
    for x, residual in shapes:
        _compare(op, "returned", [x, residual, weight, bias], INPUTS)
    if bias is not None:
        bias = torch.stack((bias, bias), dim=1)[:, 0]
    weight = torch.ones(1).expand(63)
    _compare(op, "returned", [x, residual, weight, bias], INPUTS)
    if op == "dropout":  # only with a residual
        return
    leaf = x[0].clone().requires_grad_()
    y = OPS[op](leaf, None, weight, bias, implementation="triton")
    y.sum().backward()  # its gradient has strides of 0
    same = leaf.detach().clone().requires_grad_()
    OPS[op](same, None, weight, bias, implementation="reference").sum().backward()
    torch.testing.assert_close(leaf.grad, same.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", IN_TRITON)
def check_no_rows(op):
    tensors = _inputs(op, "returned", 0, 63, FLOAT32)
    for demanded in (INPUTS, ("x",), ("weight", "bias")):
        found = _compare(op, "returned", tensors, demanded)
        if "weight" in demanded:
            assert not found["dweight"].any()


def check_partial_sums_are_bounded_and_repeatable(monkeypatch):
    from progtuning_kernels.ops import row_partials
    from progtuning_kernels.ops.norm import triton as norm_triton

    assert norm_triton.groups_of(33, 64) == (8, 5)
    monkeypatch.setattr(norm_triton, "WARPS", 3)
    assert norm_triton.groups_of(33, 64) == (8, 3)
    monkeypatch.setattr(row_partials, "SUM_ROWS", 2)
    tensors = _inputs("layer_norm", "none", 33, 63, FLOAT32)
    first = _compare("layer_norm", "none", tensors, INPUTS)
    again = _compare("layer_norm", "none", tensors, INPUTS)
    for name in ("dweight", "dbias"):
        assert torch.equal(first[name], again[name])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN
@pytest.mark.parametrize("op", OPS)
def check_nan_stays_in_its_row(op):
    tensors = _inputs(op, "none", 17, 63, BFLOAT16)
    tensors[0][5, 7] = torch.nan
    found = _run(op, "none", tensors, None, INPUTS, "triton")
    rows = torch.arange(17) == 5
    assert torch.equal(found["y"].isnan().all(1), rows)
    assert torch.equal(found["dx"].isnan().all(1), rows)
    assert torch.equal(found["dx"].isnan().any(1), rows)
    assert found["dweight"].isnan().all()


def check_large_offsets_of_rows():
    """A mean of 1000 deviations, of which a rounding is 1000 times as large in the result: the
    variance is that of the differences, and not a difference of squares.
    """
    tensors = _inputs("layer_norm", "none", 17, 257, FLOAT32)
    tensors[0] += 1000
    _compare("layer_norm", "none", tensors, INPUTS, roundings=1000.0)


@pytest.mark.parametrize("op", LAYER_NORMS)
@pytest.mark.unpoisoned
def check_elements_beyond_32_bits(op, monkeypatch):
    """The third row begins 2**31 elements behind the first; what lies between is never touched."""
    # the interpreter would copy all memory of its arguments onto itself
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source: self)
    stride, columns = 2**30, 63
    memory = torch.empty(2 * stride + 1024, dtype=BFLOAT16)
    far, near = [], _inputs(op, "returned", 3, columns, BFLOAT16)
    for i, rows in enumerate([*near[:2], *_upstream(near[:2])]):
        far.append(memory.as_strided((3, columns), (stride, 1), i * columns).copy_(rows))
    wide = _run(op, "returned", [*far[:2], *near[2:]], far[2:], INPUTS, "triton")
    close = _run(op, "returned", near, None, INPUTS, "triton")
    for name, expected in close.items():
        assert torch.equal(wide[name], expected), name


def check_dropped_elements_are_those_of_philox():
    """Of the words that a column and a row have, whatever the shape; no two calls have the same."""
    rows, columns = torch.arange(5)[:, None].expand(5, 72), torch.arange(72).expand(5, 72)
    zero = torch.zeros_like(rows)
    torch.manual_seed(3)
    seeds = [int(torch.randint(2**63 - 1, (1,))) for _ in range(3)]
    assert min(seeds) >= 2**32  # both words of the key count
    torch.manual_seed(3)
    for seed, p, width in zip(seeds, (0.1, 0.5, 0.9), (63, 2, 72), strict=True):
        words = torch.stack(philox(seed, (columns // 4, rows, zero, zero)))
        above_lowest = words.gather(0, (columns % 4)[None])[0] ^ 2**31  # of signed words
        expected = above_lowest >= round(p * 2**32)
        kept = _ones_dropped_out((5, width), p)
        assert torch.equal(kept != 0, expected[:, :width])
        assert torch.equal(kept[kept != 0].unique(), torch.tensor([1 / (1 - p)]))


def check_dropped_elements_are_independent():
    """Rates and correlations within 4 standard errors."""
    torch.manual_seed(0)
    kept = torch.stack([_ones_dropped_out((24, 2048)) != 0 for _ in range(2)]).double()
    deviation = (P * (1 - P)) ** 0.5
    assert (kept.mean((1, 2)) - (1 - P)).abs().max() < 4 * deviation / kept[0].numel() ** 0.5
    kept = (kept - (1 - P)) / deviation
    first = kept[0]
    pairs = [(kept[0], kept[1])]
    pairs += [(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 3, 4, 8, 512)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 16)]
    pairs += [(first[1:, 1:], first[:-1, :-1]), (kept[0, :, 1:], kept[1, :, :-1])]
    for one, other in pairs:
        assert abs((one * other).mean()) < 4 / one.numel() ** 0.5


def check_a_seed_repeats_what_is_dropped():
    torch.manual_seed(11)
    masks = [_ones_dropped_out((3, 257)) for _ in range(3)]
    torch.manual_seed(11)
    again = [_ones_dropped_out((3, 257)) for _ in range(3)]
    for mask, same in zip(masks, again, strict=True):
        assert torch.equal(mask, same)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def check_no_dropout_draws_nothing():
    x, residual, weight, bias = _inputs("dropout", "returned", 3, 63, BFLOAT16)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    keywords = dict(return_sum=True, implementation="triton")
    without = _layer_norm(x, residual, weight, bias, dropout=0.0, **keywords)
    assert torch.equal(torch.get_rng_state(), before)
    for mine, expected in zip(
        without, _layer_norm(x, residual, weight, bias, **keywords), strict=True
    ):
        assert torch.equal(mine, expected)
    _layer_norm(x, residual, weight, bias, dropout=P, **keywords)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinity times 0
def check_all_dropped_out():
    """What is not finite in x is dropped too."""
    x, residual, weight, bias = _inputs("dropout", "returned", 3, 63, FLOAT32)
    x[0, 1], x[1, 2], x[2, 3] = torch.inf, -torch.inf, torch.nan
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    keywords = dict(dropout=1.0, return_sum=True, implementation="triton")
    y, h = _layer_norm(*leaves, **keywords)
    assert torch.equal(h, residual)
    upstream = _upstream([y, h])
    dx, *found = torch.autograd.grad([y, h], leaves, upstream)
    assert torch.equal(dx, torch.zeros_like(x))
    y = _layer_norm(residual, None, weight, bias, implementation="triton")
    expected = torch.autograd.grad([y, residual.clone()], leaves[1:], upstream)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def check_extreme_probabilities():
    from progtuning_kernels.ops.norm.triton import draw_dropout

    expected = {1e-12: (-(2**31), 1.0), 0.5: (-1, 2.0), 1 - 1e-12: (2**31 - 1, 1e12)}
    for p, (last, scale) in expected.items():
        dropout = draw_dropout(p, torch.device("cpu"))
        assert (dropout.last_dropped, dropout.scale) == (last, pytest.approx(scale, rel=1e-3))
        assert dropout.seed.dtype == torch.int64
    assert draw_dropout(1.0, torch.device("cpu"))[1:] == (2**31 - 1, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_backward_drops_what_forward_dropped(dtype):
    """Of two calls, in another order, after other random numbers."""
    calls = []
    for seed in (1, 2):
        x, residual, weight, bias = _inputs("dropout", "returned", 17, 63, dtype)
        torch.manual_seed(seed)
        leaves = [x.requires_grad_(), residual.requires_grad_()]
        keywords = dict(dropout=P, return_sum=True, implementation="triton")
        y, _ = _layer_norm(*leaves, weight, bias, **keywords)
        torch.manual_seed(seed)
        calls.append((leaves, y, _ones_dropped_out((17, 63)) != 0))
    torch.rand(3)
    for leaves, y, kept in calls:
        dx, dresidual = torch.autograd.grad(y, leaves, _upstream([y]))
        assert torch.equal(dx != 0, kept)
        expected = torch.where(kept, dresidual.double() / (1 - P), 0.0)
        tolerance = 2 * torch.finfo(dtype).eps  # dresidual is rounded too
        torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def check_gradients_of_what_is_dropped_out_are_rounded_once(dtype):
    """A rounding of dh before its scaling would change a fifth of the results."""
    x, residual, weight, bias = _inputs("dropout", "returned", 3, 1025, dtype)
    leaf = x.requires_grad_()
    y, h = _dropout_norm(leaf, residual, weight, bias, return_sum=True, implementation="triton")
    upstream = _upstream([y])
    (mine,) = torch.autograd.grad(y, leaf, upstream)
    exact, weight, bias, *upstream = in_fp64([h, weight, bias, *upstream])
    y = _layer_norm(exact.requires_grad_(), None, weight, bias, implementation="reference")
    (truth,) = torch.autograd.grad(y, exact, upstream)
    truth = torch.where(_kept((3, 1025)), truth / (1 - P), 0.0)
    assert (mine == truth.to(dtype)).double().mean() > 0.99


def check_dropout_of_unused_results():
    """Where only the sum is used, and where it has a gradient of other strides."""
    for dtype, demanded in itertools.product((BFLOAT16, FLOAT32), ((1, 1), (1, 0), (0, 1))):
        x, residual, weight, bias = _inputs("dropout", "returned", 17, 63, FLOAT32)
        leaves = [x.to(dtype).requires_grad_(demanded[0] == 1)]
        leaves += [residual.requires_grad_(demanded[1] == 1), weight.requires_grad_()]
        keywords = dict(return_sum=True, implementation="triton")
        _dropout_norm(*leaves, bias, **keywords)[1].sum().backward()
        assert leaves[2].grad is None
        scaled = _kept((17, 63)) / torch.tensor(1 - P)
        for leaf, expected in zip(leaves, (scaled, torch.ones(17, 63)), strict=False):
            if leaf.requires_grad:
                assert torch.equal(leaf.grad, expected.to(leaf.dtype))
            else:
                assert leaf.grad is None


def check_checkpoints_drop_the_same():
    x, residual, weight, bias = _inputs("dropout", "inside", 17, 63, FLOAT32)

    def two_layers(x, residual):
        keywords = dict(residual=residual, dropout=P, implementation="triton")
        y = layer_norm(x, weight, bias, EPS, **keywords)
        return layer_norm(y.tanh(), weight, bias, EPS, **keywords)

    found = []
    for call in (two_layers, functools.partial(checkpoint, two_layers, use_reentrant=False)):
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = call(*leaves)
        torch.rand(3)
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def _models() -> dict[str, tuple[torch.nn.Module, dict]]:
    """Modules of transformers by name, and the keywords that make rms_norm compute the same."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {
        "bert": (torch.nn.LayerNorm(63, eps=EPS), dict()),
        "llama": (LlamaRMSNorm(63, EPS), dict(cast="before_weight")),
        "qwen3": (Qwen3RMSNorm(63, EPS), dict(cast="before_weight")),
        "t5": (T5LayerNorm(63, EPS), dict(cast="before_weight")),
        "gemma3": (Gemma3RMSNorm(63, EPS), dict(offset=1.0, cast="after_weight")),
        "gpt_oss": (GptOssRMSNorm(63, EPS), dict(cast="after_weight")),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "t5", "gemma3", "gpt_oss"])
def test_the_reference_has_the_bits_of_the_models(name, dtype):
    module, keywords = _models()[name]
    module = module.to(dtype)
    torch.nn.init.normal_(module.weight)
    x, residual = (torch.randn(5, 7, 63).to(dtype).requires_grad_() for _ in range(2))
    if name == "bert":
        torch.nn.init.normal_(module.bias)
        mine = layer_norm(x, module.weight, module.bias, EPS, residual=residual, return_sum=True)
    else:
        mine = rms_norm(x, module.weight, EPS, residual=residual, return_sum=True, **keywords)
    h = residual + x
    theirs = (module(h), h)
    inputs = [x, residual, *module.parameters()]
    upstream = _upstream(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    # T5 reads its input twice, and rounds the gradient of each reading
    tolerance = 4 * torch.finfo(dtype).eps if name == "t5" and dtype != FLOAT32 else 0
    for a, b in zip(
        torch.autograd.grad(mine, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_drops_out_as_torch_does(dtype, p):
    inputs = [t.requires_grad_() for t in _inputs("dropout", "returned", 5, 63, dtype)]
    x, residual, weight, bias = inputs
    torch.manual_seed(7)
    mine = _layer_norm(*inputs, dropout=p, return_sum=True, implementation="reference")
    torch.manual_seed(7)
    h = torch.nn.functional.dropout(x, p) + residual
    theirs = torch.nn.functional.layer_norm(h, (63,), weight, bias, EPS), h
    upstream = _upstream(theirs)
    gradients = [torch.autograd.grad(results, inputs, upstream) for results in (mine, theirs)]
    for a, b in zip((*mine, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        assert torch.equal(a, b)
    assert p < 1 or torch.equal(mine[1], residual)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_reference(op):
    tensors = [None if t is None else t.double() for t in _inputs(op, "returned", 4, 5, FLOAT32)]
    present = [t.requires_grad_() for t in tensors if t is not None]

    def function(x, residual, weight, bias=None):
        return OPS[op](x, residual, weight, bias, return_sum=True, implementation="reference")

    assert torch.autograd.gradcheck(function, present)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op, residual):
    torch._dynamo.reset()

    def function(*tensors):
        return OPS[op](*tensors, return_sum=residual == "returned")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = _inputs(op, residual, 5, 63, FLOAT32)
    for demanded in (("x",), ("weight",), ()):
        found = []
        for call in (function, compiled):
            leaves = [
                None if t is None else t.detach().requires_grad_(name in demanded)
                for name, t in zip(INPUTS, tensors, strict=True)
            ]
            results = call(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            if demanded:
                sum(y.square().sum() for y in results).backward()
            requires = [y.requires_grad for y in results]
            gradients = [None if t is None else t.grad for t in leaves]
            found.append(([*results, *gradients], requires))
        assert found[0][1] == found[1][1]
        torch.testing.assert_close(found[0][0], found[1][0])
    with torch.autocast("cpu", BFLOAT16):
        tensors = _inputs(op, residual, 5, 63, BFLOAT16)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_compiled_code_does_not_run_another_implementation_than_it_is_told():
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="implementation=triton cannot run in compiled code"):
        compiled(torch.ones(2, 3), None, None, EPS, implementation="triton")


def test_compiles_dropout_in_one_graph():
    """As plain torch: the same random numbers."""
    torch._dynamo.reset()

    def function(*tensors):
        return _layer_norm(*tensors, dropout=P, return_sum=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = _inputs("dropout", "returned", 5, 63, FLOAT32)
    for dtype in (FLOAT32, BFLOAT16):  # under autocast
        found = []
        with torch.autocast("cpu", BFLOAT16, enabled=dtype == BFLOAT16):
            for call in (function, compiled):
                torch.manual_seed(7)
                leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
                results = call(*leaves)
                torch.autograd.backward(results, _upstream(results))
                found.append([*results, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(*found)
        assert 0 < (found[0][2] == 0).double().mean() < 1


def test_reasons_and_errors(monkeypatch):
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.randn(3, 5), torch.randn(5)
    with pytest.raises(RuntimeError, match="layer_norm: implementation=triton cannot run: Triton"):
        layer_norm(x, weight, None, EPS, implementation="triton")
    with pytest.raises(RuntimeError, match="rms_norm has no native implementation"):
        rms_norm(x, weight, EPS, implementation="native")
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="layer_norm: residual has shape"):
        layer_norm(x, None, None, EPS, residual=x[:1])
    with pytest.raises(ValueError, match="x is torch.int64"):
        layer_norm(x.long(), None, None, EPS)
    with pytest.raises(ValueError, match="return_sum needs a residual"):
        layer_norm(x, None, None, EPS, return_sum=True)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\], got"):
            layer_norm(x, None, None, EPS, residual=x, dropout=wrong)
    with pytest.raises(ValueError, match="dropout needs a residual"):
        layer_norm(x, None, None, EPS, dropout=0.1)
    with pytest.raises(ValueError, match="offset needs"):
        rms_norm(x, weight, EPS, offset=1.0)
    with pytest.raises(ValueError, match="cast must be one of"):
        rms_norm(x, weight, EPS, cast="model")
    with pytest.raises(ValueError, match="rows of at least one element"):
        rms_norm(x[:, :0], None, EPS)
    with pytest.raises(ValueError, match="x is on cpu, weight on meta"):
        rms_norm(x, weight.to("meta"), EPS)

    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def against(tensors):
        return norms.LAYER_NORM.implementations[0].reason_against(Inputs(*tensors))

    pytest.importorskip("triton")
    assert against([x, x, weight, None]) is None
    subclass = x.as_subclass(type("Wrapped", (Tensor,), {}))
    assert "type Wrapped" in against([subclass, None, None, None])
    assert "float64" in against([x.double(), None, None, None])
    assert "at most 8192" in against([torch.empty(1, 8193), None, None, None])
    assert "not torch.bfloat16" in against([x.bfloat16(), None, weight, None])
    assert against([x.bfloat16(), x, weight, None]) is None
    with torch.autocast("cpu", BFLOAT16):
        assert "autocast" in against([x.bfloat16(), None, None, None])
        assert against([x, None, weight, None]) is None


def test_runs_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from progtuning_kernels.ops.norm import layer_norm;"
        "layer_norm(torch.ones(2, 3), None, None, 1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# of rows, multiples of 16 in a model
STRIDES = ("x_stride", "residual_stride", "dy_stride", "dsum_stride", "h_stride")


def _variants(columns: int) -> dict[str, tuple]:
    """Kernels by name, with the kinds of their arguments, constants and options."""
    import triton

    from progtuning_kernels.ops import row_partials
    from progtuning_kernels.ops.norm import triton as nt

    block = nt.block_of(columns)
    constants = dict(C=columns, BLOCK=block)
    rows = dict.fromkeys(("x", "residual", "weight", "bias", "y", "h"), "*bf16")
    strides = dict.fromkeys(("x_stride", "residual_stride"), "i32")
    kinds = {**rows, **strides, "mean": "*fp32", "rstd": "*fp32", "eps": "fp32", "offset": "fp32"}
    of_forward = constants | dict(CENTER=True, CAST_FIRST=True, SUM_TYPE=triton.language.bfloat16)
    back = dict.fromkeys(("dy", "dsum", "h", "weight", "dh"), "*bf16") | {"offset": "fp32"}
    back |= dict.fromkeys(("mean", "rstd", "dweight", "dbias"), "*fp32")
    back |= dict.fromkeys(("n_rows", "dy_stride", "dsum_stride", "h_stride"), "i32")
    only_dh = {name: kind for name, kind in back.items() if name not in ("dweight", "dbias")}
    dropout = {"seed": "*i64", "last_dropped": "i32", "scale": "fp32"}
    both = {"dx": "*bf16", **dropout}
    only_dx = {name: kind for name, kind in only_dh.items() if name not in ("dh", "dsum")} | both
    of_x = {"x": "*bf16", "y": "*bf16", "x_stride": "i32", **dropout}
    of_backward = constants | dict(CENTER=True, ROWS=nt.groups_of(4096, block)[0])
    of_dh = of_backward | dict(ROWS=1, dweight=None, dbias=None)
    options = nt.options(block)
    return {
        "forward": (nt.forward_kernel, kinds, of_forward, options),
        "backward": (nt.backward_kernel, back, of_backward, options),
        "dx only": (nt.backward_kernel, only_dh, of_dh, options),
        "forward, dropout": (nt.forward_kernel, kinds | dropout, of_forward, options),
        "backward, dropout": (nt.backward_kernel, back | both, of_backward, options),
        "dx only, dropout": (nt.backward_kernel, only_dx, of_dh, options),
        "dropout": (nt.dropout_kernel, of_x, constants, options),
        "sums": (
            row_partials.sum_partials_kernel,
            {"partials": "*fp32", "first": "*bf16", "second": "*bf16", "n_partials": "i32"},
            dict(C=columns, ROWS=row_partials.SUM_ROWS, COLUMNS=row_partials.SUM_COLUMNS),
            row_partials.OPTIONS,
        ),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, tmp_path, monkeypatch, capfd):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    used, bad = {}, []
    for columns in (768, 8192):  # with a block's end masked; the longest, with the most warps
        for name, (kernel, kinds, constants, options) in _variants(columns).items():
            compiled = compile_for(
                kernel, kinds, constants, architecture, options, divisible=STRIDES
            )
            key = f"{name} {columns}"
            used[key] = resources(compiled, tmp_path)
            limit = 65536 // (32 * options["num_warps"])
            spilt = used[key].get("STACK", 0) or used[key].get("LOCAL", 0)
            if spilt or used[key].get("REG", 0) > min(128, limit):
                bad.append(key)
            ptx = compiled.asm["ptx"]
            assert "approx" not in ptx and "div.full" not in ptx, key
            assert "atom" not in ptx, key
            if name != "sums":  # rows of bfloat16 are read in 16 bytes per thread
                assert re.search(r"ld\.global\S*\.v4\.b32", ptx), key
    assert not bad, f"sm_{architecture}: {bad} of {used}"
    assert capfd.readouterr() == ("", "")
