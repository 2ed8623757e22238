"""Teach a small language model to use far context: facts, pairs, passkeys, examples, passages.

    python examples/train_memory.py --model assets/demo-model --data texts.jsonl.xz --out out/memory

Small models that were trained on text alone hardly look back, so they can't tell what pruning
forgets. This continues the training of one on real text, with things to remember in it: every row
is text with a few statements at random places, each asked for later, and a passage that returns
(`simba.evaluate.prose`). The loss is that of all tokens plus that of the answers. Nothing is pruned
in training; it runs through simba's own scan (`dense_path="simba"`), which has a backward pass in
its kernels. A sample of a few MB is soon known by heart, which costs other texts; --teacher keeps
what the model predicts of text near what another one does. --native trains through the model's own
forward pass instead, which is faster for Mamba-2 and hybrids with attention where mamba-ssm is
installed. Every few hundred steps the script
prints how many answers are right in prompts of --check tokens, and the loss of the text after as
many, on texts that it does not train on (--held-out).

Measure it with `simba recall --task fact --text ... --model out/memory --lengths 2048 --cut`.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import simba
from simba.evaluate.prose import KINDS, Pools, draw, prose_in_text, tokens_of
from simba.evaluate.synthetic import passkey_in_text
from simba.evaluate.texts import Document, Tokenizer, read_documents, read_texts
from simba.evaluate.trained import answers

Row = tuple[Tensor, Tensor]
TEXT, TOLD, ASKED = range(3)


class Rows(IterableDataset[Row]):
    """Endless rows of (ids, kinds): (length,) int64, and (length,) int64 with what a token is.

    A token is TEXT, ASKED (it answers a question) or TOLD (the other tokens put into the text).

    Args:
        ids: (tokens,) int64, the training texts one after the other.
        tokenizer: the model's.
        length: tokens of a row.
        items: the most things to remember in a row.
        seed: of everything; each worker adds its number.
    """

    def __init__(self, ids: Tensor, tokenizer: Tokenizer, length: int, items: int, seed: int):
        self.ids, self.tokenizer, self.length = ids, tokenizer, length
        self.items, self.seed, self.pools = items, seed, Pools.of(tokenizer)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        random = Random(self.seed * 1000 + (0 if worker is None else worker.id))
        while True:
            yield self.row(random)

    def row(self, random: Random) -> Row:
        """Text, and in it statements and, later, questions with their answers."""
        parts: list[tuple[float, list[int], int]] = []  # place, tokens, how many of them answer
        for _ in range(random.randint(1, self.items)):
            parts += self.item(random)
        passage = random.randint(30, 100) if random.random() < 0.5 else 0
        length = self.length - sum(len(tokens) for _, tokens, _ in parts) - passage
        if length < self.length // 2:  # too much for one row
            return self.row(random)
        start = random.randrange(len(self.ids) - length)
        text = self.ids[start : start + length].tolist()
        if passage:
            first = random.randrange(length - passage)
            parts.append((self.later(first / length, random), text[first : first + passage], 0))
        ids: list[int] = []
        kinds: list[int] = []
        done = 0
        for place, tokens, answering in sorted(parts, key=lambda part: part[0]):
            until = int(place * length)
            ids += text[done:until] + tokens
            kinds += [TEXT] * (until - done)
            kinds += [TOLD] * (len(tokens) - answering) + [ASKED] * answering
            done = until
        kinds += [TEXT] * (length - done)
        return torch.tensor(ids + text[done:]), torch.tensor(kinds)

    def item(self, random: Random) -> list[tuple[float, list[int], int]]:
        """The statements of one thing to remember, and a question with its answer behind them."""

        def tokens(text: str) -> list[int]:
            return tokens_of(text, self.tokenizer)

        kind = random.choice([*KINDS, "fact", "passkey"])
        first = random.random()
        if kind == "passkey":
            key = "".join(f" {random.randrange(10)}" for _ in range(5))
            said, question, answer = (
                tokens(f"\nThe pass key is{key}. Remember it.\n"),
                tokens("\nThe pass key is"),
                tokens(key),
            )
            beside: list[list[int]] = []
        else:
            item = draw(kind, self.pools, random)
            said = [token for piece in item.statement for token in tokens(piece)]
            question, answer = tokens(item.question), tokens(item.answer)
            beside = [tokens(text) for text in item.beside]
        asked = self.later(first, random)
        others = [(random.uniform(0, asked), each, 0) for each in beside]
        return [(first, said, 0), *others, (asked, question + answer, len(answer))]

    def later(self, place: float, random: Random) -> float:
        """A place behind another: near and far ones are equally likely, on a logarithmic scale."""
        far = math.exp(random.uniform(math.log(8 / self.length), 0.0))
        return place + (1 - place) * far


def checked(
    model: nn.Module, tokenizer: Tokenizer, documents: list[Document], length: int, prompts: int
) -> dict[str, float]:
    """Share of the answers' tokens that are right, dense, by task, and the loss of the text."""
    model.eval()
    device = next(model.parameters()).device
    shares = {}
    for kind in (*KINDS, "passkey"):
        if kind == "passkey":
            rows = passkey_in_text(
                documents, tokenizer, length=length, room=length, digits=5, keys=prompts, seed=0
            )
        else:
            rows = prose_in_text(
                kind, documents, tokenizer, length=length, room=length, prompts=prompts, seed=0
            )
        shares[kind] = float(answers(model, rows, 20)[0].mean())
    with torch.no_grad():
        texts = torch.stack([document.ids[-length:] for document in documents])
        each = [losses(model, row, torch.zeros_like(row))[0] for row in texts.to(device)[:, None]]
    shares["text"] = float(torch.stack(each).mean())
    model.train()
    return shares


