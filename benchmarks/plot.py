"""The README's figures and its table of whole training runs, from stored results and nothing else.

    python benchmarks/plot.py benchmarks/results/DEVICE             # prints the table
    python benchmarks/plot.py benchmarks/results/DEVICE --docs docs # and draws docs/*.png

Nothing is measured here and no figure is typed in: all is read from `training/*.json`, which
`benchmarks/run.py` wrote, from `packing/*.json`, of `benchmarks/packing.py`, from the runs of the
demo in `demo/`, and from `contribution/sst2.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progtuning_kernels import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
OURS, NAIVE, OTHERS, FULL = "#0072B2", "#E69F00", "#999999", "#333333"


def load(folder: Path) -> list[dict[str, Any]]:
    """The experiments of a device's folder; those with targets first, else by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("training/*.json"))]
    return sorted(found, key=lambda content: not content["experiment"]["targets"])


def load_packing(folder: Path) -> list[dict[str, Any]]:
    """The tasks of the packing benchmark, those with the most padding first."""
    found = [json.loads(path.read_text()) for path in folder.glob("packing/*.json")]
    return sorted(found, key=lambda content: content["shape"]["random"]["real_share"])


def packing_table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per task, a column per way; how often it is as fast as full training, and
    in brackets what the planner's operations predict.
    """
    ways = [*contents[0]["ways"]][1:]
    lines = [f"| rows of | real tokens | {' | '.join(ways)} |", f"|---|---:|{'---:|' * len(ways)}"]
    for content in contents:
        share = content["shape"]["random"]["real_share"]
        cells = [content["experiment"]["task_title"], f"{share:.2f}"]
        for way in ways:
            speedup, predicted = speedup_of(content, way), content["predicted"]["speedup"][way]
            cells.append(f"{speedup:.2f} ({predicted:.2f})" if speedup else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def packing_stage_table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: by stage, median and quartiles over batches of full training's time over ours."""
    boundaries = [s["boundary"] for s in contents[0]["ways"]["ours"]["stages"]]
    heads = " | ".join(f"boundary {k}" for k in boundaries)
    lines = [f"| rows of | | {heads} |", f"|---|---|{'---:|' * len(boundaries)}"]
    for content in contents:
        for way, entry in content["ways"].items():
            stages = {
                s["boundary"]: s["over_full"]
                for s in entry.get("stages", ())
                if way != "HF" and "over_full" in s
            }
            if not stages:
                continue
            cells = [
                f"{s['median']:.2f} ({s['p25']:.2f}-{s['p75']:.2f})" if s else ""
                for s in map(stages.get, boundaries)
            ]
            lines.append(f"| {content['experiment']['task_title']} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speedup_of(content: Mapping[str, Any], way: str) -> float | None:
    """Of a whole run, over full training on padded random batches; None without a number."""
    return content["ways"][way].get("speedup")


def packing_figure(contents: Sequence[Mapping[str, Any]]) -> Figure:
    """Whole runs, a group of bars per task; the ticks on them are predictions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax = figure.subplots()
    ways = [*contents[0]["ways"]][1:]
    width = 0.85 / len(ways)
    colours = (OTHERS, NAIVE, OURS, "#56B4E9", FULL)
    for index, (way, colour) in enumerate(zip(ways, colours, strict=True)):
        at = [task + (index - (len(ways) - 1) / 2) * width for task in range(len(contents))]
        heights = [speedup_of(content, way) or float("nan") for content in contents]
        predicted = [content["predicted"]["speedup"][way] for content in contents]
        ax.bar(at, heights, width=0.9 * width, color=colour, label=way)
        ax.plot(at, predicted, "_", color="black", markersize=60 * width)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    shares = [content["shape"]["random"]["real_share"] for content in contents]
    titles = [content["experiment"]["task_title"] for content in contents]
    labels = [f"{t}\n{s:.0%} real" for t, s in zip(titles, shares, strict=True)]
    ax.set_xticks(range(len(contents)), labels)
    ax.set_ylabel("times as fast as full training\non padded random batches")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def measured(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {n: entry for n, entry in content["providers"].items() if "reason" not in entry}


def whole_run_s(entry: Mapping[str, Any], epochs_per_stage: int) -> float | None:
    runs = {run["epochs_per_stage"]: run["run_s"] for run in entry["whole_runs"]}
    return runs.get(epochs_per_stage)


def _span(values: Sequence[float | None], scale: float = 1.0, digits: int = 0) -> str:
    """First and last of the stages, once if they are the same; nothing where unknown."""
    if None in values:
        return ""
    shown = [f"{scale * value:.{digits}f}" for value in (values[0], values[-1])]
    return shown[0] if shown[0] == shown[1] else " → ".join(shown)


def heading(experiment: Mapping[str, Any]) -> str:
    return (
        f"{experiment['title']}, {experiment['rows']} x {experiment['tokens']} tokens, "
        f"{experiment['precision']}, {experiment['stages']} stages"
    )


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per provider, those without a number with their reason."""
    contents = [content for content in contents if measured(content)]
    epochs = sorted({e for c in contents for e in c["experiment"]["epochs_per_stage"]})
    on_gpu = any(c["experiment"]["device"] == "cuda" for c in contents)
    heads = ["step (ms)", *(f"x full, {count} ep. a stage" for count in epochs)]
    heads += ["changes of stage (s)", "state (MiB)", "saved (MiB)", "loss"]
    heads += ["peak (MiB)"] if on_gpu else []
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for content in contents:
        lines.append(f"| **{heading(content['experiment'])}** |{' |' * len(heads)}")
        base = measured(content).get("full")
        for name, entry in content["providers"].items():
            if "reason" in entry:
                lines.append(f"| {name}: {entry['reason']} |{' |' * len(heads)}")
                continue
            stages = entry["stages"]
            cells = [_span([s["later_epochs"]["step_ms"] for s in stages])]
            for count in epochs:
                own_s, full_s = (whole_run_s(e, count) if e else None for e in (entry, base))
                cells.append(f"{full_s / own_s:.2f}" if own_s and full_s else "")
            cells.append(f"{entry['whole_runs'][0]['first_steps_extra_s']:.2f}")
            for key in ("state_bytes", "saved_bytes"):
                cells.append(_span([s.get(key) for s in stages], 1 / MIB, 1))
            cells.append(f"{entry['last_epoch_loss']:.4f}")
            if on_gpu:
                peaks = [s.get("peak_allocated_bytes") for s in stages]
                cells.append("" if None in peaks else f"{max(peaks) / MIB:.0f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict_lines(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every stored target, met or not, as a Markdown list."""
    words = {True: "met", False: "**not met**", None: "not measured"}
    return [
        f"- {words[v['met']]}: {v['target']}: {v['found']}" for c in contents for v in c["verdicts"]
    ]


def _colour(name: str) -> str:
    if name.startswith("ours"):
        return OURS
    return NAIVE if name.startswith("naive") else FULL if name == "full" else OTHERS


def run_figure(contents: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Whole runs relative to full training: a panel per experiment and number of epochs."""
    panels = []
    for content in contents:
        entries = measured(content)
        for epochs in content["experiment"]["epochs_per_stage"] if "full" in entries else ():
            full_s = whole_run_s(entries["full"], epochs)
            shares = {name: whole_run_s(e, epochs) / full_s for name, e in entries.items()}
            panels.append((heading(content["experiment"]), epochs, shares))
    if not panels:
        return None
    from matplotlib.figure import Figure  # not pyplot, which would hold and show the figures

    columns = min(2, len(panels))
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [0.75 + 0.24 * max(len(shares) for *_, shares in row) for row in rows]
    figure = Figure(figsize=(5.5 * columns, sum(heights)), layout="constrained")
    axes = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    for ax, (title, epochs, shares) in zip(axes, panels, strict=False):
        ax.spines[["top", "right"]].set_visible(False)
        names = list(shares)[::-1]
        values = [shares[name] for name in names]
        ax.barh(names, values, color=[_colour(name) for name in names], height=0.75)
        for at, value in enumerate(values):
            ax.text(value + 0.01, at, f"{value:.2f}", va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_xlim(0, max(1.1, 1.12 * max(values)))
        ax.tick_params(axis="y", length=0, labelsize=8)
        ax.set_title(f"{title},\n{epochs} ep. a stage", fontsize=9, loc="left")
    figure.supxlabel("time of the whole run / full training", fontsize=9)
    return figure


def stage_figure(content: Mapping[str, Any]) -> Figure | None:
    """Step time and bytes of every stage, one experiment."""
    entries = measured(content)
    if not entries:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    panels = [
        ("step, later epochs (ms)", lambda s: s["later_epochs"]["step_ms"], 1.0),
        ("optimizer state (MiB)", lambda s: s.get("state_bytes"), 1 / MIB),
        (
            "gradients after backward (MiB)",
            lambda s: s.get("gradient_bytes_after_backward"),
            1 / MIB,
        ),
        ("saved for backward (MiB)", lambda s: s.get("saved_bytes"), 1 / MIB),
    ]
    count = content["experiment"]["stages"]
    width = 0.85 / len(entries)
    hatches = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
    for ax, (label, figure_of, scale) in zip(axes, panels, strict=True):
        for index, (name, entry) in enumerate(entries.items()):
            values = [figure_of(stage) for stage in entry["stages"]]
            heights = [scale * v if v is not None else float("nan") for v in values]
            at = [stage + (index - (len(entries) - 1) / 2) * width for stage in range(count)]
            same = [n for n in entries if _colour(n) == _colour(name)]
            ax.bar(
                at,
                heights,
                width=0.9 * width,
                color=_colour(name),
                edgecolor="white",
                hatch=hatches[same.index(name) % len(hatches)],
                linewidth=0.5,
                label=name,
            )
            if ax is axes[0]:
                spread = [stage["later_epochs"] for stage in entry["stages"]]
                low = [max(0.0, s["step_ms"] - s["step_ms_p20"]) for s in spread]
                high = [max(0.0, s["step_ms_p80"] - s["step_ms"]) for s in spread]
                ax.errorbar(at, heights, [low, high], fmt="none", ecolor="black", lw=0.9)
        ax.set(ylabel=label, xticks=range(count))
        ax.set_xticklabels([f"stage {stage + 1}" for stage in range(count)])
        ax.tick_params(axis="x", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(heading(content["experiment"]), fontsize=10, x=0.02, ha="left")
    return figure


def unit_figure(runs: Sequence[report.Run]) -> Figure:
    """Which unit trains when, a panel per run; a boundary says all about a plan of the demo."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 1, squeeze=False).flat
    for ax, run in zip(axes, runs, strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        blocks = run.model["num_blocks"]
        spans = [(s["first_step"] - 0.5, s["last_step"] - s["first_step"] + 1) for s in run.stages]
        plans = [[s["embeddings"], *s["trainable"], s["head"]] for s in run.stages]
        for unit, flags in enumerate(zip(*plans, strict=True)):
            colours = [OURS if on else "#E4E4E4" for on in flags]
            ax.broken_barh(spans, (unit - 0.45, 0.9), facecolors=colours, edgecolors="white")
        ax.set_yticks(range(blocks + 2), ["embeddings", *range(blocks), "head"], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.margins(x=0)
        ax.set_title(run.method, fontsize=9, loc="left")
    ax.set_xlabel("optimizer step; blue: trains (with LoRA its adapters), grey: frozen")
    return figure


def contribution_figure(stored: Mapping[str, Any]) -> Figure:
    """What every block contributes, a panel per measure."""
    from matplotlib.figure import Figure

    axis = {"train": "fall in validation loss", "skip": "rise in validation loss"}
    measures = stored["measures"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False).flat
    for ax, (name, measure) in zip(axes, measures.items(), strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        ax.bar(range(stored["num_blocks"]), measure["values"], color=OURS)
        ax.axhline(0, color="black", linewidth=0.8)
        label = axis.get(name, "gradient norm")
        ax.set(title=name, xlabel="block (0 at the input)", ylabel=label)
    return figure


def draw(results: Path, folder: Path) -> list[Path]:
    """The figures of the README that a device's results have the figures for.

    training.png; training_stages.png, of the first experiment; packing.png; stages.png and
    units.png, of the demo; contribution.png.
    """
    figures: dict[str, Figure | None] = {}
    if contents := load(results):
        figures["training"] = run_figure(contents)
        figures["training_stages"] = stage_figure(contents[0])
    if packing := load_packing(results):
        figures["packing"] = packing_figure(packing)
    if demo := sorted(results.glob("demo/*.json")):
        runs = [report.load_run(path) for path in demo]
        rows = report.group_runs(runs)
        figures["stages"] = report.PLOTS["stages"][1](rows)
        figures["units"] = unit_figure([row.runs[0] for row in rows])
    for path in results.glob("contribution/sst2.json"):
        figures["contribution"] = contribution_figure(json.loads(path.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=120)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results of a device: benchmarks/results/DEVICE")
    parser.add_argument("--docs", type=Path, help="write the figures into this folder")
    arguments = parser.parse_args()
    contents, packing = load(arguments.folder), load_packing(arguments.folder)
    if contents:
        print(table(contents))
        print("\n" + "\n".join(verdict_lines(contents)))
    if packing:
        print(packing_table(packing) + "\n\n" + packing_stage_table(packing))
        print("\n" + "\n".join(verdict_lines(packing)))
    drawn = draw(arguments.folder, arguments.docs) if arguments.docs is not None else []
    for path in drawn:
        print(path)
    if not contents and not packing and not drawn:
        raise SystemExit(f"nothing in {arguments.folder / 'training'}: run benchmarks/run.py first")


if __name__ == "__main__":
    main()
