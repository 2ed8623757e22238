"""Peak memory of prefills on a CPU by prompt length, at once and in chunks. One command:

    python benchmarks/chunk_memory.py [--lengths 8192 65536] [--chunk-sizes 2048 0 -1] [--keep 0.1]

The embedded model, random tokens, one row, the last token's logits and a cache. Each prefill runs
in a process of its own, whose peak (VmHWM, Linux) contains Python and PyTorch themselves. A chunk
size of 0 is a prefill at once. One of -1 is the cut: the dense model, at once, on the last tokens
of the prompt, as many as the FLOPs of pruning at once pay for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from prefill import resident

MODEL = Path(__file__).parents[1] / "assets" / "demo-model"
CUT = -1
"""The chunk size that stands for a cut prompt."""


def serve(keep: float, prefills: list[tuple[int, int]]) -> None:
    """Run in a process of its own: prefill, and print the peak in bytes after each prefill."""
    import torch
    from transformers import AutoModelForCausalLM

    import simba
    from simba.evaluate import cut_length

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    for length, chunk_size in prefills:
        size = chunk_size if chunk_size > 0 else None
        simba.sparsify(model, keep, chunk_size=size, dense_path="simba")
        ids = torch.randint(100, (1, length))
        if chunk_size == CUT:
            ids = ids[:, -cut_length(model, length) :]
            simba.sparsify(model, 1.0, dense_path="simba")
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        print(resident("VmHWM"))


def peaks(keep: float, *prefills: tuple[int, int]) -> list[int]:
    """Bytes at the peak of one new process after each of its prefills.

    Args:
        keep: ``final_keep``.
        prefills: length and chunk size (or :data:`CUT`) of each. A peak says nothing of a
            prefill that takes less memory than one before it.
    """
    command = [sys.executable, __file__, "--keep", str(keep), "--serve"]
    command += [str(value) for prefill in prefills for value in prefill]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(line) for line in said.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[2048, 0, CUT])
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--serve", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        lengths, chunk_sizes = options.serve[::2], options.serve[1::2]
        serve(options.keep, list(zip(lengths, chunk_sizes, strict=True)))
        return
    for chunk_size in options.chunk_sizes:
        how = {0: "at once", CUT: "cut"}.get(chunk_size, f"chunks of {chunk_size}")
        for length in options.lengths:
            (peak,) = peaks(options.keep, (length, chunk_size))
            mebibytes = peak / 2**20
            print(f"{how:>16}, {length:>8} tokens: {mebibytes:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
