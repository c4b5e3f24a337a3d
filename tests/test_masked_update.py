"""The AdamW formula against fp64 truth, with hyper-parameters that tell formulas apart."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_at_least_as_accurate, in_fp64
from torch import Tensor

from progtuning_kernels.ops.masked_update import masked_update

# lr and decay of 0.1, eps of 1e-3, step 7, scale 0.5: at the defaults, decay before and after the
# update differ by 1e-7 and a test cannot see which one is there
HYPER = dict(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
SIZES = [(1,), (63,), (255,), (257,), (17, 241), (0,), (2**16 + 3,)]


def _bucket(dtype: torch.dtype, state_dtype: torch.dtype, sizes=SIZES) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float, kind: torch.dtype) -> list[Tensor]:
        return [(torch.randn(s, generator=generator) * scale).to(kind) for s in sizes]

    squares = [v.square() for v in draw(0.1, state_dtype)]
    steps = [torch.tensor(6.0) for _ in sizes]
    return draw(1.0, dtype), draw(0.3, dtype), draw(0.1, state_dtype), squares, steps


def _truth(p, g, m, v, t, *, lr, beta1, beta2, eps, weight_decay, divisor=1.0):
    for i in range(len(p)):
        gradient = g[i] / divisor
        m[i] = beta1 * m[i] + (1 - beta1) * gradient
        v[i] = beta2 * v[i] + (1 - beta2) * gradient**2
        step = t[i].item() + 1
        denominator = (v[i] / (1 - beta2**step)).sqrt() + eps
        decayed = p[i] * (1 - lr * weight_decay)
        p[i] = decayed - lr / (1 - beta1**step) * m[i] / denominator
    return p, m, v


@pytest.mark.parametrize("divisor", [None, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_at_least_as_accurate_as_torch(dtype, divisor):
    state_dtype = torch.promote_types(dtype, torch.float32)
    p, g, m, v, t = _bucket(dtype, state_dtype)
    truth = _truth(*map(in_fp64, (p, g, m, v)), t, **HYPER, divisor=divisor or 1.0)

    baseline = [torch.nn.Parameter(x.clone()) for x in p]
    optimizer = torch.optim.AdamW(
        baseline, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, foreach=False
    )
    for x, gradient, first, second in zip(baseline, g, m, v, strict=True):
        x.grad = (gradient / (divisor or 1.0)).to(dtype)
        optimizer.state[x] = {
            "step": torch.tensor(6.0),
            "exp_avg": first.to(dtype, copy=True),
            "exp_avg_sq": second.to(dtype, copy=True),
        }
    optimizer.step()

    given = None if divisor is None else torch.tensor(1 / divisor)
    masked_update(p, g, m, v, t, **HYPER, grad_factor=given)
    assert [s.item() for s in t] == [7.0] * len(SIZES)
    for i, x in enumerate(baseline):
        plain = (x, optimizer.state[x]["exp_avg"], optimizer.state[x]["exp_avg_sq"])
        for kind, mine, theirs, exact in zip(
            "pmv", (p[i], m[i], v[i]), plain, (truth[0][i], truth[1][i], truth[2][i]), strict=True
        ):
            name = f"{kind} of {tuple(x.shape)}"
            # two roundings: decay and update are one rounding each in torch, one in all in ours
            assert_at_least_as_accurate(name, mine, theirs, exact, roundings=2.0)


def test_views_with_gaps_and_transposed_gradients():
    """torch's fused kernel writes past such a view and reads such a gradient in memory order."""
    buffer = torch.randn(6, 8)
    around = buffer.clone()
    view, gradient = buffer[:, :3], torch.randn(3, 6).t()
    m, v, t = [torch.zeros(6, 3)], [torch.zeros(6, 3)], [torch.zeros(())]
    truth = _truth(*map(in_fp64, ([view], [gradient], m, v)), t, **HYPER)
    masked_update([view], [gradient], m, v, t, **HYPER)
    torch.testing.assert_close(view, truth[0][0].float())
    assert torch.equal(buffer[:, 3:], around[:, 3:])

    wide = [torch.randn(6, 8).abs() for _ in range(4)]  # gaps in all four, at equal strides
    p, g, m, v = ([x[:, :3]] for x in wide)
    around, t = [x.clone() for x in wide], [torch.zeros(())]
    truth = _truth(*map(in_fp64, (p, g, m, v)), t, **HYPER)
    masked_update(p, g, m, v, t, **HYPER)
    torch.testing.assert_close(p[0], truth[0][0].float())
    assert all(torch.equal(x[:, 3:], y[:, 3:]) for x, y in zip(wide, around, strict=True))

    square, gradient = torch.randn(5, 5), torch.randn(5, 5).t()
    m, v, t = [torch.zeros(5, 5)], [torch.zeros(5, 5)], [torch.zeros(())]
    truth = _truth(*map(in_fp64, ([square], [gradient], m, v)), t, **HYPER)
    masked_update([square], [gradient], m, v, t, **HYPER)
    torch.testing.assert_close(square, truth[0][0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_changes_nothing(dtype):
    p, g, m, v, t = _bucket(dtype, torch.float32)
    g[1][5] = float("nan")
    before = [[x.clone() for x in tensors] for tensors in (p, m, v, t)]
    masked_update(p, g, m, v, t, **HYPER, found_inf=torch.tensor(1.0))
    for old, new in zip(before, (p, m, v, t), strict=True):
        assert all(map(torch.equal, old, new))
    masked_update(p, g, m, v, t, **HYPER, found_inf=torch.tensor(0.0))
    assert p[1].isnan().sum() == 1 and not torch.equal(before[0][0], p[0])


def test_small_decay_is_not_lost_in_mixed_precision():
    # lr * weight_decay = 1e-8: p * (1 - 1e-8) is p in fp32
    p, zeros = torch.full((4,), 3.0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    state = [zeros.clone()], [zeros.clone()], [torch.zeros(())]
    hyper = dict(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=1e-4)
    masked_update([p], [zeros], *state, **hyper)
    torch.testing.assert_close(p, torch.full_like(p, 3.0 * (1 - 1e-8)), rtol=1e-15, atol=0)


def test_empty_lists_and_bad_lists():
    masked_update([], [], [], [], [], **HYPER)
    one = [torch.zeros(3)]
    with pytest.raises(ValueError, match="lists differ in length"):
        masked_update(one, [], one, one, [torch.zeros(())], **HYPER)
    with pytest.raises(ValueError, match="shapes differ"):
        masked_update(one, [torch.zeros(4)], one, one, [torch.zeros(())], **HYPER)
    with pytest.raises(RuntimeError, match="no native implementation"):
        masked_update(one, one, one, one, [torch.zeros(())], **HYPER, implementation="native")
