"""Print the tables of docs/beyond.md from the result files of beyond.sh.

    python docs/results/beyond.py told demo  # what is told far back
    python docs/results/beyond.py text demo  # text, and a passage that returns
    python docs/results/beyond.py far demo   # both, in prompts of up to 8 times the trained length
    python docs/results/beyond.py time       # of benchmarks/h200-live.json
    python docs/results/beyond.py equal demo # beside the cut of the same time, of the same file
    python docs/results/beyond.py front demo # rules near the time of the paper's setting
    python docs/results/beyond.py window demo # text by how many tokens are read
    python docs/results/beyond.py over demo  # the presets over the cut of their FLOPs, everywhere

In a cell of two numbers the second is the dense model's on the prompt cut to the same FLOPs. ± is
one standard error over documents. In brackets: 95 % bootstrap intervals over documents, paired.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from simba.evaluate.intervals import Interval, bootstrap_difference

HERE = Path(__file__).parent / "beyond"
Result = dict[str, Any]
Key = tuple[str, float]
TOLD = (
    ("fact", 512),
    ("fact", 2048),
    ("fact-long", 8192),
    ("pairs", 2048),
    ("fewshot", 2048),
    ("passkey", 2048),
)
CONTEXTS, DISTANCES = (256, 1024, 4096), (64, 256, 1024)
FAR = (4096, 16384, 32768)
SHOWN = {"ppl": "text", "passages": "passage"}
DENSE: Key = ("dense", 1.0)
RETURNING = 110
"""Tokens of a prompt of passages besides the distance: the passage and its cue."""


def cells(model: str, what: str) -> list[Result]:
    path = HERE / f"{model}-{what}.json"
    if not path.exists():
        return []
    found: list[Result] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def levels(model: str) -> dict[str, list[Result]]:
    """Those of `levels.py`, by experiment."""
    path = HERE / "levels" / f"{model}.json"
    found: dict[str, list[Result]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def place(cell: Result) -> int:
    """A prompt's tokens, or those between a passage and its return."""
    (found,) = (cell[of] for of in ("length", "context", "distance") if of in cell)
    return int(found)


def key(cell: Result) -> Key:
    """The rule and its final_keep; of a cut, those of the rule whose FLOPs it has."""
    return cell["pruner"] or cell["criterion"], cell["final_keep"]


def mean(values: Sequence[float], digits: int, error: bool = False) -> str:
    shown = f"{statistics.fmean(values):.{digits}f}"
    if error:
        shown += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return shown.replace("-", "−")


def over(cell: Result, dense: Sequence[float], error: bool = False) -> str:
    """Nats over the dense losses of the same places."""
    return mean([a - b for a, b in zip(cell["losses"], dense, strict=True)], 4, error)


def benefit(cell: Result) -> list[float]:
    """Nats a token that a passage in the prompt gains, by document."""
    return [a - b for a, b in zip(cell["absent"], cell["losses"], strict=True)]


def values(cell: Result, dense: Result) -> list[float]:
    """By document: the share that is found, the share of dense's benefit, or nats over dense."""
    if "correct" in cell:
        found: list[float] = cell["correct"]
        return found
    if "absent" in cell:
        whole = statistics.fmean(benefit(dense))
        return [gain / whole for gain in benefit(cell)]
    return [a - b for a, b in zip(cell["losses"], dense["losses"], strict=True)]


def interval(found: Interval, digits: int, sign: str = "") -> str:
    """An estimate, and its bootstrap interval in brackets."""
    numbers = (f"{number:{sign}.{digits}f}" for number in (found.estimate, found.low, found.high))
    return "{} [{}, {}]".format(*numbers).replace("-", "−")


def beside(pruned: str, cut: str | None) -> str:
    return pruned if cut is None else f"{pruned} / {cut}"


def form(what: str) -> tuple[int, int]:
    """What the values of an experiment are multiplied with in tables, and how many decimals."""
    return {"ppl": (1, 4), "passages": (100, 0)}.get(what, (1, 2))


