"""Checkpoints of a training run, for loops of one's own: killed at any moment, a run goes on.

A checkpoint holds weights, optimizer, handle, learning rate scheduler, random numbers, where the
prefix cache keeps its rows, and whatever the loop wants to find again. There are two forms:

- `step-00000060.pt`, one file: of one process, or of ranks that all hold the whole model (rank 0
  writes, every rank reads).
- `step-00000060/`, a folder: of parameters sharded by `fully_shard`. Every rank writes its shards
  with `torch.distributed.checkpoint`; they can be read on any number of ranks.

Either is written beside, synchronised, and renamed, so that a reader and a killed writer meet a
whole one or none; what killed writers left is removed by the next save. Everything read is compared
with its CRC-32 first: torch.load itself takes a flipped bit for a weight.

Loading follows one order: the plan, then the optimizer, then the weights. State that is loaded
under another plan belongs to tensors that are frozen there, and would be released.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backend import one_line
from .patch import PatchHandle
from .random_state import random_state, set_random_state

_FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})(\.pt)?")
_STATE = "state.pt"  # of a folder: everything but the tensors of model and optimizer


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is of another run; the message says what to do."""


def save_checkpoint(
    folder: str | os.PathLike[str],
    handle: PatchHandle | nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    step: int | None = None,
) -> Path:
    """Write the checkpoint of the step that was made last; call it after `handle.advance()`.

    On several ranks all of them call it, with one folder that all see. Where it fails on one, it
    raises on all.

    Args:
        folder: of this run alone; it is made where it is missing.
        handle: what `patch_model` returned; a model, where nothing is scheduled.
        optimizer: any; its state is saved by the names of the parameters.
        scheduler: whatever has `state_dict` and `load_state_dict`.
        extra: what `load_checkpoint` returns: tensors, numbers, strings, lists and dicts of them.
            On several ranks that of the first is kept.
        keep: how many of the newest checkpoints stay.
        step: optimizer steps done; for a model without a handle.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: the folder holds a checkpoint of a later step, so that it is another
            run's. TypeError: something that cannot be loaded safely is to be saved.
        ValueError: `keep` is below 1, or there is no step. OSError: from the disk.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, got {keep}")
    model, patched = _model_and_handle(handle)
    step = patched.step if patched is not None else step
    if step is None:
        raise ValueError("a model without a handle needs step=")
    folder = Path(folder)
    sharded = any(_is_sharded(p) for p in model.parameters())
    ranks = _gather(_of_this_rank(model, patched))
    _together(lambda: _make_room(folder, step) if _rank() == 0 else None)
    name = f"step-{step:08d}"
    path, partial = folder / (name if sharded else f"{name}.pt"), folder / f"{name}.partial"
    content: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if sharded or _rank() == 0:
        content, tensors = _content(model, patched, optimizer, scheduler, apart=sharded)
        content |= {"format": _FORMAT, "step": step, "ranks": ranks, "extra": extra or {}}
    if sharded:
        content["files"] = _save_shards(partial, tensors)
    _together(lambda: _finish(content, partial, path, keep) if _rank() == 0 else None)
    return path


def load_checkpoint(
    folder: str | os.PathLike[str],
    handle: PatchHandle | nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: Any = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Go on from the newest checkpoint that can be read.

    Build model, schedule, optimizer and scheduler as for a new run, then call this, on all ranks. A
    damaged checkpoint gets one warning, and the one before it is taken; if there is none, an error.
    Nothing is changed before everything has been compared.

    Random numbers go on where they were, on each rank. Under another number of ranks than they were
    saved with, every rank gets new ones, from the saved seed, the step and its own number.

    Args:
        folder, handle, optimizer, scheduler: as `save_checkpoint` had them.
        check: called with what was saved as `extra` before anything is changed; it raises what it
            likes to refuse.

    Returns:
        The `extra` of the checkpoint ({} if it had none); None where the folder has no checkpoint.

    Raises:
        CheckpointError: none can be read, or it is of another model, schedule or optimizer.
    """
    found = _newest(Path(folder))
    if found is None:
        return None
    path, content = found
    if check is not None:
        check(content["extra"])
    model, patched = _model_and_handle(handle)
    _together(lambda: _compare(path, content, model, patched, optimizer, scheduler))
    weights, state = content["model"], content["optimizer"]["state"]
    if path.is_dir():
        _load_shards(path, model, optimizer, weights, state)
    else:
        _share_out(model, optimizer, weights, state)
    rank, ranks = _rank(), content["ranks"]
    own = ranks[rank] if len(ranks) == _world_size() else ranks[0]
    with _undone_if_it_fails(patched, optimizer, scheduler):
        if patched is not None:
            sharded = any(_is_sharded(p) for p in model.parameters())
            patched.load_state_dict(_handle_state(ranks, rank, was=path.is_dir(), sharded=sharded))
        optimizer.load_state_dict(_by_index(model, optimizer, content["optimizer"]))
        if scheduler is not None:
            scheduler.load_state_dict(content["scheduler"])
        model.load_state_dict(weights)  # last: there is no second copy to go back to
    if patched is not None:
        patched.accept_weights()
        if patched.cache is not None and own["cache"] is not None:
            patched.cache.expect(own["cache"])
    if len(ranks) == _world_size():
        set_random_state(own["random"], model)
    else:
        _seed_anew(ranks[0]["random"]["seed"], content["step"], rank)
    return content["extra"]


