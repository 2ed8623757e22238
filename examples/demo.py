"""What simba does to the embedded model on the embedded text: `make demo`.

Prints the schedule and its FLOPs, the perplexity of the dense model, of the pruned model and of the
dense model on a prompt that is cut to the same FLOPs, prefill times, and a continuation, and draws
which tokens survive.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

# Threads that spin while they wait take ten times as long where other programs use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import simba
from simba.evaluate import cut_length, snippet_loss, windows
from simba.plots import trapezoid

ROOT = Path(__file__).resolve().parent.parent
SNIPPET = 100


class Quality(TypedDict):
    """How well one setting predicts the snippets."""

    criterion: str
    """Of the pruned model; "dense"; or "prompt cut": dense on the last tokens of the prompt."""
    final_keep: float
    """Of a cut, the one whose FLOPs it may spend."""
    prompt_tokens: int
    """How many the model reads."""
    flops: float
    """Of the prompt, as a share of the dense model's."""
    losses: tuple[float, ...]
    """Of each snippet, nats a token."""
    perplexity: float
    nats_over_dense: float
    standard_error: float


class Verdict(TypedDict):
    """Pruning by influence against the cut of the same FLOPs, paired by snippet."""

    final_keep: float
    pruned_minus_cut: float
    """Nats a token: positive where the cut is better."""
    standard_error: float


def perplexities(model: nn.Module, batch: Tensor, console: Console) -> list[Quality]:
    """Quality and FLOPs: dense, pruned, and the prompt cut to the same FLOPs.

    Pruned: by influence to several keep ratios, and by other criteria to the lowest of them. Cut:
    the dense model on the last tokens of the prompt, as many as the pruned model's FLOPs pay for.
    """
    context = batch.shape[1] - SNIPPET
    settings: list[tuple[str, float, dict[str, Any], bool]] = [
        ("dense", 1.0, {"dense_path": "simba"}, False),
        ("influence", 0.5, {}, False),
        ("prompt cut", 0.5, {}, True),
        ("influence", 0.3, {}, False),
        ("prompt cut", 0.3, {}, True),
        ("influence", 0.1, {}, False),
        ("prompt cut", 0.1, {}, True),
        ("recency", 0.1, {"criterion": "recency"}, False),
        ("uniform", 0.1, {"criterion": "uniform"}, False),
        ("random", 0.1, {"criterion": "random"}, False),
    ]
    results: list[Quality] = []
    for name, final_keep, options, cut in track(settings, "perplexity", console=console):
        simba.sparsify(model, final_keep, **options)
        flops = simba.flops(model, context)
        length = context
        if cut:
            length = cut_to_flops(model, final_keep, context)
            flops = simba.flops(model, context)
        loss = snippet_loss(model, batch, SNIPPET, batch_size=2)
        dense = results[0]["losses"] if results else loss.per_snippet
        differences = [a - b for a, b in zip(loss.per_snippet, dense, strict=True)]
        results.append(
            {
                "criterion": name,
                "final_keep": final_keep,
                "prompt_tokens": length,
                "flops": flops.ratio,
                "losses": loss.per_snippet,
                "perplexity": loss.perplexity,
                "nats_over_dense": statistics.fmean(differences),
                "standard_error": standard_error(differences),
            }
        )
    return results


def cut_to_flops(model: nn.Module, final_keep: float, context: int) -> int:
    """Let the dense model read the end of the prompt: as many tokens as cost what pruning costs.

    Returns:
        How many of the prompt's tokens that are.
    """
    simba.sparsify(model, final_keep)
    length = cut_length(model, context)
    simba.sparsify(model, length / context, schedule="cut", dense_path="simba")
    return length


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def verdicts(quality: list[Quality]) -> list[Verdict]:
    """What pruning by influence loses, or gains, against each cut."""
    rows = {(row["criterion"], row["final_keep"]): row for row in quality}
    results: list[Verdict] = []
    for (name, final_keep), cut in rows.items():
        if name == "prompt cut":
            losses = zip(rows["influence", final_keep]["losses"], cut["losses"], strict=True)
            differences = [pruned - other for pruned, other in losses]
            results.append(
                {
                    "final_keep": final_keep,
                    "pruned_minus_cut": statistics.fmean(differences),
                    "standard_error": standard_error(differences),
                }
            )
    return results


def in_words(verdict: Verdict) -> str:
    """Which of the two is better here: a difference counts beyond two standard errors."""
    difference, error = verdict["pruned_minus_cut"], verdict["standard_error"]
    if abs(difference) <= 2 * error:
        which = "no difference"
    else:
        which = "the cut is better" if difference > 0 else "pruning is better"
    return f"final_keep={verdict['final_keep']:g}: {which} ({difference:+.4f} ± {error:.4f})"


class Speed(TypedDict):
    """Seconds of one variant's prefills: the median, the fastest and the slowest."""

    what: str
    seconds: float
    fastest: float
    slowest: float


