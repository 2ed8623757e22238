"""Layers where only some tokens are live, and the rest write. One command, about two minutes:

    python benchmarks/live_tokens.py [--json live.json] [--seconds 120] [--layers 12]

Two tables. The first has one layer of mamba-2.8b's and of mamba2-2.7b's shape with a tenth, a
quarter and all of its tokens live, and says what share of a dense layer's time each takes. The
layer neither scores nor prunes, and computes the next layer's norm as in a prefill. The second has
prefills of models of ``--layers`` such layers: dense, pruned as in the paper, and with the fates
"write" and "skip"; also dense ones of prompts that were cut to the FLOPs of the others, and to a
few shares. Between the times of these lies, for each line, the share of the prompt that the dense
model reads in the same time.

Values are random, in bfloat16, and the batch is 1. All kernels are compiled in front. Layers are
timed in CUDA graphs, prefills from the call to their last kernel; what a line compares takes
turns, and the times are medians. ``--smoke`` runs tiny shapes on a CPU and proves only that the
script works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import simba
from simba.evaluate import cut_length
from simba.models.block import fusable_norm
from simba.models.layer import Carrier
from simba.models.plan import TokenPlan
from simba.models.prefill import Pass
from simba.models.streams import capture_stream, making_graph
from simba.verbs import find_state
from timing import Call, captured, circumstances, commit, event, summary

FAMILIES = ("mamba-2.8b", "mamba2-2.7b")
LENGTHS = [2048, 8192]
SHARES = [0.1, 0.25, 1.0]
RULE = "window:0.5+delta"
STEPS: dict[str, dict[str, Any]] = {
    f"step {hold:g}, {fate}, keep {keep:g}": {
        "final_keep": keep, "schedule": simba.Curve(0, hold), "fate": fate
    }
    for hold, fate, keep in (
        (0.42, "write:0.67", 0.1), (0.42, "write:0.67", 0.16), (0.5, "write:0.67", 0.05),
        (0.5, "write:0.67", 0.1), (0.42, "write", 0.1), (0.59, "write", 0.1),
        (0.3, "write:left=0.5", 0.1), (0.3, "write:left=0.3", 0.1),
    )
}  # fmt: skip
"""All tokens for a share of the layers, then the last ones, while the others write."""
CUTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the prompt that the dense model reads."""
LEAST, MOST = 3, 30
"""Rounds of a line."""


def config(family: str, layers: int, smoke: bool) -> Any:
    """A transformers configuration with the shape of a family's layers."""
    import transformers as hf

    sizes = {"hidden_size": 32 if smoke else 2560, "num_hidden_layers": layers}
    vocab = 64 if smoke else 50280
    if family == "mamba-2.8b":
        return hf.MambaConfig(vocab_size=vocab, state_size=4 if smoke else 16, **sizes)
    heads = sizes["hidden_size"] * 2 // 64
    states = 8 if smoke else 128
    return hf.Mamba2Config(
        vocab_size=vocab, num_heads=heads, head_dim=64, state_size=states, n_groups=1, **sizes
    )


def random_model(family: str, layers: int, device: str, smoke: bool, like: Any = None) -> Any:
    """A model with random weights, or one that shares another's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if smoke else torch.bfloat16
    with torch.device(device if like is None else "meta"):
        model = AutoModelForCausalLM.from_config(config(family, layers, smoke), dtype=dtype)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
        for mine, theirs in zip(model.modules(), like.modules(), strict=True):
            mine._buffers.update(theirs._buffers)
    return model.eval()


def layer(model: Any, length: int, share: float) -> Callable[[], Tensor]:
    """One layer in the middle of the model, of whose tokens a share is live."""
    device = model.device
    simba.sparsify(model, schedule=[1, share, share], fate="write")
    state, blocks = find_state(model), model.backbone.layers
    assert state is not None
    ratios = tuple(Fraction(ratio) for ratio in state.ratios)
    plan = TokenPlan.make([0], [length], [0], ratios, 1)
    draw = torch.Generator().manual_seed(0)
    live = torch.randperm(length - 1, generator=draw)[: plan.width(1) - 1].sort().values
    positions = torch.cat([live, torch.tensor([length - 1])])[None].to(device)
    hidden_states = torch.randn(1, length, model.config.hidden_size, generator=draw).to(device)
    backend = state.config.backend
    norm, next_norm = (fusable_norm(blocks, i, hidden_states, backend) for i in (1, 2))
    normed = None if norm is None else norm.of_sum(hidden_states, None, None, backend=backend)
    if normed is not None and next_norm is not None:  # an earlier layer made them
        normed = normed._replace(units=next_norm.units(hidden_states, None, backend=backend))
    tokens: Tensor = hidden_states

    def call() -> Tensor:
        one = Pass(state, plan).call(1, positions, normed=normed, next_norm=next_norm)
        with making_graph():  # nobody else has these tensors
            out: Tensor = blocks[1](tokens, simba=Carrier(one))
        return out

    return call


def prefill(model: Any, ids: Tensor) -> object:
    """The last token's logits, and the states that generation continues from."""
    return model(ids, use_cache=True, logits_to_keep=1).logits


