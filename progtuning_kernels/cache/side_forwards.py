"""Runs forwards beside those of the loop: for a trial, and for rows that a batch misses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.call import Call
from ..model.forward_hooks import buffers_kept
from ..model.layout import Layout
from ..packing import padded
from ..random_state import gpus_of, random_state_kept, set_torch_state, torch_state
from .recorded_levels import Level
from .stand_ins import StopForward, UnservableError


class SideForwards:
    """Forwards beside those of the training loop; what wraps the model's forward applies.

    Attributes:
        call_model: calls the model with the arguments of a `Call`.
        busy: one is under way; the hooks of the patched model leave it alone.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self.call_model: Callable[[Call], Any] = lambda call: model(*call.args, **call.kwargs)
        self._around = [model.get_submodule(path) for path in layout.containers]
        self.busy = False

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Padded, no gradients, and no trace in buffers or in random numbers."""
        with (
            random_state_kept(self._model),
            padded(),
            self._busy(),
            torch.compiler.set_stance("force_eager"),
            buffers_kept(self._model),
        ):
            yield

    @contextmanager
    def _busy(self) -> Iterator[None]:
        before, self.busy = self.busy, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = before
            # autocast keeps the weights that it has cast, here without their graph: up to torch
            # 2.10 the training forward that comes would then give these weights no gradient
            torch.clear_autocast_cache()

    def run_model(self, call: Call) -> Any:
        """What the model returns; the caller's dicts and tensors stay as they are."""
        own = call.cloned()
        forwards = [(vars(m), vars(m).get("forward")) for m in self._model.modules()]
        try:
            return self.call_model(own)
        except BaseException:
            # transformers 5.0 gives blocks a forward that captures hidden states, and takes it back
            # only where nothing raises
            for attributes, forward in forwards:
                attributes.pop("forward", None)
                if forward is not None:
                    attributes["forward"] = forward
            raise

    def boundary_activations(
        self,
        levels: Mapping[int, Level],
        at: int,
        call: Call,
        source: tuple[int, Tensor] | None = None,
        *,
        draws: bool,
        packed: bool = False,
    ) -> Tensor:
        """What block `at` gets, (B, T, C), of all rows of `call`, by a forward that ends there.

        Args:
            source: a lower level and its boundary activations, to start from.
            draws: random numbers are drawn on the way; the generators are set back.
            packed: it runs packed where the model does, and zeros stand at padding.
        """
        taken: list[Tensor] = []

        def receive(hidden: Tensor) -> None:
            taken.append(hidden.clone())
            raise StopForward

        gpus = gpus_of(self._model) if draws else []
        state = torch_state(gpus) if draws else None
        # frozen modules do not write to theirs, and modules above the boundary are not reached
        buffers = [
            (module._buffers, name, buffer, buffer._version, buffer.clone())
            for module in self._around
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            with self._busy(), ExitStack() as stand_ins:
                if not packed:
                    stand_ins.enter_context(padded())
                stand_ins.enter_context(levels[at].take(receive))
                if source is not None:
                    stand_ins.enter_context(levels[source[0]].feed(source[1]).installed())
                self.run_model(call)
        except StopForward:
            pass
        finally:
            if state is not None:
                set_torch_state(state, gpus)
            for held, name, buffer, version, values in buffers:
                held[name] = buffer
                if buffer._version != version:
                    buffer.copy_(values)
        if not taken:
            raise UnservableError(f"block {at - 1} is not called through its list")
        return taken[0]
