"""Kernels and whole prefills on a GPU: simba's, mamba-ssm's, transformers'. One command:

    python benchmarks/gpu.py --json benchmarks/h200.json
        [--only kernels select prefill families crossover]

Weights are random, in bfloat16. All variants of a line run in one process and take turns; the table
shows medians, the JSON file also the 20th and the 80th percentile. Kernels are timed from CUDA
graphs, so that launching them doesn't count. Prefills are timed as a user calls them, from the call
to the synchronised logits of the last token. mamba-ssm and transformers are left out where they are
not installed.

For every prefill the table also shows its arithmetic limit (see `limits`; the rates of products and
copies are measured first), and the GPU's clock and power while the prefill is repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from gpu_kernels import kernel_table, select_table
from gpu_prefills import FAMILIES, KEEPS, PREFILLS, crossover_table, prefill_table
from results import GpuResult
from timing import circumstances, commit, rates

TABLES = ["kernels", "select", "prefill", "families", "crossover"]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's, or those that are ``given``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here, table by table")
    parser.add_argument("--only", nargs="*", default=TABLES, help=f"tables: {', '.join(TABLES)}")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each variant")
    parser.add_argument(
        "--keeps", type=float, nargs="*", default=KEEPS, help="values of final_keep"
    )
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    parser.add_argument(
        "--prefill",
        nargs="*",
        type=prompt,
        default=PREFILLS,
        metavar="SHAPE:BATCH:LENGTH",
        help="prompts of the table of prefills (default: all)",
    )
    return parser.parse_args(given)


def prompt(text: str) -> tuple[str, int, int]:
    """Read ``shape:batch:length``."""
    shape, batch, length = text.split(":")
    return shape, int(batch), int(length)


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("no GPU here; benchmarks/prefill.py measures on a CPU")

    import transformers

    transformers.logging.set_verbosity_error()
    measured = rates()
    where = circumstances(args.commit)
    result: GpuResult = {
        "date": where["date"],
        "commit": where["commit"],
        "gpu": where["gpu"],
        "versions": where["versions"],
        "rates": measured,
    }
    print(json.dumps(result), flush=True)

    def save() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1))

    if "kernels" in args.only:
        result["kernels"] = kernel_table(args.rounds)
        save()
    if "select" in args.only:
        result["select"] = select_table(args.rounds)
        save()
    if "prefill" in args.only:
        result["prefill"] = []
        for line in prefill_table(args.prefill or PREFILLS, args.keeps, measured, args.rounds):
            result["prefill"].append(line)
            save()
    if "families" in args.only:
        result["families"] = []
        for line in prefill_table(FAMILIES, [0.1], measured, args.rounds):
            result["families"].append(line)
            save()
    if "crossover" in args.only:
        result["crossover"] = crossover_table(args.rounds)
        save()


if __name__ == "__main__":
    main()
