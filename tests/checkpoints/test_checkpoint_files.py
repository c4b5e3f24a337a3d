"""What a killed writer, a bad disk or another version leaves behind costs a warning or one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from soak import differences
from toy_runs import Loop, Toy, progressive, stopped

from progtuning_kernels.checkpoints import CheckpointError, files


def test_no_checkpoint_is_none(tmp_path):
    loop = Loop(progressive())
    assert loop.load(tmp_path) is None and loop.load(tmp_path / "missing") is None
    for name in ("step-00000003.partial", "step-3.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert loop.load(tmp_path) is None


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_writer_killed_at_any_moment_leaves_the_earlier_checkpoint(moment, tmp_path, monkeypatch):
    loop = stopped(tmp_path, steps=3)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Killed(BaseException):
        pass

    def killed(content: Any, file: Any = None, *_: Any) -> None:
        if moment == "torch.save":
            file.write(b"PK\x03\x04 half of it")
            file.flush()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(moment, killed)
        with pytest.raises(Killed):
            loop.train(1).save(tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.pop("step-00000004.partial") is not None and left == whole
    resumed = Loop(progressive())
    resumed.load(tmp_path)
    assert resumed.handle.step == 3
    resumed.train(2).save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003.pt", "step-00000005.pt"]


def test_it_is_on_the_device_before_it_has_its_name(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = files.os.fsync, files.os.replace

    def noted_fsync(opened: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{opened}").is_dir() else "file")
        fsync(opened)

    def noted_replace(*paths: Any) -> None:
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    stopped(tmp_path, steps=1)
    assert calls == ["file", "rename", "folder"]


def test_a_system_that_opens_no_folder_has_checkpoints_too(tmp_path, monkeypatch):
    def refuse_folders(path, *rest, open_it=os.open, **options):
        if Path(path).is_dir():
            raise PermissionError(path)  # as Windows
        return open_it(path, *rest, **options)

    monkeypatch.setattr(files.os, "open", refuse_folders)
    stopped(tmp_path, steps=1)
    assert Loop(progressive()).load(tmp_path) is not None


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_stay(keep, tmp_path):
    loop = Loop(progressive()).seed()
    for _ in range(5):
        path = loop.train(1).save(tmp_path, keep=keep)
        assert path.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-{step:08d}.pt" for step in range(6 - keep, 6)]
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        loop.save(tmp_path, keep=0)


def damage_by_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["state"]["model"]["blocks.0.linear.weight"]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "bit": damage_by_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "not one": lambda path: path.write_text("hello"),
    "folder": lambda path: (path.unlink(), path.with_suffix("").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gets_one_warning_and_the_one_before_is_taken(damage, tmp_path):
    stopped(tmp_path)
    DAMAGES[damage](tmp_path / "step-00000005.pt")
    resumed = Loop(progressive())
    with pytest.warns(
        UserWarning, match="step-00000005.* cannot be read .*step-00000004"
    ) as caught:
        resumed.load(tmp_path)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert resumed.handle.step == 4
    # it is gone with the next save, and not taken for the newest
    resumed.train(1).save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005.pt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Loop(progressive()).load(tmp_path) is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_can_be_read_one_line_says_so_and_nothing_has_changed(damage, tmp_path):
    stopped(tmp_path)
    for step in (4, 5):
        DAMAGES[damage](tmp_path / f"step-0000000{step}.pt")
    loop = Loop(progressive())
    before = loop.handle.model.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    with pytest.raises(
        CheckpointError, match="step-00000005.* cannot be read .*delete it"
    ) as error:
        loop.load(tmp_path)
    assert "\n" not in str(error.value)
    assert differences(dict(loop.handle.model.state_dict()), before) == []


def test_a_later_damaged_one_does_not_cost_the_fresh_one(tmp_path):
    stopped(tmp_path)
    damage_by_a_bit(tmp_path / "step-00000005.pt")
    other = Loop(progressive()).seed().train(4)
    other.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004.pt"]


def test_the_folder_of_another_run_is_left_alone(tmp_path):
    stopped(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fresh = Loop(progressive()).seed().train(2)
    with pytest.raises(
        CheckpointError, match=r"step-00000005.pt is of a later step .*\(2\).*folder"
    ):
        fresh.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_another_format_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", 5)
        stopped(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="00005.pt has format 5, this version reads 4: fini"):
        Loop(progressive()).load(tmp_path)
    with pytest.raises(CheckpointError, match="of a later step"):  # it is not taken for damaged
        Loop(progressive()).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


@pytest.mark.parametrize("name", ["step-00000005.pt", "step-00000005/state.pt"])
def test_a_checkpoint_of_the_format_before_is_refused_in_one_line(name, tmp_path):
    """Weights and the optimizer's state went by name there, in a folder as None."""
    model = Toy().state_dict()
    if name.endswith("/state.pt"):
        (tmp_path / name).parent.mkdir()
        model = dict.fromkeys(model)
    optimizer = {"state": {}, "groups": [{"lr": 0.1, "params": [*model]}], "rest": {}}
    content = {"format": 2, "step": 5, "ranks": [], "extra": {}, "schedule": None}
    content |= {"tensors": {}, "model": model, "optimizer": optimizer, "scheduler": None}
    content |= {"files": [("__0_0.distcp", 7, 1)]} if name.endswith("/state.pt") else {}
    torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match="format 2, this version reads 4: finish") as error:
        Loop(progressive()).load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_a_file_holds_belongs_to_its_format(tmp_path):
    """Other keys need another FORMAT: loading takes all of them for granted."""
    stopped(tmp_path)
    content = torch.load(next(tmp_path.glob("step-*")), weights_only=True)
    keys = {"step", "seed", "ranks", "facts", "state", "scheduler", "best", "extra", "format"}
    assert content["format"] == 4
    assert {*content} == keys
    assert {*content["state"]} == {"model", "optimizer", "outside"}


def test_a_checkpoint_in_place_of_its_folder_is_no_new_run(tmp_path):
    stopped(tmp_path)
    file = next(tmp_path.glob("step-*"))
    with pytest.raises(CheckpointError, match="one checkpoint: give the folder"):
        Loop(progressive()).load(file)


@pytest.mark.parametrize(
    ("foreign", "message"), [(numpy.float64(0.5), "numpy"), (lambda: 0.5, "lambda")]
)
def test_what_could_not_be_read_back_is_not_written(foreign, message, tmp_path):
    loop = stopped(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loop.train(1).losses.append(foreign)
    with pytest.raises(TypeError, match=f"tensors, numbers, strings.*{message}"):
        loop.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
