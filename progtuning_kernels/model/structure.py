"""Notices that modules or parameters were added, renamed or removed while a model is patched.

Pruning, weight norm, new heads and adapters do so. `Parameter` objects that are replaced under
their names are no change: FSDP2 makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .layout import Layout

_CURE = (
    "when the model was patched: call handle.unpatch() and then "
    "patch_model(model, schedule, step=handle.step)"
)


class Structure:
    """The modules and parameter names of one model at the last call of `note`."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._blocks = {s.path: [*model.get_submodule(s.path).children()] for s in layout.stacks}
        self.note()

    def note(self) -> None:
        """Take the model for unchanged as it is now."""
        modules = list(self._model.modules())
        self._inside = [(m._modules, dict(m._modules)) for m in modules]
        self._owned = [(m._parameters, _names(m._parameters)) for m in modules]

    @property
    def changed(self) -> bool:
        """Whether a module, or the name of a parameter, came or went since."""
        return any(now != before for now, before in self._inside) or any(
            _names(now) != before for now, before in self._owned
        )

    def check_blocks(self) -> None:
        """Raise `RuntimeError` if a list of blocks holds others than when the model was patched."""
        for path, before in self._blocks.items():
            blocks = _module_at(self._model, path)
            if blocks is None or [*blocks._modules.values()] != before:
                raise RuntimeError(f"{path} holds other blocks than it did {_CURE}")

    def check(self) -> None:
        """Raise `RuntimeError` if the layout does not describe the model any more."""
        self.check_blocks()
        for path in (*self._layout.outside, *filter(None, self._layout.containers)):
            if _module_at(self._model, path) is None:
                raise RuntimeError(f"{path} is gone, which was there {_CURE}")


def _names(parameters: Mapping[str, nn.Parameter | None]) -> list[str]:
    return [name for name in parameters if parameters[name] is not None]


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        if (model := model._modules.get(name)) is None:
            return None
    return model