def _model_and_handle(handle: PatchHandle | nn.Module) -> tuple[nn.Module, PatchHandle | None]:
    if isinstance(handle, PatchHandle):
        return handle.model, handle
    if isinstance(handle, nn.parallel.DistributedDataParallel):
        handle = handle.module
    return handle, None


@contextmanager
def _undone_if_it_fails(*parts: Any) -> Iterator[None]:
    undo: list[Callable[[], Any]] = []
    for part in parts:
        if isinstance(part, Optimizer) and not hasattr(part, "optimizer"):
            # by reference: loading replaces what it holds, and a hook of the user that has refused
            # a state, or changed it, would do so again
            undo.append(
                functools.partial(_put_back, part, {**vars(part), "state": part.state.copy()})
            )
        elif part is not None:
            undo.append(functools.partial(part.load_state_dict, part.state_dict()))
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def _put_back(optimizer: Optimizer, own: dict[str, Any]) -> None:
    vars(optimizer).clear()
    vars(optimizer).update(own)


# what is saved


def _weights(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """The state dict, but for what modules write beside their tensors and take back from nobody.

    bitsandbytes' 4-bit layers write scales and a description that way, whose length changes.

    Returns:
        The state dict; and the parameters that what was left out describes: as numbers alone they
        mean nothing.
    """
    weights = model.state_dict()
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    foreign = {key for key in weights.keys() - known if key.rpartition(".")[2] != "_extra_state"}
    described: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False) if foreign else ():
        prefix = f"{path}." if path else ""
        inside = {key for key in foreign if key.startswith(prefix)}
        own_loader = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        if own_loader or module._load_state_dict_pre_hooks:
            foreign -= inside  # it takes them back
            continue
        for key in inside:
            name = key.removeprefix(prefix)
            if name.partition(".")[0] not in module._modules:
                del weights[key]
                foreign.remove(key)
                described += [prefix + p for p in module._parameters if name.startswith(f"{p}.")]
    return weights, described


