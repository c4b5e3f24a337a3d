"""The floors of the package, read from its imports; `python tests/test_layers.py` prints them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "progtuning_kernels"
# a module may import from lower layers, and within a folder from its own
LAYERS = [
    {"backend", "freeze_events", "random_state", "sharding", "text_table", "triton_trial"},
    {"schedules", "ops", "model"},
    {"packing", "zero"},
    {"optim", "swaps", "cache", "distributed", "graphs"},
    {"freezing"},
    {"patch", "planner"},
    {"integrations", "report", "contribution", "checkpoints", "bench"},
    {"budget"},
    {"cli", "public"},
    {"__init__"},
    {"__main__"},
]
FRAMEWORKS = {"transformers", "peft", "accelerate", "datasets"}
FILES = {p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py")} | {
    p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_dir()
}
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").parts for p in PACKAGE.rglob("*.py"))


def _layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def _is_package(name: str) -> bool:
    return PACKAGE.joinpath(*name.split(".")).is_dir()


def _imports(module: tuple[str, ...]) -> list[tuple[str, str]]:
    """(top package, dotted name of a file below it) of all that a file imports, at any depth."""
    tree = ast.parse(PACKAGE.joinpath(*module).with_suffix(".py").read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[0], "") for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module.split(".")[0], ""))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*module[: len(module) - node.level], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                name = inner if inner.replace(".", "/") in FILES else base
                if name:  # else a name of the package itself: its version, the extension
                    name = f"{name}.__init__" if _is_package(name) else name
                    found.append(("progtuning_kernels", name))
    return found


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle, [] where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (walk(other, [*path, name]) for other in graph[name])), [])

    return next(filter(None, (walk(name, []) for name in graph)), [])


def test_every_module_has_a_layer():
    assert {module[0] for module in MODULES} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES, ids="/".join)
def test_imports_point_downwards(module):
    for package, name in _imports(module):
        part = name.split(".")[0]
        if package == "progtuning_kernels":
            same_folder = part == module[0] and len(module) > 1
            assert same_folder or _layer(part) < _layer(module[0]), f"{module} imports {name}"
        if package in FRAMEWORKS:
            assert module[0] in ("integrations", "cli"), f"{module} imports {package}"


def test_no_two_files_import_each_other_by_any_way():
    graph = {
        ".".join(module): {name for package, name in _imports(module) if package == PACKAGE.name}
        for module in MODULES
    }
    assert not (circle := _circle(graph)), " -> ".join(circle)
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_optimizers_and_patch_do_not_know_each_other():
    for module in MODULES:
        parts = {name.split(".")[0] for _, name in _imports(module)}
        if module[0] == "optim":
            assert not parts & {"patch", "freezing", "model"}
        if module[0] in ("patch", "freezing", "model"):
            assert not parts & {"optim", "ops"}


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def main() -> None:
    total = 0
    for floor, parts in reversed(list(enumerate(LAYERS))):
        sizes = {
            part: sum(
                _lines(PACKAGE.joinpath(*m).with_suffix(".py")) for m in MODULES if m[0] == part
            )
            for part in parts
        }
        total += sum(sizes.values())
        rooms = ", ".join(f"{part} {size:,}" for part, size in sorted(sizes.items()))
        print(f"floor {floor}  {sum(sizes.values()):6,} lines   {rooms}")
    csrc = sum(_lines(p) for p in (PACKAGE.parent / "csrc").glob("*.[ch]*"))
    print(f"csrc     {csrc:6,} lines\ntogether {total + csrc:6,} lines")


if __name__ == "__main__":
    main()
