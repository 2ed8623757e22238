"""Draw situations at random, and hold every one against the slow reference and against rows alone.

    python tests/soak.py --cases 10000       # an hour or so: kept tokens, logits, states
    python tests/soak.py --generations 2000  # prefill and generate: the same results, flat memory
    python tests/soak.py --turns 2000        # conversations: as fresh runs of them, flat memory

A case is a family, sizes, a batch of rows with padding, prompts and answers, a schedule, a
criterion and a dtype. In float64 the kept tokens must be those of the float64 reference; in every
dtype a row of a batch must keep what it keeps alone. Two tokens whose scores differ by no more than
the dtype's rounding may change places: such cases are counted apart. `tests/test_properties.py`
draws from the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest does this for the tests
    sys.path.insert(0, str(Path(__file__).parent))

import torch

import simba
import slow_families
import slow_reference
from conftest import relative_error, tiny_mamba, tokens
from simba.schedules import keep_counts
from test_families import falcon_mamba, mamba2

FAMILIES = {"mamba": tiny_mamba, "falcon_mamba": falcon_mamba, "mamba2": mamba2}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LOOSE = {"float64": 1e-5, "float32": 2e-3, "bfloat16": 0.3}
"""Relative error of logits between a row alone and in a batch. Random models amplify rounding;
transformers computes parts of a float64 model in float32."""
TIE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.3}
"""Relative difference of scores up to which two tokens may change places."""


@dataclass(frozen=True)
class Case:
    """One situation."""

    family: str
    layers: int
    dtype: str
    lengths: tuple[int, ...]
    """Tokens of each row."""
    prompts: tuple[int, ...]
    """Of them, the prompt's."""
    common: int
    """Columns of padding that all rows have."""
    schedule: Any
    final_keep: float | None
    criterion: str
    reduce: str
    dt_bias: bool
    min_tokens: int
    dense_path: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """Of `simba.sparsify`."""
        options = {
            "final_keep": self.final_keep,
            "schedule": self.schedule,
            "criterion": self.criterion,
            "min_tokens": self.min_tokens,
            "dense_path": self.dense_path,
        }
        if self.criterion == "influence" and self.schedule != "cut":
            options |= {"reduce": self.reduce, "dt_bias": self.dt_bias}
        return options


def draw(rng: random.Random) -> Case:
    """A case; ``rng`` needs ``randint``, ``choice`` and ``random``."""
    layers = rng.randint(2, 6)
    lengths = tuple(rng.randint(1, 24) for _ in range(rng.randint(1, 4)))
    prompts = tuple(n if rng.random() < 0.5 else rng.randint(1, n) for n in lengths)
    final_keep: float | None = round(rng.choice([1.0, 0.9, 0.5, 0.3, 0.1, 0.01, rng.random()]), 3)
    final_keep = max(final_keep, 0.001)
    kind = rng.choice(["linear", "linear", "constant", "at", "list", "late", "cut"])
    schedule: Any = kind
    if kind == "at":
        places = [layer for layer in range(layers - 1) if rng.random() < 0.4]
        schedule = simba.PruneAt(places or [layers - 2])
    elif kind == "list":
        ratios = sorted(
            (round(max(rng.random(), 0.01), 3) for _ in range(layers - 1)), reverse=True
        )
        schedule, final_keep = [1.0, *ratios], None
    elif kind == "late":
        schedule = simba.PruneAt([layers - 2])
    plain = kind == "cut"  # which scores nothing
    return Case(
        family=rng.choice(list(FAMILIES)),
        layers=layers,
        dtype=rng.choice(["float64", "float64", "float32", "bfloat16"]),
        lengths=lengths,
        prompts=prompts,
        common=rng.choice([0, 0, 1, 2, 7]),
        schedule=schedule,
        final_keep=final_keep,
        criterion=rng.choice(
            ["influence"] * 4 + ["recency", "uniform", "random", "delta"] * (not plain)
        ),
        reduce="max" if plain else rng.choice(["max", "max", "absmax", "l2"]),
        dt_bias=rng.random() < 0.3 and not plain,
        min_tokens=rng.choice([1, 1, 1, 2, 8]),
        dense_path=rng.choice(["auto", "simba"]),
        seed=rng.randint(0, 2**20),
    )


def build(case: Case) -> torch.nn.Module:
    """The case's model, not sparsified."""
    make = FAMILIES[case.family]
    return make(seed=case.seed % 50, dtype=DTYPES[case.dtype], num_hidden_layers=case.layers)


class WrongError(AssertionError):
    """A case came out wrong."""


class FarOffError(WrongError):
    """Other numbers, though of the same tokens."""


