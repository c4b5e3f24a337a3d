"""Checkpoints of a training run, for loops of one's own: killed at any moment, a run goes on.

A checkpoint is one file, `step-00000060.pt`, written by rank 0. Of parameters that `fully_shard`
has sharded it is a folder, `step-00000060/`: every rank writes its shards, and any number of ranks
reads them (`torch.distributed.checkpoint`; for one process it takes 1.5 times as long as
`torch.save`). The optimizer's state goes by the numbers in its own state dict, once its parameters
have the same names: `torch.distributed.checkpoint.state_dict` would have a new optimizer make a
step to get a state, and knows no parameter from outside the model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..backend import one_line
from ..distributed import put_shards_back, unwrap
from ..patch import PatchHandle
from ..random_state import random_state, seed_generators, set_random_state
from ..sharding import is_sharded, local_of
from ..zero import is_partitioned
from . import files
from .files import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

_ANY_SHAPE = "something"


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
        optimizer: any; its parameters are compared by name when it is loaded.
        scheduler: whatever has `state_dict` and `load_state_dict`.
        extra: what `load_checkpoint` returns: tensors, numbers, strings, lists and dicts of them.
            On several ranks that of the first is kept.
        keep: how many of the newest checkpoints stay.
        step: number of optimizer steps done; for a model without a handle.

    Returns:
        The path of the checkpoint: `step-<8 digits>.pt`, a folder where parameters are sharded.

    Raises:
        CheckpointError: the folder holds a checkpoint of a later step, so that it is another
            run's; or another rank has failed; or the model trains under DeepSpeed's ZeRO.
        TypeError: something that cannot be loaded safely is to be saved.
        ValueError: `keep` is below 1, or there is no step.
        OSError: from the disk.

    Example:
        ```python
        extra = load_checkpoint("runs/mine", handle, optimizer)  # None: nothing there yet
        save_checkpoint("runs/mine", handle, optimizer, extra={"epoch": 1})
        ```
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, got {keep}")
    model, patched = _model_and_handle(handle)
    step = patched.step if patched is not None else step
    if step is None:
        raise ValueError("a model without a handle needs step=")
    sharded = _has_shards(model)
    path, partial = files.paths_of(Path(folder), step, sharded=sharded)
    ranks = files.gather(_state_of_rank(model, patched))
    files.on_first(files.make_room, path.parent, step)
    content: dict[str, Any] = {}
    if sharded or files.this_rank() == 0:
        content = {
            "step": step,
            "seed": torch.initial_seed(),
            "ranks": ranks,
            "facts": _facts(model, patched, optimizer, scheduler),
            "state": {
                "model": model.state_dict(),
                "optimizer": _optimizer_state(optimizer),
                "outside": {i: p.detach() for i, p in _outside(model, optimizer).items()},
            },
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "best": None if patched is None else patched.state_dict().get("best"),
            "extra": extra or {},
        }
    if sharded:
        content["files"] = _save_shards(partial, content["state"])
    files.on_first(files.finish, content, partial, path, keep)
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
    A load that fails changes nothing.

    Random numbers go on where they were, on each rank. Under another number of ranks than they were
    saved with, every rank gets new ones, from the saved seed, the step and its own number, and an
    adaptive schedule of a sharded model measures the interval under way anew.

    Args:
        folder: as `save_checkpoint` had it.
        handle: as it had it; the weights of its model are replaced, and its step is.
        optimizer: as it had it; its state and the numbers in its groups are replaced.
        scheduler: as it had it; its state is replaced.
        check: called with what was saved as `extra` before anything is changed; it raises what it
            likes to refuse.

    Returns:
        The `extra` of the checkpoint ({} if it had none); None where the folder has no checkpoint.

    Raises:
        CheckpointError: none can be read, or it is of another model, schedule, optimizer or
            version of this package; or `folder` is a checkpoint, and not the folder of a run; or
            the model trains under DeepSpeed's ZeRO.
    """
    model, patched = _model_and_handle(handle)
    found = files.newest(Path(folder))
    if found is None:
        return None
    path, content = found
    if check is not None:
        check(content["extra"])
    files.together(_compare, path, content, _facts(model, patched, optimizer, scheduler), model)
    ranks, state = content["ranks"], content["state"]
    same_ranks = len(ranks) == files.world_size()
    own = ranks[files.this_rank() if same_ranks else 0]
    with _undone_if_it_fails(model, patched, optimizer, scheduler):
        _to_this_rank(path, state, model, optimizer)
        if patched is not None:  # first: another plan would release what it freezes
            was_sharded, sharded = path.is_dir(), _has_shards(model)
            if was_sharded != sharded or (sharded and not same_ranks):
                own["handle"]["gradient_norms"] = {"sums": None}  # those were of other shards
            patched.load_state_dict(own["handle"] | {"best": content.get("best")})
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(content["scheduler"])
        model.load_state_dict(state["model"], strict=False)  # what is missing has been compared
        with torch.no_grad():
            for i, parameter in _outside(model, optimizer).items():
                parameter.copy_(state["outside"][i])
    if patched is not None and patched.cache is not None and own["cache"] is not None:
        patched.cache.rows.expect(own["cache"])
    if same_ranks:
        set_random_state(own["random"], model)
    else:
        seed_generators(content["seed"], content["step"], files.this_rank())
    return content["extra"]


