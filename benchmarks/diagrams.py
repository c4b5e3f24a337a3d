"""The diagrams of the pages under "How it works".

    python benchmarks/diagrams.py docs/pictures

Stages and schedules in them are those of the schedule objects, the rest is drawn by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picture_style import (
    BLUE,
    CARD,
    FROZEN,
    INK,
    KINDS,
    MUTED,
    ORANGE,
    POINTS,
    RULE,
    SKY,
    STYLE,
    VERMILLION,
    new_figure,
    save,
)

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FreezePlan,
    MilestoneSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
)
from progtuning_kernels.schedules import Schedule, annealed_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 6
STEPS = 24
WIDTH = 520  # points: 693 px in a browser, the width of a page's text
TINT = "#eef5fb"
UNITS = ["embeddings", *map(str, range(BLOCKS)), "head"]


def flags(plan: FreezePlan) -> list[bool]:
    """Which units train, in the order of `UNITS`."""
    return [plan.embeddings, *plan.trainable, plan.head]


class Canvas:
    """A sheet measured in points, from the upper left corner."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH / POINTS, height / POINTS))
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.ax.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 12, **settings: Any) -> None:
        settings = {"ha": "left", "va": "center", "color": INK, "linespacing": 1.25} | settings
        self.ax.text(x, y, text, fontsize=size, **settings)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = CARD,
        edge: str = MUTED,
        size: float = 12,
        line: str = "-",
        **settings: Any,
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        self.ax.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=3",
                facecolor=fill,
                edgecolor=edge,
                linewidth=1,
                linestyle=line,
            )
        )
        settings = {"ha": "center"} | settings
        self.text(x + width / 2, y + height / 2, text, size, **settings)

    def cell(
        self, x: float, y: float, width: float, height: float, fill: str, **settings: Any
    ) -> None:
        from matplotlib.patches import Rectangle

        look = {"facecolor": fill, "edgecolor": CARD, "linewidth": 0.8} | settings
        self.ax.add_patch(Rectangle((x, y), width, height, **look))

    def arrow(
        self, x0: float, y0: float, x1: float, y1: float, colour: str = INK, *, head: str = "-|>",
        width: float = 1.6, curve: str = "arc3,rad=0",
    ) -> None:  # fmt: skip
        from matplotlib.patches import FancyArrowPatch

        self.ax.add_patch(
            FancyArrowPatch(
                (x0, y0), (x1, y1), arrowstyle=head, mutation_scale=12, color=colour,
                linewidth=width, shrinkA=0, shrinkB=0, connectionstyle=curve,
            )
        )  # fmt: skip

    def line(self, x0: float, y0: float, x1: float, y1: float, **settings: Any) -> None:
        self.ax.plot([x0, x1], [y0, y1], **({"color": MUTED, "lw": 1} | settings))


def truncation() -> Figure:
    """What a step computes and what every unit keeps, in three stages."""
    canvas = Canvas(405)
    left, gap = 18, 5
    widths = [80, *[53] * BLOCKS, 51]
    starts = [left + sum(widths[:i]) + gap * i for i in range(len(widths))]
    end = starts[-1] + widths[-1]
    schedule = ProgressiveSchedule(3, 3)
    chips = {"A": "saved activations", "G": "gradients", "S": "optimizer state"}
    for stage in range(3):
        plan = schedule.plan(stage, BLOCKS)
        top = 16 + 122 * stage
        words = (
            "everything trains"
            if plan.embeddings
            else plan.units_in_words().replace(", head", " and the head train")
        )
        canvas.text(
            left,
            top,
            f"Stage {stage + 1}: {words}, boundary {plan.boundary}",
            11.5,
            fontweight="bold",
        )
        canvas.text(left, top + 21, "forward", 12, color=MUTED)
        canvas.arrow(left + 52, top + 21, end, top + 21, MUTED)
        lowest = 0 if plan.embeddings else plan.boundary + 1
        for start, width, unit, trains in zip(starts, widths, UNITS, flags(plan), strict=True):
            name = unit if not unit.isdigit() else f"block {unit}"
            look = (
                {"fill": BLUE, "edge": BLUE, "color": "white"}
                if trains
                else {"fill": FROZEN, "edge": RULE, "color": MUTED}
            )
            canvas.box(start, top + 32, width, 24, name, size=12, **look)
            if trains:
                for number, (letter, kind) in enumerate(chips.items()):
                    x = start + width / 2 + (number - 1) * 15.5 - 7
                    canvas.box(
                        x, top + 60, 14, 14, letter, fill=KINDS[kind], edge=KINDS[kind], size=10
                    )
        stop = starts[lowest]
        canvas.arrow(end, top + 86, stop, top + 86, VERMILLION, width=2.2)
        canvas.text(end, top + 98, "backward", 12, color=VERMILLION, ha="right")
        if lowest:
            canvas.line(
                stop - gap / 2, top + 28, stop - gap / 2, top + 104, color=INK, ls="--", lw=1.2
            )
            canvas.text(
                stop - gap / 2 - 5,
                top + 90,
                "no backward here,\nnothing is kept",
                11,
                color=MUTED,
                ha="right",
            )
    x = left
    for letter, kind in chips.items():
        canvas.box(x, 380, 14, 14, letter, fill=KINDS[kind], edge=KINDS[kind], size=11)
        canvas.text(x + 19, 387, kind, 12)
        x += 35 + 6.2 * len(kind)
    canvas.cell(x + 4, 380, 14, 14, FROZEN)
    canvas.text(x + 23, 387, "frozen")
    return canvas.figure


