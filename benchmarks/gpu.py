"""Kernels and whole prefills on a GPU: ours, mamba-ssm's, transformers'. One command:

    python benchmarks/gpu.py --json benchmarks/h100.json
        [--only kernels select prefill families crossover]

Random weights, bfloat16. All variants of a line run side by side in one process, taking turns;
medians, with the 20th and 80th percentile in the JSON file. Kernels are timed in CUDA graphs, so
that launching them doesn't count; prefills as a user calls them, from the call to the synchronised
last-token logits. mamba-ssm and transformers are left out where they are not installed.

Beside every prefill stands the arithmetic limit: matrix products at the rate measured here, one
exponential per channel, state and token on the special-function units, and the bytes of the
convolution, the norm and the residual at the bandwidth measured here; and the GPU's clock and power
while the prefill follows itself.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import simba
from simba import ops

SHAPES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
    "mamba2-2.7b": (2560, 64),
    "falcon-mamba-7b": (4096, 64),
}
"""d_model and layers. Mamba-2: heads of 64, 128 states, one group."""
VOCAB = 50280
KERNEL_LENGTHS = [512, 1024, 1100, 2047, 2048, 2049, 3000, 4096, 8192, 32768]
SELECTIONS = [  # batch, length
    *[(1, length) for length in (512, 1024, 2048, 4096, 8192, 12288, 16384, 32768, 131072, 2**20)],
    *[(8, length) for length in (512, 2048, 3072, 4096, 8192, 131072, 2**20)],
]
PREFILLS = [  # shape, batch, length
    ("2.8b", 1, 512),
    ("2.8b", 1, 2048),
    ("2.8b", 1, 8192),
    ("2.8b", 1, 32768),
    ("2.8b", 8, 2048),
    ("130m", 1, 2048),
    ("130m", 1, 8192),
]
FAMILIES = [("mamba2-2.7b", 1, 2048), ("mamba2-2.7b", 1, 8192), ("falcon-mamba-7b", 1, 8192)]
KEEPS = [0.1, 0.3, 0.5]
LAUNCHING = ["transformers", "mamba-ssm fused"]
"""Who wait for the CPU at short prompts: timed once more from CUDA graphs that we capture for them,
which says what their kernels take on any host."""
WATCHED = ["simba dense", "simba 0.1", "mamba-ssm fused"]
"""Whose clocks and power are looked at."""
DEVICE = "cuda"
Times = dict[str, float]


def summary(milliseconds: list[float]) -> Times:
    ordered = sorted(milliseconds)
    pick = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"ms": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def captured(call: Callable[[], Any], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """So many calls in one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def time_kernels(variants: dict[str, Callable[[], Any]], rounds: int = 10) -> dict[str, Times]:
    """Each variant captured several times into one graph; the graphs take turns."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in variants.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
        end.synchronize()
        repeats = max(1, min(20, int(4.0 / max(start.elapsed_time(end), 0.01))))
        graphs[name] = (captured(call, repeats), repeats)
        graphs[name][0].replay()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (graph, repeats) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / repeats)
    return {name: summary(values) for name, values in times.items()}


def time_calls(variants: dict[str, Callable[[], Any]], rounds: int = 10) -> dict[str, Times]:
    """From the call to the end of its last kernel, on the host's clock."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 3):
        for name, call in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(values) for name, values in times.items()}


