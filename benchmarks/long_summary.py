"""What a file of ``long_prompts.py`` adds up to: what chunks cost, and whether memory is flat."""

from __future__ import annotations

from results import LongLine, LongResult

WHOLE = ("simba dense", "simba 0.1")
"""Variants that are measured as a whole and in chunks."""


def in_chunks(variant: str) -> str:
    """The name of the same variant with a chunked prefill."""
    return f"{variant}, chunks"


def overhead(line: LongLine, variant: str) -> float | None:
    """How many times as long a prefill takes in chunks; None if not both were timed in one run."""
    whole = line["variants"].get(variant, {})
    chunked = line["variants"].get(in_chunks(variant), {})
    if "times" not in whole or "times" not in chunked or whole["run"] != chunked["run"]:
        return None
    return chunked["times"]["ms"] / whole["times"]["ms"]


def flatness(lines: list[LongLine], variant: str) -> dict[str, float]:
    """The largest over the smallest memory of all lengths: ``peak`` and ``above`` the weights.

    Empty if fewer than two lengths were measured.
    """
    memories = [line["variants"][variant]["memory"] for line in measured(lines, variant)]
    if len(memories) < 2:
        return {}
    peaks = [memory["peak_mib"] for memory in memories]
    above = [memory["above_mib"] for memory in memories]
    return {"peak": max(peaks) / min(peaks), "above": max(above) / min(above)}


def measured(lines: list[LongLine], variant: str) -> list[LongLine]:
    """The lines in which this variant's memory was measured."""
    return [line for line in lines if "memory" in line["variants"].get(variant, {})]


def summary(result: LongResult) -> list[str]:
    """Lines of text: overheads, flatness, times to the first token."""
    found = []
    for line in result["prefills"]:
        for variant in WHOLE:
            ratio = overhead(line, variant)
            if ratio is not None:
                found.append(
                    f"{line['shape']}, {line['length']} tokens, {variant}: chunks of "
                    f"{line['chunk_size']} take {ratio:.3f} x the time of the whole prompt"
                )
    kinds = dict.fromkeys((line["shape"], line["chunk_size"]) for line in result["prefills"])
    for kind in kinds:
        lines = [x for x in result["prefills"] if (x["shape"], x["chunk_size"]) == kind]
        for variant in map(in_chunks, WHOLE):
            flat = flatness(lines, variant)
            if flat:
                lengths = [line["length"] for line in measured(lines, variant)]
                found.append(
                    f"{kind[0]}, {min(lengths)} to {max(lengths)} tokens, {variant} of {kind[1]}: "
                    f"peak memory, largest over smallest {flat['peak']:.3f}, above the weights "
                    f"{flat['above']:.3f}"
                )
    for first in result["first_token"]:
        cold = first["cold"]["ms"]
        for way, warm in first["warm"].items():
            found.append(
                f"{first['shape']}, {first['document']} + {first['question']} tokens, "
                f"{first['variant']}: first token after {cold:.1f} ms, with {way} after "
                f"{warm['ms']:.1f} ms ({warm['ms'] / cold:.1%})"
            )
    return found