def adaptive() -> AdaptiveSchedule:
    """One that has seen gradient norms which settle from the bottom up, block by block."""
    schedule = AdaptiveSchedule(4)
    for decision in range(STEPS // 4):
        norms = [0.5 ** min(decision, last_change) for last_change in (0, 0, 2, 3, 9, 9)]
        schedule.observe(4 * decision + 3, norms, BLOCKS)
    return schedule


def schedules() -> dict[str, Schedule]:
    """Every kind of schedule, by how it is made; the adaptive one for example norms."""
    return {
        "ProgressiveSchedule(3)": ProgressiveSchedule(3, STEPS),
        "ProgressiveSchedule(3, weights=[1, 1, 1, 1, 2, 4])": ProgressiveSchedule(
            3, STEPS, weights=[1, 1, 1, 1, 2, 4]
        ),
        'ProgressiveSchedule(3, embeddings="always")': ProgressiveSchedule(
            3, STEPS, embeddings="always"
        ),
        "MilestoneSchedule({0: 5, 6: 3, 12: 0, 18: -1})": MilestoneSchedule(
            {0: 5, 6: 3, 12: 0, 18: -1}
        ),
        "RandomBlockSchedule(2, period=4)": RandomBlockSchedule(2, period=4),
        "CyclicBlockSchedule(1, period=3)": CyclicBlockSchedule(1, period=3),
        "AdaptiveSchedule(interval=4)": adaptive(),
    }


def annealed_rates() -> list[list[float]]:
    """By unit and step, the factor of FreezeOut's learning rates, under a stage per block."""
    schedule = ProgressiveSchedule(BLOCKS, STEPS)
    groups = [{"unit": unit} for unit in range(-1, BLOCKS + 1)]
    return [
        [factor(step) for step in range(STEPS)] for factor in annealed_lr(schedule, groups, BLOCKS)
    ]


def plans_in_words() -> str:
    """What the picture of the schedules shows; the file carries it."""
    lines = []
    for title, schedule in schedules().items():
        lines.append(title)
        words = [schedule.plan(step, BLOCKS).units_in_words() for step in range(STEPS)]
        changes = [step for step in range(STEPS) if step == 0 or words[step] != words[step - 1]]
        lines += [f"  from step {step}: {words[step]}" for step in changes]
    lines.append("annealed_lr")
    for unit, rates in zip(UNITS, annealed_rates(), strict=True):
        lines.append(f"  {unit}: {' '.join(f'{rate:.2f}' for rate in rates)}")
    return "\n".join(lines)


def schedules_figure() -> Figure:
    """Which unit trains at which step, a panel per schedule."""
    shares: dict[str, list[list[float]]] = {}
    for title, schedule in schedules().items():
        by_step = [flags(schedule.plan(step, BLOCKS)) for step in range(STEPS)]
        shares[title] = [[float(on) for on in unit] for unit in zip(*by_step, strict=True)]
    shares[f"annealed_lr(ProgressiveSchedule({BLOCKS}), …)"] = annealed_rates()
    figure = new_figure(
        600,
        note="blue: trains; grey: frozen; annealed_lr: the tint is the learning rate",
        note_size=10,
    )
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.06)
    axes = [*figure.subplots(4, 2, sharex=True, sharey=True).flat]
    for ax, (title, units) in zip(axes, shares.items(), strict=True):
        for unit, rates in enumerate(units):
            starts = [s for s in range(STEPS) if s == 0 or rates[s] != rates[s - 1]]
            ends = [*starts[1:], STEPS]
            spans = [(start, stop - start) for start, stop in zip(starts, ends, strict=True)]
            colours = [_tint(rates[start]) for start in starts]
            ax.broken_barh(
                spans, (unit - 0.44, 0.88), facecolors=colours, edgecolors=colours, linewidth=0.4
            )
        name, settings = title.split("(", maxsplit=1)
        ax.set_title(name, pad=19)
        settings += ", example norms" * (name == "AdaptiveSchedule")
        ax.text(0, 1.04, f"({settings}", transform=ax.transAxes)
        ax.set_yticks(range(len(UNITS)), UNITS)
        ax.set_xticks(range(0, STEPS + 1, 6))
        ax.set_xlim(0, STEPS)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    for ax in axes[-2:]:
        ax.set_xlabel("optimizer step")
    return figure


