"""A load that is refused, or fails half way, changes nothing."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from soak import differences
from toy_runs import Loop, Toy, progressive, stopped

from progtuning_kernels import (
    MaskedAdamW,
    PatchHandle,
    ProgressiveSchedule,
    RandomBlockSchedule,
)
from progtuning_kernels.checkpoints import CheckpointError, load_checkpoint, save_checkpoint


def _only_one_group(handle: PatchHandle) -> torch.optim.Optimizer:
    return MaskedAdamW(handle.model.parameters())


def _other_order(handle: PatchHandle) -> torch.optim.Optimizer:
    groups = handle.param_groups(lr=0.02, weight_decay=0.1)
    return MaskedAdamW(
        [{**g, "params": g["params"][::-1], "param_names": g["param_names"][::-1]} for g in groups]
    )


OTHERS = {
    "width": (
        dict(width=8),
        r"of another run: embeddings.weight is \[20, 6\] there and \[20, 8\] here",
    ),
    "blocks": (
        dict(blocks=5),
        r"of another run: blocks.4.norm.weight is missing there and \[6\] here",
    ),
    "schedule": (
        dict(schedule=ProgressiveSchedule(2, 12)),
        r"the schedule is .*stages=4.* there and .*stages=2",
    ),
    "groups": (
        dict(optimizer=_only_one_group),
        "parameter 1 of the optimizer's group 0 is blocks.0.lin",
    ),
    "order": (
        dict(optimizer=_other_order),
        "parameter 0 of the optimizer's group 0 is embeddings.weight there and head.weight here",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_other_runs_get_one_line_and_change_nothing(name, tmp_path):
    stopped(tmp_path)
    options, message = OTHERS[name]
    loop = Loop(**{"schedule": progressive(), **options}).seed()
    before = (
        torch.get_rng_state(),
        {n: t.clone() for n, t in loop.handle.model.state_dict().items()},
    )
    with pytest.raises(CheckpointError, match=message) as error:
        loop.load(tmp_path)
    assert "\n" not in str(error.value)
    after = torch.get_rng_state(), dict(loop.handle.model.state_dict())
    assert differences(after, before) == [] and loop.handle.step == 0 and not loop.optimizer.state


def test_a_schedule_or_scheduler_on_one_side_only_is_refused(tmp_path):
    loop = stopped(tmp_path)
    with pytest.raises(CheckpointError, match="rate scheduler is some there and none here"):
        load_checkpoint(tmp_path, loop.handle, loop.optimizer)
    with pytest.raises(
        CheckpointError, match=r"the schedule is ProgressiveSchedule\(.* there and none here"
    ):
        model = Toy()
        load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match=r"the schedule is none there and Prog.* here"):
        other = tmp_path / "other"
        save_checkpoint(other, Toy(), loop.optimizer, step=1)
        load_checkpoint(other, loop.handle, loop.optimizer)


class _Refuses:
    """A scheduler that does not take what it is given."""

    def __init__(self) -> None:
        self.refuses = False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise ValueError("of another kind")


def _spoil_state(loop: Loop, patch: pytest.MonkeyPatch) -> None:
    real = loop.optimizer.load_state_dict
    spoilt = iter([True])

    def load(state: dict[str, Any]) -> None:
        real(state)
        if next(spoilt, False):
            raise ValueError("of another kind")

    patch.setattr(loop.optimizer, "load_state_dict", load)


def _refuse(*_: Any) -> None:
    raise ValueError("of another kind")


@pytest.mark.parametrize("what", ["optimizer", "hook", "scheduler", "weights"])
def test_a_load_that_fails_half_way_changes_nothing(what, tmp_path, monkeypatch):
    """In the middle of a run, where there is a state to lose: blocks 0 to 2 freeze at step 8."""
    later = Loop(RandomBlockSchedule(2, 2, seed=1)).seed()
    later.scheduler = _Refuses()
    later.scheduler.step = lambda: None
    later.train(9).save(tmp_path)
    loop = Loop(RandomBlockSchedule(2, 2, seed=1)).seed()
    loop.scheduler = later.scheduler
    loop.train(3)
    before = copy.deepcopy(loop.all())
    flags = [p.requires_grad for p in loop.handle.model.parameters()]
    if what == "optimizer":
        _spoil_state(loop, monkeypatch)
    if what == "hook":
        hook = loop.optimizer.register_load_state_dict_pre_hook(_refuse)
    if what == "weights":
        hook = loop.handle.model.blocks[2].register_load_state_dict_post_hook(_refuse)
    loop.scheduler.refuses = what == "scheduler"
    for number, seed in enumerate((torch.manual_seed, random.seed, numpy.random.seed)):
        seed(number)
    with pytest.raises(ValueError, match="of another kind"):
        loop.load(tmp_path)
    now = loop.all()
    torch.manual_seed(0), random.seed(1), numpy.random.seed(2)
    before["random"] = (torch.get_rng_state(), random.random(), numpy.random.random())
    assert differences(now, before) == []
    assert [p.requires_grad for p in loop.handle.model.parameters()] == flags
    loop.scheduler.refuses = False
    if what in ("hook", "weights"):
        hook.remove()
    loop.load(tmp_path)
    assert loop.handle.step == 9


def test_check_refuses_before_anything_changes(tmp_path):
    stopped(tmp_path)
    loop, seen = Loop(progressive()), []

    def check(extra: dict[str, Any]) -> None:
        seen.append(len(extra["losses"]))
        raise KeyError("other data")

    with pytest.raises(KeyError, match="other data"):
        loop.load(tmp_path, check=check)
    assert seen == [5] and loop.handle.step == 0 and not loop.optimizer.state
