"""Predictions of kernels' times: the way through a kernel, the arithmetic, and what is stored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_scripts import BENCHMARKS, load_script

STORED = json.loads((BENCHMARKS / "results" / "compiled" / "predicted_times.json").read_text())


@pytest.fixture(scope="module")
def predicted():
    pytest.importorskip("triton")
    return load_script("predicted_times")


# A loop of 16-byte loads, a loop for the tail, and a way for odd addresses with a rare division.
LISTING = """
        code for sm_90
                Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P1 BRA 0x90 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R8, R4, R5 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/               @P0 BRA 0x60 ;
        /*0080*/                   BRA 0xd0 ;
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*00b0*/               @P0 BRA 0x90 ;
        /*00c0*/                   CALL.REL.NOINC 0x100 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
"""


def test_the_way_of_wide_loads_is_taken(monkeypatch):
    hot_path = load_script("hot_path")
    printed = SimpleNamespace(stdout=LISTING)
    monkeypatch.setattr(hot_path.subprocess, "run", lambda *args, **options: printed)
    ((name, listing),) = hot_path.listings(Path("a.cubin"), "cuobjdump").items()
    assert name == "kernel@sm_90" and len(listing) == 15
    start, loop, end = hot_path.hot_path(listing)
    assert (start.loops, loop.loops, end.loops) == (False, True, False)
    assert start.pipes["issue"] == 2 and end.pipes["issue"] == 2  # BRA and EXIT: no tail
    assert loop.pipes == {"issue": 4, "memory": 2, "fma": 1}
    assert loop.loaded_bytes == 16 and start.loaded_bytes == 0
    # the sum waits for the load, the store for the sum
    assert 550 + 5 < loop.clocks < 550 + 5 + 10
    # what has to lie on the way leads elsewhere
    narrow = hot_path.hot_path(listing, through="CALL")
    assert sum(part.loaded_bytes for part in narrow) == 0


def test_the_arithmetic_of_a_wave(predicted):
    part = load_script("hot_path").Part(True, {"issue": 128, "alu": 32}, 1000, 16)
    code = predicted.Code(threads=256, registers=64, shared_bytes=0, parts=(part,))
    device = predicted.Device("made", 90, multiprocessors=10, ghz=1.0, gb_per_s=1000, tflop_per_s=1)
    assert code.slots(device) == 4  # 65,536 registers
    loaded = 2 * 16 * 256  # two rounds
    # 45 blocks are one full wave and one of 5
    kernel = predicted.Kernel("k", code, blocks=45, bytes=45 * 9e5, loaded=loaded)
    found = kernel.predict(device)
    assert kernel.rounds == 2 and found["waves"] == pytest.approx(45 / 40)
    memory_us = [40 * 9e5 / (0.9 * 1000e3), 5 * 9e5 / (0.9 * 1000e3)]
    assert found["us"] == pytest.approx(1 + sum(memory_us)) and found["bound_by"] == "memory"
    # without bytes: 2 rounds of 1,000 clocks, or 4 blocks of 256 * 256 instructions by 128 a clock
    busy_us = 4 * 2 * 128 * 256 / 128 / 0.9 / 1e3
    alone = predicted.Kernel("k", code, blocks=40, bytes=0, loaded=loaded).predict(device)
    assert alone["us"] == pytest.approx(1 + max(2.0, busy_us))
    one = predicted.Kernel("k", code, blocks=1, bytes=0, loaded=loaded).predict(device)
    assert one["us"] == pytest.approx(1 + 2.0) and one["bound_by"] == "latency"


def test_stored_predictions_are_complete_and_possible(predicted):
    devices = {device.name: device for device in predicted.DEVICES}
    titles = [str(what) for what in (*predicted.updates(), *predicted.calls())]
    assert list(STORED["results"]) == titles, "run benchmarks/predicted_times.py"
    for title, by_device in STORED["results"].items():
        assert by_device.keys() == devices.keys()
        for name, found in by_device.items():
            assert 0 < found["share"] <= predicted.REACHED, (title, name)
            if name == predicted.SHOWN:
                assert found["launches"] == len(found["kernels"])
            floor_us = found["bytes"] / devices[name].gb_per_s / 1e3
            assert "linear_cross_entropy" in title or found["us"] > floor_us


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
def test_measured_times_beside_predictions(predicted, tmp_path):
    meta = {"device": "NVIDIA H200"}
    result = {"operation": "rms_norm", "demand": "dx only", "dtype": "bfloat16"}
    result |= {"shape": [8192, 4096], "providers": {"ours": {"kernel_us": 100.0}, "liger": {}}}
    (tmp_path / "kernels.json").write_text(json.dumps({"meta": meta, "results": [result]}))
    (tmp_path / "cubins").mkdir()
    compiled = predicted.Compiled(tmp_path / "cubins")
    # the update: nothing is compiled by nvcc here
    part = load_script("hot_path").Part(True, {"issue": 152}, 1150, 64)
    code = predicted.Code(256, 40, 120, (part,))
    compiled.natives, compiled.native = {"any": code}, lambda name, device: code
    entries = {"MaskedAdamW": {"kernel_ms": 0.2}, "torch fused": {"kernel_ms": 0.3}}
    update = {"workload": "MiniLM, 101 tensors", "case": "with clipping", "providers": entries}
    (tmp_path / "optimizer.json").write_text(json.dumps({"meta": meta, "results": [update]}))
    head, _, call, step = predicted.compare(tmp_path, compiled).splitlines()
    assert head.startswith("| H200 | measured (us) | predicted |")
    title, measured, own, ratio = [cell.strip() for cell in call.strip("| ").split("|")]
    assert (title, measured) == ("rms_norm, dx only, 8,192 x 4,096 bfloat16", "100.0")
    # five times 67 MB
    assert 335.5e6 / 4.8e6 < float(own) < 1.3 * 335.5e6 / 4.8e6
    assert float(ratio) == pytest.approx(100 / float(own), abs=0.01)
    assert step.startswith("| MiniLM, 101 tensors, with clipping, MaskedAdamW | 200.0 | ")
    (tmp_path / "kernels.json").write_text(json.dumps({"meta": {"device": "T4"}, "results": []}))
    (tmp_path / "optimizer.json").unlink()
    with pytest.raises(SystemExit, match="was measured on T4; .* of A100, H100"):
        predicted.compare(tmp_path, compiled)
    (tmp_path / "kernels.json").unlink()
    with pytest.raises(SystemExit, match="no kernel times"):
        predicted.compare(tmp_path, compiled)
