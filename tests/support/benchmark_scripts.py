"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_script(script: str, name: str | None = None) -> ModuleType:
    """The module that a script is, imported once under its own name or another."""
    name = name or script
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{script}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        before = list(sys.path)
        sys.path.insert(0, str(BENCHMARKS))  # as for a script
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = before
    return sys.modules[name]
