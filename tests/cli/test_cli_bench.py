"""`progtuning bench`: a gate, then times of every stage by every way to train it."""

from __future__ import annotations

import json

import pytest
import transformers

from progtuning_kernels.bench import timed_steps
from progtuning_kernels.cache.row_store import RowStore
from progtuning_kernels.cli import bench_command
from progtuning_kernels.cli.app import main


def _call(model_folders, *more, model="bert"):
    arguments = ["bench", "--model", str(model_folders[model]), "--batch-size", "2"]
    return main([*arguments, "--seq-len", "8", "--stages", "2", "--epochs", "1", *more])


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_every_way_is_timed_in_every_stage(model_folders, capsys, model):
    _call(model_folders, "--json", "--task", "classification", model=model)
    content = json.loads(capsys.readouterr().out)
    rows = {(row["stage"], row["method"]): row for row in content["rows"]}
    methods = ["full", "frozen by hand", "progressive", "progressive, cache"]
    assert [*rows] == [(stage, name) for stage in (1, 2) for name in methods]
    assert all(0 < r["step_ms_p20"] <= r["step_ms"] <= r["step_ms_p80"] for r in rows.values())
    assert content["gate_largest_difference"] <= 1e-5
    state = {key: row["state_bytes"] for key, row in rows.items()}
    assert state[1, "progressive"] == state[2, "full"] > state[2, "progressive"] > 0
    assert state[2, "frozen by hand"] == state[1, "frozen by hand"]  # kept, by hand
    boundaries = [rows[stage, "full"]["boundary"] for stage in (1, 2)]
    assert boundaries == [0, 2] and rows[2, "full"]["cache"] is None
    assert rows[2, "progressive, cache"]["cache"].startswith(("cache: on", "cache: off"))


def test_the_table_fits_a_terminal(model_folders, capsys, monkeypatch):
    def slow(*arguments):
        losses, step_ms = timed_steps(*arguments)
        return losses, step_ms + 98_765

    monkeypatch.setattr(bench_command.bench, "timed_steps", slow)
    _call(model_folders)
    out = capsys.readouterr().out
    assert "gradients within" in out and "of plain torch's" in out and "…" not in out
    table = [line.split() for line in out.splitlines()[4:-2]]
    assert [line[0] for line in table] == ["1"] * 4 + ["2"] * 4 + ["run"] * 4
    assert all(0 < float(line[-1]) < 3 and float(line[-3]) > 0 for line in table[:8])
    assert "state (MiB)" in out and max(map(len, out.splitlines())) <= 80


def test_no_time_is_printed_when_the_gate_is_red(model_folders, capsys, monkeypatch):
    ours = bench_command.bench.our_session

    def wrong(rule, model, *arguments, **options):
        for p in model.parameters():
            p.register_hook(lambda g: 1.01 * g)
        return ours(rule, model, *arguments, **options)

    monkeypatch.setattr(bench_command.bench, "our_session", wrong)
    with pytest.raises(SystemExit) as ended:
        _call(model_folders)
    captured = capsys.readouterr()
    assert (
        ended.value.code == 2
        and "progressive: gate is red: gradients of stage 1 are 1.0e-02 off" in captured.err
    )
    assert " ms" not in captured.out


def test_the_cache_has_to_pass_the_gate_too(model_folders, capsys, monkeypatch):
    read = RowStore.read
    monkeypatch.setattr(RowStore, "read", lambda self, *a, **k: 1.01 * read(self, *a, **k))
    with pytest.raises(SystemExit) as ended:
        _call(model_folders)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and "progressive, cache: gate is red" in captured.err
    assert " ms" not in captured.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seq-len", "4096"], "is above the model's 32 tokens"),
        (["--stages", "9"], "9"),
        (["--cache", "much"], "'much' is no size of memory"),
    ],
)
def test_bad_calls_get_one_line(model_folders, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        _call(model_folders, *more)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err


def test_a_model_that_reads_its_batch_gets_one_line(tmp_path, capsys):
    sizes = dict(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2, vocab_size=64)
    transformers.T5Config(**sizes, architectures=["T5ForSequenceClassification"]).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--model", str(tmp_path / "t5"), "--task", "classification"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert "T5ForSequenceClassification cannot be tried on random rows" in err
