"""Redraw the GPU benchmark's figures from its JSON file:

python benchmarks/plot_gpu.py benchmarks/h100.json --out docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"simba": "#1b6ca8", "mamba-ssm": "#d1495b", "transformers": "#8d99ae"}


def colour(name: str) -> str:
    return next(value for key, value in COLOURS.items() if name.startswith(key))


def draw_scan(result: dict[str, Any], path: Path) -> None:
    """Time per token of the scan over length, batch 1, widest model."""
    lines = [x for x in result["kernels"] if x["batch"] == 1 and x["d_inner"] == 5120]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for kernel, label in (("scan", "simba scan"), ("mamba-ssm scan", "mamba-ssm scan")):
        points = [x for x in lines if kernel in x["times"]]
        if points:
            axes.plot(
                [x["length"] for x in points],
                [1e6 * x["times"][kernel]["ms"] / x["length"] for x in points],
                "o-",
                color=colour(label),
                label=label,
            )
    axes.plot(
        [x["length"] for x in lines],
        [1e6 * x["times"]["score"]["ms"] / x["length"] for x in lines],
        "s--",
        color=COLOURS["simba"],
        alpha=0.6,
        label="simba score",
    )
    axes.set(xscale="log", xlabel="tokens", ylabel="ns a token", ylim=(0, None))
    axes.set_title(f"d_inner 5120, d_state 16, bf16, {result['gpu']}, {result['date']}", size=9)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_prefill(result: dict[str, Any], path: Path) -> None:
    """Prefill time of every variant, relative to mamba-ssm's fused block."""
    lines = [x for x in result["prefill"] if "mamba-ssm fused" in x["times"]]
    names = list(dict.fromkeys(name for line in lines for name in line["times"]))
    names.remove("mamba-ssm fused")
    figure, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        there = [(x, line) for x, line in enumerate(lines) if name in line["times"]]
        axes.bar(
            [x + (index - len(names) / 2 + 0.5) * width for x, _ in there],
            [x["times"]["mamba-ssm fused"]["ms"] / x["times"][name]["ms"] for _, x in there],
            width,
            label=name,
            color=colour(name),
            alpha=1.0 if name == "simba 0.1" else 0.35 + 0.5 * index / len(names),
        )
    axes.axhline(1, color=COLOURS["mamba-ssm"], linewidth=1)
    axes.set_xticks(
        range(len(lines)), [f"{x['shape']}\n{x['batch']} x {x['length']}" for x in lines], size=8
    )
    axes.set_ylabel("times as fast as\nmamba-ssm's fused block")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    result = json.loads(args.json.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("kernels", draw_scan), ("prefill", draw_prefill)):
        if name in result:
            path = args.out / f"gpu-{name}.png"
            draw(result, path)
            print(path)


if __name__ == "__main__":
    main()
