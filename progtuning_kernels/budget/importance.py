"""What every unit is worth: by gradients, or by the singular values of its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..freezing.active_set import ActiveSet
from ..model.adapters import adapter_configs
from ..model.layout import Layout, parameter_slots
from ..random_state import random_state, set_random_state

Batch = Mapping[str, Any]


def by_gradient(
    model: nn.Module,
    layout: Layout,
    active: ActiveSet,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> list[float]:
    """Sum of |gradient * weight| over the elements of each unit, and over the batches.

    To first order the loss would move by that if the elements went to 0 one by one; GreenTrainer
    (arXiv 2309.13192) ranks tensors by such a term. Dropout is off. A weight that several units use
    counts where it freezes.
    """
    slots = [slot for slot in parameter_slots(model, layout) if slot.parameter.requires_grad]
    parameters = [slot.parameter for slot in slots]
    worth = [0.0] * (layout.num_blocks + 2)
    with _in_eval(model), torch.enable_grad():
        for batch in batches:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(
                    "the loss of a batch is no single number: give labels in the batches, or loss="
                )
            # not backward(): `.grad` and hooks on it are the user's
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
            for slot, grad in zip(slots, grads, strict=True):
                if grad is not None:
                    wide = torch.promote_types(grad.dtype, torch.float32)
                    products = grad.to_dense().to(wide) * slot.parameter.detach()
                    total = products.abs().sum(dtype=torch.float64)
                    worth[active.freezes_with(slot) + 1] += float(total)
    return worth


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    state = random_state(model)
    model.eval()
    try:
        yield
    finally:
        set_random_state(state, model)
        for module, mode in modes:
            module.training = mode


def by_signal(model: nn.Module, layout: Layout, active: ActiveSet) -> list[float]:
    """Signal-to-noise ratio of the singular values of each unit's weight matrices, normalised.

    The ratio of a matrix is `signal_to_noise`, divided by its largest singular value as Spectrum
    does (arXiv 2406.06623). Spectrum compares matrices of one kind only, such as all that project
    queries. So each is divided here by the mean of its kind over the blocks, which makes 1 of an
    average matrix; one outside the blocks by the mean of all in them. A unit gets the mean of its
    matrices, weighted by their elements. Under adapters the frozen weights beside them count.
    """
    adapted = bool(adapter_configs(model))
    found: dict[int, list[tuple[str, int, float]]] = defaultdict(list)
    for slot in parameter_slots(model, layout):
        weight = slot.parameter.detach()
        if not weight.numel() or not weight.is_floating_point():
            continue
        if adapted and slot.parameter.requires_grad:
            continue
        matrix = weight.flatten(1) if weight.ndim >= 2 else weight[None]
        if min(matrix.shape) > 1:
            inside = slot.name.removeprefix(f"{layout.module_of(slot.name)}.")
            ratio, largest = signal_to_noise(matrix)
            found[active.freezes_with(slot)].append(
                (inside, matrix.numel(), ratio / largest if largest else 0.0)
            )
    kinds: dict[str, list[float]] = defaultdict(list)
    for unit in range(layout.num_blocks):
        for name, _, value in found[unit]:
            kinds[name].append(value)
    means = {name: math.fsum(values) / len(values) for name, values in kinds.items()}
    of_all = [value for values in kinds.values() for value in values]
    mean = math.fsum(of_all) / len(of_all) if of_all else 0.0
    worth = []
    for unit in layout.units:
        inside_block = 0 <= unit < layout.head
        total = elements = 0.0
        for name, size, value in found[unit]:
            whole = means[name] if inside_block else mean
            total += size * value / whole if whole else 0.0
            elements += size
        worth.append(total / elements if elements else 0.0)
    return worth


def signal_to_noise(matrix: Tensor) -> tuple[float, float]:
    """The sum of a matrix's singular values that stand for signal over that of the others; and the
    largest one.

    Noise of variance s^2 in an (m, n) matrix, m <= n, has its singular values below s (sqrt(n) +
    sqrt(m)) by the law of Marchenko and Pastur (1967). s comes from the median singular value, as
    half of the law lies below sqrt(n) s sqrt(median of the law) (Gavish and Donoho, arXiv
    1305.5870). Spectrum takes the interquartile range as if the values were normal, and then finds
    signal in a matrix of noise alone.
    """
    matrix = matrix.to(torch.float64)
    short, long = sorted(matrix.shape)
    gram = matrix @ matrix.T if matrix.shape[0] == short else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # ascending
    beta = short / long
    noise_level = float(values.quantile(0.5)) / math.sqrt(_median_of_law(beta))
    is_signal = values > noise_level * (1 + math.sqrt(beta))
    largest = float(values[-1])
    # of a matrix of low rank nothing is noise but rounding
    noise = max(float(values[~is_signal].sum()), short * largest * torch.finfo(torch.float32).eps)
    return (float(values[is_signal].sum()) / noise if noise else 0.0), largest


@cache
def _median_of_law(beta: float) -> float:
    """Median of the Marchenko-Pastur law of eigenvalues, of ratio beta and variance 1."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = (low + high)/2 - (high - low)/2 cos(t): the density times dx/dt has no poles but at beta=1
    t = torch.arange(100_000, dtype=torch.float64, device="cpu") + 0.5
    t *= math.pi / 100_000
    x = (low + high) / 2 - (high - low) / 2 * t.cos()
    below = ((t.sin() * (high - low) / 2) ** 2 / x).cumsum(0)
    return float(x[int((below < below[-1] / 2).sum())])