def _content(
    model: nn.Module,
    patched: PatchHandle | None,
    optimizer: Optimizer,
    scheduler: Any,
    *,
    apart: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says, and tensors that are written beside it if `apart`."""
    weights, _ = _weights(model)
    saved = _by_name(model, optimizer)
    content = {
        "tensors": _shapes(weights),
        "model": weights,
        "optimizer": saved,
        "schedule": None if patched is None else repr(patched.schedule),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }
    tensors: dict[str, Tensor] = {}
    if apart:
        for kind, entries in (("model", {"": weights}), ("optimizer", saved["state"])):
            for owner, values in entries.items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[_key(kind, owner, key)] = value
                        values[key] = None
    return content, tensors


def _key(kind: str, owner: str, key: str) -> str:
    """The name of a tensor among the shards."""
    return f"{kind}/{owner}/{key}"


def _shapes(weights: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in weights.items() if isinstance(t, Tensor)}


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names in the optimizer's groups; a parameter from outside the model goes by its place."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names.get(id(p), f"({g}, {i})") for i, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def _by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, with names where it has numbers, and without empty entries."""
    saved = optimizer.state_dict()
    names = _parameter_names(model, optimizer)
    groups, by_number = [], {}
    for group, own in zip(saved["param_groups"], names, strict=True):
        by_number |= dict(zip(group["params"], own, strict=True))
        hyper = {k: v for k, v in group.items() if k != "param_names"}
        groups.append({**hyper, "params": own})
    state = {by_number[i]: dict(values) for i, values in saved["state"].items() if values}
    rest = {k: v for k, v in saved.items() if k not in ("state", "param_groups")}
    return {"state": state, "groups": groups, "rest": rest}


def _by_index(model: nn.Module, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """What `_by_name` made, as the optimizer itself would have saved it."""
    groups, state = [], {}
    for group, own in zip(saved["groups"], optimizer.param_groups, strict=True):
        first = sum(len(g["params"]) for g in groups)
        numbers = range(first, first + len(group["params"]))
        for i, name in zip(numbers, group["params"], strict=True):
            if name in saved["state"]:
                state[i] = saved["state"][name]
        kept = {"param_names": own["param_names"]} if "param_names" in own else {}
        groups.append({**group, **kept, "params": list(numbers)})
    return {"state": state, "param_groups": groups, **saved["rest"]}


def _compare(
    path: Path,
    content: dict[str, Any],
    model: nn.Module,
    patched: PatchHandle | None,
    optimizer: Optimizer,
    scheduler: Any,
) -> None:
    """Raise `CheckpointError` if the checkpoint is not of this run."""
    weights, described = _weights(model)
    there, here = content["tensors"], _shapes(weights)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            shapes = (f"{s[name]}" if name in s else "missing" for s in (there, here))
            raise CheckpointError(
                f"{path} is of another model: {name} is {' there and '.join(shapes)} here"
            )
    for name in described:
        saved = content["model"][name]  # None in shards
        if saved is not None and not torch.equal(weights[name].cpu(), saved):
            raise CheckpointError(
                f"{path} is of another model: {name} was quantised from other weights, or on "
                "another kind of device"
            )
    if (patched is None) != (content["schedule"] is None):
        has = "no schedule" if patched is not None else content["schedule"]
        raise CheckpointError(f"{path} was written with {has}, unlike this run")
    if patched is not None:
        # the handle compares before it moves; its own state makes this a move to where it is
        saved = content["ranks"][0]["handle"]
        same = {key: saved[key] for key in ("format", "num_blocks", "schedule")}
        try:
            patched.load_state_dict({**patched.state_dict(), **same})
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if (scheduler is None) != (content["scheduler"] is None):
        has = "a" if scheduler is None else "no"
        raise CheckpointError(f"{path} was written with {has} scheduler, unlike this run")
    saved_names = [group["params"] for group in content["optimizer"]["groups"]]
    names = _parameter_names(model, optimizer)
    if len(saved_names) != len(names):
        raise CheckpointError(
            f"{path}: the optimizer had {len(saved_names)} parameter groups, this one {len(names)}"
        )
    for i, (before, now) in enumerate(zip(saved_names, names, strict=True)):
        if before != now:
            at = next((n for n in range(min(len(before), len(now))) if before[n] != now[n]), None)
            what = f"{len(before)} and {len(now)} parameters"
            if at is not None:
                what = f"{before[at]} there where {now[at]} is here"
            raise CheckpointError(
                f"{path}: the optimizer was built over other parameters: group {i} has {what}"
            )


# random numbers


def _of_this_rank(model: nn.Module, patched: PatchHandle | None) -> dict[str, Any]:
    return {
        "random": {"seed": torch.initial_seed(), **random_state(model)},
        "handle": None if patched is None else patched.state_dict(),
        "cache": None if patched is None or patched.cache is None else patched.cache.manifest(),
    }


def _handle_state(
    ranks: list[dict[str, Any]], rank: int, *, was: bool, sharded: bool
) -> dict[str, Any]:
    """The handle's state for this rank, from those of the ranks that saved.

    They differ in the sums of squared gradient norms of an adaptive schedule's interval, where each
    rank had a shard of every gradient: the whole is cut into equal parts, whose sum is all that
    counts.

    Args:
        was, sharded: whether gradients were in shards there, and whether they are here.
    """
    if len(ranks) == _world_size() and was == sharded:
        return ranks[rank]["handle"]
    state = ranks[0]["handle"]
    sums = [
        r["handle"].get("gradient_norms", {}).get("sums") for r in (ranks if was else ranks[:1])
    ]
    if None in sums:
        return state
    parts = _world_size() if sharded else 1
    squares = [sum(column) / parts for column in zip(*(s[:-1] for s in sums), strict=True)]
    return {**state, "gradient_norms": {"sums": [*squares, sums[0][-1]]}}


def _seed_anew(seed: int, step: int, rank: int) -> None:
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


# files


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths, newest first."""
    names = ((_NAME.fullmatch(p.name), p) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(((int(m[1]), path) for m, path in names if m), reverse=True)


def _make_room(folder: Path, step: int) -> None:
    """Before a save: the folder is there, leftovers of killed writers and damaged files are not."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("step-*.partial"):
        _remove(partial)
    for later, path in _checkpoints(folder):
        if later <= step:
            return
        try:
            _read(path, 0, 1)
        except Exception:  # it was warned about, and would be in the way of what comes now
            _remove(path)
            continue
        raise CheckpointError(
            f"{path} is of a later step than this one ({step}): go on from it, or give this run "
            "another folder"
        )


def _finish(content: dict[str, Any], partial: Path, path: Path, keep: int) -> None:
    """Write `content`, give the checkpoint its name, drop the oldest ones."""
    _write(content, partial / _STATE if partial.is_dir() else partial)
    replaced = path.with_name(f"{path.name}.replaced.partial")
    if path.is_dir():
        os.rename(path, replaced)
    os.replace(partial, path)
    _sync(path.parent)
    _remove(replaced)
    same_step = path.with_suffix("" if path.suffix else ".pt")  # in the other form
    _remove(same_step)
    for _, old in _checkpoints(path.parent)[keep:]:
        _remove(old)


def _write(content: dict[str, Any], path: Path) -> None:
    """Write a file to the device.

    Raises:
        TypeError: it could not be read back without running code from it.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    finally:
        torch.serialization.set_crc32_options(checksums)
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        path.unlink()
        raise TypeError(
            f"a checkpoint holds tensors, numbers, strings, lists and dicts; this one has "
            f"{', '.join(sorted(foreign))}"
        )
    if path.name == _STATE:
        _sync(path.parent)


def _read(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What a checkpoint says; tensors of a folder are None.

    Every byte is looked at, of a folder's shards by one rank each.

    Raises:
        Exception: it is damaged; of many kinds.
    """
    file = path / _STATE if path.is_dir() else path
    with zipfile.ZipFile(file) as records:
        if (record := records.testzip()) is not None:
            raise ValueError(f"{record} in it is damaged")
    content = torch.load(file, map_location="cpu", weights_only=True)
    if content["format"] != _FORMAT:
        raise ValueError(f"it has format {content['format']}, this version reads {_FORMAT}")
    if path.is_dir():
        for i, (name, size, checksum) in enumerate(content["files"]):
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} in it is cut short")
            if i % ranks == rank and _checksum(path / name) != checksum:
                raise ValueError(f"{name} in it is damaged")
    return content


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that every rank can read."""
    paths = _gather([path for _, path in _checkpoints(folder)])[0]  # what the first rank sees
    damaged: list[str] = []
    rank, ranks = _rank(), _world_size()
    for path in paths:
        try:
            content = _together(lambda path=path: _read(path, rank, ranks))
        except Exception as error:  # a damaged file fails in many ways; none of them matters here
            damaged.append(f"{path} cannot be read ({one_line(error)})")
            continue
        if damaged and rank == 0:
            text = f"{'; '.join(damaged)}: going on from {path.name}"
            warnings.warn(text, stacklevel=3)
        return path, content
    if damaged:
        raise CheckpointError(f"{damaged[0]}; delete it to go on")
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have a change of names in a folder survive a loss of power."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


# shards


def _is_sharded(t: Any) -> bool:
    return hasattr(t, "to_local")


def _save_shards(partial: Path, tensors: dict[str, Tensor]) -> list[tuple[str, int, int]]:
    """Write a folder of shards, from all ranks; name, bytes and CRC-32 of every file."""
    import torch.distributed.checkpoint as dcp

    rank = _rank()
    _together(lambda: partial.mkdir() if rank == 0 else None)
    with _one_line_failures(partial):
        dcp.save(tensors, checkpoint_id=partial)  # synchronises every file
    own = [*partial.glob(f"__{rank}_*"), *([partial / ".metadata"] if rank == 0 else [])]
    checked = _together(lambda: [(p.name, p.stat().st_size, _checksum(p)) for p in own])
    return [file for part in _gather(checked) for file in part]


def _load_shards(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    weights: dict[str, Any],
    state: dict[str, dict[str, Any]],
) -> None:
    """Read every tensor that belongs to this rank into `weights` and `state`."""
    import torch.distributed.checkpoint as dcp

    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    here = model.state_dict()
    parameters = dict(_owners(model, optimizer))
    targets: dict[str, Tensor] = {}
    for key in weights:
        if (name := _key("model", "", key)) in saved:
            targets[name] = weights[key] = here[key]  # read to where it lies
    for owner, values in state.items():
        for key in values:
            if (name := _key("optimizer", owner, key)) in saved:
                p, entry = parameters[owner], saved[name]
                if tuple(entry.size) == tuple(p.shape):
                    values[key] = torch.empty_like(p, dtype=entry.properties.dtype)
                else:
                    values[key] = torch.empty(
                        entry.size, dtype=entry.properties.dtype, device="cpu"
                    )
                targets[name] = values[key]
    with warnings.catch_warnings(), _one_line_failures(path):
        warnings.filterwarnings("ignore", "torch.distributed is")  # one process: as intended
        dcp.load(targets, checkpoint_id=path)


@contextmanager
def _one_line_failures(path: Path) -> Iterator[None]:
    """What went wrong on some rank, without a traceback for each."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        raise CheckpointError(f"{path}: on rank {rank}: {one_line(error)}") from error


def _share_out(
    model: nn.Module,
    optimizer: Optimizer,
    weights: dict[str, Any],
    state: dict[str, dict[str, Any]],
) -> None:
    """Cut whole tensors into the shards that this rank's model has; where it has none, nothing."""
    if not any(_is_sharded(p) for p in model.parameters()):
        return
    for key, like in model.state_dict().items():
        if isinstance(like, Tensor) and key in weights:
            weights[key] = _sharded_as(like, weights[key])
    parameters = dict(_owners(model, optimizer))
    for owner, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[owner].shape:
                values[key] = _sharded_as(parameters[owner], value)


def _sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # every rank has the whole: nothing is sent
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _owners(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    names = _parameter_names(model, optimizer)
    for group, own in zip(optimizer.param_groups, names, strict=True):
        yield from zip(own, group["params"], strict=True)


# ranks


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def _rank() -> int:
    return torch.distributed.get_rank() if _world_size() > 1 else 0


def _gather(one: Any) -> list[Any]:
    """What each rank gave, on every rank."""
    if _world_size() == 1:
        return [one]
    all_: list[Any] = [None] * _world_size()
    torch.distributed.all_gather_object(all_, one)
    return all_


def _together(action: Callable[[], Any]) -> Any:
    """Call it on this rank; if it fails on one, raise on all, so that nobody waits for another."""
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    texts = _gather(None if error is None else one_line(error))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise CheckpointError(f"on rank {rank}: {text}")
    return result