def _model_and_handle(handle: PatchHandle | nn.Module) -> tuple[nn.Module, PatchHandle | None]:
    if isinstance(handle, PatchHandle):
        model, patched = handle.model, handle
    else:
        model, patched = unwrap(handle), None
    if is_partitioned(model):
        raise CheckpointError(
            "DeepSpeed's ZeRO keeps a slice of the optimizer's state on every rank: call "
            "engine.save_checkpoint and engine.load_checkpoint, then "
            "handle.seek(engine.global_steps)"
        )
    put_shards_back(model)
    return model, patched


def _has_shards(model: nn.Module) -> bool:
    return any(map(is_sharded, model.parameters()))


@contextmanager
def _undone_if_it_fails(
    model: nn.Module, patched: PatchHandle | None, optimizer: Optimizer, scheduler: Any
) -> Iterator[None]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    # by reference: loading replaces what an optimizer holds, and a hook of the user that has
    # refused a state, or changed it, would do so again
    held = {**vars(inner), "state": inner.state.copy()}
    weights = *model.parameters(), *model.buffers(), *_outside(model, optimizer).values()
    tensors = [local_of(t).detach() for t in weights]
    values = [t.to("cpu", copy=True) for t in tensors]
    with ExitStack() as undo:  # the last of these is done first
        if scheduler is not None:
            undo.callback(scheduler.load_state_dict, scheduler.state_dict())
        undo.callback(vars(inner).update, held)
        undo.callback(vars(inner).clear)
        if patched is not None:
            undo.callback(patched.load_state_dict, patched.state_dict())
        undo.callback(lambda: [t.copy_(v) for t, v in zip(tensors, values, strict=True)])
        yield
        undo.pop_all()


# what is saved


