"""Long prompts on a GPU: time and memory by length, in chunks and not, and a prompt cache. One
command:

    python benchmarks/long_prompts.py --out benchmarks/h200-long.json --figure long.png
        [--models 130m 2.8b] [--only prefills first-token] [--lengths 8192 32768] [--seconds 420]

Weights are random, in bfloat16, batch 1. A prefill returns the last token's logits and fills a
cache. All variants of a length run in one process and take turns; the table shows medians. Each
model's weights are on the GPU once: all variants share them, those of mamba-ssm too.

Memory is that of the first prefill of a length, behind a cleared allocator and without CUDA graphs
of earlier prefills. What a chunked prefill captures while it runs is counted.

The results are written after every variant and merged into a file that is there already: another
run replaces what it measures itself. ``--seconds`` is kept by doing fewer rounds. What did not run
is in the file with the reason. ``--smoke`` runs a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import simba
from gpu_prefills import CUT, config_of, our_model, prefill
from limits import SHAPES
from long_summary import WHOLE, in_chunks, summary
from peers import mamba_ssm_model
from results import FirstTokenLine, LongCell, LongLine, LongMemory, LongResult, Times
from simba.evaluate import cut_length
from timing import circumstances, commit
from timing import summary as times_of

TABLES = ["first-token", "prefills"]
LENGTHS = {
    "130m": [8192, 32768, 131072, 1048576],
    "2.8b": [8192, 32768, 131072, 262144],
    "tiny": [96, 384],
}
PEERS = ["transformers", "mamba-ssm with states"]
DENSE, SPARSE = WHOLE
SIMBA = [DENSE, in_chunks(DENSE), SPARSE, in_chunks(SPARSE)]
VARIANTS = [*SIMBA, CUT, *PEERS]
GRAPHS_UP_TO = 32768
"""Longer prompts run as a whole without CUDA graphs: launching hides behind the kernels, and
capturing would take several prefills more. Chunked prefills are left to simba's default."""
WARM = 2
"""Rounds that do not count: a shape is captured when it comes the second time."""
ONCE = 5.0
"""Seconds: a peer's prefill that takes longer is timed once, in the run that measures memory."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's, or those that are ``given``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here (JSON), or merge them")
    parser.add_argument("--figure", type=Path, help="draw the file's results here (PNG)")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables")
    parser.add_argument("--models", nargs="+", choices=LENGTHS, default=["130m", "2.8b"])
    parser.add_argument("--lengths", type=int, nargs="+", help="of prompts (default: by model)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME",
        help=f"of prefills: {', '.join(map(repr, VARIANTS))}",
    )  # fmt: skip
    parser.add_argument("--chunk-size", type=int, default=2048, help="of chunked prefills")
    parser.add_argument("--document", type=int, default=32768, help="tokens of the document")
    parser.add_argument("--question", type=int, default=64, help="tokens of the question")
    parser.add_argument("--seconds", type=float, default=420, help="for all of it")
    parser.add_argument("--rounds", type=int, default=10, help="of timings, at most")
    parser.add_argument("--limit", type=float, default=20, help="seconds of one prefill")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 16),
        help="processes that compile the kernels in front; 0: compile them one by one",
    )  # fmt: skip
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.smoke:
        args.models, args.jobs, args.rounds = ["tiny"], 0, 2
        args.chunk_size, args.document, args.question = 64, 128, 8
    return args


# --- what is measured -----------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to prefill one prompt."""

    model: Any
    ids: Tensor
    config: simba.SimbaConfig | None = None
    """How ``model`` is sparsified; None for peers."""

    def __call__(self) -> object:
        return prefill(self.model, self.ids)

    def forget(self) -> None:
        """Drop the model's CUDA graphs."""
        if self.config is not None:
            simba.sparsify(self.model, self.config)


