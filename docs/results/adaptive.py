"""Does the concentration of a prompt's influence tell how many of its tokens must be kept?

    python docs/results/adaptive.py MODEL HELDOUT  # a few minutes on a CPU, for a small model

Every prompt is pruned at final_keep 0.05 and at 0.2, and its cost is the loss of the 100 tokens
behind it, over dense. A rule that looks at the prompt gives half of the prompts the lower ratio:
those of which the fewest tokens hold a share of all influence, in the first layer or in the mean
over layers, as a dense forward has it. It is worth something if it costs less than the same ratios
given at random, whose mean is printed. "best" knows the losses.

HELDOUT are JSON lines; 95 % bootstrap intervals are over documents.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import simba
from simba.evaluate.intervals import bootstrap
from simba.evaluate.texts import read_texts, tokenize

CONTEXT, SNIPPET, PLACES = 1024, 100, 6
KEEPS = (0.05, 0.1, 0.2)
SHARES = (0.5, 0.8, 0.9, 0.95)


def losses(model: torch.nn.Module, rows: Tensor, keep: float) -> Tensor:
    """(prompts,): nats a token behind the prompts."""
    simba.sparsify(model, keep, dense_path="simba")
    found = []
    for part in rows.split(8):
        logits = model(part, prompt_length=CONTEXT).logits[:, -SNIPPET - 1 : -1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), part[:, -SNIPPET:], reduction="none"
        )
        found.append(each.mean(1))
    return torch.cat(found)


def tokens_that_hold(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """(shares, layers, prompts): the fewest tokens that hold each share of a layer's influence."""
    simba.sparsify(model, 1.0, dense_path="simba")
    found = []
    for row in rows[:, :CONTEXT].split(1):
        with simba.record(model) as recording:
            model(row)
        scores = torch.cat(recording.scores).nan_to_num(0)  # (layers, tokens)
        held = scores.sort(-1, descending=True).values.cumsum(-1) / scores.sum(-1, keepdim=True)
        found.append(torch.stack([(held < share).sum(-1) + 1 for share in SHARES]))
    return torch.stack(found, -1).double()


def shown(values: Tensor, places: int) -> str:
    documents: Sequence[float] = values.view(-1, places).mean(1).tolist()
    found = bootstrap(documents)
    return f"{found.estimate:.4f} ({found.low:.4f} to {found.high:.4f})"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("heldout", type=Path)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    rows = []
    for document in tokenize(read_texts([given.heldout]), tokenizer):
        step = (len(document.ids) - CONTEXT - SNIPPET) // PLACES
        rows += [document.ids[i * step :][: CONTEXT + SNIPPET] for i in range(PLACES)]
    batch = torch.stack([torch.as_tensor(row) for row in rows])
    dense = losses(model, batch, 1.0)
    low, fixed, high = (losses(model, batch, keep) - dense for keep in KEEPS)
    held = tokens_that_hold(model, batch)
    half = len(batch) // 2

    def mixed(order: Tensor) -> Tensor:
        lower = torch.zeros(len(batch), dtype=torch.bool)
        lower[order[:half]] = True
        return torch.where(lower, low, high)

    print("| ratios | tokens | text, over dense |\n| --- | --- | --- |")
    for keep, cost in zip(KEEPS, (low, fixed, high), strict=True):
        print(f"| {keep} | | {shown(cost, PLACES)} |")
    print(f"| 0.05 or 0.2 at random | | {shown((low + high) / 2, PLACES)} |")
    for share, by_layer in zip(SHARES, held, strict=True):
        for name, tokens in (("first layer", by_layer[0]), ("all layers", by_layer.mean(0))):
            cost = shown(mixed(tokens.argsort()), PLACES)
            number = statistics.fmean(tokens.tolist())
            print(
                f"| 0.05 or 0.2 by {share:.0%} of the influence, {name} | {number:.0f} | {cost} |"
            )
    print(f"| 0.05 or 0.2, best | | {shown(mixed((low - high).argsort()), PLACES)} |")


if __name__ == "__main__":
    main()
