"""Two models of equal FLOPs on the same snippets: the larger one pruned, the smaller one dense.

    python docs/results/equal_flops.py docs/results/m-ppl.json docs/results/s-ppl.json [--keep 0.1]

Differences of their losses (nats a token, 95 % intervals over documents) at every context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simba.evaluate import DENSE, ContextCell, bootstrap


def cells(path: Path) -> dict[tuple[int, str, float], ContextCell]:
    """By context, criterion and keep."""
    read = map(ContextCell.from_dict, json.loads(path.read_text())["cells"])
    return {(cell.context, cell.criterion, cell.final_keep): cell for cell in read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("larger", type=Path)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("--keep", type=float, default=0.1)
    args = parser.parse_args()
    larger, smaller = cells(args.larger), cells(args.smaller)
    for context, criterion, keep in larger:
        dense = smaller.get((context, DENSE, 1.0))
        if keep != args.keep or dense is None:
            continue
        pruned = larger[context, criterion, keep]
        pairs = zip(pruned.losses, dense.losses, strict=True)
        change = bootstrap([ours - theirs for ours, theirs in pairs])
        print(
            f"context {context:5}  {criterion:10} {pruned.perplexity.estimate:6.2f}  dense "
            f"{dense.perplexity.estimate:6.2f}  {change.estimate:+.4f} "
            f"({change.low:+.4f} to {change.high:+.4f})"
        )


if __name__ == "__main__":
    main()
