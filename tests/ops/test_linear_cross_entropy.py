"""linear_cross_entropy against fp64 truth: the reference here, triton in its interpreter.

TRITON_INTERPRET counts only where it is set before triton is imported, so the functions named
check_* run in one process of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
import os
import re

import pytest
import torch
from accuracy import assert_at_least_as_accurate, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from triton_builds import ARCHITECTURES, compile_for, resources

from progtuning_kernels import backend
from progtuning_kernels.ops.linear_cross_entropy import (
    OP,
    CrossEntropyOutput,
    chunks,
    linear_cross_entropy,
    linear_cross_entropy_op,
    reference,
)
from progtuning_kernels.ops.linear_cross_entropy.chunks import logits_budget, rows_per_chunk

# the package: `from ... import` gives the function of the same name
linear_cross_entropy_module = importlib.import_module("progtuning_kernels.ops.linear_cross_entropy")
N, H, V = 37, 19, 113
NAMES = ("hidden", "weight", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEMANDS = [*itertools.product((True, False), repeat=3)]
UPSTREAM = 0.375
CLASS_WEIGHT = torch.linspace(0.1, 2.0, V)
IGNORING = [*range(8), 9, 36]  # all of one chunk of 8 or 4 rows, a part of the next, the last row
VARIANTS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 1e-2},
    "class-weight": {"class_weight": CLASS_WEIGHT},
    "no-bias": {"without_bias": True},
    "ignore": {"ignore_index": 7},
    "num-items": {"num_items": torch.tensor(50), "reduction": "sum"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "everything": {
        "label_smoothing": 0.2,
        "softcap": 2.0,
        "z_loss": 1e-3,
        "class_weight": CLASS_WEIGHT,
    },
}
VARIANTS["everything-none"] = {**VARIANTS["everything"], "reduction": "none"}
METRICS = ("z_loss", "token_accuracy")
RETURNED = {f"return_{name}": True for name in METRICS}
VARIANTS["everything-returned"] = {**VARIANTS["everything"], **RETURNED}
VARIANTS["everything-none-returned"] = {**VARIANTS["everything-none"], **RETURNED}
IMPLEMENTATION = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"
PRODUCTS = ("aten::mm", "aten::addmm")
CHUNK_ROWS = (N, 8)  # one chunk; four and one of 5 rows


def _inputs(dtype: torch.dtype, *, without_bias: bool = False, n: int = N) -> dict[str, Tensor]:
    """The same at every call; label 112 is there, and rows are ignored."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {"hidden": draw(n, H), "weight": draw(V, H), "bias": draw(V)}
    if without_bias:
        del inputs["bias"]
    labels = torch.randint(0, V, (n,), generator=generator)
    labels[13 % n] = V - 1
    inputs["labels"] = labels
    return inputs


def _case(variant: str, dtype: torch.dtype, n: int = N) -> tuple[dict[str, Tensor], dict]:
    options = dict(VARIANTS[variant])
    inputs = _inputs(dtype, without_bias=options.pop("without_bias", False), n=n)
    if variant.startswith(("ignore", "everything")):
        inputs["labels"][[i for i in IGNORING if i < n]] = options.get("ignore_index", -100)
    return inputs, options


def _plain(
    hidden, weight, labels, bias=None, *, softcap=None, z_loss=0.0, num_items=None, **options
) -> Tensor | CrossEntropyOutput:
    """What transformers computes: logits in the dtype of hidden, the loss in float32."""
    returned = [options.pop(name, False) for name in RETURNED]
    counted = labels != options.get("ignore_index", -100)
    logits = F.linear(hidden, weight, bias)
    correct = ((logits.argmax(1) == labels) & counted).to(torch.float32)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if options.get("class_weight") is not None:
        options["weight"] = options.pop("class_weight").to(logits.dtype)
    if num_items is not None:
        options["reduction"] = "sum"
    loss = F.cross_entropy(logits, labels, **options)
    penalty = z_loss * logits.logsumexp(1).square().masked_fill(~counted, 0)
    reduction = options.get("reduction", "mean")
    if reduction != "none":
        penalty, correct = penalty.sum(), correct.sum() / counted.sum()
    if reduction == "mean":
        weights = options.get("weight")
        penalty = penalty / (counted.sum() if weights is None else weights[labels[counted]].sum())
    loss = (loss + penalty if z_loss else loss) / (1 if num_items is None else num_items)
    penalty = penalty / (1 if num_items is None else num_items)
    if not any(returned):
        return loss
    return CrossEntropyOutput(loss, penalty.detach(), correct)


