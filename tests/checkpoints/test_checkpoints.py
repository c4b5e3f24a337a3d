"""Checkpoints: a run goes on to the same bits, and what a killed writer or a bad disk leaves
behind costs a warning or one line.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import run_ranks
from soak import differences
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    PrefixCache,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.checkpoints import (
    CheckpointError,
    files,
    load_checkpoint,
    save_checkpoint,
)

BLOCKS, WIDTH, WORDS = 4, 6, 20


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(self.linear(self.norm(hidden)).tanh())


class Toy(nn.Module):
    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH, dropout: float = 0.2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1)).square().mean()


class Loop:
    """A loop of one's own; rows come by Python's random numbers, words by numpy's."""

    def __init__(
        self,
        schedule: Any,
        optimizer: Callable[[PatchHandle], torch.optim.Optimizer] | None = None,
        **model: Any,
    ) -> None:
        torch.manual_seed(0)
        self.handle = patch_model(Toy(**model), schedule)
        make = optimizer or masked_adamw
        self.optimizer = make(self.handle)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (1 + s))
        self.losses: list[float] = []

    def seed(self) -> Loop:
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(5)
        return self

    def train(self, steps: int) -> Loop:
        for _ in range(steps):
            words = numpy.random.randint(0, WORDS, (4, 5)) + random.randrange(2)
            loss = self.handle.model(torch.from_numpy(words % WORDS))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.handle.advance()
            self.losses.append(loss.item())
        return self

    def save(self, folder: Path, **options: Any) -> Path:
        extra = {"losses": self.losses}
        return save_checkpoint(
            folder, self.handle, self.optimizer, scheduler=self.scheduler, extra=extra, **options
        )

    def load(self, folder: Path, **options: Any) -> dict[str, Any] | None:
        extra = load_checkpoint(
            folder, self.handle, self.optimizer, scheduler=self.scheduler, **options
        )
        if extra is not None:
            self.losses = extra["losses"]
        return extra

    def all(self) -> dict[str, Any]:
        """Everything that a run ends with."""
        return {
            "weights": self.handle.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "losses": self.losses,
            "random": (torch.get_rng_state(), random.random(), numpy.random.random()),
        }


def masked_adamw(handle: PatchHandle, **options: Any) -> MaskedAdamW:
    groups = handle.param_groups(lr=0.02, weight_decay=0.1)
    return MaskedAdamW(groups, max_grad_norm=1.0, **options)


def torch_adamw(handle: PatchHandle) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(handle.param_groups(lr=0.02, weight_decay=0.1))
    handle.on_change(lambda handle: release_frozen_state(optimizer))
    return optimizer


def progressive() -> ProgressiveSchedule:
    return ProgressiveSchedule(4, 12)


def stopped(folder: Path, steps: int = 5, **options: Any) -> Loop:
    """A run with a checkpoint of every step, two of which stay."""
    loop = Loop(progressive(), **options).seed()
    for _ in range(steps):
        loop.train(1).save(folder)
    return loop


