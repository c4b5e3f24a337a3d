"""Every op, and steps of the optimizer, under each value of PROGTUNING_BACKEND.

An op without that implementation runs another one, whatever the step is in the middle of. The
functions named check_* run in Triton's interpreter, where "triton" is what runs.
"""

import math
import os

import pytest
import torch
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)

from progtuning_kernels import MaskedAdamW, backend, ops

VALUES = ("", "auto", *backend.PREFERENCE)
WITHOUT_TRITON = {"dropout"}


def _leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _masked_update():
    p, grad, m, v = (torch.full((5,), number) for number in (1.0, 0.5, 0.0, 0.0))
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    ops.masked_update([p], [grad], [m], [v], [torch.zeros(())], **hyper)
    return p


def _dropout():
    torch.manual_seed(0)
    (x,) = _leaves((4, 8))
    y = ops.dropout(x, 0.5)
    return (y == torch.where(y == 0, 0, 2 * x)).all()  # masks differ


def _with_gradients(function, *shapes):
    leaves = _leaves(*shapes)
    result = function(*leaves)
    result.sum().backward()
    return torch.cat([result.reshape(-1), *(leaf.grad.reshape(-1) for leaf in leaves)]).detach()


CALLS = {
    "gelu": lambda: _with_gradients(ops.gelu, (4, 8)),
    "bias_gelu": lambda: _with_gradients(ops.bias_gelu, (4, 8), (8,)),
    "swiglu": lambda: _with_gradients(ops.swiglu, (4, 8), (4, 8)),
    "geglu": lambda: _with_gradients(ops.geglu, (4, 8), (4, 8)),
    "layer_norm": lambda: _with_gradients(
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), (4, 8), (8,), (8,)
    ),
    "rms_norm": lambda: _with_gradients(lambda x, w: ops.rms_norm(x, w, 1e-6), (4, 8), (8,)),
    "linear_cross_entropy": lambda: _with_gradients(
        lambda h, w: ops.linear_cross_entropy(h, w, torch.tensor([0, 5, 2, 1])), (4, 8), (6, 8)
    ),
    "dropout": _dropout,
    "masked_norm": lambda: ops.masked_norm(_leaves((3, 5), (7,))),
    "masked_update": _masked_update,
}
OPTIMIZERS = {
    "clipping": {"max_grad_norm": 1.0},
    "no decision": {"nonfinite": "ignore"},
    "bfloat16 moments": {"max_grad_norm": 1.0, "state_dtype": torch.bfloat16},
    "8 bits": {"max_grad_norm": 1.0, "state_dtype": "8bit"},
    "in backward": {"in_backward": True, "max_grad_norm": 1.0, "clip_mode": "previous_norm"},
    "float64": {"max_grad_norm": 1.0},
}


def _train(options, dtype):
    torch.manual_seed(0)
    width = 64 if options.get("state_dtype") == "8bit" else 4  # smaller tensors keep float32
    layers = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 3)).to(dtype)
    layers[0].bias.requires_grad_(False)
    optimizer = MaskedAdamW(layers.parameters(), lr=0.01, **options)
    skips = options.get("nonfinite") != "ignore"
    for scale in (10.0, math.nan, 10.0) if skips else (10.0, 10.0):
        (scale * layers(torch.ones(4, width, dtype=dtype))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in layers.parameters()])


@pytest.fixture
def prefer(monkeypatch):
    monkeypatch.setattr(backend, "passed_over", {})
    return lambda value: monkeypatch.setenv("PROGTUNING_BACKEND", value)


def _compare(prefer, value, run):
    prefer("reference")
    expected = run()
    backend.passed_over.clear()
    prefer(value)
    torch.testing.assert_close(run(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("op", backend.OPS)
def test_an_op_runs_whatever_is_preferred(op, value, prefer):
    _compare(prefer, value, CALLS[op])
    names = [implementation.name for implementation in backend.OPS[op].implementations]
    if value in backend.PREFERENCE and value not in names:
        assert backend.passed_over == {op: f"{op} has no {value} implementation"}
    elif value in ("", "auto", "reference"):
        assert backend.passed_over == {}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("options", OPTIMIZERS)
def test_a_step_runs_whatever_is_preferred(options, value, prefer):
    dtype = torch.float64 if options == "float64" else torch.float32
    _compare(prefer, value, lambda: _train(OPTIMIZERS[options], dtype))


@pytest.mark.parametrize("op", backend.OPS)
def check_triton_runs_where_an_op_has_it(op, prefer):
    assert os.environ["TRITON_INTERPRET"] == "1"
    _compare(prefer, "triton", CALLS[op])
    reason = f"{op} has no triton implementation"
    assert backend.passed_over == ({op: reason} if op in WITHOUT_TRITON else {})


@pytest.mark.parametrize("options", OPTIMIZERS)
def check_triton_takes_steps(options, prefer):
    dtype = torch.float64 if options == "float64" else torch.float32
    _compare(prefer, "triton", lambda: _train(OPTIMIZERS[options], dtype))
    reason = "no Triton kernel for torch.float64"
    passed_over = {"masked_update": reason} if options == "float64" else {}
    if options == "float64":  # what updates instead may have a norm of its own
        assert backend.passed_over.pop("masked_norm", reason) == reason
    assert backend.passed_over == passed_over
