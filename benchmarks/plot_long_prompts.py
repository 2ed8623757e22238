"""Draw the figure of a file of ``long_prompts.py``, and print its tables in Markdown:

python benchmarks/plot_long_prompts.py benchmarks/h200-long.json --out docs/images/gpu-long.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from gpu_prefills import CUT
from long_summary import WHOLE, in_chunks, summary
from plot_gpu import COLOURS, row
from results import FirstTokenLine, LongCell, LongLine, LongResult

DENSE, SPARSE = WHOLE
STYLES = {  # colour, line, label
    DENSE: (COLOURS["simba"], "o-", "simba, dense"),
    in_chunks(DENSE): (COLOURS["simba"], "o:", "simba, dense, in chunks"),
    SPARSE: ("#3a9d5d", "s-", "simba, final_keep=0.1"),
    in_chunks(SPARSE): ("#3a9d5d", "s:", "simba, final_keep=0.1, in chunks"),
    CUT: ("#e09f3e", "^--", "simba, dense, prompt cut to the FLOPs of 0.1"),
    "transformers": (COLOURS["transformers"], "v-", "transformers"),
    "mamba-ssm with states": (COLOURS["mamba-ssm"], "d-", "mamba-ssm"),
}


def lines_of(result: LongResult, shape: str) -> list[LongLine]:
    """A model's lines, the shortest prompts first."""
    lines = [line for line in result["prefills"] if line["shape"] == shape]
    return sorted(lines, key=lambda line: line["length"])


def shapes(result: LongResult) -> list[str]:
    return list(dict.fromkeys(line["shape"] for line in result["prefills"]))


def speed(cell: LongCell) -> float | None:
    """Tokens of the whole prompt a second."""
    return cell.get("tokens_per_second")


def memory(cell: LongCell) -> float | None:
    """Peak memory with the weights, GiB."""
    return cell["memory"]["peak_mib"] / 1024 if "memory" in cell else None


