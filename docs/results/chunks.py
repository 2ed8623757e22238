"""Print the tables of "In chunks, or at once?" in docs/choosing.md from result files.

    python docs/results/chunks.py influence,recency docs/results/chunks-cpu-ppl.json ...

The first argument names the criteria to show. The files are those of `simba ppl` and `simba recall`
with --chunk-sizes and --cut. Differences are paired (by document, or by prompt of a trained task),
± their standard errors.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
PARTS = 4
"""A prompt's parts by distance from its end."""


def name(cell: Result, several_keeps: bool) -> str:
    if cell["criterion"] == "dense":
        return "dense"
    keep = f", `final_keep={cell['final_keep']:g}`" if several_keeps else ""
    if cell["criterion"] == "cut":
        return f"prompt cut to its last {cell['read']} tokens" + keep
    chunk = "at once" if cell["chunk_size"] is None else f"chunks of {cell['chunk_size']}"
    return f"{cell['criterion']}, {chunk}{keep}"


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def shown(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {error(values):.{digits}f}".replace("-", "−")


def gains(cell: Result) -> list[float]:
    return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def compared(
    cells: Sequence[Result], cell: Result, values: Callable[[Result], list[float]], digits: int
) -> list[str]:
    """The cell minus the same model at once, and minus the cut prompt; empty where it is itself."""

    def minus(other: Result | None) -> str:
        if other is None or other is cell or cell["criterion"] == "dense":
            return ""
        pairs = zip(values(cell), values(other), strict=True)
        return shown([a - b for a, b in pairs], digits)

    def find(criterion: str) -> Result | None:
        """The cell at once; of several cuts, the one whose FLOPs are nearest."""
        wanted = (criterion, cell["final_keep"], None)
        keys = ("criterion", "final_keep", "chunk_size")
        found = [c for c in cells if tuple(c[k] for k in keys) == wanted]
        flops = cell["flops_ratio"]
        return min(found, key=lambda c: abs(float(c["flops_ratio"] - flops)), default=None)

    return [minus(find(cell["criterion"])), minus(find("cut"))]


def text_table(cells: Sequence[Result]) -> str:
    dense, keeps = cells[0], len({cell["final_keep"] for cell in cells}) > 2

    def over(cell: Result) -> list[float]:
        return [a - b for a, b in zip(cell["losses"], dense["losses"], strict=True)]

    rows = [
        [
            name(cell, keeps),
            f"{cell['flops_ratio']:.1%}".replace("%", " %"),
            "" if cell is dense else shown(over(cell), 4),
            *compared(cells, cell, over, 4),
        ]
        for cell in cells
    ]
    return table(["", "FLOPs", "nats a token over dense", "− at once", "− cut"], rows)


def recall_table(cells: Sequence[Result]) -> str:
    keeps = len({cell["final_keep"] for cell in cells}) > 2
    rows = [
        [
            name(cell, keeps),
            f"{statistics.fmean(cell['survived']):.1%}".replace("%", " %"),
            shown(gains(cell), 4),
            *compared(cells, cell, gains, 4),
        ]
        for cell in cells
    ]
    return table(["", "survive", "benefit, nats a token", "− at once", "− cut"], rows)


def task_table(cells: Sequence[Result]) -> str:
    keeps = len({cell["final_keep"] for cell in cells}) > 2
    length = cells[0]["length"]
    part = [min(int(PARTS * d / length), PARTS - 1) for d in cells[0]["distances"]]

    def by_part(values: Sequence[float], digits: int) -> str:
        groups = [[v for v, p in zip(values, part, strict=True) if p == i] for i in range(PARTS)]
        return " / ".join(f"{statistics.fmean(group):.{digits}f}" for group in groups)

    rows = [
        [
            name(cell, keeps),
            f"{cell['flops_ratio']:.1%}".replace("%", " %"),
            by_part(cell["survived"], 2),
            by_part(cell["correct"], 2),
            shown(cell["correct"], 3),
            *compared(cells, cell, lambda one: list(one["correct"]), 3),
        ]
        for cell in cells
    ]
    head = [
        "",
        "FLOPs",
        "survive, near to far",
        "right, near to far",
        "right",
        "− at once",
        "− cut",
    ]
    return table(head, rows)


PLACES = {"ppl": ("context", text_table), "recall": ("distance", recall_table)}


def tables(path: Path, criteria: Sequence[str]) -> list[tuple[str, str]]:
    """The file's tables: what each is of, and the table."""
    listed = ("dense", "cut", *criteria)
    content = json.loads(path.read_text(encoding="utf-8"))
    place, make = PLACES.get(content["experiment"], ("length", task_table))
    found = []
    for value in dict.fromkeys(cell[place] for cell in content["cells"]):
        cells = [cell for cell in content["cells"] if cell[place] == value]
        here = [cell for cell in cells if cell["criterion"] in listed]
        found.append((f"{path.name}, {place} {value}", make(here)))
    return found


if __name__ == "__main__":
    for given in sys.argv[2:]:
        for title, text in tables(Path(given), sys.argv[1].split(",")):
            print(f"{title}\n\n{text}")
