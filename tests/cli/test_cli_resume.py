"""Runs of `progtuning train` that are killed, stopped, resumed and extended."""

from __future__ import annotations

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
from cli_calls import broken_off, metrics_of, one_line_error, weights_of

from progtuning_kernels.cli.app import main


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "progtuning_kernels", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def stopped(call):
    """A function: a run that breaks off after a step, with the checkpoints before it."""

    def stop(after: int, *extra: object, output: str = "run") -> None:
        with broken_off(after):
            main(call(*extra, output=output))

    return stop


def _same_run(one: Path, two: Path) -> None:
    first, second = metrics_of(one), metrics_of(two)
    assert [s["loss"] for s in first["steps"]] == [s["loss"] for s in second["steps"]]
    for key in ("step", "metric", "loss"):
        assert [e[key] for e in first["evaluations"]] == [e[key] for e in second["evaluations"]]
    for key in ("stage", "first_step", "last_step", "state_bytes", "tokens", "active_params"):
        assert [s[key] for s in first["stages"]] == [s[key] for s in second["stages"]]
    expected = weights_of(one)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(two).items())


def test_killed_run_goes_on_to_the_same_bits(call, tmp_path):
    common = ["--epochs", 5, "--checkpoint-every", 14]
    main(call(*common, output="straight"))
    arguments = call(*common, output="killed")
    process = _start(arguments)
    _wait_for(tmp_path / "killed/checkpoint-28/trainer_state.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    main([*arguments, "--resume"])
    _same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_signal_saves_and_says_how_to_go_on(call, tmp_path):
    number = signal.SIGTERM
    common = ["--epochs", 40, "--save-strategy", "no", "--stages", 2, "--overwrite"]
    arguments = call(*common)
    process = _start(arguments)
    line = ""
    while "step" not in line:  # it trains
        line = process.stdout.readline()
        assert line, process.stderr.read()
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 128 + number, said
    assert "with --resume in place of --overwrite goes on" in said.splitlines()[-1]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 480 and not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "extra",
    [
        ("--accumulate", "2"),
        ("--method", "lora"),
        ("--method", "full"),
        ("--tokens-per-batch", "128"),
        ("--anneal", "--state-dtype", "8bit"),
        ("--schedule", "random"),
    ],
    ids=" ".join,
)
def test_stopped_run_goes_on_with_other_options(call, stopped, tmp_path, extra):
    common = ["--max-steps", 9, "--checkpoint-every", 5, *extra]
    if "--tokens-per-batch" in extra:
        common += ["--batch-size", 32]
    stopped(7, *common)
    main(call(*common, "--resume"))
    main(call(*common, output="straight"))
    _same_run(tmp_path / "straight", tmp_path / "run")


def test_a_checkpoint_of_another_run_is_refused(call, stopped, text_files, tmp_path, capsys):
    rows = tmp_path / "train.jsonl"
    rows.write_text(text_files[0].read_text())
    common = ["--max-steps", 9, "--checkpoint-every", 3, "--train-file", rows]
    stopped(7, *common)
    again = [*common, "--resume"]
    for more, message in (
        (
            ["--lr", 0.5],
            "was written with learning_rate='0.003', this call has learning_rate='0.5'",
        ),
        (["--stages", 2], "was written with stages=3, this call has stages=2"),
        (["--max-length", 12], "was written with max_length=16, this call has max_length=12"),
    ):
        assert message in one_line_error(capsys, call(*again, *more))
    assert "is not empty; give --resume" in one_line_error(capsys, call(*common))
    rows.write_text(rows.read_text().replace("w7", "w8"))
    assert "the data has changed" in one_line_error(capsys, call(*again))
    rows.write_text(rows.read_text().replace("w8", "w7"))


def test_a_damaged_checkpoint_is_left_out_or_named(call, stopped, tmp_path, capsys):
    common = ["--max-steps", 9, "--checkpoint-every", 3]
    stopped(7, *common)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "run/checkpoint-6/trainer_state.json").unlink()  # as a kill leaves it
    main(call(*common, "--resume"))
    out = capsys.readouterr().out
    assert "checkpoint-6: not whole, left out" in out and "goes on after step 3 of 9" in out
    weights = tmp_path / "other/checkpoint-6/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    error = one_line_error(capsys, call(*common, "--resume", output="other"))
    assert "checkpoint-6 cannot be read" in error


def test_a_finished_run_is_extended(call, text_files, tmp_path, capsys):
    main(call("--max-steps", 6, "--predict-file", text_files[1]))  # which trains nothing
    again = one_line_error(capsys, call("--max-steps", 6, "--resume"))
    assert "is finished after 6 steps; more --epochs or --max-steps extend it" in again
    main(call("--max-steps", 12, "--resume"))
    out = capsys.readouterr().out
    assert "planned for 6 steps, now for 12" in out and "goes on after step 6 of 12" in out
    run = metrics_of(tmp_path / "run")
    assert run["summary"]["steps"] == 12
    assert [s["boundary"] for s in run["stages"]] == [0, 1, 2, 1, 2]  # of 6 steps, then of 12
    (tmp_path / "run" / "thesis.tex").touch()
    assert "holds other files (thesis.tex)" in one_line_error(capsys, call("--overwrite"))
    (tmp_path / "run" / "thesis.tex").unlink()
    main(call("--max-steps", 3, "--overwrite"))
    assert metrics_of(tmp_path / "run")["summary"]["steps"] == 3


def test_a_checkpoint_without_its_optimizer_is_refused(call, tmp_path, capsys):
    main(call("--max-steps", 3, "--save-only-model", "true"))
    error = one_line_error(capsys, call("--max-steps", 6, "--resume"))
    assert "checkpoint-3 has no optimizer state" in error


def test_only_the_newest_checkpoints_are_kept(call, tmp_path):
    main(call("--max-steps", 9, "--checkpoint-every", 2, "--keep-checkpoints", 2))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-8", "checkpoint-9"]
