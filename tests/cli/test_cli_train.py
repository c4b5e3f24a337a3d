"""`progtuning train`: from file to saved model, killed and resumed, and every bad call one line."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from progtuning_kernels.cli.app import main


@pytest.fixture
def call(model_folders, text_files, tmp_path):
    """Arguments of a small run on the tiny BERT, and the function that adds to them."""

    def build(*extra: object, model: str = "bert", output: str = "run") -> list[str]:
        fixed = {
            "--train-file": text_files[0],
            "--validation-file": text_files[1],
            "--model": model_folders[model],
            "--output": tmp_path / output,
            "--batch-size": 8,
            "--lr": 3e-3,
            "--max-length": 16,
        }
        return ["train", *(str(x) for pair in fixed.items() for x in pair), *map(str, extra)]

    return build


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder / "model").state_dict()


def _one_line_error(capsys, arguments: list[str], status: int = 2) -> str:
    capsys.readouterr()  # what the test itself has printed
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_progressive_run_from_file_to_saved_model(call, tmp_path, capsys):
    main(call("--epochs", 6))
    run = _metrics(tmp_path / "run")
    summary, stages = run["summary"], run["stages"]
    assert [s["boundary"] for s in stages] == [0, 1, 2]
    assert [(s["first_step"], s["last_step"]) for s in stages] == [(1, 24), (25, 48), (49, 72)]
    for key in ("state_bytes", "gradient_bytes", "saved_bytes", "activation_bytes"):
        values = [s[key] for s in stages]
        assert values == sorted(set(values), reverse=True), key
    assert stages[0]["active_params"] == run["model"]["num_params"]
    assert stages[0]["gradient_bytes"] == 4 * stages[0]["active_params"]
    assert stages[2]["gradient_bytes"] == 4 * stages[2]["active_params"]
    assert summary["updates"] == sum(24 * s["active_params"] for s in stages)
    assert summary["updates_saved_share"] == 1 - summary["updates"] / summary["updates_full"] > 0.25
    assert len(run["steps"]) == 72 and len(run["evaluations"]) == 3
    assert run["steps"][-1]["loss"] < run["steps"][0]["loss"]
    assert summary["metric"] > 0.6
    rates = [s["lr"] for s in run["steps"]]
    assert rates[0] == 0 and rates.index(max(rates)) == 4 and max(rates) == 3e-3
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 1e-4
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "parameter updates saved" in capsys.readouterr().out

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.id2label == {0: "high", 1: "low"}
    hits = [
        model(**tokenizer(f"w{i} w3 w50 w7", return_tensors="pt")).logits.argmax() == (i < 45)
        for i in range(90)
    ]
    assert sum(hits) > 54


def test_full_and_progressive_start_alike_and_differ_after_the_first_stage(call, tmp_path):
    for method in ("full", "progressive"):  # packed, other dropout is drawn
        main(call("--method", method, "--max-steps", 9, "--packing", "off", output=method))
    full, ours = (_metrics(tmp_path / m) for m in ("full", "progressive"))
    assert [s["boundary"] for s in full["stages"]] == [0, 0, 0]
    assert full["summary"]["updates_saved_share"] == 0
    assert full["stages"][0]["state_bytes"] == full["stages"][2]["state_bytes"]
    losses = [[s["loss"] for s in run["steps"]] for run in (full, ours)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-4)
    assert losses[0][-1] != losses[1][-1]


def test_the_cache_serves_later_epochs_of_a_stage_and_moves_with_the_boundary(call, tmp_path):
    # bit for bit the same needs the same batches; in other batches rows round otherwise
    common = ["--epochs", 6, "--stages", 2]
    for method in ("progressive", "progressive-cache"):
        main(call("--method", method, *common, output=method, model="bert-without-dropout"))
    plain, cached = (_metrics(tmp_path / m) for m in ("progressive", "progressive-cache"))
    losses = [[step["loss"] for step in run["steps"]] for run in (plain, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    first, second = (stage["cache"] for stage in cached["stages"])
    assert first["state"] == "bypassed" and "frozen" in first["reason"]
    assert second["rows"] == {"2": 96} and second["misses"] == 96
    assert second["hits"] == 96 * 2
    assert "cache" not in plain["stages"][0]


def test_moments_in_bfloat16_take_half_the_state_and_train_alike(call, tmp_path):
    for kind in ("fp32", "bf16"):
        main(call("--max-steps", 9, "--state-dtype", kind, output=kind))
    full, half = (_metrics(tmp_path / kind) for kind in ("fp32", "bf16"))
    for a, b in zip(full["stages"], half["stages"], strict=True):
        assert b["state_bytes"] == pytest.approx(a["state_bytes"] / 2, rel=0.05)
    losses = [[step["loss"] for step in run["steps"]] for run in (full, half)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0] != losses[1]


def test_packing_leaves_padding_out_and_says_so(call, tmp_path, capsys):
    """The first row of every batch of eight is cut at 16 tokens, the others have two or three."""
    rows = [
        {"text": "w1 " * 40 if i % 8 == 0 else "w50", "label": "high" if i % 3 else "low"}
        for i in range(32)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--epochs", 3, "--batch-size", 32, "--train-file", file, "--validation-file", file]
    losses = {}
    for packing in ("on", "off"):
        main(call("--packing", packing, *common, output=packing, model="bert-without-dropout"))
        run = _metrics(tmp_path / packing)
        losses[packing] = [step["loss"] for step in run["steps"]]
        shares = [stage["padding_skipped_share"] for stage in run["stages"]]
        out = capsys.readouterr().out
        if packing == "off":
            assert shares == [0] * 3 and "padded: packing" in out
            continue
        real = sum(step["tokens"] for step in run["steps"]) / (3 * 32 * 16)
        assert shares == pytest.approx([1 - real] * 3) and real < 0.4
        assert run["summary"]["padding_skipped_share"] == pytest.approx(1 - real, abs=0.01)
        assert "were padding, and left out" in out
        assert run["summary"]["packing"] in out
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)
    main(["report", *(str(tmp_path / name) for name in losses), "--output", str(tmp_path / "r")])
    page = (tmp_path / "r" / "report.html").read_text()
    assert "share of all token positions of the packed batches: on " in page
    message = _one_line_error(capsys, call("--packing", "on", "--method", "full", output="full"))
    assert "--packing on is for the progressive methods" in message


@pytest.mark.parametrize("method", ["lora", "progressive-lora"])
def test_lora_trains_adapters_and_saves_them_and_a_merged_model(call, tmp_path, method):
    main(call("--method", method, "--max-steps", 6, "--stages", 2))
    run = _metrics(tmp_path / "run")
    assert run["model"]["active_params"] < 0.5 * run["model"]["num_params"]
    assert not any(stage["embeddings"] for stage in run["stages"])
    assert all(stage["head"] and stage["trainable"][3] for stage in run["stages"])
    active, state = ([s[k] for s in run["stages"]] for k in ("active_params", "state_bytes"))
    if method == "progressive-lora":
        assert [s["boundary"] for s in run["stages"]] == [0, 2]
        assert active[0] > active[1] > 0 and state[0] > state[1] > 8 * active[1]
        assert run["stages"][0]["saved_bytes"] > 1.5 * run["stages"][1]["saved_bytes"]
    else:
        assert active[0] == active[1] and state[0] == state[1]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not any("lora" in name for name in _weights(tmp_path / "run"))


def test_causal_lm(call, tmp_path):
    main(call("--task", "causal-lm", "--epochs", 4, "--batch-size", 4, model="gpt2"))
    run = _metrics(tmp_path / "run")
    values = [e["perplexity"] for e in run["evaluations"]]
    assert run["metric_name"] == "perplexity" and values[-1] < 97
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.use_cache


def test_bf16_autocast_saves_less(call, tmp_path):
    for precision in ("fp32", "bf16"):
        main(call("--max-steps", 3, "--precision", precision, output=precision))
    fp32, bf16 = (_metrics(tmp_path / name) for name in ("fp32", "bf16"))
    for key in ("state_bytes", "gradient_bytes"):  # also where a stage is a single step
        sizes = [s[key] for s in fp32["stages"]]
        assert sizes == sorted(set(sizes), reverse=True)
    for ours, wide in zip(bf16["stages"], fp32["stages"], strict=True):
        assert ours["activation_bytes"] < wide["activation_bytes"]
    losses = [[s["loss"] for s in run["steps"]] for run in (fp32, bf16)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_regression_and_tab_separated_pairs(call, tmp_path):
    paths = []
    for split in ("train", "validation"):
        paths.append(tmp_path / f"{split}.tsv")
        with paths[-1].open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["text_a", "text_b", "label"])
            writer.writerows([f"w{i} w{i}", f"w{i + 1}", i / 9 + 0.5] for i in range(24))
    files = ["--train-file", paths[0], "--validation-file", paths[1]]
    main(call(*files, "--epochs", 60, "--lr", 1e-3))
    run = _metrics(tmp_path / "run")
    assert run["metric_name"] == "pearson" and run["data"]["label_names"] is None
    assert run["evaluations"][-1]["pearson"] > 0.5
    assert run["evaluations"][-1]["loss"] < run["evaluations"][0]["loss"]


def test_accumulated_window_is_the_mean_over_its_rows(call, tmp_path):
    # 96 rows: the last window of an epoch has 6, in micro-batches of 5 and 1
    model, common = "bert-without-dropout", ("--max-steps", 20, "--lr", 1e-3)
    main(call(*common, "--batch-size", 10, output="one", model=model))
    main(call(*common, "--batch-size", 5, "--accumulate", 2, output="two", model=model))
    one, two = (_metrics(tmp_path / name)["steps"] for name in ("one", "two"))
    assert [s["loss"] for s in one] == pytest.approx([s["loss"] for s in two], rel=1e-4)
    assert [s["tokens"] for s in one] == [s["tokens"] for s in two]


def test_tables_with_quotation_marks_and_byte_order_marks(call, tmp_path):
    path = tmp_path / "train.tsv"
    lines = ["text\tlabel", '"w1 w2\tlow', "w50 w60\thigh", 'w3 "w4"\tlow'] * 1
    path.write_bytes(("\ufeff" + "\n".join(lines) + "\n").encode())
    main(call("--train-file", path, "--max-steps", 3))
    assert _metrics(tmp_path / "run")["data"]["train_rows"] == 3


def test_non_finite_steps_are_counted_and_written(call, tmp_path, monkeypatch, capsys):
    from progtuning_kernels.cli import engine

    step = engine.Run._train_step

    def poisoned(run, *window, measure):
        if run.step == 4:
            with torch.no_grad():
                run.trained.base.classifier.weight[0, 0] = float("nan")
        return step(run, *window, measure=measure)

    monkeypatch.setattr(engine.Run, "_train_step", poisoned)
    with pytest.raises(SystemExit, match="3"):
        main(call("--max-steps", 6))
    run = _metrics(tmp_path / "run")
    assert run["summary"]["skipped_steps"] == 2 and run["steps"][-1]["loss"] is None
    assert "2 of 6 steps skipped" in capsys.readouterr().out


def _rows_of(labels: list, count: int = 16) -> str:
    """Rows of JSON, the labels in turn."""
    rows = [{"text": f"w{i} w{2 * i} w7", "label": labels[i % len(labels)]} for i in range(count)]
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize("method", ["progressive", "full"])
def test_a_run_that_diverges_says_so_and_saves_no_model(call, tmp_path, capsys, method):
    arguments = call("--method", method, "--lr", 1e30, "--max-steps", 9)
    error = _one_line_error(capsys, arguments, status=3)
    assert "nothing was learnt: the validation loss is nan" in error and "no model" in error
    run = _metrics(tmp_path / "run")
    assert run["summary"]["failure"] and run["summary"]["metric"] is None
    assert run["evaluations"][-1]["loss"] is None and run["evaluations"][-1]["accuracy"] is None
    assert not (tmp_path / "run" / "model").exists()
    if method == "progressive":
        assert run["summary"]["skipped_steps"] > 4


def test_a_run_that_diverged_keeps_its_checkpoints(call, tmp_path, capsys):
    arguments = call("--lr", 1e30, "--max-steps", 9, "--checkpoint-every", 6)
    first = _one_line_error(capsys, arguments, status=3)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
    assert _one_line_error(capsys, [*arguments, "--resume"], status=3) == first


def test_a_run_that_cannot_step_says_so(call, tmp_path, capsys):
    # the square is infinite in fp32, in every batch of training and in none of validation
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_text(_rows_of([1e38, 0.5]))
    validation.write_text(_rows_of([1.5, 0.5]))
    arguments = call("--train-file", train, "--validation-file", validation, "--stages", 1)
    error = _one_line_error(capsys, arguments, status=3)
    assert "in 6 of 6 steps the loss or its gradients were not finite" in error
    assert "6 of 6 steps" in _metrics(tmp_path / "run")["summary"]["failure"]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("suffix", "labels", "classes"),
    [
        ("jsonl", ["007", "7"], ["007", "7"]),
        ("csv", ["007", "7"], ["007", "7"]),
        ("jsonl", ["nan", "en"], ["en", "nan"]),
        ("csv", ["nan", "inf"], ["inf", "nan"]),
        ("csv", ["10", "2", "x"], ["2", "10", "x"]),
        ("csv", ["1.0", "1"], ["1", "1.0"]),
        ("jsonl", [10, 2], ["2", "10"]),
        ("jsonl", [1.0, 2, 1, 2.0], ["1", "2"]),
        ("jsonl", ["3.10", "3.1"], ["3.1", "3.10"]),
        ("jsonl", [True, False], ["False", "True"]),
        ("csv", ["1.5", "2"], None),
        ("csv", ["1e-1", "-3"], None),
        ("jsonl", [1.5, 2], None),
    ],
)
def test_labels_are_what_the_file_says(call, tmp_path, capsys, suffix, labels, classes):
    path = tmp_path / f"rows.{suffix}"
    rows = [(f"w{i} w7", labels[i % len(labels)]) for i in range(12)]
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    else:
        path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows))
    main(call("--train-file", path, "--validation-file", path, "--max-steps", 3))
    assert _metrics(tmp_path / "run")["data"]["label_names"] == classes
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert classes is None or list(config["id2label"].values()) == classes
    said = "a regression" if classes is None else f"classes: {', '.join(map(repr, classes))}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", _rows_of(["7", 7]), "row 2: label 7 is a number, that of row 1 is text"),
        ("a.jsonl", _rows_of([True, 1]), "row 2: label 1 is a number"),
        ("a.jsonl", _rows_of([10**400, 1]), "row 1: 1000"),
        ("a.jsonl", _rows_of([1e300, 1.5]), "row 1: 1e+300 cannot be a label"),
        ("a.jsonl", _rows_of([float("inf"), 1.5]), "row 1: inf cannot be a label"),
        ("a.jsonl", '{"text": "w1", "label": ' + 5000 * "1" + "}", "line 1: "),
        ("a.jsonl", '{"text": ["w1"], "label": 1}', "row 1, column 'text' holds ['w1'], which is"),
        ("a.jsonl", '{"text": {"a": "w1"}, "label": 1}', "row 1, column 'text' holds {'a'"),
        ("a.jsonl", '{"text": NaN, "label": 1}', "row 1, column 'text' holds nan"),
        ("a.jsonl", '{"text": null, "label": 1}', "row 1 has no value for column 'text'"),
        ("a.jsonl", '{"text": "  ", "label": 1}', "row 1 has no value for column 'text'"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "holds half a character"),
        ("a.jsonl", '{"text": "w1", "label": 1, "label": 2}', "has one of its names twice"),
        ("a.jsonl", '{"text_a": "w1", "label": 1}\n{"text_a": "w1", "text_b": "w2", "label": 2}',
         "train row 1 has no value for column 'text_b'"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.json", '{"text": "w1"}', "not a list of objects"),
        ("a.csv", "text,label,label\nw1,a,b\n", "two columns are named 'label'"),
        ("a.csv", 'text,label\n"w1,a\nw2,b\n', "unexpected end of data"),
        ("a.csv", "text,label\nw1,1e999\nw2,0.5\n", "row 1: '1e999' cannot be a label"),
        ("a.csv", f"text,label\nw1,{10**400}\nw2,1\n", "cannot be a label"),
        ("a.csv", "text,label\nw1,1.5\nw2,1.5\n", "one label only: '1.5'"),
        ("a.jsonl.gz", "", "unknown suffix '.gz'"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_bad_training_rows_get_one_line(call, capsys, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    assert message in _one_line_error(capsys, call("--train-file", path, "--validation-file", path))


@pytest.mark.parametrize(
    "content",
    [
        "text;label\nw1, w2;low\nw3;high\n",
        "\ufefftext\tlabel\n\nw1\tlow\nw3\thigh\n",
        "\n\ntext,label\n\n" + f"{'w1 ' * 60_000},low\n\nw3,high\n",
        'text,label\n"w1\nw2",low\nw3,high\n',
    ],
    ids=["semicolons", "tabs", "long cell", "a line break"],
)
def test_tables_as_programs_write_them(call, tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    main(call("--train-file", path, "--max-steps", 3))
    data = _metrics(tmp_path / "run")["data"]
    assert data["train_rows"] == 2 and data["label_names"] == ["high", "low"]


@pytest.fixture
def fine_tuned(call, text_files, tmp_path):
    """A function: a classifier of `text_files` whose classes are renamed, and its accuracy."""

    def build(names: list[str]) -> tuple[Path, float]:
        main(call("--epochs", 6, output="first"))
        path = tmp_path / "first/model/config.json"
        config = json.loads(path.read_text())
        assert config["id2label"] == {"0": "high", "1": "low"}
        config["id2label"] = dict(enumerate(names))  # and nothing else, as the command advises
        path.write_text(json.dumps(config))
        return path.parent, _metrics(tmp_path / "first")["summary"]["metric"]

    return build


@pytest.mark.parametrize(
    ("head", "high", "low"),
    [(["z", "a"], "z", "a"), (["a", "z"], "a", "z"), (["NEG", "POS"], 0, 1)],
)
def test_a_head_of_the_same_classes_goes_on(
    call, fine_tuned, text_files, tmp_path, capsys, head, high, low
):
    folder, accuracy = fine_tuned(head)
    files = []
    for path in text_files:
        text = (
            path.read_text().replace('"high"', json.dumps(high)).replace('"low"', json.dumps(low))
        )
        files.append(tmp_path / path.name)
        files[-1].write_text(text)
    capsys.readouterr()
    arguments = call("--train-file", files[0], "--validation-file", files[1], "--lr", 0)
    main([*arguments, "--model", str(folder)])
    assert _metrics(tmp_path / "run")["summary"]["metric"] == accuracy > 0.6
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (
        list(config["id2label"].values())
        == head
        == _metrics(tmp_path / "run")["data"]["label_names"]
    )
    said = f"the checkpoint's classes: 0 is {head[0]}, 1 is {head[1]}"
    assert (said in capsys.readouterr().out) is (head != ["a", "z"])


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (["a", "c"], ["a", "b"]),
        (["LABEL_0", "LABEL_1"], ["a", "b"]),
        (["a", "b"], ["a", "b", "c"]),
        (["a", "b"], [0.5, 1.5]),
    ],
    ids=str,
)
def test_a_head_of_other_classes_starts_anew(call, fine_tuned, tmp_path, capsys, head, labels):
    folder, _ = fine_tuned(head)
    path = tmp_path / "rows.jsonl"
    path.write_text(_rows_of(labels))
    capsys.readouterr()
    main(call("--train-file", path, "--validation-file", path, "--lr", 0, "--model", folder))
    out = capsys.readouterr().out
    assert f"the head starts anew: the checkpoint's is for {', '.join(head)}" in out
    old = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    new = _weights(tmp_path / "run")
    assert not torch.equal(new["classifier.weight"], old["classifier.weight"])
    assert torch.equal(new["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"])


def _folder(path: Path, model, tokenizer) -> Path:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_a_tokenizer_larger_than_the_model(call, capsys, tmp_path, word_tokenizer):
    small = transformers.BertModel(transformers.BertConfig(**_SIZES, vocab_size=60))
    arguments = call("--model", _folder(tmp_path / "small", small, word_tokenizer))
    assert "there are 60 embeddings; model.resize_token_embeddings" in _one_line_error(
        capsys, arguments
    )
    small.resize_token_embeddings(len(word_tokenizer))
    _folder(tmp_path / "small", small, None)
    main([*arguments, "--max-steps", "3"])


def test_a_folder_without_the_tokenizers_files(call, capsys, tmp_path):
    for model in ("Bert", "Roberta"):
        config = getattr(transformers, f"{model}Config")(**_SIZES, vocab_size=97)
        path = _folder(tmp_path / model, getattr(transformers, f"{model}Model")(config), None)
        error = _one_line_error(capsys, call("--model", path))
        assert "no word of the texts" in error or "no token" in error


def test_weights_that_do_not_fit_get_one_line(call, capsys, tmp_path, word_tokenizer):
    model = transformers.BertModel(transformers.BertConfig(**_SIZES, vocab_size=97))
    path = _folder(tmp_path / "model", model, word_tokenizer)
    whole = json.loads((path / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 120}, "word_embeddings.weight has another shape in its weights"),
        ({"num_hidden_layers": 12}, "its weights lack most of the model"),
    ):
        (path / "config.json").write_text(json.dumps(whole | change))
        assert message in _one_line_error(capsys, call("--model", path))
    (path / "config.json").write_text(json.dumps(whole))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    _folder(path, model, None)
    assert "not finite before any training" in _one_line_error(capsys, call("--model", path))


def test_models_that_count_positions_in_other_ways(call, capsys, tmp_path, word_tokenizer):
    unlimited = copy.deepcopy(word_tokenizer)
    unlimited.model_max_length = -1
    config = transformers.RobertaConfig(**_SIZES, vocab_size=97, max_position_embeddings=16)
    path = _folder(tmp_path / "roberta", transformers.RobertaModel(config), unlimited)
    error = _one_line_error(capsys, call("--model", path, "--max-length", 15))
    assert "--max-length 15 is above the model's 14 tokens" in error
    main(call("--model", path, "--max-length", 14, "--max-steps", 3))
    sizes = {"d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 16}
    config = transformers.XLNetConfig(**sizes, vocab_size=97)
    path = _folder(tmp_path / "xlnet", transformers.XLNetModel(config), unlimited)
    main(call("--model", path, "--max-steps", 3, output="xlnet-run"))


def test_the_padding_of_the_tokenizer_decides_where_a_decoder_answers(
    call, tmp_path, model_folders
):
    losses = []
    for pad in (0, 9):
        folder = tmp_path / f"pad{pad}"
        shutil.copytree(model_folders["gpt2"], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        main(call("--model", folder, "--lr", 0, "--max-steps", 3, output=f"run{pad}"))
        losses.append(_metrics(tmp_path / f"run{pad}")["evaluations"][-1]["loss"])
    assert losses[0] == losses[1]


def test_end_tokens_in_a_text_that_the_model_answers_at(call, capsys, tmp_path, word_tokenizer):
    from tokenizers import processors

    ending = copy.deepcopy(word_tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 4, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=97, eos_token_id=3, decoder_start_token_id=0)
    path = _folder(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), ending)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(_rows_of(["a", "b"]) + '\n{"text": "w1 [SEP] w2", "label": "a"}\n')
    files = ["--train-file", rows, "--validation-file", rows]
    error = _one_line_error(capsys, call("--model", path, *files))
    assert "train row 17 has '[SEP]' 2 times, train row 1 1 times" in error
    rows.write_text(rows.read_text().replace("[SEP] ", ""))
    main(call("--model", path, *files, "--max-steps", 3))


def test_causal_lm_of_empty_texts_and_of_models_that_look_ahead(call, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": ""}\n{"text": null}\n')
    arguments = call("--task", "causal-lm", "--train-file", rows, model="gpt2")
    assert "all train rows are empty in column 'text'" in _one_line_error(capsys, arguments)
    with rows.open("a") as file:
        file.write(json.dumps({"text": "w1 w2 " * 40}))
    main([*arguments, "--max-steps", "3"])
    assert "2 empty train rows left out" in capsys.readouterr().out
    rows.write_text('{"text": 5}\n')
    assert "column 'text' holds 5" in _one_line_error(capsys, [*arguments, "--overwrite"])
    common = ["--task", "causal-lm", "--overwrite"]
    assert "not a causal language model" in _one_line_error(capsys, call(*common))
    error = _one_line_error(capsys, call(*common, "--label-column", "label", model="gpt2"))
    assert "no pairs and no labels" in error


def test_changed_data_is_noticed_on_resume(call, text_files, tmp_path, capsys):
    rows = tmp_path / "train.jsonl"
    rows.write_text(text_files[0].read_text())
    _stopped_run(call, "--train-file", rows)
    rows.write_text(rows.read_text().replace("w7", "w8"))
    error = _one_line_error(capsys, call("--max-steps", 9, "--resume", "--train-file", rows))
    assert "the data has changed" in error
    error = _one_line_error(capsys, call("--max-steps", 9, "--resume"))
    assert f"was written with train_file='{rows}'" in error


@pytest.mark.parametrize("extra", [("--accumulate", "2"), ("--method", "lora")], ids=" ".join)
def test_stopped_run_goes_on_between_stages_and_with_other_options(call, tmp_path, extra):
    _stopped_run(call, *extra)
    main(call("--max-steps", 9, "--checkpoint-every", 6, *extra, "--resume"))
    main(call("--max-steps", 9, *extra, output="straight"))
    straight, resumed = (_metrics(tmp_path / name)["steps"] for name in ("straight", "run"))
    assert [s["loss"] for s in straight] == [s["loss"] for s in resumed]
    assert [s["step"] for s in resumed] == list(range(1, 10))


@pytest.mark.parametrize("method", ["progressive", "full"])
def test_killed_run_goes_on_to_the_same_bits(call, tmp_path, method):
    common = ["--method", method, "--epochs", 10, "--checkpoint-every", 20]
    main(call(*common, output="straight"))
    arguments = call(*common, output="killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "progtuning_kernels", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / "checkpoints" / "step-00000060.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()

    main([*arguments, "--resume"])
    straight, killed = (_metrics(tmp_path / name) for name in ("straight", "killed"))
    assert [s["loss"] for s in straight["steps"]] == [s["loss"] for s in killed["steps"]]
    assert [e["metric"] for e in straight["evaluations"]] == [
        e["metric"] for e in killed["evaluations"]
    ]
    expected = _weights(tmp_path / "straight")
    assert all(torch.equal(w, expected[n]) for n, w in _weights(tmp_path / "killed").items())


def _stopped_run(call, *extra: object) -> None:
    """A run with a checkpoint of step 6, stopped as a kill would."""
    from progtuning_kernels.cli import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Run, "_save_model", lambda self: (_ for _ in ()).throw(SystemError))
        with pytest.raises(SystemError):
            main(call("--max-steps", 9, "--checkpoint-every", 6, *extra))


def test_a_checkpoint_of_another_run_is_refused(call, tmp_path, capsys):
    _stopped_run(call)
    again = ["--max-steps", 9, "--resume"]
    other = _one_line_error(capsys, call(*again, model="gpt2"))
    assert "the checkpoint was written with model=" in other
    assert "written with lr=0.003, this call has lr=0.5" in _one_line_error(
        capsys, call(*again, "--lr", 0.5)
    )
    longer = _one_line_error(capsys, call("--max-steps", 12, "--resume"))
    assert "written with max_steps=9, this call has max_steps=12" in longer
    assert "is not empty; give --resume" in _one_line_error(capsys, call("--max-steps", 9))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in _one_line_error(capsys, call(*again))
    checkpoint.write_bytes(whole)
    main(call(*again))
    assert "is finished" in _one_line_error(capsys, call(*again))
    (tmp_path / "run" / "thesis.tex").touch()
    assert "holds other files (thesis.tex)" in _one_line_error(capsys, call("--overwrite"))
    (tmp_path / "run" / "thesis.tex").unlink()
    main(call("--max-steps", 3, "--overwrite"))
    assert len(_metrics(tmp_path / "run")["steps"]) == 3


def test_only_the_newest_checkpoints_are_kept(call, tmp_path):
    _stopped_run(call, "--max-steps", 12, "--checkpoint-every", 2, "--keep-checkpoints", 3)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000006.pt", "step-00000008.pt", "step-00000010.pt"]


def test_dry_run_prints_the_plan_and_writes_nothing(call, tmp_path, capsys):
    main(call("--dry-run", "--epochs", 3, "--stages", 4))
    out = capsys.readouterr().out
    assert "36 steps, 4 blocks" in out and "blocks 3, head" in out
    assert "0.500" in out and "% of parameter updates saved" in out
    main(call("--dry-run", "--stages", 4, "--embeddings", "always"))
    always = capsys.readouterr().out
    assert "embeddings, blocks 3" in always and "0.750" in always and "0.500" not in always
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train-file", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--validation-file", "pyproject.toml"], "unknown suffix '.toml'"),
        (["--text-column", "sentense"], "no column 'sentense'; the file has text, label"),
        (["--label-column", "class"], "no column 'class'; the file has text, label"),
        (["--stages", 5], "stages=5 is more than the 4 blocks there are"),
        (["--stages", 3, "--max-steps", 2], "total_steps=2 is fewer than stages=3"),
        (["--blocks", "bert.layers"], "has no module at 'bert.layers'"),
        (["--model", "nowhere/at-all"], "cannot load model 'nowhere/at-all'"),
        (["--dataset", "docstrings"], "--dataset and --train-file exclude each other"),
        (["--metric", "pearson"], "metric 'pearson' does not fit; there is accuracy, f1"),
        (["--max-length", 40], "--max-length 40 is above the model's 32 tokens"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--output", "/proc/run"], "/proc/run"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--batch-size", 0], "--batch-size"),
        (["--max-length", 2, "--model", "minilm"], "knows no word of the texts: --max-length"),
        (["--lr", "nan"], "nan is no number"),
        (["--lr", "inf"], "inf is no number"),
        (["--warmup", "nan"], "nan is no number"),
        (["--seed", 2**63], "--seed"),
        (["--label-column", "text"], "need columns of their own"),
        (["--no-such-option"], "--no-such-option"),
        (["--method", "full", "--state-dtype", "8bit"], "--method full uses torch's AdamW"),
        (["--cache", "8GiB"], "--cache is for --method progressive-cache"),
        (["--method", "progressive-cache", "--cache", "much"], "'much' is no size of memory"),
        (["--task", "causal-lm", "--max-validation-rows", 1], "shorter than one row of 16 tokens"),
    ],
)
def test_bad_calls_get_one_line(call, capsys, extra, message):
    model = "gpt2" if "causal-lm" in extra else "bert"
    assert message in _one_line_error(capsys, call(*extra, model=model))


def test_several_processes_are_sent_elsewhere(call, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "examples/accelerate_loop.py" in _one_line_error(capsys, call())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w1", "label": "lo"}\n', "validation row 1: label 'lo' is outside the set"),
        ('{"text": "w1", "label": "low"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "", "label": "low"}\n', "validation row 1 has no value for column 'text'"),
        ('{"text": "w1"}\n', "validation row 1 has no value for column 'label'"),
        ("[1]\n", "line 1: not an object"),
        ('{"text": "w1", "label": NaN}\n', "validation row 1: nan cannot be a label"),
        ('{"text": "w1", "label": [1]}\n', "validation row 1: [1] cannot be a label"),
        ("\xff\xfe", "is not UTF-8"),
        ("", "has no rows"),
    ],
)
def test_bad_rows_get_one_line(call, capsys, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("latin-1"))
    assert message in _one_line_error(capsys, call("--validation-file", path))


def test_models_that_cannot_be_cut_get_one_line(call, capsys, tmp_path, word_tokenizer):
    config = transformers.AlbertConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
        vocab_size=97,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path / "albert")
    word_tokenizer.save_pretrained(tmp_path / "albert")
    assert "share weights" in _one_line_error(capsys, call("--model", tmp_path / "albert"))
    sizes = dict(d_model=16, d_head=8, d_inner=16, n_head=2, vocab_size=97)
    config = transformers.FunnelConfig(block_sizes=[2, 2], num_decoder_layers=1, **sizes)
    transformers.FunnelBaseModel(config).save_pretrained(tmp_path / "funnel")
    word_tokenizer.save_pretrained(tmp_path / "funnel")
    assert "has no module at 'funnel.encoder.layers'; name what the blocks are" in _one_line_error(
        capsys, call("--model", tmp_path / "funnel", "--blocks", "funnel.encoder.layers")
    )
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    word_tokenizer.save_pretrained(tmp_path / "resnet")
    assert "cannot load model" in _one_line_error(capsys, call("--model", tmp_path / "resnet"))


def test_a_refusal_in_the_first_step_is_one_line(call, capsys, monkeypatch):
    from progtuning_kernels.cli import engine
    from progtuning_kernels.model.families import UnsupportedModelError

    def refuse(*_, **__):
        raise UnsupportedModelError("Model: something that\nfreezing would cut off")

    monkeypatch.setattr(engine.Run, "_train_step", refuse)
    assert "Model: something that freezing would cut off" in _one_line_error(capsys, call())


def test_a_data_set_of_the_datasets_library(call, text_files, tmp_path):
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    folder = tmp_path / "data"
    folder.mkdir()
    for path in text_files:
        (folder / path.name).write_bytes(path.read_bytes())
    arguments = call("--max-steps", 3)
    for option in ("--train-file", "--validation-file"):
        at = arguments.index(option)
        del arguments[at : at + 2]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "progtuning_kernels", *arguments, "--dataset"]
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _metrics(tmp_path / "run")["data"]["train_rows"] == 96
    done = subprocess.run(
        [*command, "nobody/nothing", "--overwrite"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "cannot load data set 'nobody/nothing'" in done.stderr
