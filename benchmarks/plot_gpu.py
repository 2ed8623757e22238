"""Draw the figures of a GPU benchmark's JSON file, and print its tables in Markdown:

python benchmarks/plot_gpu.py benchmarks/h200.json --out docs/images

A file without kernels leaves their figure as it is; so draw ``h100.json``, which has both, before
``h200.json``, whose prefills the documentation shows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from gpu_prefills import CUT
from results import CrossoverLine, GpuResult, KernelLine, PrefillLine

COLOURS = {CUT: "#e09f3e", "simba": "#1b6ca8", "mamba-ssm": "#d1495b", "transformers": "#8d99ae"}
DRAWN = {
    "transformers": 0.4,
    "mamba-ssm with states": 0.7,
    "simba dense": 0.4,
    "simba 0.1": 1.0,
    CUT: 1.0,
    "simba 0.1 on mamba-ssm": 0.7,
}
"""The bars of a prefill, from left to right, and how opaque they are. Other values of `final_keep`
are in the tables only, since their cuts are not measured."""


def colour(name: str) -> str:
    return next(value for key, value in COLOURS.items() if name.startswith(key))


def draw_scan(result: GpuResult, path: Path) -> None:
    """Time per token of the scan over length, batch 1, widest model."""
    lines = [x for x in result["kernels"] if x["batch"] == 1 and x["d_inner"] == 5120]
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
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


def draw_prefill(result: GpuResult, path: Path) -> None:
    """Prefills relative to mamba-ssm's fused block: those of ``DRAWN``."""
    lines = [x for x in result["prefill"] if "mamba-ssm fused" in x["times"]]
    names = [name for name in DRAWN if any(name in line["times"] for line in lines)]
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        there = [(x, line) for x, line in enumerate(lines) if name in line["times"]]
        axes.bar(
            [x + (index - len(names) / 2 + 0.5) * width for x, _ in there],
            [x["times"]["mamba-ssm fused"]["ms"] / x["times"][name]["ms"] for _, x in there],
            width,
            label=name,
            color=colour(name),
            alpha=DRAWN[name],
        )
    axes.axhline(1, color=COLOURS["mamba-ssm"], linewidth=1)
    axes.set_xticks(
        range(len(lines)), [f"{x['shape']}\n{x['batch']} x {x['length']}" for x in lines], size=8
    )
    axes.set_ylabel("times as fast as\nmamba-ssm's fused block")
    axes.set_title(f"bf16, random weights, {result['gpu']}, {result['date']}", size=9)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def kernel_table(measured: list[KernelLine]) -> list[str]:
    """Nanoseconds per token, by width and length."""
    names = list(dict.fromkeys(name for line in measured for name in line["times"]))
    lines = [row(["d_inner", "tokens", *names]), row(["---"] * (2 + len(names)))]
    for line in measured:
        tokens = line["batch"] * line["length"]
        times = [line["times"].get(name) for name in names]
        lines.append(
            row(
                [str(line["d_inner"]), f"{line['batch']} × {line['length']}"]
                + [f"{1e6 * t['ms'] / tokens:.0f}" if t else "" for t in times]
            )
        )
    return lines


def prefill_table(lines: list[PrefillLine]) -> list[str]:
    """Milliseconds, speed relative to each peer, limits, memory, clocks and power."""
    peers = ["transformers", "mamba-ssm fused", "mamba-ssm with states", "simba dense"]
    watched = ["mhz", "watts"] if any("clocks" in line for line in lines) else []
    titles = ["model, prompt", "", "ms", *(f"× {name}" for name in peers), "limit, ms", "MiB"]
    bare = any("peak_mib_without_states" in line for line in lines)
    titles += ["without states"] * bare + watched
    out = [row(titles), row(["---"] * len(titles))]
    for line in lines:
        first = f"{line['shape']}, {line['batch']} × {line['length']}"
        for name, times in line["times"].items():
            bound = line["limit_ms"].get(name)
            seen = line.get("clocks", {}).get(name, {})
            peak = line["peak_mib"].get(name)
            stateless = line.get("peak_mib_without_states", {}).get(name)
            ratios = [line["times"][p]["ms"] / times["ms"] if p in line["times"] else None
                      for p in peers]  # fmt: skip
            out.append(
                row(
                    [first, name, f"{times['ms']:.1f}"]
                    + ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                    + [f"{bound:.1f}" if bound else "", "" if peak is None else f"{peak:.0f}"]
                    + ["" if stateless is None else f"{stateless:.0f}"] * bare
                    + [f"{seen[kind]:.0f}" if kind in seen else "" for kind in watched]
                )
            )
            first = ""
    return out


def crossover_table(measured: list[CrossoverLine]) -> list[str]:
    """Milliseconds of short prompts: dense, pruned, and cut to the FLOPs of pruning."""
    titles = ["model", "tokens", "dense, ms", "final_keep=0.1, ms", "×", "its cut, ms", "×"]
    out = [row(titles), row(["---"] * len(titles))]
    for line in measured:
        dense = line["times"]["simba dense"]["ms"]
        cells = [line["shape"], str(line["length"]), f"{dense:.2f}"]
        for name in ("simba 0.1", CUT):  # earlier files lack the cut
            times = line["times"].get(name)
            cells += [f"{times['ms']:.2f}", f"{dense / times['ms']:.2f}"] if times else ["", ""]
        out.append(row(cells))
    return out


def print_tables(result: GpuResult) -> None:
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    print(f"\n{result['gpu']}, {result['date']}, commit {result['commit']}, {versions}")
    if "kernels" in result:
        print("\nNanoseconds per token\n")
        print("\n".join(kernel_table(result["kernels"])))
    for name, lines in (("prefill", result.get("prefill")), ("families", result.get("families"))):
        if lines is not None:
            print(f"\n{name}\n")
            print("\n".join(prefill_table(lines)))
    if "crossover" in result:
        print("\ncrossover\n")
        print("\n".join(crossover_table(result["crossover"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("json", type=Path, help="a file of gpu.py")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    args = parser.parse_args()
    result: GpuResult = json.loads(args.json.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("kernels", draw_scan), ("prefill", draw_prefill)):
        if name in result:
            path = args.out / f"gpu-{name}.png"
            draw(result, path)
            print(path)
    print_tables(result)


if __name__ == "__main__":
    main()