def prefills(
    family: str, length: int, layers: int, device: str, smoke: bool
) -> tuple[dict[str, Call], dict[str, float]]:
    """Whole prefills, by name, and their FLOPs as shares of the dense one's."""
    make = partial(random_model, family, layers, device, smoke)
    dense = make()
    options: dict[str, dict[str, Any]] = {
        "dense": {"final_keep": 1.0, "dense_path": "simba"},
        "paper": {"final_keep": 0.1},
        "paper, final_keep=0.5": {"final_keep": 0.5},
        f"write, {RULE}": {"final_keep": 0.1, "criterion": RULE, "fate": "write"},
        f"skip, {RULE}": {"final_keep": 0.1, "criterion": RULE, "fate": "skip"},
        **{name: {"criterion": "recency", **options} for name, options in STEPS.items()},
    }
    models = {name: simba.sparsify(make(like=dense), **each) for name, each in options.items()}
    flops = {name: simba.flops(model, length).ratio for name, model in models.items()}
    ids = torch.randint(0, dense.config.vocab_size, (1, length), device=device)
    calls: dict[str, Call] = {name: partial(prefill, m, ids) for name, m in models.items()}
    cuts = {
        f"the FLOPs of {name.removesuffix(f', {RULE}')}": cut_length(models[name], length)
        for name in ("paper", f"write, {RULE}", *STEPS)
    }
    cuts |= {f"{share:g}": round(share * length) for share in CUTS}
    for name, read in cuts.items():
        last, cut = ids[:, -read:].contiguous(), f"dense, cut to {name}"
        one = simba.sparsify(make(like=dense), **options["dense"])  # a model keeps few graphs
        calls[cut] = partial(prefill, one, last)
        flops[cut] = simba.flops(models["dense"], read).total / simba.flops(dense, length).total
    return calls, flops


def cut_of_the_same_time(times: dict[str, Any], ms: float) -> float | None:
    """The share of the prompt that the dense model reads in so many milliseconds, between those
    that were measured; None beyond them."""
    known: list[tuple[float, float]] = [
        (times[f"dense, cut to {share:g}"]["ms"], share) for share in CUTS
    ]
    known = sorted([*known, (times["dense"]["ms"], 1.0)])
    for (least, low), (most, high) in itertools.pairwise(known):
        if least <= ms <= most and low < high:
            return low + (high - low) * (ms - least) / (most - least or 1.0)
    return None


Timer = Callable[[], float]
"""Runs something once and returns milliseconds."""


def on_the_host(call: Call, device: str) -> Timer:
    """Time from the call to the end of its last kernel."""

    def run() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    return run