@dataclass
class Models:
    """The models of one shape, which share their weights."""

    by_name: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)
    """Why others are not there."""

    @classmethod
    def build(cls, shape: str, device: str, chunk_size: int) -> Models:
        stock = our_model(shape, device=device)
        by_name = {"transformers": stock}
        backend = "triton" if device == "cuda" else "auto"
        for name, keep in zip(WHOLE, (1.0, 0.1), strict=True):
            config = simba.SimbaConfig(keep, dense_path="simba", backend=backend)
            by_name[name] = simba.sparsify(our_model(shape, stock), config)
            config = replace(config, chunk_size=chunk_size)
            by_name[in_chunks(name)] = simba.sparsify(our_model(shape, stock), config)
        peer = mamba_ssm_model(shape) if device == "cuda" else None
        if peer is None:
            why = "it is not installed" if device == "cuda" else "it needs a GPU"
            return cls(by_name, {"mamba-ssm with states": f"not run: {why}"})
        share_weights(peer, stock)
        return cls({**by_name, "mamba-ssm with states": peer})

    def variants(self, ids: Tensor, names: list[str]) -> dict[str, Variant]:
        """Prefills of ``ids`` (1, T) by those of the names that are there."""
        made = {}
        for name in names:
            model = self.by_name.get(DENSE if name == CUT else name)
            if model is None:
                continue
            config = config_of(model) if name not in PEERS else None
            if config is not None and config.chunk_size is None:
                graphs = "auto" if ids.shape[1] <= GRAPHS_UP_TO else "never"
                config = replace(config, cuda_graph=graphs)
            tokens = ids
            if name == CUT:
                kept = cut_length(self.by_name[SPARSE], ids.shape[1])
                tokens = ids[:, -kept:].contiguous()
            made[name] = Variant(model, tokens, config)
        return made


def share_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Let a model of mamba-ssm read the weights of transformers'.

    It keeps A and D of its own, which it needs in float32.
    """
    weights = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        mine = weights[name.replace(".embedding.", ".embeddings.")]
        if mine.shape != parameter.shape:
            raise ValueError(f"{name}: {tuple(parameter.shape)} and {tuple(mine.shape)}")
        parameter.data = mine.to(parameter.dtype)  # the same tensor if the dtype is the same


def answer(output: Any) -> int:
    """The first token behind a prompt, on the host."""
    return int(output.logits[0, -1].argmax())


def copied_states(model: Any, document: Tensor) -> Callable[[Tensor], int]:
    """Keep a document's states and ask about them: the plain way, with copies of its cache."""
    states = model(document, use_cache=True, logits_to_keep=1).cache_params

    def ask(question: Tensor) -> int:
        fork = copy.deepcopy(states)
        tokens = question.shape[1]
        return answer(
            model(question, cache_params=fork, use_cache=True, prompt_length=tokens,
                  logits_to_keep=1)
        )  # fmt: skip

    return ask


def prompt_cache(cache: Any, document: Tensor) -> Callable[[Tensor], int]:
    """The same with a `simba.PromptCache`, from the call of its `generate` to the token."""
    cache.prefill(document)

    def ask(question: Tensor) -> int:
        token = int(cache.generate([document, question], max_new_tokens=1)[0, -1])
        if cache.stats.misses != 1:  # the document's own; another would be a cold time
            raise RuntimeError(f"the prompt cache did not find the document: {cache.stats}")
        return token

    return ask


def ways_to_keep(model: Any, document: Tensor) -> dict[str, Callable[[Tensor], int]]:
    """The ways to keep a document's states: of a question (1, T), the first token behind it."""
    ways = {"copied states": copied_states(model, document)}
    new_cache = getattr(simba, "PromptCache", None)
    if new_cache is not None:
        ways["simba.PromptCache"] = prompt_cache(new_cache(model, max_bytes=2**30), document)
    return ways


# --- how it is measured ---------------------------------------------------------------------------


class OvertimeError(Exception):
    """A prefill took longer than its limit."""


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise `OvertimeError` between two steps of Python after so many seconds."""
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise OvertimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object]) -> float:
    """From the call to the end of its last kernel."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def with_memory(call: Callable[[], object], limit: float | None) -> tuple[float, LongMemory | None]:
    """Time and memory of one call behind a cleared allocator; no memory on a CPU.

    Raises:
        OvertimeError: it took more than ``limit`` seconds.
    """
    if not torch.cuda.is_available():
        with at_most(limit):
            return milliseconds(call), None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with at_most(limit):
        taken = milliseconds(call)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return taken, {
        "before_mib": before / 2**20,
        "peak_mib": peak / 2**20,
        "above_mib": (peak - before) / 2**20,
        "reserved_mib": reserved / 2**20,
    }


