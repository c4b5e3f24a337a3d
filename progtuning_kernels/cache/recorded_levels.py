"""Learns from one recorded forward how a model runs from, and up to, the boundary activations.

The last module below the boundary then returns these, blocks below hand their input on, and
embeddings return NaN of the right shape, from which models make masks and positions: a model that
computes with it, be it times a gate that is still zero, shows that in the trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..model.derived_classes import root_of
from ..model.layout import EMBEDDINGS, Layout
from ..packing import unpacked
from .stand_ins import Run, Structure, Swaps, UnservableError, entering, output_handed_to


@dataclass(frozen=True)
class _Seen:
    """One call of one module in a recorded forward."""

    order: int
    entered: torch.Size | None
    structure: Structure | None
    left: torch.Size | None
    dtype: torch.dtype | None
    hidden: torch.Tensor | None  # a copy: some models go on in place
    random_state: Any  # after the call


@dataclass
class Recording:
    """Calls of the modules below a level, and of the block there, in one forward.

    Hooks note them: transformers installs its own for hidden states in the first forward that asks
    for them, for good, on whatever stands in a module's place.
    """

    random_state: Callable[[], Any]  # of every generator that a model may draw from
    calls: dict[str, list[_Seen]] = field(default_factory=dict)
    count: int = 0

    @contextmanager
    def watching(self, model: nn.Module, layout: Layout, level: int) -> Iterator[None]:
        paths = [p for unit in range(EMBEDDINGS, level) for p in layout.module_paths(unit)]
        kept = {p for unit in range(level) for p in layout.module_paths(unit)}
        if level < layout.stacks[0].length:
            paths.append(layout.block_paths[level])
        self.calls = {path: [] for path in paths}
        with ExitStack() as hooks:
            for path in paths:
                enter, leave = self._hooks(path, path in kept)
                module = model.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave))
            yield

    def _hooks(self, path: str, keep: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        entered: list[tuple[int, torch.Size | None]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = entering(args, kwargs)
            entered.append((self.count, None if tensor is None else tensor.shape))
            self.count += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            order, shape = entered.pop()
            structure = Structure.of(output)
            left, dtype, copy = None, None, None
            if structure is not None:
                hidden = structure.hidden(output)
                left, dtype = hidden.shape, hidden.dtype
                copy = hidden.detach().clone() if keep else None
            seen = _Seen(order, shape, structure, left, dtype, copy, self.random_state())
            self.calls[path].append(seen)

        return enter, leave


class Level:
    """How one model is run from, and up to, the boundary activations of one level.

    Attributes:
        hidden: the boundary activations of the recorded forward, (B, T, C).
        others: number of tensors beside them that are None when the block below is left out, which
            is right for attention weights that nobody asked for (BLOOM), not for T5's relative bias
        random_state: of all generators when the block below had returned.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, level: int, recording: Recording, rows: int
    ) -> None:
        """Raises `UnservableError` where `recording` shows that the prefix must run."""
        seen = recording.calls
        for i in range(level):
            times = len(seen[layout.block_paths[i]])
            if times != 1:
                raise UnservableError(f"block {i} runs {times} times in a forward")
        stack = layout.stacks[0]
        # a following stack may be another tower, which has run before
        paths = layout.block_paths[: min(level + 1, stack.length)]
        starts = [calls[0].order if (calls := seen[path]) else recording.count for path in paths]
        if starts != sorted(starts):
            raise UnservableError("its blocks do not run in their order")
        starts.append(recording.count)
        last, passing = "", {}
        for i in range(level):
            own = {
                path: seen[path][0]
                for path in layout.module_paths(i)
                if len(seen[path]) == 1 and starts[i] <= seen[path][0].order < starts[i + 1]
            }
            block = seen[layout.block_paths[i]][0]
            if block.structure is None:
                raise UnservableError(f"block {i} returns no tensor, tuple or list")
            same = {p: c for p, c in own.items() if c.structure and c.left == block.left}
            last = max(same, key=lambda path: same[path].order)
            passing.update({path: c.structure for path, c in same.items()})
        at_last = seen[last][0]
        self.hidden = at_last.hidden
        if self.hidden.ndim != 3 or self.hidden.shape[0] != rows:
            raise UnservableError(
                f"hidden states of shape {tuple(self.hidden.shape)} are not (B, T, C)"
            )
        self.random_state = at_last.random_state
        self._structure = at_last.structure
        self.others = at_last.structure.others if level < stack.length else 0
        del passing[last]
        runs: dict[str, Run] = {path: _passing(structure) for path, structure in passing.items()}
        runs[last] = self._feed
        for path in layout.module_paths(EMBEDDINGS):
            if layout.nearest_stack(path) is not stack:
                continue  # those of another tower
            calls = [call for call in seen[path] if call.order < at_last.order]
            if run := self._embeddings_run(model.get_submodule(path), calls, rows):
                runs[path] = run
        self._fed: torch.Tensor | None = None
        self._feeding = Swaps(model, runs)
        self._model, self._last = model, last
        self._block = layout.block_paths[level - 1]

    @property
    def was_fed(self) -> bool:
        """Whether the model has fetched what it was fed."""
        return self._fed is None

    def feed(self, hidden: torch.Tensor) -> Swaps:
        """Swaps under which one forward takes `hidden` (B, T, C) for its boundary activations."""
        self._fed = hidden
        return self._feeding

    def fed(self) -> Fed | None:
        """What a forward has been fed and has not fetched yet."""
        return None if self._fed is None else Fed(self, (self._fed,))

    def take(self, receive: Callable[[torch.Tensor], None]) -> AbstractContextManager[None]:
        """A context in which one forward hands its boundary activations to `receive`."""
        module, block = map(self._model.get_submodule, (self._last, self._block))

        def hand_on(output: Any) -> None:
            receive(unpacked(block, self._structure.hidden(output).detach()))

        if module._compiled_call_impl is None:
            return output_handed_to(hand_on, module)

        def run(original: nn.Module, args: Any, kwargs: Any) -> Any:
            taking.remove_stand_ins()
            output = original(*args, **kwargs)
            hand_on(output)
            return output

        taking = Swaps(self._model, {self._last: run})  # compiled code keeps no hook apart
        return taking.installed()

    def forget(self) -> None:
        self._fed = None

    def _feed(self, original: nn.Module, args: Any, kwargs: Any) -> Any:
        # from here on all modules run: a decoder may look its tokens up in the encoder's embeddings
        self._feeding.remove_stand_ins()
        hidden, self._fed = self._fed, None
        return self._structure.wrap(hidden)

    def _embeddings_run(self, module: nn.Module, calls: Sequence[_Seen], rows: int) -> Run | None:
        """What a module of the embeddings can return instead of running; None if it must run."""
        if not calls or any(c.structure is None or c.structure.kind for c in calls):
            return None
        dtypes = {call.dtype for call in calls}
        if len(dtypes) > 1 or not calls[0].dtype.is_floating_point:
            return None
        (dtype,) = dtypes
        own_forward = "forward" in module.__dict__
        if root_of(type(module)).forward is nn.Embedding.forward and not own_forward:
            width = (module.embedding_dim,)
            return lambda original, args, kwargs: _unknown(
                (e := entering(args, kwargs)).shape + width, dtype, e.device
            )
        if all(call.entered == call.left for call in calls):
            return lambda original, args, kwargs: entering(args, kwargs)
        if len(calls) == 1 and calls[0].left == self.hidden.shape:
            return lambda original, args, kwargs: _unknown(self._fed.shape, dtype, self._fed.device)
        if any(c.entered is None or {c.entered[0], c.left[0]} != {rows} for c in calls):
            return None
        known = {call.entered[1:]: call.left[1:] for call in calls}

        def run(original: nn.Module, args: Any, kwargs: Any) -> Any:
            entered = entering(args, kwargs)
            if entered.shape[1:] not in known:
                return original(*args, **kwargs)
            shape = (entered.shape[0], *known[entered.shape[1:]])
            return _unknown(shape, dtype, entered.device)

        return run


@dataclass(frozen=True)
class Fed:
    """Boundary activations that one forward gets past its arguments; a `Feed` of captured graphs.

    Attributes:
        key: the level.
        tensors: (B, T, C), alone.
    """

    key: Level
    tensors: tuple[torch.Tensor]

    @contextmanager
    def using(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Feed the forward inside another tensor; what was fed before is fed again afterwards."""
        self.key.feed(*tensors)
        try:
            yield
        finally:
            self.key.feed(*self.tensors).install_stand_ins()


def _unknown(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device).expand(*shape)


def _passing(structure: Structure) -> Run:
    return lambda original, args, kwargs: structure.wrap(entering(args, kwargs))
