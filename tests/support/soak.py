"""Kills one training run again and again, and compares its end with that of a run left in peace.

    python tests/support/soak.py --kills 200

A parent that has everything imported forks a child, which builds model, schedule and optimizer,
goes on from the newest checkpoint, and is killed (SIGKILL) at a random moment: on its way to the
first step, within a step, or, for nearly half of the kills, while it writes a checkpoint. Moments
come from a seed and are spread over the run; what a child was doing when it died is read from
memory that it shares with the parent. The last child is left to finish. Its last checkpoint must
then be that of the undisturbed run, bit for bit: weights, optimizer state, decisions, random
numbers, and the loss of every micro-batch.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded; a fork copies one thread only

import mmap
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from progtuning_kernels import (
    AdaptiveSchedule,
    MaskedAdamW,
    PatchHandle,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.checkpoints import load_checkpoint, save_checkpoint

EVERY, KEEP, MICRO_BATCHES = 3, 2, 2  # steps between checkpoints, how many stay, per step
ROWS, TOKENS, VOCABULARY = 64, 8, 53
BUILDING, LOADING, TRAINING, WRITING = range(4)
PHASES = ("building", "loading", "in a step", "writing a checkpoint")
# what a child is killed at, and for which share of the kills
START, STEP, WRITE = "start", "step", "write"
SHARES = {START: 0.2, STEP: 0.35, WRITE: 0.45}


class Shared:
    """What a child says of itself, in memory that outlives it.

    Attributes:
        phase, step: what it does, and the steps it has made.
        made: steps that all children together have made.
        start_s, step_s, write_s: how long the newest start, step and writing took.
    """

    _FIELDS: ClassVar = {
        "phase": "q",
        "step": "q",
        "made": "q",
        "start_s": "d",
        "step_s": "d",
        "write_s": "d",
    }
    _PLACES: ClassVar = {name: 8 * i for i, name in enumerate(_FIELDS)}

    def __init__(self) -> None:
        self.__dict__["_memory"] = mmap.mmap(-1, 8 * len(self._FIELDS))

    def __getattr__(self, name: str) -> Any:
        return struct.unpack_from(self._FIELDS[name], self._memory, self._PLACES[name])[0]

    def __setattr__(self, name: str, value: Any) -> None:
        struct.pack_into(self._FIELDS[name], self._memory, self._PLACES[name], value)


@dataclass(frozen=True)
class Variant:
    """One kind of run: a schedule for so many steps, and an optimizer with its own clipping."""

    schedule: Callable[[int], Any]
    optimizer: Callable[[PatchHandle], torch.optim.Optimizer]


def _masked(**options: Any) -> Callable[[PatchHandle], torch.optim.Optimizer]:
    return lambda handle: MaskedAdamW(
        handle.param_groups(lr=3e-3, weight_decay=0.05), max_grad_norm=1.0, **options
    )


def _torch_adamw(handle: PatchHandle) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(handle.param_groups(lr=3e-3, weight_decay=0.05))
    handle.on_change(lambda handle: release_frozen_state(optimizer))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(parameters, 1.0) and None,
    )
    return optimizer


VARIANTS = {
    "progressive": Variant(lambda steps: ProgressiveSchedule(4, steps), _masked()),
    "random": Variant(
        lambda steps: RandomBlockSchedule(2, 5, seed=3), _masked(state_dtype=torch.bfloat16)
    ),
    "adaptive": Variant(
        lambda steps: AdaptiveSchedule(max(4, steps // 6), percentile=50, window=4), _masked()
    ),
    "torch": Variant(lambda steps: ProgressiveSchedule(3, steps), _torch_adamw),
}


def train(variant: Variant, steps: int, folder: Path, shared: Shared) -> None:
    """One child's life: from the newest checkpoint in `folder`, or the beginning, to the end."""
    started = time.perf_counter()
    shared.phase = BUILDING
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(11)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=TOKENS,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).train()
    table = torch.randint(1, VOCABULARY, (ROWS, TOKENS))
    handle = patch_model(model, variant.schedule(steps))
    optimizer = variant.optimizer(handle)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    shared.phase = LOADING
    extra = load_checkpoint(folder, handle, optimizer, scheduler=scheduler)
    losses = [] if extra is None else extra["losses"]
    shared.step = handle.step
    shared.start_s = time.perf_counter() - started
    while handle.step < steps:
        shared.phase = TRAINING
        started = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            # rows by Python's random numbers, masked tokens by numpy's, dropout by torch's
            rows = table[random.sample(range(ROWS), 4)]
            masked = torch.from_numpy(numpy.random.random(rows.shape) < 0.2)
            tokens = rows.masked_fill(masked, 0)
            loss = model(input_ids=tokens, labels=rows[:, 0] % 3).loss / MICRO_BATCHES
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        handle.advance()
        shared.step = handle.step
        shared.made += 1
        shared.step_s = time.perf_counter() - started
        if handle.step % EVERY == 0 or handle.step == steps:
            started = time.perf_counter()
            shared.phase = WRITING
            extra = {"losses": losses}
            save_checkpoint(folder, handle, optimizer, scheduler=scheduler, extra=extra, keep=KEEP)
            shared.write_s = time.perf_counter() - started


