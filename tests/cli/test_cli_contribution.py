"""`progtuning contribution`: files, figures, a schedule from them, and bad calls in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_calls import one_line_error

from progtuning_kernels import ProgressiveSchedule, schedule_from_file
from progtuning_kernels.cli.app import main


@pytest.fixture
def call(model_folders, text_files, tmp_path):
    def build(*extra: object, model: str = "bert", output: str = "out") -> list[str]:
        fixed = {
            "--train-file": text_files[0],
            "--validation-file": text_files[1],
            "--model": model_folders[model],
            "--output": tmp_path / output,
            "--batch-size": 16,
            "--lr": 3e-3,
            "--max-length": 16,
            "--max-steps": 6,
        }
        own = [x for pair in fixed.items() if pair[0] not in extra for x in pair]
        return ["contribution", *map(str, (*own, *extra))]

    return build


def _stored(folder):
    return json.loads((folder / "contribution.json").read_text())


def test_a_small_run(call, tmp_path, capsys):
    main(call())
    stored = _stored(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["contribution.json"]
    (measure,) = stored["measures"].values()
    assert stored["num_blocks"] == 4 and stored["data"]["train_rows"] == 96
    assert len(measure["values"]) == 4 and len(set(measure["values"])) == 4
    assert measure["weights"] == [max(0, value) for value in measure["values"]]
    assert len(measure["metric_values"]) == 4
    out = capsys.readouterr().out
    assert "score: minus the loss over the validation rows\nwhat the score gains over -" in out
    assert all(f"{value:.5g}" in out for value in measure["values"])


def test_the_same_call_measures_the_same(call, tmp_path):
    for output in ("one", "two"):
        main(call(output=output))
    one, two = (_stored(tmp_path / name)["measures"]["train"] for name in ("one", "two"))
    assert one["values"] == two["values"] and one["baseline"] == two["baseline"]


def test_causal_lm(call, tmp_path):
    main(call("--task", "causal-lm", "--batch-size", 4, "--lr", 1e-5, model="gpt2"))
    stored = _stored(tmp_path / "out")
    assert stored["metric_name"] == "perplexity"
    assert stored["measures"]["train"]["baseline"] == pytest.approx(-np.log(97), abs=0.5)


@pytest.mark.parametrize("name", ["schedule.json", "schedule.yaml"])
def test_a_schedule_takes_its_weights_from_the_file(call, tmp_path, name):
    main(call())
    main(call())  # again into the same folder
    weights = _stored(tmp_path / "out")["measures"]["train"]["weights"]
    settings = {"schedule": "progressive", "stages": 2, "weights_from": "contribution.json"}
    path = tmp_path / "out" / name
    path.write_text(json.dumps(settings))  # which is YAML as well
    schedule = schedule_from_file(path)
    assert repr(schedule) == repr(ProgressiveSchedule(2, weights=weights))


@pytest.mark.parametrize(
    ("settings", "stored", "message"),
    [
        ({}, {"measures": {"skip": {"weights": None}}}, "no block contributes anything by skip"),
        ({}, {"measures": {}}, "holds no contribution of blocks"),
        ({}, [1], "holds no contribution of blocks"),
        ({}, {"measures": {"skip": {}, "train": {}}}, "measure must be one of skip, train"),
        ({"measure": "x"}, {"measures": {"skip": {"weights": [1]}}}, "measure must be one of skip"),
        ({"weights": [1]}, {}, "weights and weights_from exclude each other"),
    ],
)
def test_bad_weights_are_one_clear_error(tmp_path, settings, stored, message):
    (tmp_path / "c.json").write_text(json.dumps(stored))
    schedule = {"schedule": "progressive", "stages": 2, "weights_from": "c.json"}
    (tmp_path / "s.json").write_text(json.dumps(schedule | settings))
    with pytest.raises(ValueError, match=message):
        schedule_from_file(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--measure", "skip"], "--measure"),
        (["--max-steps", 0], "--max-steps"),
        (["--model", "nowhere/at-all"], "cannot load model 'nowhere/at-all'"),
        (["--dataset", "docstrings"], "--dataset and --train-file exclude each other"),
        (["--train-file", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--metric", "pearson"], "metric 'pearson' does not fit"),
        (["--max-length", 40], "--max-length 40 is above the model's 32 tokens"),
        (["--blocks", "bert.layers"], "has no module at 'bert.layers'"),
        (["--output", "/proc/contribution"], "/proc/contribution"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--lr", 1e30, "--max-grad-norm", 0], "not finite"),
    ],
)
def test_bad_calls_get_one_line(call, capsys, extra, message):
    assert message in one_line_error(capsys, call(*extra))


def test_help_has_an_example(capsys):
    main(["contribution", "--help"])
    assert "Example: progtuning contribution --dataset docstrings" in capsys.readouterr().out
