"""Tables and figures of README and pages, from stored results and nothing else.

    python benchmarks/plot.py benchmarks/results/DEVICE                      # prints the tables
    python benchmarks/plot.py benchmarks/results/DEVICE --docs docs/pictures # and draws the figures

Nothing is measured here and no figure is typed in: all is read from `training/*.json`, which
`benchmarks/run.py` wrote, from `packing/*.json`, of `benchmarks/packing.py`, from the runs of the
demo in `demo/`, those of `benchmarks/accuracy_study.py` in `study/`, and `contribution/*.json`.
`benchmarks/diagrams.py` draws the pictures that need no results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picture_style import (
    BLUE,
    CARD,
    INK,
    KINDS,
    STYLE,
    method_colour,
    new_figure,
    save,
)
from result_tables import (
    MIB,
    MODELS,
    contribution_table,
    load,
    load_packing,
    measured,
    packing_stage_table,
    packing_table,
    speedup_of,
    table,
    verdict_lines,
    whole_run_s,
)
from study_plan import EXPERIMENT, Study
from study_tables import figure as study_figure
from study_tables import panels as study_panels
from training import SHAPES

from progtuning_kernels import FreezePlan, report
from progtuning_kernels.schedules.files import read_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from progtuning_kernels.report.runs import Row

FASTER = "times as fast as full fine-tuning (dotted: 1)"
BAR = 11.5  # points


def trained_units(plan: FreezePlan) -> str:
    """What trains, in words; "all" where nothing is frozen."""
    everything = plan.embeddings and plan.head and all(plan.trainable)
    return "all" if everything else plan.units_in_words()


def _bars(
    ax: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    ticks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """A group of horizontal bars per line, the first on top, each with its number at its end and,
    where there are `ticks`, a tick across it.
    """
    width = 0.84 / len(series)
    largest = max(v for values in series.values() for v in values if v is not None)
    for index, (name, values) in enumerate(series.items()):
        at = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [float("nan") if value is None else value for value in values]
        ax.barh(at, heights, height=0.9 * width, color=method_colour(name), label=name)
        own_ticks = ticks[name] if ticks else [0.0] * len(groups)
        for y, value, tick in zip(at, values, own_ticks, strict=True):
            if ticks:
                ax.vlines(tick, y - 0.45 * width, y + 0.45 * width, color=INK, linewidth=1.6)
            if value is not None:
                end = max(value, tick) + 0.014 * largest
                ax.text(end, y + 0.02, f"{value:.2f}", va="center", fontsize=9)
    ax.axvline(1, color=INK, linewidth=0.9, linestyle=":")
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlim(0, 1.12 * largest)
    ax.tick_params(axis="y", length=0)


def _tasks(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{c['experiment']['task_title']}\n{c['shape']['random']['real_share']:.0%} real"
        for c in contents
    ]


def front_figure(
    packing: Sequence[Mapping[str, Any]], training: Mapping[str, Any]
) -> Figure | None:
    """Time of whole runs, and memory beside the weights by stage, both against full fine-tuning."""
    entries = measured(training)
    if not {"full", "ours"} <= entries.keys():
        return None
    figure = new_figure(325, note=_conditions(packing[0]))
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    ways = ("HF + group_by_length", "ours", "ours + cache")
    _bars(left, _tasks(packing), {way: [speedup_of(c, way) for c in packing] for way in ways})
    left.set_title("Speed of a whole run")
    left.set_xlabel("times as fast as full fine-tuning\n(dotted: 1)")
    figure.legend(loc="outside lower left", ncols=3, handlelength=1.2, columnspacing=1.2)
    shape = SHAPES[training["experiment"]["shape"]]
    steps = training["experiment"]["steps_per_epoch"]
    totals = {
        name: [_bytes_beside_weights(s) / MIB for s in entries[name]["stages"]]
        for name in ("full", "ours")
    }
    full, ours = totals["full"], totals["ours"]
    for number, (mib, stage) in enumerate(zip(ours, entries["ours"]["stages"], strict=True)):
        first = number * steps
        right.bar(first, mib, steps, align="edge", color=method_colour("ours"), edgecolor=CARD)
        words = trained_units(
            FreezePlan.from_boundary(
                stage["boundary"], shape.blocks, embeddings=not stage["boundary"]
            )
        )
        words = words.replace(", ", ",\n").replace("blocks ", "blocks\n")
        middle = {"x": first + steps / 2, "ha": "center", "fontsize": 9}
        right.text(y=mib / 2, s=words, va="center", color="white", **middle)
        right.text(y=mib, s=f"{mib:.0f}", va="bottom", **middle)
    edges = [steps * number for number in range(len(full) + 1)]
    right.stairs(full, edges, baseline=None, color=method_colour("full"), linewidth=2, ls="--")
    right.text(edges[-1], 1.01 * full[-1], f"full: {full[-1]:.0f}", ha="right", va="bottom")
    right.set(xlim=(0, edges[-1]), ylim=(0, 1.14 * max(full)), xticks=edges)
    right.set_xlabel("optimizer step\n(in the bars: what trains)")
    right.set_title("MiB beside the weights")
    return figure


def _bytes_beside_weights(stage: Mapping[str, Any]) -> int:
    keys = ("state_bytes", "gradient_bytes_after_backward", "saved_bytes")
    return sum(stage[key] for key in keys)


def _conditions(content: Mapping[str, Any]) -> str:
    experiment = content["experiment"]
    return (
        f"{experiment['shape']}, batches of {experiment['rows']} rows, {experiment['precision']}, "
        f"{experiment['stages']} stages, {content['meta']['device']}"
    )


def packing_figure(contents: Sequence[Mapping[str, Any]]) -> Figure:
    """Whole runs, a group of bars per task; the ticks on them are predictions."""
    ways = [*contents[0]["ways"]][1:]
    figure = new_figure(115 + len(contents) * len(ways) * BAR, note=_conditions(contents[0]))
    ax = figure.subplots()
    speeds = {way: [speedup_of(content, way) for content in contents] for way in ways}
    predicted = {way: [c["predicted"]["speedup"][way] for c in contents] for way in ways}
    _bars(ax, _tasks(contents), speeds, predicted)
    ax.set_xlabel(f"{FASTER}; ticks: by operations alone")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def run_figure(contents: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Whole runs against full training, a panel per experiment with something to compare."""
    panels = []
    for content in contents:
        entries = measured(content)
        full = entries.pop("full", None)
        epochs = content["experiment"]["epochs_per_stage"]
        if full is None or len(entries) * len(epochs) < 2:
            continue
        speeds = {
            name: [whole_run_s(full, count) / whole_run_s(entry, count) for count in epochs]
            for name, entry in entries.items()
        }
        panels.append((content, epochs, speeds))
    if not panels:
        return None
    counts = [2.2 + len(speeds) * len(epochs) for _, epochs, speeds in panels]
    devices = sorted({content["meta"]["device"] for content, *_ in panels})
    figure = new_figure(
        70 + 1.12 * BAR * sum(counts),
        note="; ".join([*devices, "1 epoch a stage where nothing else is said"]),
    )
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=counts).flat
    largest = max(v for *_, speeds in panels for values in speeds.values() for v in values)
    for ax, (content, epochs, speeds) in zip(axes, panels, strict=True):
        width = 0.86 / len(epochs)
        for at, (name, values) in enumerate(speeds.items()):
            for index, (count, value) in enumerate(zip(epochs, values, strict=True)):
                y = at + (index - (len(epochs) - 1) / 2) * width
                ax.barh(y, value, height=0.9 * width, color=method_colour(name))
                note = f"{value:.2f}" + (f", {count} epochs" if count > 1 else "")
                ax.text(value + 0.01 * largest, y, note, va="center", fontsize=9)
        ax.axvline(1, color=INK, linewidth=0.9, linestyle=":")
        ax.set_yticks(range(len(speeds)), [*speeds])
        ax.set_ylim(len(speeds) - 0.5, -0.5)
        ax.set_xlim(0, 1.3 * largest)
        ax.tick_params(axis="y", length=0)
        experiment = content["experiment"]
        ax.set_title(
            f"{experiment['title']}: {experiment['rows']} x {experiment['tokens']} tokens",
            fontsize=10,
        )
    ax.set_xlabel(FASTER)
    return figure


