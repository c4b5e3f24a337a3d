"""What every block contributes to a model, one number per block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .freezing.active_set import ActiveSet
from .model.layout import find_layout
from .optim import MaskedAdamW
from .patch import handle_of
from .random_state import random_state, set_random_state
from .schedules import FreezePlan

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Contribution:
    """What every block contributes. `print(found)` shows it as bars.

    Attributes:
        values: block 0 first, in units of the score; negative where the model is better off
            without the block.
        baseline: the score after training without any block, from which they are measured.
    """

    values: tuple[float, ...]
    baseline: float

    @property
    def weights(self) -> tuple[float, ...]:
        """The values with 0 for negative ones, as `ProgressiveSchedule(weights=...)` takes them.

        Raises:
            ValueError: no block contributes anything.
        """
        weights = tuple(max(0.0, value) for value in self.values)
        if not any(weights):
            raise ValueError("no block contributes anything: there is no weight")
        return weights

    def __str__(self) -> str:
        most = max(map(abs, self.values)) or 1.0
        lines = [f"what the score gains over {self.baseline:.5g} when the block trains as well"]
        for i, value in enumerate(self.values):
            bar = ("#" if value > 0 else "-") * round(30 * abs(value) / most)
            lines.append(f"block {i:<3}  {value:>11.5g}  {bar}".rstrip())
        return "\n".join(lines)


def measure_contribution(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    score: Callable[[nn.Module], float] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(**batch).loss,
    steps: int | None = None,
    lr: float = 1e-4,
    max_grad_norm: float = 1.0,
    embeddings: bool = True,
    blocks: str | Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Contribution:
    """Measure what every block of `model` contributes, by (L + 1) short trainings.

    The protocol is that of Progtuning's first figure (arXiv 2506.21119): from the same start, on
    the same batches, only the embeddings, one block and the head train; the block contributes what
    the score gains over a run without any block.

    Nothing of the model stays changed: weights, buffers, gradients, `requires_grad`, modes and the
    state of the random number generators are those that were found, also after an exception.

    Args:
        model: not patched. A parameter that is frozen stays so.
        batches: arguments of the model by name, on its device.
        score: of the model as it is when called, in eval mode; more is better. None: minus the mean
            loss of the batches.
        loss: 0-dim loss of one batch; by default the model's own.
        steps: of each training, one batch each, in their order and round again; None: one pass.
        lr: AdamW without decay, falling linearly to 0.
        max_grad_norm: 0: no clipping.
        embeddings: whether they train, with a block and without one, as the paper's do.
        blocks: path of the block list, or several, where discovery cannot choose.
        on_progress: called with the number of batches done, and of all.

    Raises:
        ValueError: a patched model, no batch, steps below 1, or a score that is not
            finite.
        UnsupportedModelError: no block list can be found, or the blocks share weights.

    Example:
        ```python
        found = measure_contribution(model, loader, steps=4)
        schedule = ProgressiveSchedule(2, weights=found.weights)
        ```
    """
    if handle_of(model) is not None:
        raise ValueError("the model is patched: measure before, or call handle.unpatch() first")
    batches = list(batches)
    if not batches:
        raise ValueError("no batches to measure on")
    steps = len(batches) if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    layout = find_layout(model, blocks)
    scores: list[float] = []
    with _state_kept(model) as rewind:
        active = ActiveSet(model, layout, "frozen")
        for only in range(-1, layout.num_blocks):  # without any block first
            rewind()
            trainable = tuple(i == only for i in range(layout.num_blocks))
            active.set_flags(FreezePlan(trainable, embeddings=embeddings))
            for done in _train(model, batches, loss, steps, lr, max_grad_norm):
                if on_progress is not None:
                    on_progress((only + 1) * steps + done, (layout.num_blocks + 1) * steps)
            model.eval()
            with torch.no_grad():
                if score is None:
                    scores.append(-sum(float(loss(model, b)) for b in batches) / len(batches))
                else:
                    scores.append(float(score(model)))
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores that are not finite: {scores}; the loss has diverged")
    return Contribution(tuple(found - scores[0] for found in scores[1:]), scores[0])


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave model and generators as they were; yields a function that rewinds weights and those."""
    parameters = list(model.parameters())
    tensors = [(t, t.detach().clone()) for t in (*parameters, *model.buffers())]
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    state = random_state(model)

    def rewind() -> None:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        set_random_state(state, model)

    try:
        yield rewind
    finally:
        rewind()
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


def _train(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    steps: int,
    lr: float,
    max_grad_norm: float,
) -> Iterator[int]:
    """Train what requires grad, from the weights at hand; yields the number of steps done."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # adapters in the blocks, and nothing else that trains
        yield steps
        return
    optimizer = MaskedAdamW(parameters, lr=lr, max_grad_norm=max_grad_norm or None)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        with torch.enable_grad():
            value = loss(model, batches[step % len(batches)])
            # not backward(): `.grad` and hooks on it (an optimizer's) are the user's
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        yield step + 1
    optimizer.zero_grad()