def prefill_times(model: nn.Module, ids: Tensor, console: Console, repeats: int) -> list[Speed]:
    """Seconds until the first token. The variants take turns, so that a busy machine slows all of
    them alike; the first round, which allocates memory, does not count."""
    variants: dict[str, Callable[[], object]] = {
        "transformers": lambda: simba.desparsify(model),
        "simba, dense": lambda: simba.sparsify(model, 1.0, dense_path="simba"),
        "simba, final_keep=0.3": lambda: simba.sparsify(model, 0.3),
        "prompt cut to the FLOPs of 0.3": lambda: cut_to_flops(model, 0.3, ids.shape[1]),
        "simba, final_keep=0.1": lambda: simba.sparsify(model, 0.1),
        "prompt cut to the FLOPs of 0.1": lambda: cut_to_flops(model, 0.1, ids.shape[1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in track(range(repeats + 1), "prefill time", console=console):
        for name, switch_to in variants.items():
            switch_to()
            start = time.perf_counter()
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "what": name,
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
        }
        for name, times in seconds.items()
    ]


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    result = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo-model"))
    parser.add_argument("--text", type=Path, default=ROOT / "assets" / "persuasion.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--snippets", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5, help="of each timing")
    parser.add_argument("--tokens", type=int, default=60, help="to generate")
    args = parser.parse_args()
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    console.print(
        f"Model {args.model} ({model.num_parameters() / 1e6:.1f} M parameters), "
        f"text {args.text} ({len(ids)} tokens), {torch.get_num_threads()} threads\n"
    )

    simba.sparsify(model, final_keep=0.1)
    console.print(str(simba.summary(model, args.context)) + "\n", highlight=False)

    batch = windows(ids, args.context, SNIPPET, args.snippets)
    quality = perplexities(model, batch, console)
    console.print(
        table(
            f"Perplexity of {len(batch)} held-out snippets of {SNIPPET} tokens after prompts of "
            f"{args.context}, and nats a token over dense (± s.e.)",
            ["rule", "final_keep", "prompt", "FLOPs", "perplexity", "nats over dense"],
            [
                [
                    row["criterion"],
                    f"{row['final_keep']:g}",
                    str(row["prompt_tokens"]),
                    f"{row['flops']:.1%}",
                    f"{row['perplexity']:.2f}",
                    f"{row['nats_over_dense']:+.4f} ± {row['standard_error']:.4f}",
                ]
                for row in quality
            ],
        )
    )
    compared = verdicts(quality)
    console.print(
        "'prompt cut' is the dense model on the last tokens of the prompt: as many as the",
        "FLOPs of the row above pay for. 'recency' drops the oldest tokens in each layer.",
        "Which is better here? (pruned by influence minus cut, nats a token)",
        *(f"  {in_words(verdict)}" for verdict in compared),
        "Perplexity hardly asks for tokens from far back, so a cut prompt does well on it.",
        "Where a task needs such tokens, measure both: see docs/choosing.md.\n",
        sep="\n",
        highlight=False,
    )

    prompt = batch[:1, : args.context]
    speed = prefill_times(model, prompt, console, args.repeats)
    console.print(
        table(
            f"Prefill of {args.context} tokens (median of {args.repeats}, taking turns)",
            ["", "seconds", "fastest to slowest", "× transformers", "× our dense"],
            [
                [
                    row["what"],
                    f"{row['seconds']:.3f}",
                    f"{row['fastest']:.3f} to {row['slowest']:.3f}",
                    f"{speed[0]['seconds'] / row['seconds']:.2f}",
                    f"{speed[1]['seconds'] / row['seconds']:.2f}",
                ]
                for row in speed
            ],
        )
    )

    console.print("\nGreedy continuation of the text:", tokenizer.decode(prompt[0, -40:]), "...")
    settings: dict[str, Callable[[], object]] = {
        "dense": lambda: simba.sparsify(model, 1.0),
        "final_keep=0.1": lambda: simba.sparsify(model, 0.1),
        "prompt cut to the same FLOPs": lambda: cut_to_flops(model, 0.1, args.context),
    }
    for name, switch_to in settings.items():
        switch_to()
        with torch.no_grad(), console.status(f"generating, {name}"):
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=args.tokens,
                do_sample=False,
            )
        words = tokenizer.decode(out[0, args.context :])
        console.print(f"\n[bold]{name}:[/bold]", words, highlight=False)

    simba.sparsify(model, 0.1)
    with torch.no_grad(), simba.record(model) as run:
        model(prompt)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "trapezoid.png"
    trapezoid(run, [tokenizer.decode([token]) for token in prompt[0].tolist()]).savefig(picture)
    report = {
        "command": "python examples/demo.py",
        "context": args.context,
        "snippet": SNIPPET,
        "snippets": len(batch),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "simba": simba.__version__,
        "quality": quality,
        "pruned_minus_cut": compared,
        "speed": speed,
    }
    (args.out / "demo.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(
        f"\nThe picture of what survived: {picture}\nAll numbers: {args.out / 'demo.json'}\n"
        "\nNext, your own model in two lines:\n"
        '    model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")\n'
        "    simba.sparsify(model, final_keep=0.1)\n"
        "Then see docs/choosing.md. Speed in detail: python benchmarks/prefill.py",
        highlight=False,
    )


if __name__ == "__main__":
    main()