def _plans(run: report.Run) -> list[tuple[FreezePlan, list[int]]]:
    """The plans of a run in order, each with the indices of the stored stages that have it."""
    found: list[tuple[FreezePlan, list[int]]] = []
    for index, stage in enumerate(run.stages):
        plan = FreezePlan(tuple(stage["trainable"]), stage["embeddings"], stage["head"])
        if not found or found[-1][0] != plan:
            found.append((plan, []))
        found[-1][1].append(index)
    return found


def memory_figure(runs: Sequence[report.Run]) -> Figure:
    """Bytes by kind over the steps of a run, a panel per run; weights are those of float32."""
    figure = new_figure(300, note=_demo_conditions(runs[0]))
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True).flat
    figure.get_layout_engine().set(wspace=0.08)
    for ax, run in zip(axes, runs, strict=True):
        for plan, indices in _plans(run):
            stages = [run.stages[index] for index in indices]
            first = stages[0]["first_step"] - 1
            steps = stages[-1]["last_step"] - first
            stage = max(stages, key=lambda stage: stage["activation_bytes"])
            kinds = {
                "weights": 4 * run.model["num_params"],
                "optimizer state": stage["state_bytes"],
                "gradients": stage["gradient_bytes"],
                "saved activations": stage["activation_bytes"],
            }
            bottom = 0.0
            for kind, size in kinds.items():
                bar = {"color": KINDS[kind], "edgecolor": CARD, "linewidth": 0.8}
                label = f"_{kind}" if first else kind
                ax.bar(first, size / MIB, steps, bottom, align="edge", label=label, **bar)
                bottom += size / MIB
            words = "\n".join(textwrap.wrap(trained_units(plan), 12))
            middle = first + steps / 2
            ax.text(middle, bottom, f"{words}\n{bottom:.0f} MiB", ha="center", va="bottom")
        ax.set_title(run.method)
        ax.set(xlabel="optimizer step", xlim=(0, run.stages[-1]["last_step"]))
        ax.set_xticks([0, *(run.stages[indices[-1]]["last_step"] for _, indices in _plans(run))])
    axes[0].set_ylabel("MiB")
    axes[0].set_ylim(0, 1.22 * axes[0].dataLim.y1)
    handles, labels = axes[0].get_legend_handles_labels()
    look = {"ncols": 4, "columnspacing": 1, "handlelength": 1.2}
    figure.legend(handles, labels, loc="outside lower center", **look)
    return figure