def _tint(share: float) -> tuple[float, ...]:
    """From the colour of frozen units to that of trained ones."""
    from matplotlib.colors import to_rgb

    return tuple(f + share * (b - f) for f, b in zip(to_rgb(FROZEN), to_rgb(BLUE), strict=True))


def optimizer() -> Figure:
    """A step of MaskedAdamW, and what becomes of a tensor that freezes."""
    canvas = Canvas(370)
    canvas.text(18, 18, "Frozen tensors", 12.5, fontweight="bold")
    for i in range(4):
        canvas.box(18 + 34 * i, 32, 29, 26, "", fill=FROZEN, edge=RULE)
    canvas.text(
        18, 88, "no gradient\nno optimizer state\nno work in a step", 12, color=MUTED, va="center"
    )
    canvas.text(176, 18, "Active tensors, by device and dtype", 12.5, fontweight="bold")
    for x, count, name, colour in (
        (180, 5, "bucket: float32", BLUE),
        (372, 3, "bucket: bfloat16", SKY),
    ):
        width = 34 * count + 3
        canvas.box(x - 4, 28, width, 34, "", edge=colour)
        for i in range(count):
            canvas.box(x + 34 * i, 32, 29, 26, "", fill=colour, edge=colour)
        canvas.text(x + width / 2 - 4, 74, name, 12, ha="center")
    middle, wide = 176, 326
    canvas.arrow(263, 84, 263, 106)
    canvas.arrow(420, 84, 420, 106)
    canvas.box(middle, 108, wide, 32, "one norm over all active gradients", fill=TINT, edge=BLUE)
    canvas.arrow(middle + wide / 2, 142, middle + wide / 2, 162)
    canvas.box(
        *(middle, 164, wide, 48),
        "one decision: how far to clip,\nskip the step if the norm is not finite",
        fill=TINT,
        edge=BLUE,
    )
    canvas.text(18, 188, "stays on the device:\nthe CPU does not wait", 12, color=MUTED)
    canvas.arrow(263, 214, 263, 238)
    canvas.arrow(420, 214, 420, 238)
    canvas.box(176, 240, 173, 32, "one update call", fill=BLUE, edge=BLUE, color="white")
    canvas.box(368, 240, 105, 32, "one update call", fill=SKY, edge=SKY)
    canvas.text(18, 256, "one call per bucket", 12, color=MUTED)
    canvas.text(176, 286, "unscale, clip, moments, decay, write back: one pass", 12)
    canvas.line(18, 306, WIDTH - 18, 306, color=RULE)
    canvas.text(18, 335, "At a change\nof plan", 12.5, fontweight="bold")
    canvas.box(112, 318, 110, 34, "active tensor", fill=BLUE, edge=BLUE, color="white")
    canvas.arrow(226, 335, 370, 335)
    canvas.text(296, 324, "gradient and state", 12, ha="center")
    canvas.text(296, 347, "are released", 12, ha="center")
    canvas.box(374, 318, 110, 34, "frozen tensor", fill=FROZEN, edge=RULE)
    return canvas.figure


def _stored_rows(canvas: Canvas, x: float, y: float, colour: str) -> None:
    for i, tokens in enumerate((5, 8, 3, 6)):
        canvas.cell(x, y + 9 * i, 9 * tokens, 8, colour)


