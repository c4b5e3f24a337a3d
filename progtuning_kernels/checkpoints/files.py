"""Checkpoints on the disk: whole or not there, and every byte looked at before it is used.

One is written beside its place, synchronised, and renamed; what killed writers left is removed by
the next save. Reading compares everything with its CRC-32: torch.load itself takes a flipped bit
for a weight.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization

from ..backend import one_line

FORMAT = 4
_NAME = re.compile(r"step-(\d{8,})(\.pt)?")
_STATE = "state.pt"  # of a folder: everything but the tensors that are in its shards


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is of another run; the message says what to do."""


def paths_of(folder: Path, step: int, *, sharded: bool) -> tuple[Path, Path]:
    """Where the checkpoint of a step is, and where it is until it is whole."""
    name = f"step-{step:08d}"
    return folder / (name if sharded else f"{name}.pt"), folder / f"{name}.partial"


def make_room(folder: Path, step: int) -> None:
    """Make the folder; remove leftovers of killed writers, and later files that are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("step-*.partial"):
        _remove(partial)
    for later, path in _checkpoints(folder):
        if later <= step:
            return
        try:
            _read(path, 0, 1)
        except Exception:  # it is damaged, and would be taken for the newest of what comes now
            _remove(path)
            continue
        raise CheckpointError(
            f"{path} is of a later step than this one ({step}): go on from it, or give this run "
            "another folder"
        )


def finish(content: dict[str, Any], partial: Path, path: Path, keep: int) -> None:
    """Write `content`, give the checkpoint its name, remove all but the `keep` newest."""
    in_folder = partial.is_dir()
    _write(content | {"format": FORMAT}, partial / _STATE if in_folder else partial)
    if in_folder:
        _sync(partial)
    replaced = path.with_name(f"{path.name}.replaced.partial")
    if path.is_dir():
        os.rename(path, replaced)
    os.replace(partial, path)
    _sync(path.parent)
    _remove(replaced)
    _remove(path.with_suffix("" if path.suffix else ".pt"))  # of this step, in the other form
    for _, old in _checkpoints(path.parent)[keep:]:
        _remove(old)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that every rank can read, and what it says; None: there is none."""
    if folder.is_file() or _NAME.fullmatch(folder.name):
        raise CheckpointError(f"{folder} is one checkpoint: give the folder that it is in")
    damaged: list[str] = []
    rank, ranks = this_rank(), world_size()
    for _, path in gather(_checkpoints(folder))[0]:  # what the first rank sees
        try:
            content = together(_read, path, rank, ranks)
        except Exception as error:  # a damaged file raises one of many kinds
            damaged.append(f"{path} cannot be read ({one_line(error)})")
            continue
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {content['format']}, this version reads {FORMAT}: finish "
                "that run with the version that wrote it, or give this one another folder"
            )
        if damaged and rank == 0:
            text = f"{'; '.join(damaged)}: going on from {path.name}"
            warnings.warn(text, stacklevel=3)
        return path, content
    if damaged:
        raise CheckpointError(f"{damaged[0]}; delete it to go on")
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths, newest first."""
    names = ((_NAME.fullmatch(p.name), p) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(((int(m[1]), path) for m, path in names if m), reverse=True)


def _write(content: dict[str, Any], path: Path) -> None:
    """Write a file to the device; TypeError if reading it back would run code from it."""
    checksums_on = serialization.patch("save.compute_crc32", True)  # pyright: ignore
    allowed = "a checkpoint holds tensors, numbers, strings, lists and dicts"
    try:
        with checksums_on, path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (AttributeError, TypeError, pickle.PicklingError) as error:  # a lambda, a lock
        path.unlink()
        raise TypeError(f"{allowed}: {one_line(error)}") from None
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        path.unlink()
        raise TypeError(f"{allowed}; this one has {', '.join(sorted(foreign))}")


def _read(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What a checkpoint says, if nothing is damaged; every rank looks at its part of the shards."""
    file = path / _STATE if path.is_dir() else path
    with zipfile.ZipFile(file) as records:
        if (record := records.testzip()) is not None:
            raise ValueError(f"{record} in it is damaged")
    content = torch.load(file, map_location="cpu", weights_only=True)
    if content["format"] == FORMAT:
        for name, checksum in content.get("files", ())[rank::ranks]:
            if checksum_of(path / name) != checksum:
                raise ValueError(f"{name} in it is damaged")
    return content


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have a change of names in a folder survive a loss of power."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    os.fsync(opened)
    os.close(opened)


def checksum_of(path: Path) -> int:
    """CRC-32 of a file, which is read in parts."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


# ranks


def world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def this_rank() -> int:
    return torch.distributed.get_rank() if world_size() > 1 else 0


def gather(one: Any) -> list[Any]:
    """What each rank gave, on every rank."""
    if world_size() == 1:
        return [one]
    everyone: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everyone, one)
    return everyone


def together(action: Callable[..., Any], *args: Any) -> Any:
    """Call it on this rank; if it fails on one, raise on all, so that no rank waits for another."""
    result, error = None, None
    try:
        result = action(*args)
    except Exception as raised:
        error = raised
    texts = gather(None if error is None else one_line(error))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise CheckpointError(f"on rank {rank}: {text}")
    return result


def on_first(action: Callable[..., Any], *args: Any) -> None:
    """Have the first rank do it; if it fails, raise on all."""
    together(lambda: action(*args) if this_rank() == 0 else None)
