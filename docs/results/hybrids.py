"""Print the tables of docs/hybrids.md from the result files of hybrids.sh.

    python docs/results/hybrids.py text bamba   # text, and a passage that returns
    python docs/results/hybrids.py told mamba2  # facts and pairs

Text is in nats a token over the model's own dense forward pass. A passage that returns is in
percent of what it helps that pass. Facts and pairs are the share of the answers' tokens that are
right. In a cell of two numbers the second is of the dense model on the prompt cut to the same
FLOPs. In brackets: 95 % bootstrap intervals over documents.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simba.evaluate.intervals import Interval, bootstrap, bootstrap_difference, bootstrap_ratio

HERE = Path(__file__).parent / "hybrids"
Result = dict[str, Any]
Cells = dict[tuple[int, str, bool], Result]
DENSE = "dense"


def read(model: str, measured: str, far: str) -> Cells:
    """Results by context, distance or length, rule (of a cut: whose FLOPs it has), and cut."""
    path = HERE / f"{model}-{measured}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {
        (cell[far], cell["pruner"] or cell["criterion"], cell["criterion"] == "cut"): cell
        for cell in cells
    }


def places(cells: Cells) -> list[int]:
    return sorted({place for place, _, _ in cells})


def rules(cells: Cells) -> list[str]:
    """Those that prune, by their FLOPs."""
    last = places(cells)[-1]
    found = {rule: cell for (at, rule, cut), cell in cells.items() if at == last and not cut}
    return sorted(set(found) - {DENSE}, key=lambda rule: (found[rule]["flops_ratio"], rule))


def cut_of(cells: Cells, at: int, rule: str) -> Result:
    """The cut with this rule's FLOPs; rules that cost equally much have one in common."""
    flops = cells[at, rule, False]["flops_ratio"]
    cuts = [cell for (place, _, cut), cell in cells.items() if place == at and cut]
    return min(cuts, key=lambda cell: abs(cell["flops_ratio"] - flops))


def shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def interval(value: Interval, digits: int, factor: float = 1.0) -> str:
    low, high = (shown(factor * end, digits) for end in (value.low, value.high))
    return f"{shown(factor * value.estimate, digits)} [{low}, {high}]"


def gains(cell: Result) -> list[float]:
    return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def text(model: str) -> str:
    ppl, passages = read(model, "ppl", "context"), read(model, "passages", "distance")
    contexts, distances = places(ppl), places(passages)
    dense = [DENSE, "1.00"]
    dense += [
        shown(statistics.fmean(ppl[at, DENSE, False]["losses"]), 3) + " nats" for at in contexts
    ]
    dense += [
        shown(statistics.fmean(gains(passages[at, DENSE, False])), 3) + " nats" for at in distances
    ]
    rows = [dense]
    for rule in rules(ppl):
        row = [f"`{rule}`", f"{ppl[contexts[-1], rule, False]['flops_ratio']:.2f}"]
        for at in contexts:
            losses = ppl[at, DENSE, False]["losses"]
            row.append(
                " / ".join(
                    interval(bootstrap_difference(cell["losses"], losses), 3)
                    for cell in (ppl[at, rule, False], cut_of(ppl, at, rule))
                )
            )
        for at in distances:
            whole = gains(passages[at, DENSE, False])
            row.append(
                " / ".join(
                    interval(bootstrap_ratio(gains(cell), whole), 0, 100)
                    for cell in (passages[at, rule, False], cut_of(passages, at, rule))
                )
            )
        rows.append(row)
    head = [*(f"text {n}" for n in contexts), *(f"passage {n}" for n in distances)]
    return table(["rule", "FLOPs", *head], rows)


def told(model: str) -> str:
    tasks = {what: read(model, what, "length") for what in ("fact", "pairs")}
    facts = tasks["fact"]
    rows = []
    for rule in [DENSE, *rules(facts)]:
        row = [DENSE if rule == DENSE else f"`{rule}`"]
        row.append(f"{facts[places(facts)[-1], rule, False]['flops_ratio']:.2f}")
        for cells in tasks.values():
            for at in places(cells):
                both = [cells[at, rule, False]]
                both += [] if rule == DENSE else [cut_of(cells, at, rule)]
                row.append(" / ".join(interval(bootstrap(cell["correct"]), 2) for cell in both))
        rows.append(row)
    head = [f"{what} {n}" for what, cells in tasks.items() for n in places(cells)]
    return table(["rule", "FLOPs", *head], rows)


if __name__ == "__main__":
    what, *models = sys.argv[1:]
    print("\n".join({"text": text, "told": told}[what](model) for model in models), end="")