def take_turns(
    calls: dict[str, Callable[[], object]], warm: int, least: int, most: int, until: float
) -> tuple[dict[str, list[float]], list[str]]:
    """Milliseconds of each call, round by round.

    Args:
        calls: by name.
        warm: rounds in front that do not count.
        least: rounds that are timed in any case.
        most: rounds that are timed.
        until: rounds beyond ``least`` begin only if they are likely to end by then
            (`time.monotonic`).

    Returns:
        The times, and the names of those that ran out of memory. They have fewer times, or none.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    without_memory: list[str] = []
    last = 0.0
    for turn in range(warm + max(least, most)):
        began = time.monotonic()
        if turn >= warm + least and began + last > until:
            break
        for name, call in calls.items():
            if name in without_memory:
                continue
            try:
                taken = milliseconds(call)
            except torch.OutOfMemoryError:
                without_memory.append(name)
                continue
            if turn >= warm:
                times[name].append(taken)
        last = time.monotonic() - began
    return times, without_memory


@dataclass
class Bench:
    """A run: what it has found, and how much time is left."""

    args: argparse.Namespace
    device: str
    result: LongResult
    end: float
    """When the time is over (`time.monotonic`)."""
    planned: dict[tuple[str, int], float] = field(default_factory=dict)
    """The work that is left, by shape and length (0: first tokens); only its proportions count."""
    latest: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    """By shape and variant, the last prefill: its tokens and milliseconds."""

    @property
    def run(self) -> int:
        return len(self.result["runs"]) - 1

    def save(self) -> None:
        """Write the results, whole or not at all."""
        out = self.args.out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            draft = out.with_name(out.name + ".draft")
            draft.write_text(json.dumps(self.result, indent=1) + "\n")
            draft.replace(out)

    def plan(self, shape: str, length: int, tokens: int) -> None:
        size = SHAPES[shape]
        self.planned[shape, length] = tokens * size.layers * size.d_model**2

    def until(self, shape: str, length: int) -> float:
        """When this part of the plan should end: it gets its share of the time that is left."""
        share = self.planned[shape, length] / sum(self.planned.values())
        del self.planned[shape, length]
        now = time.monotonic()
        return now + share * max(self.end - now, 0)

    # --- prefills ---

    def prefills(self, shape: str, length: int, models: Models) -> LongLine:
        """Measure all variants at one length."""
        line = self.line(shape, length)
        until = self.until(shape, length)
        variants = models.variants(self.prompt(length), self.args.variants)
        for variant in variants.values():
            variant.forget()
        repeated: dict[str, Callable[[], object]] = {}
        for name in self.args.variants:
            if name in models.missing:
                self.put(line, name, {"run": self.run, "missing": models.missing[name]})
                continue
            variant = variants[name]
            cell, taken = self.first_run(shape, name, variant)
            if taken is not None and name in PEERS and taken > 1e3 * ONCE:
                self.add_times(cell, [taken], length)
            elif taken is not None:
                repeated[name] = variant
            self.put(line, name, cell)
        warm, least = (WARM, 2) if length <= GRAPHS_UP_TO else (1, 1)
        times, without_memory = take_turns(repeated, warm, least, self.args.rounds, until)
        for name, taken_by_round in times.items():
            cell = line["variants"][name]
            if taken_by_round:
                self.add_times(cell, taken_by_round, length)
                self.latest[shape, name] = cell["tokens"], cell["times"]["ms"]
            if name in without_memory:
                cell["missing"] = "out of memory beside the CUDA graphs of others"
        self.save()
        for variant in variants.values():
            variant.forget()
        return line

    def first_run(self, shape: str, name: str, variant: Variant) -> tuple[LongCell, float | None]:
        """A variant's first prefill, and its milliseconds; None if it didn't come to its end."""
        tokens, limit = variant.ids.shape[1], self.args.limit
        cell: LongCell = {"run": self.run, "tokens": tokens}
        if time.monotonic() > self.end:
            cell["missing"] = f"not started: the run's {self.args.seconds:g} seconds were over"
            return cell, None
        if (shape, name) in self.latest:
            before, ms = self.latest[shape, name]
            predicted = ms / 1e3 * tokens / before
            if predicted > limit:
                cell["missing"] = (
                    f"not started: {predicted:.0f} s expected from {before} tokens, "
                    f"the limit is {limit:g} s"
                )
                return cell, None
        peer = name in PEERS
        try:
            taken, memory = with_memory(variant, limit if peer else None)
        except torch.OutOfMemoryError:
            cell["missing"] = "out of memory"
            return cell, None
        except OvertimeError:
            cell["missing"] = f"stopped after {limit:g} s"
            self.latest[shape, name] = tokens, 1e3 * limit
            return cell, None
        except RuntimeError as error:
            if not peer:
                raise
            cell["missing"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return cell, None
        finally:
            variant.forget()
        if memory is not None:
            cell["memory"] = memory
        self.latest[shape, name] = tokens, taken
        return cell, taken

    def prompt(self, length: int) -> Tensor:
        """(1, length) random tokens."""
        return torch.randint(0, 50000, (1, length), device=self.device)

    def add_times(self, cell: LongCell, taken: list[float], length: int) -> None:
        times = times_of(taken)
        cell["times"], cell["rounds"] = times, len(taken)
        cell["tokens_per_second"] = 1e3 * length / times["ms"]

    def line(self, shape: str, length: int) -> LongLine:
        """The line of a length, an earlier run's if there is one."""
        chunk_size = self.args.chunk_size
        for line in self.result["prefills"]:
            if (line["shape"], line["length"], line["chunk_size"]) == (shape, length, chunk_size):
                return line
        made: LongLine = {
            "shape": shape,
            "length": length,
            "chunk_size": chunk_size,
            "variants": {},
        }
        self.result["prefills"].append(made)
        return made

    def put(self, line: LongLine, name: str, cell: LongCell) -> None:
        """Write a cell, unless an earlier run measured what this one did not come to."""
        earlier = line["variants"].get(name, {})
        if "missing" in cell and "times" in earlier and earlier["run"] != cell["run"]:
            print(f"{name} at {line['length']}: {cell['missing']}; run {earlier['run']}'s stay")
            return
        line["variants"][name] = cell
        self.save()

    # --- first tokens ---

    def first_tokens(self, shape: str, models: Models) -> None:
        """Measure the time to the first token, cold and warm, of every sparsified model.

        The cut is a schedule here: of document and question it reads the last tokens of each.
        """
        until, began = self.until(shape, 0), time.monotonic()
        names = [name for name in [*SIMBA, CUT] if name in self.args.variants]
        document = self.prompt(self.args.document)
        for count, name in enumerate(names, 1):
            if time.monotonic() > self.end:
                print(f"{name}, first token: not started, the run's time is over", flush=True)
                continue
            model = models.by_name[DENSE if name == CUT else name]
            config = config_of(model)
            if name == CUT:
                share = cut_length(models.by_name[SPARSE], document.shape[1]) / document.shape[1]
                simba.sparsify(model, replace(config, final_keep=share, schedule="cut"))
            self.first_token(
                shape, name, model, document, began + count * (until - began) / len(names)
            )
            simba.sparsify(model, config)  # drops its graphs

    def first_token(
        self, shape: str, name: str, model: Any, document: Tensor, until: float
    ) -> None:
        """Measure one model. Every question is a new one, which no cache has seen."""
        length = self.args.question
        ways = ways_to_keep(model, document)

        def cold() -> int:
            both = torch.cat([document, self.prompt(length)], 1)
            return answer(model(both, use_cache=True, logits_to_keep=1))

        calls: dict[str, Callable[[], object]] = {"cold": cold}
        for way, ask in ways.items():
            calls[way] = lambda ask=ask: ask(self.prompt(length))  # type: ignore[misc]
        taken, without_memory = take_turns(calls, WARM, 2, self.args.rounds, until)
        if without_memory:
            raise torch.OutOfMemoryError(f"first token, {name}: {without_memory}")
        times: dict[str, Times] = {way: times_of(values) for way, values in taken.items()}
        line: FirstTokenLine = {
            "run": self.run,
            "shape": shape,
            "variant": name,
            "chunk_size": self.args.chunk_size,
            "document": document.shape[1],
            "question": length,
            "rounds": len(taken["cold"]),
            "cold": times.pop("cold"),
            "warm": times,
        }
        keys = ("shape", "variant", "chunk_size", "document", "question")
        self.result["first_token"] = [
            other
            for other in self.result["first_token"]
            if [other[key] for key in keys] != [line[key] for key in keys]  # type: ignore[literal-required]
        ] + [line]
        self.save()

    # --- all of it ---

    def measure(self) -> None:
        args = self.args
        for shape in args.models:
            if "first-token" in args.only:
                self.plan(shape, 0, args.document)
            for length in self.lengths(shape):
                self.plan(shape, length, length)
        for shape in args.models:
            start = time.monotonic()
            models = Models.build(shape, self.device, args.chunk_size)
            warm_up(models, self.prompt(4 * args.chunk_size + 64), args.variants)
            seconds = time.monotonic() - start
            print(f"{shape}: built and warmed up in {seconds:.0f} s", flush=True)
            if "first-token" in args.only:
                self.first_tokens(shape, models)
            for length in self.lengths(shape):
                print_line(self.prefills(shape, length, models))
            del models
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def lengths(self, shape: str) -> list[int]:
        """Of the table of prefills, in ascending order."""
        wanted = self.args.lengths or LENGTHS[shape]
        return sorted(wanted) if "prefills" in self.args.only else []


