"""Print the tables of docs/guides/finetuning.md from the result files of finetune.sh.

    python docs/results/finetune.py s m
    python docs/results/finetune.py passages     # of finetune_passages.py

Text is in nats a token over the dense forward of the same model. A passage that returns is in
percent of what it helps that dense forward. In a cell of two numbers the second is of the same
model, dense, on the prompt cut to the same FLOPs. In brackets: 95 % bootstrap intervals over
documents.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simba.evaluate.intervals import bootstrap_difference, bootstrap_ratio

HERE = Path(__file__).parent / "finetune"
Result = dict[str, Any]
Rule = tuple[str, float]
CONTEXTS, DISTANCES = (256, 1024, 3072), (64, 256, 1024)
DENSE: Rule = ("dense", 1.0)
TRAINED = ("untrained", "dense", "paper", "distil", "lr3e-4-dense", "lr3e-4-distil")
"""In this order."""


def read(name: str, measured: str) -> dict[tuple[int, Rule, bool], Result]:
    """Results by context or distance, rule (of a cut: the rule whose FLOPs it has), and cut."""
    cells = json.loads((HERE / f"{name}-{measured}.json").read_text(encoding="utf-8"))["cells"]
    far = "context" if measured == "ppl" else "distance"
    return {
        (cell[far], (cell["pruner"] or cell["criterion"], cell["final_keep"]), cut): cell
        for cell in cells
        for cut in (cell["criterion"] == "cut",)
    }


def gains(cell: Result) -> list[float]:
    return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]


def shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def cut_of(ppl: dict[tuple[int, Rule, bool], Result], rule: Rule) -> Rule:
    """The rule whose cut stands for this one's: cuts of the same FLOPs are measured once."""
    flops = ppl[1024, rule, False]["flops_ratio"]
    cuts = {rule for far, rule, cut in ppl if cut and far == 1024}
    return min(cuts, key=lambda each: abs(ppl[1024, each, True]["flops_ratio"] - flops))


def text(ppl: dict[tuple[int, Rule, bool], Result], context: int, rule: Rule) -> str:
    """Nats over dense, and the cut's."""
    dense = ppl[context, DENSE, False]["losses"]
    pruned, cut = (
        bootstrap_difference(ppl[context, which, is_cut]["losses"], dense)
        for which, is_cut in ((rule, False), (cut_of(ppl, rule), True))
    )
    cell = shown(pruned.estimate, 4)
    if context == 1024:
        cell += f" [{shown(pruned.low, 4)}, {shown(pruned.high, 4)}]"
    return f"{cell} / {shown(cut.estimate, 4)}"


def passage(
    recall: dict[tuple[int, Rule, bool], Result],
    distance: int,
    rule: Rule,
    cut: Rule,
    interval: bool,
) -> str:
    """Percent of what it helps dense, and the cut's."""
    whole = gains(recall[distance, DENSE, False])
    kept, of_cut = (
        bootstrap_ratio(gains(recall[distance, which, is_cut]), whole)
        for which, is_cut in ((rule, False), (cut, True))
    )
    cell = shown(100 * kept.estimate, 0)
    if interval:
        cell += f" [{shown(100 * kept.low, 0)}, {shown(100 * kept.high, 0)}]"
    return f"{cell} / {shown(100 * of_cut.estimate, 0)}"


def rows(name: str, trained: str) -> list[list[str]]:
    ppl, recall = read(name, "ppl"), read(name, "recall")
    loss = shown(statistics.fmean(ppl[1024, DENSE, False]["losses"]), 3)
    found = []
    for rule in dict.fromkeys(rule for _, rule, _ in ppl if rule != DENSE):
        flops = ppl[1024, rule, False]["flops_ratio"]
        row = [trained, loss, f"`{rule[0]}`", f"{rule[1]:g}", f"{flops:.2f}"]
        row += [text(ppl, context, rule) for context in CONTEXTS]
        row += [passage(recall, n, rule, cut_of(ppl, rule), False) for n in DISTANCES]
        found.append(row)
    return found


PASSAGES = {
    "untrained": "not",
    "control": "dense, 3e-4",
    "r83": "distil, 3e-4",
    "r79": "distil, 3e-4",
    "d79": "distil, 3e-4",
    "d79hid": "distil, 3e-4, hidden states",
    "d79hi": "distil, 1e-3",
    "d79both": "distil from itself, dense and pruned losses, 3e-4",
    "hi75": "distil, 1e-3, 1712 steps",
    "mid88": "distil, 5e-4, 1659 steps",
    "hi88": "distil, 1e-3, 1663 steps",
    "hi79": "distil, 1e-3, 1684 steps",
    "hid79": "distil, 1e-3, hidden states, 1711 steps",
}
"""Runs of finetune_passages.py, and how they were trained."""


def passages() -> str:
    start = statistics.fmean(read("passages-untrained", "ppl")[1024, DENSE, False]["losses"])
    lines = []
    for name, trained in PASSAGES.items():
        ppl, recall = read(f"passages-{name}", "ppl"), read(f"passages-{name}", "recall")
        lost = statistics.fmean(ppl[1024, DENSE, False]["losses"]) - start
        for rule in dict.fromkeys(rule for _, rule, _ in ppl if rule != DENSE):
            row = [trained, f"`{rule[0]}`", f"{ppl[1024, rule, False]['flops_ratio']:.3f}"]
            row += [text(ppl, context, rule) for context in (256, 1024)]
            row.append(shown(lost, 3))
            row += [passage(recall, n, rule, cut_of(ppl, rule), n == 256) for n in DISTANCES]
            lines.append(row)
    head = ["trained", "rule", "FLOPs", "text 256", "text 1024", "dense lost"]
    return table([*head, *(f"passage {n}" for n in DISTANCES)], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every) + "\n"


def results(model: str) -> str:
    names = {path.name.removesuffix("-ppl.json") for path in HERE.glob(f"{model}-*-ppl.json")}
    lines: list[list[str]] = []
    for trained in TRAINED:
        mine = sorted(
            name
            for name in names
            if name == f"{model}-{trained}"
            or (trained.endswith(("paper", "distil")) and name.startswith(f"{model}-{trained}-"))
        )
        for name in mine:
            lines += rows(name, trained)
    head = ["trained", "dense loss", "rule", "keep", "FLOPs"]
    head += [*(f"text {n}" for n in CONTEXTS), *(f"passage {n}" for n in DISTANCES)]
    return table(head, lines)


if __name__ == "__main__":
    tables = [passages() if name == "passages" else results(name) for name in sys.argv[1:]]
    print("\n".join(tables), end="")