def cache() -> Figure:
    """A batch in the first epoch of a stage and in later ones, and a rise of the boundary."""
    canvas = Canvas(415)
    prefix, suffix, rows = 92, 318, 206

    def lane(top: float, title: str, *, runs: bool) -> None:
        canvas.text(18, top, title, 12.5, fontweight="bold")
        canvas.box(18, top + 16, 52, 42, "batch", size=11)
        look = (
            {"fill": "#dbe3ec", "edge": MUTED}
            if runs
            else {"edge": RULE, "color": MUTED, "line": "--"}
        )
        words = "prefix: embeddings,\nblocks 0 and 1" if runs else "prefix\ndoes not run"
        canvas.box(prefix, top + 16, 132, 42, words, **look)
        canvas.box(
            suffix,
            top + 16,
            184,
            42,
            "suffix: blocks 2 to 5, head",
            fill=BLUE,
            edge=BLUE,
            color="white",
        )

    def store(top: float) -> None:
        canvas.box(rows, top, 100, 46, "", edge=ORANGE)
        _stored_rows(canvas, rows + 10, top + 5, ORANGE)

    lane(18, "First epoch of a stage: the prefix runs once for each row", runs=True)
    canvas.arrow(70, 55, prefix, 55)
    canvas.arrow(prefix + 132, 55, suffix, 55)
    canvas.arrow(256, 55, 256, 88, ORANGE)
    store(90)
    canvas.text(
        190, 113, "the prefix's output is stored\nrow by row, without padding", 12, ha="right"
    )
    canvas.text(suffix + 4, 113, "cache, at boundary 2", 12, color=MUTED)

    lane(166, "Later epochs: the stored rows take the place of the prefix", runs=False)
    store(238)
    canvas.arrow(256, 236, 256, 203, ORANGE)
    canvas.arrow(256, 203, suffix, 203, ORANGE)
    canvas.text(190, 261, "rows are recognised\nby their content", 12, ha="right")

    top = 316
    canvas.text(
        18, top, "The boundary rises to 4: stored rows move up, once", 12.5, fontweight="bold"
    )
    canvas.box(18, top + 20, 100, 46, "", edge=ORANGE)
    _stored_rows(canvas, 28, top + 25, ORANGE)
    canvas.text(68, top + 80, "at boundary 2", 12, ha="center", color=MUTED)
    canvas.arrow(122, top + 43, 168, top + 43, ORANGE)
    canvas.box(172, top + 22, 146, 42, "blocks 2 and 3,\nfrozen now", fill="#dbe3ec", edge=MUTED)
    canvas.arrow(322, top + 43, 368, top + 43, ORANGE)
    canvas.box(372, top + 20, 100, 46, "", edge=ORANGE)
    _stored_rows(canvas, 382, top + 25, ORANGE)
    canvas.text(422, top + 80, "at boundary 4", 12, ha="center", color=MUTED)
    return canvas.figure


ROW_TOKENS = (3, 8, 5, 2, 7)
GROUPS = ((1, 4), (2,), (0, 3))  # rows of like length
ROW_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", VERMILLION)


def _row(canvas: Canvas, x: float, y: float, row: int, size: float, columns: int) -> None:
    """A row of a padded batch: its tokens, then padding up to `columns`."""
    for place in range(columns):
        is_token = place < ROW_TOKENS[row]
        fill = ROW_COLOURS[row] if is_token else FROZEN
        canvas.cell(x + size * place, y, size, size, fill)