def warm_up(models: Models, ids: Tensor, names: list[str]) -> None:
    """Prefill a short prompt with each variant, so that the first that counts finds its kernels."""
    for name, variant in models.variants(ids, names).items():
        if name in PEERS:
            variant.ids = ids[:, :64]
        try:
            variant()
            variant()  # captured: what the libraries keep for a capture's stream is made now
        except RuntimeError as error:
            if name not in PEERS:
                raise
            print(f"{name}, 64 tokens: {error}", flush=True)
        variant.forget()


def compile_kernels(args: argparse.Namespace, device: str) -> None:
    """What a process in front does: run what it is given once, to fill Triton's cache."""
    for shape in args.models:
        models = Models.build(shape, device, args.chunk_size)
        for length in args.lengths:
            ids = torch.randint(0, 50000, (1, length), device=device)
            for name, variant in models.variants(ids, args.variants).items():
                variant()
                if name in SIMBA and "first-token" in args.only:
                    for ask in ways_to_keep(variant.model, ids).values():
                        ask(ids[:, : args.question])
        synchronise()


def compile_in_front(args: argparse.Namespace) -> None:
    """Let processes compile the kernels, one for each model and variant, ``--jobs`` at a time."""
    waiting = [
        (shape, name) for shape in args.models for name in args.variants if name != "transformers"
    ]
    lengths = [8192, 32768] if args.lengths is None else args.lengths
    short = [str(length) for length in lengths if length <= GRAPHS_UP_TO] or ["8192"]
    running: list[subprocess.Popen[bytes]] = []
    start = time.monotonic()
    try:
        while waiting or running:
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode != 0:
                    print(f"failed ({process.returncode}): {process.args!r}", flush=True)
            while waiting and len(running) < args.jobs:
                shape, name = waiting.pop(0)
                command = [sys.executable, __file__, "--compile-only", "--models", shape]
                command += ["--variants", name, "--lengths", *short, "--only", *args.only]
                command += ["--chunk-size", str(args.chunk_size)]
                command += ["--question", str(args.question), *["--smoke"] * args.smoke]
                running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
    print(f"kernels compiled in front in {time.monotonic() - start:.0f} s", flush=True)