def _demo_conditions(run: report.Run) -> str:
    return (
        f"{run.model['num_params'] / 1e6:.1f} M parameters in {run.model['num_blocks']} blocks, "
        f"batches of {run.config['batch_size']} rows, {run.meta['device']}"
    )


def stage_seconds_figure(rows: Sequence[Row]) -> Figure:
    """Seconds of every stage, one stacked bar per method; mean over its runs."""
    bar, text = 44, 9
    figure = new_figure(90 + bar * len(rows), note=_demo_conditions(rows[0].runs[0]))
    ax = figure.subplots()
    seconds = []
    for row in rows:
        plans = _plans(row.runs[0])
        seconds.append(
            [
                statistics.mean(
                    sum(run.stages[index]["train_seconds"] for index in indices) for run in row.runs
                )
                for _, indices in plans
            ]
        )
    longest = max(map(sum, seconds))
    for at, (row, own) in enumerate(zip(rows, seconds, strict=True)):
        left = 0.0
        for (plan, _), value in zip(_plans(row.runs[0]), own, strict=True):
            colour = method_colour(row.method)
            ax.barh(at, value, 0.86, left, color=colour, edgecolor=CARD, linewidth=1.5)
            width = 310 * value / longest  # points, about
            lines = textwrap.wrap(trained_units(plan), max(6, int(width / (0.6 * text))))
            ink = "white" if _is_dark(colour) else INK
            ax.text(
                *(left + value / 2, at, "\n".join([*lines, f"{value:.0f} s"])),
                ha="center",
                va="center",
                fontsize=text,
                color=ink,
                linespacing=1.05,
            )
            left += value
        ax.text(left + 0.01 * longest, at, f"{left:.0f} s", va="center", fontweight="bold")
    runs = [f"{len(row.runs)} run{'s' * (len(row.runs) > 1)}" for row in rows]
    labels = [f"{row.label}\n{count}" for row, count in zip(rows, runs, strict=True)]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, 1.1 * longest)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("training time (s); in bars: what trains (LoRA: its adapters)")
    return figure