def demand(holds: bool, case: Case, what: str, kind: type[WrongError] = WrongError) -> None:
    if not holds:
        raise kind(f"{what}\n{case}")


def check(case: Case) -> Counter[str]:
    """Run a case. Counts rows, tokens, and places where rounding decided.

    Where a random model amplifies bfloat16's rounding too much to compare numbers (alone, a row may
    go through transformers' scan, and in the batch through ours), they must agree in float32.

    Raises:
        WrongError: a row of the batch is not the row alone, or not what the reference keeps.
    """
    try:
        return check_rows(case)
    except FarOffError:
        if case.dtype != "bfloat16":
            raise
        return check_rows(replace(case, dtype="float32")) + Counter({"cases in float32 again": 1})


@torch.no_grad()
def check_rows(case: Case) -> Counter[str]:
    """The case in its own dtype."""
    model = simba.sparsify(build(case), **case.options)
    width = max(case.lengths) + case.common
    rows = [tokens(1, n, seed=case.seed + i) for i, n in enumerate(case.lengths)]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    columns = torch.arange(width)
    mask = torch.stack([(columns >= width - n).long() for n in case.lengths])
    with simba.record(model) as together:
        out = model(ids, attention_mask=mask, prompt_length=list(case.prompts), use_cache=True)
    counted: Counter[str] = Counter(rows=len(rows))
    for b, row in enumerate(rows):
        with simba.record(model) as single:
            alone = model(row, prompt_length=case.prompts[b], use_cache=True)
        shift = width - case.lengths[b]
        same = True
        for layer in range(case.layers):
            kept = together.positions[layer][b]
            kept = [p - shift for p in kept.tolist() if p >= 0]
            expected = single.positions[layer][0].tolist()
            counted["tokens"] += len(expected)
            if kept != expected:
                tie = near_tie(single, layer - 1, kept, expected, TIE[case.dtype])
                demand(tie, case, f"row {b}, layer {layer}: {kept} in the batch, {expected} alone")
                counted["ties within rounding"] += 1
                same = False
                break
        if not same:
            continue
        real = out.positions[b] >= 0
        error = relative_error(out.logits[b][real], alone.logits[0])
        demand(error < LOOSE[case.dtype], case, f"row {b}: logits are {error} off", FarOffError)
        for a, c in zip(out.cache_params.layers, alone.cache_params.layers):
            error = relative_error(a.recurrent_states[0][b], c.recurrent_states[0][0])
            demand(error < LOOSE[case.dtype], case, f"row {b}: states are {error} off", FarOffError)
        if case.dtype == "float64" and case.criterion == "influence":
            counted += against_reference(case, model, b, row, single, alone)
    return counted


def near_tie(run: Any, layer: int, a: list[int], b: list[int], tolerance: float) -> bool:
    """Whether two choices of equally many differ only in tokens whose scores are the same but for
    rounding."""
    if len(a) != len(b) or layer < 0:
        return False
    scores = dict(zip(run.positions[layer][0].tolist(), run.scores[layer][0].tolist()))
    differing = [scores.get(p, float("nan")) for p in set(a) ^ set(b)]
    scale = max(map(abs, differing))
    return max(differing) - min(differing) <= tolerance * scale + 1e-300


def against_reference(
    case: Case, model: Any, b: int, row: torch.Tensor, single: Any, alone: Any
) -> Counter[str]:
    """One row against the slow reference."""
    config = simba.status(model).config
    assert config is not None
    keep = keep_counts(config.ratios(case.layers), case.prompts[b], case.min_tokens)
    room = slow_reference if case.family == "mamba" else slow_families
    cut = case.prompts[b] - keep[0]  # 0 unless the prompt is cut
    slow = room.slow_forward(
        model,
        row[0, cut:].tolist(),
        keep,
        case.prompts[b] - cut,
        reduce=case.reduce,
        bias_in_decay=case.dt_bias,
    )
    for layer in range(case.layers):
        kept = single.positions[layer][0].tolist()
        expected = [column + cut for column in slow.positions[layer]]
        if kept != expected:
            tie = near_tie(single, layer - 1, kept, expected, 1e-6)  # stock layers: float32 in part
            demand(tie, case, f"row {b}, layer {layer}: kept {kept}, the reference {expected}")
            return Counter({"ties within rounding": 1})
    error = relative_error(alone.logits[0], slow.logits)
    demand(error < 1e-4, case, f"row {b}: logits are {error} off the reference")
    return Counter({"rows against the reference": 1})