def draw(result: LongResult, path: Path) -> None:
    """Tokens a second and peak memory by the prompt's length, a column for each model.

    Raises:
        ValueError: the file holds no prefills, or prefills with different chunk sizes.
    """
    sizes = {line["chunk_size"] for line in result["prefills"]}
    if len(sizes) != 1:
        raise ValueError(f"one figure takes prefills of one chunk size, and found {sorted(sizes)}")
    names = shapes(result)
    figure = Figure(figsize=(4.8 * len(names) + 0.4, 6.4))
    panels = figure.subplots(2, len(names), squeeze=False)
    for column, shape in enumerate(names):
        lines = lines_of(result, shape)
        for axes, value in zip(panels[:, column], (speed, memory), strict=True):
            for name, (colour, style, label) in STYLES.items():
                cells = [(x["length"], x["variants"].get(name, {})) for x in lines]
                points = [(length, value(cell)) for length, cell in cells]
                there = [(length, y) for length, y in points if y is not None]
                if there:
                    axes.plot(*zip(*there, strict=True), style, color=colour, label=label, ms=4)
            axes.set(xscale="log", xlabel="tokens of the prompt")
            axes.set_xticks([x["length"] for x in lines], [thousands(x["length"]) for x in lines])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        panels[0, column].set_title(f"Mamba {shape}", size=10)
        panels[0, column].set(ylabel="tokens a second", ylim=(0, None))
        panels[0, column].yaxis.set_major_formatter("{x:,.0f}")
        panels[1, column].set_ylabel("peak memory, GiB")
        panels[1, column].set_yscale("log", base=2)
        panels[1, column].yaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=8)
    gpus = ", ".join(dict.fromkeys(f"{run['gpu']}, {run['date']}" for run in result["runs"]))
    figure.suptitle(f"batch 1, bfloat16, chunks of {sizes.pop()} tokens; {gpus}", size=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def thousands(tokens: int) -> str:
    """8192 as 8k, 1048576 as 1M; others in full."""
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def prefill_table(lines: list[LongLine]) -> list[str]:
    """Times, speed and memory of all variants; the last column says what is missing, and why."""
    titles = ["model, tokens", "", "ms", "tokens/s", "peak MiB", "above the weights", "reserved"]
    out = [row([*titles, "rounds", "run", ""]), row(["---"] * (len(titles) + 3))]
    for line in lines:
        first = f"{line['shape']}, {line['length']}"
        for name in STYLES:
            cell = line["variants"].get(name)
            if cell is None:
                continue
            timed = ["", ""]
            if "times" in cell:
                timed = [f"{cell['times']['ms']:.1f}", f"{cell['tokens_per_second']:.0f}"]
            sizes = ["", "", ""]
            if "memory" in cell:
                found = cell["memory"]
                mib = (found["peak_mib"], found["above_mib"], found["reserved_mib"])
                sizes = [f"{size:.0f}" for size in mib]
            title = f"{name} of {line['chunk_size']}" if name.endswith("chunks") else name
            rounds = str(cell["rounds"]) if "rounds" in cell else ""
            run = str(cell["run"])
            out.append(row([first, title, *timed, *sizes, rounds, run, cell.get("missing", "")]))
            first = ""
    return out


def first_token_table(lines: list[FirstTokenLine]) -> list[str]:
    """Milliseconds to the first token, cold and warm."""
    ways = list(dict.fromkeys(way for line in lines for way in line["warm"]))
    heads = ["model", "", "document + question", "cold, ms"]
    for way in ways:
        heads += [f"{way}, ms", "share"]
    out = [row(heads), row(["---"] * len(heads))]
    for line in lines:
        cold = line["cold"]["ms"]
        tokens = f"{line['document']} + {line['question']}"
        cells = [line["shape"], line["variant"], tokens, f"{cold:.1f}"]
        for way in ways:
            warm = line["warm"].get(way)
            share = ["", ""] if warm is None else [f"{warm['ms']:.1f}", f"{warm['ms'] / cold:.1%}"]
            cells += share
        out.append(row(cells))
    return out


def short_table(result: LongResult, what: str) -> list[str]:
    """Milliseconds ("ms") or peak memory in MiB ("peak"), a column for each model and length."""
    lines = [line for shape in shapes(result) for line in lines_of(result, shape)]
    names = [f"{line['shape']}, {thousands(line['length'])}" for line in lines]
    rows = [row([what, *names]), row(["---"] * (1 + len(names)))]
    for name, (_, _, label) in STYLES.items():
        cells = [_number(line["variants"].get(name, LongCell()), what) for line in lines]
        rows.append(row([label, *cells]))
    return rows


def _number(cell: LongCell, what: str) -> str:
    if what == "ms":
        value = cell["times"]["ms"] if "times" in cell else None
    else:
        value = cell["memory"]["peak_mib"] if "memory" in cell else None
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def print_tables(result: LongResult) -> None:
    for number, run in enumerate(result["runs"]):
        versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v)
        print(f"run {number}: {run['gpu']}, {run['date']}, commit {run['commit']}, {versions}")
    if result["prefills"]:
        lines = [line for shape in shapes(result) for line in lines_of(result, shape)]
        print("\n" + "\n".join(prefill_table(lines)))
    if result["first_token"]:
        print("\n" + "\n".join(first_token_table(result["first_token"])))
    print("\n" + "\n".join(summary(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("json", type=Path, help="a file of long_prompts.py")
    parser.add_argument("--short", action="store_true", help="the tables of docs/performance.md")
    parser.add_argument("--out", type=Path, help="draw the figure here (PNG)")
    args = parser.parse_args()
    result: LongResult = json.loads(args.json.read_text())
    if args.out is not None:
        draw(result, args.out)
        print(args.out)
    if args.short:
        tables = [short_table(result, "ms"), short_table(result, "peak MiB")]
        print("\n\n".join("\n".join(table) for table in tables))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
