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


def _is_reentrant(module: nn.Module) -> bool:
    # a functools.partial of torch's checkpoint, put there by transformers
    function = module.__dict__.get("_gradient_checkpointing_func")
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))


def make_nonreentrant(model: nn.Module, layout: Layout) -> list[tuple[nn.Module, Any, Any]]:
    """Put the non-reentrant variant in the place of the reentrant one, in every module.

    Looks at the blocks only, which is cheap enough for every forward, unless it finds something.

    Returns:
        The modules it changed, each with the function that it had and the one that it has now.
    """
    if not any(_is_reentrant(model.get_submodule(path)) for path in layout.block_paths):
        return []
    changed = []
    for module in filter(_is_reentrant, model.modules()):
        function = module._gradient_checkpointing_func
        replacement = functools.partial(
            function.func, *function.args, **{**function.keywords, "use_reentrant": False}
        )
        module._gradient_checkpointing_func = replacement
        changed.append((module, function, replacement))
    warnings.warn(
        "gradient checkpointing with use_reentrant=True trains nothing above a frozen prefix: the "
        "patched model uses use_reentrant=False",
        stacklevel=2,
    )
    return changed


def drop_input_grads(model: nn.Module, layout: Layout) -> list[nn.Module]:
    """Undo `enable_input_require_grads()` on the model and the models inside it.

    Returns:
        The modules on which it was in force.
    """
    found = []
    for path in layout.containers:
        module = model.get_submodule(path)
        # transformers 5.0 keeps one hook, later ones a list; wrappers forward both names, so the
        # module's own __dict__ is what counts
        own = module.__dict__
        if own.get("_require_grads_hooks") or own.get("_require_grads_hook"):
            module.disable_input_require_grads()
            _drop_forgotten_hooks(module)
            found.append(module)
    return found


def _drop_forgotten_hooks(module: nn.Module) -> None:
    """Switched on twice, as TRL does with adapters, the first hooks are in nobody's list."""
    for part in module.modules():
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__name__", None) == "make_inputs_require_grads":
                del part._forward_hooks[key]