def soak(cases: int, seed: int) -> int:
    """Check cases one after the other; the number of wrong ones."""
    rng, total, wrong, start = random.Random(seed), Counter[str](), 0, time.time()
    for number in range(1, cases + 1):
        case = draw(rng)
        try:
            total += check(case)
        except WrongError as error:
            wrong += 1
            print(f"case {number} of seed {seed} is WRONG: {error}", flush=True)
        except Exception as error:
            wrong += 1
            print(f"case {number} of seed {seed} CRASHED: {error!r}\n{case}", flush=True)
        if number % 500 == 0 or number == cases:
            facts = ", ".join(f"{count} {name}" for name, count in sorted(total.items()))
            print(
                f"{number} cases, {wrong} wrong; {facts}; {time.time() - start:.0f} s", flush=True
            )
    return wrong


def generations(count: int, seed: int) -> int:
    """Prefill and generate over and over; the number of results that changed."""
    rng, start, changed = random.Random(seed), time.time(), 0
    cases = [draw(rng) for _ in range(12)]
    models = [simba.sparsify(build(case), **case.options) for case in cases]
    first: dict[int, Any] = {}
    settled = 0
    for number, which in zip(range(1, count + 1), itertools.cycle(range(len(cases)))):
        case, model = cases[which], models[which]
        width = max(case.lengths) + case.common
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in case.lengths])
        ids = tokens(len(case.lengths), width, seed=case.seed) * mask
        out: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=number % 24 > 12,
        )  # fmt: skip
        # bfloat16 rounds differently with and without a cache: compare each with its own kind
        key = which + len(cases) * (number % 24 > 12)
        if first.setdefault(key, out).tolist() != out.tolist():
            changed += 1
            print(f"call {number} gave another result: {case}", flush=True)
        if number == max(count // 4, 1):
            gc.collect()
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled) / 1024
    print(
        f"{count} generations, {changed} changed; peak memory grew by {grown:.1f} MiB over the last "
        f"three quarters; {time.time() - start:.0f} s"
    )
    return changed + (grown > 20)


@dataclass(frozen=True)
class Turn:
    """What is said at once."""

    ids: torch.Tensor
    """(rows, n), padded on the left."""
    padding: tuple[int, ...]
    prompt: tuple[int, ...] | None
    """Prompt tokens of each row; None for an answer, which is never pruned."""
    dense: bool
    """Whether it runs inside of `simba.dense`."""

    def row(self, row: int) -> Turn:
        prompt = None if self.prompt is None else self.prompt[row : row + 1]
        return Turn(self.ids[row : row + 1, self.padding[row] :], (0,), prompt, self.dense)

    def cut(self, size: int) -> list[Turn]:
        """The turn of one row as its chunks, each a turn of its own."""
        if self.prompt is None or self.dense or self.prompt[0] <= size:
            return [self]
        ends = [*range(self.prompt[0] - size, 0, -size)][::-1]
        parts = zip([0, *ends], [*ends, self.ids.shape[1]], strict=True)
        return [
            Turn(self.ids[:, a:b], (0,), (min(b, self.prompt[0]) - a,), False) for a, b in parts
        ]


def draw_turn(rng: random.Random, rows: int, first: bool) -> Turn:
    """One of 1 to 70 tokens."""
    length = rng.choice([1, 2, 3, 4, 5, rng.randint(6, 24), rng.randint(25, 70)])
    padding = tuple(rng.randint(0, length - 1) if rng.random() < 0.2 else 0 for _ in range(rows))
    prompt = None
    if first or rng.random() < 0.7:
        most = [length - columns for columns in padding]
        if len(set(most)) == 1 and rng.random() < 0.8:
            prompt = (rng.choice([most[0], rng.randint(1, most[0])]),) * rows
        elif first:  # in chunks, rows of a fresh batch have equal answers
            answer = rng.randint(0, min(most) - 1)
            prompt = tuple(tokens - answer for tokens in most)
        else:
            prompt = tuple(rng.randint(1, tokens) for tokens in most)
    ids = tokens(rows, length, seed=rng.randint(0, 2**20))
    # (transformers' own prefill keeps its float64 states in float32)
    return Turn(ids, padding, prompt, not first and length > 1 and rng.random() < 0.2)


