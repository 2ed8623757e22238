"""Draw the figure of docs/beyond.md from the result files of beyond.sh and levels.py:

    python docs/results/beyond_figure.py docs/images/beyond.png

Above: what is found of what is far. Below: what ordinary text costs. Both by FLOPs. Every rule has
a point for `final_keep` 0.1 and one for 0.2, the paper's also one for 0.5, and those of equal FLOPs
that `levels.py` measured. The line is the dense model on a prompt that is cut to their FLOPs.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from beyond import DENSE, Key, cells, key, levels, place, values
from matplotlib.axes import Axes
from matplotlib.figure import Figure

KINDS = (
    ("the paper's rule", r"influence", "o", "#d1495b"),
    ("held, then written (recall, fast)", r"recency@write@.*", "s", "#1b6ca8"),
    ("the same, dropped above two thirds", r"recency@write:0\..*", "D", "#2a9d8f"),
    ("held, then dropped in turn", r"recency@write:left.*", "^", "#e09f3e"),
    ("held, then dropped at once", r"recency@drop.*", "v", "#8d6a9f"),
    ("window + delta, written, linear schedule", r"window.*", "P", "#6c757d"),
)
"""Legend, rules, marker and colour of each kind of rule."""
ABOVE = (
    ("demo", "fact", 2048, "facts of 2048 tokens"),
    ("memory-m", "fact", 2048, "facts of 2048 tokens"),
    ("s", "passages", 256, "a passage after 256"),
    ("m", "passages", 256, "a passage after 256"),
)
BELOW = ("demo", "memory-m", "s", "m")
Point = tuple[float, float]
"""FLOPs as a share of dense, and a value."""


def points(model: str, what: str, at: int) -> dict[tuple[Key, bool], Point]:
    """By rule, and whether it is the cut of this rule's FLOPs."""
    found = [cell for cell in cells(model, what) if place(cell) == at]
    (dense,) = (cell for cell in found if key(cell) == DENSE)
    found += [
        cell
        for cell in levels(model)[what]
        if place(cell) == at and cell["criterion"] not in ("dense", "cut")
    ]
    return {
        (key(cell), cell["criterion"] == "cut"): (
            cell["flops_ratio"],
            statistics.fmean(values(cell, dense)),
        )
        for cell in found
        if cell is not dense
    }


def draw(axes: Axes, shown: dict[tuple[Key, bool], Point]) -> None:
    """The rules of each kind, and the cuts of all of them as a line."""
    cut = sorted(point for (_, is_cut), point in shown.items() if is_cut)
    axes.plot(*zip(*cut, strict=True), "-", color="black", linewidth=1, label="the prompt cut")
    for label, rules, marker, colour in KINDS:
        own = [
            point
            for ((rule, _), is_cut), point in shown.items()
            if not is_cut and re.fullmatch(rules, rule)
        ]
        flops, found = ([point[axis] for point in own] for axis in (0, 1))
        axes.plot(flops, found, marker, color=colour, label=label, markersize=5)
    axes.set_xlim(0.42, 0.88)
    axes.grid(alpha=0.25)


def figure() -> Figure:
    drawn = Figure(figsize=(12, 6))
    axes = drawn.subplots(2, 4, sharex=True)
    for one, (model, what, at, title) in zip(axes[0], ABOVE, strict=True):
        draw(one, points(model, what, at))
        one.set_title(f"{model}: {title}", size=9)
        one.set_ylim(-0.05, 1.05)
    for one, model in zip(axes[1], BELOW, strict=True):
        draw(one, points(model, "ppl", 1024))
        one.set_title(f"{model}: text after 1024 tokens", size=9)
        one.set_xlabel("FLOPs, share of dense")
    axes[0][0].set_ylabel("found, or kept of dense's benefit")
    axes[1][0].set_ylabel("nats a token over dense")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    drawn.tight_layout(rect=(0, 0.08, 1, 1))
    return drawn


def main(given: Sequence[str]) -> None:
    (path,) = given
    figure().savefig(Path(path), dpi=130)


if __name__ == "__main__":
    main(sys.argv[1:])