def _results(function, inputs, options, demand=(True, True, True), dtype=None, upstream=UPSTREAM):
    """Loss, and the gradients that are demanded, by name."""
    inputs = dict(inputs)
    for name, demanded in zip(NAMES, demand, strict=True):
        if name in inputs:
            inputs[name] = inputs[name].detach().to(dtype or inputs[name].dtype, copy=True)
            inputs[name].requires_grad_(demanded)
    loss, metrics = function(**inputs, **options), {}
    if isinstance(loss, CrossEntropyOutput):
        metrics = {name: getattr(loss, name) for name in METRICS}
        loss = loss.loss
        assert not any(t is not None and t.requires_grad for t in metrics.values())
    if loss.requires_grad:
        if loss.ndim:  # each row has its own, some of them 0
            upstream = upstream * torch.arange(-2, loss.numel() - 2).view_as(loss).remainder(5)
        (loss * upstream).sum().backward()
    gradients = {name: inputs[name].grad for name in NAMES if name in inputs}
    return {"loss": loss.detach(), **metrics, **gradients}


def _force_chunks(monkeypatch, rows: int) -> dict[str, int]:
    monkeypatch.setattr(chunks, "LEAST_ROWS", rows)
    return {"max_logits_bytes": 1}


def _assert_accurate(
    name: str, value: Tensor, baseline: dict, truth: dict, label: str = ""
) -> None:
    if value.dtype == torch.float32:
        # over seeds both err alike, 1e-7 to 3e-7, but either may be lucky by what cancels in sums
        roundings = 8.0 if name == "z_loss" else 4.0  # it is a square
    elif value.dtype == torch.bfloat16 and IMPLEMENTATION == "triton":
        roundings = 2.0  # the interpreter truncates to bfloat16 where the GPU rounds
    else:
        roundings = 1.0
    assert_at_least_as_accurate(
        f"{name}, {label}", value, baseline[name], truth[name], roundings=roundings
    )


def _compare(monkeypatch, variant, dtype, implementation, chunks, demands, n=N):
    inputs, options = _case(variant, dtype, n)
    truth = _results(_plain, inputs, options, dtype=torch.float64)
    baseline = _results(_plain, inputs, options)
    for rows, demand in itertools.product(chunks, demands):
        budget = _force_chunks(monkeypatch, rows)
        forced = {**options, **budget, "implementation": implementation}
        mine = _results(linear_cross_entropy, inputs, forced, demand)
        assert mine["loss"].dtype == torch.float32
        assert mine["loss"].shape == truth["loss"].shape
        wanted = dict(zip(NAMES, demand, strict=True))
        for name, value in mine.items():
            if not wanted.get(name, True):
                assert value is None, f"{name} was not demanded"
                continue
            assert value is not None, f"{name} was demanded"
            assert value.dtype == baseline[name].dtype
            if name == "token_accuracy":  # the largest logit may be another in float64
                assert torch.equal(value, baseline[name])
                continue
            label = f"{rows} rows per chunk, demand {demand}"
            _assert_accurate(name, value, baseline, truth, label)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_plain_torch(dtype, variant, monkeypatch):
    _compare(monkeypatch, variant, dtype, "reference", CHUNK_ROWS, DEMANDS)


# what float16 does to numbers is not the variant's affair, and the interpreter is slow
INTERPRETED = [
    (dtype, variant)
    for dtype, variant in itertools.product(DTYPES, VARIANTS)
    if variant != "everything-none-returned"
    and (dtype != torch.float16 or variant in ("plain", "everything"))
]


@pytest.mark.parametrize(("dtype", "variant"), INTERPRETED, ids=str)
def check_as_accurate_as_plain_torch(dtype, variant, monkeypatch, small_blocks):
    demands = DEMANDS if variant == "plain" else DEMANDS[:1]
    once = variant in ("plain", "none", "everything-none", "everything-returned")
    chunks = (4,) if once else (11, 4)
    _compare(monkeypatch, variant, dtype, "triton", chunks, demands, n=11)


@pytest.fixture
def small_blocks(monkeypatch):
    """Four blocks per row, the last of 17 logits."""
    triton_module = pytest.importorskip("progtuning_kernels.ops.linear_cross_entropy.triton")
    monkeypatch.setattr(triton_module, "BLOCK", 32)


def _both(function):
    """Runs under both names: on the reference here, on triton in the interpreter."""
    globals()["check" + function.__name__.removeprefix("test")] = function
    return function


