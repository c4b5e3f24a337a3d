"""Schedules from small files, for the command line and for configs under version control."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backend import one_line
from . import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    MilestoneSchedule,
    PlateauSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
    Schedule,
)

KINDS: dict[str, type] = {
    "progressive": ProgressiveSchedule,
    "milestones": MilestoneSchedule,
    "random": RandomBlockSchedule,
    "cyclic": CyclicBlockSchedule,
    "fixed": FixedBlockSchedule,
    "adaptive": AdaptiveSchedule,
    "plateau": PlateauSchedule,
}


def make_schedule(settings: Mapping[str, Any], folder: Path = Path()) -> Schedule:
    """The schedule that a file's content describes; `ValueError` in one line for a wrong one.

    Args:
        folder: where `weights_from` starts.
    """
    settings = _with_weights(settings, folder)
    kind = settings.pop("schedule", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"schedule must be one of {', '.join(KINDS)}, got {kind!r}")
    cls = KINDS[kind]
    if cls is MilestoneSchedule:
        steps = settings.pop("steps", None)
        settings["milestones"] = _by_step(settings.get("milestones", steps), "boundary")
    if isinstance(settings.get("blocks"), Mapping):
        settings["blocks"] = _by_step(settings["blocks"], "blocks", "blocks")
    if cls is PlateauSchedule and isinstance(settings.get("stages"), Mapping):
        settings["stages"] = make_schedule(settings["stages"], folder)
    parameters = inspect.signature(cls).parameters
    if "anneal" in settings:
        raise ValueError("anneal is no setting of a schedule: progtuning train --anneal")
    for name in settings:
        if name not in parameters:
            allowed = ", ".join("steps" if p == "milestones" else p for p in parameters)
            raise ValueError(f"{kind} has no setting {name!r}; it has {allowed}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ValueError(f"{kind} needs {name}")
    try:
        return cls(**settings)
    except TypeError as error:  # a text where a number belongs, a list where a text does
        raise ValueError(f"{kind}: a setting is of the wrong type ({one_line(error)})") from error


def schedule_from_file(path: str | Path) -> Schedule:
    """Read a schedule from a .toml (Python 3.11), .yaml, .yml or .json file.

    `schedule` is "progressive", "milestones", "random", "cyclic", "fixed", "adaptive" or "plateau";
    the other keys are the arguments of its class (`steps` of milestones is a table of step =
    boundary, `blocks` of fixed may be one of step = set of blocks, and `stages` of plateau may be a
    table that describes another schedule). The weights of
    progressive may come from what `progtuning contribution` has written: `weights_from` is its path
    from the schedule's own folder, `measure` the one to take where it has several.

    Args:
        path: of the file.

    Raises:
        ValueError: one line: the file is no such file, or describes no schedule.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        content = read_settings(path)
        if not isinstance(content, Mapping):
            raise ValueError("expected settings, one per line")
        return make_schedule(content, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def read_settings(path: Path) -> Any:
    """The content of a .toml, .yaml, .yml or .json file; raise `ValueError` for any other."""
    text = path.read_text(encoding="utf-8")
    kind = path.suffix.lower()
    if kind == ".toml":
        try:
            import tomllib
        except ImportError:
            raise ValueError("TOML needs Python 3.11: write it as JSON or YAML") from None
        return tomllib.loads(text)
    if kind == ".json":
        return json.loads(text)
    if kind in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise ValueError("YAML needs: pip install pyyaml") from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    raise ValueError("expected a .toml, .yaml, .yml or .json file")


def _with_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    settings = dict(settings)
    if "weights_from" not in settings:
        return settings
    if "weights" in settings:
        raise ValueError("weights and weights_from exclude each other")
    path, measure = folder / str(settings.pop("weights_from")), settings.pop("measure", None)
    stored = json.loads(path.read_text(encoding="utf-8"))
    measures = stored.get("measures") if isinstance(stored, dict) else None
    if not isinstance(measures, dict) or not measures:
        raise ValueError(f"{path} holds no contribution of blocks")
    if measure is None and len(measures) == 1:
        (measure,) = measures
    if measure not in measures:
        names = ", ".join(measures)
        raise ValueError(f"measure must be one of {names} in {path}, got {measure!r}")
    settings["weights"] = measures[measure]["weights"]
    if settings["weights"] is None:
        raise ValueError(f"no block contributes anything by {measure} in {path}")
    return settings


def _by_step(steps: Any, value: str, name: str = "steps") -> dict[Any, Any]:
    """A table of a file by steps, which are texts in TOML and JSON."""
    try:
        return {int(key) if isinstance(key, str) else key: n for key, n in steps.items()}
    except (AttributeError, ValueError):
        raise ValueError(f"{name} must be a table of step = {value}, got {steps!r}") from None
