"""`progtuning train` from file to saved model, and every bad call one line."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
import torch
import transformers
from cli_calls import metrics_of, one_line_error, rows_of, weights_of

from progtuning_kernels import MaskedAdamW
from progtuning_kernels.cli import methods
from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.train import errors_of_writing


def test_progressive_run_from_file_to_saved_model(call, tmp_path, capsys):
    main(call("--epochs", 6))
    run = metrics_of(tmp_path / "run")
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
    assert rates[0] == 0 and rates.index(max(rates)) == 5 and max(rates) == 3e-3
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 1e-4
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-72"]
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
    full, ours = (metrics_of(tmp_path / m) for m in ("full", "progressive"))
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
    plain, cached = (metrics_of(tmp_path / m) for m in ("progressive", "progressive-cache"))
    losses = [[step["loss"] for step in run["steps"]] for run in (plain, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    first, second = (stage["cache"] for stage in cached["stages"])
    assert first["state"] == "bypassed" and "frozen" in first["reason"]
    assert second["rows"] == {"2": 96} and second["misses"] == 96
    assert second["hits"] == 96 * 2
    assert "cache" not in plain["stages"][0]


def test_moments_in_bfloat16_take_half_the_state_and_train_alike(call, tmp_path, monkeypatch):
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(
        methods,
        "MaskedAdamW",
        lambda *args, **more: given.append(more) or MaskedAdamW(*args, **more),
    )
    for kind in ("fp32", "bf16"):
        main(call("--max-steps", 9, "--state-dtype", kind, "--state-device", "cpu", output=kind))
    assert [more["state_device"] for more in given] == ["cpu", "cpu"]
    full, half = (metrics_of(tmp_path / kind) for kind in ("fp32", "bf16"))
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
        run = metrics_of(tmp_path / packing)
        losses[packing] = [step["loss"] for step in run["steps"]]
        shares = [stage["padding_skipped_share"] for stage in run["stages"]]
        out = capsys.readouterr().out
        if packing == "off":
            assert shares == [0] * 3 and "padded: packing" in out
            continue
        real = sum(stage["tokens"] for stage in run["stages"]) / (3 * 32 * 16)
        assert shares == pytest.approx([1 - real] * 3) and real < 0.4
        assert run["summary"]["padding_skipped_share"] == pytest.approx(1 - real, abs=0.01)
        assert "were padding, and left out" in out
        assert run["summary"]["packing"] in out
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)
    main(["report", *(str(tmp_path / name) for name in losses), "--output", str(tmp_path / "r")])
    page = (tmp_path / "r" / "report.html").read_text()
    assert "share of all token positions of the packed batches: on " in page
    message = one_line_error(capsys, call("--packing", "on", "--method", "full", output="full"))
    assert "--packing on is for the progressive methods" in message


@pytest.mark.parametrize("method", ["lora", "progressive-lora"])
def test_lora_trains_adapters_and_saves_them_and_a_merged_model(call, tmp_path, method):
    main(call("--method", method, "--max-steps", 6, "--stages", 2))
    run = metrics_of(tmp_path / "run")
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
    assert not any("lora" in name for name in weights_of(tmp_path / "run"))


def test_causal_lm(call, tmp_path):
    main(call("--task", "causal-lm", "--epochs", 4, "--batch-size", 4, model="gpt2"))
    run = metrics_of(tmp_path / "run")
    values = [e["perplexity"] for e in run["evaluations"]]
    assert run["metric_name"] == "perplexity" and values[-1] < 97
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.use_cache


def test_bf16_autocast_saves_less(call, tmp_path):
    for precision in ("fp32", "bf16"):
        main(call("--max-steps", 3, "--precision", precision, output=precision))
    fp32, bf16 = (metrics_of(tmp_path / name) for name in ("fp32", "bf16"))
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
    main(call(*files, "--problem-type", "regression", "--epochs", 60, "--lr", 1e-3))
    run = metrics_of(tmp_path / "run")
    assert run["metric_name"] == "pearson" and run["data"]["label_names"] is None
    assert run["evaluations"][-1]["pearson"] > 0.5
    assert run["evaluations"][-1]["loss"] < run["evaluations"][0]["loss"]


def test_accumulated_window_is_the_mean_over_its_rows(call, tmp_path):
    # 96 rows: the last window of an epoch has 6, in micro-batches of 5 and 1
    model, common = "bert-without-dropout", ("--max-steps", 20, "--lr", 1e-3)
    main(call(*common, "--batch-size", 10, output="one", model=model))
    main(call(*common, "--batch-size", 5, "--accumulate", 2, output="two", model=model))
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    losses = [[step["loss"] for step in run["steps"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [s["tokens"] for s in one["stages"]] == [s["tokens"] for s in two["stages"]]


def test_non_finite_steps_are_counted_and_written(call, tmp_path, monkeypatch, capsys):
    from progtuning_kernels.cli.recorder import Recorder

    begin = Recorder.on_step_begin

    def poisoned(recorder, args, state, control, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                kwargs["model"].classifier.weight[0, 0] = float("nan")
        begin(recorder, args, state, control, **kwargs)

    monkeypatch.setattr(Recorder, "on_step_begin", poisoned)
    with pytest.raises(SystemExit, match="3"):
        main(call("--max-steps", 6))
    run = metrics_of(tmp_path / "run")
    assert run["summary"]["skipped_steps"] == 2 and run["steps"][-1]["loss"] is None
    assert "2 of 6 steps skipped" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["progressive", "full"])
def test_a_run_that_diverges_says_so_and_saves_no_model(call, tmp_path, capsys, method):
    arguments = call("--method", method, "--lr", 1e30, "--max-steps", 9)
    error = one_line_error(capsys, arguments, status=3)
    assert "nothing was learnt: the validation loss is nan" in error and "no model" in error
    run = metrics_of(tmp_path / "run")
    assert run["summary"]["failure"] and run["summary"]["metric"] is None
    assert run["evaluations"][-1]["loss"] is None and run["evaluations"][-1]["accuracy"] is None
    assert not (tmp_path / "run" / "model").exists()
    if method == "progressive":
        assert run["summary"]["skipped_steps"] > 4


def test_a_run_that_cannot_step_says_so(call, tmp_path, capsys):
    # the square is infinite in fp32, in every batch of training and in none of validation
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_text(rows_of([1e38, 0.5]))
    validation.write_text(rows_of([1.5, 0.5]))
    files = ["--train-file", train, "--validation-file", validation]
    arguments = call(*files, "--problem-type", "regression", "--stages", 1)
    error = one_line_error(capsys, arguments, status=3)
    assert "in 6 of 6 steps the loss or its gradients were not finite" in error
    assert "6 of 6 steps" in metrics_of(tmp_path / "run")["summary"]["failure"]
    assert not (tmp_path / "run" / "model").exists()


def test_causal_lm_of_empty_texts_and_of_models_that_look_ahead(call, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": ""}\n{"text": null}\n')
    arguments = call("--task", "causal-lm", "--train-file", rows, model="gpt2")
    assert "all train rows are empty in column 'text'" in one_line_error(capsys, arguments)
    with rows.open("a") as file:
        file.write(json.dumps({"text": "w1 w2 " * 40}))
    main([*arguments, "--max-steps", "3"])
    assert "2 empty train rows are left out" in capsys.readouterr().out
    rows.write_text('{"text": 5}\n')
    assert "column 'text' holds 5" in one_line_error(capsys, [*arguments, "--overwrite"])
    common = ["--task", "causal-lm", "--overwrite"]
    assert "not a causal language model" in one_line_error(capsys, call(*common))
    error = one_line_error(capsys, call(*common, "--label-column", "label", model="gpt2"))
    assert "this task has no such column, only text" in error


def test_dry_run_prints_options_and_plan_and_writes_nothing(call, tmp_path, capsys):
    main(call("--dry-run", "--epochs", 3, "--stages", 4))
    out = capsys.readouterr().out
    assert "num_train_epochs: 3.0" in out and "4 blocks" in out and "blocks 3, head" in out
    main(call("--dry-run", "--stages", 4, "--embeddings", "always"))
    assert "embeddings, blocks 3" in capsys.readouterr().out
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
        (["--stages", 3, "--max-steps", 2], "--stages, --epochs and --batch-size set them"),
        (["--optim", "sgd", "--anneal"], "are MaskedAdamW's: leave out --optim"),
        (
            ["--optim", "sgd", "--precision", "bf16-pure", "--master-weights"],
            "are MaskedAdamW's: leave out --optim",
        ),
        (
            ["--column", "second=text"],
            "--column second: text-classification reads only text, label",
        ),
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
        (["--method", "full", "--cache", "8GiB"], "--cache is for the progressive methods"),
        (["--method", "progressive-cache", "--cache", "much"], "'much' is no size of memory"),
        (["--task", "causal-lm", "--max-validation-rows", 1], "shorter than one row of 16 tokens"),
    ],
)
def test_bad_calls_get_one_line(call, capsys, extra, message):
    model = "gpt2" if "causal-lm" in extra else "bert"
    assert message in one_line_error(capsys, call(*extra, model=model))


def test_the_model_of_the_best_stage_is_saved(call, tmp_path):
    best = ("--load-best-model-at-end", "--early-stopping-patience", 9)
    main(call("--epochs", 3, "--lr", 0.05, *best))
    *stages, saved = (e["loss"] for e in metrics_of(tmp_path / "run")["evaluations"])
    assert len(stages) == 3 and saved == min(stages) < stages[-1]


def test_a_run_stops_early_within_a_stage(call, tmp_path):
    main(
        call(
            "--lr", 0, "--early-stopping-patience", 1, "--eval-strategy", "steps", "--eval-steps", 5
        )
    )
    run = metrics_of(tmp_path / "run")
    assert [s["last_step"] for s in run["stages"]] == [run["summary"]["steps"]] == [10]


def test_what_is_missing_gets_one_line(call, tmp_path, capsys, monkeypatch):
    wandb = "transformers.integrations.integration_utils.is_wandb_available"
    monkeypatch.setattr(wandb, lambda: False)
    assert "wandb to be installed" in one_line_error(capsys, call("--report-to", "wandb"))
    monkeypatch.setattr("progtuning_kernels.cli.train.HfApi.create_repo", lambda *_, **__: 1 / 0)
    error = one_line_error(capsys, call("--max-steps", 3, "--push-to-hub", "true"))
    assert "the model is saved, but not pushed" in error
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672] . pos 4", "other"])
def test_a_full_disk_gets_one_line(tmp_path, text):
    with pytest.raises(UserError if "inline" in text else RuntimeError, match="pos 4|other"):
        with errors_of_writing(tmp_path):
            raise RuntimeError(text)


def test_a_refusal_in_the_first_step_is_one_line(call, capsys, monkeypatch):
    from progtuning_kernels.model.families import UnsupportedModelError

    def refuse(*_, **__):
        raise UnsupportedModelError("Model: something that\nfreezing would cut off")

    monkeypatch.setattr(transformers.Trainer, "training_step", refuse)
    assert "Model: something that freezing would cut off" in one_line_error(capsys, call())


def test_answers_have_a_file_of_their_own(model_folders, text_files, tmp_path, capsys):
    rows = str(text_files[0])
    for output in (rows, str(tmp_path / "answers.csv")):
        call = ["predict", str(model_folders["bert"]), "--file", rows, "--output", output]
        assert "JSON lines, in a .jsonl file of their own" in one_line_error(capsys, call)
    call = [
        "predict",
        str(tmp_path / "none"),
        "--file",
        rows,
        "--output",
        str(tmp_path / "a.jsonl"),
    ]
    assert "there is no such folder" in one_line_error(capsys, call)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    call[1] = str(tmp_path)
    assert f"its model is {tmp_path / 'model'}" in one_line_error(capsys, call)
