"""Print the tables of docs/hybrids.md from the result files of hybrids.sh.

    python docs/results/hybrids.py text bamba   # text, and a passage that returns
    python docs/results/hybrids.py told mamba2  # facts and pairs
    python docs/results/hybrids.py differences bamba  # of rules from each other and from the cut
    python docs/results/hybrids.py beside bamba mamba2

Text is in nats a token over the model's own dense forward pass. A passage that returns is in
percent of what it helps that pass. Facts and pairs are the share of the answers' tokens that are
right. In a cell of two numbers the second is of the dense model on the prompt cut to the same FLOPs
("–" if that was not measured). In brackets: 95 % bootstrap intervals over documents. FLOPs are
shares of the dense model's, at the longest prompts, in "beside" after the second context.
Differences are paired by document. Those of a passage are in nats of what it helps.
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
CUT = "its cut"
PAIRS = [
    ("attention", "influence"),
    ("influence@drop@1@4", "influence"),
    ("influence@drop@0:0.25@4", "influence@drop@0:0.25"),
    ("influence@drop@0:0.6", "influence"),
]
"""Rules that "differences" compares."""
NEAR = 0.01
"""Shares of the dense model's FLOPs that differ by less are the same."""


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


def cut_of(cells: Cells, at: int, rule: str) -> Result | None:
    """The cut with this rule's FLOPs; rules that cost equally much have one in common. None if time
    was up before it was measured."""
    flops = cells[at, rule, False]["flops_ratio"]
    cuts = [cell for (place, _, cut), cell in cells.items() if place == at and cut]
    found = min(cuts, key=lambda cell: abs(cell["flops_ratio"] - flops), default=None)
    near = found is not None and abs(found["flops_ratio"] - flops) < NEAR
    return found if near else None


def shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def interval(value: Interval, digits: int, factor: float = 1.0) -> str:
    low, high = (shown(factor * end, digits) for end in (value.low, value.high))
    return f"{shown(factor * value.estimate, digits)} [{low}, {high}]"


def gains(cell: Result) -> list[float]:
    return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def over_dense(cells: Cells, at: int, rule: str) -> str:
    """Text: what a rule costs, and what its cut costs."""
    dense = cells[at, DENSE, False]["losses"]
    pruned = bootstrap_difference(cells[at, rule, False]["losses"], dense)
    cut = cut_of(cells, at, rule)
    beside = None if cut is None else bootstrap_difference(cut["losses"], dense).estimate
    return f"{interval(pruned, 3)} / {shown(beside, 3)}"


def retained(cells: Cells, at: int, rule: str) -> str:
    """A passage that returns: percent of what it helps the dense model."""
    dense = gains(cells[at, DENSE, False])
    pruned = bootstrap_ratio(gains(cells[at, rule, False]), dense)
    cut = cut_of(cells, at, rule)
    beside = None if cut is None else 100 * bootstrap_ratio(gains(cut), dense).estimate
    return f"{interval(pruned, 0, 100)} / {shown(beside, 0)}"


def right(cells: Cells, at: int, rule: str) -> str:
    """Facts and pairs: the share of the answers' tokens that are right."""
    found = interval(bootstrap(cells[at, rule, False]["correct"]), 2)
    if rule == DENSE:
        return found
    cut = cut_of(cells, at, rule)
    return f"{found} / {shown(None if cut is None else statistics.fmean(cut['correct']), 2)}"


def text(model: str) -> str:
    ppl, passages = read(model, "ppl", "context"), read(model, "passages", "distance")
    dense = [
        *(statistics.fmean(ppl[at, DENSE, False]["losses"]) for at in places(ppl)),
        *(statistics.fmean(gains(passages[at, DENSE, False])) for at in places(passages)),
    ]
    rows = [[DENSE, "1.00", *(f"{shown(value, 3)} nats" for value in dense)]]
    for rule in rules(ppl):
        row = [f"`{rule}`", f"{ppl[places(ppl)[-1], rule, False]['flops_ratio']:.2f}"]
        row += [over_dense(ppl, at, rule) for at in places(ppl)]
        row += [retained(passages, at, rule) for at in places(passages)]
        rows.append(row)
    head = [*(f"text {n}" for n in places(ppl)), *(f"passage {n}" for n in places(passages))]
    return table(["rule", "FLOPs", *head], rows)


def told(model: str) -> str:
    tasks = {what: read(model, what, "length") for what in ("fact", "pairs")}
    facts = tasks["fact"]
    rows = []
    for rule in [DENSE, *rules(facts)]:
        row = [DENSE if rule == DENSE else f"`{rule}`"]
        row.append(f"{facts[places(facts)[-1], rule, False]['flops_ratio']:.2f}")
        row += [right(cells, at, rule) for cells in tasks.values() for at in places(cells)]
        rows.append(row)
    head = [f"{what} {n}" for what, cells in tasks.items() for n in places(cells)]
    return table(["rule", "FLOPs", *head], rows)


def beside(first: str, second: str) -> str:
    """Two models at one size each, by rule."""
    found = {}
    for model in (first, second):
        columns = {
            "text": (read(model, "ppl", "context"), 1, over_dense),
            "passage": (read(model, "passages", "distance"), 1, retained),
            "fact": (read(model, "fact", "length"), -1, right),
            "pairs": (read(model, "pairs", "length"), -1, right),
        }
        ppl = columns["text"][0]
        for rule in rules(ppl):
            row = [f"{ppl[places(ppl)[1], rule, False]['flops_ratio']:.2f}"]
            row += [show(cells, places(cells)[at], rule) for cells, at, show in columns.values()]
            found[rule, model] = row
        head = [f"{name} {places(cells)[at]}" for name, (cells, at, _) in columns.items()]
    rows = [
        [f"`{rule}`", model, *found[rule, model]]
        for rule in dict.fromkeys(rule for rule, _ in found)
        for model in (first, second)
        if (rule, model) in found
    ]
    return table(["rule", "model", "FLOPs", *head], rows)


def differences(model: str) -> str:
    """Rules from their cuts, and some from one another."""
    columns = [
        ("text", read(model, "ppl", "context"), lambda cell: cell["losses"], 3),
        ("passage", read(model, "passages", "distance"), gains, 3),
        ("fact", read(model, "fact", "length"), lambda cell: cell["correct"], 2),
        ("pairs", read(model, "pairs", "length"), lambda cell: cell["correct"], 2),
    ]
    measured = rules(columns[0][1])
    rows = []
    for rule, from_ in [*((rule, CUT) for rule in measured), *PAIRS]:
        if rule not in measured:
            continue
        row = [f"`{rule}`", from_ if from_ == CUT else f"`{from_}`"]
        for _, cells, values, digits in columns:
            for at in places(cells):
                other = cut_of(cells, at, rule) if from_ == CUT else cells[at, from_, False]
                if other is None:
                    row.append(shown(None, digits))
                    continue
                found = bootstrap_difference(values(cells[at, rule, False]), values(other))
                row.append(interval(found, digits))
        rows.append(row)
    head = [f"{name} {at}" for name, cells, _, _ in columns for at in places(cells)]
    return table(["rule", "minus", *head], rows)


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    shows = {"text": text, "told": told, "beside": beside, "differences": differences}
    print(shows[what](*names), end="")
