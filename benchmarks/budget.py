"""Steps within a budget: what they take of a full step, predicted and measured, on this CPU.

    python benchmarks/budget.py [--output FOLDER]

For every budget rho, `budget_schedule`'s units are chosen by calibrated costs and by the gradient
importance of one batch. Their step is timed in turn with a full step of the same patched model,
with a step of plain torch in which the bottom blocks are frozen by hand for the same predicted
cost, and with the stages of a progressive schedule. Rows have no padding; dropout is that of the
config.

First comes the gate: a step under every plan has the gradients, and moves the weights, as plain
torch does with the same parameters frozen by hand. Without it there are no numbers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from stored_results import store
from torch import nn
from training import Work

from progtuning_kernels import FixedBlockSchedule, FreezePlan, ProgressiveSchedule
from progtuning_kernels.bench import (
    TOLERANCES,
    Batch,
    Session,
    compare,
    our_session,
    plain_session,
    timed_steps,
    trace,
)
from progtuning_kernels.budget.importance import by_gradient
from progtuning_kernels.budget.knapsack import StepCosts, choose_units
from progtuning_kernels.budget.step_costs import measure_step_costs
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.freezing.active_set import ActiveSet
from progtuning_kernels.model.layout import Layout, find_layout
from progtuning_kernels.planner.stage_meter import Options

RHOS = (0.4, 0.5, 0.6, 0.7, 0.85)
SHAPES = ("MiniLM", "MiniLM-L12", "Llama 20 M")
STAGES = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    rows: int = field(default=8, metadata={"help": "of a batch"})
    tokens: int = field(default=64, metadata={"help": "of a row"})
    rounds: int = field(default=6, metadata={"help": "of all plans; two steps each, one timed"})


@dataclass(frozen=True)
class Choice:
    """One plan that is timed."""

    name: str  # "full", "budget 0.5", "by hand 0.5", "stage 1"
    plan: FreezePlan

    @property
    def by_hand(self) -> bool:
        return self.name.startswith("by hand")


def _batch(work: Work, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (work.rows, work.tokens)
    ids = torch.randint(5, work.sizes.vocabulary, shape, generator=generator)
    labels = ids if work.sizes.is_causal else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _costs(model: nn.Module, layout: Layout, work: Work, *, calibrate: bool) -> StepCosts:
    return measure_step_costs(
        model,
        layout,
        shape=(work.rows, work.tokens),
        inputs=None,
        options=Options(
            optimizer="adamw", master_weights=False, in_backward=False, cache=None, device=CPU
        ),
        calibrate=calibrate,
        tied="frozen",
        frozen_mode="eval",
        kernels="auto",
        head=(True,),
    )


def _choices(costs: StepCosts, worth: Sequence[Fraction]) -> list[Choice]:
    """What is timed in a round, the full step first; a budget below every step is left out."""
    num_blocks = len(worth) - 2
    found = [Choice("full", FreezePlan((True,) * num_blocks, embeddings=True))]
    suffixes = [
        FreezePlan.from_boundary(k, num_blocks, embeddings=False) for k in range(num_blocks)
    ]
    for rho in RHOS:
        limit = Fraction(rho) * costs.full
        plan = choose_units(costs, worth, limit, head=(True,))
        hand = next((suffix for suffix in suffixes if costs.of(suffix) <= limit), None)
        found += [Choice(f"budget {rho}", plan)] if plan is not None else []
        found += [Choice(f"by hand {rho}", hand)] if hand is not None else []
    schedule = ProgressiveSchedule(STAGES, STAGES)
    stages = (schedule.plan(stage, num_blocks) for stage in range(STAGES))
    return found + [Choice(f"stage {i + 1}", plan) for i, plan in enumerate(stages)]


def _ours(work: Work, choices: Sequence[Choice], *, steps_of_each: int, rounds: int) -> Session:
    sets = [
        ",".join(
            p for p in c.plan.units_in_words().replace("blocks ", "").split(", ") if p != "head"
        )
        for c in choices
    ]
    starts = range(0, rounds * len(sets) * steps_of_each, steps_of_each)
    schedule = FixedBlockSchedule(dict(zip(starts, sets * rounds, strict=True)))
    return our_session(work, work.model(), schedule, optimizer_options={"on_freeze": "keep"})


def _by_hand(work: Work, choices: Sequence[Choice], *, steps_of_each: int) -> Session:
    model = work.model()
    layout = find_layout(model)

    def begin(step: int) -> None:
        plan = choices[step // steps_of_each % len(choices)].plan
        for name, p in model.named_parameters():
            unit = layout.unit_of(name)
            flags = (plan.embeddings, *plan.trainable, plan.head)
            p.requires_grad_(flags[unit + 1])

    return plain_session(work, model, begin=begin)


def _gate(work: Work, choices: Sequence[Choice]) -> dict[str, float]:
    batches = [_batch(work, seed) for seed in range(len(choices))]
    sessions = (
        _ours(work, choices, steps_of_each=1, rounds=1),
        _by_hand(work, choices, steps_of_each=1),
    )
    traces = []
    for session in sessions:
        session.model.eval()
        traces.append(trace(session, batches))
        session.close()
    loss, gradient = TOLERANCES["cpu"]
    return compare(*traces, loss_tolerance=loss, gradient_tolerance=gradient)


def _timed(work: Work, choices: Sequence[Choice], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each choice's steps, by name, round by round."""
    ways = {
        by_hand: [choice for choice in choices if choice.by_hand == by_hand]
        for by_hand in (False, True)
    }
    sessions = {
        False: _ours(work, ways[False], steps_of_each=2, rounds=rounds),
        True: _by_hand(work, ways[True], steps_of_each=2),
    }
    counts = dict.fromkeys(sessions, 0)
    times: dict[str, list[float]] = {choice.name: [] for choice in choices}
    batch = _batch(work, 0)
    for _ in range(rounds):
        for choice in choices:
            session, number = sessions[choice.by_hand], counts[choice.by_hand]
            timed_steps(session, [number], [batch], CPU)  # pays the change of plan
            times[choice.name].append(timed_steps(session, [number + 1], [batch], CPU)[1])
            counts[choice.by_hand] += 2
    for session in sessions.values():
        session.close()
    return times


