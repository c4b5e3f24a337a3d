"""One kind of call of a model, recorded: its forward, and its backward."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .legality import Legality, NotCapturable
from .pools import Pool


class Feed(Protocol):
    """Tensors that a forward gets past its arguments.

    Attributes:
        key: equal where another forward can take tensors of these shapes in their place.
        tensors: those of the forward at hand.
    """

    key: Hashable
    tensors: Sequence[Tensor]

    def using(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Have forwards inside take these instead."""
        ...


class Turn:
    """One replayed forward; autograd's node alone holds it.

    It is gone where nothing can ask for its backward any more.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.done = False  # its backward was replayed

    @property
    def stale(self) -> bool:
        """Whether another forward was replayed since, over what this one has computed."""
        return self._turns.last() is not self


class Turns:
    """Forwards that replay in one pool, one after the other."""

    def __init__(self) -> None:
        self.last: Callable[[], Turn | None] = lambda: None

    @property
    def awaited(self) -> bool:
        """Whether the last one's backward may still come."""
        turn = self.last()
        return turn is not None and not turn.done

    def begin(self) -> Turn:
        turn = Turn(self)
        self.last = weakref.ref(turn)
        return turn


class Gradients:
    """Where recorded backwards leave the gradients: one set of memory for a whole stage.

    `.grad` is then the tensor that lies here, as autograd takes over what it is handed. Before
    another backward writes, a `.grad` that is still kept gets memory of its own.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.tensors = [torch.empty_like(p, requires_grad=False) for p in parameters]
        self._storages = [t.untyped_storage() for t in self.tensors]
        self._alone = self.holders()

    def holders(self) -> list[int]:
        return [torch._C._storage_Use_Count(s._cdata) for s in self._storages]

    def note_recording(self, before: Sequence[int]) -> None:
        """Take what keeps them since then for graphs."""
        made = zip(self._alone, self.holders(), before, strict=True)
        self._alone = [alone + now - then for alone, now, then in made]

    def make_room(self) -> None:
        for p, own in zip(self.parameters, self.tensors, strict=True):
            if p.grad is not None and p.grad.data_ptr() == own.data_ptr():
                p.grad = p.grad.clone()

    def copies_if_held(self) -> list[Tensor]:
        """Copies of all, if anything but a `.grad` keeps one that lies here; else none."""
        held = any(now > alone for now, alone in zip(self.holders(), self._alone, strict=True))
        return [own.clone() for own in self.tensors] if held else []

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)


class ReplayedCall:
    """A call whose arguments have these shapes, dtypes, and values where they are no tensors.

    Args:
        run: takes the call's arguments.
        wanted: of the differentiable outputs, those that backward starts from.
        buffers: of the module.
        known: all tensors of the module.

    Raises:
        NotCapturable: the call cannot be repeated.
        Exception: what a recording refuses.
    """

    def __init__(
        self,
        pool: Pool,
        run: Callable[..., Any],
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        feeds: Sequence[Feed],
        gradients: Gradients,
        wanted: tuple[bool, ...],
        buffers: Sequence[Tensor],
        known: Sequence[Tensor],
    ) -> None:
        given = tensors_of(leaves, feeds)
        self._inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
        self._demanded = [t for t in self._inputs if t.requires_grad]
        versions = [t._version for t in (*self._inputs, *buffers)]
        own = iter(self._inputs)
        own_leaves = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own_leaves, spec)
        self._gradients, self._wanted = gradients, wanted
        drawn = random.getstate(), numpy.random.get_state()[2]
        legality = Legality(known=(*self._inputs, *known))
        with ExitStack() as fed, pool.recording() as self._forward, legality:
            for feed in feeds:
                fed.enter_context(feed.using([next(own) for _ in feed.tensors]))
            output = run(*args, **kwargs)
        if drawn != (random.getstate(), numpy.random.get_state()[2]):
            raise NotCapturable("its forward draws random numbers of Python or numpy")
        self._rest, self._spec = pytree.tree_flatten(output)
        for leaf in self._rest:
            if not (leaf is None or type(leaf) is Tensor or isinstance(leaf, int | float | str)):
                raise NotCapturable(f"its output holds a {type(leaf).__name__}")
        now = [t._version for t in (*self._inputs, *buffers)]
        if now[: len(given)] != versions[: len(given)]:
            raise NotCapturable("its forward writes into an argument")
        changes = [a != b for a, b in zip(now, versions, strict=True)][len(given) :]
        self._written = [t for t, changed in zip(buffers, changes, strict=True) if changed]
        outputs = [leaf for leaf in self._rest if isinstance(leaf, Tensor)]
        self._places = [i for i, leaf in enumerate(self._rest) if isinstance(leaf, Tensor)]
        self._differentiable = [t.requires_grad for t in outputs]
        if len(wanted) != sum(self._differentiable):
            raise NotCapturable("its output is another one than in the forward before")
        starts = [t for t in outputs if t.requires_grad]
        starts = [t for t, is_wanted in zip(starts, wanted, strict=True) if is_wanted]
        self._starts = [torch.ones_like(t, requires_grad=False) for t in starts]
        self._has_gradient = [False] * len(gradients.parameters)
        self._input_gradients: list[Tensor | None] = [None] * len(self._demanded)
        gradients.make_room()
        before = gradients.holders()
        if starts:
            with pool.recording() as self._backward:
                wants = [*self._demanded, *gradients.parameters]
                found = torch.autograd.grad(starts, wants, self._starts, allow_unused=True)
                own = found[len(self._demanded) :]
                there = [i for i, g in enumerate(own) if g is not None]
                if there:
                    torch._foreach_copy_(
                        [gradients.tensors[i] for i in there], [own[i] for i in there]
                    )
            self._input_gradients = [*found[: len(self._demanded)]]
            self._has_gradient = [g is not None for g in own]
        gradients.note_recording(before)
        self._outputs = [t.detach() for t in outputs]
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in self._rest]

    def replay(self, tensors: Sequence[Tensor], turn: Turn) -> Any:
        """The output for other tensors, in the order of `tensors_of`."""
        with torch.no_grad():
            if self._inputs:
                torch._foreach_copy_(self._inputs, tensors)
            self._forward.replay()
            if self._written:
                torch.autograd.graph.increment_version(self._written)
        demanding = [t for t in tensors if t.requires_grad]
        outputs = _Replayed.apply(self, turn, *demanding, *self._gradients.parameters)
        found = list(self._rest)
        for place, output in zip(self._places, outputs, strict=True):
            found[place] = output
        return pytree.tree_unflatten(found, self._spec)

    def copies(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs, and those of them that are not differentiable."""
        copies = tuple(t.clone() for t in self._outputs)
        return copies, [
            t for t, wanted in zip(copies, self._differentiable, strict=True) if not wanted
        ]

    def replay_backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of arguments and parameters, of those of the outputs."""
        pairs = zip(grads, self._differentiable, strict=True)
        starts = [g for g, differentiable in pairs if differentiable]
        if tuple(g is not None for g in starts) != self._wanted:
            raise RuntimeError(
                "backward starts from other outputs than in the step that was captured: "
                'patch_model(..., graph="off")'
            )
        self._gradients.make_room()
        kept = self._gradients.copies_if_held()
        torch._foreach_copy_(self._starts, [g for g in starts if g is not None])
        self._backward.replay()
        found = [own.detach() for own in self._gradients.tensors]
        if kept:
            found = [own.clone() for own in found]
            torch._foreach_copy_(self._gradients.tensors, kept)
        return [
            *(None if g is None else g.clone() for g in self._input_gradients),
            *(g if there else None for g, there in zip(found, self._has_gradient, strict=True)),
        ]

    @property
    def parameters(self) -> int:
        return len(self._gradients.parameters)

    @property
    def nbytes(self) -> int:
        """Of its arguments' copies; all else is the pool's."""
        return sum(t.untyped_storage().nbytes() for t in (*self._inputs, *self._starts))


def tensors_of(leaves: Sequence[Any], feeds: Sequence[Feed]) -> list[Tensor]:
    """All that a call reads."""
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return given + [t for feed in feeds for t in feed.tensors]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ReplayedCall, turn: Turn, *leaves: Tensor) -> Any:
        ctx.call, ctx.turn = call, turn
        # so that autograd looks whether a parameter was written to before its backward
        ctx.save_for_backward(*leaves[len(leaves) - call.parameters :])
        ctx.set_materialize_grads(False)
        outputs, constant = call.copies()
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _ = ctx.saved_tensors
        if ctx.turn.done or ctx.turn.stale:
            before = "its backward" if ctx.turn.done else "another captured forward"
            raise RuntimeError(
                f"{before} has run since this captured forward, over what a backward needs: "
                'patch_model(..., graph="off")'
            )
        found = ctx.call.replay_backward(grads)
        ctx.turn.done = True
        return None, None, *found
