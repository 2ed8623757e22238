"""How the GPU benchmarks measure: times, memory, clocks, and what the machine was."""

from __future__ import annotations

import gc
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from results import Circumstances, Rates, Times

DEVICE = "cuda"
Call = Callable[[], object]


def summary(milliseconds: list[float]) -> Times:
    """Median, 20th and 80th percentile."""
    ordered = sorted(milliseconds)

    def percentile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"ms": statistics.median(ordered), "p20": percentile(0.2), "p80": percentile(0.8)}


def captured(
    call: Call, repeats: int = 1, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """One CUDA graph with ``repeats`` calls in it."""
    graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            call()
    return graph


def event() -> torch.cuda.Event:
    """An event that can be timed."""
    made: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return made


def time_kernels(variants: dict[str, Call], rounds: int = 10) -> dict[str, Times]:
    """Time on the GPU, without launching: each variant is captured several times into one graph,
    and the graphs take turns."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in variants.items():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            call()
            start, end = event(), event()
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
            start, end = event(), event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / repeats)
    return {name: summary(values) for name, values in times.items()}


def time_calls(variants: dict[str, Call], rounds: int = 10) -> dict[str, Times]:
    """Time from the call to the end of its last kernel, on the host's clock; the variants take
    turns, and the first three rounds warm up."""
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


def peak_bytes(call: Call) -> int:
    """The most memory that a call takes above what is allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nvidia_smi(fields: str) -> list[str]:
    """The command that prints these fields, without names and units."""
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def rates() -> Rates:
    """What this GPU reaches: products and copies are measured; exponentials are 16 a clock and
    multiprocessor, at the highest clock."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = time_kernels({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    answer = subprocess.run(nvidia_smi("clocks.max.sm"), capture_output=True, text=True)
    clock = float(answer.stdout.split()[0])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "flops": 2 * 8192**3 / (times["product"]["ms"] / 1e3),
        "bytes": 2 * source.numel() / (times["copy"]["ms"] / 1e3),
        "exponentials": 16 * processors * clock * 1e6,
    }


def clocks(call: Call, seconds: float = 1.0) -> dict[str, float]:
    """Median clock (``mhz``) and power (``watts``) of the GPU while a call is repeated.

    A GPU at its power limit gets faster only by running fewer instructions and moving fewer bytes.
    Empty if nvidia-smi said nothing.
    """
    command = [*nvidia_smi("clocks.sm,power.draw"), "-lms", "50"]
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


def version_of(package: str) -> str | None:
    """Of an installed package; None if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The short hash of what is checked out here; None outside of a git repository."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def circumstances(of_commit: str | None) -> Circumstances:
    """What a reader of measured times needs to know: the date, the GPU and the versions."""
    packages = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": of_commit,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "versions": {name: version_of(name) for name in packages},
    }
