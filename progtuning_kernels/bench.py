"""Ways to train a model, side by side: the gate before any number, and the clock.

`progtuning bench` compares four ways on a user's model, `benchmarks/run.py` many on stored shapes;
both take sessions, gate and clock from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cache import PrefixCache
from .freezing.decay_groups import decay_groups
from .optim import MaskedAdamW
from .patch import patch_model
from .schedules import Schedule

Batch = Mapping[str, Any]
DECAY = 0.01
GATE_SAMPLE = 65_536  # elements of a tensor that are compared, spread over all of it
# relative errors of loss and gradient: a GPU adds in another order, and bfloat16 has 8 bits
TOLERANCES = {"cpu": (1e-6, 1e-5), "cuda": (1e-4, 1e-3), "bf16": (1e-2, 5e-2)}


class Rule(Protocol):
    """What every session trains with: AdamW's rate, and the norm that gradients are clipped to."""

    lr: float
    clip: float

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward."""
        ...


@dataclass
class Session:
    """One model with one way to train it."""

    model: nn.Module
    backward: Callable[[Batch], Tensor]  # forward too; returns the loss, detached
    update: Callable[[], None]  # clips, updates, drops the gradients
    optimizer_tensors: Callable[[], Any]  # what the optimizer keeps, in any structure
    begin: Callable[[int], None] = lambda step: None  # before a step, by number, and timed with it
    note: Callable[[], str | None] = lambda: None  # a line about what it did, at the end
    close: Callable[[], None] = lambda: None

    def step(self, number: int, batch: Batch) -> Tensor:
        self.begin(number)
        loss = self.backward(batch)
        self.update()
        return loss


class Refused(Exception):
    """Why a session gets no number, in one line."""


def backward_of(rule: Rule, model: nn.Module) -> Callable[[Batch], Tensor]:
    """Forward under the rule's autocast, and backward."""

    def backward(batch: Batch) -> Tensor:
        with rule.autocast():
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return backward


def plain_session(
    rule: Rule, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **more: Any
) -> Session:
    """What a user has without this library: torch's clipping, and its fused AdamW by default."""
    if optimizer is None:
        groups = decay_groups([p for p in model.parameters() if p.requires_grad], DECAY)
        optimizer = torch.optim.AdamW(groups, lr=rule.lr, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), rule.clip)
        optimizer.step()
        optimizer.zero_grad()

    return Session(model, backward_of(rule, model), update, lambda: optimizer.state, **more)


def our_session(
    rule: Rule,
    model: nn.Module,
    schedule: Schedule,
    *,
    cache: PrefixCache | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    **patch_options: Any,
) -> Session:
    """`patch_model` and `MaskedAdamW`; the schedule is advanced before every step but the first."""
    handle = patch_model(model, schedule, cache=cache, **patch_options)
    optimizer = MaskedAdamW(
        handle.param_groups(lr=rule.lr, weight_decay=DECAY),
        **({"max_grad_norm": rule.clip} | dict(optimizer_options or {})),
    )

    def begin(step: int) -> None:
        if step:
            handle.advance()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Session(
        model,
        backward_of(rule, model),
        update,
        lambda: optimizer.state,
        begin,
        lambda: None if cache is None else handle.cache_report().summary(),
        handle.unpatch,
    )


def timed_steps(
    session: Session, steps: Sequence[int], batches: Sequence[Batch], device: torch.device
) -> tuple[list[Tensor], float]:
    """Losses of steps in a row, and milliseconds for all of them, until the device has finished.

    The first step seeds torch's generator, so that sessions with the same draws drop the same.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.manual_seed(steps[0])
    wait()
    started = time.perf_counter()
    losses = [session.step(step, batch) for step, batch in zip(steps, batches, strict=True)]
    wait()
    return losses, (time.perf_counter() - started) * 1e3


@dataclass
class Trace:
    """What a session did in one step of every stage; samples of tensors, by parameter name."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    moved: dict[str, Tensor] = field(default_factory=dict)


def trace(
    session: Session,
    batches: Sequence[Batch],
    *,
    passes: int = 1,
    counts: Callable[[int, str], bool] = lambda stage, name: True,
) -> Trace:
    """Take one step per batch, each of which is a stage, and note what a gate compares.

    Args:
        passes: forwards and backwards per step, of which the last counts; 2 for a cache, which
            serves the second, 3 for captured graphs, which replay the third.
        counts: whether the gradient of a parameter is kept in a stage; dropping the others makes a
            session that freezes nothing the truth for one that does.
    """
    found = Trace()
    # a compiled module's own name is no part of its parameters' names
    parameters = {n.replace("_orig_mod.", ""): p for n, p in session.model.named_parameters()}
    before = {name: _sample(p) for name, p in parameters.items()}
    for stage, batch in enumerate(batches):
        session.begin(stage)
        loss = session.backward(batch)
        for _ in range(passes - 1):
            session.model.zero_grad()
            loss = session.backward(batch)
        found.losses.append(float(loss))
        for name, p in parameters.items():
            if not counts(stage, name):
                p.grad = None
        gradients = {n: _sample(p.grad) for n, p in parameters.items() if p.grad is not None}
        found.gradients.append(gradients)
        session.update()
    found.moved = {name: _sample(p) - before[name] for name, p in parameters.items()}
    return found


def compare(
    found: Trace,
    right: Trace,
    *,
    loss_tolerance: float,
    gradient_tolerance: float | None,
    movement_tolerance: float = 0.05,
    compares_movement: bool = True,
) -> dict[str, float]:
    """The gate: relative errors of losses, gradients, and the movement of all weights.

    Raises `Refused` where it is red.

    Args:
        gradient_tolerance: None: they are gone after backward.
        movement_tolerance: above 0.05 the optimizer's state is of 8 bits, and weights differ from
            the second step on.
        compares_movement: not in bfloat16, where rounding turns the sign of a small gradient and
            with it AdamW's first update.
    """
    errors: dict[str, float] = {}
    is_exact = movement_tolerance <= 0.05
    for stage, (loss, truth) in enumerate(zip(found.losses, right.losses, strict=True)):
        slack = stage > 0 and not is_exact
        error = abs(loss - truth) / abs(truth)
        errors["loss_error"] = max(error, errors.get("loss_error", 0.0))
        if not error <= max(loss_tolerance, 1e-3 * slack):
            raise Refused(
                f"gate is red: loss {loss:.7g} in stage {stage + 1}, plain torch has {truth:.7g}"
            )
        if gradient_tolerance is None:
            continue
        own, its = found.gradients[stage], right.gradients[stage]
        if wrong := sorted(own.keys() ^ its.keys()):
            raise Refused(
                f"gate is red: in stage {stage + 1}, {len(wrong)} tensors have a gradient and "
                f"should not, or the reverse: {wrong[0]}"
            )
        error = _relative(own, its)
        errors["gradient_error"] = max(error, errors.get("gradient_error", 0.0))
        if not error <= max(gradient_tolerance, 1e-2 * slack):
            raise Refused(f"gate is red: gradients of stage {stage + 1} are {error:.1e} off")
    if compares_movement:
        error = errors["movement_error"] = _relative(found.moved, right.moved)
        if not error <= movement_tolerance:
            raise Refused(f"gate is red: the updates move {error:.1e} off plain torch's AdamW")
    return errors


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // GATE_SAMPLE)].float().clone()


def _relative(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean norm of the difference over that of what is right, over all tensors."""
    apart = torch.stack([(found[n] - right[n]).norm() for n in right]).norm()
    return (apart / torch.stack([t.norm() for t in right.values()]).norm()).item()