def in_a_graph(call: Call, repeats: int = 5) -> Timer:
    """Time on the GPU, without launching, in a graph like simba's own."""
    stream = capture_stream(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = captured(call, repeats, stream)
    graph.replay()

    def run() -> float:
        start, end = event(), event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        total: float = start.elapsed_time(end)
        return total / repeats

    return run


def take_turns(timers: dict[str, Timer], until: float, most: int) -> dict[str, Any]:
    """Medians of as many rounds as there is time for: at least a few."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    rounds = 0
    while rounds < LEAST or (rounds < most and time.perf_counter() < until):
        for name, timer in timers.items():
            found[name].append(timer())
        rounds += 1
    times: dict[str, Any] = {name: {**summary(each)} for name, each in found.items()}
    for name in times:
        times[name]["of dense"] = times[name]["ms"] / times["dense"]["ms"]
    return {"rounds": rounds, "times": times}


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Both tables. What there is so far is written behind every line."""
    began, smoke = time.perf_counter(), arguments.smoke
    result: dict[str, Any] = {**circumstances(arguments.commit), "layers": [], "prefills": []}
    calls: dict[tuple[str, int], dict[str, Call]] = {}
    for family in arguments.families:
        like = random_model(family, 3, device, smoke)
        for length in arguments.lengths:
            variants: dict[str, Call] = {}
            variants["dense"] = layer(random_model(family, 3, device, smoke, like), length, 1.0)
            for share in arguments.shares:
                model = random_model(family, 3, device, smoke, like)
                variants[f"{share:g} live"] = layer(model, length, share)
            for call in variants.values():
                call()  # compiles
            calls[family, length] = variants
    if device == "cuda":
        torch.cuda.synchronize()
    result["seconds in front"] = time.perf_counter() - began
    left = len(calls) + 4 * len(arguments.families)  # lines; one of prefills counts four
    for (family, length), variants in calls.items():
        now = time.perf_counter()
        end = now + (began + arguments.seconds - now) / left
        left -= 1
        timers = {
            name: in_a_graph(call) if device == "cuda" else on_the_host(call, device)
            for name, call in variants.items()
        }
        line = {"family": family, "length": length, **take_turns(timers, end, arguments.rounds)}
        report(result, "layers", line, arguments.json)
        variants.clear()
        del timers
    for place, family in enumerate(arguments.families):
        start = time.perf_counter()
        length = max(arguments.lengths)
        whole, flops = prefills(family, length, arguments.layers, device, smoke)
        for _ in range(3):  # compiles, captures, replays
            for call in whole.values():
                call()
        now, families = time.perf_counter(), len(arguments.families) - place
        room = began + arguments.seconds - now - (families - 1) * (now - start)  # for all timings
        end = now + room / families
        timers = {name: on_the_host(call, device) for name, call in whole.items()}
        line = {"family": family, "length": length, "layers": arguments.layers}
        line |= take_turns(timers, end, arguments.rounds)
        for name, share in flops.items():
            times = line["times"][name]
            times["flops of dense"] = share
            times["cut of the same time"] = cut_of_the_same_time(line["times"], times["ms"])
        report(result, "prefills", line, arguments.json)
        del whole, timers
        if device == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = time.perf_counter() - began
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def report(result: dict[str, Any], part: str, line: dict[str, Any], path: Path | None) -> None:
    """Print a line, and write everything so far."""
    result[part].append(line)
    what = "a layer of" if part == "layers" else f"a prefill by {line['layers']} layers of"
    print(f"{what} {line['family']}, {line['length']} tokens, {line['rounds']} rounds:")
    for name, times in line["times"].items():
        more = f"  FLOPs {times['flops of dense']:.2f}" if "flops of dense" in times else ""
        if times.get("cut of the same time") is not None:
            more += f"  cut of the same time {times['cut of the same time']:.3f}"
        print(f"  {name:40} {times['ms']:9.3f} ms  {times['of dense']:.2f} of dense{more}")
    sys.stdout.flush()
    if path:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write both tables here")
    parser.add_argument("--seconds", type=float, default=120.0, help="about as long as it may take")
    parser.add_argument("--rounds", type=int, default=MOST, help="timings of a line, at most")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (2048 8192)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of live tokens")
    parser.add_argument("--layers", type=int, default=12, help="layers of the prefills' models")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    arguments = parser.parse_args(given)
    if arguments.lengths is None:
        arguments.lengths = [24, 48] if arguments.smoke else LENGTHS
    return arguments


def main(given: list[str] | None = None) -> None:
    """Run the command."""
    run(parsed(given), measure)


def run(arguments: argparse.Namespace, work: Callable[[argparse.Namespace, str], object]) -> None:
    """Measure on a GPU, or with ``--smoke`` on a CPU."""
    if arguments.smoke:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --smoke runs tiny shapes on a CPU")
    with torch.no_grad():
        work(arguments, "cpu" if arguments.smoke else "cuda")


if __name__ == "__main__":
    main()