def measure(shape: str, settings: Settings) -> dict[str, Any]:
    work = Work(shape, "fp32", settings.rows, settings.tokens, 1, 1, 1, CPU)
    model = work.model()
    layout = find_layout(model)
    worth = by_gradient(model, layout, ActiveSet(model, layout, "frozen"), [_batch(work, 0)], _loss)
    by_unit = [Fraction(value) for value in worth]
    costs = _costs(model, layout, work, calibrate=True)
    counted = _costs(model, layout, work, calibrate=False)
    choices = _choices(costs, by_unit)
    errors = _gate(work, choices)
    times = _timed(work, choices, settings.rounds)
    full_ms = statistics.median(times["full"])
    rows = {}
    for choice in choices:
        flags = (choice.plan.embeddings, *choice.plan.trainable, choice.plan.head)
        step_ms = statistics.median(times[choice.name])
        rows[choice.name] = {
            "trains": choice.plan.units_in_words(),
            "predicted": float(costs.of(choice.plan) / costs.full),
            "by_operations": float(Fraction(counted.of(choice.plan), counted.full)),
            "measured": step_ms / full_ms,
            "step_ms": step_ms,
            "importance": sum(w for w, on in zip(worth, flags, strict=True) if on) / sum(worth),
        }
    return {"gate": errors, "rows": rows}


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def table(content: Mapping[str, Any]) -> str:
    """Markdown: shares of the full step, and of the importance of everything."""
    lines = ["| | trains | predicted | by operations | measured | error | importance |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for shape, entry in content["shapes"].items():
        full_ms = entry["rows"]["full"]["step_ms"]
        lines.append(f"| **{shape}, a full step: {full_ms:.0f} ms** | | | | | | |")
        for name, row in entry["rows"].items():
            if name == "full":
                continue
            shares = (row["predicted"], row["by_operations"], row["measured"])
            # plain torch is no step of this library: its time is not what was predicted
            error = "" if name.startswith("by hand") else f"{row['predicted'] / shares[2] - 1:+.1%}"
            cells = (*(f"{share:.3f}" for share in shares), error, f"{row['importance']:.0%}")
            lines.append(f"| {name} | {row['trains']} | {' | '.join(cells)} |")
    largest = max(
        abs(row["predicted"] / row["measured"] - 1)
        for entry in content["shapes"].values()
        for name, row in entry["rows"].items()
        if not name.startswith("by hand")
    )
    return "\n".join([*lines, "", f"largest error of a prediction: {largest:.1%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for setting in fields(Settings):
        about = f"{setting.metadata['help']} (%(default)s)"
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default, help=about)
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="repeatable; all unless given"
    )
    parser.add_argument("--output", type=Path, help="write budget.json in this folder")
    options = vars(parser.parse_args())
    output, shapes = options.pop("output"), options.pop("shape") or SHAPES
    settings = Settings(**options)
    content: dict[str, Any] = {"meta": provenance(CPU), "settings": asdict(settings)}
    content["shapes"] = {shape: measure(shape, settings) for shape in shapes}
    print(table(content))
    if output is not None:
        store(content, output / "budget.json")


if __name__ == "__main__":
    main()
