"""What is committed about the kernels' resources: complete, without spills, and what docs show."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_script
from triton_builds import WAVES, compile_for, rocm_resources

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernel_resources.py"
STORED = ROOT / "benchmarks" / "results" / "compiled" / "kernel_resources.json"
CONTENT = json.loads(STORED.read_text())
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120"}


def _triton_kernels() -> set[str]:
    """The @triton.jit functions that no other one calls: those that are launched."""
    jitted = [
        (path.parent.name if path.stem == "triton" else path.stem, node)
        for path in (ROOT / "progtuning_kernels" / "ops").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    called = {
        call.func.id
        for _, node in jitted
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return {f"{folder}.{node.name}" for folder, node in jitted if node.name not in called}


def test_every_kernel_is_there_for_every_architecture():
    kernels = _triton_kernels()
    assert {"norm.backward_kernel", "row_partials.sum_partials_kernel"} <= kernels
    assert {row["kernel"] for row in CONTENT["triton"]} == kernels
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    cuda = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\s*\(", sources))
    assert cuda and {row["kernel"] for row in CONTENT["cuda"]} == cuda
    for row in [*CONTENT["triton"], *CONTENT["cuda"]]:
        assert row["targets"].keys() == TARGETS, row


def test_nothing_spills():
    for row in [*CONTENT["triton"], *CONTENT["cuda"]]:
        for target, used in row["targets"].items():
            where = f"{row['kernel']}, {row['variant']}, {target}"
            assert used["stack_bytes"] == used["local_bytes"] == 0, where
            assert 0 < used["registers"] <= 128, where
    for row in CONTENT["triton"]:
        assert row["rocm"].keys() == WAVES.keys(), row
        for gpu, used in row["rocm"].items():
            where = f"{row['kernel']}, {row['variant']}, {gpu}"
            assert used["scratch_bytes"] == used["spilt_registers"] == 0, where


def test_the_table_of_the_docs_is_that_of_the_stored_results():
    done = subprocess.run([sys.executable, SCRIPT, "--table"], capture_output=True, text=True)
    docs = (ROOT / "docs" / "tables" / "kernels.md").read_text()
    shown = docs.split("<!-- resources:begin -->\n")[1].split("<!-- resources:end -->")[0]
    assert done.stdout == shown, done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
def test_the_ops_launch_what_was_compiled():
    """Of what was stored nothing is missing and nothing is stale but the numbers themselves."""
    pytest.importorskip("triton")
    launches = load_script("kernel_resources").launches()
    keys = [(launch.name, launch.variant, launch.width) for launch in launches]
    stored = [(row["kernel"], row["variant"], row["width"]) for row in CONTENT["triton"]]
    assert keys == stored, "run benchmarks/kernel_resources.py"
    warps = [row["warps"] for row in CONTENT["triton"]]
    assert [launch.options["num_warps"] for launch in launches] == warps
    # each kernel once for a GPU of AMD, of which one has waves of 32 threads
    by_name = {launch.name: launch for launch in launches}
    for launch, gpu in zip(by_name.values(), itertools.cycle(reversed(WAVES))):
        compiled = compile_for(launch.kernel, launch.kinds, launch.constants, gpu, launch.options)
        used = rocm_resources(compiled)
        assert used["registers"] and not used["scratch_bytes"] + used["spilt_registers"], launch


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
def test_arguments_are_specialised_as_at_a_launch():
    triton = pytest.importorskip("triton")
    script = load_script("kernel_resources")

    @triton.jit(do_not_specialize=["varies"])
    def kernel(x, y, n, one, far, varies, scale, BLOCK: triton.language.constexpr):
        pass

    with script.recording("a variant", 64) as launches:
        kernel[(3,)](torch.ones(2).bfloat16(), None, 48, 1, 2**31, 1, 0.5, BLOCK=8, num_warps=2)
    (launch,) = launches
    assert (launch.variant, launch.width, launch.options) == ("a variant", 64, {"num_warps": 2})
    assert launch.constants == {"y": None, "one": 1, "BLOCK": 8}
    integers = {"n": "i32", "far": "i64", "varies": "i32"}
    assert launch.kinds == {"x": "*bf16", **integers, "scale": "fp32"}
    assert launch.divisible == ("n", "far")
