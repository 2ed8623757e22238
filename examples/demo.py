"""What pruning finds and forgets, costs and saves, on the embedded model and text: `make demo`.

Facts are told at random places of prompts of real text, and asked for at their ends. For the dense
model, for presets, and for the dense model on a prompt that is cut to the FLOPs of each preset, the
table says how many facts are found, what ordinary text costs, and how long a prefill takes. The
pictures show which tokens survive of one such prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, TypedDict

# Threads that spin while they wait take ten times as long where other programs use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import simba
from simba.evaluate import Document, Rows, cut_length, snippet_loss, windows
from simba.evaluate.prose import prose_in_text
from simba.evaluate.trained import answers
from simba.plots import trapezoid
from simba.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PRESETS_SHOWN = ("paper", "recall", "fast")
SNIPPET = 100
EARLY = 0.4
"""A fact counts as told early in this first part of a prompt."""


class Setting(TypedDict):
    """One way to read a prompt."""

    name: str
    options: dict[str, Any]
    """Of `simba.sparsify`."""
    prompt_tokens: int
    """How many the model reads."""
    rival: str | None
    """Of a cut: the name of the setting whose FLOPs it may spend."""


class Result(Setting):
    """What was measured of it."""

    flops: float
    """Of the prompt, as a share of the dense model's."""
    found: tuple[float, ...]
    """Of each prompt with a fact: the share of the answer's tokens that is right."""
    answer: str
    """To the question whose fact is told first."""
    losses: tuple[float, ...]
    """Of each snippet of ordinary text, nats a token."""
    perplexity: float
    nats_over_dense: float
    standard_error: float


class Verdict(TypedDict):
    """Pruning against the cut of the same FLOPs, paired by prompt and by snippet."""

    name: str
    found_early: tuple[int, int]
    """How many of the facts that are told early: pruned, cut."""
    early: int
    """How many there are."""
    pruned_minus_cut: float
    """Nats a token on ordinary text: positive where the cut is better."""
    standard_error: float


class Speed(TypedDict):
    """Seconds of one setting's prefills: the median, the fastest and the slowest."""

    name: str
    seconds: float
    fastest: float
    slowest: float


def settings_of(model: nn.Module, context: int, more: bool) -> list[Setting]:
    """The dense model, presets, and with ``more`` other rules, each with its cut behind it."""
    pruned: dict[str, dict[str, Any]] = {
        f"preset {name}": {"preset": name} for name in PRESETS_SHOWN
    }
    if more:
        pruned["final_keep=0.5"] = {"final_keep": 0.5}
        pruned |= {name: {"criterion": name} for name in ("recency", "uniform", "random")}
    dense: dict[str, Any] = {"dense_path": "simba"}
    settings: list[Setting] = [
        {
            "name": "dense",
            "options": {"final_keep": 1.0, **dense},
            "prompt_tokens": context,
            "rival": None,
        }
    ]
    for name, options in pruned.items():
        simba.sparsify(model, **options)
        length = cut_length(model, context)
        cut = {"final_keep": length / context, "schedule": "cut", **dense}
        settings += [
            {"name": name, "options": options, "prompt_tokens": context, "rival": None},
            {"name": "prompt cut", "options": cut, "prompt_tokens": length, "rival": name},
        ]
    return settings


def measured(
    model: nn.Module,
    settings: list[Setting],
    facts: Rows,
    shown: int,
    tokenizer: Any,
    snippets: Tensor,
    console: Console,
) -> list[Result]:
    """Facts found, loss on ordinary text, and FLOPs.

    Args:
        model: the model; it is left with the last setting.
        settings: the dense one first.
        facts: prompts with facts.
        shown: the index of the one whose answer is to be seen.
        tokenizer: the model's.
        snippets: (snippets, context + SNIPPET) int64.
        console: for the progress.
    """
    results: list[Result] = []
    for setting in track(settings, "facts and text", console=console):
        simba.sparsify(model, **setting["options"])
        found, _ = answers(model, facts, 4)
        prompt = facts.ids[shown : shown + 1, : facts.prompt]
        with torch.no_grad():
            said = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(facts.targets),
                do_sample=False,
            )
        loss = snippet_loss(model, snippets, SNIPPET, batch_size=2)
        dense = results[0]["losses"] if results else loss.per_snippet
        over = [a - b for a, b in zip(loss.per_snippet, dense, strict=True)]
        results.append(
            {
                **setting,
                "flops": simba.flops(model, facts.prompt).ratio,
                "found": tuple(found.tolist()),
                "answer": tokenizer.decode(said[0, facts.prompt :]).strip(),
                "losses": loss.per_snippet,
                "perplexity": loss.perplexity,
                "nats_over_dense": statistics.fmean(over),
                "standard_error": standard_error(over),
            }
        )
    return results


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def count(result: Result, chosen: list[bool]) -> int:
    """How many of the chosen prompts are answered in full."""
    return sum(found == 1 for found, here in zip(result["found"], chosen, strict=True) if here)