@_both
def test_other_shapes_of_hidden(monkeypatch):
    inputs, _ = _case("plain", torch.float32, n=12)
    flat = _results(linear_cross_entropy, inputs, {"implementation": IMPLEMENTATION})
    shaped = {**inputs, "hidden": inputs["hidden"].view(3, 4, H)}
    shaped["labels"] = inputs["labels"].view(3, 4).int()
    mine = _results(linear_cross_entropy, shaped, {"implementation": IMPLEMENTATION})
    assert torch.equal(mine["hidden"].view(12, H), flat["hidden"])
    assert torch.equal(mine["weight"], flat["weight"]) and torch.equal(mine["loss"], flat["loss"])

    whole = torch.randn(3, 5, H, requires_grad=True)  # shifted, as a causal model's: with gaps
    labels = torch.randint(0, V, (3, 5))
    loss = linear_cross_entropy(
        whole[:, :-1], inputs["weight"], labels[:, 1:], implementation=IMPLEMENTATION
    )
    expected = _plain(whole[:, :-1].reshape(12, H), inputs["weight"], labels[:, 1:].reshape(12))
    torch.testing.assert_close(loss, expected)
    (d,) = torch.autograd.grad(loss, whole)
    torch.testing.assert_close(d, torch.autograd.grad(expected, whole)[0])


@_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_ignored(dtype):
    inputs, _ = _case("plain", dtype, n=5)
    inputs["labels"].fill_(-100)
    for reduction, smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected = _results(_plain, inputs, options)
        mine = _results(linear_cross_entropy, inputs, {**options, "implementation": IMPLEMENTATION})
        assert mine["loss"].isnan() if reduction == "mean" else not mine["loss"].any()
        assert not any(mine[name].any() or expected[name].any() for name in NAMES)


@_both
@pytest.mark.parametrize("classes", [1, 16, 33])
def test_few_classes(classes):
    inputs = {"hidden": torch.randn(3, H), "weight": torch.randn(classes, H)}
    inputs["labels"] = torch.tensor([0, classes - 1, -100])
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    truth = _results(_plain, inputs, options, dtype=torch.float64)
    mine = _results(linear_cross_entropy, inputs, {**options, "implementation": IMPLEMENTATION})
    for name, value in mine.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-6)


@_both
def test_no_rows():
    inputs, _ = _case("plain", torch.float32, n=1)
    inputs["hidden"], inputs["labels"] = inputs["hidden"][:0], inputs["labels"][:0]
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "implementation": IMPLEMENTATION}
        mine = _results(linear_cross_entropy, inputs, options)
        assert mine["loss"].isnan() if reduction == "mean" else not mine["loss"].any()
        assert mine["hidden"].shape == (0, H)
        assert not mine["weight"].any() and not mine["bias"].any()


@_both
def test_masked_classes_and_large_logits(small_blocks):
    """A bias of -inf takes classes out, whole blocks of them; logits of 1e4 do not overflow."""
    inputs, _ = _case("plain", torch.float32, n=9)
    inputs["bias"][:40] = -math.inf
    inputs["labels"] = inputs["labels"] % (V - 40) + 40
    inputs["hidden"][2] *= 1e4
    truth = _results(_plain, inputs, {}, dtype=torch.float64)
    baseline = _results(_plain, inputs, {})
    mine = _results(linear_cross_entropy, inputs, {"implementation": IMPLEMENTATION})
    for name, value in mine.items():
        _assert_accurate(name, value, baseline, truth)


@_both
@pytest.mark.parametrize("rows", [False, True], ids=["reduced", "rows"])
def test_small_gradients_survive_float16(rows):
    """As under a loss scale: a mean over 4096 rows would push d(logits) below float16's least."""
    n, scale = 16, 65536.0 * 4
    generator = torch.Generator().manual_seed(2)
    small = {
        "hidden": torch.randn(n, 4, generator=generator).half(),
        "weight": (torch.randn(5, 4, generator=generator) * 1e-3).half(),
        "labels": torch.randint(0, 5, (n,), generator=generator),
    }
    options = {"num_items": 4096}
    if rows:
        options, scale = {"reduction": "none"}, 2**-14
    truth = _results(_plain, small, options, dtype=torch.float64, upstream=scale)
    baseline = _results(_plain, small, options, upstream=scale)
    forced = {**options, "implementation": IMPLEMENTATION}
    mine = _results(linear_cross_entropy, small, forced, upstream=scale)
    for name, value in mine.items():
        _assert_accurate(name, value, baseline, truth)


@_both
def test_large_gradients_of_rows_fit_float16():
    """As under a loss scale: d(logits), but not d(hidden), would leave float16's range."""
    inputs, _ = _case("plain", torch.float16, n=5)
    inputs["weight"] *= 1e-3
    found = []
    for dtype in (torch.float16, torch.float64):
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        hidden = tensors["hidden"].requires_grad_()
        loss = linear_cross_entropy(
            **tensors,
            reduction="none",
            implementation=IMPLEMENTATION if dtype == torch.float16 else "reference",
        )
        found.append(torch.autograd.grad(loss.sum() * 2.0**18, hidden)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=5e-3, atol=0.5)


_SIZES = {"rows": (0, 9), "classes": (1, 40), "width": (1, 3), "chunk_rows": (1, 9)}