class Conversation:
    """What is said to one model, and the cache behind it."""

    def __init__(self, model: Any, turns: Sequence[Turn] = ()) -> None:
        self.model = model
        self.turns: list[Turn] = []
        self.cache: Any = None
        self.last: Any = None
        """The last turn's output."""
        for turn in turns:
            self.say(turn)

    def say(self, turn: Turn) -> None:
        """Run one more turn."""
        length = turn.ids.shape[1]
        mask = torch.stack([(torch.arange(length) >= columns).long() for columns in turn.padding])
        options: dict[str, Any] = {"attention_mask": mask} if any(turn.padding) else {}
        with contextlib.ExitStack() as stack:
            if turn.dense:
                stack.enter_context(simba.dense(self.model))
            else:
                options["prompt_length"] = turn.prompt
            self.last = self.model(turn.ids, cache_params=self.cache, use_cache=True, **options)
        self.cache = self.last.cache_params
        self.turns.append(turn)

    def error(self, other: Conversation, row: int | None = None) -> float:
        """The largest relative error of the last logits and of all states; of one row, if the other
        conversation is that row's."""
        mine = slice(None) if row is None else slice(row, row + 1)
        errors = [relative_error(self.last.logits[mine, -1], other.last.logits[:, -1])]
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for a, b in (
                (ours.conv_states[0], theirs.conv_states[0]),
                (ours.recurrent_states[0], theirs.recurrent_states[0]),
            ):
                errors.append(relative_error(a[mine], b))
        return max(errors)


@dataclass(frozen=True)
class Talker:
    """A model, and the same one without chunks."""

    model: Any
    whole: Any
    dtype: torch.dtype
    keep: float
    chunk_size: int | None

    def checks(self, talk: Conversation, row: int) -> Iterator[tuple[str, float, float]]:
        """Names of what a conversation must equal, its errors, and what they may be."""
        yield "a fresh run", talk.error(Conversation(self.model, talk.turns)), 0.0
        if self.dtype != torch.float64:
            return  # where rounding decides which token is kept
        mine = [turn.row(row) for turn in talk.turns]
        if self.chunk_size is not None:
            mine = [part for turn in mine for part in turn.cut(self.chunk_size)]
        # single tokens go through transformers' steps, which compute in float32
        alone = Conversation(self.whole, mine)
        yield "a row alone, chunk by chunk", talk.error(alone, row), 1e-5
        if self.keep == 1.0:
            ids = torch.cat([turn.ids for turn in mine], 1)
            everything = Conversation(self.whole, [Turn(ids, (0,), None, False)])
            yield "one long pass", talk.error(everything, row), 1e-5


def resident() -> float:
    """MiB that the process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@torch.no_grad()
def conversations(turns: int, seed: int, *, each: int = 50, quiet: bool = False) -> int:
    """Turns of changing lengths to several models; the number of conversations that went wrong, and
    one more if memory grew by over 20 MiB after the first quarter.

    After ``each`` turns a conversation is compared with a fresh run of it, with one of its rows
    alone, and with one long pass where nothing is pruned. Then another one begins.
    """
    rng, start = random.Random(seed), time.time()
    kinds = list(
        itertools.product(FAMILIES.values(), (torch.float64, torch.float32), (0.3, 1.0), (None, 16))
    )
    rng.shuffle(kinds)
    talkers = []
    for number, (make, dtype, keep, size) in enumerate(kinds[: max(turns // each, 1)]):
        options: dict[str, Any] = {"final_keep": keep, "dense_path": "simba"}
        sizes: dict[str, Any] = {"seed": number, "dtype": dtype, "num_hidden_layers": 3}
        model = simba.sparsify(make(**sizes), chunk_size=size, **options)
        whole = simba.sparsify(make(**sizes), **options)
        talkers.append(Talker(model, whole, dtype, keep, size))
    held, counted = [resident()], Counter[str]()
    under_way: dict[int, Conversation] = {}
    for number in range(turns):
        which = number % len(talkers)  # they take turns
        talker, talk = talkers[which], under_way.get(which)
        if talk is None:
            talk = under_way[which] = Conversation(talker.model)
        first = not talk.turns
        rows = rng.randint(1, 3) if first else len(talk.turns[0].ids)
        talk.say(draw_turn(rng, rows, first))
        if len(talk.turns) == each or number >= turns - len(talkers):
            del under_way[which]
            for name, error, tolerance in talker.checks(talk, rng.randrange(rows)):
                counted[f"compared with {name}"] += 1
                if not error <= tolerance:
                    counted["wrong"] += 1
                    said = [(t.ids.shape[1], t.padding, t.prompt, t.dense) for t in talk.turns]
                    print(f"{error} off {name}: {talker}, {said}", flush=True)
        if number + 1 in (turns // 4, turns // 2, turns):
            held.append(resident())
    if not quiet:
        facts = ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))
        memory = ", ".join(f"{size:.0f}" for size in held)
        print(
            f"{turns} turns, {counted['wrong']} wrong; {facts}; resident memory {memory} MiB at the "
            f"start, after a quarter, after half, and at the end; {time.time() - start:.0f} s"
        )
    return counted["wrong"] + (held[-1] - held[1] > 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wrong = soak(args.cases, args.seed) if args.cases else 0
    wrong += generations(args.generations, args.seed) if args.generations else 0
    wrong += conversations(args.turns, args.seed) if args.turns else 0
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
