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
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.utils import _pytree as pytree

from .. import bench
from ..cache import PrefixCache
from ..patch import patch_model
from ..planner.example_batch import example_batch, on_device
from ..planner.planning import without_data
from ..schedules import ProgressiveSchedule
from ..text_table import text_table
from .config import autocast_dtype, choose_device
from .errors import as_user_error
from .models import check_length
from .options import TrainOptions
from .plan_command import model_without_weights
from .provenance import provenance
from .sizes import parse_bytes

_BATCHES = 4  # of an epoch: a stage's first epoch warms up and fills the cache, others are timed


def _gate(
    ways: Mapping[str, Callable[[], bench.Session]],
    batches: Sequence[bench.Batch],
    active: Sequence[set[str]],
    precision: str,
) -> float:
    """Largest error of losses and gradients against full training, a step per stage, no dropout.

    Full training drops the gradients of what the plan freezes before torch's AdamW.
    """
    loss, gradient = bench.TOLERANCES[precision]
    stages = [batches[stage % len(batches)] for stage in range(len(active))]
    sessions = {name: make() for name, make in ways.items()}
    for session in sessions.values():
        session.model.eval()
    full = sessions.pop("full")
    truth = bench.trace(full, stages, counts=lambda stage, name: name in active[stage])
    largest = 0.0
    for name, session in sessions.items():
        with as_user_error(bench.Refused, said=name):
            errors = bench.compare(
                bench.trace(session, stages, passes=2),
                truth,
                loss_tolerance=loss,
                gradient_tolerance=gradient,
                compares_movement=precision != "bf16",
            )
        largest = max(largest, errors["loss_error"], errors["gradient_error"])
    return largest


def run(options: Mapping[str, Any]) -> None:
    o = dict(options)
    device = torch.device(choose_device(o["device"]))
    dtype = autocast_dtype(TrainOptions(precision=o["precision"]), device.type)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    rule = SimpleNamespace(lr=5e-5, clip=1.0, autocast=autocast)
    blocks = None if o["blocks"] is None else o["blocks"].split(",")
    cache_bytes = parse_bytes(o["cache"])
    task = "text-classification" if o["task"] == "classification" else o["task"]
    meta, _ = model_without_weights(o["model"], task)
    check_length(meta, o["seq_len"], "--seq-len")
    meta.config.use_cache = False
    stages, steps_of_stage = o["stages"], _BATCHES * (1 + o["epochs"])
    vocabulary = getattr(meta.config, "vocab_size", None)
    torch.manual_seed(0)

    def schedule(steps: int) -> ProgressiveSchedule:
        return ProgressiveSchedule(stages, stages * steps, embeddings=o["embeddings"])

    with as_user_error(), without_data(meta, "tried on random rows"):
        shapes = example_batch(meta, o["batch_size"], o["seq_len"], padding=True, device=device)
        batches = [on_device(shapes, device, vocabulary) for _ in range(_BATCHES)]
        base = type(meta)(meta.config).to(device).train()
        active, boundaries = [], []  # by stage: names of what trains; lowest block
        with patch_model(base, schedule(1), kernels="off", blocks=blocks) as handle:
            for stage in range(stages):
                handle.seek(stage)
                active.append({n for n, p in base.named_parameters() if p.requires_grad})
                boundaries.append(handle.boundary)

    def ways(steps: int) -> dict[str, Callable[[], bench.Session]]:
        """What makes a session of each way, with so many steps in a stage."""

        def freezing() -> bench.Session:
            model = copy.deepcopy(base)

            def begin(step: int) -> None:
                for name, p in model.named_parameters() if step % steps == 0 else ():
                    p.requires_grad_(name in active[step // steps])

            return bench.plain_session(rule, model, begin=begin)

        def ours(**more: Any) -> bench.Session:
            return bench.our_session(
                rule, copy.deepcopy(base), schedule(steps), blocks=blocks, **more
            )

        return {
            "full": lambda: bench.plain_session(rule, copy.deepcopy(base)),
            "frozen by hand": freezing,
            "progressive": ours,
            "progressive, cache": lambda: ours(cache=PrefixCache(cache_bytes)),
        }

    with as_user_error(), without_data(meta, "tried on random rows"):
        largest = _gate(ways(1), batches, active, device.type if dtype is None else "bf16")
        sessions = {name: make() for name, make in ways(steps_of_stage).items()}
    rows = []
    console = Console(stderr=o["json"])
    counted = track(range(stages), "measuring", console=console, disable=not console.is_terminal)
    for stage in counted:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        losses: dict[str, list[float]] = {name: [] for name in sessions}
        for step in range(stage * steps_of_stage, (stage + 1) * steps_of_stage):
            for name, session in sessions.items():
                found, step_ms = bench.timed_steps(
                    session, [step], [batches[step % _BATCHES]], device
                )
                losses[name].append(float(found[0]))
                if step % steps_of_stage >= _BATCHES:  # the first compile, allocate, fill the cache
                    times[name].append(step_ms)
        for name, session in sessions.items():
            p20, *_, p80 = statistics.quantiles(times[name], n=5)
            state = pytree.tree_leaves(dict(session.optimizer_tensors()))
            rows.append(
                {
                    "stage": stage + 1,
                    "boundary": boundaries[stage],
                    "method": name,
                    "step_ms": statistics.median(times[name]),
                    "step_ms_p20": p20,
                    "step_ms_p80": p80,
                    "mean_loss": statistics.mean(losses[name]),
                    "state_bytes": sum(t.nbytes for t in state if isinstance(t, torch.Tensor)),
                    "cache": session.note(),
                }
            )
    content = {
        "meta": provenance(device),
        "config": o,
        "model": {"class": type(base).__name__, "blocks": handle.num_blocks},
        "gate_largest_difference": largest,
        "rows": rows,
    }
    print(json.dumps(content, indent=1) if o["json"] else _shown(content))


def _shown(content: Mapping[str, Any]) -> str:
    """The table: a line per stage and way, and the whole run relative to full training."""
    o, rows, model = content["config"], content["rows"], content["model"]
    cells = [("stage", "boundary", "", "step (ms)", "/ full", "state (MiB)", "mean loss")]
    total_ms: dict[str, float] = {}
    for row in rows:
        full_ms = next(r["step_ms"] for r in rows if r["stage"] == row["stage"])  # the first
        total_ms[row["method"]] = total_ms.get(row["method"], 0.0) + row["step_ms"]
        figures = f"{row['step_ms']:,.1f}", f"{row['step_ms'] / full_ms:.2f}"
        figures += f"{row['state_bytes'] / 2**20:,.1f}", f"{row['mean_loss']:.4f}"
        cells.append((str(row["stage"]), str(row["boundary"]), row["method"], *figures))
    for name, ms in total_ms.items():
        cells.append(("run", "", name, "", f"{ms / total_ms['full']:.2f}", "", ""))
    lines = [
        f"{model['class']}, {model['blocks']} blocks, {o['batch_size']} x {o['seq_len']} tokens",
        f"{content['meta']['device']}; "
        f"gradients within {content['gate_largest_difference']:.0e} of plain torch's",
        "",
        *text_table(cells, left=(0, 2)),
        "",
        "Median step. The optimizer's state when the stage ends. Mean loss of its steps.",
    ]
    return "\n".join(lines)