def asking_for(fields: str) -> list[str]:
    """nvidia-smi's command that prints them, without names and units."""
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def rates() -> dict[str, float]:
    """What this GPU reaches: bf16 matrix products (FLOP/s), copies (bytes/s, read and written),
    exponentials (1/s: 16 a clock and multiprocessor)."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = time_kernels({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    answer = subprocess.run(asking_for("clocks.max.sm"), capture_output=True, text=True)
    clock = float(answer.stdout.split()[0])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "flops": 2 * 8192**3 / (times["product"]["ms"] / 1e3),
        "bytes": 2 * source.numel() / (times["copy"]["ms"] / 1e3),
        "exponentials": 16 * processors * clock * 1e6,
    }


def clocks(call: Callable[[], Any], seconds: float = 1.0) -> Times:
    """Median clock (MHz) and power (W) of the GPU while a call follows itself: at its power's limit
    only fewer instructions and bytes make anything faster."""
    command = [*asking_for("clocks.sm,power.draw"), "-lms", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
            torch.cuda.synchronize()
        watch.terminate()
        samples = [line.split(",") for line in watch.communicate()[0].splitlines()]
    late = [sample for sample in samples[len(samples) // 2 :] if len(sample) == 2]
    if not late:
        return {}
    mhz, watts = zip(*late, strict=True)
    return {
        "mhz": statistics.median(map(float, mhz)),
        "watts": statistics.median(map(float, watts)),
    }


# --- kernels --------------------------------------------------------------------------------------


def scan_inputs(batch: int, length: int, d_inner: int, d_state: int = 16) -> dict[str, Any]:
    """As in a layer: z is half of a projection, B and C lie behind dt's low rank; A as initialised,
    steps of 0.001 to 0.1."""
    half = {"device": DEVICE, "dtype": torch.bfloat16}
    rank = d_inner // 32
    states = torch.arange(1, d_state + 1, device=DEVICE, dtype=torch.float32)
    steps = torch.exp(torch.empty(d_inner, device=DEVICE).uniform_(-6.9, -2.3))
    projected = torch.randn(batch, length, rank + 2 * d_state, **half)
    return {
        "x": torch.randn(batch, length, d_inner, **half),
        "dt": 0.3 * torch.randn(batch, length, d_inner, **half),
        "A": -states.repeat(d_inner, 1),
        "B": projected[..., rank : rank + d_state],
        "C": projected[..., rank + d_state :],
        "D": torch.ones(d_inner, device=DEVICE),
        "z": torch.randn(batch, length, 2 * d_inner, **half)[..., d_inner:],
        "dt_bias": torch.log(torch.expm1(steps)).to(torch.bfloat16),
    }


def our_scan(i: dict[str, Any], **options: Any) -> Callable[[], Any]:
    positional = [i[name] for name in ("x", "dt", "A", "B", "C", "D", "z")]
    return lambda: ops.selective_scan(
        *positional, dt_bias=i["dt_bias"], backend="triton", **options
    )


def our_score(i: dict[str, Any], **options: Any) -> Callable[[], Any]:
    positional = [i[name] for name in ("x", "dt", "A", "B", "C")]
    return lambda: ops.influence(*positional, dt_bias=i["dt_bias"], backend="triton", **options)


def peer_scan(i: dict[str, Any]) -> Callable[[], Any] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    u, dt, B, C, z = (i[name].transpose(1, 2).contiguous() for name in ("x", "dt", "B", "C", "z"))
    bias = i["dt_bias"].float()
    return lambda: selective_scan_fn(u, dt, i["A"], B, C, i["D"], z, bias, True, True)


def kernel_variants(d_inner: int, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    i = scan_inputs(batch, length, d_inner)
    slow = {**i, "A": 0.001 * i["A"]}
    keep = torch.full((batch, 1), int(0.95 * length), device=DEVICE)
    first, anchor = torch.zeros_like(keep), torch.full_like(keep, length - 1)
    scores = our_score(i)()
    rows = ops.select(scores, keep, int(keep[0]), first=first, anchor=anchor)
    width, d_model = rows.shape[1], d_inner // 2
    residual = torch.randn(batch, length, d_model, device=DEVICE)
    whole = torch.randn(batch, length, d_model, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(d_model, device=DEVICE, dtype=torch.bfloat16)
    taps = torch.randn(d_inner, 4, device=DEVICE, dtype=torch.bfloat16)
    bias = taps[:, 0].contiguous()

    def select() -> Any:
        return ops.select(scores, keep, width, first=first, anchor=anchor, backend="triton")

    def gather() -> Any:
        return ops.gather_add_norm(
            residual, whole, rows, weight, 1e-5, picked=False, backend="triton"
        )

    def add() -> Any:  # what a dense layer does as well
        return ops.gather_add_norm(residual, whole, None, weight, 1e-5, backend="triton")

    def convolve() -> Any:
        return ops.causal_conv1d(i["z"], taps, bias, activation="silu", backend="triton")

    variants = {
        "scan": our_scan(i),
        "scan, survivors": our_scan(i, rows=rows, targets=ops.inverse(rows, length)),
        "score": our_score(i),
        "score, bias in decay": our_score(i, bias_in_decay=True),
        "score, slow decays": our_score(slow),
        "select": select,
        "gather, add, norm": gather,
        "add, norm": add,
        "convolution": convolve,
    }
    peer = peer_scan(i)
    return variants if peer is None else {**variants, "mamba-ssm scan": peer}


def kernel_table(rounds: int) -> list[dict[str, Any]]:
    table = []
    for d_inner, batch, lengths in (
        (5120, 1, KERNEL_LENGTHS),
        (5120, 8, [2048]),
        (1536, 1, [1100, 2048, 8192]),
    ):
        for length in lengths:
            with torch.no_grad():
                times = time_kernels(kernel_variants(d_inner, batch, length), rounds)
            table.append({"d_inner": d_inner, "batch": batch, "length": length, "times": times})
            tokens = batch * length
            print(
                f"D {d_inner} {batch} x {length:6}  ns a token: "
                + "  ".join(f"{k} {1e6 * v['ms'] / tokens:.1f}" for k, v in times.items()),
                flush=True,
            )
    return table


def select_table(which: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """The two ways to select, and which one `select` takes."""
    from simba.ops.triton import selection as kernels

    table = []
    for batch, length in which:
        scores = torch.randn(batch, length, dtype=torch.float64, device=DEVICE).mul_(20).exp_()
        keep = torch.full((batch, 1), int(0.95 * length), device=DEVICE)
        ends = torch.zeros_like(keep), torch.full_like(keep, length - 1)
        positions = torch.arange(length, device=DEVICE).expand(batch, length)

        def selecting(most: int) -> Callable[[], Any]:
            def select() -> Any:
                before, kernels.MOST_COMPARISONS = kernels.MOST_COMPARISONS, most
                try:
                    return kernels.select(scores, keep, width, *ends, positions)  # noqa: B023
                finally:
                    kernels.MOST_COMPARISONS = before

            return select

        width = int(keep[0])
        variants = {"select": selecting(kernels.MOST_COMPARISONS), "by digits": selecting(-1)}
        if batch * length**2 <= 2**36:  # 13 ms
            variants["by comparing"] = selecting(2**62)
        answers = [variant()[0] for variant in variants.values()]
        agree = all(torch.equal(answer, answers[0]) for answer in answers)
        times = time_kernels(variants, rounds)
        table.append({"batch": batch, "length": length, "agree": agree, "times": times})
        tokens = batch * length
        print(
            f"select {batch} x {length:7}  ns a token: "
            + "  ".join(f"{k} {1e6 * v['ms'] / tokens:.2f}" for k, v in times.items())
            + ("" if agree else "  THEY DISAGREE"),
            flush=True,
        )
    return table


# --- prefills -------------------------------------------------------------------------------------


def our_config(shape: str) -> Any:
    import transformers as hf

    d_model, layers = SHAPES[shape]
    sizes = {"hidden_size": d_model, "num_hidden_layers": layers}
    if shape.startswith("mamba2"):
        heads = 2 * d_model // 64
        return hf.Mamba2Config(
            vocab_size=VOCAB, num_heads=heads, head_dim=64, state_size=128, n_groups=1, **sizes
        )
    if shape.startswith("falcon"):
        return hf.FalconMambaConfig(vocab_size=65024, time_step_rank=d_model // 16, **sizes)
    return hf.MambaConfig(vocab_size=VOCAB, **sizes)


def our_model(shape: str, like: Any = None) -> Any:
    """A transformers model with random weights, or with another's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE if like is None else "meta"):
        model = AutoModelForCausalLM.from_config(our_config(shape), dtype=torch.bfloat16)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
        for mine, theirs in zip(model.modules(), like.modules(), strict=True):
            mine._buffers.update(theirs._buffers)
    return model.eval()