RUNS = {
    "progressive": (progressive, masked_adamw),
    "progressive, torch": (progressive, torch_adamw),
    # other units at step 0 than at the step that is loaded
    "random": (lambda: RandomBlockSchedule(2, 2, seed=1), masked_adamw),
    "random, bf16": (
        lambda: RandomBlockSchedule(2, 2, seed=1),
        lambda handle: masked_adamw(handle, state_dtype=torch.bfloat16),
    ),
    "cyclic, kept": (
        lambda: CyclicBlockSchedule(1, 3),
        lambda handle: masked_adamw(handle, on_freeze="keep"),
    ),
    "adaptive": (lambda: AdaptiveSchedule(3, percentile=60), masked_adamw),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("steps", [1, 4, 7, 9])
def test_a_run_goes_on_to_the_same_bits(name, steps, tmp_path):
    schedule, optimizer = RUNS[name]
    straight = Loop(schedule(), optimizer).seed().train(12)
    expected = straight.all()
    Loop(schedule(), optimizer).seed().train(steps).save(tmp_path)
    random.seed(99)  # as another process: torch's are those of a new model
    numpy.random.seed(99)
    resumed = Loop(schedule(), optimizer)
    resumed.load(tmp_path)
    assert resumed.handle.step == steps and len(resumed.losses) == steps
    assert differences(resumed.train(12 - steps).all(), expected) == []


def test_frozen_tensors_have_no_state_and_get_none(tmp_path):
    stopped(tmp_path, steps=7)
    saved = torch.load(tmp_path / "step-00000007.pt", weights_only=True)
    groups = Loop(progressive()).handle.param_groups()
    names = [name for group in groups for name in group["param_names"]]
    named = {names[i] for i in saved["state"]["optimizer"]["state"]}
    assert named and not any(n.startswith(("embeddings", "blocks.0", "blocks.1")) for n in named)
    resumed = Loop(progressive())
    resumed.load(tmp_path)
    parameters = dict(resumed.handle.model.named_parameters())
    assert {n for n, p in parameters.items() if p in resumed.optimizer.state} == named


def test_a_model_without_a_schedule(tmp_path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Toy(dropout=0)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    for step in (1, 2):
        model(torch.arange(10)[None]).backward()
        optimizer.step()
        assert (
            save_checkpoint(tmp_path, model, optimizer, step=step).name == f"step-0000000{step}.pt"
        )
    other, others = build()
    assert load_checkpoint(tmp_path, other, others) == {}
    state = [(m.state_dict(), o.state_dict()) for m, o in ((model, optimizer), (other, others))]
    assert differences(*state) == []
    with pytest.raises(ValueError, match="needs step="):
        save_checkpoint(tmp_path, model, optimizer)


def test_no_checkpoint_is_none(tmp_path):
    loop = Loop(progressive())
    assert loop.load(tmp_path) is None and loop.load(tmp_path / "missing") is None
    for name in ("step-00000003.partial", "step-3.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert loop.load(tmp_path) is None


# writers that are killed


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


# what cannot be read


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
        patch.setattr(files, "FORMAT", 4)
        stopped(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="00005.pt has format 4, this version reads 3: fini"):
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
    with pytest.raises(CheckpointError, match="format 2, this version reads 3: finish") as error:
        Loop(progressive()).load(tmp_path)
    assert "\n" not in str(error.value)


# other runs


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


@pytest.mark.parametrize("what", ["optimizer", "scheduler", "weights"])
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
    if what == "weights":
        hook.remove()
    loop.load(tmp_path)
    assert loop.handle.step == 9


class _Quantised(nn.Linear):
    """Writes its scale and a description beside its codes, and takes neither back, as the 4-bit
    layers of bitsandbytes do; the description has another length every time.
    """

    written = 0

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(width, width)
        values = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
        self.scale = float(values.abs().max()) / 127
        self.weight = nn.Parameter((values / self.scale).to(torch.int8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight * self.scale, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _Quantised.written += 1
        destination[prefix + "weight.scale"] = torch.tensor([self.scale])
        destination[prefix + "weight.description"] = torch.zeros(_Quantised.written)


def _quantised(seed: int) -> tuple[PatchHandle, MaskedAdamW]:
    torch.manual_seed(0)
    model = Toy(dropout=0.0)
    for block in model.blocks:
        block.linear = _Quantised(WIDTH, seed)
    handle = patch_model(model, progressive())
    return handle, masked_adamw(handle)


def _steps(handle: PatchHandle, optimizer: MaskedAdamW, steps: int) -> list[float]:
    losses = []
    for step in range(handle.step, handle.step + steps):
        loss = handle.model(torch.arange(20).view(4, 5).roll(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        losses.append(loss.item())
    return losses


def test_keys_that_quantised_layers_write_for_themselves_are_not_in_the_way(tmp_path):
    handle, optimizer = _quantised(1)
    _steps(handle, optimizer, 5)
    save_checkpoint(tmp_path, handle, optimizer)
    expected = _steps(handle, optimizer, 4)
    handle, optimizer = _quantised(1)
    load_checkpoint(tmp_path, handle, optimizer)
    assert handle.model.blocks[0].linear.bias.any()  # what is trained is there
    assert _steps(handle, optimizer, 4) == expected


def test_weights_quantised_from_others_are_another_model(tmp_path):
    handle, optimizer = _quantised(1)
    _steps(handle, optimizer, 2)
    save_checkpoint(tmp_path, handle, optimizer)
    handle, optimizer = _quantised(2)
    before = {n: t.clone() for n, t in handle.model.state_dict().items() if "description" not in n}
    with pytest.raises(CheckpointError, match="blocks.0.linear.weight was quantised from other w"):
        load_checkpoint(tmp_path, handle, optimizer)
    now = {n: t for n, t in handle.model.state_dict().items() if "description" not in n}
    assert differences(now, before) == [] and handle.step == 0 and not optimizer.state


def test_check_refuses_before_anything_changes(tmp_path):
    stopped(tmp_path)
    loop, seen = Loop(progressive()), []

    def check(extra: dict[str, Any]) -> None:
        seen.append(len(extra["losses"]))
        raise KeyError("other data")

    with pytest.raises(KeyError, match="other data"):
        loop.load(tmp_path, check=check)
    assert seen == [5] and loop.handle.step == 0 and not loop.optimizer.state


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


# the prefix cache


@pytest.fixture
def always_on(monkeypatch):
    """Toy blocks cost less than any cache."""
    monkeypatch.setattr(BreakEven, "verdict", lambda self, rows: None)


def cached(folder: Path | None, words: int = WORDS) -> tuple[PatchHandle, MaskedAdamW]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    cache = PrefixCache(1 << 20, device="cpu" if folder is None else "disk", path=folder)
    model = BertForSequenceClassification(config).train()
    handle = patch_model(model, MilestoneSchedule({1: 2}), cache=cache)
    return handle, MaskedAdamW(handle.param_groups(lr=0.1))


def cached_steps(handle: PatchHandle, optimizer: MaskedAdamW, steps: int) -> None:
    for _ in range(steps):
        rows = torch.arange(16).view(2, 8)
        handle.model(input_ids=rows, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()


def test_a_resumed_run_finds_the_rows_of_its_cache(tmp_path, always_on):
    handle, optimizer = cached(tmp_path / "cache")
    cached_steps(handle, optimizer, 4)  # step 1 trains all, step 2 stores two rows
    save_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.unpatch()
    handle, optimizer = cached(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "saved", handle, optimizer) == {}
        cached_steps(handle, optimizer, 2)
    report = handle.cache_report()
    assert (report.hits, report.misses) == (4, 0) and report.served_steps == 1
    handle.unpatch()


def test_rows_that_a_resumed_run_cannot_reach_are_named(tmp_path, always_on):
    handle, optimizer = cached(tmp_path / "cache")
    cached_steps(handle, optimizer, 4)
    save_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.unpatch()
    for folder, where in ((None, "in memory"), (tmp_path / "elsewhere", "elsewhere")):
        handle, optimizer = cached(folder)
        with pytest.warns(UserWarning, match=f"rows of the prefix cache are in .*{where}"):
            load_checkpoint(tmp_path / "saved", handle, optimizer)
        handle.unpatch()
    handle, optimizer = cached(tmp_path / "cache")
    load_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.model.config.layer_norm_eps = 1e-3
    with pytest.warns(UserWarning, match="rows of another model, configuration or version"):
        cached_steps(handle, optimizer, 1)
    handle.unpatch()


# the command line


@pytest.fixture
def arguments(model_folders, text_files, tmp_path) -> list[str]:
    options = {
        "--train-file": text_files[0],
        "--validation-file": text_files[1],
        "--model": model_folders["bert"],
        "--output": tmp_path / "run",
        "--batch-size": 8,
        "--max-length": 16,
        "--max-steps": 9,
        "--checkpoint-every": 3,
    }
    return ["train", *(str(x) for pair in options.items() for x in pair)]


def test_the_command_line_goes_on_from_the_checkpoint_before_a_damaged_one(
    arguments, tmp_path, monkeypatch, capsys
):
    from progtuning_kernels.cli import engine
    from progtuning_kernels.cli.app import main

    step = engine.Run._train_step

    def poisoned(run: engine.Run, *window: Any, measure: bool) -> dict[str, Any]:
        if run.step == 2:  # its gradients, and nothing that stays
            run.trained.optimizer.param_groups[0]["params"][0].register_hook(
                lambda grad: grad * float("nan") if run.step == 2 else grad
            )
        return step(run, *window, measure=measure)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "_train_step", poisoned)
        patch.setattr(engine.Run, "_save_model", lambda run: (_ for _ in ()).throw(SystemError))
        with pytest.raises(SystemError):
            main(arguments)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    main([*arguments, "--resume"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("cannot be read") == 1 and "goes on after step 3 of 9" in captured.out
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())["summary"]
    assert summary["skipped_steps"] == 1  # that of the step before the checkpoint, once


# several ranks


def on_ranks(check: Callable[[int, int, Path], None], size: int, folder: Path) -> None:
    """`check(rank, size, folder)` in `size` forks of this process, which has imported everything.

    Ranks in processes of their own, and no group at all where `size` is 0.
    """
    store = str(folder / f"store-{check.__name__}-{size}")
    pids = []
    for rank in range(max(1, size)):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            if size:
                torch.distributed.init_process_group(
                    "gloo",
                    store=torch.distributed.FileStore(store, size),
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=60),
                )
            check(rank, size, folder)
            if size:
                torch.distributed.barrier()  # nobody leaves while another still talks to it
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

    def __init__(self, rank: int, size: int, *, sharded: bool = True, schedule: Any = None) -> None:
        self._rows = slice(8 // size * rank, 8 // size * (rank + 1))
        torch.manual_seed(0)
        model = Toy(width=WIDTH, dropout=0.0)  # 6 rows: 2 of 4 ranks have an uneven share
        if sharded:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        self.handle = patch_model(model, schedule or progressive())
        self.optimizer = masked_adamw(self.handle)
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
            for key, value in self.optimizer.state.get(p, {}).items():
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
    expected = loop.train(4).whole()
    if rank == 0:
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


def test_a_load_that_a_users_hook_refuses_changes_nothing(tmp_path):
    def setup() -> tuple[Any, MaskedAdamW]:
        handle = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(2, 12))
        return handle, MaskedAdamW(handle.param_groups(lr=1e-3))

    def train(handle, optimizer, steps: int) -> None:
        for _ in range(steps):
            handle.model(**tiny_inputs("bert-sequence")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()

    handle, optimizer = setup()
    train(handle, optimizer, 8)
    save_checkpoint(tmp_path, handle, optimizer)
    handle, optimizer = setup()
    train(handle, optimizer, 3)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    def refuse(optimizer, state_dict):
        raise ValueError("not mine")

    optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="not mine"):
        load_checkpoint(tmp_path, handle, optimizer)
    assert handle.step == 3 and len(before) == len(optimizer.state)
    for p, state in before.items():
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
    train(handle, optimizer, 1)
