"""`progtuning bench`: what a step of every stage takes here, by three or four ways to train it.

Everybody starts from the same random weights and takes the same random batches, in turn, in one
process. No time is taken before a gate: losses and gradients of every stage are those of freezing
by hand. `benchmarks/run.py` compares with other people's packages, too.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from ..cache import PrefixCache
from ..freezing.decay_groups import decay_groups
from ..optim import MaskedAdamW, state_bytes
from ..patch import PatchHandle, patch_model
from ..planner.example_batch import example_batch, on_device
from ..schedules import ProgressiveSchedule
from .errors import UserError, as_user_error
from .models import autocast_dtype, check_length, choose_device
from .plan_command import model_without_weights
from .provenance import provenance
from .sizes import parse_bytes

Batch = dict[str, Any]
_BATCHES = 4  # of an epoch: a stage's first epoch warms up and fills the cache, others are timed
_LR, _DECAY, _CLIP = 5e-5, 0.01, 1.0
# relative norm of the difference between all gradients
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class _Contender:
    """One way to train a model of its own.

    Args:
        move: called with the number of a stage when it begins.
        update: clips and updates, and drops the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        move: Callable[[int], None],
        update: Callable[[], None],
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.move, self._update, self._autocast = move, update, autocast

    def loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            return self.model(**batch).loss

    def step(self, batch: Batch) -> tuple[float, float]:
        """Loss, and milliseconds of forward, backward and update; the device is waited for."""
        started = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        self._update()
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        value = float(loss.detach())
        return value, (time.perf_counter() - started) * 1e3


def _patched(
    model: nn.Module,
    schedule: ProgressiveSchedule,
    autocast: Callable[[], AbstractContextManager],
    **options: Any,
) -> tuple[_Contender, PatchHandle]:
    handle = patch_model(model, schedule, **options)
    groups = handle.param_groups(weight_decay=_DECAY)
    optimizer = MaskedAdamW(groups, lr=_LR, max_grad_norm=_CLIP)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _Contender(model, optimizer, handle.seek, update, autocast), handle


def _plain(
    model: nn.Module,
    active: list[set[str]] | None,
    autocast: Callable[[], AbstractContextManager],
) -> _Contender:
    """torch's fused AdamW and clipping; `active`: names of what trains, by stage."""
    parameters = [*model.parameters()]
    kind = parameters[0].device.type
    optimizer = torch.optim.AdamW(
        decay_groups(parameters, _DECAY), lr=_LR, fused=kind in ("cpu", "cuda")
    )

    def move(stage: int) -> None:
        for name, p in model.named_parameters() if active else ():
            p.requires_grad_(name in active[stage])

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return _Contender(model, optimizer, move, update, autocast)


def _active_names(model: nn.Module, schedule: ProgressiveSchedule, blocks: Any) -> list[set[str]]:
    with patch_model(model, schedule, kernels="off", blocks=blocks) as handle:
        names = []
        for stage in range(schedule.stages):
            handle.seek(stage)
            names.append({n for n, p in model.named_parameters() if p.requires_grad})
    return names


def _gate(one: _Contender, other: _Contender, stages: int, batch: Batch, tolerance: float) -> float:
    """Largest relative difference of gradients in any stage, dropout off.

    Raises:
        UserError: it is above the tolerance, losses differ, or others have gradients.
    """
    worst = 0.0
    for stage in range(stages):
        found = []
        for contender in (one, other):
            contender.move(stage)
            contender.model.eval()
            for _ in range(2):  # a cache serves the second
                contender.model.zero_grad()
                loss = contender.loss(batch)
                loss.backward()
            named = contender.model.named_parameters()
            found.append(
                (float(loss.detach()), {n: p.grad.float() for n, p in named if p.grad is not None})
            )
            contender.model.zero_grad()
            contender.model.train()
        (loss, grads), (expected_loss, expected) = found
        if grads.keys() != expected.keys():
            raise UserError(f"gate: other tensors have gradients than by hand, stage {stage + 1}")
        error = sum(float((grads[n] - expected[n]).norm()) ** 2 for n in grads) ** 0.5
        error /= sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
        worst = max(worst, error, abs(loss - expected_loss) / abs(expected_loss))
    if worst > tolerance:
        raise UserError(f"gate: losses or gradients differ by {worst:.1e} from freezing by hand")
    return worst


