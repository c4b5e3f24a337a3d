"""The accuracy study's statistics, its table and its figure, from stored runs and nothing else.

Scores are in points. Methods are compared in pairs, seed by seed, because all begin with the same
head and see the same rows in the same order. Intervals are those of
Student's t. The mean over tasks takes the tasks as they are: its interval is about seeds, with the
degrees of freedom of Welch and Satterthwaite.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picture_style import CARD, INK, MUTED, STYLE, method_colour, new_figure, save
from study_plan import Study

from progtuning_kernels.cli.errors import UserError

FULL = "full"
MARKERS = "<!-- study:begin -->\n", "\n<!-- study:end -->"


@dataclass(frozen=True)
class Interval:
    """A mean of differences in points; `low` and `high` are None where they do not vary, as those
    of one seed, or of runs that all predict one class.
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        shown = f"{self.mean:+.1f}"
        return shown if self.low is None else f"{shown} [{self.low:+.1f}, {self.high:+.1f}]"


def over_seeds(differences: Sequence[float], confidence: float) -> Interval:
    return over_tasks([differences], confidence)


def over_tasks(tasks: Sequence[Sequence[float]], confidence: float) -> Interval:
    """The mean over tasks of the mean over seeds.

    Args:
        tasks: differences of every task, one a seed.
    """
    from scipy.stats import t

    mean = statistics.mean(map(statistics.mean, tasks))
    if min(map(len, tasks)) < 2:
        return Interval(mean, None, None)
    parts = [statistics.variance(own) / len(own) / len(tasks) ** 2 for own in tasks]
    if not sum(parts):
        return Interval(mean, None, None)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(own) - 1) for part, own in zip(parts, tasks, strict=True)
    )
    low, high = t.interval(confidence, freedom, loc=mean, scale=math.sqrt(sum(parts)))
    return Interval(mean, float(low), float(high))


def verdict(found: Interval, margin: float) -> str:
    """What the interval says of the margin."""
    if found.low is None or found.high is None:
        return "no interval"
    if found.low > -margin:
        better = ", better" if found.low > 0 else ", worse" if found.high < 0 else ""
        return f"within the margin{better}"
    if found.high < -margin:
        return "worse by more than the margin"
    return "undecided" + (", worse" if found.high < 0 else "")


def differences(study: Study, model: str, task: str, method: str, other: str = FULL) -> list[float]:
    """To another method, of the seeds that both have."""
    own, others = study.runs(model, task, method), study.runs(model, task, other)
    return [own[seed]["score"] - others[seed]["score"] for seed in own if seed in others]


def compared(study: Study, model: str) -> tuple[list[str], list[str]]:
    """Tasks and methods of a model with a pair of runs, in the order of the experiment."""
    parts = [p for p in study.experiment["parts"] if p["model"] == model]
    tasks = dict.fromkeys(t for p in parts for t in p["tasks"] if study.runs(model, t, FULL))
    methods = dict.fromkeys(m for p in parts for m in p["methods"])
    found = [m for m in methods if any(differences(study, model, t, m) for t in tasks)]
    order = [*study.experiment["methods"]]
    return [*tasks], sorted(found, key=order.index)


def seconds(study: Study, model: str, tasks: Sequence[str], method: str) -> float | None:
    """Of one run of every task, from the measured times; None where one was not timed."""
    found = []
    for task in tasks:
        run = next(iter(study.runs(model, task, method).values()))
        found.append(study.seconds(model, task, method, run["steps"]))
    return None if None in found else sum(found)


