"""How accurate is accurate enough: against fp64 truth, a kernel may lose no more than the plain
torch code that it replaces loses in the same dtype, and a rounding of its result.
"""

import torch
from torch import Tensor


def in_fp64(tensors: list[Tensor]) -> list[Tensor]:
    """Detached fp64 copies: what the truth is computed from."""
    return [tensor.detach().to(torch.float64, copy=True) for tensor in tensors]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """RMS error of `actual` over the RMS of `truth`, in fp64; the plain RMS error if truth is 0.

    Where truth is not finite `actual` must agree exactly; otherwise the error is inf.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, f"{tuple(actual.shape)} is not {tuple(truth.shape)}"
    finite = truth.isfinite()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    if not bool((same | (finite & actual.isfinite())).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    error = (actual - truth)[finite].square().mean().sqrt().item()
    scale = truth[finite].square().mean().sqrt().item()
    return error / scale if scale else error


def assert_at_least_as_accurate(
    name: str, actual: Tensor, baseline: Tensor, truth: Tensor, *, roundings: float = 1.0
) -> None:
    """Fails unless the error of `actual` is at most that of `baseline` and some roundings.

    Args:
        name: of the tensor, for the message.
        actual, baseline: what is tested, and plain torch's result in the same dtype.
        truth: the same in fp64.
        roundings: how many roundings to `actual.dtype` are forgiven, at most half an eps each.
    """
    error, allowed = relative_error(actual, truth), relative_error(baseline, truth)
    allowed += roundings * torch.finfo(actual.dtype).eps / 2
    if error <= allowed:
        return
    distance = (actual.detach().double() - truth.double()).abs().nan_to_num(float("inf")).flatten()
    worst = int(distance.argmax())
    raise AssertionError(
        f"{name}: relative error {error:.3e}, allowed {allowed:.3e} (plain torch and a rounding); "
        f"worst at flat index {worst}: {actual.flatten()[worst].item()!r}, "
        f"truth {truth.flatten()[worst].item()!r}"
    )
