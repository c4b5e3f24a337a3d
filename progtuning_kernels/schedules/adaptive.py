"""AutoFreeze: freeze blocks whose gradient norms have settled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from .plan import FreezePlan, bind_length, check_choice, check_step, whole_number
from .progressive import EmbeddingPolicy


class AdaptiveSchedule:
    """AutoFreeze (arXiv 2102.01386): freezes from the bottom what has stopped changing.

    After every `interval` steps each active block's gradient norm n is compared with n' of the
    interval before: its change is |n' - n| / n'. Blocks freeze up to the first one whose change is
    at or above the given percentile of all of them; that one always exists, so that the top never
    freezes. Nothing thaws. n is the root mean square of the block's gradient norm over the last
    `window` steps of its interval (the published code takes the norm of a sum of gradients, which
    would need a second set of them).

    `PatchHandle` brings the norms, equal on all ranks, and carries the decisions in its state dict.
    `plan` is a pure function of the step and these decisions: a decision after step s holds from
    step s + 1 on, and one that is made again (after a return to an earlier step) replaces all from
    there on.

    Args:
        interval: optimizer steps between decisions; the second one is the first that can freeze.
        percentile: 0 freezes nothing, 100 all but what follows the block that changes most;
            interpolated linearly between the blocks, as numpy does.
        window: steps at the end of an interval whose norms count, 1 to `interval`; None: the last
            10, or all of a shorter interval.
        embeddings: "first_stage" (until the first block freezes), "always", or "never".

    Raises:
        ValueError: a setting outside its range.
        TypeError: no number where one belongs.
    """

    def __init__(
        self,
        interval: int,
        *,
        percentile: float = 50.0,
        window: int | None = None,
        embeddings: EmbeddingPolicy = "first_stage",
    ) -> None:
        self.interval = whole_number("interval", interval, 1)
        if isinstance(percentile, bool) or not isinstance(percentile, Real):
            raise TypeError(f"percentile must be 0 to 100, got {percentile!r}: pass a number")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be 0 to 100, got {percentile}")
        self.percentile = float(percentile)
        self.window = whole_number(
            "window", min(10, self.interval) if window is None else window, 1
        )
        if self.window > self.interval:
            raise ValueError(f"window={window} is more than interval={interval}")
        check_choice("embeddings", embeddings, EmbeddingPolicy)
        self.embeddings: EmbeddingPolicy = embeddings
        self.total_steps: int | None = None
        # (step, norm per block, boundary from the next step on), in the order of the steps
        self._decisions: list[tuple[int, tuple[float, ...], int]] = []

    def __repr__(self) -> str:
        return (
            f"AdaptiveSchedule(interval={self.interval}, percentile={self.percentile}, "
            f"window={self.window}, embeddings={self.embeddings!r})"
        )

    bind = bind_length

    @property
    def decisions(self) -> dict[int, int]:
        """{step: boundary from the next step on}, every decision so far."""
        return {step: boundary for step, _, boundary in self._decisions}

    def observes(self, step: int) -> bool:
        return step % self.interval >= self.interval - self.window

    def decides(self, step: int) -> bool:
        return step % self.interval == self.interval - 1

    def observe(self, step: int, norms: Sequence[float], num_blocks: int) -> None:
        """Record the norms of the interval that ends with a step, and what follows from them.

        Args:
            step: the last of an interval.
            norms: one gradient norm per block, 0 where none trains.
            num_blocks: number of blocks of the model, L.

        Raises:
            ValueError: not one finite norm per block, or a step that no interval ends with.
        """
        if not self.decides(step):
            raise ValueError(f"no interval of {self.interval} steps ends with step {step}")
        if len(norms) != num_blocks or not all(0 <= n < float("inf") for n in norms):
            raise ValueError(f"expected {num_blocks} finite norms, got {list(norms)}")
        self._decisions = self._before(step)
        boundary = 0
        if self._decisions:
            _, before, boundary = self._decisions[-1]
            active = range(boundary, num_blocks)
            changes = [_relative_change(before[i], norms[i]) for i in active]
            least = _percentile(changes, self.percentile)
            boundary += next(i for i, change in enumerate(changes) if change >= least)
        self._decisions.append((step, tuple(map(float, norms)), boundary))

    def state_dict(self) -> dict[str, Any]:
        return {"decisions": [[step, list(norms), b] for step, norms, b in self._decisions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._decisions = [(step, tuple(norms), b) for step, norms, b in state["decisions"]]

    def stage(self, step: int) -> int:
        """Number of decisions before `step` that froze something."""
        check_step(step)
        return len({0} | {boundary for *_, boundary in self._before(step)}) - 1

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        check_step(step)
        before = self._before(step)
        boundary = before[-1][2] if before else 0
        embeddings = self.embeddings == "always" or (
            self.embeddings == "first_stage" and boundary == 0
        )
        return FreezePlan.from_boundary(boundary, num_blocks, embeddings=embeddings)

    def _before(self, step: int) -> list[tuple[int, tuple[float, ...], int]]:
        return [decision for decision in self._decisions if decision[0] < step]


def _relative_change(before: float, now: float) -> float:
    if before:
        return abs(before - now) / before
    return float("inf") if now else 0.0


def _percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated linearly between the two values around it, as numpy does."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    # equal ones first, for infinities have no difference; rounding must not pass the larger one
    return low if low == high else min(high, low + (high - low) * (at - math.floor(at)))
