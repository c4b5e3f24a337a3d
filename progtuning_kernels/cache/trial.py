"""Shows, on one batch, whether forwards with its kind of arguments can do without the prefix.

The batch runs both ways, from the same random numbers, and all outputs are compared; and what the
prefix computes from is followed through it. README.md lists what is found out so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..model.call import Call
from ..model.layout import Layout
from ..model.outputs import (
    STORED_TOLERANCE,
    TOLERANCE,
    close_rows,
    difference,
    has_keys_and_values,
    outputs_problem,
)
from ..random_state import gpus_of, host_state, same_torch_state, set_torch_state, torch_state
from .content_keys import READ_ABOVE, READ_BY_BATCHES, sample_shapes
from .prefix_inputs import Extremes, Follow, place_of
from .prefix_weights import PrefixWeights
from .recorded_levels import Level, Recording
from .side_forwards import SideForwards
from .stand_ins import UnservableError


@dataclass
class Path:
    """How forwards with one kind of arguments go."""

    reason: str | None = None  # why they are not served; None where they are
    levels: dict[int, Level] = field(default_factory=dict)  # where they can start
    # rows are stored without padding, unless something above the boundary reads their padding
    unpadded: bool = True
    draws: bool = False  # random numbers are drawn to no effect (BART's layerdrop of 0)
    consumed: frozenset[str] = frozenset()  # of `READ_ABOVE`, what the prefix reads all the same
    keys_and_values: bool = False  # the output holds those of all blocks
    dtype: torch.dtype = torch.float32  # of the boundary activations
    width: int = 0  # C
    alone: bool = False  # learnt from one row, which does not show whether it depends on others
    per_token: bool = True  # T of the boundary activations is that of the token ids
    lengths: dict[Any, int] = field(default_factory=dict)  # T by shapes of a sample, where not
    place_found: bool = False  # the prefix reads a tensor of another module, newly watched

    def length(self, call: Call) -> int | None:
        """T of the boundary activations; None for a shape that was not seen yet."""
        return (
            call.tokens if self.per_token else self.lengths.get(sample_shapes(call, self.consumed))
        )

    def serves(self, padding: Collection[str], rows: int, checked: Collection[str]) -> bool:
        """Whether a trial with padding on the sides `checked` holds for a batch with `padding`."""
        if self.alone and rows > 1:
            return False
        fewer = checked > padding and self.reason is None and self.unpadded
        return checked == padding or fewer


@dataclass(frozen=True)
class Trial:
    """Trials of one model for the stage whose boundary is block `level`."""

    model: nn.Module
    layout: Layout
    weights: PrefixWeights
    side: SideForwards
    level: int

    @cached_property
    def _gpus(self) -> list[torch.device]:
        return gpus_of(self.model)

    def learn_path(self, call: Call, lower: Collection[int], *, padded: bool) -> Path:
        """Run one batch both ways; what the model raises when it runs plainly is raised.

        Args:
            lower: levels below the boundary that have rows.
            padded: some row of `call` has padding.
        """
        path = Path(alone=call.size == 1)
        with self.side.without_trace():
            start = self._random_state()
            recording = Recording(self._random_state)
            with recording.watching(self.model, self.layout, self.level):
                inside, around = self.weights.held_inside(), self.weights.held_around()
                expected = self.side.run_model(call)
            end, _ = self._random_state()
            try:
                for at in sorted({self.level, *lower}, reverse=True):
                    level = Level(self.model, self.layout, at, recording, call.size)
                    state, host = level.random_state
                    if host != start[1]:
                        raise UnservableError(
                            "code below the boundary draws random numbers of Python or numpy"
                        )
                    path.draws |= not same_torch_state(state, start[0])
                    path.levels[at] = level
                top = path.levels[self.level]
                path.dtype, path.width = top.hidden.dtype, top.hidden.shape[2]
                path.per_token = top.hidden.shape[1] == call.tokens
                path.keys_and_values = has_keys_and_values(expected)
                if written := _written(inside, self.weights.held_inside()):
                    name = next(iter(written))[1]
                    raise UnservableError(f"code below the boundary keeps a tensor in {name}")
                # what the model keeps of a forward is an output too
                kept = _written(around, self.weights.held_around())
                expected = (expected, [kept[key].clone() for key in sorted(kept)])
                self._find_inputs(path, call)
                path.lengths[sample_shapes(call, path.consumed)] = top.hidden.shape[1]
                choices = (True, False) if padded and path.per_token else (path.per_token,)
                for path.unpadded in choices:
                    served = (
                        self._problem(path, at, call, expected, start[0], end) for at in path.levels
                    )
                    problem = next(filter(None, served), None)
                    if problem is None:
                        break
                if problem is not None:
                    more = f" (block {self.level - 1} hands on {top.others} more tensor(s))"
                    raise UnservableError(problem + more * bool(top.others))
            except UnservableError as unservable:
                path.reason = str(unservable)
            except Exception as error:  # the model's own code, in a forward that ends early
                path.reason = f"a forward up to the boundary raises {error_line(error)}"
        for level in path.levels.values():
            level.hidden = None
        return path

    def _random_state(self) -> tuple[list[Tensor], dict[str, Any]]:
        return torch_state(self._gpus), host_state()

    def _compute(self, path: Path, call: Call) -> Tensor:
        return self.side.boundary_activations(path.levels, self.level, call, draws=path.draws)

    def _watched(self, path: Path, call: Call) -> tuple[Tensor, Follow]:
        follow = Follow(call.tensors, self.weights.tensors, self.weights.gathered)
        with follow.watching():
            return self._compute(path, call), follow

    def _find_inputs(self, path: Path, call: Call) -> None:
        """Raise `UnservableError` if boundary activations depend on more than what is watched."""
        top = path.levels[self.level].hidden
        tolerance = TOLERANCE.get(path.dtype, 0.0)
        again, follow = self._watched(path, call)
        repeats = [again]
        for high in (False, True) if path.draws else ():
            with Extremes(high=high):
                repeats.append(self._compute(path, call))
        if any(difference(top, repeat) > tolerance for repeat in repeats):
            raise UnservableError(
                "the prefix is no fixed function: dropout outside the frozen modules, or another "
                "state that a forward changes"
            )
        if escaped := follow.escaped & call.tensors.keys() - READ_BY_BATCHES:
            raise UnservableError(
                f"code below the boundary takes values of {min(escaped)} for a number, a branch or "
                "a shape"
            )
        half = call.size // 2
        part, another = self._watched(path, call.take(range(half, call.size)))
        spans = call.spans[0][half:] if path.per_token else None
        if not close_rows(part, top[half:], spans, max(tolerance, STORED_TOLERANCE[None])):
            raise UnservableError("the prefix computes a row from other rows of its batch")
        path.consumed = follow.read_by(again) & READ_ABOVE
        plain = READ_ABOVE & call.named.keys() - call.tensors.keys()
        if plain:  # a number or a flag cannot be watched: the prefix must do without
            without = call.changed(lambda name, value: None if name in plain else value)
            try:
                needed = difference(top, self._compute(path, without)) > tolerance
            except Exception:  # of the model's own code: it cannot do without them
                needed = True
            path.consumed |= plain if needed else frozenset()
        for tensor in follow.foreign_to(again):
            if not another.has_seen(tensor):
                continue  # made in each forward, where nothing is seen of it: in a script
            place = place_of(tensor, self.model)
            if place is None:
                raise UnservableError(
                    f"the prefix reads a tensor of shape {tuple(tensor.shape)} that is no argument "
                    "and that no module holds"
                )
            if tensor.requires_grad:
                raise UnservableError(f"the prefix reads {place[1]}, which trains")
            path.place_found |= self.weights.watch_place(place)

    def _problem(
        self, path: Path, at: int, call: Call, expected: Any, start: list[Tensor], end: list[Tensor]
    ) -> str | None:
        """What differs in a forward from the boundary activations of level `at`.

        `start` and `end` are states of torch's generators before and after the plain forward.
        """
        level = path.levels[at]
        hidden, real = level.hidden.clone(), None
        if path.unpadded and call.tokens is not None:
            real = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for row, (first, last) in enumerate(call.spans[0]):
                real[row, first:last] = True
            hidden[~real] = 0
        set_torch_state(start, self._gpus)
        around = self.weights.held_around()
        try:
            with level.feed(hidden).installed():
                found = self.side.run_model(call)
        except Exception as error:  # the model's own code wants more than a stand-in gives
            return f"without the prefix its forward raises {error_line(error)}"
        kept = _written(around, self.weights.held_around())
        fed = level.was_fed
        level.forget()
        if not fed:
            return f"block {at - 1} is not called through its list"
        if not same_torch_state(end, torch_state(self._gpus)):
            return "without the prefix other random numbers are drawn"
        return outputs_problem(expected, (found, [kept[key] for key in sorted(kept)]), real)


def error_line(error: Exception) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _written(before: dict[Any, Tensor], now: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: tensor for key, tensor in now.items() if before.get(key) is not tensor}
