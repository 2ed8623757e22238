"""Rules at equal FLOPs, beside the cut, with bootstrap intervals.

    python docs/results/levels.py run MODEL HELDOUT FILE [--only ppl fact ...] [--device cuda]
    python docs/results/levels.py show FILE WHAT  # what: main, text, passage, or a task's length

A level is a share of the dense FLOPs of 2048 tokens: 0.55, 0.65 and 0.75. For each level and rule
`run` looks for the `final_keep` that costs as much. A rule that holds layers may hold any number of
them; the one is taken that leaves `final_keep` nearest to 0.1. Rules that can't have the level are
left out. Stopped and started again, it goes on where it was; a file of another model or of other
texts is refused. The longest length decides which places of the texts are measured. `show` prints a
table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beyond import DENSE, SHOWN, form, interval, place, table, values
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import simba
from simba.evaluate import (
    AnswerCell,
    ContextCell,
    RecallCell,
    bootstrap,
    hidden_passkey,
    perplexity_by_context,
    prose_task,
    read_documents,
    recall,
)
from simba.evaluate.checks import rule_options
from simba.evaluate.store import fingerprint_tokens, write
from simba.fingerprints import fingerprint_weights
from simba.tuning.budget import largest

LEVELS = (0.55, 0.65, 0.75)
LENGTH = 2048
LEAST, USUAL = 0.03, 0.1
"""The smallest `final_keep`, and the one that a rule comes near to if it can."""
STEPS = 2**14
"""Into so many parts the values of `final_keep` above the smallest are divided."""
PAPER = "influence"
"""The paper's rule, whose cut stands for that of its level."""
FAMILIES = (
    PAPER,
    "window:0.5+delta@write",
    "recency@write@0:{hold}",
    "recency@write:0.67@0:{hold}",
    "recency@write:left=0.5@0:{hold}",
)
TASKS = ("fact", "pairs", "fewshot", "passkey")
WHATS = ("ppl", "passages", *TASKS)
EARLY = (0.0, 0.4)
"""Where in the prompt something is told."""
Rule = tuple[float, str, float]
"""Level, rule and `final_keep`."""
MAIN = (("ppl", 1024), ("passages", 256))
"""Of text and passages, what stands beside the tasks in a model's main table."""
Column = tuple[str, int]
"""Experiment and place."""


def cost(model: nn.Module, rule: str, keep: float) -> float:
    """FLOPs of a prompt as a share of dense."""
    return simba.flops(simba.sparsify(model, keep, **rule_options(rule)), LENGTH).ratio


def keep_at(model: nn.Module, rule: str, level: float) -> float | None:
    """The `final_keep` at which a rule costs as much as the level; None if there is none."""

    def keep(step: int) -> float:
        return LEAST + (1 - LEAST) * step / STEPS

    step = largest(lambda n: cost(model, rule, keep(n)), level, 0, STEPS)
    return None if step is None else round(keep(step), 4)


def rules(model: nn.Module) -> list[Rule]:
    """Those of each level that can have it."""
    layers = model.config.num_hidden_layers
    found: list[Rule] = []
    for level in LEVELS:
        for family in FAMILIES:
            holds = range(1, layers) if "{hold}" in family else [0]
            named = (family.format(hold=f"{hold / layers:.3f}") for hold in holds)
            kept = [(rule, keep) for rule in named if (keep := keep_at(model, rule, level))]
            if kept:
                rule, keep = min(kept, key=lambda each: abs(math.log(each[1] / USUAL)))
                found.append((level, rule, keep))
    simba.desparsify(model)
    return found


def measure(
    what: str, model: nn.Module, documents: Any, tokenizer: Any, args: argparse.Namespace
) -> tuple[type[Any], Callable[..., Any]]:
    """The cells of an experiment, and the function that measures some of them."""
    batch = {"batch_size": args.batch}
    if what == "ppl":
        given = {"contexts": args.contexts, "snippets": args.places}
        return ContextCell, partial(perplexity_by_context, model, documents, **given, **batch)
    if what == "passages":
        given = {"distances": args.distances, "passages": args.places}
        return RecallCell, partial(recall, model, documents, **given, **batch)
    given = {"lengths": args.lengths, "places": EARLY, **batch}
    if what == "passkey":
        task = partial(hidden_passkey, model, documents, tokenizer, passkeys=args.places)
    else:
        task = partial(prose_task, model, documents, tokenizer, task=what, prompts=args.places)
    return AnswerCell, partial(task, **given)


