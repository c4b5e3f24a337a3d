"""benchmarks/gpu_suite.py: its limits, its parts, and every benchmark's GPU form, rehearsed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from benchmark_scripts import BENCHMARKS, load_script

gpu_suite = load_script("gpu_suite")
Part, Suite = gpu_suite.Part, gpu_suite.Suite


@pytest.fixture(params=[False, True], ids=["long", "short"])
def parts(request) -> list:
    return gpu_suite.gpu_parts(short=request.param)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("no GPU here")
    assert len(done.stdout.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("short", [False, True])
def test_limits_sum_to_what_there_is(short):
    parts = gpu_suite.gpu_parts(short=short)
    whole_s = gpu_suite.SHORT_S if short else gpu_suite.BUDGET_S
    assert sum(part.limit_s for part in parts) + gpu_suite.START_S == whole_s
    assert parts[-1].budgeted  # it has what the others leave


def test_parts_and_their_files(parts):
    assert sum(part.output for part in parts) + 2 <= 9  # a JSON each, suite.json and suite.log
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        paths = [word for word in part.command if word.endswith((".py", ".toml"))]
        assert paths and all((BENCHMARKS.parent / path).exists() for path in paths)


def test_every_gpu_test_runs_once_and_what_captures_never_under_blocking_launches(request, parts):
    """Of the tests collected with this one: of all where all of them run."""
    files = gpu_suite.gpu_test_files()
    of_gpu = [item for item in request.session.items if "gpu" in item.keywords]
    assert {item.nodeid.partition("::")[0] for item in of_gpu} <= {*files}
    for item in of_gpu:
        source = inspect.getsource(item.function)
        captures = ".captured(" in source or "cuda.graph(" in source
        captures = captures or item.path.name == "test_gpu_graphs.py"
        assert captures == ("captures" in item.keywords), item.nodeid
    tests = [part for part in parts if "pytest" in part.command]
    assert all({*files} <= {*part.command} for part in tests)
    first, *others = tests
    assert "CUDA_LAUNCH_BLOCKING" not in dict(first.environment)
    for part in others:
        assert part.after_failure_of == first.name and "--last-failed" in part.command


def test_captures_are_skipped_where_launches_block(monkeypatch, pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(BENCHMARKS.parent / "tests/conftest.py"))

    class Item:
        def __init__(self, *keywords: str) -> None:
            self.keywords, self.reasons = {*keywords}, []

        def add_marker(self, marker) -> None:
            self.reasons.append(marker.kwargs["reason"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for blocking, skipped in (("1", [0, 1, 0]), ("0", [0, 0, 0])):
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", blocking)
        items = [Item("gpu"), Item("gpu", "captures"), Item()]
        conftest.pytest_collection_modifyitems(items)
        assert [len(item.reasons) for item in items] == skipped


def _never_run(seconds: float = 60.0) -> tuple[str, ...]:
    return ("-c", f"print('begun', flush=True); import time; time.sleep({seconds})")


def test_a_part_that_fails_or_takes_too_long(tmp_path):
    running = Suite(tmp_path, 60)
    running.run(Part("fails", ("-c", "1 / 0"), 20, output=False), 20)
    running.run(Part("sleeps", _never_run(), 3, output=False), 3)
    running.budget_s = 0
    running.run(Part("late", _never_run(), 3, output=False), 3)
    outcomes = [part["outcome"] for part in running.parts]
    assert outcomes == ["failed with 1", "cut off", "out of time"]
    assert running.parts[1]["wall_s"] < 30  # it would have slept for 60
    log = (tmp_path / "suite.log").read_text()
    assert "ZeroDivisionError" in log and "begun" in log
    assert json.loads((tmp_path / "suite.json").read_text())["parts"] == running.parts


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_look_follows_a_failure_and_the_last_part_has_what_is_left(tmp_path, fails):
    running = Suite(tmp_path, 50)
    seen = []
    running.run = lambda part, limit_s: (
        seen.append((part.name, limit_s)),
        running.parts.append({"name": part.name, "outcome": "failed with 1" if fails else "done"}),
    )
    tests = Part("tests", (), 10)
    running.run_all([tests, Part("again", (), 5, after_failure_of="tests"), Part("last", (), 5)])
    assert [name for name, _ in seen] == ["tests", *(["again"] if fails else []), "last"]
    assert seen[0][1] == 10 and 40 < seen[-1][1] <= 50


def test_the_exit_status_says_that_a_part_failed(tmp_path, monkeypatch):
    ends = Part("ends", ("-c", "0"), 20, output=False)
    fails, hangs = Part("fails", ("-c", "1 / 0"), 20, output=False), Part("hangs", _never_run(), 3)
    monkeypatch.setattr(gpu_suite, "rehearsed", lambda part: part)
    for first, status in ((fails, 1), (hangs, 1), (ends, 0)):
        monkeypatch.setattr(gpu_suite, "gpu_parts", lambda short, first=first: [first, ends])
        words = ["gpu_suite.py", "--rehearse", "--output", str(tmp_path / first.name)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            gpu_suite.main()
        assert ended.value.code == status, first.name
    with pytest.raises(SystemExit, match="would be mixed"):
        gpu_suite.main()


def test_a_suite_that_is_interrupted_leaves_no_process(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None) -> int:
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Suite(tmp_path, 60).run(Part("sleeps", _never_run(), 30, output=False), 30)
    (process,) = started
    left = process.poll() is None
    if left:
        process.kill()
    assert not left


def test_built_is_what_has_cuda_and_is_newer_than_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert not gpu_suite.is_built()
    package, sources = tmp_path / "progtuning_kernels", tmp_path / "csrc"
    for folder in (package, sources):
        folder.mkdir()
    for path in (tmp_path / "setup.py", sources / "update.cu", package / "_C.so"):
        path.write_text("")
    record = package / "_build.json"
    record.write_text('{"cuda": true}')
    now = time.time()
    os.utime(package / "_C.so", (now + 9, now + 9))
    assert gpu_suite.is_built()
    os.utime(sources / "update.cu", (now + 10, now + 10))
    assert not gpu_suite.is_built()
    os.utime(sources / "update.cu", (now, now))
    record.write_text('{"cuda": false}')
    assert not gpu_suite.is_built()


def test_how_results_are_kept(tmp_path):
    said = gpu_suite.how_to_keep(tmp_path, "NVIDIA H200 (PCIe)")
    kept = "benchmarks/results/nvidia-h200-pcie"
    assert f"cp -r {tmp_path}/*.json {tmp_path}/training {kept}/" in said
    pages = "".join(path.read_text() for path in (BENCHMARKS.parent / "docs").rglob("*.md"))
    for line in said.splitlines():
        if line.startswith("  python ") and "  # " in line:
            command, marker = line.split("  # ")
            assert marker in pages and (BENCHMARKS.parent / command.split()[1]).exists()
    assert said.endswith(f"predicted_times.py --compare {tmp_path}")
    assert "cp -r" not in gpu_suite.how_to_keep(BENCHMARKS.parent / kept, "NVIDIA H200 (PCIe)")


# ---- rehearsals, on a GPU that is pretended

NOT_HERE = ("is not installed", "set dropout to 0")  # peers; a mask is made in the kernel alone


@pytest.fixture
def rehearsed(tmp_path):
    """Runs a part of the suite, tiny, and returns what it stores."""
    pytest.importorskip("triton")
    import gpu_rehearsal

    def run(name: str, *options: str) -> dict:
        (part,) = [part for part in gpu_suite.gpu_parts(short=False) if part.name == name]
        script, *arguments = part.command
        gpu_rehearsal.rehearse(script, [*arguments, "--output", str(tmp_path), *options])
        (result,) = tmp_path.rglob("*.json")
        return json.loads(result.read_text())

    return run


def _reasons(entries) -> list[str]:
    found = [entry["reason"] for entry in entries if "reason" in entry]
    return [reason for reason in found if not any(words in reason for words in NOT_HERE)]


def test_the_optimizers_gpu_form(rehearsed, tmp_path):
    content = rehearsed("optimizer", "--workload", "BERT-base, 199 tensors")
    assert content["failed"] == {} and content["not_reached"] == []
    for result in content["results"]:
        entries = result["providers"]
        assert not _reasons(entries.values())
        assert all("kernel_ms" in entry for entry in entries.values() if "reason" not in entry)
        assert any(name.endswith("Triton") for name in entries)
    assert sys.modules["optimizer"].table(content).count("flashoptim is not installed") in (0, 3)
    verdicts = [*gpu_suite.verdicts(tmp_path)]
    assert len(verdicts) == 5 and all(verdict["met"] is not None for verdict in verdicts)


def test_a_target_of_which_nothing_was_measured(tmp_path):
    entry = {"reason": "parity is red", "target_speedup": 1.6}
    result = {"workload": "BERT", "case": "moments", "providers": {"8-bit": entry}}
    (tmp_path / "optimizer.json").write_text(json.dumps({"results": [result]}))
    target = {"target": "BERT, moments: 8-bit, 1.6 x", "met": None, "found": "parity is red"}
    assert [*gpu_suite.verdicts(tmp_path)] == [target]


def test_the_kernels_gpu_form(rehearsed):
    content = rehearsed(
        "kernels", "--only", "linear|^rms_norm, (res.*)?dx|dropout|swiglu|bias_gelu, erf"
    )
    assert content["failed"] == {} and content["not_reached"] == []
    assert content["l2_bytes"] and content["matmul_tflop_per_s"]
    for result in content["results"]:
        assert not _reasons(result["providers"].values()), result
        assert result["providers"]["compile"]["timed_by"] == "graph"
        assert "hot_us" in result["providers"]["eager"] or result["floor_flop"]


def test_the_prefix_caches_gpu_form(rehearsed):
    content = rehearsed("prefix cache", "--workload", "Llama 1 B")
    assert len(content["rows"]) == 6
    for row in content["rows"]:  # whether it is read sooner than computed, a rehearsal cannot know
        assert "step_ms" in row or "reading a row takes" in row["reason"]
    assert sys.modules["prefix_cache"].table(content).count("\n") == 8


def test_captured_runs_gpu_form(rehearsed):
    content = rehearsed("gpu-graph", "--only", "ours, cache, graph")
    entry = content["providers"]["ours, cache, graph"]
    assert entry["gate"] and entry["whole_runs"], entry


def test_a_training_runs_gpu_form(rehearsed):
    content = rehearsed("gpu-bert", "--only", "ours, cache")
    for entry in content["providers"].values():
        assert entry["stages"][0]["peak_allocated_bytes"] == 1
        assert entry["whole_runs"]
    assert [verdict["met"] is not None for verdict in content["verdicts"]] == [True, False]