def losses(
    model: nn.Module, ids: Tensor, kinds: Tensor, teacher: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss in nats of all tokens, and of those that answer.

    The loss of a token is its cross entropy. With a teacher, that of text is the Kullback-Leibler
    divergence of the model's prediction from the teacher's.
    """
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    kinds = kinds[:, 1:]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    each = each.view(kinds.shape)
    of_answers = each[kinds == ASKED].sum() / (kinds == ASKED).sum().clamp(min=1)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        kl = nn.functional.kl_div(
            logits.log_softmax(-1), wanted, reduction="none", log_target=True
        ).sum(-1)
        each = torch.where(kinds == TEXT, kl, each)
    return each.mean(), of_answers


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the weights in bfloat16, so that a training that is cut off leaves its last check."""
    dense = simba.desparsify(copy.deepcopy(model))
    dense.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="to start from")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", help="texts to check on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--start-length", type=int, default=512, help="tokens of the first rows")
    parser.add_argument("--items", type=int, default=12, help="most things to remember in a row")
    parser.add_argument("--tokens", type=int, default=65536, help="of a batch")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--teacher", type=Path,
        help="text is learned from what this model predicts, not by heart (as a rule, the model "
        "that the first training started from)",
    )  # fmt: skip
    parser.add_argument("--answer-weight", type=float, default=1.0, help="of the answers' loss")
    parser.add_argument("--check", type=int, default=2048, help="tokens of the prompts to check on")
    parser.add_argument("--check-every", type=int, default=500, help="steps")
    parser.add_argument("--prompts", type=int, default=10, help="to check on, of each document")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="the schedule ends by then"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay float32")
    parser.add_argument(
        "--native", action="store_true", help="train through the model's own forward pass"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    path = "native" if args.native else "simba"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    simba.sparsify(model, 1.0, dense_path=path)
    teacher = None
    if args.teacher is not None:
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
        teacher = teacher.to(args.device).eval().requires_grad_(False)
        simba.sparsify(teacher, 1.0, dense_path=path)
    held_out = read_documents(args.held_out, tokenizer) if args.held_out else []
    held_out = [each for each in held_out if len(each.ids) > args.check]
    texts = [text for _, text in read_texts(args.data)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    ends = [tokenizer.eos_token_id]
    ids = torch.tensor([token for each in encoded["input_ids"] for token in [*ends, *each]])
    print(f"{len(ids)} tokens of text, {model.num_parameters()} parameters", flush=True)
    kept = [p for name, p in model.named_parameters() if p.dim() < 2 or "A_log" in name]
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and "A_log" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    start = time.perf_counter()

    def progress(step: int) -> float:
        """The share of the training that is done, by steps or by the clock."""
        seconds = time.perf_counter() - start
        return float(max(step / args.steps, seconds / args.max_seconds))

    def rate(step: int) -> float:
        done = min(progress(step), 1.0)
        falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        return float(min(done / 0.03, 1.0) * falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step, since, length = 0, torch.zeros(2, device=args.device), min(args.start_length, args.length)
    model.train()
    while progress(step) < 1:
        items = max(args.items * length // args.length, 2)
        loader = DataLoader(
            Rows(ids, tokenizer, length, items, args.seed + step),
            batch_size=max(args.tokens // length, 1),
            num_workers=args.workers,
        )
        until = 1.0 if length == args.length else progress(step) + 0.1
        for batch, kinds in loader:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                loss, answer_loss = losses(
                    model, batch.to(args.device), kinds.to(args.device), teacher
                )
            optimizer.zero_grad()
            (loss + args.answer_weight * answer_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            since += torch.stack([loss.detach(), answer_loss.detach()])
            last = progress(step) >= 1
            if step % args.check_every == 0 or last:
                text_loss, of_answers = (
                    since / (step % args.check_every or args.check_every)
                ).tolist()
                since.zero_()
                right = (
                    checked(model, tokenizer, held_out, args.check, args.prompts)
                    if held_out
                    else {}
                )
                print(
                    f"step {step}  {length} tokens  loss {text_loss:.3f}  "
                    f"of answers {of_answers:.3f}  "
                    + "  ".join(f"{kind} {share:.3f}" for kind, share in right.items())
                    + f"  {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
                save(model, tokenizer, args.out)
            if last or progress(step) >= until:
                break
        length = min(2 * length, args.length)

    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
