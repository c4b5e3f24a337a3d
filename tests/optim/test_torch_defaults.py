"""The dtype, device and determinism that a script has set for torch change nothing here."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn

from progtuning_kernels import (
    AdaptiveSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ops,
    patch_model,
    plan_training,
)

PACKAGE = Path(__file__).parents[2] / "progtuning_kernels"
DTYPES = [torch.bfloat16, torch.float16, torch.float64]
# what torch.set_default_dtype and torch.set_default_device decide about, where nobody else does
FLOATS = {"empty", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "asarray"}
FLOATS |= {"linspace", "logspace", "rand", "randn", "normal", "eye", "empty_strided"}
PLACED = FLOATS | {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
OWN_PROCESS = ("cli", "integrations", "report")  # they run in processes, or on data, of their own
SHAPES = [(1,), (7, 9), (257,), (70, 125)]


@pytest.fixture(params=[*DTYPES, "meta", "deterministic"], ids=str)
def defaults(request) -> Iterator[Callable[[], None]]:
    """Sets one of torch's defaults when it is called."""

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        elif request.param == "deterministic":  # fills what is allocated with NaN, too
            torch.use_deterministic_algorithms(True)
        else:
            torch.set_default_dtype(request.param)

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def _trained(dtype: torch.dtype = torch.float32, *, bad: bool = False, **options) -> list[Tensor]:
    """Everything that three steps leave behind, and a fourth after loading into another one."""
    own = [nn.Parameter(_draw(*shape, dtype=dtype)) for shape in SHAPES]
    options = dict(lr=0.1, eps=1e-3, weight_decay=0.1) | options
    optimizer = MaskedAdamW(own, **options)
    norms = []
    for step in range(4):
        if step == 3:
            saved = optimizer.state_dict()
            saved["state"][0]["step"] = 1001.0  # as old versions of torch saved it
            optimizer = MaskedAdamW(own, **options)
            optimizer.load_state_dict(saved)
        for p in own:
            gradient = _draw(*p.shape, seed=step, dtype=dtype) * 3
            if bad and step == 1:
                gradient[-1] = float("nan")
            if options.get("in_backward"):
                (p * gradient).sum().backward()
            else:
                p.grad = gradient
        optimizer.step()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm.clone())
    assert optimizer.skipped_steps == bad
    states = [t for p in own for t in optimizer.state[p].values()]
    return [*own, *states, *norms, *optimizer.torch_state_dict()["state"][3].values()]


def _scaled(**options) -> list[Tensor]:
    own = [nn.Parameter(_draw(*shape)) for shape in SHAPES]
    optimizer = MaskedAdamW(own, lr=0.1, **options)
    for p in own:
        p.grad = _draw(*p.shape) * 8
    optimizer.grad_scale = torch.tensor(8.0, device="cpu")  # of the default dtype
    optimizer.found_inf = torch.tensor(0.0, device="cpu")
    optimizer.step()
    return own


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(3)
    out = function(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out, leaves, _draw(*out.shape, seed=9, dtype=out.dtype))]


def _norms_and_activations(dtype: torch.dtype) -> list[Tensor]:
    x, up = _draw(5, 33, dtype=dtype), _draw(5, 33, seed=1, dtype=dtype)
    weight, bias = _draw(33, seed=2, dtype=dtype), _draw(33, seed=3, dtype=dtype)
    found = _with_gradients(ops.layer_norm, x, weight, bias, eps=1e-5)
    found += _with_gradients(ops.rms_norm, x, weight, eps=1e-5)

    def dropped(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm(x, weight, bias, 1e-5, residual=up, dropout=0.25)

    found += _with_gradients(dropped, x, up, weight, bias)
    found += _with_gradients(ops.gelu, x) + _with_gradients(ops.bias_gelu, x, bias)
    found += _with_gradients(ops.swiglu, x, up) + _with_gradients(ops.geglu, x, up)
    return found


def _dropout(dtype: torch.dtype) -> list[Tensor]:
    return _with_gradients(ops.dropout, _draw(70, 33, dtype=dtype), p=0.25)


def _cross_entropy(dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = _draw(40, 16, dtype=dtype), _draw(23, 16, seed=1, dtype=dtype)
    labels = torch.arange(40, device="cpu") % 23
    class_weight = _draw(23, seed=2).abs()
    found = []
    for options in (
        {"num_items": 1001.0},
        {"num_items": 70_001, "label_smoothing": 0.1, "class_weight": class_weight},
        {"softcap": 5.0, "z_loss": 1e-3},
    ):
        found += _with_gradients(ops.linear_cross_entropy, hidden, weight, labels=labels, **options)
    return found


def _norm() -> list[Tensor]:
    mixed = [_draw(300), _draw(70, seed=1, dtype=torch.bfloat16)]
    return [ops.masked_norm(mixed), ops.masked_norm([])]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "plain": lambda: _trained(),
    "clipped": lambda: _trained(max_grad_norm=1.0),
    "skipped": lambda: _trained(max_grad_norm=1.0, bad=True),
    "float64": lambda: _trained(torch.float64, max_grad_norm=1.0),
    "8bit": lambda: _trained(max_grad_norm=1.0, state_dtype="8bit"),
    "bfloat16 moments": lambda: _trained(state_dtype=torch.bfloat16),
    "stochastic": lambda: _trained(torch.bfloat16, stochastic_rounding=True),
    "masters": lambda: _trained(torch.float16, master_weights=True, max_grad_norm=1.0),
    "float16": lambda: _trained(torch.float16, max_grad_norm=1.0, bad=True),
    "in backward": lambda: _trained(max_grad_norm=1.0, in_backward=True),
    "per block": lambda: _trained(max_grad_norm=1.0, in_backward=True, clip_mode="per_block"),
    "previous norm": lambda: _trained(
        max_grad_norm=1.0, in_backward=True, clip_mode="previous_norm"
    ),
    "offload": lambda: _trained(on_freeze="offload"),
    "scaled": lambda: _scaled(max_grad_norm=0.5),
    "scaled, without a norm": lambda: _scaled(nonfinite="ignore"),
    "masked_norm": _norm,
}
CASES |= {
    f"{function.__name__} {dtype}": lambda function=function, dtype=dtype: function(dtype)
    for function in (_norms_and_activations, _dropout, _cross_entropy)
    for dtype in (torch.float32, torch.bfloat16)
}


def _same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a.dtype, a.device) == (b.dtype, b.device), i
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_ops_and_optimizer(case, backend, defaults, monkeypatch):
    monkeypatch.setenv("PROGTUNING_BACKEND", backend)
    expected = CASES[case]()
    defaults()
    _same_bits(CASES[case](), expected)