def compared(
    what: str, own: Result | None, cut: Result | None, dense: Result, error: bool = False
) -> str:
    """A rule's mean value, and behind it its cut's; nothing for what was not measured."""
    scale, digits = form(what)
    shown = [
        mean([scale * x for x in values(cell, dense)], digits, error) if cell else None
        for cell in (own, cut)
    ]
    return beside(shown[0] or "", shown[1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def named(rule: Key) -> list[str]:
    if rule[0] == "dense":
        return ["dense", ""]
    return [f"`{rule[0]}`", f"{rule[1]:g}"]


def ordered(found: Sequence[Result]) -> list[Key]:
    """The rules by their FLOPs, dense first."""
    cost = {key(cell): cell["flops_ratio"] for cell in found if cell["criterion"] != "cut"}
    return sorted(cost, key=lambda rule: (rule[0] != "dense", cost[rule]))


def told(model: str) -> str:
    by: dict[tuple[str, int, Key, bool], Result] = {
        (what, cell["length"], key(cell), cell["criterion"] == "cut"): cell
        for what, _ in TOLD
        for cell in cells(model, what)
    }
    rows = []
    for rule in ordered([cell for cell in cells(model, "fact") if cell["length"] == 2048]):
        row = named(rule)
        row.append(f"{by['fact', 2048, rule, False]['flops_ratio']:.2f}")
        for what, length in TOLD:
            both = (by.get((what, length, rule, cut)) for cut in (False, True))
            dense = by[what, length, DENSE, False]
            row.append(compared(what, *both, dense, error=(what, length) == ("fact", 2048)))
        rows.append(row)
    head = [f"{what.partition('-')[0]} {length}" for what, length in TOLD]
    return table(["rule", "keep", "FLOPs", *head], rows)


def text(model: str) -> str:
    measured = {
        (what, place(cell), key(cell), cell["criterion"] == "cut"): cell
        for what in SHOWN
        for cell in cells(model, what)
    }
    wanted = [("ppl", n) for n in CONTEXTS] + [("passages", n) for n in DISTANCES]
    columns = [each for each in wanted if (*each, DENSE, False) in measured]
    rows = []
    found = [cell for cell in cells(model, "ppl") if cell["context"] == 1024]
    for rule in ordered(found):
        if rule == DENSE:
            continue
        ratio = next(cell["flops_ratio"] for cell in found if key(cell) == rule)
        row = [*named(rule), f"{ratio:.2f}"]
        for what, n in columns:
            both = (measured.get((what, n, rule, cut)) for cut in (False, True))
            dense = measured[what, n, DENSE, False]
            row.append(compared(what, *both, dense, error=(what, n) == ("ppl", 1024)))
        rows.append(row)
    head = [f"{SHOWN[what]} {n}" for what, n in columns]
    return table(["rule", "keep", "FLOPs", *head], rows)


def far(model: str) -> str:
    found = {
        (what, place(cell), key(cell), cell["criterion"] == "cut"): cell
        for what in ("fact", "fact-long", "pairs", "pairs-long", "passkey", "passkey-long", "ppl")
        for cell in cells(f"far/{model}", what)
    }
    texts = [
        cell for (what, length, _, _), cell in found.items() if (what, length) == ("ppl", FAR[0])
    ]
    rows = []
    for rule in ordered(texts):
        row = [*named(rule), f"{found['ppl', FAR[0], rule, False]['flops_ratio']:.2f}"]
        for task, length in product(("fact", "pairs", "passkey", "ppl"), FAR):
            what = f"{task}-long" if task != "ppl" and length == FAR[-1] else task
            both = (found.get((what, length, rule, cut)) for cut in (False, True))
            row.append(compared(task, *both, found[what, length, DENSE, False]))
        rows.append(row)
    head = [f"{what} {n}" for what in ("fact", "pairs", "passkey", "text") for n in FAR]
    return table(["rule", "keep", "FLOPs", *head], rows)


def time() -> str:
    path = HERE.parents[2] / "benchmarks" / "h200-live.json"
    rows = []
    for line in json.loads(path.read_text(encoding="utf-8"))["prefills"]:
        for name, times in line["times"].items():
            shape = f"{line['family']} ({line['rounds']} rounds)"
            share, flops = times["of dense"], times["flops of dense"]
            rows.append([shape, name, f"{times['ms']:.2f}", f"{share:.2f}", f"{flops:.2f}"])
    return table(["shape", "", "ms", "of dense", "FLOPs"], rows)


TIMED = {
    "paper": ("influence", 0.1),
    "paper, final_keep=0.5": ("influence", 0.5),
    **{
        f"step {hold}, {fate}, keep {keep}": (f"recency@{fate}@0:{hold}", keep)
        for hold, fate, keep in (
            (0.42, "write:0.67", 0.1),
            (0.42, "write:0.67", 0.16),
            (0.5, "write:0.67", 0.05),
            (0.5, "write:0.67", 0.1),
            (0.42, "write", 0.1),
            (0.59, "write", 0.1),
            (0.3, "write:left=0.5", 0.1),
            (0.3, "write:left=0.3", 0.1),
        )
    },
}
"""The rules of benchmarks/live_tokens.py whose times are compared."""


def timed(path: Path) -> list[tuple[str, str, Result]]:
    """(shape, rule, its time and the cut of the same time) of a file of live_tokens.py."""
    return [
        (line["family"], name, line["times"][name])
        for line in json.loads(path.read_text(encoding="utf-8"))["prefills"]
        for name in TIMED
        if name in line["times"]
    ]


NEAR = 0.015
"""So far from the share of the prompt that takes as long a cut may be (a token of 256 is 0.004)."""


def equal(model: str) -> str:
    kinds = ("fact", "pairs", "fewshot", "passkey", "ppl", "passages")
    found = [
        (what, place(cell), cell)
        for what in kinds
        for cell in [*cells(f"equal/{model}", what), *cells(model, what)]
    ]
    rules = {(what, n, key(cell)): cell for what, n, cell in found if cell["criterion"] != "cut"}
    cuts = [each for each in found if each[2]["criterion"] == "cut"]
    at_levels = [
        (what, place(cell), cell)
        for what, each in levels(model).items()
        for cell in each
        if cell["criterion"] == "cut"
    ]

    def cut(what: str, length: int, share: float) -> Result | None:
        """The cell of the cut of the nearest share, if it is near; else one of `levels.py`."""

        def distance(cell: Result) -> float:
            whole = length + RETURNING if what == "passages" else length
            return abs(float(cell["read"]) / whole - share)

        for of in (cuts, at_levels):
            same = [cell for kind, n, cell in of if (kind, n) == (what, length)]
            found = min(same, key=distance, default=None)
            if found is not None and distance(found) < NEAR:
                return found
        return None

    wanted = [("fact", 512), *((task, 2048) for task in kinds[:4])]
    wanted += [("ppl", n) for n in CONTEXTS] + [("passages", n) for n in DISTANCES]
    columns = [each for each in wanted if (*each, DENSE) in rules]
    rows = []
    for shape, name, times in timed(HERE.parents[2] / "benchmarks" / "h200-live.json"):
        if not any((*each, TIMED[name]) in rules for each in columns):
            continue
        share = times["cut of the same time"]
        row = [shape, *named(TIMED[name]), f"{times['of dense']:.2f}", f"{share:.2f}"]
        for what, length in columns:
            own = rules.get((what, length, TIMED[name]))
            if own is None:
                row.append("")
                continue
            row.append(compared(what, own, cut(what, length, share), rules[what, length, DENSE]))
        rows.append(row)
    head = [f"{SHOWN.get(what, what)} {n}" for what, n in columns]
    return table(["time of", "rule", "keep", "of dense", "cut to", *head], rows)


def front(model: str) -> str:
    """Facts of 2048 tokens and text of 1024, each beside the cut of the same FLOPs."""
    path = HERE.parents[2] / "benchmarks" / "h200-live.json"
    shares: dict[Key, list[str]] = {}
    for _, name, times in timed(path):
        shares.setdefault(TIMED[name], []).append(f"{times['of dense']:.2f}")
    facts, texts = (cells(f"front/{model}", what) for what in ("fact", "ppl"))
    dense = next(cell["losses"] for cell in texts if cell["criterion"] == "dense")

    def both(found: Sequence[Result], rule: Key) -> tuple[Result, Result]:
        """The rule's cell and its cut's; rules of one cost share a cut."""
        (own,) = (cell for cell in found if key(cell) == rule and cell["criterion"] != "cut")
        cuts = (cell for cell in found if cell["criterion"] == "cut")
        flops = own["flops_ratio"]
        cut = min(cuts, key=lambda cell: abs(cell["flops_ratio"] - flops))
        assert abs(cut["flops_ratio"] - flops) < 0.001
        return own, cut

    rows = []
    for rule in ordered(facts):
        if rule == DENSE:
            continue
        (own, cut), text = both(facts, rule), both(texts, rule)
        found = beside(mean(own["correct"], 2, error=True), mean(cut["correct"], 2))
        time_of = " and ".join(shares.get(rule, []))
        costs = beside(*(over(cell, dense) for cell in text))
        rows.append([*named(rule), f"{own['flops_ratio']:.3f}", time_of, found, costs])
    return table(["rule", "keep", "FLOPs", "of dense", "fact 2048", "text 1024"], rows)


WINDOW = "recency@write:0.67@0:0.5"


def window(model: str) -> str:
    """Text of one rule by the number of tokens that its last layers read."""
    rows = []
    for found in (
        [*cells(f"equal/{model}", "ppl"), *cells(model, "ppl")],  # of the same places
        cells(f"window/{model}", "ppl"),
        cells(f"window/{model}", "ppl-long"),
    ):
        dense = {cell["context"]: cell["losses"] for cell in found if cell["criterion"] == "dense"}
        cuts = [cell for cell in found if cell["criterion"] == "cut"]
        for cell in found:
            context, flops = cell["context"], cell["flops_ratio"]
            if cell["criterion"] != WINDOW or context < 1024:
                continue
            cut = min(
                (each for each in cuts if each["context"] == context),
                key=lambda each: abs(each["flops_ratio"] - flops),
            )
            assert abs(cut["flops_ratio"] - flops) < 0.02
            both = beside(*(over(each, dense[context]) for each in (cell, cut)))
            rows.append((round(context * cell["final_keep"]), context, f"{flops:.2f}", both))
    return table(["read", "of", "FLOPs", "text"], [[*map(str, row)] for row in sorted(rows)])


PRESETS = (
    ("influence", 0.1),
    ("recency@write:0.67@0:0.42", 0.1),
    ("recency@write:left=0.5@0:0.3", 0.1),
    ("recency@write@0:0.42", 0.1),
    ("influence", 0.5),
    ("recency@write@0:0.59", 0.1),
)
"""The rules of "paper", two that cost as much, that of "fast", one that costs as much as that of
"recall", and that."""
OVER = (
    *((task, (512, 2048, 8192)) for task in ("fact", "pairs", "fewshot", "passkey")),
    ("ppl", CONTEXTS),
    ("passages", DISTANCES),
)


def over_cut(model: str) -> str:
    """What these rules find, lose on text, and gain of a passage, minus what their cuts do."""

    def measured(what: str, cell: Result) -> list[float]:
        if what == "passages":
            return benefit(cell)
        return cell["losses"] if what == "ppl" else cell["correct"]

    rows = []
    for what, places in OVER:
        found = [*cells(model, what), *cells(model, f"{what}-long")]
        for n in places if found else ():
            row = [f"{SHOWN.get(what, what)} {n}"]
            for rule in PRESETS:
                both = {
                    cell["criterion"] == "cut": measured(what, cell)
                    for cell in found
                    if (place(cell), key(cell)) == (n, rule)
                }
                if len(both) < 2:
                    row.append("")
                    continue
                gap = bootstrap_difference(both[False], both[True])
                row.append(interval(gap, 4 if what in SHOWN else 2, "+"))
            if any(row[1:]):
                rows.append(row)
    return table(["", *(f"`{rule}`, {keep:g}" for rule, keep in PRESETS)], rows)


PRINTED = {
    "told": told, "text": text, "far": far, "time": time, "equal": equal, "front": front,
    "window": window, "over": over_cut,
}  # fmt: skip

if __name__ == "__main__":
    what, *names = sys.argv[1:]
    print(PRINTED[what](*names), end="")
