"""`progtuning contribution`: files, figures, a schedule from them, and bad calls in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from matplotlib.image import imread
from test_cli_train import _one_line_error

from progtuning_kernels import ProgressiveSchedule, schedule_from_file
from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.metrics import rank_correlation


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
            "--steps": 6,
        }
        return ["contribution", *(str(x) for pair in fixed.items() for x in pair), *map(str, extra)]

    return build


def _stored(folder):
    return json.loads((folder / "contribution.json").read_text())


def test_all_measures_of_a_small_run(call, tmp_path, capsys):
    main(call())
    stored = _stored(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "contribution.json",
        "contribution.png",
    ]
    assert list(stored["measures"]) == ["train", "skip", "gradient"]
    assert stored["num_blocks"] == 4 and stored["data"]["train_rows"] == 96
    for name, measure in stored["measures"].items():
        assert len(measure["values"]) == 4 and len(set(measure["values"])) == 4, name
        if measure["weights"] is not None:
            assert measure["weights"] == [max(0, value) for value in measure["values"]]
    assert len(stored["measures"]["train"]["metric_values"]) == 4
    assert stored["measures"]["gradient"]["baseline"] is None
    columns = {
        "train": stored["measures"]["train"]["values"],
        "train, accuracy": stored["measures"]["train"]["metric_values"],
        "skip": stored["measures"]["skip"]["values"],
        "skip, accuracy": stored["measures"]["skip"]["metric_values"],
        "gradient": stored["measures"]["gradient"]["values"],
    }
    assert len(stored["rank_correlations"]) == 10
    for pair in stored["rank_correlations"]:
        a, b = pair["between"]
        assert pair["spearman"] == rank_correlation(columns[a], columns[b])

    picture = imread(tmp_path / "out" / "contribution.png")
    assert picture.shape[1] > 1000
    colours = {tuple(c) for c in np.round(picture[..., :3].reshape(-1, 3) * 255).astype(int)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours

    out = capsys.readouterr().out
    assert "Contribution of the blocks" in out and "Rank correlation (Spearman)" in out
    assert all(f"{value:.4f}" in out for value in columns["gradient"])


def test_the_same_call_measures_the_same_and_one_measure_does_not_move_another(call, tmp_path):
    main(call("--measure", "all"))
    for measure in ("train", "skip", "gradient"):
        main(call("--measure", measure, output=measure))
        one, all_ = (_stored(tmp_path / name)["measures"] for name in (measure, "out"))
        assert list(one) == [measure]
        assert one[measure]["values"] == all_[measure]["values"]


def test_skip_and_gradient_follow_the_tuning(call, tmp_path):
    for tuned in (0, 6, 12):
        main(call("--measure", "skip", "--tune-steps", tuned, output=str(tuned)))
    losses = [-_stored(tmp_path / str(n))["measures"]["skip"]["baseline"] for n in (0, 6, 12)]
    assert losses[2] < losses[1] < losses[0]


def test_causal_lm(call, tmp_path):
    main(call("--task", "causal-lm", "--tune-steps", 0, "--batch-size", 4, model="gpt2"))
    stored = _stored(tmp_path / "out")
    assert stored["metric_name"] == "perplexity"
    assert stored["measures"]["skip"]["baseline"] == pytest.approx(-np.log(97), abs=0.5)


@pytest.mark.parametrize("name", ["schedule.json", "schedule.yaml"])
def test_a_schedule_takes_its_weights_from_the_file(call, tmp_path, name):
    main(call("--measure", "gradient"))
    main(call("--measure", "gradient"))  # again into the same folder
    weights = _stored(tmp_path / "out")["measures"]["gradient"]["weights"]
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
        (["--measure", "magic"], "--measure"),
        (["--steps", 0], "--steps"),
        (["--model", "nowhere/at-all"], "cannot load model 'nowhere/at-all'"),
        (["--dataset", "docstrings"], "--dataset and --train-file exclude each other"),
        (["--train-file", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--metric", "pearson"], "metric 'pearson' does not fit"),
        (["--max-length", 40], "--max-length 40 is above the model's 32 tokens"),
        (["--blocks", "bert.layers"], "has no module at 'bert.layers'"),
        (["--output", "/proc/contribution"], "/proc/contribution"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--measure", "train", "--lr", 1e30, "--max-grad-norm", 0], "not finite"),
    ],
)
def test_bad_calls_get_one_line(call, capsys, extra, message):
    assert message in _one_line_error(capsys, call(*extra))


def test_blocks_that_cannot_be_skipped_get_one_line(call, capsys, tmp_path, word_tokenizer):
    sizes = dict(emb_dim=16, n_layers=2, n_heads=2, n_words=97, pad_index=0)
    transformers.XLMModel(transformers.XLMConfig(**sizes)).save_pretrained(tmp_path / "xlm")
    word_tokenizer.save_pretrained(tmp_path / "xlm")
    arguments = call("--measure", "skip", "--model", tmp_path / "xlm")
    assert "no modules of their own" in _one_line_error(capsys, arguments)


def test_help_has_an_example(capsys):
    main(["contribution", "--help"])
    assert "Example: progtuning contribution --dataset docstrings" in capsys.readouterr().out


def test_rank_correlation_with_ties_and_constants():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2
    assert rank_correlation([5, 5, 7], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