@pytest.mark.parametrize("defaults", [torch.bfloat16, "meta"], ids=str, indirect=True)
def check_triton(defaults, monkeypatch):
    monkeypatch.setenv("PROGTUNING_BACKEND", "triton")
    cases: list[Callable[[], list[Tensor]]] = [
        lambda: _trained(nonfinite="ignore", state_dtype="8bit"),
        lambda: _norms_and_activations(torch.float32),
        lambda: _cross_entropy(torch.bfloat16),
    ]
    expected = [case() for case in cases]
    defaults()
    for case, before in zip(cases, expected, strict=True):
        _same_bits(case(), before)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_a_patched_model(name, cache, defaults):
    """It is made before; what patch_model tries, swaps and stores is made after."""
    runs = []
    for changed in (False, True):
        model, inputs = tiny_model(name, dropout=True), tiny_inputs(name)
        if changed:
            defaults()
        handle = patch_model(
            model,
            MilestoneSchedule({0: 1, 3: 2}),
            kernels="on",
            cache=PrefixCache(2**24) if cache else None,
        )
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-2), max_grad_norm=1.0)
        torch.manual_seed(7)
        for _ in range(5):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        runs.append([p.detach() for p in model.parameters()])
        swapped = [row.swapped for row in handle.kernel_report().rows]
        served = handle.cache_report().summary() if cache else None
        runs[-1] = (runs[-1], swapped, served)
        handle.unpatch()
    _same_bits(runs[1][0], runs[0][0])
    assert runs[1][1:] == runs[0][1:]


@pytest.mark.usefixtures("padded")
def test_gradient_norms(defaults):
    found = []
    for changed in (False, True):
        model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
        if changed:
            defaults()
        handle = patch_model(model, AdaptiveSchedule(2))
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
        for _ in range(5):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        found.append(handle.state_dict())
        handle.load_state_dict(found[-1])
        handle.unpatch()
    assert found[0] == found[1]


# not under a default device: torch's checkpointing enters it again in backward, and it stays on
@pytest.mark.parametrize("defaults", DTYPES, ids=str, indirect=True)
def test_the_planner(defaults):
    model, plans = tiny_model("bert-sequence"), []
    for changed in (False, True):
        if changed:
            defaults()
        options = dict(batch_size=2, seq_len=8, steps=4, dtype=torch.float32)
        plans.append(str(plan_training(model, MilestoneSchedule({0: 1}), **options)))
    assert plans[0] == plans[1]


def _places() -> Iterator[tuple[str, ast.Call, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in OWN_PROCESS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "torch":
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node, node.func.attr


def test_every_allocation_names_its_dtype_and_device():
    """Also where the line runs on a GPU only."""
    missing = []
    for place, call, name in _places():
        given = {keyword.arg for keyword in call.keywords}
        wanted = {"dtype"} if name in FLOATS else set()
        wanted |= {"device"} if name in PLACED else set()
        if wanted - given:
            missing.append(f"{place}: torch.{name} without {' and '.join(sorted(wanted - given))}")
    assert not missing, "\n".join(missing)