def _is_dark(colour: str) -> bool:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def contribution_figure(contents: Sequence[Mapping[str, Any]]) -> Figure:
    """What every block contributes by the paper's protocol, a panel per stored file."""
    figure = new_figure(215)
    axes = figure.subplots(1, len(contents), squeeze=False).flat
    for ax, stored in zip(axes, contents, strict=True):
        blocks = range(stored["num_blocks"])
        ax.bar(blocks, stored["measures"]["train"]["values"], color=BLUE)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(title=MODELS[stored["model"]], xlabel="block (0 at the input)", xticks=blocks)
    axes[0].set_ylabel("fall in validation loss")
    return figure


def figures_of(results: Path) -> dict[str, Callable[[], Figure | None]]:
    """What draws each figure that a device's results have the numbers for, by its file's name."""
    found: dict[str, Callable[[], Figure | None]] = {}
    contents, packing = load(results), load_packing(results)
    if contents:
        found["training"] = lambda: run_figure(contents)
    if packing:
        found["packing"] = lambda: packing_figure(packing)
    if contents and packing:
        found["front"] = lambda: front_figure(packing, contents[0])
    if (results / "study").exists():
        study = Study(read_settings(EXPERIMENT), results / "study")
        if study_panels(study):
            found["study"] = lambda: study_figure(study)
    if demo := sorted(results.glob("demo/*.json")):
        rows = report.group_runs([report.load_run(path) for path in demo])
        compared = [row.runs[0] for row in rows if row.method in ("full", "progressive")]
        found["stage_seconds"] = lambda: stage_seconds_figure(rows)
        found["memory"] = lambda: memory_figure(compared)
    if contributions := sorted(results.glob("contribution/*-sst2.json")):
        contents = [json.loads(path.read_text()) for path in contributions]
        found["contribution"] = lambda: contribution_figure(contents)
    return found


def draw(results: Path, folder: Path) -> list[Path]:
    """Write the figures into `folder`; returns their paths."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, make in figures_of(results).items():
        with rc_context(STYLE):
            if (figure := make()) is not None:
                drawn.append(folder / f"{name}.png")
                save(figure, drawn[-1])
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results of a device: benchmarks/results/DEVICE")
    parser.add_argument("--docs", type=Path, help="write the figures into this folder")
    arguments = parser.parse_args()
    contents, packing = load(arguments.folder), load_packing(arguments.folder)
    parts = []
    if contents:
        parts += [table(contents), "\n".join(verdict_lines(contents))]
    if packing:
        parts += [packing_table(packing), packing_stage_table(packing)]
        parts += ["\n".join(verdict_lines(packing))]
    if contributions := sorted(arguments.folder.glob("contribution/*.json")):
        parts.append(contribution_table(contributions))
    if not parts and not any(figures_of(arguments.folder)):
        raise SystemExit(f"nothing in {arguments.folder / 'training'}: run benchmarks/run.py first")
    print("\n\n".join(parts))
    for path in draw(arguments.folder, arguments.docs) if arguments.docs is not None else []:
        print(path)


if __name__ == "__main__":
    main()
