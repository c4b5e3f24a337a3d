"""How a result is stored, and what is said of a target."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = {True: "met", False: "NOT met", None: "not measured"}


def store(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file in one piece: a run that is killed leaves the last file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


@dataclass(frozen=True)
class Verdict:
    """Whether a target is met; None where nothing was measured that could say."""

    target: str
    met: bool | None
    found: str

    def __str__(self) -> str:
        return f"{WORDS[self.met]}: {self.target}: {self.found}"
