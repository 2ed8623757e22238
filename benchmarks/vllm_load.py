"""Mamba in vLLM under load, on one GPU: stock, and with our plugin dense and pruned. One command:

    python benchmarks/vllm_load.py [--shape 2.8b] [--json load.json] [--figure load.png]

Weights are random. Each variant has an engine in a process of its own; all of them start at once,
and then take turns, one at work at a time, round after round. The engines' settings are the same;
prompts are prefilled whole. Variants:

- ``vLLM``: vLLM's own model.
- ``simba dense``: the plugin at ``simba_final_keep`` 1.0, on simba's scan.
- ``keep 0.1``: pruned.
- ``cut for 0.1``: ``simba dense`` on the prompt's last tokens, as many as cost the FLOPs of pruning
  the whole prompt. Whoever prunes could do this instead.

A number of requests are always in flight: when one has its answer, the next one is sent, until all
are through. ``ttft_ms`` is from sending a request to its first token. ``tokens_per_s`` counts the
prompts' tokens, over the whole run with its answers; cut prompts count as whole ones.

``--smoke`` runs a tiny model on vLLM's CPU build, which has no Mamba-1 of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import simba
from gpu_prefills import our_config, our_model
from limits import SHAPES
from results import LoadRun, VllmLoadCell, VllmLoadResult
from simba.evaluate import cut_length
from timing import circumstances, commit, version_of

STOCK, DENSE = "vLLM", "simba dense"


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Of every engine."""
    longest = max(options.lengths) + options.answer
    found = {
        "dtype": "float32" if options.smoke else "bfloat16",
        "max_model_len": longest,
        "max_num_batched_tokens": max(options.step_tokens, longest),
        "max_num_seqs": max(options.concurrency),
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "enforce_eager": options.smoke or options.eager,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if not options.smoke:  # several engines share the GPU, and none may measure what is free
        room = 16 if SHAPES[options.shape].mamba2 else 4  # GiB of states
        found |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": room << 30}
    return found


def randomise(model: Any) -> None:
    """Weights of the usual size in the place of vLLM's, which are all but zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".A"):  # a rate for each state, in Mamba-2 for each head
                rates = torch.arange(weight.shape[-1]) % 16 + 1
                weight.copy_(-rates.expand_as(weight))
            elif name.endswith(("dt_proj.bias", "dt_bias")):
                steps = torch.empty(weight.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                weight.copy_(torch.log(torch.expm1(steps)))
            elif name.endswith("embeddings.weight"):
                weight.normal_()
            elif weight.dim() == 1:
                weight.fill_(0 if name.endswith("bias") else 1)
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)


def serve(connection: Any, settings: dict[str, Any], overrides: dict[str, Any]) -> None:
    """The process of one engine: start it, then answer each (prompts, concurrency, answer)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm import EngineArgs, LLMEngine

        start = time.perf_counter()
        engine = LLMEngine.from_engine_args(EngineArgs(hf_overrides=overrides, **settings))
        engine.apply_model(randomise)
        connection.send({"started": time.perf_counter() - start})
        while True:
            connection.send(load(engine, *connection.recv()))
    except BaseException:
        connection.send({"error": traceback.format_exc()})
        raise


def load(engine: Any, prompts: list[list[int]], concurrency: int, answer: int) -> dict[str, Any]:
    """Send all prompts, so many at a time."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    finished: dict[str, list[int]] = {}
    begin = time.perf_counter()
    while len(finished) < len(prompts):
        while len(sent) < len(prompts) and len(sent) - len(finished) < concurrency:
            name = str(len(sent))
            sent[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": prompts[int(name)]}, sampling)
        for output in engine.step():
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, time.perf_counter())
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - begin
    short = [name for name, tokens in finished.items() if len(tokens) != answer]
    assert not short and first.keys() == sent.keys(), f"requests without their answer: {short}"
    return {
        "seconds": seconds,
        "ttft": [first[name] - sent[name] for name in sent],
        "tokens": [finished[name] for name in sent],
    }


class Engine:
    """The process of one engine, seen from the process that measures."""

    def __init__(
        self, name: str, settings: dict[str, Any], overrides: dict[str, Any], wait: float
    ) -> None:
        context = get_context("spawn")
        self.name, self.wait = name, wait
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, settings, overrides), daemon=True)
        self.process.start()
        other.close()

    def receive(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the engine failed, or it takes too long.
        """
        if not self.connection.poll(self.wait):
            raise RuntimeError(f"{self.name}: no answer in {self.wait:g} s")
        try:
            found = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process ended") from None
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}")
        return found

    def run(self, prompts: list[list[int]], concurrency: int, answer: int) -> dict[str, Any]:
        """One load."""
        self.connection.send((prompts, concurrency, answer))
        found: dict[str, Any] = self.receive()
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def cut_lengths(shape: str, device: str, keep: float, lengths: list[int]) -> dict[int, int]:
    """Tokens that the dense model reads for the FLOPs of pruning, by length."""
    model = simba.sparsify(our_model(shape, device=device), final_keep=keep)
    return {length: cut_length(model, length) for length in lengths}