def verdicts(results: list[Result], early: list[bool]) -> list[Verdict]:
    """What each rule loses, or gains, against the cut of its FLOPs."""
    by_name = {result["name"]: result for result in results}
    compared: list[Verdict] = []
    for cut in results:
        if cut["rival"] is not None:
            pruned = by_name[cut["rival"]]
            over = [a - b for a, b in zip(pruned["losses"], cut["losses"], strict=True)]
            compared.append(
                {
                    "name": pruned["name"],
                    "found_early": (count(pruned, early), count(cut, early)),
                    "early": sum(early),
                    "pruned_minus_cut": statistics.fmean(over),
                    "standard_error": standard_error(over),
                }
            )
    return compared


def in_words(verdict: Verdict) -> str:
    """Which of the two is better here; on text a difference counts beyond two standard errors."""
    pruned, cut = verdict["found_early"]
    difference, error = verdict["pruned_minus_cut"], verdict["standard_error"]
    if abs(difference) <= 2 * error:
        text = "no difference"
    else:
        text = "the cut is better" if difference > 0 else "pruning is better"
    return (
        f"{verdict['name']}: of {verdict['early']} facts told early it finds {pruned}, the cut "
        f"{cut}; on ordinary text {text} ({difference:+.4f} ± {error:.4f} nats a token)"
    )


def prefill_times(
    model: nn.Module, settings: list[Setting], ids: Tensor, console: Console, repeats: int
) -> list[Speed]:
    """Seconds until the first token, of transformers' own forward and of all settings. They take
    turns, so that a busy machine slows all of them alike; the first round, which allocates memory,
    does not count."""
    seconds: list[list[float]] = [[] for _ in range(1 + len(settings))]
    for turn in track(range(repeats + 1), "prefill time", console=console):
        for i, times in enumerate(seconds):
            if i == 0:
                simba.desparsify(model)
            else:
                simba.sparsify(model, **settings[i - 1]["options"])
            start = time.perf_counter()
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)
            if turn > 0:
                times.append(time.perf_counter() - start)
    names = ["transformers", *(full_name(setting) for setting in settings)]
    return [
        {
            "name": name,
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
        }
        for name, times in zip(names, seconds, strict=True)
    ]


def full_name(setting: Setting) -> str:
    cut = "" if setting["rival"] is None else f" to {setting['prompt_tokens']}"
    return setting["name"] + cut


