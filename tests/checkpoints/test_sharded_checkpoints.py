"""Checkpoints of several ranks go to any other number of ranks."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import process_group, run_ranks
from soak import differences
from toy_runs import WIDTH, WORDS, Loop, Toy, masked_adamw, progressive

from progtuning_kernels import AdaptiveSchedule, patch_model
from progtuning_kernels.checkpoints import CheckpointError, files
from progtuning_kernels.optim.moments import wide_moments

_starts = itertools.count()


def on_ranks(check: Callable[[int, int, Path], None], size: int, folder: Path) -> None:
    """`check(rank, size, folder)` in `size` forks of this process, which has imported everything.

    Ranks in processes of their own, and no group at all where `size` is 0.
    """
    store = str(folder / f"store-{next(_starts)}")
    pids = []
    for rank in range(max(1, size)):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            with process_group(rank, store, count=size) if size else nullcontext():
                check(rank, size, folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status:
            for other in pids:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise AssertionError(f"{check.__name__} on {size} ranks: status {status}")


def words(step: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (8, 5), generator=torch.Generator().manual_seed(step))


class Sharded(Loop):
    """The same loop on every rank's part of fixed batches, without dropout."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        sharded: bool = True,
        schedule: Any = None,
        width: int = WIDTH,  # 6 rows: 2 of 4 ranks have an uneven share
        **options: Any,
    ) -> None:
        self._rows = slice(8 // size * rank, 8 // size * (rank + 1))
        torch.manual_seed(0)
        model = Toy(width=width, dropout=0.0)
        if sharded:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        self.handle = patch_model(model, schedule or progressive())
        self.optimizer = masked_adamw(self.handle, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (1 + s))
        self.losses = []

    def train(self, steps: int) -> Sharded:
        for _ in range(steps):
            self.handle.model(words(self.handle.step)[self._rows]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.handle.advance()
        return self

    def whole(self) -> dict[str, Any]:
        """Weights and moments, put together on every rank."""

        def full(t: torch.Tensor) -> torch.Tensor:
            return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()

        found: dict[str, Any] = {}
        for name, p in self.handle.model.named_parameters():
            found[name] = full(p)
            if state := self.optimizer.state.get(p):
                found[f"{name}/step"] = state["step"].clone()
                for key, value in zip(("exp_avg", "exp_avg_sq"), wide_moments(state), strict=True):
                    found[f"{name}/{key}"] = full(value)
        return found


def check_save(rank: int, size: int, folder: Path) -> None:
    loop = Sharded(rank, size)
    for _ in range(3):
        loop.train(2)
        path = loop.save(folder / "sharded")
    assert path.is_dir() and path.name == "step-00000006"
    assert [p.name for p in sorted(path.parent.iterdir())] == ["step-00000004", "step-00000006"]
    torch.distributed.barrier()
    before, expected = loop.whole(), loop.train(4).whole()
    if rank == 0:
        torch.save(before, folder / "before.pt")
        torch.save(expected, folder / "expected.pt")


def check_same_ranks(rank: int, size: int, folder: Path) -> None:
    loop = Sharded(rank, size)
    assert loop.load(folder / "sharded") is not None and loop.handle.step == 6
    state = loop.optimizer.state
    assert {p for p in loop.handle.model.parameters() if p.requires_grad} == set(state)
    expected = torch.load(folder / "expected.pt")
    assert differences(loop.train(4).whole(), expected) == []


def check_other_ranks(rank: int, size: int, folder: Path, *, sharded: bool = True) -> None:
    loop = Sharded(rank, size, sharded=sharded)
    loop.load(folder / "sharded")
    assert differences(loop.whole(), torch.load(folder / "before.pt")) == []
    found, expected = loop.train(4).whole(), torch.load(folder / "expected.pt")
    assert found.keys() == expected.keys()  # and no state of frozen tensors
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def check_one_file_into_shards(rank: int, size: int, folder: Path) -> None:
    loop = Sharded(rank, size)
    loop.load(folder / "one-file")
    assert loop.handle.step == 6
    found, expected = loop.train(4).whole(), torch.load(folder / "expected.pt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    # the other form takes the place of the one that was there
    path = loop.save(folder / "one-file")
    assert path.name == "step-00000010"
    again = Sharded(rank, size)
    again.load(folder / "one-file")
    assert differences(again.whole(), loop.whole()) == []


def check_damage(rank: int, size: int, folder: Path) -> None:
    newest = folder / "sharded" / "step-00000006"
    shard = next(newest.glob("__1_*"))
    if rank == 0:  # of what the other rank wrote, and will look at
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        (folder / "sharded" / "step-00000008.partial").mkdir()
    torch.distributed.barrier()
    loop = Sharded(rank, size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.load(folder / "sharded")
    assert loop.handle.step == 4
    texts = [str(w.message) for w in caught if "cannot be read" in str(w.message)]
    assert len(texts) == (rank == 0) and all("damaged" in text for text in texts)
    loop.train(2).save(folder / "sharded")
    torch.distributed.barrier()
    names = sorted(p.name for p in (folder / "sharded").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    expected = torch.load(folder / "expected.pt")
    assert differences(loop.train(4).whole(), expected) == []


def check_replicas(rank: int, size: int, folder: Path) -> None:
    """One file, by the first rank; random numbers of every rank."""
    loop = Sharded(0, 1, sharded=False).train(2)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(100 + rank)
    path = loop.save(folder / "replicas")
    assert path.is_file()
    drawn = torch.rand(3), random.random(), numpy.random.random()
    again = Sharded(0, 1, sharded=False)
    again.load(folder / "replicas")
    assert differences((torch.rand(3), random.random(), numpy.random.random()), drawn) == []
    assert differences(again.whole(), loop.whole()) == []
    # a rank on its own trouble: nobody is left waiting
    with pytest.raises(CheckpointError if rank == 0 else KeyError, match="on rank 1|mine"):
        files.together(lambda: {}["mine"] if rank == 1 else None)


def check_replicas_elsewhere(rank: int, size: int, folder: Path) -> None:
    draws = []
    for _ in range(2):
        loop = Sharded(0, 1, sharded=False)
        loop.load(folder / "replicas")
        draws.append((torch.rand(3), random.random(), numpy.random.random()))
    assert differences(*draws) == []  # the same each time, and others on other ranks
    everyone: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyone, draws[0][1])
    assert len(set(everyone)) == size


# with rows of 72 elements no shard of 2 or 4 ranks begins at a multiple of 256, with 256 each does
KINDS = {
    "bfloat16": {"state_dtype": torch.bfloat16},
    "same blocks": {"width": 256, "state_dtype": "8bit"},
    "other blocks": {"width": 72, "state_dtype": "8bit"},
}


def check_moves(rank: int, size: int, folder: Path) -> None:
    """From 2 ranks to none, 4 and 1, each loading what the last has saved; torch's full state dict
    goes from 2 to 4, too.
    """
    from torch.distributed.checkpoint import state_dict as by_torch

    whole = by_torch.StateDictOptions(full_state_dict=True, cpu_offload=True)
    for kind, options in KINDS.items():
        loop = Sharded(rank, max(1, size), sharded=size > 0, **options)
        path = folder / kind
        if loop.load(path) is None:
            loop.train(6).save(path)
            again = Sharded(rank, size, **options)
            again.load(path)
            found, expected = again.optimizer.state_dict(), loop.optimizer.state_dict()
            assert differences(*map(own_parts, (found, expected))) == []  # codes and scales
            before = loop.whole()
            full = by_torch.get_optimizer_state_dict(
                loop.handle.model, loop.optimizer, options=whole
            )
            straight = loop.train(4).whole()
            assert differences(again.train(4).whole(), straight) == []
            if rank == 0:
                torch.save((before, straight), path / "expected.pt")
                torch.save(full, path / "full.pt")
            continue
        before, straight = torch.load(path / "expected.pt")
        found = loop.whole()
        for name, value in before.items():
            if kind == "other blocks" and "/exp" in name:  # half a step of the code, at its largest
                torch.testing.assert_close(found[name], value, rtol=0, atol=value.abs().max() / 63)
            else:
                assert torch.equal(found[name], value), f"{kind}, {name}"
        if size == 4 and kind != "other blocks":
            other = Sharded(rank, size, **options)
            other.handle.seek(6)
            full = torch.load(path / "full.pt")
            by_torch.set_optimizer_state_dict(
                other.handle.model, other.optimizer, full, options=whole
            )
            moments = other.whole()
            assert all(torch.equal(moments[n], before[n]) for n in before if "/exp" in n), kind
        loop.save(path)
        if rank == 0:
            torch.save((found, straight), path / "expected.pt")
        for name, value in loop.train(4).whole().items():
            torch.testing.assert_close(value, straight[name], rtol=2e-2, atol=2e-3)


def own_parts(t: Any) -> Any:
    """A state dict with this rank's part of every tensor."""
    if isinstance(t, dict):
        return {key: own_parts(value) for key, value in t.items()}
    return t.to_local() if hasattr(t, "to_local") else t


def check_one_process(rank: int, size: int, folder: Path) -> None:
    """Without a group, the model whole."""
    check_other_ranks(0, 1, folder, sharded=False)
    loop = Sharded(0, 1, sharded=False)
    loop.load(folder / "sharded")
    loop.save(folder / "one-file")


def check_norms(rank: int, size: int, folder: Path) -> None:
    """Those of the interval under way: of the same shards they go on, of others they begin anew."""
    loop = Sharded(rank, size, schedule=AdaptiveSchedule(4))
    if size == 2:
        loop.train(2).save(folder / "norms")
        saved = loop.handle.state_dict()
        assert saved["gradient_norms"]["sums"] is not None
        loop = Sharded(rank, size, schedule=AdaptiveSchedule(4))
        loop.load(folder / "norms")
        assert loop.handle.state_dict() == saved
    else:
        loop.load(folder / "norms")
        assert loop.handle.state_dict()["gradient_norms"]["sums"] is None
    loop.train(2)
    assert loop.handle.schedule.decisions == {3: 0}


PLAN = (
    *((check_moves, size) for size in (2, 0, 4, 1)),
    (check_norms, 2),
    (check_norms, 1),
    (check_save, 2),
    (check_same_ranks, 2),
    (check_other_ranks, 1),
    (check_other_ranks, 4),
    (check_one_process, 0),
    (check_one_file_into_shards, 2),
    (check_damage, 2),
    (check_replicas, 2),
    (check_replicas_elsewhere, 3),
)


def run(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    for check, size in PLAN:
        on_ranks(check, size, Path(folder))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_shards_go_from_any_number_of_ranks_to_any_other(tmp_path):
    run_ranks(run, str(tmp_path), count=1)  # it has trained nothing yet, and can be forked
