"""A benchmark's GPU form on a CPU: every branch for a GPU is taken; its times mean nothing.

    python tests/support/gpu_rehearsal.py benchmarks/kernels.py --device cuda --output FOLDER

Tensors say that they lie on a GPU (pretend_cuda.py); kernels are chosen and compiled, and launch
nothing (unlaunched_kernels.py). What is captured in a graph runs once, and torch.compile hands back
what it gets. Sizes are those below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pretend_cuda
import torch
import transformers
from benchmark_scripts import load_script
from pretend_cuda import PretendCuda
from unlaunched_kernels import unlaunched

from progtuning_kernels.graphs import captured_module

Change = tuple[Any, str, Any]  # object, name, value

# Modules are imported while torch.cuda.Stream is a class, as their annotations want it.
MODELS = (transformers.BertForSequenceClassification, transformers.LlamaForCausalLM)


def _compilers() -> Iterator[Change]:
    signature = inspect.signature(torch.compile)

    def compiled(function: Any = None, **options: Any) -> Any:
        signature.bind(function, **options)
        return function or (lambda decorated: decorated)

    yield torch, "compile", compiled
    yield torch.nn.Module, "compile", lambda module, **options: None


def _optimizer(module: ModuleType) -> Iterator[Change]:
    yield module, "WORKLOADS", {name: [(33, 5), (7,)] for name in [*module.WORKLOADS][:2]}
    yield module, "COPIED", {"cuda": 16}
    yield module, "ROUNDS", 2


def _kernels(module: ModuleType) -> Iterator[Change]:
    timing, operations = load_script("kernel_timing"), load_script("kernel_operations")
    yield load_script("optimizer"), "COPIED", {"cuda": 16}
    yield timing, "MATMUL", 8
    yield timing, "WARM_UP_S", 0.0
    yield timing, "GATE_ROWS", 4
    # four times that is more than the tensors of a call, of which there are then several sets
    yield pretend_cuda, "L2_BYTES", 2048
    every = operations.cases

    def cases(device: torch.device) -> list[Any]:
        """The first of every operation, on 8 x 64."""
        found: dict[str, Any] = {}
        for case in every(device):
            shape = operations.Shape(8, 64, 256 if case.shape.vocabulary else 0)
            found.setdefault(case.operation.name, dataclasses.replace(case, shape=shape))
        return [*found.values()]

    yield module, "cases", cases


def _prefix_cache(module: ModuleType) -> Iterator[Change]:
    small = dict(rows=2, tokens=16, frozen=2)
    shapes = [dataclasses.replace(w, **small) for w in module.WORKLOADS["cuda"]]
    yield module, "WORKLOADS", {"cuda": shapes}
    sizes = dict(module.SHAPES)
    for w in shapes:
        sizes[w.name] = sizes["tiny Llama" if "Llama" in w.name else "tiny BERT"]
    for user in (module, load_script("training")):
        yield user, "SHAPES", sizes
    yield module, "BATCHES", 2


def _run(module: ModuleType) -> Iterator[Change]:
    read = module.read_experiment

    def read_experiment(path: Path) -> Any:
        experiment = read(path)
        shape = "tiny Llama" if "Llama" in experiment.shape else "tiny BERT"
        small = dict(rows=2, tokens=16, stages=2, batches=2, repeats=1)
        return dataclasses.replace(experiment, shape=shape, **small)

    yield module, "read_experiment", read_experiment
    # the pretended GPU is a mode of torch's, which captured graphs leave alone
    yield captured_module, "_surroundings", lambda: None


SIZES: dict[str, Callable[[ModuleType], Iterator[Change]]] = {
    "kernels": _kernels,
    "optimizer": _optimizer,
    "prefix_cache": _prefix_cache,
    "run": _run,
}


def rehearse(script: str, arguments: Sequence[str]) -> None:
    """Run `main` of a file of benchmarks/."""
    module = load_script(Path(script).stem)
    with contextlib.ExitStack() as stack:
        changes = [(sys, "argv", [script, *arguments]), *_compilers()]
        for target, name, value in (*changes, *SIZES[module.__name__](module)):
            stack.enter_context(mock.patch.object(target, name, value))
        pretend = stack.enter_context(PretendCuda())
        stack.enter_context(unlaunched(pretend, native=True))
        module.main()


if __name__ == "__main__":
    rehearse(sys.argv[1], sys.argv[2:])