def run(args: argparse.Namespace) -> None:
    """Measure, and save behind each rule."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to(args.device).eval()
    documents = read_documents([args.heldout], tokenizer)
    settings = {name: vars(args)[name] for name in ("contexts", "distances", "lengths", "places")}
    settings["weights"] = fingerprint_weights(model)
    settings["tokens"] = fingerprint_tokens([document.ids for document in documents])
    if args.file.exists():
        result: dict[str, Any] = json.loads(args.file.read_text(encoding="utf-8"))
        if any(result.get(name) != value for name, value in settings.items()):
            raise SystemExit(
                f"{args.file} is of another model, of other texts, lengths or places, or does not "
                "say of which model and texts it is"
            )
    else:
        result = {**settings, "rules": [list(rule) for rule in rules(model)], "cells": {}}
    for what in args.only:
        kind, function = measure(what, model, documents, tokenizer, args)
        known = {cell.key: cell for cell in map(kind.from_dict, result["cells"].get(what, []))}
        for level, rule, keep in result["rules"]:
            cells = function(
                criteria=[rule], keeps=[keep], cut_prompts=rule == PAPER, known=known.values()
            )
            known |= {cell.key: cell for cell in cells}
            result["cells"][what] = [cell.to_dict() for cell in known.values()]
            write(args.file, result)
            print(args.model.name, what, level, rule, keep, flush=True)


def columns_of(cells: Mapping[str, Any], what: str) -> list[Column]:
    """Those of a table: of text, of passages, of all tasks of one length, or the main ones."""
    if what == "main":
        wanted = [*MAIN, *((task, LENGTH) for task in TASKS)]
    elif what in SHOWN.values():
        (kind,) = (name for name, shown in SHOWN.items() if shown == what)
        wanted = [(kind, n) for n in sorted(set(map(place, cells[kind])))]
    else:
        wanted = [(task, int(what)) for task in TASKS]
    return [(kind, n) for kind, n in wanted if kind in cells]


def show(args: argparse.Namespace) -> str:
    """Level, rule, and what was measured of it; dense first, where it is not what others are
    shares of."""
    result = json.loads(args.file.read_text(encoding="utf-8"))
    columns = columns_of(result["cells"], args.what)

    def cell(column: Column, rule: str, keep: float, cut: bool = False) -> str:
        what, n = column
        found = [each for each in result["cells"][what] if place(each) == n]
        (dense,) = (each for each in found if each["criterion"] == DENSE[0])
        own = [
            each
            for each in found
            if (each["pruner"] if cut else each["criterion"]) == rule and each["final_keep"] == keep
        ]
        if not own or (own[0] is dense and what in SHOWN):
            return ""
        scale, digits = form(what)
        return interval(bootstrap([scale * x for x in values(own[0], dense)]), digits)

    rows = []
    if any(what in TASKS for what, _ in columns):
        rows.append(["1", "dense", "", *(cell(each, *DENSE) for each in columns)])
    for level, rule, keep in result["rules"]:
        if rule == PAPER:
            cuts = (cell(each, rule, keep, cut=True) for each in columns)
            rows.append([f"{level:g}", "cut", "", *cuts])
        own = (cell(each, rule, keep) for each in columns)
        rows.append([f"{level:g}", f"`{rule}`", f"{keep:g}", *own])
    return table(
        ["FLOPs", "rule", "keep", *(f"{SHOWN.get(what, what)} {n}" for what, n in columns)], rows
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("model", type=Path)
    one.add_argument("heldout", type=Path)
    one.add_argument("file", type=Path)
    one.add_argument("--only", nargs="+", default=list(WHATS), choices=WHATS)
    one.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    one.add_argument("--distances", type=int, nargs="+", default=[64, 256, 1024])
    one.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    one.add_argument("--places", type=int, default=16, help="of each document")
    one.add_argument("--batch", type=int, default=26)
    one.add_argument("--device", default="cpu")
    two = verbs.add_parser("show")
    two.add_argument("file", type=Path)
    two.add_argument("what", help="main, text, passage, or the length of tasks")
    args = parser.parse_args(given)
    if args.verb == "run":
        run(args)
    else:
        print(show(args), end="")


if __name__ == "__main__":
    main()
