"""Keeps gradient checkpointing from undoing the truncation, whenever it is switched on.

transformers has two traps. Switching checkpointing on also makes the embeddings' output require
grad, so that every frozen block is recomputed and run backward. The reentrant variant gives no
gradient at all to blocks whose input does not require grad, without an error.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from ..model.layout import Layout


class Checkpointing:
    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        # modules whose variant was replaced, with the function they had and the one they have now
        self._replaced: list[tuple[nn.Module, Any, Any]] = []
        self._input_grads: list[nn.Module] = []  # that had `enable_input_require_grads()` in force

    def keep_truncated(self) -> None:
        """Undo what was switched on since the last call, wherever the embeddings are frozen: the
        input of block 0 does not require grad then, though the block may train.
        """
        for path in self._layout.containers:
            module = self._model.get_submodule(path)
            # transformers 5.0 keeps one hook, later ones a list; wrappers forward both names, so
            # the module's own __dict__ is what counts
            own = module.__dict__
            if own.get("_require_grads_hooks") or own.get("_require_grads_hook"):
                module.disable_input_require_grads()
                _drop_forgotten_hooks(module)
                self._input_grads.append(module)
        self._make_nonreentrant()

    def restore_checkpointing(self) -> None:
        for module, function, replacement in self._replaced:
            if module._gradient_checkpointing_func is replacement:
                module._gradient_checkpointing_func = function
        for module in self._input_grads:
            module.enable_input_require_grads()

    def _make_nonreentrant(self) -> None:
        # looks at the blocks only, which is cheap enough for every forward, unless it finds one
        blocks = map(self._model.get_submodule, self._layout.block_paths)
        if not any(map(_is_reentrant, blocks)):
            return
        for module in filter(_is_reentrant, self._model.modules()):
            function = module._gradient_checkpointing_func
            replacement = functools.partial(
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
            module._gradient_checkpointing_func = replacement
            self._replaced.append((module, function, replacement))
        warnings.warn(
            "gradient checkpointing with use_reentrant=True trains nothing above a frozen prefix: "
            "the patched model uses use_reentrant=False",
            stacklevel=2,
        )


def _is_reentrant(module: nn.Module) -> bool:
    # a functools.partial of torch's checkpoint, put there by transformers
    function = module.__dict__.get("_gradient_checkpointing_func")
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))


def _drop_forgotten_hooks(module: nn.Module) -> None:
    """Remove the first hooks where it was switched on twice, as TRL does: no list holds them."""
    for part in module.modules():
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__name__", None) == "make_inputs_require_grads":
                del part._forward_hooks[key]