def one_line(text: str) -> str:
    return f"... {' '.join(text.split())} "


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def draw(
    model: nn.Module, setting: Setting, prompt: Tensor, needle: int, words: list[str], file: Path
) -> None:
    """Which tokens survive to which layer; a red line marks the answer in the prompt."""
    simba.sparsify(model, **setting["options"])
    with torch.no_grad(), simba.record(model) as run:
        model(prompt)
    figure = trapezoid(run, words)
    figure.axes[0].axvline(needle, color="tab:red", linewidth=1)
    figure.axes[0].set_title(f"which tokens survive to which layer: {setting['name']}")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo-model"))
    parser.add_argument("--text", type=Path, default=ROOT / "assets" / "persuasion.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--facts", type=int, default=40, help="prompts with a fact")
    parser.add_argument("--snippets", type=int, default=20, help="of ordinary text")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing")
    parser.add_argument("--more", action="store_true", help="more rules than the presets")
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
    for name in PRESETS_SHOWN:
        console.print(f"preset {name}:", dict(PRESETS[name]), highlight=False)

    facts = prose_in_text(
        "fact", [Document("", ids)], tokenizer,
        length=args.context, room=args.context, prompts=args.facts, seed=0,
    )  # fmt: skip
    assert facts.needles is not None
    places = (facts.needles[:, 0] / args.context).tolist()
    early = [place < EARLY for place in places]
    shown = places.index(min(places))  # the one that is told first
    needle = int(facts.needles[shown, 0])
    prompt = facts.ids[shown : shown + 1, : args.context]
    words = [tokenizer.decode([token]) for token in prompt[0].tolist()]
    answer = tokenizer.decode(facts.ids[shown, facts.targets]).strip()
    console.print(
        f"\nA fact, told {args.context - needle} tokens before the end of a prompt of "
        f"{args.context}, and asked for there:",
        one_line(tokenizer.decode(prompt[0, max(needle - 20, 0) : needle + 15])) + "...",
        one_line(tokenizer.decode(prompt[0, -25:])) + f"[{answer}]\n",
        sep="\n",
        highlight=False,
        markup=False,
    )

    settings = settings_of(model, args.context, args.more)
    snippets = windows(ids, args.context, SNIPPET, args.snippets)
    results = measured(model, settings, facts, shown, tokenizer, snippets, console)
    late = [not here for here in early]
    console.print(
        table(
            f"{args.facts} prompts of {args.context} tokens with a fact, {sum(early)} of them with "
            f"one in the first {EARLY:.0%}; {len(snippets)} snippets of {SNIPPET} tokens after "
            f"{args.context} of ordinary text, nats a token over dense (± s.e.)",
            ["", "FLOPs", "answers", "early", "later", "text"],
            [
                [
                    full_name(result),
                    f"{result['flops']:.1%}",
                    result["answer"],
                    f"{count(result, early)}/{sum(early)}",
                    f"{count(result, late)}/{sum(late)}",
                    f"{result['nats_over_dense']:+.4f} ± {result['standard_error']:.4f}",
                ]
                for result in results
            ],
        )
    )
    compared = verdicts(results, early)
    console.print(
        "early, later: facts found, of those told there. 'prompt cut' is the dense",
        "model on the last tokens of the prompt, as many as the FLOPs of the row above",
        "pay for: it can find what is told behind the cut, and nothing else. Such a cut",
        "is preset text. Presets recall and fast read all tokens in their first layers.",
        *(f"  {in_words(verdict)}" for verdict in compared),
        "",
        sep="\n",
        highlight=False,
    )

    speed = prefill_times(model, settings, prompt, console, args.repeats)
    console.print(
        table(
            f"Prefill of {args.context} tokens (median of {args.repeats}, taking turns)",
            ["", "seconds", "range", "× transformers", "× our dense"],
            [
                [
                    row["name"],
                    f"{row['seconds']:.3f}",
                    f"{row['fastest']:.3f} to {row['slowest']:.3f}",
                    f"{speed[0]['seconds'] / row['seconds']:.2f}",
                    f"{speed[1]['seconds'] / row['seconds']:.2f}",
                ]
                for row in speed
            ],
        )
    )

    args.out.mkdir(parents=True, exist_ok=True)
    console.print("\nWhich tokens survive, with a red line where the answer stands:")
    for setting in settings:
        if (preset := setting["options"].get("preset")) is not None:
            file = args.out / f"trapezoid-{preset}.png"
            draw(model, setting, prompt, needle, words, file)
            console.print(f"  {file}", highlight=False)
    report = {
        "command": "python examples/demo.py" + (" --more" if args.more else ""),
        "context": args.context,
        "snippet": SNIPPET,
        "snippets": len(snippets),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "simba": simba.__version__,
        "presets": {name: dict(PRESETS[name]) for name in PRESETS_SHOWN},
        "places": places,
        "expected": answer,
        "results": results,
        "verdicts": compared,
        "speed": speed,
    }
    (args.out / "demo.json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    console.print(
        f"\nAll numbers: {args.out / 'demo.json'}\n"
        "\nNext, your own model in two lines:\n"
        '    model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")\n'
        '    simba.sparsify(model, preset="recall")\n'
        "Then see docs/choosing.md. Speed in detail: python benchmarks/prefill.py",
        highlight=False,
    )


if __name__ == "__main__":
    main()
