"""Prefills of whole models by preset, beside dense and the cut of the same FLOPs. One command:

    python benchmarks/presets.py [--json presets.json] [--lengths 8192] [--layers 64] [--rounds 20]

The models have the shapes of mamba-2.8b and mamba2-2.7b, all 64 layers and random weights, in
bfloat16; the batch is 1. Every preset has a line, and so has the dense model on the last tokens of
the prompt, as many as cost the FLOPs of the preset; the preset "text" is such a cut itself. All
of them run on simba's kernels, also what is dense. A prefill is timed from the call to its last
kernel, as in `live_tokens.py`; the lines of a table take turns, and the times are medians.
``--smoke`` runs tiny shapes on a CPU and proves only that the script works.

Compiling the kernels one after another takes minutes. Processes with a family and a preset each
(``--families mamba-2.8b --presets recall --layers 6 --rounds 3``) compile them side by side, and
this command then finds them in Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import simba
from live_tokens import FAMILIES, on_the_host, prefill, random_model, run, take_turns
from simba.evaluate import cut_length
from simba.presets import PRESETS
from timing import Call, circumstances, commit


def prefills(
    family: str, length: int, layers: int, names: list[str], device: str, smoke: bool
) -> tuple[dict[str, Call], dict[str, float]]:
    """Whole prefills, by name, and their FLOPs as shares of the dense one's."""
    make = partial(random_model, family, layers, device, smoke)
    stock = make()
    ids = torch.randint(0, stock.config.vocab_size, (1, length), device=device)
    calls: dict[str, Call] = {}
    flops: dict[str, float] = {}
    whole = simba.flops(stock, length).total

    def add(name: str, read: int, **options: Any) -> Any:
        model = simba.sparsify(make(like=stock), **options)
        calls[name] = partial(prefill, model, ids[:, -read:].contiguous())
        flops[name] = simba.flops(model, read).total / whole
        return model

    add("dense", length, final_keep=1.0, dense_path="simba")
    for preset in names:
        model = add(preset, length, preset=preset)
        if preset != "text":
            read = cut_length(model, length)
            add(f"cut to the FLOPs of {preset}", read, final_keep=1.0, dense_path="simba")
    return calls, flops


def measure(arguments: argparse.Namespace, device: str) -> None:
    """One table for a family and length. What there is so far is written behind each."""
    result: dict[str, Any] = {**circumstances(arguments.commit), "prefills": []}
    for family in arguments.families:
        for length in arguments.lengths:
            calls, flops = prefills(
                family, length, arguments.layers, arguments.presets, device, arguments.smoke
            )
            for _ in range(3):  # compiles, captures, replays
                for call in calls.values():
                    call()
            timers = {name: on_the_host(call, device) for name, call in calls.items()}
            line = {"family": family, "length": length, "layers": arguments.layers}
            line |= take_turns(timers, math.inf, arguments.rounds)
            print(f"{family}, {arguments.layers} layers, {length} tokens, {line['rounds']} rounds:")
            for name, times in line["times"].items():
                times["flops of dense"] = flops[name]
                shares = f"{times['of dense']:.2f} of dense  FLOPs {flops[name]:.2f}"
                print(f"  {name:28} {times['ms']:9.3f} ms  {shares}")
            sys.stdout.flush()
            result["prefills"].append(line)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
            del calls, timers
            if device == "cuda":
                torch.cuda.empty_cache()


def main(given: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens")
    parser.add_argument("--layers", type=int, default=64, help="layers of the models")
    parser.add_argument("--rounds", type=int, default=20, help="timings of a line")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    run(parser.parse_args(given), measure)


if __name__ == "__main__":
    main()