def packing() -> Figure:
    """Padded rows become packed tokens at the first block, and rows again after the last."""
    canvas = Canvas(374)
    size, most, tokens = 13, max(ROW_TOKENS), sum(ROW_TOKENS)
    for x, title, below in (
        (18, "padded, (B, T)", "embeddings"),
        (398, "padded, (B, T)", "head and loss,\nzeros at padding"),
    ):
        canvas.text(x, 20, title, 12.5, fontweight="bold")
        for row in range(len(ROW_TOKENS)):
            _row(canvas, x, 34 + (size + 1) * row, row, size, most)
        canvas.text(x, 112, below, 12, color=MUTED, va="top")
    strip, left = 8, 160
    canvas.text(left, 20, f"packed, N = {tokens} tokens", 12.5, fontweight="bold")
    at = left
    for row, own in enumerate(ROW_TOKENS):
        for _ in range(own):
            canvas.cell(at, 58, strip, 22, ROW_COLOURS[row])
            at += strip
    canvas.arrow(126, 69, left - 4, 69)
    canvas.arrow(at + 4, 69, 394, 69)
    canvas.text(left, 46, "first block", 12, color=MUTED)
    canvas.text(at, 46, "last block", 12, color=MUTED, ha="right")
    canvas.text(
        left, 96, "norms, linear layers and dropout\nof all blocks see no padding", 12, va="top"
    )

    canvas.line(18, 160, WIDTH - 18, 160, color=RULE)
    canvas.text(18, 180, "Attention needs rows: those of like length form a group", 12.5,
                fontweight="bold")  # fmt: skip
    canvas.text(18, 204, "one group", 12)
    for row in range(len(ROW_TOKENS)):
        _row(canvas, 18, 216 + (size + 1) * row, row, size, most)
    whole = len(ROW_TOKENS) * most**2
    x, area = 200, 0
    canvas.text(x, 204, f"{len(GROUPS)} groups, each padded to its longest row", 12)
    for group in GROUPS:
        columns = max(ROW_TOKENS[row] for row in group)
        area += len(group) * columns**2
        for number, row in enumerate(group):
            _row(canvas, x, 216 + (size + 1) * number, row, size, columns)
        x += size * columns + 22
    canvas.text(18, 300, f"{whole} scores of attention", 12, color=MUTED)
    canvas.text(200, 300, f"{area} scores of attention", 12, color=MUTED)
    canvas.text(
        *(18, 346),
        "The model's own attention function runs on each group, with the model's\n"
        "own mask. What it returns is packed again.",
        12,
    )
    return canvas.figure


def kernels() -> Figure:
    """How an implementation of an op is chosen, and how a module comes to use one."""
    canvas = Canvas(405)
    canvas.text(18, 20, "Which implementation runs an op", 12.5, fontweight="bold")
    canvas.box(18, 40, 74, 46, "op and\ntensors")
    boxes = (
        (126, "native", "C++, CUDA"),
        (264, "triton", "Triton kernel"),
        (402, "reference", "plain PyTorch"),
    )
    for x, name, what in boxes:
        canvas.box(x, 40, 100, 46, f"{name}\n{what}", fill=TINT, edge=BLUE)
        canvas.arrow(x + 50, 88, x + 50, 126)
        canvas.text(x + 56, 106, "always" if name == "reference" else "yes", 12)
    canvas.arrow(94, 63, 124, 63)
    for x in (228, 366):
        canvas.arrow(x, 63, x + 34, 63, VERMILLION)
        canvas.text(x + 17, 76, "no", 12, color=VERMILLION, ha="center", va="top")
    chosen = "the first that can run on these tensors runs"
    canvas.box(126, 128, 376, 28, chosen, fill=BLUE, edge=BLUE, color="white")
    canvas.text(
        18,
        180,
        "Every no has a reason in one line. progtuning doctor prints all of them.",
        12,
    )
    canvas.line(18, 202, WIDTH - 18, 202, color=RULE)

    canvas.text(18, 222, "Which modules of a model use an op", 12.5, fontweight="bold")
    canvas.box(18, 248, 100, 52, "a module of a\nknown kind")
    canvas.arrow(120, 274, 152, 274)
    canvas.box(
        154,
        240,
        150,
        68,
        "compared with the\noriginal: outputs and\ngradients",
        fill=TINT,
        edge=BLUE,
    )
    canvas.arrow(306, 260, 344, 244)
    canvas.arrow(306, 290, 344, 316, VERMILLION)
    canvas.box(346, 228, 156, 34, "equal: uses the op", fill=BLUE, edge=BLUE, color="white")
    canvas.box(346, 292, 156, 50, "differs: keeps its\nown forward", fill=FROZEN, edge=RULE)
    canvas.text(
        *(18, 372),
        "The comparison runs on random inputs, before the first step.\n"
        "handle.kernel_report() lists every module, and why it keeps its own forward.",
        12,
    )
    return canvas.figure


DIAGRAMS: dict[str, Callable[[], Figure]] = {
    "how-truncation": truncation,
    "how-schedules": schedules_figure,
    "how-optimizer": optimizer,
    "how-cache": cache,
    "how-packing": packing,
    "how-kernels": kernels,
}


def main() -> None:
    from matplotlib import rc_context

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the SVG files")
    folder = parser.parse_args().folder
    for name, make in DIAGRAMS.items():
        with rc_context(STYLE):
            path = folder / f"{name}.svg"
            save(make(), path, plans_in_words() if make is schedules_figure else "")
            print(path)


if __name__ == "__main__":
    main()