def table(study: Study) -> str:
    """Markdown: three tables per model: scores of methods beside full fine-tuning and beside each
    other, and seconds, where one method may be timed in several ways.
    """
    experiment, parts = study.experiment, []
    names = {key: task["title"] for key, task in experiment["tasks"].items()}
    for model in dict.fromkeys(part["model"] for part in experiment["parts"]):
        tasks, methods = compared(study, model)
        if not tasks:
            continue
        heads = ["Method", "Rate", "Seeds", *(names[t] for t in tasks), *_mean_heads(study, model)]
        heads += ["Times as fast", "Updates saved (%)", "Peak state (MiB)"]
        lines = [f"**{experiment['models'][model]['title']}**", ""]
        lines += [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
        own_runs = [m for m in methods if "runs_of" not in experiment["methods"][m]]
        lines += [_line(study, model, tasks, method) for method in own_runs]
        parts += ["\n".join(lines), *_comparisons(study, model, tasks)]
        parts += _seconds_table(study, model, tasks, methods)
    return "\n\n".join([*parts, "\n".join(_notes(study))])


def _comparisons(study: Study, model: str, tasks: Sequence[str]) -> list[str]:
    """The experiment's pairs of methods that both ran."""
    confidence = study.experiment["confidence"]
    names = {key: method["title"] for key, method in study.experiment["methods"].items()}
    lines = []
    for method, other in study.experiment["comparisons"]:
        by_task = {t: d for t in tasks if (d := differences(study, model, t, method, other))}
        if not by_task:
            continue
        cells = [f"{names[method]} – {names[other]}", _counts(by_task)]
        cells += [str(over_seeds(by_task[t], confidence)) if t in by_task else "" for t in tasks]
        cells += _mean_cells(study, model, by_task, tasks)
        own_s, other_s = (seconds(study, model, [*by_task], m) for m in (method, other))
        ratio = "" if own_s is None or other_s is None else f"{other_s / own_s:.2f}"
        lines.append(f"| {' | '.join([*cells, ratio])} |")
    heads = ["Difference", "Seeds", *(study.experiment["tasks"][t]["title"] for t in tasks)]
    heads += [*_mean_heads(study, model), "Times as fast"]
    head = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return ["\n".join([*head, *lines])] if lines else []


def _seconds_table(
    study: Study, model: str, tasks: Sequence[str], methods: Sequence[str]
) -> list[str]:
    """Of a run, those of full fine-tuning and how many times less the others take."""
    lines = []
    for method in methods:
        cells = [study.experiment["methods"][method]["title"]]
        for summed in (*([task] for task in tasks), tasks):
            ran = all(differences(study, model, task, method) for task in summed)
            own_s, full_s = (
                seconds(study, model, summed, m) if ran else None for m in (method, FULL)
            )
            if own_s is None or full_s is None:
                cells.append("")
            else:
                cells.append(f"{full_s:.0f} s" if method == FULL else f"{full_s / own_s:.2f} x")
        if any(cells[1:]):
            lines.append(f"| {' | '.join(cells)} |")
    names = (study.experiment["tasks"][t]["title"] for t in tasks)
    heads = ["Times as fast", *names, "All tasks"]
    head = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return ["\n".join([*head, *lines])] if lines else []


def _mean_heads(study: Study, model: str) -> list[str]:
    heads = ["Mean over tasks", "Against the margin"]
    if left_out := study.experiment["models"][model].get("mean_without"):
        names = (study.experiment["tasks"][task]["title"] for task in left_out)
        heads.append(f"Mean without {', '.join(names)}")
    return heads


def _mean_cells(
    study: Study, model: str, by_task: Mapping[str, Sequence[float]], tasks: Sequence[str]
) -> list[str]:
    """The mean over tasks, its verdict, and the mean over those where the model learns something;
    a mean over fewer tasks than there are would compare with no other.
    """
    if len(by_task) < len(tasks):
        return [""] * len(_mean_heads(study, model))
    confidence, margin = study.experiment["confidence"], study.experiment["margin_points"]
    found = over_tasks([*by_task.values()], confidence)
    cells = [str(found), verdict(found, margin)]
    if left_out := study.experiment["models"][model].get("mean_without"):
        others = [own for task, own in by_task.items() if task not in left_out]
        cells.append(str(over_tasks(others, confidence)) if others else "")
    return cells


def _counts(by_task: Mapping[str, Sequence[float]]) -> str:
    """Of seeds."""
    return " or ".join(map(str, sorted({len(found) for found in by_task.values()}, reverse=True)))


def _line(study: Study, model: str, tasks: Sequence[str], method: str) -> str:
    confidence = study.experiment["confidence"]
    by_task = {t: found for t in tasks if (found := differences(study, model, t, method))}
    rate = study.rate(model, method)
    cells = [study.experiment["methods"][method]["title"], "" if rate is None else f"{rate:g}"]
    cells.append(_counts(by_task))
    runs = {task: [*study.runs(model, task, method).values()] for task in by_task}
    for task in tasks:
        if task not in by_task:
            cells.append("")
        elif method == FULL:
            cells.append(_mean_and_error([run["score"] for run in runs[task]]))
        else:
            cells.append(str(over_seeds(by_task[task], confidence)))
    if method == FULL:
        cells += [""] * len(_mean_heads(study, model))
    else:
        cells += _mean_cells(study, model, by_task, tasks)
    own_s, full_s = (seconds(study, model, [*by_task], m) for m in (method, FULL))
    cells.append("" if own_s is None or full_s is None else f"{full_s / own_s:.2f}")
    whole = sum(
        run["num_params"] * run["steps"]
        for task in by_task
        for run in [*study.runs(model, task, FULL).values()][:1]
    )
    # LoRA's adapters are no part of the model that full fine-tuning updates
    cells.append(f"{100 * (1 - sum(of[0]['updates'] for of in runs.values()) / whole):.1f}")
    peak = max(run["peak_state_bytes"] for of in runs.values() for run in of)
    return f"| {' | '.join([*cells, f'{peak / 2**20:.1f}'])} |"


def _mean_and_error(scores: Sequence[float]) -> str:
    mean = statistics.mean(scores)
    if len(scores) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(scores) / math.sqrt(len(scores)):.1f}"


