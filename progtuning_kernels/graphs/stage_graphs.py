"""Captures the training forwards of one patched model, stage by stage, and replays them.

A forward is captured whole if it can be, else its blocks are, one by one; what can neither runs as
it always does.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from ..model.call import argument_names
from ..model.derived_classes import base_of, derive
from ..model.layout import Layout
from .captured_module import CapturedModule
from .legality import NotCapturable
from .replayed_call import Feed
from .report import GraphReport

Graph = Literal["off", "auto", "on"]

_GRAPHS = "_progtuning_graphs"
_OWN_FORWARD = "_progtuning_own_forward"
_CHANGED = "a parameter, buffer, module, attribute or hook was added, replaced, moved or switched"
_NEVER_RAN = (
    'off: graph="auto" captures where a stored result from a GPU says that it pays; there is none '
    'yet: "on" captures'
)


class StageGraphs:
    """Captured forwards and backwards of one model.

    Args:
        mode: "on" captures; "auto" does where a measurement says that it pays; "off" never.
        place: puts these blocks, and no others, into the class whose forward asks `run_block`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mode: Graph,
        place: Callable[[Collection[nn.Module]], None],
    ) -> None:
        self._model = model
        self._layout = layout
        self._mode = mode
        self._place = place
        self._takes_use_cache = "use_cache" in argument_names(model)
        self._allowed: tuple[Sequence[Feed], str | None] | None = None
        self._by_blocks = False  # the forward under way
        self._paused = False
        self._replays = self._block_replays = 0
        self._eager: Counter[str] = Counter()
        self._whole: CapturedModule | None = None  # of the stage, once a forward has begun it
        self._in_place: list[nn.Module] = []  # its blocks
        self._blocks: dict[nn.Module, CapturedModule] = {}  # those that are captured one by one
        if mode == "on":
            model.__dict__[_GRAPHS] = self
            model.__class__ = derive(type(model), "graphed", members(type(model), "run"))

    def __reduce__(self) -> tuple:
        return (type(None), ())  # a copy of the model is an ordinary model

    def drop(self) -> None:
        """Forget all that was captured, as where another stage begins."""
        self._whole = None
        if self._blocks:
            self._place(())
            for block in self._blocks:
                block.__dict__.pop(_GRAPHS, None)
            self._blocks = {}

    def remove(self) -> None:
        """Take it out of the model."""
        self.drop()
        own = self._model.__dict__.pop(_OWN_FORWARD, None)
        if own is not None and _is_ours(self._model.__dict__.get("forward")):
            self._model.__dict__["forward"] = own
        if self._model.__dict__.pop(_GRAPHS, None) is not None:
            self._model.__class__ = base_of(type(self._model))

    @property
    def captures(self) -> bool:
        """Whether forwards of the stage can be captured whole."""
        return self._whole is not None and self._whole.refusal is None

    def look(self) -> None:
        """Look at the stage, if it begins, before modules are taken out of their places."""
        self._allowed = None
        if self._mode != "on" or self._paused or _transformed():
            return
        if any(module.changed for module in (self._whole, *self._blocks.values()) if module):
            self._eager[_CHANGED] += 1
            self.drop()
        if self._whole is None:
            self._whole = CapturedModule(self._model)
            paths = self._layout.block_paths  # a cache puts stand-ins in their places later
            self._in_place = [*map(self._model.get_submodule, paths)]
        for module in (self._whole, *self._blocks.values()):
            module.look()
        own = self._model.__dict__.get("forward")
        if inspect.ismethod(own) and not _is_ours(own):
            self._model.__dict__[_OWN_FORWARD] = own
            self._model.__dict__["forward"] = MethodType(_around(own), self._model)

    def allow(self, feeds: Sequence[Feed] = (), *, against: str | None = None) -> None:
        """Let the forward that comes be captured or replayed.

        Args:
            feeds: what it gets past its arguments.
            against: why it has to run eagerly this time.
        """
        if self._whole is not None and not self._paused and not _transformed():
            self._allowed = feeds, against

    def forbid(self) -> None:
        """Have all forwards run as they are, until `allow`."""
        self._allowed, self._by_blocks = None, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this context run as they are."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def report(self) -> GraphReport:
        modules = [*filter(None, [self._whole]), *self._blocks.values()]
        state = {"off": 'off: graph="off"', "auto": _NEVER_RAN, "on": "on"}[self._mode]
        if self._blocks:
            state = "on, by blocks where a forward cannot be captured whole"
        return GraphReport(
            state,
            captured=sum(module.captured for module in modules),
            replays=self._replays,
            block_replays=self._block_replays,
            nbytes=sum(module.nbytes for module in modules),
            eager=dict(self._eager),
        )

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One forward of the model."""
        if self._allowed is None or not torch.is_grad_enabled() or module is not self._model:
            return forward(*args, **kwargs)
        (feeds, against), self._allowed = self._allowed, None
        if not module.training:
            self._eager["the model is in eval mode"] += 1
            return forward(*args, **kwargs)
        if self._takes_use_cache and "use_cache" not in kwargs:
            kwargs = {**kwargs, "use_cache": False}
        try:
            output, reason = self._whole.run(forward, args, kwargs, feeds, against)
        except NotCapturable as refused:
            reason = str(refused)
            if refused.lasting and against is None and self._whole.on_device:
                self._begin_by_blocks()
            output = self._whole.run_eagerly(forward, args, kwargs)
        if reason is None:
            self._replays += 1
        else:
            self._eager[reason] += 1
        return output

    def run_block(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One forward of a block, in a forward of the model that is captured by blocks."""
        if self._by_blocks and torch.is_grad_enabled():
            try:
                output, reason = self._blocks[block].run(forward, args, kwargs)
            except NotCapturable as refused:
                self._eager[f"a block: {refused}"] += 1
            else:
                self._block_replays += reason is None
                return output
        return forward(*args, **kwargs)

    def _begin_by_blocks(self) -> None:
        if not self._blocks:
            self._blocks = {block: CapturedModule(block) for block in self._in_place}
            for block in self._blocks:
                block.__dict__[_GRAPHS] = self
            self._place([*self._blocks])
        self._by_blocks = True


def _transformed() -> bool:
    """Whether torch.func runs the model, with tensors that have no memory."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _around(own: MethodType) -> Callable[..., Any]:
    """A forward of the instance that asks its graphs to run the one that it had.

    Accelerate gives a model one, for autocast, that calls the class's own as it was before.
    """

    @functools.wraps(own.__func__)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs, inner = self.__dict__.get(_GRAPHS), self.__dict__[_OWN_FORWARD]
        return inner(*args, **kwargs) if graphs is None else graphs.run(self, inner, args, kwargs)

    setattr(forward, _GRAPHS, True)
    return forward


def _is_ours(forward: Any) -> bool:
    return getattr(forward, _GRAPHS, False)


def members(base: type, run: str, forward: Callable[..., Any] | None = None) -> dict[str, Any]:
    """`forward` of a subclass of `base`, which asks its graphs to `run` it ("run", "run_block")."""
    inner = forward or base.forward

    def graphed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs = self.__dict__.get(_GRAPHS)
        if graphs is None or torch.compiler.is_compiling():
            return inner(self, *args, **kwargs)
        return getattr(graphs, run)(self, inner.__get__(self), args, kwargs)

    graphed.__wrapped__ = inner  # transformers reads its signature
    return {"forward": graphed}
