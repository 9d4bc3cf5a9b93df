"""The figure of the training's loop, for light and for dark pages: ``python docs/figures/loop.py``.

It is drawn as narrow as a phone is, so that its letters stay readable there.
"""

from __future__ import annotations

import logging
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's blue, orange and green, as edges and as tints that text can be read on.
THEMES = {
    "light": {
        "text": "#1b1f24",
        "quiet": "#57606a",
        "network": ("#0072b2", "#e3f0f8"),
        "openmm": ("#c35200", "#fbebdf"),
        "files": ("#00805e", "#dff3ec"),
    },
    "dark": {
        "text": "#f0f3f6",
        "quiet": "#a9b1ba",
        "network": ("#56b4e9", "#12303f"),
        "openmm": ("#f0954a", "#42240f"),
        "files": ("#2fc79a", "#0f3629"),
    },
}
WIDTH, HEIGHT = 3.9, 5.45  # inches; one is a unit of the drawing
BOX = 1.72, 0.78
LEFT, RIGHT = 0.93, 2.97  # of the boxes' middles
LINE = 0.128  # from one to the next; each is a text of its own, so that it is centred in any font


def draw(theme: dict) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")

    def box(x: float, y: float, kind: str, title: str, text: str, size: tuple[float, float] = BOX) -> None:
        edge, face = theme[kind]
        width, height = size
        style = "round,pad=0,rounding_size=0.08"
        corner = x - width / 2, y - height / 2
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=face, ec=edge, lw=1.3))
        n_lines = text.count("\n") + 1
        top = y + (0.155 + 0.145 * n_lines) / 2
        axes.text(x, top, title, ha="center", va="top", size=9, weight="bold", color=theme["text"])
        for k, line in enumerate(text.split("\n")):
            axes.text(x, top - 0.185 - LINE * k, line, ha="center", va="top", size=8, color=theme["text"])

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        _arrow(axes, start, end, theme["quiet"])

    def note(x: float, y: float, text: str, ha: str = "center") -> None:
        lines = text.split("\n")
        for k, line in enumerate(lines):
            at = y + LINE * ((len(lines) - 1) / 2 - k)
            axes.text(x, at, line, ha=ha, va="center", size=8, style="italic", color=theme["quiet"])

    middle = WIDTH / 2
    half = BOX[1] / 2
    y0, y1, y2, y3, y4 = 5.15, 4.19, 2.95, 1.66, 0.43
    box(middle, y0, "files", "Structure and force field", "no trajectory", (3.76, 0.5))
    box(LEFT, y1, "network", "Flow", "draws slow coordinates,\nacross barriers, too")
    box(RIGHT, y1, "openmm", "OpenMM", "slow atoms frozen,\nfast atoms move")
    box(RIGHT, y2, "openmm", "Mean forces", "averaged over frames;\nresponse removes noise")
    box(LEFT, y2, "network", "Free energy (PMF)", "an ensemble, fitted to\nall mean forces so far")
    box(LEFT, y3, "openmm", "Anchors", "differences of free\nenergy, by switching")
    box(RIGHT, y3, "network", "Last fit", "PMF to forces and\nanchors, flow to PMF")
    box(RIGHT, y4, "files", "Samples", "all-atom frames,\neach independent")
    box(LEFT, y4, "openmm", "Check", "switching along paths\nthat no fit has seen")
    arrow((LEFT, y0 - 0.25), (LEFT, y1 + half))
    arrow((LEFT + BOX[0] / 2, y1), (RIGHT - BOX[0] / 2, y1))
    arrow((RIGHT, y1 - half), (RIGHT, y2 + half))
    arrow((RIGHT - BOX[0] / 2, y2), (LEFT + BOX[0] / 2, y2))
    arrow((LEFT, y2 + half), (LEFT, y1 - half))
    note(middle, (y1 + y2) / 2, "↻ a round")
    note(LEFT - 0.1, (y1 + y2) / 2, "trains", "right")
    arrow((LEFT, y2 - half), (LEFT, y3 + half))
    note(LEFT + 0.1, (y2 + y3) / 2, "once new forces are as\npredicted, or at a limit", "left")
    arrow((LEFT + BOX[0] / 2, y3), (RIGHT - BOX[0] / 2, y3))
    arrow((RIGHT, y3 - half), (RIGHT, y4 + half))
    arrow((RIGHT - BOX[0] / 2, y3 - half), (LEFT + BOX[0] / 2, y4 + half))
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    shape = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 10}
    axes.annotate("", end, start, arrowprops=shape)


def main() -> None:
    folder = Path(__file__).parents[1] / "images"
    # Letters stay text, in a font of the reader's: none of these is wider than the first, which the boxes are made for.
    # Without date and random names the file is always the same.
    fonts = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Geneva", "Arial"]}
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the others need not be here
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loop", **fonts}):
        for name, theme in THEMES.items():
            draw(theme).savefig(folder / f"loop_{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
