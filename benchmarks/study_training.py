"""The accuracy study's training: one run, and the seconds of all methods' steps, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_rows import grouped_batches, places_and_tokens, random_batches, sample
from study_models import load_model
from study_plan import Job, by_stage
from study_tasks import Row, Task, evaluate
from torch import nn

import progtuning_kernels
from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    load_checkpoint,
    patch_model,
    save_checkpoint,
)
from progtuning_kernels.bench import Session, plain_session
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.models import wrap_lora
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.optim import state_bytes
from progtuning_kernels.schedules import Schedule

LORA_RANK = 8
CHECKPOINT_S = 300
FIRST_BATCHES = 8  # of a run, on which a budget is spent
Settings = Mapping[str, Any]
Batches = Sequence[Mapping[str, torch.Tensor]]


def _progressive(settings: Settings, steps: int, model: nn.Module, batches: Batches) -> Schedule:
    return ProgressiveSchedule(settings["stages"], steps, embeddings=settings["embeddings"])


def _frozen_third(settings: Settings, steps: int, model: nn.Module, batches: Batches) -> Schedule:
    """A step costs what one of three progressive stages costs on average: 7/9 of a full one."""
    return MilestoneSchedule({0: find_layout(model).num_blocks // 3}, embeddings="never")


def _from_the_top(settings: Settings, steps: int, model: nn.Module, batches: Batches) -> Schedule:
    """Progressive training upside down: gradients run through what is frozen."""
    blocks = find_layout(model).num_blocks
    tops = {stage * steps // 3: blocks - 1 - stage * (blocks // 3) for stage in range(3)}
    sets = {step: f"0-{top},embeddings" for step, top in tops.items()}
    return _of_library("FixedBlockSchedule")(sets)


def _budget(settings: Settings, steps: int, model: nn.Module, batches: Batches) -> Schedule:
    """The units of most gradient, at the cost of three progressive stages."""
    return _of_library("budget_schedule")(model, 7 / 9, steps, batches=batches)


def _of_library(name: str) -> Any:
    if (found := getattr(progtuning_kernels, name, None)) is None:
        raise UserError(f"this version of progtuning_kernels has no {name}")
    return found


SCHEDULES: dict[str, Callable[[Settings, int, nn.Module, Batches], Schedule]] = {
    "progressive": _progressive,
    "frozen-third": _frozen_third,
    "from-the-top": _from_the_top,
    "budget": _budget,
}


@dataclass(frozen=True)
class Rule:
    """What `progtuning_kernels.bench` asks of those who train."""

    lr: float
    clip: float

    def autocast(self) -> Any:
        return nullcontext()


class Trainee:
    """A patched model with its optimizer and rates."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        rate: float,
        steps: int,
        first: Batches,
        *,
        packing: Any = "auto",
    ) -> None:
        schedule = SCHEDULES[settings["schedule"]](settings, steps, model, first)
        cache = "auto" if settings["cache"] else None
        self.handle = patch_model(model, schedule, packing=packing, cache=cache)
        decay, by_unit = settings["weight_decay"], settings["layer_decay"] != 1.0
        self.optimizer = MaskedAdamW(
            self.handle.param_groups(lr=rate, weight_decay=decay, by_unit=by_unit),
            max_grad_norm=settings["clip"],
        )
        self.peaks = [  # rates of the groups; the head is unit L
            rate * settings["layer_decay"] ** (self.handle.num_blocks - group["unit"])
            if by_unit
            else rate
            for group in self.optimizer.param_groups
        ]
        self.steps, self.warmup = steps, max(1, round(settings["warmup"] * steps))
        self.model = model

    def step(self, number: int, batch: Mapping[str, torch.Tensor]) -> None:
        rising, falling = (number + 1) / self.warmup, (self.steps - number) / self.steps
        factor = min(rising, falling * self.steps / max(1, self.steps - self.warmup), 1.0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_model(job: Job, settings: Settings, task: Task, cache: Path) -> nn.Module:
    """The same head for every method of a seed."""
    torch.manual_seed(job.seed)
    model = load_model(cache, job.model, task.classes)
    if settings["lora"]:
        kind = "causal-lm" if task.classes is None else "text-classification"
        model = wrap_lora(model, kind, LORA_RANK)
    return model


def steps_per_epoch(task: Task, settings: Settings) -> int:
    """Whole batches; which rows are left over, every epoch draws anew."""
    return len(task.train) // settings["rows"]


def epoch_batches(task: Task, settings: Settings, seed: int, epoch: int) -> list[list[Row]]:
    """The same for every method of a seed, by its `order`."""
    make = {"random": random_batches, "grouped": grouped_batches}[settings["order"]]
    return make(task.train, settings["rows"], 1000 * seed + epoch)


def first_batches(task: Task, settings: Settings, seed: int) -> Batches:
    return [task.batch(rows) for rows in epoch_batches(task, settings, seed, 0)[:FIRST_BATCHES]]


def train(
    job: Job, settings: Settings, task: Task, steps: int, *, cache: Path, work: Path
) -> dict[str, Any]:
    """One run, from its newest checkpoint in `work` if there is one; what is stored of it."""
    assert job.rate is not None
    started = time.perf_counter()
    model = make_model(job, settings, task, cache)
    first = first_batches(task, settings, job.seed)
    trainee = Trainee(model, settings, job.rate, steps, first)
    handle, optimizer = trainee.handle, trainee.optimizer
    found = {"updates": 0, "peak_state_bytes": 0, "seconds_before": 0.0}
    found |= load_checkpoint(work, handle, optimizer) or {}
    before_s, saved = found.pop("seconds_before"), time.perf_counter()
    per_epoch, epoch, batches = steps_per_epoch(task, settings), -1, []
    for number in range(handle.step, steps):
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            batches = epoch_batches(task, settings, job.seed, epoch)
        found["updates"] += handle.active_params
        trainee.step(number, task.batch(batches[number % per_epoch]))
        found["peak_state_bytes"] = max(found["peak_state_bytes"], state_bytes(optimizer))
        handle.advance()
        now = time.perf_counter()
        if now - saved > CHECKPOINT_S and number + 1 < steps:
            extra = found | {"seconds_before": before_s + now - started}
            save_checkpoint(work, handle, optimizer, extra=extra, keep=1)
            saved = now
    trained_s = before_s + time.perf_counter() - started
    evaluation = time.perf_counter()
    figures = evaluate(model, task, settings["metric"])
    evaluation_s = time.perf_counter() - evaluation
    handle.unpatch()
    return {
        "score": figures.pop("score"),
        "figures": figures,
        "packing": str(handle.packing_report()),
        "cache": None if handle.cache is None else handle.cache_report().summary(),
        "steps": steps,
        **found,
        "num_params": sum(p.numel() for p in model.parameters()),
        "wall_s": {"training": trained_s, "evaluation": evaluation_s},
        "data": {
            "train_rows": len(task.train),
            "validation_rows": len(task.validation),
            "digest": task.digest,
        },
    }


def time_methods(
    methods: Mapping[str, tuple[Settings, str]],
    model_name: str,
    task: Task,
    *,
    batches: int,
    rounds: int,
    cache: Path,
) -> dict[str, Any]:
    """Seconds of short runs with the stages of whole ones, step by step in turn.

    An epoch has `batches` batches, which stand for all of them (`real_rows.sample`), after two that
    warm up; later epochs deal the rows of the first one anew, so that a cache holds them. Every
    round has new models, and the order of the methods turns.

    Args:
        methods: name -> settings and way.
    """
    first = next(iter(methods.values()))[0]
    epochs, whole = first["epochs"], steps_per_epoch(task, first)
    batches = min(batches, whole - 2)
    chosen = {
        order: [
            _short_epoch(epoch_batches(task, {**first, "order": order}, 1, epoch), batches)
            for epoch in range(epochs)
        ]
        for order in ("random", "grouped")
    }
    same_rows = [row for of_batch in chosen["random"][0] for row in of_batch]
    for epoch in range(1, epochs):
        chosen["random"][epoch] = random_batches(same_rows, first["rows"], 1000 + epoch)
    batches += 2
    stages: dict[str, list[int]] = {}
    rounds_ms: dict[str, list[list[float]]] = {name: [] for name in methods}
    evaluation_s = 0.0
    for turn in range(rounds):
        timed = {
            name: _timed(name, settings, way, model_name, task, epochs * batches, cache)
            for name, (settings, way) in methods.items()
        }
        for name in timed:
            rounds_ms[name].append([])
            stages[name] = []
        for number in range(epochs * batches):
            epoch, at = divmod(number, batches)
            order = list(timed)[:: 1 if (turn + number) % 2 == 0 else -1]
            for name in order:
                trainee = timed[name]
                batch = task.batch(chosen[methods[name][0]["order"]][epoch][at])
                patched = isinstance(trainee, Trainee)
                stages[name].append(trainee.handle.stage if patched else 0)
                torch.manual_seed(number)
                started = time.perf_counter()
                trainee.step(number, batch)
                if patched:
                    trainee.handle.advance()
                rounds_ms[name][-1].append((time.perf_counter() - started) * 1e3)
        started = time.perf_counter()
        if turn == 0:
            evaluate(next(iter(timed.values())).model, task, first["metric"])
            evaluation_s = time.perf_counter() - started
        del timed, trainee
        gc.collect()
    return {
        "steps": epochs * whole,
        "train_rows": len(task.train),
        "evaluation_s": evaluation_s,
        "methods": {
            name: {
                "way": methods[name][1],
                "settings": methods[name][0],
                "stages": by_stage(stages[name], warm_steps(stages[name], batches), times),
            }
            for name, times in rounds_ms.items()
        },
    }


def warm_steps(stages: Sequence[int], per_epoch: int) -> list[bool]:
    """The first two steps of every epoch and of every stage."""
    return [
        number % per_epoch < 2 or stages[number] != stages[max(0, number - 2)]
        for number in range(len(stages))
    ]


def _short_epoch(batches: list[list[Row]], count: int) -> list[list[Row]]:
    """Two batches of about the mean number of tokens, and others that stand for all."""
    chosen = sample(batches, count, seed=2)
    taken = {id(batch) for batch in chosen}
    tokens = places_and_tokens(batches)[1]
    spare = sorted(
        (batch for batch in batches if id(batch) not in taken),
        key=lambda batch: abs(places_and_tokens([batch])[1] - tokens),
    )
    return [*spare[:2], *chosen]


def _timed(
    method: str, settings: Settings, way: str, model_name: str, task: Task, steps: int, cache: Path
) -> Trainee | Session:
    job = Job(model_name, task.name, method, 0, 1e-5)
    model = make_model(job, settings, task, cache)
    if way == "hf":
        return plain_session(Rule(1e-5, settings["clip"]), model)
    first, packing = first_batches(task, settings, 0), "off" if way == "padded" else "auto"
    return Trainee(model, settings, 1e-5, steps, first, packing=packing)