def _facts(
    model: nn.Module, patched: PatchHandle | None, optimizer: Optimizer, scheduler: Any
) -> dict[str, str]:
    """What must be the same in a run that goes on: names, shapes, schedule, groups."""
    facts = {
        "the schedule": "none" if patched is None else repr(patched.schedule),
        "the learning rate scheduler": "none" if scheduler is None else "some",
    }
    rows = {} if patched is None else patched.freezer.rows.state_dict()
    facts |= {f"what trains of {name}": f"rows {runs}" for name, runs in rows.items()}
    # other entries have any shape: bitsandbytes writes descriptions of changing length for 4-bit
    # layers, and does not take them back
    named = (model.named_parameters, model.named_buffers)
    known = {name for names in named for name, _ in names(remove_duplicate=False)}
    for key, value in model.state_dict().items():
        has_shape = key in known and isinstance(value, Tensor)
        facts[key] = f"{[*value.shape]}" if has_shape else _ANY_SHAPE
    names = {id(p): name for name, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            here = f"parameter {i} of the optimizer's group {g}"
            facts[here] = names.get(id(p), f"from outside the model, {[*p.shape]}")
    return facts


def _outside(model: nn.Module, optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """By their numbers in the optimizer: parameters that the model does not hold, as a head of the
    user's own, or weights of a loss.
    """
    own = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: p for i, p in enumerate(parameters) if id(p) not in own}


def _compare(path: Path, content: dict[str, Any], facts: dict[str, str], model: nn.Module) -> None:
    """Raise `CheckpointError` if the checkpoint is not of this run, whose facts are `facts`."""
    for what in {**facts, **content["facts"]}:
        there, here = content["facts"].get(what, "missing"), facts.get(what, "missing")
        if there != here:
            raise CheckpointError(
                f"{path} is of another run: {what} is {there} there and {here} here"
            )
    weights, saved = model.state_dict(), content["state"]["model"]
    # such as scales, which stay those of this model
    beside = [name for name, fact in facts.items() if fact == _ANY_SHAPE]
    for name in weights:
        quantised = any(key.startswith(f"{name}.") for key in beside)
        if quantised and not saved[name].is_meta:
            if not torch.equal(weights[name].cpu(), saved[name]):
                raise CheckpointError(
                    f"{path} is of another model: {name} was quantised from other weights, or on "
                    "another kind of device"
                )


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Its state dict without empty entries, and without names, of which it keeps its own."""
    saved = optimizer.state_dict()
    state = {i: dict(values) for i, values in saved["state"].items() if values}
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def _state_of_rank(model: nn.Module, patched: PatchHandle | None) -> dict[str, Any]:
    """What differs between ranks: not the weights of the best score."""
    handle = None if patched is None else patched.state_dict()
    return {
        "random": random_state(model),
        "handle": handle and {k: v for k, v in handle.items() if k != "best"},
        "cache": None if patched is None or not patched.cache else patched.cache.rows.manifest(),
    }


# shards


def _save_shards(partial: Path, state: dict[str, Any]) -> list[tuple[str, int]]:
    """Move the tensors of all ranks from `state` to a folder; name and CRC-32 of every file."""
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Tensor] = {}
    for name, _, values, key in _entries(state):
        if isinstance(value := values[key], Tensor):
            tensors[name] = value
            values[key] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    files.on_first(partial.mkdir)
    _copy_shards(save, tensors, partial)  # synchronises every file
    own = [*partial.glob(f"__{files.this_rank()}_*")]
    if files.this_rank() == 0:
        own.append(partial / ".metadata")
    checked = files.together(lambda: [(file.name, files.checksum_of(file)) for file in own])
    return [file for of_rank in files.gather(checked) for file in of_rank]


def _to_this_rank(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer
) -> None:
    """Cut the tensors of a file into the shards of this rank, or read them from a folder."""
    here = model.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets: dict[str, Tensor] = {}
    for name, i, values, key in _entries(state):
        like: Any = here.get(key) if i is None else parameters[i]
        value = values[key]
        if not isinstance(value, Tensor):
            continue
        alike = isinstance(like, Tensor) and like.shape == value.shape
        if value.is_meta:
            if not alike:
                like = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            # weights to where they lie: there may be no room for them twice
            targets[name] = like if i is None else torch.empty_like(like, dtype=value.dtype)
            values[key] = targets[name]
        elif alike and is_sharded(like):
            from torch.distributed.tensor import distribute_tensor

            own: Any = like
            whole = value.to(own.device)  # every rank has it: nothing is sent
            sharding = own.device_mesh, own.placements
            values[key] = distribute_tensor(whole, *sharding, src_data_rank=None)
    if path.is_dir():
        from torch.distributed.checkpoint.state_dict_loader import load

        _copy_shards(load, targets, path)


def _entries(state: dict[str, Any]) -> Iterator[tuple[str, int | None, dict[Any, Any], Any]]:
    """Of all weights and entries of the optimizer's state: a name, the number of the parameter in
    the optimizer (None for a weight of the model), the dict that holds the entry, its key there.
    """
    yield from ((f"model/{key}", None, state["model"], key) for key in state["model"])
    yield from ((f"outside/{i}", i, state["outside"], i) for i in state["outside"])
    for i, values in state["optimizer"]["state"].items():
        yield from ((f"optimizer/{i}/{key}", i, values, key) for key in values)


def _copy_shards(copy: Callable[..., Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Call torch's `save` or `load`; a failure on some rank is one line, not a traceback each."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process: as intended
            copy(tensors, checkpoint_id=path)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        raise CheckpointError(f"{path}: on rank {rank}: {one_line(error)}") from error
