"""Draw situations at random, and hold every one against the slow reference and against rows alone.

    python tests/soak.py --cases 10000       # an hour or so: kept tokens, logits, states
    python tests/soak.py --generations 2000  # prefill and generate: the same results, flat memory

A case is a family, sizes, a batch of rows with padding, prompts and answers, a schedule, a
criterion and a dtype. In float64 the kept tokens must be those of the float64 reference; in every
dtype a row of a batch must keep what it keeps alone. Two tokens whose scores differ by no more than
the dtype's rounding may change places: such cases are counted apart. `tests/test_properties.py`
draws from the same cases.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import resource
import sys
import time
from collections import Counter
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
        if self.criterion == "influence":
            options |= {"reduce": self.reduce, "dt_bias": self.dt_bias}
        return options


def draw(rng: random.Random) -> Case:
    """A case; ``rng`` needs ``randint``, ``choice`` and ``random``."""
    layers = rng.randint(2, 6)
    lengths = tuple(rng.randint(1, 24) for _ in range(rng.randint(1, 4)))
    prompts = tuple(n if rng.random() < 0.5 else rng.randint(1, n) for n in lengths)
    final_keep: float | None = round(rng.choice([1.0, 0.9, 0.5, 0.3, 0.1, 0.01, rng.random()]), 3)
    final_keep = max(final_keep, 0.001)
    kind = rng.choice(["linear", "linear", "constant", "at", "list", "late"])
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
    return Case(
        family=rng.choice(list(FAMILIES)),
        layers=layers,
        dtype=rng.choice(["float64", "float64", "float32", "bfloat16"]),
        lengths=lengths,
        prompts=prompts,
        common=rng.choice([0, 0, 1, 2, 7]),
        schedule=schedule,
        final_keep=final_keep,
        criterion=rng.choice(["influence"] * 4 + ["recency", "uniform", "random", "delta"]),
        reduce=rng.choice(["max", "max", "absmax", "l2"]),
        dt_bias=rng.random() < 0.3,
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
    slow = room.slow_forward(
        model,
        row[0].tolist(),
        keep,
        case.prompts[b],
        reduce=case.reduce,
        bias_in_decay=case.dt_bias,
    )
    for layer in range(case.layers):
        kept, expected = single.positions[layer][0].tolist(), slow.positions[layer]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wrong = soak(args.cases, args.seed) if args.cases else 0
    wrong += generations(args.generations, args.seed) if args.generations else 0
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
