"""What every block contributes to a model, one number per block, by one of three measures.

- "train" is the protocol of Progtuning's first figure (arXiv 2506.21119): from the same start, on
  the same batches, only the embeddings, one block and the head train; the block contributes what
  the score gains over a run without any block.
- "skip" hands a block's input on in place of its output: the block contributes what the score
  loses.
- "gradient" is the norm of the gradient of the block's parameters, and needs no score.

The first takes (L + 1) short trainings, the second (L + 1) evaluations, the third one pass over the
batches. Skipping and gradients say something about a head that has been trained; on a new one they
measure chance.

    found = measure_contribution(model, batches, method="train", score=accuracy, steps=100)
    print(found)
    schedule = ProgressiveSchedule(3, total_steps, weights=found.weights)

Nothing of the model stays changed: weights, buffers, gradients, `requires_grad`, modes and the
state of the random number generators are those that were found, also after an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .cache.stand_ins import Run, Structure, Swaps, entering
from .freezing.active_set import ActiveSet
from .model.layout import Layout, find_layout
from .optim import MaskedAdamW
from .patch import handle_of
from .schedules import FreezePlan

Method = Literal["skip", "gradient", "train"]
Batch = Mapping[str, Any]

_MEANINGS: dict[Method, str] = {
    "skip": "what the score loses without the block",
    "gradient": "gradient norm of the block's parameters",
    "train": "what the score gains when the block trains as well",
}


@dataclass(frozen=True)
class Contribution:
    """One number per block. `print(found)` shows them as bars.

    Attributes:
        method: "skip", "gradient" or "train".
        values: block 0 first; in units of the score ("skip", "train"), of the loss per unit of
            weight ("gradient"). Negative where the model is better off without the block.
        baseline: the score that the values are measured from: of the whole model ("skip"), or after
            training without any block ("train"); None for "gradient".
    """

    method: Method
    values: tuple[float, ...]
    baseline: float | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The values with 0 for negative ones, as `ProgressiveSchedule(weights=...)` takes them.

        Raises:
            ValueError: no block contributes anything.
        """
        weights = tuple(max(0.0, value) for value in self.values)
        if not any(weights):
            raise ValueError(f"no block contributes anything by {self.method}: there is no weight")
        return weights

    def __str__(self) -> str:
        base = "" if self.baseline is None else f" (measured from {self.baseline:.5g})"
        most = max(map(abs, self.values)) or 1.0
        lines = [f"{self.method}: {_MEANINGS[self.method]}{base}"]
        for i, value in enumerate(self.values):
            bar = ("#" if value > 0 else "-") * round(30 * abs(value) / most)
            lines.append(f"block {i:<3}  {value:>11.5g}  {bar}".rstrip())
        return "\n".join(lines)


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def measure_contribution(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Method = "skip",
    score: Callable[[nn.Module], float] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = _own_loss,
    steps: int | None = None,
    lr: float = 1e-4,
    max_grad_norm: float = 1.0,
    embeddings: bool = True,
    relative: bool = False,
    blocks: str | Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Contribution:
    """Measure what every block of `model` contributes.

    Args:
        model: not patched. A parameter that is frozen stays so, and is left out of "gradient".
        batches: arguments of the model by name, on its device. "train" trains on them, "gradient"
            takes their gradients, and the default score is measured on them.
        method: "skip", "gradient" or "train"; see the top of this file.
        score: of the model as it is when called, in eval mode; more is better. None: minus the mean
            loss of the batches.
        loss: 0-dim loss of one batch; by default the model's own.
        steps: of "train", one batch each, in their order and round again; None: one pass.
        lr: of "train": AdamW without decay, falling linearly to 0.
        max_grad_norm: of "train"; 0: no clipping.
        embeddings: whether they train in "train", with a block and without one, as the paper's do.
        relative: divide "gradient" by the square root of the number of parameters of the block,
            which is then a root mean square over parameters.
        blocks: path of the block list, or several, where discovery cannot choose.
        on_progress: called with the number of evaluations ("skip") or batches done, and of all.

    "gradient" is taken in eval mode, without dropout: the root mean square over the batches. "skip"
    runs the block all the same and replaces its hidden states only: whatever else it hands on (T5's
    relative bias, keys and values) stays there.

    Raises:
        ValueError: a patched model, no batch, blocks whose output their input cannot replace,
            nothing to take a gradient of, or a figure that is not finite.
        UnsupportedModelError: no block list can be found, or the blocks share weights.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be 'skip', 'gradient' or 'train', got {method!r}")
    if handle_of(model) is not None:
        raise ValueError("the model is patched: measure before, or call handle.unpatch() first")
    batches = list(batches)
    if not batches:
        raise ValueError("no batches to measure on")
    steps = len(batches) if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    layout = find_layout(model, blocks)
    tell = on_progress or (lambda done, total: None)
    start = _Start(model, weights=method == "train")

    def scored() -> float:
        model.eval()
        with torch.no_grad():
            if score is not None:
                return float(score(model))
            return -sum(float(loss(model, batch)) for batch in batches) / len(batches)

    try:
        if method == "gradient":
            norms = _gradient_norms(model, layout, batches, loss, tell, relative=relative)
            return Contribution(method, _finite(norms))
        if method == "skip":
            baseline, *others = _skip_scores(model, layout, scored, start, tell)
            values = [baseline - other for other in others]
        else:
            plans = _one_block_plans(layout.num_blocks, embeddings=embeddings)
            training = _Training(model, layout, batches, loss, steps, lr, max_grad_norm)
            scores = []
            for i, plan in enumerate(plans):
                start.rewind()
                training.run(plan, lambda done, i=i: tell(i * steps + done, len(plans) * steps))
                scores.append(scored())
            baseline, *others = scores
            values = [other - baseline for other in others]
        return Contribution(method, _finite(values), *_finite([baseline]))
    finally:
        start.restore()


def _finite(values: Sequence[float]) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"figures that are not finite: {list(values)}; the loss has diverged")
    return tuple(values)


class _Start:
    """A model and the random number generators as they were found.

    Args:
        weights: whether to keep a copy of the parameters as well; buffers are always kept.
    """

    def __init__(self, model: nn.Module, *, weights: bool) -> None:
        parameters = list(model.parameters())
        changing = [*model.buffers(), *(parameters if weights else ())]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in changing]
        self._flags = [(p, p.requires_grad, p.grad) for p in parameters]
        self._modes = [(module, module.training) for module in model.modules()]
        self._cpu = torch.get_rng_state()
        on_gpu = any(p.is_cuda for p in parameters)
        self._cuda = torch.cuda.get_rng_state_all() if on_gpu else []

    def rewind(self) -> None:
        """Tensors and random numbers; modes and flags stay."""
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)

    def restore(self) -> None:
        self.rewind()
        for parameter, requires_grad, grad in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in self._modes:
            module.training = mode


def _skip_scores(
    model: nn.Module,
    layout: Layout,
    scored: Callable[[], float],
    start: _Start,
    tell: Callable[[int, int], None],
) -> list[float]:
    """Score of the whole model, and without each block."""
    if any(family.beside for family in layout.families):
        # XLM's block is four modules in four lists: no single output is the block's
        raise ValueError("the blocks of this model are no modules of their own: nothing to skip")
    total = layout.num_blocks + 1
    scores = [scored()]
    tell(1, total)
    for i, path in enumerate(layout.block_paths):
        start.rewind()
        model.eval()  # before the stand-in hides the block from it
        with Swaps(model, {path: _skipping(i)}).installed():
            scores.append(scored())
        tell(i + 2, total)
    return scores


def _skipping(index: int) -> Run:
    """Runs a block, and hands on what entered it in the place of its hidden states."""

    def run(original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered = entering(args, kwargs)
        kept = None if entered is None else entered.clone()  # some blocks go on in place
        output = original(*args, **kwargs)
        structure = Structure.of(output)
        if kept is None or structure is None:
            raise ValueError(f"block {index} does not take and return a tensor, tuple or list")
        hidden = structure.hidden(output)
        if hidden.shape != kept.shape:
            raise ValueError(
                f"block {index} turns {tuple(kept.shape)} into {tuple(hidden.shape)}: its input "
                "cannot take the place of its output"
            )
        kept = kept.to(hidden.dtype)
        if structure.kind is None:
            return kept
        return structure.kind(kept if i == structure.place else x for i, x in enumerate(output))

    return run


def _gradient_norms(
    model: nn.Module,
    layout: Layout,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    tell: Callable[[int, int], None],
    *,
    relative: bool,
) -> list[float]:
    """Root mean square over the batches of each block's gradient norm."""
    owned = [
        [p for p in model.get_submodule(path).parameters() if p.requires_grad]
        for path in layout.block_paths
    ]
    parameters = [p for block in owned for p in block]
    if not parameters:
        raise ValueError("no parameter of any block requires grad")
    model.eval()
    squares = [0.0] * len(owned)
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            # not backward(): `.grad` and hooks on it (an optimizer's) are the user's
            grads = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        left = iter(grads)
        for i, block in enumerate(owned):
            there = [g for g in (next(left) for _ in block) if g is not None]
            if there:
                norms = torch.stack(torch._foreach_norm(there, 2, dtype=torch.float32))
                squares[i] += float(norms.double().square().sum())
        tell(number + 1, len(batches))
    sizes = [sum(p.numel() for p in block) or 1 if relative else 1 for block in owned]
    return [
        math.sqrt(square / len(batches) / size) for square, size in zip(squares, sizes, strict=True)
    ]


def _one_block_plans(num_blocks: int, *, embeddings: bool) -> list[FreezePlan]:
    """Without any block, then with each; the head always trains."""
    return [
        FreezePlan(tuple(i == only for i in range(num_blocks)), embeddings=embeddings)
        for only in range(-1, num_blocks)
    ]


@dataclass
class _Training:
    """Short trainings of one model that differ in their plan alone."""

    model: nn.Module
    layout: Layout
    batches: Sequence[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    steps: int
    lr: float
    max_grad_norm: float

    def __post_init__(self) -> None:
        self._active = ActiveSet(self.model, self.layout, "frozen")

    def run(self, plan: FreezePlan, tell: Callable[[int], None]) -> None:
        """Train what `plan` says, from the weights at hand."""
        self._active.set_flags(plan)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:  # adapters in the blocks, and nothing else that trains
            tell(self.steps)
            return
        optimizer = MaskedAdamW(parameters, lr=self.lr, max_grad_norm=self.max_grad_norm or None)
        self.model.train()
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / self.steps)
            with torch.enable_grad():
                value = self.loss(self.model, self.batches[step % len(self.batches)])
                grads = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            tell(step + 1)
        optimizer.zero_grad()
