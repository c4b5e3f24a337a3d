"""Calls of the command on a tiny model, what they leave, and the one line of a bad one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.recorder import Recorder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder / "model").state_dict()


def one_line_error(capsys, arguments: list[str], status: int = 2) -> str:
    capsys.readouterr()  # what the test itself has printed
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def rows_of(labels: list, count: int = 16) -> str:
    """Rows of JSON, the labels in turn."""
    rows = [{"text": f"w{i} w{2 * i} w7", "label": labels[i % len(labels)]} for i in range(count)]
    return "\n".join(map(json.dumps, rows))


@contextmanager
def broken_off(after: int) -> Iterator[None]:
    """A run of the command breaks off after a step, as a kill would, but for the process."""
    end = Recorder.on_step_end

    def broken(recorder, args, state, control, **kwargs):
        end(recorder, args, state, control, **kwargs)
        if state.global_step == after:
            raise SystemError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", broken)
        with pytest.raises(SystemError):
            yield
