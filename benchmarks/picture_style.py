"""How every picture of the pages looks: one palette, and a light card that any page can show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 72  # an inch
WIDTH = 460  # points

INK, MUTED, RULE, CARD, FROZEN = "#1f2328", "#59636e", "#d1d9e0", "#ffffff", "#e6eaef"
# Okabe and Ito's palette, made for colour-blind readers
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
YELLOW, VERMILLION, PURPLE = "#F0E442", "#D55E00", "#CC79A7"

# by method, the longest name that a label begins with
_METHODS = {
    "full": "#4d4d4d",
    "full, packed": "#8c8c8c",
    "HF + group_by_length": ORANGE,
    "naive freezing": ORANGE,
    "ours": BLUE,
    "ours + cache": SKY,
    "ours, cache": SKY,
    "ours without packing": GREEN,
    "progressive": BLUE,
    "progressive-cache": SKY,
    "lora": VERMILLION,
    "LoRA": VERMILLION,
    "progressive-lora": "#F2A46F",
    "progtuning": BLUE,
    "progtuning-cache": SKY,
    "full-grouped": ORANGE,
    "full-fewer": "#8c8c8c",
    "frozen-third": GREEN,
    "lora-progtuning": "#F2A46F",
}
_OTHERS = "#8a94a0"

KINDS = {  # of bytes
    "weights": "#c9ced6",
    "optimizer state": GREEN,
    "gradients": YELLOW,
    "saved activations": PURPLE,
}

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "progtuning_kernels",  # the same figure gives the same bytes
}


def method_colour(name: str) -> str:
    fitting = [known for known in _METHODS if name.startswith(known)]
    return _METHODS[max(fitting, key=len)] if fitting else _OTHERS


def new_figure(height: float, *, note: str = "", note_size: float = 9.5) -> Figure:
    """A figure of this many points, laid out inside its card under a line of text."""
    from matplotlib.figure import Figure  # not pyplot, which would hold and show the figures

    figure = Figure(figsize=(WIDTH / POINTS, height / POINTS), layout="constrained")
    x, y, line = 12 / WIDTH, 10 / height, 20 / height * bool(note)
    figure.get_layout_engine().set(rect=(x, y, 1 - 2 * x, 1 - 2 * y - line))
    figure.text(1.3 * x, 1 - y - line / 2, note, va="center", fontsize=note_size, color=MUTED)
    return figure


def save(figure: Figure, path: Path, description: str = "") -> None:
    """Write the figure on its card, as SVG with text as outlines, or as PNG of 2.8 px a point."""
    from matplotlib.patches import FancyBboxPatch

    width, height = figure.get_size_inches()
    edge = 0.5 / POINTS
    card = FancyBboxPatch(
        (edge, edge),
        width - 2 * edge,
        height - 2 * edge,
        boxstyle="round,pad=0,rounding_size=0.11",
        facecolor=CARD,
        edgecolor=RULE,
        linewidth=1,
        transform=figure.dpi_scale_trans,
        zorder=-10,
    )
    card.set_in_layout(False)
    figure.add_artist(card)
    metadata = {"Date": None, "Description": description} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=200, facecolor="none", metadata=metadata)
    card.remove()