def print_line(line: LongLine) -> None:
    print(f"\n{line['shape']}, {line['length']} tokens", flush=True)
    for name in VARIANTS:
        if name not in line["variants"]:
            continue
        cell = line["variants"][name]
        text = f"  {name:44}"
        if "times" in cell:
            text += f" {cell['times']['ms']:10.2f} ms {cell['tokens_per_second']:12.0f} tokens/s"
            text += f" ({cell['rounds']} rounds)"
        if "memory" in cell:
            memory = cell["memory"]
            text += f"  peak {memory['peak_mib']:7.0f} MiB, above {memory['above_mib']:7.0f}"
            text += f", reserved {memory['reserved_mib']:7.0f}"
        print(text + (f"  {cell['missing']}" if "missing" in cell else ""), flush=True)


def main(given: list[str] | None = None) -> None:
    start = time.monotonic()
    args = arguments(given)
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("no GPU here; --smoke runs a tiny model on a CPU")
    if args.figure is not None:  # fails now rather than after minutes of measuring
        from plot_long_prompts import draw

    import transformers

    transformers.logging.set_verbosity_error()
    device = "cpu" if args.smoke else "cuda"
    with torch.no_grad():
        if args.compile_only:
            compile_kernels(args, device)
            return
        result: LongResult = {"runs": [], "prefills": [], "first_token": []}
        if args.out is not None and args.out.exists():
            result = json.loads(args.out.read_text())
            if set(result) != set(LongResult.__annotations__):
                sys.exit(f"{args.out} is not a file of this benchmark")
        result["runs"].append(circumstances(args.commit))
        print(json.dumps(result["runs"][-1]), flush=True)
        if args.jobs > 0:
            compile_in_front(args)
        Bench(args, device, result, start + args.seconds).measure()
    print("\n" + "\n".join(summary(result)), flush=True)
    if args.figure is not None:
        draw(result, args.figure)
        print(args.figure)


if __name__ == "__main__":
    main()
