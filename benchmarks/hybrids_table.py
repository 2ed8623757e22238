"""The tables of docs/performance.md about hybrids, from what hybrids.py has measured:

python benchmarks/hybrids_table.py benchmarks/h200-hybrids.json
python benchmarks/hybrids_table.py benchmarks/h200-hybrids-two-gpus.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybrids import QUARTER

VARIANTS = {
    "dense": "dense",
    "linear": "`final_keep=0.1`",
    "linear, without graphs": "without a graph",
    "dense, cut to the FLOPs of linear": "its cut",
    QUARTER: QUARTER,
    f"{QUARTER}, without graphs": "without a graph",
    f"dense, cut to the FLOPs of {QUARTER}": "its cut",
}


def times(result: dict[str, Any]) -> str:
    """Milliseconds, and how many times as fast as dense."""

    def said(cell: dict[str, float]) -> str:
        gain = "" if cell["of dense"] == 1 else f" ({1 / cell['of dense']:.2f} ×)"
        return f"{cell['ms']:.0f}{gain}"

    return markdown(result, said)


def memory(result: dict[str, Any]) -> str:
    """MiB of keys and values in the cache, and the most memory above the weights. Both were
    measured without graphs."""
    names = [name for name in VARIANTS if not name.endswith("without graphs")]
    return markdown(result, lambda cell: f"{cell['KV MiB']:.0f}, {cell['peak MiB']:.0f}", names)


def markdown(result: dict[str, Any], said: Any, names: Iterable[str] = VARIANTS) -> str:
    found = [name for name in names if any(name in line["cells"] for line in result["lines"])]
    lines = [["", *(VARIANTS[name] for name in found)], ["---"] * (len(found) + 1)]
    for line in result["lines"]:
        cells = [said(line["cells"][name]) if name in line["cells"] else "" for name in found]
        lines.append([f"{line['model']}, {line['length']}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(times(measured), memory(measured), sep="\n", end="")
