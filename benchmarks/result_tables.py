"""Stored results and their Markdown tables; `benchmarks/plot.py` prints and draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stored_results import WORDS

MIB = 2**20
NAMES = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
MODELS = {"minilm": "MiniLM", "mpnet": "MPNet"}


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
    words = WORDS | {False: "**not met**"}
    return [
        f"- {words[v['met']]}: {v['target']}: {v['found']}" for c in contents for v in c["verdicts"]
    ]


def contribution_table(paths: Sequence[Path]) -> str:
    """Markdown: whether higher blocks contribute more, and how far cheaper measures agree.

    p is of a test by permutations, two-sided, of whether contribution and number of the block are
    related.

    Args:
        paths: of files that `progtuning contribution` wrote, by name `<task>` or `<model>-<task>`.
    """
    heads = ["Spearman of", "Steps", "block, train", "p"]
    pairs = [("train", "skip"), ("train", "gradient"), ("skip", "gradient")]
    heads += [" – ".join(pair) for pair in pairs]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for path in paths:
        stored = json.loads(path.read_text())
        spearman, p = order_of_blocks(stored["measures"]["train"]["values"])
        name = f"{MODELS[stored['model']]}, {NAMES[path.stem.split('-')[-1]]}"
        found = {tuple(c["between"]): c["spearman"] for c in stored.get("rank_correlations", ())}
        cells = [str(stored["config"]["steps"]), f"{spearman:+.2f}", f"{p:.4f}"]
        cells += [f"{found[pair]:+.2f}" if pair in found else "" for pair in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def order_of_blocks(contributions: Sequence[float]) -> tuple[float, float]:
    """Spearman correlation of contribution and number of the block, and its p."""
    import numpy as np
    from scipy.stats import permutation_test, rankdata, spearmanr

    numbers = np.arange(len(contributions))
    centred = numbers - numbers.mean()
    found = permutation_test(
        (rankdata(contributions),),
        lambda ranks, axis: (ranks * centred).sum(axis),
        permutation_type="pairings",
        vectorized=True,
        rng=0,
    )
    return float(spearmanr(numbers, contributions)[0]), float(found.pvalue)
