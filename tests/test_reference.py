"""The reference: every public name is on one page, and its docstring has the contract.

Pages name objects in lines `::: path`; what is said of them stands in their docstrings.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import Trainer, TrainingArguments

import progtuning_kernels
from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, ops, patch_model, report
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.families import FAMILIES, Family
from progtuning_kernels.schedules import ObservingSchedule, Schedule

PAGES = sorted((Path(__file__).parent.parent / "docs" / "reference").glob("*.md"))
PATHS = [path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
EXAMPLES = re.compile(r"```python\n(.*?) *```", re.S)
# what a user never constructs; protocols neither
NOT_CALLED = (progtuning_kernels.PatchHandle, Exception)
# what a subclass of MaskedOptimizer writes, and what calls it; CONTRIBUTING.md says how
HOOKS = {"init_state", "hyper", "make_bucket", "state_from", "check_groups", "active_buckets"}
HOOKS |= {"on_flags_changed"}


def _found(path: str) -> Any:
    """The object, also where a module and one of its functions have the same path."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for name in parts[i:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


OBJECTS = {path: _found(path) for path in PATHS}


def _public() -> Iterator[Any]:
    for module in (progtuning_kernels, ops, report):
        yield from filter(callable, (getattr(module, name) for name in module.__all__))
    yield ProgtuningCallback


def _sections(docstring: str) -> dict[str, list[str]]:
    """What each section of a docstring names, by the section's title."""
    names, title = defaultdict(list), ""
    for line in inspect.cleandoc(docstring).splitlines():
        if line and line[0] != " ":
            title = line.rstrip(":")
        elif match := re.match(r" {4}(\*{0,2}\w+): ", line):
            names[title].append(match[1])
    return names


def _parameters(called: Callable[..., Any]) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(called).parameters.values()
    return [stars.get(p.kind, "") + p.name for p in parameters]


def _raised(function: Callable[..., Any]) -> set[str]:
    """Names of the exceptions that the body itself raises."""
    pending: list[ast.AST] = [*ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body]
    found = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods and getters of properties that the package defines for a class."""
    for base in cls.__mro__:
        if not base.__module__.startswith("progtuning_kernels"):
            continue
        for name, member in vars(base).items():
            if name[0] == "_" or name in HOOKS:
                continue
            member = member.fget if isinstance(member, property) else member
            member = getattr(member, "__func__", member)  # of a class method
            if inspect.isfunction(member):
                yield name, inspect.unwrap(member)


def _said_elsewhere(cls: type, name: str) -> bool:
    """Whether another library, or the protocol that a schedule fulfils, says what a method does."""
    foreign = [base for base in cls.__mro__ if not base.__module__.startswith("progtuning_kernels")]
    protocols = (Schedule, ObservingSchedule) if hasattr(cls, "stage") else ()
    return any(hasattr(other, name) for other in (*foreign, *protocols))


def _check(label: str, function: Callable[..., Any], parameters: list[str], around: str) -> None:
    """`around` is the docstring of the class, which may say what a method raises."""
    assert function.__doc__, f"{label} has no docstring"
    said = _sections(function.__doc__)
    assert said["Args"] == parameters, label
    unsaid = _raised(function) - {*said["Raises"], *_sections(around)["Raises"]}
    assert not unsaid, f"{label} raises {unsaid}"


def _examples() -> Iterator[Any]:
    for path, found in OBJECTS.items():
        methods = dict(_methods(found)) if inspect.isclass(found) else {}
        for name, documented in {"": found, **methods}.items():
            for code in EXAMPLES.findall(inspect.getdoc(documented) or ""):
                yield pytest.param(textwrap.dedent(code), id=f"{path}.{name}".rstrip("."))


def test_every_public_name_is_on_one_page():
    public = list(_public())
    on_pages = [id(found) for found in OBJECTS.values()]
    assert len(PATHS) == len(set(on_pages))
    # the page would show the module, whose name is the same
    assert not sys.modules.keys() & PATHS
    missing = [found.__name__ for found in public if id(found) not in on_pages]
    assert not missing, f"no page of docs/reference has {missing}"


@pytest.mark.parametrize("path", PATHS)
def test_docstrings_have_the_contract(path):
    found = OBJECTS[path]
    if not inspect.isclass(found):
        function = inspect.unwrap(found)
        _check(path, function, _parameters(function), "")
        return
    assert found.__doc__, f"{path} has no docstring"
    said = _sections(found.__doc__)
    if not (issubclass(found, NOT_CALLED) or getattr(found, "_is_protocol", False)):
        assert (said["Args"] or said["Attributes"]) == _parameters(found), path
        made = vars(found).get("__post_init__" if is_dataclass(found) else "__init__")
        unsaid = _raised(made) - {*said["Raises"]} if made else set()
        assert not unsaid, f"{path} raises {unsaid}"
    for name, method in _methods(found):
        if not _said_elsewhere(found, name) or "Args:" in (method.__doc__ or ""):
            _check(f"{path}.{name}", method, _parameters(method)[1:], found.__doc__)


@pytest.fixture
def at_hand(tmp_path, monkeypatch) -> dict[str, Any]:
    """The names that the examples of docstrings take for granted."""
    monkeypatch.chdir(tmp_path)
    for kind in ("mine", "MyEncoder"):
        monkeypatch.setitem(FAMILIES, kind, Family())  # gone again after the test
    public = {name: getattr(progtuning_kernels, name) for name in progtuning_kernels.__all__}
    model, batch = tiny_model("llama-causal-lm"), tiny_inputs("llama-causal-lm")
    return public | {
        "torch": torch,
        "ProgtuningCallback": ProgtuningCallback,
        "Trainer": Trainer,
        "args": TrainingArguments(str(tmp_path), report_to=[]),
        "rows": [],
        "model": model,
        "loader": [batch, batch],
    }


@pytest.mark.parametrize("code", list(_examples()))
def test_examples_of_docstrings_run(code, at_hand):
    given = ast.walk(ast.parse(code))
    made = {node.id for node in given if isinstance(node, ast.Name) and type(node.ctx) is ast.Store}
    if "handle" in code and "handle" not in made:
        at_hand["handle"] = patch_model(at_hand["model"], ProgressiveSchedule(2, 8))
    if "optimizer" in code and "optimizer" not in made:
        at_hand["optimizer"] = MaskedAdamW(at_hand["model"].parameters())
    exec(code, at_hand)