def summed_up(runs: list[dict[str, Any]], length: int) -> LoadRun:
    """All rounds of a load together."""
    waits = sorted(1e3 * each for run in runs for each in run["ttft"])
    rates = [length * len(run["ttft"]) / run["seconds"] for run in runs]
    return {
        "ttft_ms": statistics.median(waits),
        "ttft_p90_ms": waits[min(len(waits) - 1, int(0.9 * len(waits)))],
        "tokens_per_s": statistics.median(rates),
        "rounds_tokens_per_s": rates,
    }


def print_cell(cell: VllmLoadCell) -> None:
    print(f"{cell['length']} tokens, {cell['concurrency']} at a time, {cell['requests']} requests")
    stock = cell["runs"].get(STOCK)
    for name, run in cell["runs"].items():
        text = (
            f"      {name:14} first token {run['ttft_ms']:9.1f} ms (p90 {run['ttft_p90_ms']:9.1f})"
        )
        text += f"  {run['tokens_per_s']:9.0f} tokens/s"
        if stock is not None and name != STOCK:
            text += f"   {run['tokens_per_s'] / stock['tokens_per_s']:.2f} x {STOCK}'s"
            text += f", first token {run['ttft_ms'] / stock['ttft_ms']:.2f} x"
        print(text)
    sys.stdout.flush()


def draw(result: VllmLoadResult, path: Path) -> None:
    """Time to first token, and prompt tokens a second, over the requests in flight."""
    from matplotlib.figure import Figure

    lengths = sorted({cell["length"] for cell in result["cells"]})
    figure = Figure(figsize=(4.2 * len(lengths), 6))
    grid = figure.subplots(2, len(lengths), squeeze=False, sharex=True, sharey="row")
    for column, length in enumerate(lengths):
        cells = [cell for cell in result["cells"] if cell["length"] == length]
        cells.sort(key=lambda cell: cell["concurrency"])
        for name in dict.fromkeys(name for cell in cells for name in cell["runs"]):
            have = [cell for cell in cells if name in cell["runs"]]
            x = [cell["concurrency"] for cell in have]
            style = "o--" if name.startswith("cut") else "o-"
            waits = [cell["runs"][name]["ttft_ms"] for cell in have]
            rates = [cell["runs"][name]["tokens_per_s"] for cell in have]
            grid[0][column].plot(x, waits, style, label=name)
            grid[1][column].plot(x, rates, style, label=name)
        grid[0][column].set(title=f"prompts of {length} tokens", yscale="log")
        grid[1][column].set(xlabel="requests in flight", xscale="log")
        grid[1][column].set_xticks([cell["concurrency"] for cell in cells])
        grid[1][column].set_xticklabels([str(cell["concurrency"]) for cell in cells])
        grid[1][column].minorticks_off()
    grid[1][0].set_ylim(bottom=0)  # of all columns
    grid[0][0].set_ylabel("first token, ms (median)")
    grid[1][0].set_ylabel("prompt tokens a second")
    grid[1][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['shape']} shape, vLLM {result['vllm']}, {result['gpu']}", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def write(result: VllmLoadResult, options: argparse.Namespace) -> None:
    """Numbers and figure so far. Whoever is killed in the middle leaves the files as they were."""
    if options.json:
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(options.json)
    if options.figure:
        part = options.figure.with_name("part." + options.figure.name)
        draw(result, part)
        part.replace(options.figure)


def started(
    options: argparse.Namespace, config: Any, failed: list[str]
) -> tuple[dict[str, Engine], dict[str, float]]:
    """The engines that start, and how many seconds they took."""
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    settings = {"model": folder, **settings_of(options)}
    ways: dict[str, dict[str, Any]] = {} if options.smoke else {STOCK: {}}
    short = {"simba_min_tokens": 16} if options.smoke else {}
    for name, keep in ((DENSE, 1.0), *((f"keep {keep:g}", keep) for keep in options.keeps)):
        ways[name] = {"simba_final_keep": keep, **short}
    engines = {
        name: Engine(name, settings, overrides, options.wait) for name, overrides in ways.items()
    }
    seconds = {}
    for name, engine in list(engines.items()):
        try:
            seconds[name] = engine.receive()["started"]
        except RuntimeError as error:
            failed.append(name)
            print(f"FAILED {error}", flush=True)
            engines.pop(name).stop()
    return engines, seconds