@_both
# the fixtures of ops' tests set the same for all examples
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.fixed_dictionaries({name: st.integers(*limits) for name, limits in _SIZES.items()}),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(("mean", "sum", "none")),
    options=st.fixed_dictionaries(
        {"z_loss": st.sampled_from((0.0, 0.01))},
        optional={
            "label_smoothing": st.just(0.1),
            "softcap": st.just(4.0),
            "num_items": st.just(3),
            "ignore_index": st.just(0),
        },
    ),
    present=st.lists(st.booleans(), min_size=2, max_size=2),
    demand=st.sampled_from(DEMANDS),
    seed=st.integers(0, 99),
)
def test_what_is_returned_changes_nothing(sizes, dtype, reduction, options, present, demand, seed):
    """Whole numbers, many of them equal: the logits are exact, and the first of equals counts."""
    rows, classes = sizes["rows"], sizes["classes"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    inputs = {"hidden": draw(rows, sizes["width"]), "weight": draw(classes, sizes["width"])}
    if present[0]:
        inputs["bias"] = draw(classes)
    if present[1]:
        options = {**options, "class_weight": torch.linspace(0.5, 1, classes)}
    inputs["labels"] = torch.randint(0, classes, (rows,), generator=generator)
    ignored = torch.rand(rows, generator=generator) < 0.3
    inputs["labels"][ignored] = options.get("ignore_index", -100)
    if reduction == "none":
        options.pop("num_items", None)
    options = {**options, "reduction": reduction, "implementation": IMPLEMENTATION}
    with pytest.MonkeyPatch.context() as patch:
        options |= _force_chunks(patch, sizes["chunk_rows"])
        alone = _results(linear_cross_entropy, inputs, options, demand)
        mine = _results(linear_cross_entropy, inputs, options | RETURNED, demand)
    for name, value in alone.items():
        assert mine[name] is value is None or torch.equal(mine[name], value) or value.isnan().all()
    for name in ("implementation", "max_logits_bytes"):
        del options[name]
    truth = _results(_plain, inputs, options | RETURNED, dtype=torch.float64)
    torch.testing.assert_close(
        mine["z_loss"].double(), truth["z_loss"], rtol=1e-5, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        mine["token_accuracy"], truth["token_accuracy"], rtol=0, atol=0, equal_nan=True
    )
    assert mine["z_loss"].dtype == mine["token_accuracy"].dtype == torch.float32


@_both
def test_one_of_two_is_returned():
    inputs, _ = _case("plain", torch.float32, n=3)
    for asked, other in (METRICS, METRICS[::-1]):
        options = {f"return_{asked}": True, "z_loss": 0.1, "implementation": IMPLEMENTATION}
        found = linear_cross_entropy(**inputs, **options)
        assert isinstance(found, CrossEntropyOutput)
        assert getattr(found, asked).ndim == 0 and getattr(found, other) is None


def check_nan_logits_are_never_right():
    inputs, _ = _case("plain", torch.float32, n=2)
    inputs["labels"] = torch.tensor([5, 0])
    inputs["hidden"][:] = math.nan
    found = linear_cross_entropy(**inputs, return_token_accuracy=True, implementation="triton")
    assert found.loss.isnan() and found.token_accuracy == 0


@_both
def test_sums_over_chunks_in_bfloat16(monkeypatch):
    """As accurate as plain torch that accumulates the gradients of the chunks in bfloat16."""
    rows = 4 if IMPLEMENTATION == "triton" else 8
    inputs, options = _case("everything", torch.bfloat16, n=4 * rows)
    truth = _results(_plain, inputs, options, dtype=torch.float64)
    budget = _force_chunks(monkeypatch, rows) | {"implementation": IMPLEMENTATION}
    wide = _results(linear_cross_entropy, inputs, options | budget)
    same = _results(linear_cross_entropy, inputs, options | budget | {"accum_dtype": torch.float32})
    assert all(torch.equal(same[name], value) for name, value in wide.items())
    low = _results(linear_cross_entropy, inputs, options | budget | {"accum_dtype": torch.bfloat16})
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    items = CLASS_WEIGHT[inputs["labels"][inputs["labels"] != -100]].sum()
    for start in range(0, 4 * rows, rows):
        span = slice(start, start + rows)
        part = {**leaves, "hidden": leaves["hidden"][span], "labels": inputs["labels"][span]}
        (_plain(**part, **options, num_items=items) * UPSTREAM).backward()
    for name in ("weight", "bias"):
        assert low[name].dtype == torch.bfloat16 and not torch.equal(low[name], wide[name])
        _assert_accurate(name, low[name], {name: leaves[name].grad}, truth)
        assert relative_error(low[name], truth[name]) > relative_error(wide[name], truth[name])
    for name in ("loss", "hidden"):
        assert torch.equal(low[name], wide[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_over_many_chunks_is_not_rounded_in_between(dtype, monkeypatch):
    inputs = _inputs(dtype, n=512)
    inputs["hidden"] = inputs["hidden"].abs()  # what is added last is small beside the sum
    truth = _results(_plain, inputs, {}, dtype=torch.float64)
    baseline = _results(_plain, inputs, {})
    mine = _results(linear_cross_entropy, inputs, _force_chunks(monkeypatch, 4))
    _assert_accurate("weight", mine["weight"], baseline, truth)
    _assert_accurate("bias", mine["bias"], baseline, truth)


@_both
@pytest.mark.parametrize("n", [0, 1, 5000])
def test_the_upstream_gradient_is_not_rounded_to_float16(n):
    """A loss scale of 65536 would be inf."""
    gradient = torch.randn(n).mul(1e-3).half()
    factor = torch.tensor(65536.1 * 1.1)
    expected = (gradient.double() * factor.double()).half()
    scale = {op.name: op.scale for op in OP.implementations}[IMPLEMENTATION]
    scale(gradient, factor)
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)


@_both
def test_one_backward_per_loss():
    inputs, _ = _case("plain", torch.float32, n=3)
    weight = inputs["weight"].requires_grad_()
    loss = linear_cross_entropy(**inputs, implementation=IMPLEMENTATION)
    loss.backward(retain_graph=True)
    kept = weight.grad.clone()
    with pytest.raises(RuntimeError, match="a second backward of the same loss"):
        loss.backward()
    assert torch.equal(weight.grad, kept)


@_both
def test_any_number_of_backwards_of_rows(monkeypatch):
    inputs, _ = _case("plain", torch.float32, n=9)
    budget = _force_chunks(monkeypatch, 4)
    inputs["hidden"], inputs["labels"] = inputs["hidden"].view(3, 3, H), inputs["labels"].view(3, 3)
    tensors = [inputs[name].requires_grad_() for name in NAMES]
    options = {"reduction": "none", "implementation": IMPLEMENTATION, **budget}
    loss = linear_cross_entropy(**inputs, **options)
    assert loss.shape == (3, 3)
    for upstream in (torch.ones(()).expand(3, 3), torch.rand(3, 3).t()):
        found = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
        logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
        plain = F.cross_entropy(logits.view(9, V), inputs["labels"].view(9), reduction="none")
        expected = torch.autograd.grad(plain.view(3, 3), tensors, upstream)
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        inputs["weight"].mul_(2)  # the logits would be others
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def check_a_wrong_label_makes_the_loss_nan():
    inputs, _ = _case("plain", torch.float32, n=3)
    for wrong in (V, -1, 2**40):
        inputs["labels"][1] = wrong
        assert linear_cross_entropy(**inputs, implementation="triton").isnan()


@pytest.mark.unpoisoned
def check_addresses_beyond_32_bits():
    """Three rows 2^30 logits apart: only the pages that hold them exist."""
    from progtuning_kernels.ops.linear_cross_entropy import triton as triton_module

    stride, classes = 2**30, 40
    far = torch.empty(2 * stride + reference.padded(classes), dtype=torch.float16)
    logits = far.as_strided((3, classes), (stride, 1))
    logits.copy_(torch.randn(3, classes))
    near, labels = logits.clone(), torch.tensor([3, 39, 0])
    row_loss = reference.RowLoss(-100, 0.0, None, 0.0, None, None, torch.ones(()))
    results = []
    for where in (near, logits):
        losses = torch.empty(3)
        triton_module.rows(where, labels, losses, row_loss, gradient=True)
        results.append(losses)
    assert torch.equal(*results) and torch.equal(near, logits)


def _peak_bytes(function) -> tuple[int, int]:
    """Largest sum of what the CPU allocator handed out and got not back; largest allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)), max(sizes)


def _workspace_bytes(hidden: Tensor, weight: Tensor) -> int:
    """What a BLAS takes for itself in the products of a chunk: oneDNN packs operands for AMX."""
    classes = len(weight)
    logits = torch.zeros(len(hidden), reference.padded(classes), dtype=hidden.dtype)[:, :classes]
    found = []
    for a, b in ((hidden, weight.t()), (logits, weight), (logits.t(), hidden)):
        result_bytes = len(a) * b.shape[1] * a.element_size()
        found.append(_peak_bytes(functools.partial(torch.mm, a, b))[0] - result_bytes)
    return max(0, *found)


def _step(*tensors: Tensor, **options) -> None:
    asked = {**RETURNED, "z_loss": 1e-4}  # which a few bytes for each row pay
    loss = linear_cross_entropy(*tensors, implementation=IMPLEMENTATION, **asked, **options).loss
    if loss.requires_grad:
        loss.sum().backward()


@_both
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peak_memory_is_what_the_docstring_says(dtype, reduction, monkeypatch):
    _compare_peak(monkeypatch, dtype, None, reduction)


def test_peak_memory_of_sums_in_bfloat16(monkeypatch):
    _compare_peak(monkeypatch, torch.bfloat16, torch.bfloat16, "mean")


def _compare_peak(monkeypatch, dtype, accum_dtype, reduction):
    # 97 rows: oneDNN packs a weight of 24 columns for AMX into as many bytes as 84 rows of logits
    n, width, classes, rows = 97, 24, 1000, 16
    element, wide = dtype.itemsize, 4
    hidden = torch.randn(n, width).to(dtype)
    weight = torch.randn(classes, width).to(dtype)
    bias, labels = torch.randn(classes).to(dtype), torch.randint(0, classes, (n,))
    interpreted = IMPLEMENTATION == "triton"
    for chunk_rows, demand in itertools.product(
        (rows, n), DEMANDS[::3] if interpreted else DEMANDS
    ):
        budget = _force_chunks(monkeypatch, chunk_rows)
        tensors = (hidden, weight, bias)
        for tensor, demanded in zip(tensors, demand, strict=True):
            tensor.grad = None
            tensor.requires_grad_(demanded)
        several = chunk_rows < n
        options = {"reduction": reduction, "accum_dtype": accum_dtype, **budget}
        step = functools.partial(_step, hidden, weight, labels, bias, **options)
        # what is imported or cached on the first call; the first profile misses what is freed
        _peak_bytes(step)
        for tensor in tensors:
            tensor.grad = None
        peak, largest = _peak_bytes(step)
        need_hidden, need_weight, need_bias = demand
        accum = wide if accum_dtype is None else accum_dtype.itemsize
        of_weight = accum if several or dtype == torch.float16 else element
        logits = chunk_rows * reference.padded(classes) * element
        kept = need_hidden * n * width * element + need_bias * 2 * classes * wide
        kept += 64 * n + 4096
        held = classes * width * of_weight
        rounding = (
            classes * width * element if dtype != torch.float32 and of_weight > element else 0
        )
        extra = 6 * chunk_rows * classes * wide if not interpreted else 0
        converted = chunk_rows * (classes + width) * wide if element < wide else 0
        workspace = _workspace_bytes(hidden[:chunk_rows].detach(), weight.detach())
        forward = logits + max(extra, converted) + workspace
        assert peak <= kept + need_weight * held + max(forward, need_weight * rounding)
        if several:
            assert largest < n * classes * element


def test_nothing_is_computed_that_is_not_demanded(monkeypatch):
    inputs, _ = _case("plain", torch.float32)
    budget = _force_chunks(monkeypatch, N)
    for demand in DEMANDS:
        tensors = dict(inputs)
        for name, demanded in zip(NAMES, demand, strict=True):
            tensors[name] = inputs[name].clone().requires_grad_(demanded)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            asked = RETURNED if any(demand) else {}
            linear_cross_entropy(**tensors, **budget, **asked, implementation="reference")
        counts = {event.key: event.count for event in profiled.key_averages()}
        products = counts.get("aten::mm", 0) + counts.get("aten::addmm", 0)
        assert products == 1 + demand[0] + demand[1]
        assert ("aten::scatter_add_" in counts) == any(demand)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            rows = linear_cross_entropy(**tensors, **budget, **RETURNED, reduction="none").loss
            if rows.requires_grad:
                rows.sum().backward()
        counts = {event.key: event.count for event in profiled.key_averages()}
        products = counts.get("aten::mm", 0) + counts.get("aten::addmm", 0)
        assert products == 1 + any(demand) + demand[0] + demand[1]
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            linear_cross_entropy(**tensors, **budget, implementation="reference")
        assert "aten::mm" not in {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize(
    ("rows", "classes", "expected"),
    [
        (8192, 128256, 2048),  # the default budget in bfloat16
        (8193, 128256, 1664),
        (100, 128256, 100),
        (513, 10**7, 512),
        (8192, 1000, 8192),
        (0, 1000, 1),
    ],
)
def test_rows_per_chunk(rows, classes, expected):
    assert rows_per_chunk(rows, classes, 2, 512 * 2**20) == expected


@pytest.mark.parametrize(
    ("rows", "classes", "width", "dtype", "accum_dtype", "expected"),
    [
        # Llama-1B: half of the rows, whose logits are as large as the sum of d(weight)
        (8192, 128256, 2048, torch.bfloat16, torch.float32, 4096),
        (6144, 128256, 2048, torch.bfloat16, torch.float32, 6144),  # no sum saves what they take
        (6145, 128256, 2048, torch.bfloat16, torch.float32, 3200),
        (8192, 128256, 4096, torch.bfloat16, torch.float32, 8192),  # Llama-8B
        (8192, 128256, 2048, torch.bfloat16, torch.bfloat16, 2048),  # the default: no more fit
        (8192, 128256, 2048, torch.float16, torch.float32, 4096),
        (8192, 128256, 2048, torch.float32, torch.float32, 2048),
        (65536, 50257, 768, torch.bfloat16, torch.float32, 5120),  # the default
    ],
)
def test_rows_per_chunk_of_a_trained_weight(rows, classes, width, dtype, accum_dtype, expected):
    budget = logits_budget(rows, classes, width, dtype, accum_dtype)
    assert rows_per_chunk(rows, classes, dtype.itemsize, budget) == expected


@given(
    rows=st.integers(1, 2**20),
    classes=st.integers(1, 2**18),
    width=st.integers(1, 2**14),
    dtypes=st.sampled_from([(d, torch.float32) for d in DTYPES] + [(torch.bfloat16,) * 2]),
)
def test_what_the_budget_of_a_trained_weight_may_take(rows, classes, width, dtypes):
    """Twice the sum of d(weight), or 512 MiB and the sum, unless 512 rows take more."""
    dtype, accum_dtype = dtypes
    budget = logits_budget(rows, classes, width, *dtypes)
    chunk_rows = rows_per_chunk(rows, classes, dtype.itemsize, budget)
    kept = accum_dtype if chunk_rows < rows else chunks.stored_dtypes(*dtypes)[1]
    summed = classes * width * accum_dtype.itemsize
    taken = chunk_rows * classes * dtype.itemsize + classes * width * kept.itemsize
    most = max(512 * 2**20, summed, 512 * classes * dtype.itemsize) + summed
    assert taken <= most


@_both
def test_the_budget_is_for_the_kernels_and_a_trained_weight(monkeypatch):
    """The reference takes several times the logits beside them, and keeps to 512 MiB."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(chunks, "LEAST_LOGITS_BYTES", 4 * V * 2)  # two rows
    inputs, _ = _case("no-bias", torch.float32, n=40)
    made = []
    real = {op.name: op for op in OP.implementations}[IMPLEMENTATION].function

    def counted(logits, *arguments, **keywords):
        made.append(len(logits))
        return real(logits, *arguments, **keywords)

    implementations = tuple(
        dataclasses.replace(op, function=counted) if op.name == IMPLEMENTATION else op
        for op in OP.implementations
    )
    op = dataclasses.replace(OP, implementations=implementations)
    monkeypatch.setitem(backend.OPS, "linear_cross_entropy", op)
    monkeypatch.setattr(linear_cross_entropy_module, "OP", op)
    for trained, options, expected in (
        (True, {}, 14 if IMPLEMENTATION == "triton" else 2),  # 19 rows are as large as the sum
        (False, {}, 2),
        (True, {"max_logits_bytes": 4 * V * 8}, 8),
    ):
        made.clear()
        options["implementation"] = IMPLEMENTATION
        _results(linear_cross_entropy, inputs, options, (True, trained, False))
        assert made[0] == expected and sum(made) == 40


def test_autocast_casts_as_a_linear_layer():
    inputs, _ = _case("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine = _results(linear_cross_entropy, inputs, {})
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = _results(linear_cross_entropy, low, {})
    assert torch.equal(mine["loss"], expected["loss"])
    for name in NAMES:
        assert mine[name].dtype == torch.float32
        assert torch.equal(mine[name], expected[name].float())


def test_float64_stays_float64(monkeypatch):
    inputs, options = _case("everything", torch.float64)
    truth = _results(_plain, inputs, options)
    mine = _results(linear_cross_entropy, inputs, options | _force_chunks(monkeypatch, 8))
    for name, value in mine.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-15)


BAD = {
    "hidden .*got": {"weight": torch.zeros(V, H + 1)},
    "needs labels": {"labels": torch.zeros(N + 1, dtype=torch.int64)},
    "labels must be int64": {"labels": torch.zeros(N)},
    "bias must be": {"bias": torch.zeros(V + 1)},
    "class_weight must be": {"class_weight": torch.zeros(V - 1)},
    "hidden is torch.float32, weight is torch.float16": {"weight": torch.zeros(V, H).half()},
    "hidden is torch.float32, bias is torch.float64": {"bias": torch.zeros(V).double()},
    "tensors on cpu and meta": {"weight": torch.zeros(V, H, device="meta")},
    "hidden is torch.int64": {"hidden": torch.zeros(N, H, dtype=torch.int64)},
    "reduction must be one of": {"reduction": "None"},
    "num_items divides a sum": {"reduction": "none", "num_items": 3},
    "is not in .0, 1.": {"label_smoothing": 1.5},
    "softcap 0.0 is not positive": {"softcap": 0.0},
    "z_loss -1.0 is negative": {"z_loss": -1.0},
    "num_items has 2 elements": {"num_items": torch.ones(2)},
    "max_logits_bytes 0 is not positive": {"max_logits_bytes": 0},
    "accum_dtype must be torch.float32, got torch.bfloat16": {"accum_dtype": torch.bfloat16},
    "weight has no rows": {"weight": torch.zeros(0, H), "bias": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gives_one_error(message):
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**{**_inputs(torch.float32), **BAD[message]})


def test_float16_sums_would_overflow():
    inputs = _inputs(torch.float16)
    with pytest.raises(ValueError, match="hidden is torch.float16: accum_dtype must be torch.floa"):
        linear_cross_entropy(**inputs, accum_dtype=torch.float16)


def test_something_that_is_no_tensor():
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        linear_cross_entropy(torch.zeros(2, H), torch.zeros(V, H), [1, 2])
    with pytest.raises(TypeError, match="bias must be a tensor, got float"):
        linear_cross_entropy(torch.zeros(1, H), torch.zeros(V, H), torch.tensor([1]), 0.5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype, reduction, monkeypatch):
    _force_chunks(monkeypatch, 8)
    for demand in ((True, True, True), (False, True, False), (False, False, False)):
        inputs, options = _case("everything", dtype)
        for name, demanded in zip(NAMES, demand, strict=True):
            inputs[name].requires_grad_(demanded)
        arguments = (inputs["hidden"], inputs["weight"], inputs["bias"], inputs["labels"])
        torch.library.opcheck(
            linear_cross_entropy_op,
            (
                *arguments,
                options["class_weight"],
                None,
                None,
                [reduction == "mean" and demanded for demanded in demand],
                -100,
                0.2,
                2.0,
                0.001,
                reduction,
                None if dtype == torch.float16 else torch.float32,
                True,
                dtype == torch.float32,
                1,
                "reference",
            ),
        )


@pytest.mark.parametrize("variant", ["everything-returned", "everything-none-returned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled(dtype, variant, monkeypatch):
    inputs, options = _case(variant, dtype)
    options |= _force_chunks(monkeypatch, 8)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for demand in (DEMANDS[0], (False, True, False), (True, False, False), DEMANDS[-1]):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            mine = _results(compiled, inputs, options, demand)
        products = sum(
            event.count for event in profiled.key_averages() if event.key.startswith(PRODUCTS)
        )
        again = any(demand) and variant == "everything-none-returned"
        assert products == math.ceil(N / 8) * (1 + again + demand[0] + demand[1])
        expected = _results(linear_cross_entropy, inputs, options, demand)
        for name, value in expected.items():
            assert (mine[name] is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(mine[name], value, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, tmp_path, monkeypatch, capfd):
    pytest.importorskip("triton")
    from progtuning_kernels.ops.linear_cross_entropy import triton as triton_module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    floats = ("label_smoothing", "softcap", "inverse_softcap", "z_loss")
    common = {
        "stride": "i32",
        "width": "i32",
        "classes": "i32",
        "labels": "*i64",
        "losses": "*fp32",
    }
    common |= {"factor": "*fp32", "ignore_index": "i32", **dict.fromkeys(floats, "fp32")}
    weights = dict.fromkeys(("class_weight", "class_weight_sum", "z_losses", "correct"), "*fp32")
    compiled = []
    for dtype, everything in (("bf16", False), ("bf16", True), ("fp32", True)):
        flags = dict.fromkeys(("SMOOTHING", "SOFTCAP", "Z_LOSS"), everything)
        constants = {**flags, "GRADIENT": True, "FACTORS": everything}
        constants["BLOCK"] = triton_module.BLOCK
        signature = {"logits": f"*{dtype}", **common, **(weights if everything else {})}
        if not everything:
            constants |= dict.fromkeys(weights)
        kernel = compile_for(
            *(triton_module.rows_kernel, signature, constants, architecture),
            triton_module.OPTIONS,
            divisible=("stride", "width"),  # as at a launch with 50,257 logits: rows are padded
        )
        # without vectors a row of bfloat16 is read in 2 bytes per thread and instruction
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])
        assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"])
        compiled.append(kernel)
    compiled.append(
        compile_for(
            triton_module.scale_kernel,
            {"values": "*bf16", "factor": "*fp32", "n": "i32"},
            {"BLOCK": triton_module.SCALE_BLOCK},
            architecture,
            triton_module.SCALE_OPTIONS,
        )
    )
    for kernel in compiled:
        used = resources(kernel, tmp_path)
        assert used.get("STACK", 0) == used.get("LOCAL", 0) == 0
        assert used.get("REG", 0) <= 128
    assert capfd.readouterr() == ("", "")
