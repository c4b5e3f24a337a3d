"""The layer order of the package, read from its imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "progtuning_kernels"
# a module may import from lower layers, and within a folder from its own
LAYERS = [
    {"backend", "freeze_events", "random_state"},
    {"schedules", "ops", "model"},
    {"optim", "swaps", "cache", "distributed"},
    {"freezing"},
    {"patch", "planner"},
    {"integrations", "report", "contribution", "checkpoints"},
    {"cli", "__init__"},
    {"__main__"},
]
FRAMEWORKS = {"transformers", "peft", "accelerate", "datasets"}
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").parts for p in PACKAGE.rglob("*.py"))


def _layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def _imports(module: tuple[str, ...]) -> list[tuple[str, str]]:
    """(top package, first part below it) of everything a file imports, at any depth."""
    tree = ast.parse(PACKAGE.joinpath(*module).with_suffix(".py").read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[0], "") for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module.split(".")[0], ""))
        elif isinstance(node, ast.ImportFrom):
            parts = [*module[: len(module) - node.level], *filter(None, [node.module])]
            whole = ".".join(parts).split(".")
            names = [whole[0]] if whole[0] else [a.name for a in node.names]
            found += [("progtuning_kernels", name) for name in names]
    return found


def test_every_module_has_a_layer():
    assert {module[0] for module in MODULES} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES, ids="/".join)
def test_imports_point_downwards(module):
    for package, part in _imports(module):
        if package == "progtuning_kernels" and part in set().union(*LAYERS):
            same_folder = part == module[0] and len(module) > 1
            assert same_folder or _layer(part) < _layer(module[0]), f"{module} imports {part}"
        if package in FRAMEWORKS:
            assert module[0] in ("integrations", "cli"), f"{module} imports {package}"


def test_optimizers_and_patch_do_not_know_each_other():
    for module in MODULES:
        parts = {part for _, part in _imports(module)}
        if module[0] == "optim":
            assert not parts & {"patch", "freezing", "model"}
        if module[0] in ("patch", "freezing", "model"):
            assert not parts & {"optim", "ops"}
