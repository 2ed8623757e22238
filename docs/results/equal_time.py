"""For which values of final_keep do the cuts of the paper's rule take as long as other rules?

    python docs/results/equal_time.py MODEL LIVE

LIVE is a file of benchmarks/live_tokens.py, which says how much of a prompt the dense model reads
in the time of each rule. simba's evaluations cut a prompt to the FLOPs of a pruned one, so the
answer is printed as values for their option --keep, with the criterion "influence". `beyond.py
equal` looks for the cuts by what they read. One value serves shares that are nearly the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from beyond import timed
from torch import nn
from transformers import AutoModelForCausalLM

import simba
from simba.evaluate import cut_length

LENGTH, DIGITS = 2048, 4
NEAR = 0.01
"""Shares of the prompt that differ by less have one cut."""


def keep_of(model: nn.Module, share: float) -> float:
    """The final_keep of the paper's rule whose FLOPs pay for this share of a prompt."""
    low, high = 10**-DIGITS, 1.0
    while high - low > 0.1**DIGITS:
        middle = (low + high) / 2
        simba.sparsify(model, middle)
        less = cut_length(model, LENGTH) < share * LENGTH
        low, high = (middle, high) if less else (low, middle)
    return round(high, DIGITS)


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    shares: list[float] = []
    for share in sorted(times["cut of the same time"] for _, _, times in timed(Path(sys.argv[2]))):
        if not shares or share - shares[-1] >= NEAR:
            shares.append(share + NEAR / 2)
    print(",".join(f"{keep_of(model, share):g}" for share in shares))