def start(variant: Variant, steps: int, folder: Path, shared: Shared) -> int:
    """Fork a child that trains; its process id."""
    shared.phase, shared.step = BUILDING, 0
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        train(variant, steps, folder, shared)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_to_kill(pid: int, kind: str, position: int, shared: Shared, rng: random.Random) -> bool:
    """Kill a child at a random moment of this kind, at or after step `position`.

    Returns:
        Whether it was still there.
    """
    delay_s = rng.random()
    if kind == START:
        delay_s *= shared.start_s
    else:
        phase = TRAINING if kind == STEP else WRITING
        while not (shared.phase == phase and shared.step >= position):
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(1e-4)
        delay_s *= shared.step_s if kind == STEP else shared.write_s
    until = time.perf_counter() + delay_s
    while time.perf_counter() < until:
        time.sleep(1e-4)
    os.kill(pid, signal.SIGKILL)  # a child that has ended is a zombie until it is waited for
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def finish(pid: int) -> None:
    status = os.waitpid(pid, 0)[1]
    if status:
        raise SystemExit(f"a run that nobody killed ended with status {status}")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints are not of the same bits."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if same:
            ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
            same = torch.equal(ours, theirs)
        return [] if same else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other or (one != one and other != other) else [path]


def last_checkpoint(folder: Path, steps: int) -> dict[str, Any]:
    return torch.load(folder / f"step-{steps:08d}.pt", weights_only=True)


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        phases: number of kills by what the child was doing.
        partial: kills that left a file half written.
        different: places where the last checkpoints differ.
    """

    kills: int
    phases: Counter[str]
    partial: int
    steps: int
    made: int
    seconds: float
    different: list[str]

    def summary(self, name: str) -> str:
        doing = ", ".join(f"{self.phases[phase]} {phase}" for phase in PHASES)
        end = "ends bit-identical"
        if self.different:
            end = f"DIFFERS in {len(self.different)} places, first {self.different[0]}"
        return (
            f"{name}: {self.kills} kills ({doing}; {self.partial} left a file half written), "
            f"{self.made} steps made for {self.steps}, {self.seconds:.0f} s: {end}"
        )


def soak(
    name: str, kills: int, steps: int, folder: Path, *, seed: int, tick: Callable[[], None]
) -> Outcome:
    """One undisturbed run and one that is killed `kills` times."""
    started = time.perf_counter()
    variant, shared, rng = VARIANTS[name], Shared(), random.Random(f"{seed} {name}")
    undisturbed, killed = folder / f"{name}-undisturbed", folder / f"{name}-killed"
    finish(start(variant, steps, undisturbed, shared))
    shared.made = 0
    phases: Counter[str] = Counter()
    partial = done = 0
    kinds = rng.choices([*SHARES], [*SHARES.values()], k=kills)
    positions = sorted(rng.randrange(steps - 2 * EVERY) for _ in range(kills))
    for kind, position in zip(kinds, positions, strict=True):
        if wait_to_kill(start(variant, steps, killed, shared), kind, position, shared, rng):
            done += 1
            phases[PHASES[shared.phase]] += 1
            partial += shared.phase == WRITING and any(killed.glob("*.partial"))
        tick()
    finish(start(variant, steps, killed, shared))
    return Outcome(
        kills=done,
        phases=phases,
        partial=partial,
        steps=steps,
        made=shared.made,
        seconds=time.perf_counter() - started,
        different=differences(last_checkpoint(undisturbed, steps), last_checkpoint(killed, steps)),
    )


@click.command(context_settings={"show_default": True})
@click.option("--kills", type=click.IntRange(min=1), default=200, help="Of each run.")
@click.option("--steps", type=click.IntRange(min=12), help="Of each run; default 2 a kill.")
@click.option(
    "--run",
    "names",
    type=click.Choice([*VARIANTS]),
    multiple=True,
    default=("progressive",),
    help="May be given more than once.",
)
@click.option("--seed", default=0, help="Of the moments of the kills.")
@click.option("--folder", type=click.Path(path_type=Path), help="Default: a temporary one.")
def main(kills: int, steps: int | None, names: tuple[str, ...], seed: int, folder: Path | None):
    """Kill training runs at random moments; exit status 1 if one does not end as undisturbed."""
    kept, folder = folder, folder or Path(tempfile.mkdtemp(prefix="soak-"))
    console = Console(soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes = []
    try:
        # drawn from here and not from a thread, which a fork would leave behind with its locks held
        with Progress(
            *columns, TimeElapsedColumn(), console=console, auto_refresh=False, transient=True
        ) as bar:
            for name in names:
                task = bar.add_task(name, total=kills)

                def tick(task: Any = task) -> None:
                    bar.advance(task)
                    bar.refresh()

                outcome = soak(
                    name, kills, steps or max(24, 2 * kills), folder, seed=seed, tick=tick
                )
                outcomes.append(outcome)
                console.print(outcome.summary(name), highlight=False)
    finally:
        if kept is None:
            shutil.rmtree(folder)
    if any(outcome.different or outcome.kills < kills for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