def peer_model(shape: str) -> Any:
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    if shape.startswith("falcon"):
        return None  # not among mamba-ssm's models; transformers runs on its kernels
    d_model, layers = SHAPES[shape]
    options = {"ssm_cfg": {"layer": "Mamba2"}} if shape.startswith("mamba2") else {}
    config = MambaConfig(d_model=d_model, n_layer=layers, vocab_size=VOCAB, **options)
    return MambaLMHeadModel(config, device=DEVICE, dtype=torch.bfloat16).eval()


def limit(shape: str, batch: int, length: int, keep: float, rate: dict[str, float]) -> float:
    """Milliseconds that the arithmetic takes at least (see the module's docstring)."""
    d_model, layers = SHAPES[shape]
    d_inner, d_state, rank = 2 * d_model, 16, -(-d_model // 16)
    products = 2 * (3 * d_model * d_inner + d_inner * (rank + 2 * d_state) + rank * d_inner)
    exponentials = d_inner * d_state
    if shape.startswith("mamba2"):  # the recurrence is products too: its state in and out
        products = 2 * (3 * d_model * d_inner + d_model * 256 + 2 * d_inner * 128)
        exponentials = 0
    scan = max(exponentials / rate["exponentials"], 8 * d_inner / rate["bytes"])
    rest = (4 * d_inner + 12 * d_model) / rate["bytes"]
    config = simba.SimbaConfig(final_keep=keep)
    tokens = batch * sum(float(ratio) * length for ratio in config.ratios(layers))
    return 1e3 * tokens * (products / rate["flops"] + scan + rest)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Memory that a call takes at most, above what is there before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def prefill(model: Any, ids: torch.Tensor, states: bool = True) -> Any:
    """Last token's logits; as generation begins, or without the ``states`` that it goes on from."""
    if not hasattr(model.config, "d_model"):
        return model(ids, use_cache=states, logits_to_keep=1).logits
    if not states:
        return model(ids, num_last_tokens=1)
    from mamba_ssm.utils.generation import InferenceParams

    batch, length = ids.shape
    return model(ids, num_last_tokens=1, inference_params=InferenceParams(length, batch))


def prefill_variants(
    models: dict[str, Any], peer: Any, batch: int, length: int
) -> dict[str, Callable[..., Any]]:
    ids = torch.randint(0, 50000, (batch, length), device=DEVICE)
    variants: dict[str, Callable[..., Any]] = {
        name: partial(prefill, model, ids) for name, model in models.items()
    }
    if length > 16384:  # more than a minute otherwise
        variants.pop("transformers", None)
    if peer is not None:
        variants["mamba-ssm fused"] = partial(prefill, peer, ids, states=False)
        variants["mamba-ssm with states"] = partial(prefill, peer, ids)
    return variants


def prefill_lines(
    shape: str,
    lines: list[tuple[int, int]],
    keeps: list[float],
    rate: dict[str, float],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    models: dict[str, Any] = {"transformers": our_model(shape)}
    ratios = {"simba dense": 1.0, **{f"simba {keep:g}": keep for keep in keeps}}
    for name, keep in ratios.items():
        model = our_model(shape, models["transformers"])
        models[name] = simba.sparsify(model, keep, backend="triton")
    peer = peer_model(shape)
    if peer is not None:  # mamba-ssm's own model, pruned
        for keep in keeps[:1]:
            name = f"simba {keep:g} on mamba-ssm"
            models[name] = simba.sparsify(peer_model(shape), keep, backend="triton")
            ratios[name] = keep
    for batch, length in lines:
        line: dict[str, Any] = {
            "shape": shape, "batch": batch, "length": length,
            "peak_mib": {}, "peak_mib_without_states": {},
        }  # fmt: skip
        variants = prefill_variants(models, peer, batch, length)
        for name, variant in list(variants.items()):
            try:
                variant()
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory at {batch} x {length}", flush=True)
                del variants[name]
                continue
            if name in ratios:  # without a graph, whose memory is not on the books
                config = simba.status(models[name]).config
                simba.sparsify(models[name], config_without_graph(config))
                variant()
                line["peak_mib"][name] = peak_bytes(variant) / 2**20
                bare = partial(variant, states=False)
                line["peak_mib_without_states"][name] = peak_bytes(bare) / 2**20
                simba.sparsify(models[name], config)
            else:
                line["peak_mib"][name] = peak_bytes(variant) / 2**20
        for name in LAUNCHING:
            if name in variants:
                try:
                    variants[f"{name}, in a graph"] = captured(variants[name]).replay
                except RuntimeError as error:
                    print(f"{name}: no graph at {batch} x {length}: {error}", flush=True)
        line["times"] = time_calls(variants, rounds)
        line["clocks"] = {name: clocks(variants[name]) for name in WATCHED if name in variants}
        line["limit_ms"] = {
            name: limit(shape, batch, length, keep, rate) for name, keep in ratios.items()
        }
        print_prefill(line)
        yield line
        for name in ratios:
            simba.sparsify(models[name], simba.status(models[name]).config)  # drops its graphs


def prefill_table(
    which: list[tuple[str, int, int]], keeps: list[float], rate: dict[str, float], rounds: int
) -> Iterator[dict[str, Any]]:
    for shape in dict.fromkeys(shape for shape, _, _ in which):
        lines = [(batch, length) for name, batch, length in which if name == shape]
        with torch.no_grad():
            yield from prefill_lines(shape, lines, keeps, rate, rounds)
        gc.collect()
        torch.cuda.empty_cache()


def config_without_graph(config: simba.SimbaConfig) -> simba.SimbaConfig:
    return simba.SimbaConfig.from_dict({**config.to_dict(), "cuda_graph": "never"})


def print_prefill(line: dict[str, Any]) -> None:
    print(f"\n{line['shape']}, {line['batch']} x {line['length']}", flush=True)
    times = line["times"]
    fused = times.get("mamba-ssm fused", {}).get("ms")
    dense, peaks = times["simba dense"]["ms"], line["peak_mib"]
    bare = line["peak_mib_without_states"]
    for name, values in times.items():
        bound = line["limit_ms"].get(name)
        print(
            f"  {name:28} {values['ms']:8.2f} ms"
            + (f"  {fused / values['ms']:5.2f} x mamba-ssm fused" if fused else "")
            + f"  {dense / values['ms']:5.2f} x our dense"
            + (f"  peak {peaks[name]:7.0f} MiB" if name in peaks else "")
            + (f" ({bare[name]:.0f} without states)" if name in bare else "")
            + (f"  limit {bound:7.2f} ms" if bound else "")
            + "".join(f"  {v:.0f} {k}" for k, v in line["clocks"].get(name, {}).items()),
            flush=True,
        )


def crossover_table(rounds: int) -> list[dict[str, Any]]:
    """Where pruning begins to pay: our dense against our sparse at short prompts."""
    table = []
    for shape in ("130m", "2.8b"):
        models = {
            name: simba.sparsify(our_model(shape), keep, backend="triton")
            for name, keep in (("simba dense", 1.0), ("simba 0.1", 0.1))
        }
        for length in (64, 128, 256, 512, 1024):
            with torch.no_grad():
                times = time_calls(prefill_variants(models, None, 1, length), rounds)
            table.append({"shape": shape, "batch": 1, "length": length, "times": times})
            dense, sparse = (times[name]["ms"] for name in models)
            print(
                f"{shape} 1 x {length}: dense {dense:.2f} ms, final_keep=0.1 {sparse:.2f} ms, "
                f"{dense / sparse:.2f} x",
                flush=True,
            )
        models.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return table


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def circumstances(of_commit: str | None) -> dict[str, Any]:
    """What belongs beside measured times."""
    packages = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": of_commit,
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version_of(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=["kernels", "select", "prefill", "families", "crossover"]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--keeps", type=float, nargs="*", default=KEEPS)
    parser.add_argument("--commit", default=commit(), help="what to write into the JSON file")
    parser.add_argument(
        "--prefill", nargs="*", help="shape:batch:length; all of the table's if left out"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here; benchmarks/prefill.py measures on a CPU")

    import transformers

    transformers.logging.set_verbosity_error()
    result: dict[str, Any] = {**circumstances(args.commit), "rates": rates()}
    print(json.dumps(result), flush=True)
    which = PREFILLS
    if args.prefill:
        parts = (text.split(":") for text in args.prefill)
        which = [(shape, int(batch), int(length)) for shape, batch, length in parts]

    def save() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1))

    if "kernels" in args.only:
        result["kernels"] = kernel_table(args.rounds)
        save()
    if "select" in args.only:
        result["select"] = select_table(SELECTIONS, args.rounds)
        save()
    for name, lines, keeps in (("prefill", which, args.keeps), ("families", FAMILIES, [0.1])):
        if name in args.only:
            result[name] = []
            for line in prefill_table(lines, keeps, result["rates"], args.rounds):
                result[name].append(line)
                save()
    if "crossover" in args.only:
        result["crossover"] = crossover_table(args.rounds)
        save()


if __name__ == "__main__":
    main()