def measure(
    options: argparse.Namespace, engines: dict[str, Engine], cuts: dict[float, dict[int, int]],
    length: int, concurrency: int, failed: list[str],
) -> VllmLoadCell:  # fmt: skip
    """One load on all engines, in turns."""
    requests = max(options.least, math.ceil(options.times * concurrency))
    generator = torch.Generator().manual_seed(length + concurrency)
    ids = torch.randint(0, options.vocabulary, (requests, length), generator=generator).tolist()
    calls: dict[str, tuple[Engine, int]] = {name: (each, length) for name, each in engines.items()}
    if DENSE in engines:
        calls |= {f"cut for {keep:g}": (engines[DENSE], at[length]) for keep, at in cuts.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        for name, (engine, last) in calls.items():
            if name not in runs:
                continue
            part = ids if turn else ids[: min(concurrency, options.warm)]  # these compile
            try:
                prompts = [prompt[-last:] for prompt in part]
                found = engine.run(prompts, concurrency, options.answer)
            except (RuntimeError, OSError) as error:  # the other engines go on
                failed.append(f"{name}, {length} x {concurrency}")
                print(f"FAILED {error}", flush=True)
                runs.pop(name)
                engine.stop()
                engines.pop(engine.name, None)
                continue
            if turn:
                runs[name].append(found)
    return {
        "length": length, "concurrency": concurrency, "requests": requests,
        "cut": {f"{keep:g}": at[length] for keep, at in cuts.items()},
        "runs": {name: summed_up(each, length) for name, each in runs.items()},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run all loads; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description="vLLM under load, stock and with simba's plugin")
    parser.add_argument("--shape", default="2.8b", choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--keeps", nargs="*", type=float, default=[0.1])
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--step-tokens", type=int, default=8192, help="of a step, or more")
    parser.add_argument("--times", type=float, default=1.5, help="requests for each in flight")
    parser.add_argument("--least", type=int, default=4, help="requests of a load at least")
    parser.add_argument("--warm", type=int, default=8, help="requests before, at most")
    parser.add_argument("--rounds", type=int, default=1, help="of each load")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no load after these")
    parser.add_argument(
        "--wait", type=float, default=900, help="seconds that an engine may take to start or answer"
    )
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU, without vLLM's own")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--figure", type=Path, help="where to draw them")
    parser.add_argument("--redraw", type=Path, help="draw this file's numbers, and run nothing")
    parser.add_argument("--commit", default=commit(), help="to note in the JSON file")
    options = parser.parse_args(arguments)
    if options.redraw:
        if options.figure is None:
            parser.error("--redraw needs --figure")
        draw(json.loads(options.redraw.read_text(encoding="utf-8")), options.figure)
        return 0
    begin = time.perf_counter()
    shape, device = ("tiny", "cpu") if options.smoke else (options.shape, "cuda")
    config = our_config(shape)
    kind = "Mamba2" if SHAPES[shape].mamba2 else "Mamba"
    config.architectures = [f"{kind}ForCausalLM"]
    options.vocabulary = config.vocab_size
    cuts = {keep: cut_lengths(shape, device, keep, options.lengths) for keep in options.keeps}
    if device == "cuda":
        torch.cuda.empty_cache()
    print(f"tokens of cut prompts: {cuts}", flush=True)
    failed: list[str] = []
    engines, seconds = started(options, config, failed)
    print(f"engines started in {seconds} s", flush=True)
    result: VllmLoadResult = {
        **circumstances(options.commit), "vllm": version_of("vllm"), "shape": options.shape,
        "settings": settings_of(options), "answer": options.answer, "started": seconds,
        "cells": [], "failed": failed,
    }  # fmt: skip
    try:
        for concurrency in options.concurrency:
            for length in options.lengths:
                if time.perf_counter() - begin > options.seconds:
                    failed.append(f"{length} x {concurrency}: no time left")
                    continue
                cell = measure(options, engines, cuts, length, concurrency, failed)
                result["cells"].append(cell)
                print_cell(cell)
                write(result, options)
    finally:
        for engine in engines.values():
            engine.stop()
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
