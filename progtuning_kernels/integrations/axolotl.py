"""Progressive fine-tuning under axolotl: a plugin that its YAML file names."""

# pyright: reportMissingImports=false
# the environment of the tests has no axolotl
from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..patch import patch_model
from ..schedules.files import make_schedule
from .hf_trainer import ProgtuningCallback


def make_callback(settings: Mapping[str, Any]) -> ProgtuningCallback:
    """The callback that the settings of a YAML file describe; `ValueError` for wrong ones.

    Args:
        settings: those of a schedule file, and options of `patch_model`.
    """
    parameters = inspect.signature(patch_model).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    options = {
        # YAML reads a bare on and off as true and false
        name: ("on" if value else "off") if isinstance(value, bool) else value
        for name, value in settings.items()
        if name in known
    }
    schedule = {name: value for name, value in settings.items() if name not in known}
    try:
        return ProgtuningCallback(make_schedule(schedule), **options)
    except TypeError as error:
        raise ValueError(str(error)) from error


class ProgtuningArgs(BaseModel):
    """The key that the plugin adds to axolotl's YAML file."""

    progtuning: dict[str, Any] | None = None

    @field_validator("progtuning")
    @classmethod
    def _describes_a_run(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        make_callback(settings or {})
        return settings


class ProgtuningPlugin(BasePlugin):
    """Gives axolotl's trainer a `ProgtuningCallback`; name it in `plugins:` of the YAML file."""

    def get_input_args(self) -> str:
        return f"{__name__}.{ProgtuningArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[ProgtuningCallback]:
        callback = make_callback(cfg.progtuning or {})
        callback.attach(trainer)
        callback.hold_rows(trainer.model)
        return [callback]
