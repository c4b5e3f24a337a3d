"""benchmarks/run.py: no number without a green gate; runs are composed as they say."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType

import pytest
import torch
from benchmark_scripts import BENCHMARKS, load_script
from torch import nn

from progtuning_kernels import ProgressiveSchedule, patch_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run() -> ModuleType:
    return load_script("run")


@pytest.fixture(scope="module")
def parts(run) -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    return tuple(sys.modules[name] for name in ("training", "gate", "runs", "providers"))


def _work(training: ModuleType, shape: str = "tiny BERT", **changes):
    work = training.Work(shape, "fp32", 4, 16, stages=3, batches=3, epochs=2, device=CPU)
    return dataclasses.replace(work, **changes)


EXPERIMENT = """
title = "tiny"
device = "cpu"
shape = "tiny BERT"
precision = "fp32"
rows = 4
tokens = 16
stages = 3
batches = 3
epochs = 2
steps_per_epoch = 10
epochs_per_stage = [1, 3]
providers = ["full", "naive freezing", "ours", "ours, cache", "AdaLomo"]

[[targets]]
of = ["ours", "ours, cache"]
over = "full"
limit = 0.01

[[targets]]
of = "ours"
over = "naive freezing"
limit = 1000.0

[[targets]]
of = "ours"
over = "full"
limit = 0.5
metric = "peak_allocated_bytes"
"""


def _main(run, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    run.main()


def test_an_experiment_from_end_to_end(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT)
    _main(run, monkeypatch, path, "--output", tmp_path)
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "training" / "tiny.json").read_text())
    assert {"commit", "dirty", "date", "device", "versions"} <= content["meta"].keys()
    names = ["full", "naive freezing", "ours", "ours, cache", "AdaLomo"]
    assert list(content["providers"]) == content["experiment"]["providers"] == names
    assert content["providers"]["AdaLomo"].keys() == {"reason"}
    assert "AdaLomo: no number: " in out
    full, naive, ours, cached = (content["providers"][name] for name in names[:4])
    for entry in (full, naive, ours, cached):
        assert entry["gate"]["gradient_error"] < 1e-5
        assert len(entry["losses"]) == 3 * 3 * 2
        assert 0.3 < entry["composed_over_measured"] < 3
        for stage in entry["stages"]:
            epoch = stage["later_epochs"]
            assert 0 < epoch["step_ms_p20"] <= epoch["step_ms"] <= epoch["step_ms_p80"]
        assert [r["epochs_per_stage"] for r in entry["whole_runs"]] == [1, 3]
    # what a stage holds, by the plan alone: embeddings train in the first
    trained = [s["trainable_params"] for s in ours["stages"]]
    assert trained == [s["trainable_params"] for s in naive["stages"]]
    assert trained[0] == full["stages"][2]["trainable_params"] > trained[1] > trained[2]
    assert [s["state_bytes"] for s in ours["stages"]] == [
        pytest.approx(8 * count, rel=0.05) for count in trained
    ]
    assert [s["gradient_bytes_after_backward"] for s in ours["stages"]] == [4 * n for n in trained]
    assert naive["stages"][2]["state_bytes"] == naive["stages"][0]["state_bytes"]
    saved = [s["saved_bytes"] for s in ours["stages"]]
    assert saved[0] > saved[1] > saved[2] > 0
    assert "cache: on at block 4" in cached["note"] and cached["losses"] == pytest.approx(
        ours["losses"]
    )
    met = [verdict["met"] for verdict in content["verdicts"]]
    assert met == [True, False, None]
    assert out.count("\nmet: ") == out.count("\nNOT met: ") == out.count("\nnot measured: ") == 1
    _main(run, monkeypatch, "--verdict", tmp_path)
    assert capsys.readouterr().out.strip() in out


def test_a_budget_leaves_its_targets_not_measured(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT)
    _main(run, monkeypatch, path, "--output", tmp_path, "--budget-s", "0")
    content = json.loads((tmp_path / "training" / "tiny.json").read_text())
    assert {entry["reason"] for entry in content["providers"].values()} == {"not reached"}
    assert capsys.readouterr().out.count("\nnot measured: ") == 3


def test_who_fails_in_a_run_is_left_out(run, parts):
    training, _, runs, providers = parts
    broken = providers.PROVIDERS["full"]

    def build(work):
        session = broken.build(work)
        session.update = lambda: 1 / 0
        return session

    sides = {"full": broken, "broken": dataclasses.replace(broken, build=build)}
    records: dict = {}
    for run_s in (1, 2):
        failed = runs.train(sides, _work(training), 2, records)
        assert failed == {"broken": "ZeroDivisionError: division by zero"}
        assert len(records["full"].run_s) == run_s and not records["broken"].run_s
    assert len(records["full"].losses) == 18 and len(records["full"].later_ms[0]) == 2 * 3


def test_a_red_gate_leaves_no_number(run, parts, tmp_path, monkeypatch, capsys):
    broken = _with_session(parts, _scale_gradient)
    monkeypatch.setitem(run.PROVIDERS, "naive freezing", broken)
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT.replace("epochs = 2", "epochs = 1"))
    _main(run, monkeypatch, path, "--only", "naive freezing", "--output", tmp_path)
    content = json.loads((tmp_path / "training" / "tiny.json").read_text())
    (reason,) = content["providers"]["naive freezing"].values()
    assert reason.startswith("gate is red: gradients of stage 1")
    assert content["providers"]["full"]["losses"]
    assert [verdict["met"] for verdict in content["verdicts"]] == [None] * 3
    out = capsys.readouterr().out
    assert out.count("naive freezing: no number: gate is red") == 1
    assert (
        "naive freezing " in out.split("stages; whole runs")[1].split("no number: gate is red")[0]
    )


def test_a_run_in_a_process_of_its_own(run, tmp_path, monkeypatch):
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT.replace("epochs = 2", "epochs = 1"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(run, "BASELINE", "ours")  # one process is enough
    _main(run, monkeypatch, path, "--isolate", "--only", "ours", "--output", tmp_path)
    content = json.loads((tmp_path / "training" / "tiny.json").read_text())
    assert content["experiment"]["isolated"] and set(content["providers"]) == {"ours"}
    assert len(content["providers"]["ours"]["losses"]) == 9


@pytest.mark.parametrize("shape", ["tiny BERT", "tiny Llama"])
def test_the_plan_by_names_is_the_library_s(parts, shape):
    training, *_ = parts
    work = _work(training, shape, batches=1, epochs=1)
    model = work.model()
    assert work.boundaries == (0, 2, 4)
    for stage, boundary in enumerate(work.boundaries):
        with patch_model(model, ProgressiveSchedule(3, 3), step=stage):
            active = {name for name, p in model.named_parameters() if p.requires_grad}
        named = {n for n, _ in model.named_parameters() if training.trains(n, stage, boundary)}
        assert active == named


def test_rows_are_the_same_in_every_epoch_and_in_other_company(parts):
    training, *_ = parts
    for shape in ("tiny BERT", "tiny Llama"):
        work = _work(training, shape)
        epochs = [work.epoch(number) for number in range(2)]
        rows = [{tuple(r) for b in e for r in b["input_ids"].tolist()} for e in epochs]
        assert rows[0] == rows[1] and len(rows[0]) == 12
        assert not torch.equal(epochs[0][0]["input_ids"], epochs[1][0]["input_ids"])
        lengths = torch.cat([b["attention_mask"].sum(1) for b in epochs[0]])
        assert lengths.min() >= 8 and lengths.unique().numel() > 2


def _provider(parts, name: str = "naive freezing", **changes):
    return dataclasses.replace(parts[3].PROVIDERS[name], **changes)


def _with_session(parts, change, name: str = "naive freezing", **changes):
    """A provider that does something wrong."""
    provider = _provider(parts, name, **changes)

    def build(work):
        session = provider.build(work)
        change(work, session)
        return session

    return dataclasses.replace(provider, build=build)


def _scale_gradient(work, session):
    backward = session.backward

    def scaled(batch):
        loss = backward(batch)
        next(p for p in session.model.parameters() if p.grad is not None).grad.mul_(1.001)
        return loss

    session.backward = scaled


def _freeze_late(work, session):
    begin = session.begin
    session.begin = lambda step: begin(max(0, step - 1))


def _half_the_rows(work, session):
    backward = session.backward
    session.backward = lambda batch: backward({n: t[:2] for n, t in batch.items()})


def _other_update(work, session):
    optimizer = torch.optim.SGD(session.model.parameters(), lr=work.lr)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    session.update = update


def _no_update_in_the_last_stage(work, session):
    update, done = session.update, []

    def most():
        done.append(1)
        update() if len(done) < 3 else session.model.zero_grad()

    session.update = most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_scale_gradient, "gradients of stage 1 are"),
        (_freeze_late, "in stage 2, 37 tensors have a gradient and should not"),
        (_half_the_rows, "loss "),
        (_other_update, "in stage 2, plain torch has"),
        (_no_update_in_the_last_stage, "off plain torch's AdamW"),
    ],
)
def test_the_gate_is_red(parts, change, message):
    training, gate, *_ = parts
    gate = gate.Gate(_work(training), rows=4)
    assert gate.check(_provider(parts))["gradient_error"] < 1e-6
    with pytest.raises(training.Refused, match="gate is red") as refused:
        gate.check(_with_session(parts, change))
    assert message in str(refused.value)


def test_the_gate_of_ours_in_all_its_forms(parts):
    training, gate, _, providers = parts
    gate = gate.Gate(_work(training), rows=4)
    for name, provider in providers.PROVIDERS.items():
        if name.startswith("ours") and not provider.compiles:
            assert gate.check(provider)["loss_error"] < 1e-3
    # clipping by the norm of the step before is another rule where it clips
    gate.work = dataclasses.replace(gate.work, clip=1e-3)
    with pytest.raises(training.Refused, match="gate is red"):
        gate.check(_provider(parts, "ours, in backward", clips_otherwise=False))


def test_the_gate_of_another_rule_asks_for_the_loss_and_for_learning(parts):
    training, gate, *_ = parts
    gate = gate.Gate(_work(training), rows=4)
    other = dict(same_rule=False, lr=1e-3)
    assert gate.check(_provider(parts, "full", **other))["loss_fell_by"] > 0
    with pytest.raises(training.Refused, match="starts from loss"):
        gate.check(_with_session(parts, _half_the_rows, "full", **other))
    with pytest.raises(training.Refused, match="has become"):
        gate.check(_provider(parts, "full", same_rule=False, lr=0.0))


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_the_gate_in_bfloat16(parts, precision):
    training, gate, *_ = parts
    gate = gate.Gate(_work(training, "tiny Llama", precision=precision), rows=4)
    for name in ("naive freezing", "ours", "ours, cache"):
        assert 0 <= gate.check(_provider(parts, name))["gradient_error"] < 0.05
    with pytest.raises(training.Refused, match="19 tensors have a gradient"):
        gate.check(_with_session(parts, _freeze_late))


def test_whole_runs_are_composed_of_first_steps_and_medians(parts):
    training, _, runs, _ = parts
    work = _work(training, stages=2)
    record = runs.Record.of(2)
    record.first_ms = [[100.0], [50.0]]
    record.filling_ms = [[10.0, 10.0, 40.0], [6.0, 6.0]]
    record.later_ms = [[10.0], [2.0, 2.0]]
    record.losses, record.run_s = [1.0] * 12, [0.5]
    options = dict(epochs=[1, 3], steps_per_epoch=100)
    cached = runs.summarise(_provider(parts, "ours, cache"), work, record, **options)
    once, thrice = cached["whole_runs"]
    assert once["first_steps_extra_s"] == pytest.approx((90 + 44) / 1e3)
    assert once["run_s"] == pytest.approx((99 * 10 + 100 + 99 * 6 + 50) / 1e3)
    assert thrice["run_s"] == pytest.approx(once["run_s"] + 2 * 100 * (10 + 2) / 1e3)
    composed_s = (2 * 10 + 100 + 3 * 10 + 2 * 6 + 50 + 3 * 2) / 1e3  # 3 batches, 2 epochs
    assert cached["composed_over_measured"] == pytest.approx(composed_s / 0.5)
    plain = runs.summarise(_provider(parts), work, record, **options)
    assert plain["stages"][1]["first_epoch"]["step_ms"] == 4.0  # one median of both epochs
    assert [stage["boundary"] for stage in plain["stages"]] == [0, 3]


@pytest.mark.parametrize("together", [1, 2, 7])
def test_the_first_step_of_a_stage_is_timed_alone(parts, together):
    training, _, runs, _ = parts
    work = _work(training)
    stretches = list(runs._stretches(work, together))
    assert [step for steps in stretches for step in steps] == list(range(18))
    for steps in stretches:
        assert len(steps) <= together and len({s // work.batches for s in steps}) == 1
        assert steps == [steps[0]] or steps[0] % work.steps_of_stage


def test_bytes_of_an_optimizer(parts):
    runs = parts[2]
    weight = nn.Parameter(torch.zeros(10))
    half = torch.zeros(8)[:4]
    kept = {weight: {"m": torch.zeros(10), "same": half, "view": half[1:], "weight": weight.data}}
    assert runs.tensor_bytes(kept, but={runs._address(weight)}) == 40 + 32


def _content(run, **peaks):
    targets = [
        run.Target(("ours", "ours, cache"), "full", 1.5),
        run.Target(("ours",), "full", 0.5, "peak_allocated_bytes"),
    ]
    seconds = {"full": 30.0, "ours": 24.0, "ours, cache": 15.0}
    providers = {
        name: {
            "whole_runs": [{"epochs_per_stage": 1, "run_s": s}],
            "stages": [{"peak_allocated_bytes": peaks[name]}] if name in peaks else [{}],
        }
        for name, s in seconds.items()
    }
    experiment = {
        "name": "t",
        "title": "t",
        "stages": 3,
        "targets": [dataclasses.asdict(t) for t in targets],
    }
    return {"experiment": experiment, "providers": providers}


def test_verdicts_say_by_how_much(run):
    speed, memory = run.verdicts(_content(run))
    assert speed.met and "2.000 (ours, cache), +33.3% of 1.5" in str(speed)
    assert memory.met is None and str(memory).startswith("not measured: ")
    content = _content(run, full=100, ours=60)
    memory = run.verdicts(content)[1]
    assert memory.met is False and "0.600 (ours), +20.0% of 0.5" in str(memory)
    content["providers"]["ours, cache"] = {"reason": "gate is red"}
    speed = run.verdicts(content)[0]
    assert speed.met is False and str(speed).startswith("NOT met: ") and "-16.7%" in str(speed)


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.glob("experiments/*.toml")), ids=lambda p: p.stem
)
def test_stored_experiments_can_be_read(run, parts, path):
    if "providers" not in path.read_text():
        pytest.skip("of another benchmark")
    experiment = run.read_experiment(path)
    work = experiment.work(CPU)
    assert len(work.boundaries) == 3 and work.precision in parts[0].PRECISIONS
    assert run.BASELINE in experiment.providers
    for target in experiment.targets:
        assert {*target.of, target.over} <= set(experiment.providers)
        assert target.epochs_per_stage in experiment.epochs_per_stage


def test_a_wrong_experiment_is_one_line(run, tmp_path):
    path = tmp_path / "wrong.toml"
    for wrong, message in (
        (EXPERIMENT.replace('"ours, cache",', '"theirs",'), "no provider 'theirs'"),
        (EXPERIMENT.replace("rows = 4", "row = 4"), "row"),
        ('interleave = "rows"\n' + EXPERIMENT, "interleave is steps or runs, not 'rows'"),
        ("title = ", "wrong.toml"),
    ):
        path.write_text(wrong)
        with pytest.raises(SystemExit, match=message):
            run.read_experiment(path)
