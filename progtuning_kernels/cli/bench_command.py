"""`progtuning bench`: the time of a step in every stage here, by four ways to train.

All ways start from the same random weights and take the same random batches, in turn, in one
process. A gate comes first: losses, gradients and updates of every stage must be those of plain
torch. `benchmarks/run.py` compares with other packages, too, by the same gate and clock.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ..bench import (
    TOLERANCES,
    Batch,
    Refused,
    Session,
    compare,
    our_session,
    plain_session,
    timed_steps,
    trace,
)
from ..cache import PrefixCache
from ..model.layout import find_layout
from ..patch import patch_model
from ..planner.example_batch import example_batch, on_device
from ..planner.planning import without_data
from ..schedules import ProgressiveSchedule
from ..text_table import text_table
from .errors import UserError, as_user_error
from .models import autocast_dtype, check_length, choose_device
from .plan_command import model_without_weights
from .provenance import provenance
from .sizes import parse_bytes

_BATCHES = 4  # of an epoch: a stage's first epoch warms up and fills the cache, others are timed


@dataclass(frozen=True)
class _Rule:
    device: torch.device
    dtype: torch.dtype | None
    lr: float = 5e-5
    clip: float = 1.0

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _gate(
    ways: Mapping[str, Callable[[], Session]],
    batches: Sequence[Batch],
    active: Sequence[set[str]],
    rule: _Rule,
) -> float:
    """Largest error of losses and gradients against full training, a step per stage, no dropout.

    Full training drops the gradients of what the plan freezes before torch's AdamW. `UserError`
    says which way differs by more than the tolerance.
    """
    loss, gradient = TOLERANCES["bf16" if rule.dtype == torch.bfloat16 else rule.device.type]
    stages = [batches[stage % len(batches)] for stage in range(len(active))]
    truth, largest = None, 0.0
    for name, make in ways.items():
        session = make()
        session.model.eval()
        if truth is None:  # the first way is full training
            truth = trace(session, stages, counts=lambda stage, name: name in active[stage])
            continue
        try:
            errors = compare(
                trace(session, stages, passes=2),
                truth,
                loss_tolerance=loss,
                gradient_tolerance=gradient,
                compares_movement=rule.dtype is None,
            )
        except Refused as error:
            raise UserError(f"{name}: {error}") from None
        largest = max(largest, errors["loss_error"], errors["gradient_error"])
    return largest


def _active_names(model: nn.Module, schedule: ProgressiveSchedule, blocks: Any) -> list[set[str]]:
    """Names of what trains, by stage; `schedule` has a step per stage."""
    with patch_model(model, schedule, kernels="off", blocks=blocks) as handle:
        names = []
        for stage in range(schedule.stages):
            handle.seek(stage)
            names.append({n for n, p in model.named_parameters() if p.requires_grad})
    return names


def run(options: Mapping[str, Any]) -> None:
    o = dict(options)
    device = choose_device(o["device"])
    rule = _Rule(device, autocast_dtype(o["precision"], device))
    blocks = None if o["blocks"] is None else o["blocks"].split(",")
    cache_bytes = parse_bytes(o["cache"])
    meta, _ = model_without_weights(o["model"], o["task"])
    check_length(meta, o["seq_len"], "--seq-len")
    meta.config.use_cache = False
    stages, steps_of_stage = o["stages"], _BATCHES * (1 + o["epochs"])
    vocabulary = getattr(meta.config, "vocab_size", None)
    torch.manual_seed(0)
    with as_user_error(), without_data(meta, "tried on random rows"):
        shapes = example_batch(meta, o["batch_size"], o["seq_len"], padding=True, device=device)
        batches = [on_device(shapes, device, vocabulary) for _ in range(_BATCHES)]
        base = type(meta)(meta.config).to(device).train()
        one_step = ProgressiveSchedule(stages, stages, embeddings=o["embeddings"])
        active = _active_names(base, one_step, blocks)
        num_blocks = find_layout(base, blocks).num_blocks
        boundaries = one_step.boundaries(num_blocks)

    def ways(steps: int) -> dict[str, Callable[[], Session]]:
        """What makes a session of each way, with so many steps in a stage."""

        def freezing() -> Session:
            model = copy.deepcopy(base)

            def begin(step: int) -> None:
                for name, p in model.named_parameters() if step % steps == 0 else ():
                    p.requires_grad_(name in active[step // steps])

            return plain_session(rule, model, begin=begin)

        def ours(**more: Any) -> Session:
            schedule = ProgressiveSchedule(stages, stages * steps, embeddings=o["embeddings"])
            return our_session(rule, copy.deepcopy(base), schedule, blocks=blocks, **more)

        return {
            "full": lambda: plain_session(rule, copy.deepcopy(base)),
            "frozen by hand": freezing,
            "progressive": ours,
            "progressive, cache": lambda: ours(cache=PrefixCache(cache_bytes)),
        }

    with as_user_error(), without_data(meta, "tried on random rows"):
        largest = _gate(ways(1), batches, active, rule)
        sessions = {name: make() for name, make in ways(steps_of_stage).items()}
    rows = []
    console = Console(stderr=o["json"])
    counted = track(range(stages), "measuring", console=console, disable=not console.is_terminal)
    for stage in counted:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        losses: dict[str, list[float]] = {name: [] for name in sessions}
        for step in range(stage * steps_of_stage, (stage + 1) * steps_of_stage):
            for name, session in sessions.items():
                found, step_ms = timed_steps(session, [step], [batches[step % _BATCHES]], device)
                losses[name].append(float(found[0]))
                if step % steps_of_stage >= _BATCHES:  # the first compile, allocate, fill the cache
                    times[name].append(step_ms)
        rows += [
            {
                "stage": stage + 1,
                "boundary": 0 if o["embeddings"] == "always" else boundaries[stage],
                "method": name,
                "step_ms": statistics.median(times[name]),
                "step_ms_p20": statistics.quantiles(times[name], n=5)[0],
                "step_ms_p80": statistics.quantiles(times[name], n=5)[-1],
                "mean_loss": statistics.mean(losses[name]),
                "state_bytes": sum(
                    tensor.nbytes
                    for state in session.optimizer_tensors().values()
                    for tensor in state.values()
                    if isinstance(tensor, torch.Tensor)
                ),
                "cache": session.note(),
            }
            for name, session in sessions.items()
        ]
    content = {
        "meta": provenance(device),
        "config": o,
        "model": {"class": type(base).__name__, "blocks": num_blocks},
        "gate_largest_difference": largest,
        "rows": rows,
    }
    print(json.dumps(content, indent=1) if o["json"] else _shown(content))


def _shown(content: Mapping[str, Any]) -> str:
    """The table: a line per stage and way, and the whole run relative to full training."""
    o, rows = content["config"], content["rows"]
    cells = [("stage", "boundary", "", "step (ms)", "/ full", "mean loss")]
    total_ms: dict[str, float] = {}
    for row in rows:
        full_ms = next(r["step_ms"] for r in rows if r["stage"] == row["stage"])  # the first
        total_ms[row["method"]] = total_ms.get(row["method"], 0.0) + row["step_ms"]
        figures = f"{row['step_ms']:,.1f}", f"{row['step_ms'] / full_ms:.2f}"
        where = str(row["stage"]), str(row["boundary"]), row["method"]
        cells.append((*where, *figures, f"{row['mean_loss']:.4f}"))
    for name, ms in total_ms.items():
        cells.append(("run", "", name, "", f"{ms / total_ms['full']:.2f}", ""))
    return (
        f"{content['model']['class']}, {content['model']['blocks']} blocks, {o['batch_size']} x "
        f"{o['seq_len']} tokens, {content['meta']['device']}; gate: gradients within "
        f"{content['gate_largest_difference']:.0e} of plain torch\n\n"
        + "\n".join(text_table(cells, left=(0, 2)))
        + "\n\nMedian step, and mean loss over the steps of the stage."
    )