def _notes(study: Study) -> list[str]:
    """What the table leaves unsaid, from the stored runs."""
    experiment = study.experiment
    metas = [record["meta"] for record in study.records.values()]
    commits = sorted({str(meta["commit"])[:7] for meta in metas})
    dirty = sum(bool(meta["dirty"]) for meta in metas)
    devices = sorted({meta["device"] for meta in metas})
    timed = sorted({str(times["meta"]["device"]) for times in study.times.values()})
    notes = [
        f"- {len(metas)} runs, {sum(job.tunes for job in study.records)} of them for tuning; "
        f"{', '.join(devices)}"
        + (f"; seconds: {', '.join(timed)}" if timed else "")
        + f"; commits {', '.join(commits)}"
        + (f"; {dirty} with uncommitted changes" if dirty else "")
        + ".",
        f"- Intervals are of {experiment['confidence']:.0%}, of how scores vary by seed, not by "
        "validation rows or by task. Tasks count as independent; nothing is corrected for the "
        f"number of methods. The margin is {experiment['margin_points']:.1f} points.",
    ]
    edges = [
        f"{model}, {experiment['methods'][method]['title']} ({rate:g})"
        for model in experiment["models"]
        for method in compared(study, model)[1]
        if not {"rate_of", "runs_of"} & experiment["methods"][method].keys()
        and (rate := study.rate(model, method)) is not None
        and rate in (study.rates(model, method)[0], study.rates(model, method)[-1])
    ]
    if edges:
        notes.append(f"- Tuned to the lowest or highest rate that was tried: {'; '.join(edges)}.")
    shown = dict.fromkeys(m for model in experiment["models"] for m in compared(study, model)[1])
    borrowed = [
        f"{experiment['methods'][method]['title']} ({experiment['methods'][of]['title']})"
        for method in shown
        if (of := experiment["methods"][method].get("rate_of")) is not None
    ]
    if borrowed:
        notes.append(f"- At the rate of another method: {', '.join(borrowed)}.")
    nothing = [
        f"{experiment['methods'][job.method]['title']} on {experiment['tasks'][job.task]['title']}"
        for job, record in study.records.items()
        if not (record["score"] or job.tunes) and job.rate == study.rate(job.model, job.method)
    ]
    if nothing:
        notes.append(f"- Runs that learnt nothing (0.0 points): {', '.join(nothing)}.")
    perplexities: dict[str, list[float]] = {}
    for job, record in study.records.items():
        found = record.get("figures", {}).get("perplexity")
        if found is not None and job.rate == study.rate(job.model, job.method) and not job.tunes:
            perplexities.setdefault(experiment["methods"][job.method]["title"], []).append(found)
    if perplexities:
        means = (f"{name} {statistics.mean(own):.2f}" for name, own in perplexities.items())
        notes.append(f"- Perplexity of the answers, mean over seeds: {', '.join(means)}.")
    missing = Counter((j.model, j.method) for j in study.jobs() if j not in study.records)
    for model, about in experiment["models"].items():
        counts = [
            f"{method['title']} {count}"
            for name, method in experiment["methods"].items()
            if (count := missing[model, name])
        ]
        if counts:
            notes.append(f"- Planned for {about['title']} and not run yet: {'; '.join(counts)}.")
    return notes


