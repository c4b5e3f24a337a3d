"""Training on rows of real lengths, padded and packed, in three stages, against full fine-tuning.

    python benchmarks/packing.py --data FOLDER [--task cola] [--output FOLDER]
    python benchmarks/packing.py                          # lengths drawn as those of the tasks are
    python benchmarks/packing.py --verdict FOLDER         # stored results, measure nothing

`FOLDER/<task>/train.jsonl` holds the rows; `experiments/packing.toml` says the rest. Who trains:

- "HF": transformers, everything, random batches padded to their longest row, torch's fused AdamW.
- "HF + group_by_length": the same in the batches of the Trainer's sampler.
- "ours without packing", "ours", "ours + cache": the schedule, on the batches of "HF".
- "full, packed" is stage 1 of "ours", where nothing is frozen.

First comes the gate (`gate.py`): losses, gradients and updates of all stages at dropout 0. Then
models for every stage live side by side, in one process, and take every batch in turn, in reverse
order in every second round. A batch's time is the median over rounds, for the cache the first round
(it fills) apart from the later ones (they are served); ratios are per batch; a step's time is the
mean over the batches, which stand for an epoch (`real_rows.sample`). A whole run is composed of
these: every stage `epochs_per_stage` epochs, with the cache one that fills and then served ones; in
stage 1, which has no prefix, "ours + cache" is "ours". `first_step_ms`, in which packing and cache
are tried, is stored and not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gate import Gate
from providers import PROVIDERS
from real_rows import (
    Row,
    draw,
    grouped_batches,
    padded,
    places_and_tokens,
    random_batches,
    read,
    sample,
)
from stored_results import Verdict, store
from training import Work, free

from progtuning_kernels import ProgressiveSchedule, plan_training
from progtuning_kernels.bench import Refused, Session, timed_steps
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.patch import handle_of
from progtuning_kernels.schedules.files import read_settings

EXPERIMENT = Path(__file__).resolve().parent / "experiments" / "packing.toml"
FULL, GROUPED, CACHED, PACKED = "HF", "HF + group_by_length", "ours + cache", "full, packed"
WAYS = {  # and its provider
    FULL: "full",
    GROUPED: "full",
    "ours without packing": "ours, packing off",
    "ours": "ours",
    CACHED: "ours, cache",
}


@dataclass
class Arm:
    """One way in one stage; stage 0 stands for all of full training."""

    way: str
    stage: int
    session: Session
    first_step_ms: float = 0.0
    rounds_ms: list[list[float]] = field(default_factory=list)  # round -> batch

    def take(self, work: Work, step: int, batch: Mapping[str, Any]) -> float:
        number = self.stage * work.steps_of_stage + step
        return timed_steps(self.session, [number], [batch], work.device)[1]

    def step_ms(self, *, filling: bool = False) -> list[float]:
        """By batch."""
        rounds = self.rounds_ms
        if self.way == CACHED:
            rounds = rounds[:1] if filling else rounds[1:]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def make_arms(work: Work) -> list[Arm]:
    arms = []
    for way, name in WAYS.items():
        provider = PROVIDERS[name]
        for stage in range(work.stages) if provider.follows_plan else (0,):
            if way == CACHED and not work.boundaries[stage]:
                continue
            session = provider.session(work)
            if provider.follows_plan:
                handle_of(session.model).seek(stage * work.steps_of_stage)
            arms.append(Arm(way, stage, session))
    return arms


def measure(
    work: Work, random: Sequence[list[Row]], grouped: Sequence[list[Row]], rounds: int
) -> list[Arm]:
    """Every arm on every batch in turn; the first of the batches warms up and is not measured."""

    def made(rows: Sequence[list[Row]]) -> list[dict[str, torch.Tensor]]:
        return [padded(batch, work.sizes.vocabulary, work.device) for batch in rows]

    batches = {True: made(grouped), False: made(random)}
    arms = make_arms(work)
    for arm in arms:
        arm.first_step_ms = arm.take(work, 1, batches[False][0])
        arm.take(work, 2, batches[False][0])  # the cache is tried in two forwards
    for turn in range(rounds):
        for arm in arms:
            arm.rounds_ms.append([])
        for i in range(1, len(random)):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                step = 3 + turn * len(random) + i
                spent_ms = arm.take(work, step, batches[arm.way == GROUPED][i])
                arm.rounds_ms[-1].append(spent_ms)
    return arms


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


def summarise(arms: Sequence[Arm], work: Work, epochs_per_stage: int) -> dict[str, Any]:
    """What is stored of the ways: stages, and whole runs of one step an epoch.

    A cache that served nothing gets no number but a reason.
    """
    by_place = {(arm.way, arm.stage): arm for arm in arms}
    full_ms = by_place[FULL, 0].step_ms()
    found: dict[str, Any] = {}
    for way in WAYS:
        stages, run_ms = [], 0.0
        for stage in range(work.stages):
            arm = by_place.get((way, stage)) or by_place.get((way, 0)) or by_place["ours", 0]
            own_ms, filling_ms = arm.step_ms(), arm.step_ms(filling=True)
            run_ms += statistics.mean(filling_ms)
            run_ms += (epochs_per_stage - 1) * statistics.mean(own_ms)
            if arm.way != way or arm.stage != stage:
                continue
            entry: dict[str, Any] = {
                "stage": stage,
                "boundary": None if way in (FULL, GROUPED) else work.boundaries[stage],
                "step_ms": statistics.mean(own_ms),
                "batches_ms": own_ms,
                "first_step_ms": arm.first_step_ms,
            }
            if way != GROUPED:  # whose batches are others
                entry["over_full"] = spread([f / o for f, o in zip(full_ms, own_ms, strict=True)])
            if way == CACHED:
                entry |= {"filling_ms": statistics.mean(filling_ms), "note": arm.session.note()}
            if way not in (FULL, GROUPED):
                report = handle_of(arm.session.model).packing_report()
                entry["packing"] = str(report)
                entry["skipped_share"] = report.skipped_share
            stages.append(entry)
        found[way] = {"stages": stages, "run_ms": run_ms}
    packed_ms = work.stages * epochs_per_stage * statistics.mean(by_place["ours", 0].step_ms())
    found[PACKED] = {"stages": [], "run_ms": packed_ms}
    for arm in arms:
        if arm.way == CACHED and not handle_of(arm.session.model).cache_report().hits:
            where = f"at boundary {work.boundaries[arm.stage]}"
            found[CACHED] = {"reason": f"it served no row {where}: {arm.session.note()}"}
    for entry in found.values():
        if "reason" in entry:
            continue
        entry["speedup"] = found[FULL]["run_ms"] / entry["run_ms"]
        entry["speedup_over_grouped"] = found[GROUPED]["run_ms"] / entry["run_ms"]
    return found


def predict(
    work: Work, shape: Mapping[str, Mapping[str, float]], epochs_per_stage: int
) -> dict[str, Any]:
    """The planner's operations and bytes of every way, at an epoch's mean width and real share."""
    places, tokens = shape["random"]["places"], shape["random"]["tokens"]
    model = replace(work, device=torch.device("meta")).model()

    def planned(places: float, **more: Any) -> Any:
        width = round(places / work.rows)
        sizes = dict(batch_size=work.rows, seq_len=width, device=work.device)
        return plan_training(model, ProgressiveSchedule(work.stages), **sizes, **more)

    padded_plan = planned(places)
    packed_plan = planned(places, real_tokens=tokens / places, cache=True)
    grouped_plan = planned(shape["grouped"]["places"])
    full = padded_plan.full
    ratios: dict[str, list[float]] = {
        FULL: [1.0] * work.stages,
        GROUPED: [grouped_plan.full.flops / full.flops] * work.stages,
        "ours without packing": [s.step_ratio for s in padded_plan.stages],
        "ours": [s.step_ratio for s in packed_plan.stages],
        PACKED: [packed_plan.stages[0].step_ratio] * work.stages,
    }
    served = [
        s.step_ratio if s.cached_step_ratio is None else s.cached_step_ratio
        for s in packed_plan.stages
    ]
    later = epochs_per_stage - 1
    ratios[CACHED] = [
        (fill + later * hit) / epochs_per_stage
        for fill, hit in zip(ratios["ours"], served, strict=True)
    ]
    return {
        "speedup": {way: work.stages / sum(of_stages) for way, of_stages in ratios.items()},
        "full_step": {
            "flops": full.flops,
            "activation_bytes": full.activation_bytes,
            "peak_bytes": full.peak_bytes,
        },
        "packed_stages": [
            {
                "flops": s.flops,
                "activation_bytes": s.activation_bytes,
                "peak_bytes": s.peak_bytes,
                "cache_bytes_per_row": s.cache_bytes_per_sample,
            }
            for s in packed_plan.stages
        ],
    }


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    found = []
    for way, over, least in content["experiment"]["targets"]:
        what = f"{content['experiment']['task_title']}: {way} against {over}, {least:g} x as fast"
        entry = content["ways"][way]
        if "reason" in entry:
            found.append(Verdict(what, None, entry["reason"]))
            continue
        ratio = content["ways"][over]["run_ms"] / entry["run_ms"]
        by = f"{ratio:.3f}, {ratio / least - 1:+.1%} of {least:g}"
        found.append(Verdict(what, ratio >= least, by))
    return found


def rows_of(settings: Mapping[str, Any], task: str, data: Path | None, work: Work) -> list[Row]:
    if data is not None:
        sizes = dict(most_tokens=settings["most_tokens"], most_rows=settings["most_rows"])
        return read(data / task / "train.jsonl", **sizes)
    return draw(
        settings["quantiles"],
        settings["tasks"][task]["lengths"],
        count=settings["most_rows"],
        vocabulary=work.sizes.vocabulary,
    )


def run(settings: Mapping[str, Any], task: str, data: Path | None) -> dict[str, Any]:
    """Gate, times, predictions and verdicts of one task.

    Raises:
        Refused: the gate of one way is red.
    """
    of_task, started = settings["tasks"][task], time.perf_counter()
    count, rounds = of_task["batches"], settings["rounds"]
    work = Work(
        shape=settings["shape"],
        precision=settings["precision"],
        rows=settings["rows"],
        tokens=settings["most_tokens"],
        stages=settings["stages"],
        batches=(1 + count) * (1 + rounds) + 3,  # steps of a stage, at most
        epochs=1,
        device=torch.device(settings["device"]),
    )
    rows = rows_of(settings, task, data, work)
    gate = Gate(replace(work, real_rows=tuple(rows)), settings["gate_rows"])
    gates = {way: gate.check(PROVIDERS[name]) for way, name in WAYS.items() if way != GROUPED}
    del gate
    free(work.device)
    epochs = {
        "random": random_batches(rows, work.rows, seed=1),
        "grouped": grouped_batches(rows, work.rows, seed=1),
    }
    chosen = {kind: sample(batches, count, seed=2) for kind, batches in epochs.items()}
    shape = {}
    for kind, batches in epochs.items():
        places, tokens = places_and_tokens(batches)
        sampled = places_and_tokens(chosen[kind])
        shape[kind] = {"batches": len(batches), "places": places, "tokens": tokens}
        shape[kind] |= {"real_share": tokens / places, "sampled_places": sampled[0]}
        shape[kind]["sampled_tokens"] = sampled[1]
    # one that comes nowhere else goes first, or the cache would have its rows
    kept = {id(batch) for batch in chosen["random"]}
    spare = next(batch for batch in epochs["random"] if id(batch) not in kept)
    arms = measure(work, [spare, *chosen["random"]], [spare, *chosen["grouped"]], rounds)
    ways = summarise(arms, work, settings["epochs_per_stage"])
    for arm in arms:
        arm.session.close()
    del arms
    free(work.device)
    content = {
        "meta": provenance(work.device),
        "experiment": {k: v for k, v in settings.items() if k != "tasks"}
        | {**of_task, "title": settings["title"], "task": task, "task_title": of_task["title"]}
        | {"rows_are": "drawn" if data is None else "the task's"},
        "gate": gates,
        "shape": shape,
        "ways": ways,
        "predicted": predict(work, shape, settings["epochs_per_stage"]),
        "seconds": time.perf_counter() - started,
    }
    return content | {"verdicts": [vars(v) for v in verdicts(content)]}


def show(content: Mapping[str, Any]) -> None:
    experiment, shape = content["experiment"], content["shape"]["random"]
    print(
        f"\n{experiment['title']}, {experiment['task_title']} ({experiment['rows_are']}): "
        f"{experiment['rows']} rows, {shape['real_share']:.0%} of {shape['places']:,.0f} places "
        f"are real tokens; {content['seconds']:.0f} s"
    )
    for way, entry in content["ways"].items():
        if "reason" in entry:
            print(f"  {way:22} no number: {entry['reason']}")
            continue
        line = f"  {way:22} x {entry['speedup']:.2f} of HF, "
        line += f"x {entry['speedup_over_grouped']:.2f} of group_by_length, "
        line += f"predicted x {content['predicted']['speedup'][way]:.2f};"
        for stage in entry["stages"]:
            line += f" {stage['step_ms']:.0f}"
            if "filling_ms" in stage:
                line += f" (fills: {stage['filling_ms']:.0f})"
        print(line + " ms" * bool(entry["stages"]))
    for verdict in content["verdicts"]:
        print(Verdict(**verdict))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    settings = read_settings(EXPERIMENT)
    parser.add_argument("--data", type=Path, help="FOLDER/<task>/train.jsonl; else drawn lengths")
    parser.add_argument("--task", action="append", choices=list(settings["tasks"]))
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--shape", help="of benchmarks/training.py, other than MiniLM")
    parser.add_argument("--output", type=Path, help="write packing/TASK.json in this folder")
    parser.add_argument("--verdict", type=Path, metavar="FOLDER", help="of stored results")
    arguments = parser.parse_args()
    if arguments.verdict is not None:
        stored = sorted(arguments.verdict.glob("packing/*.json"))
        if not stored:
            raise SystemExit(f"{arguments.verdict}: no packing/*.json here, so no result")
        for path in stored:
            show(json.loads(path.read_text()))
        return
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other packages, on every build
    settings |= {name: value for name in ("device", "shape") if (value := vars(arguments)[name])}
    failed = []
    for task in arguments.task or settings["tasks"]:
        try:
            content = run(settings, task, arguments.data)
        except (Refused, UserError) as error:  # a red gate, a file that is not there
            failed.append(f"{task}: no number: {error}")
            continue
        show(content)
        if arguments.output is not None:
            store(content, arguments.output / "packing" / f"{task}.json")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
