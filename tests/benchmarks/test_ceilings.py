"""Targets on a GPU lie below what operations, launches and bytes allow; how these are counted."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from benchmark_scripts import BENCHMARKS, load_script


@pytest.fixture(scope="module")
def parts():
    return {name: load_script(name) for name in ("training", "ceilings", "run", "optimizer")}


def test_targets_of_whole_runs_lie_below_their_ceilings(parts):
    checked = 0
    for path in sorted(BENCHMARKS.glob("experiments/gpu-*.toml")):
        experiment = parts["run"].read_experiment(path)
        for target in experiment.targets:
            found = parts["ceilings"].ceilings(path.stem, dataclasses.asdict(target))
            assert found, f"{path.stem} is not counted: run benchmarks/ceilings.py"
            if target.metric == "run_s":
                assert 1 < target.limit <= min(found.values()), (path.stem, target, found)
            else:
                assert target.limit >= found["bytes"], (path.stem, target, found)
            checked += 1
    assert checked >= 5


def test_targets_of_updates_lie_below_their_bytes_and_predictions(parts):
    stored = json.loads((BENCHMARKS / "results/compiled/predicted_times.json").read_text())
    predicted = {title: found["H200"]["us"] for title, found in stored["results"].items()}
    workload = "BERT-base, 199 tensors"
    for case in parts["optimizer"].cases(torch.device("cuda")):
        baseline = next(iter(case.providers))
        for name, target in case.targets.items():
            own, most = (
                case.providers[n].bytes_per_parameter
                + (0 if case.clip is None else case.providers[n].clip_bytes)
                for n in (name, baseline)
            )
            assert target <= most / own, (case.title, name)
            us = [predicted.get(f"{workload}, {case.title}, {n}") for n in (baseline, name)]
            if None not in us:
                assert target <= us[0] / us[1], (case.title, name)


def test_a_ceiling_is_a_ratio_of_sums(parts):
    ceilings = parts["ceilings"]
    steps = {
        "full": {"first": [10, 10], "later": [10, 10]},
        "ours": {"first": [10, 6], "later": [10, 6]},
        "ours, cache": {"first": [10, 7], "later": [10, 3]},
    }
    launches = {way: {k: [2 * n for n in v] for k, v in s.items()} for way, s in steps.items()}
    stored = {"FLOP": steps, "launches": launches, "least_peak_share": 0.4}
    content = {"experiments": {"a": stored}}
    target = {"of": ("ours", "ours, cache"), "over": "full", "metric": "run_s"}
    once = ceilings.ceilings("a", target | {"epochs_per_stage": 1}, content)
    assert once == {"FLOP": 20 / 16, "launches": 20 / 16}
    thrice = ceilings.ceilings("a", target | {"epochs_per_stage": 3}, content)
    assert thrice["FLOP"] == 60 / (10 + 7 + 2 * (10 + 3))
    assert ceilings.in_words(once) == "ceiling 1.25 x by FLOP, 1.25 x by launches"
    # what liger-kernel launches is not known
    liger = target | {"over": "full, liger-kernel", "epochs_per_stage": 1}
    assert ceilings.ceilings("a", liger, content).keys() == {"FLOP"}
    assert ceilings.in_words(ceilings.ceilings("b", target, content)) == ""
    peak = target | {"metric": "peak_allocated_bytes"}
    assert ceilings.in_words(ceilings.ceilings("a", peak, content)) == "floor 0.40 by bytes"


def test_launches_are_counted(parts):
    """Of a tiny BERT, as on a GPU."""
    pytest.importorskip("triton")
    training, ceilings = parts["training"], parts["ceilings"]
    sys.path.insert(0, str(BENCHMARKS.parent / "tests" / "support"))
    shape, precision = "tiny BERT", "bf16-autocast"
    work = training.Work(shape, precision, 4, 16, 2, 2, 2, torch.device("cpu"))
    full = ceilings.count_launches(work, "full")
    ours = ceilings.count_launches(work, "ours, packing off")
    assert len({*full["first"], *full["later"]}) == 1
    assert ours["first"] == ours["later"] and ours["first"] == sorted(ours["first"])[::-1]
    # fused kernels and one update in place of many; no backward below the boundary
    assert ours["later"][0] < full["later"][0] and ours["later"][1] < 0.8 * full["later"][1]
    cached = ceilings.count_launches(work, "ours, cache")
    assert cached["later"][1] < cached["first"][1]