def fill(page: Path, shown: str) -> None:
    """Write the table between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    begin, end = MARKERS
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"{page} has no {begin.strip()} with {end.strip()} below it")
    page.write_text(f"{before}{begin}{shown}{end}{after}", encoding="utf-8")


def panels(study: Study) -> list[tuple[str, list[str], list[str]]]:
    """Model, tasks and methods of every panel: all tasks of a model, and fewer tasks where more
    methods ran on them. One seed is in the table alone: its dot would say too much.
    """
    found = []
    for model in study.experiment["models"]:
        tasks, methods = compared(study, model)
        on = {m: [t for t in tasks if len(differences(study, model, t, m)) > 1] for m in methods}
        for chosen in sorted({tuple(own) for own in on.values() if own}, key=len, reverse=True):
            inside = [m for m in methods if {*chosen} <= {*on[m]}]
            timed = [m for m in inside if seconds(study, model, chosen, m) is not None]
            if FULL in timed:
                found.append((model, [*chosen], timed))
    return found


def figure(study: Study) -> Any:
    """A panel per set of tasks, a line per method, the fastest at the top: on the left its
    difference to full fine-tuning, on the right its seconds.
    """
    experiment, shown = study.experiment, panels(study)
    if not shown:
        raise UserError("no method is timed on the tasks that it ran on: accuracy_study.py times")
    counts = [len(methods) + 3.5 for *_, methods in shown]  # lines, of which 3.5 are axes and title
    drawn = new_figure(20 * sum(counts))
    parts = drawn.subfigures(len(shown), 1, squeeze=False, height_ratios=counts).flat
    for part, (model, tasks, methods) in zip(parts, shown, strict=True):
        points, times = part.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        taken_s = {method: seconds(study, model, tasks, method) for method in methods}
        methods = sorted(methods, key=taken_s.__getitem__)
        for y, method in enumerate(methods):
            by_task = [differences(study, model, task, method) for task in tasks]
            found, colour = over_tasks(by_task, experiment["confidence"]), method_colour(method)
            if found.low is not None and found.high is not None:
                points.plot([found.low, found.high], [y, y], color=colour, linewidth=2)
            # hollow: the runs of another line, timed in another way
            inside = CARD if "runs_of" in experiment["methods"][method] else colour
            points.plot(found.mean, y, "o", color=colour, markerfacecolor=inside, label=method)
            times.barh(y, taken_s[method], height=0.7, color=colour)
            times.text(taken_s[method], y, f" {taken_s[method]:,.0f}", va="center", fontsize=9)
        points.axvline(0, color=INK, linewidth=0.9, linestyle=":")
        points.axvline(-experiment["margin_points"], color=MUTED, linewidth=0.9, linestyle="--")
        titles = [experiment["methods"][method]["title"] for method in methods]
        points.set_yticks(range(len(methods)), titles)
        points.set_ylim(len(methods) - 0.5, -0.5)
        points.set_xlabel("points; 0: full, dashed: margin")
        times.set_xlabel("seconds")
        times.set_xlim(0, 1.25 * max(taken_s.values()))
        for ax in (points, times):
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x", alpha=0.7)
        names = ", ".join(experiment["tasks"][task]["title"] for task in tasks)
        title = f"{experiment['models'][model]['title']}: mean and sum over {names}"
        part.suptitle(title, x=0.02, ha="left", fontsize=9.5, color=MUTED)
    return drawn


def draw(study: Study, path: Path) -> None:
    from matplotlib import rc_context

    with rc_context(STYLE):
        save(figure(study), path)