def run(options: Mapping[str, Any]) -> None:
    o = dict(options)
    device = choose_device(o["device"])
    dtype = autocast_dtype(o["precision"], device)

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    blocks = None if o["blocks"] is None else o["blocks"].split(",")
    meta = model_without_weights(o["model"], o["task"])
    check_length(meta, o["seq_len"], "--seq-len")
    meta.config.use_cache = False
    torch.manual_seed(0)
    stages = o["stages"]
    with as_user_error():
        shapes = example_batch(meta, o["batch_size"], o["seq_len"], padding=True, device=device)
        schedule = ProgressiveSchedule(stages, stages, embeddings=o["embeddings"])  # a step a stage
        base = type(meta)(meta.config).to(device).train()
        active = _active_names(base, schedule, blocks)
    vocabulary = getattr(meta.config, "vocab_size", None)
    batches = [on_device(shapes, device, vocabulary) for _ in range(_BATCHES)]

    def ours(**more: Any) -> tuple[_Contender, PatchHandle]:
        return _patched(copy.deepcopy(base), schedule, autocast, blocks=blocks, **more)

    def cache() -> PrefixCache:
        return PrefixCache(parse_bytes(o["cache"]))

    tolerance, checked = _TOLERANCE[dtype or torch.float32], []
    with as_user_error():
        by_hand = _plain(copy.deepcopy(base), active, autocast)
        for options in ({}, {"cache": cache()}):
            checked.append(_gate(ours(**options)[0], by_hand, stages, batches[0], tolerance))
        progressive, _ = ours()
        cached, cache_handle = ours(cache=cache())
    contenders = {
        "full": _plain(copy.deepcopy(base), None, autocast),
        "frozen by hand": by_hand,
        "progressive": progressive,
        "progressive, cache": cached,
    }
    rows = []
    console = Console(stderr=o["json"])
    for stage in track(
        range(stages), "measuring", console=console, disable=not console.is_terminal
    ):
        times: dict[str, list[float]] = {name: [] for name in contenders}
        losses: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            contender.move(stage)
        for epoch in range(1 + o["epochs"]):
            for batch in batches:
                for name, contender in contenders.items():
                    loss, step_ms = contender.step(batch)
                    losses[name].append(loss)
                    if epoch:  # the first compiles, allocates, fills the cache
                        times[name].append(step_ms)
        report = cache_handle.cache_report()
        rows += [
            {
                "stage": stage + 1,
                "boundary": cache_handle.boundary,
                "method": name,
                "step_ms": statistics.median(times[name]),
                "step_ms_p20": statistics.quantiles(times[name], n=5)[0],
                "step_ms_p80": statistics.quantiles(times[name], n=5)[-1],
                "mean_loss": statistics.mean(losses[name]),
                "state_bytes": state_bytes(contender.optimizer),
                "cache": report.state if contender is cached else None,
            }
            for name, contender in contenders.items()
        ]
    content = {
        "meta": provenance(device),
        "config": o,
        "model": {"class": type(base).__name__, "blocks": cache_handle.num_blocks},
        "gate_largest_difference": max(checked),
        "rows": rows,
    }
    if o["json"]:
        print(json.dumps(content, indent=1))
    else:
        _show(content, console, [*contenders])


def _show(content: Mapping[str, Any], console: Console, methods: list[str]) -> None:
    o, rows = content["config"], content["rows"]
    console.print(
        f"{content['model']['class']}, {content['model']['blocks']} blocks, {o['batch_size']} x "
        f"{o['seq_len']} tokens, {content['meta']['device']}; gate: gradients within "
        f"{content['gate_largest_difference']:.0e} of freezing by hand",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(caption="Median step and its share of full training; mean loss of the stage.")
    for name in ("stage\nboundary", *methods):
        # two lines of a heading, three of a cell: 80 columns are enough for steps of minutes
        table.add_column(name.replace(", ", "\n"), justify="right", no_wrap=True)
    totals = dict.fromkeys(methods, 0.0)
    for stage in range(1, o["stages"] + 1):
        of_stage = {row["method"]: row for row in rows if row["stage"] == stage}
        full_ms = of_stage["full"]["step_ms"]
        cells = []
        for name in methods:
            row = of_stage[name]
            totals[name] += row["step_ms"]
            cells.append(
                f"{row['step_ms']:,.1f} ms\n{row['step_ms'] / full_ms:.2f} of full\n"
                f"loss {row['mean_loss']:.4f}"
            )
        table.add_row(f"{stage}\n{of_stage['full']['boundary']}", *cells)
        table.add_section()
    shares = [f"{totals[name] / totals['full']:.2f}" for name in methods]
    table.add_row("run", *shares)
    console.print(table)
