"""Write six small tasks for lm-eval, in the formats of the paper's six, from a text file.

    python examples/write_tasks.py tasks
    simba eval --model assets/demo-model --include-path tasks --tasks local_lambada,local_piqa

For machines where no hub is reachable, and for tests: the same code runs as on the real ones. They
are not the real ones. What is asked is always how the text (by default the embedded one, Jane
Austen's Persuasion) goes on, so scores compare models on these tasks and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "Anne", "Elizabeth", "Mary", "Louisa", "Henrietta", "Charles", "Frederick", "Wentworth",
    "Benwick", "Harville", "Russell", "Walter", "Elliot", "Croft", "Musgrove", "Clay",
)  # fmt: skip
EXAMPLES = 30  # to draw few-shot prompts from: the paper takes up to 25
LOCAL = ("lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
REAL = ("lambada_openai", *LOCAL[1:])
Row = dict[str, Any]


def sentences(text: str) -> list[str]:
    """Of 6 to 40 words, in order, without the title."""
    flat = re.sub(r"\s+", " ", text)
    found = [s.strip() for s in re.split(r'(?<=[a-z][.!?])"? (?="?[A-Z])', flat)]
    return [s for s in found if 6 <= len(s.split()) <= 40 and "_" not in s][20:]


def halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def lambada(lines: list[str], rng: random.Random) -> Iterator[Row]:
    """The last word of a passage, which the passage has said before."""
    for i in range(5, len(lines)):
        passage = " ".join(lines[i - 5 : i + 1]).rstrip(".!?\"'")
        *before, last = passage.split()
        if len(last) > 3 and last.isalpha() and last in re.findall(r"\w+", " ".join(before)):
            yield {"text": passage}


def endings(
    lines: list[str], i: int, count: int, rng: random.Random, near: int | None = None
) -> tuple[list[str], int]:
    """The second half of a sentence among those of others, and its place."""
    lowest, highest = (0, len(lines)) if near is None else (max(i - near, 0), i + near)
    others = [*range(lowest, i - 1), *range(i + 2, min(highest, len(lines)))]
    found = [halves(lines[k])[1] for k in rng.sample(others, count - 1)]
    place = rng.randrange(count)
    return [*found[:place], halves(lines[i])[1], *found[place:]], place


def hellaswag(lines: list[str], rng: random.Random) -> Iterator[Row]:
    """Which of four endings a sentence has, after the one before."""
    for i in range(1, len(lines)):
        choices, label = endings(lines, i, 4, rng)
        yield {
            "activity_label": "From a novel",
            "ctx_a": lines[i - 1],
            "ctx_b": halves(lines[i])[0],
            "endings": choices,
            "label": str(label),
        }


def piqa(lines: list[str], rng: random.Random) -> Iterator[Row]:
    """Which of two halves completes a sentence."""
    for i in range(len(lines)):
        (first, second), label = endings(lines, i, 2, rng)
        yield {"goal": halves(lines[i])[0], "sol1": first, "sol2": second, "label": label}


def arc(lines: list[str], rng: random.Random, near: int | None = None) -> Iterator[Row]:
    """A question with four answers; the wrong ones from anywhere, or from near by."""
    for i in range(len(lines)):
        choices, place = endings(lines, i, 4, rng, near)
        yield {
            "id": f"persuasion_{i}",
            "question": f'What follows "{halves(lines[i])[0]}"?',
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[place],
        }


def arc_near(lines: list[str], rng: random.Random) -> Iterator[Row]:
    """The hard ones."""
    return arc(lines, rng, near=8)


def winogrande(lines: list[str], rng: random.Random) -> Iterator[Row]:
    """Which of two names stands in a sentence's gap."""
    for line in lines:
        words = line.split()
        for place in range(2, len(words) - 4):
            if words[place] in NAMES:
                other = rng.choice([name for name in NAMES if name not in words])
                options = [words[place], other]
                rng.shuffle(options)
                yield {
                    "sentence": " ".join([*words[:place], "_", *words[place + 1 :]]),
                    "option1": options[0],
                    "option2": options[1],
                    "answer": str(1 + options.index(words[place])),
                }
                break


ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
NORMED = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
QUESTION = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
}
GAP = "sentence.split('_')"
TASKS = {
    "lambada": (
        lambada,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
            "doc_to_target": " {{text.rsplit(' ', 1)[1]}}",
            "target_delimiter": "",
            "metric_list": [ACC, PERPLEXITY],
        },
    ),
    "hellaswag": (
        hellaswag,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{activity_label}}: {{ctx_a}} {{ctx_b}}",
            "doc_to_choice": "endings",
            "doc_to_target": "{{label}}",
            "metric_list": [NORMED, ACC],
        },
    ),
    "piqa": (
        piqa,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "doc_to_target": "label",
            "metric_list": [ACC, NORMED],
        },
    ),
    "arc_easy": (arc, {**QUESTION, "metric_list": [ACC, NORMED]}),
    "arc_challenge": (arc_near, {**QUESTION, "metric_list": [NORMED, ACC]}),
    "winogrande": (
        winogrande,
        {
            "output_type": "multiple_choice",
            # two contexts, one continuation: the number says which context is right
            "doc_to_text": "{{answer | int - 1}}",
            "doc_to_choice": f"{{{{[{GAP}[0] + option1, {GAP}[0] + option2]}}}}",
            "doc_to_target": f"{{{{{GAP}[1].strip()}}}}",
            "metric_list": [ACC],
        },
    ),
}


def write(folder: Path, text: Path, documents: int, real_names: bool, seed: int = 0) -> list[str]:
    """A YAML file a task, and its examples (train) and questions (test) as JSON lines.

    Returns:
        The tasks' names: ``local_...``, or those of the real ones, which they then stand for.
    """
    lines = sentences(text.read_text(encoding="utf-8"))
    names = []
    for local, real in zip(LOCAL, REAL):
        make, config = TASKS[local]
        rng = random.Random(f"{seed} {local}")
        rows = list(make(lines, rng))
        if len(rows) < EXAMPLES + documents:
            raise SystemExit(
                f"{text} gives {len(rows)} rows of {local}; {EXAMPLES} examples and {documents} "
                "questions are wanted"
            )
        drawn = rng.sample(rows, EXAMPLES + documents)
        data = folder.resolve() / local
        data.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", drawn[:EXAMPLES]), ("test", drawn[EXAMPLES:])):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (data / f"{split}.jsonl").write_text(content, encoding="utf-8")
        name = real if real_names else f"local_{local}"
        whole = {
            "task": name,
            "dataset_path": str(data),
            "training_split": "train",
            "fewshot_split": "train",
            "test_split": "test",
            "metadata": {"version": "local"},
            **config,
        }
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "assets" / "persuasion.txt")
    parser.add_argument("--documents", type=int, default=100, help="questions of each task")
    parser.add_argument(
        "--real-names", action="store_true", help="take the places of the real six, to try a setup"
    )
    args = parser.parse_args()
    print(",".join(write(args.folder, args.text, args.documents, args.real_names)))


if __name__ == "__main__":
    main()
