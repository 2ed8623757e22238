"""What the benchmarks' JSON files hold."""

from __future__ import annotations

from typing import Any, TypedDict


class Times(TypedDict):
    """Median, 20th and 80th percentile, milliseconds."""

    ms: float
    p20: float
    p80: float


class Rates(TypedDict):
    """What a GPU reaches, per second."""

    flops: float
    """Floating-point operations of bfloat16 matrix products."""
    bytes: float
    """Bytes of a copy, read and written."""
    exponentials: float


class KernelLine(TypedDict):
    """Kernels of one layer, by name."""

    d_inner: int
    batch: int
    length: int
    times: dict[str, Times]


class SelectLine(TypedDict):
    """Ways to select the survivors of one layer, by name."""

    batch: int
    length: int
    agree: bool
    """Whether all ways chose the same tokens."""
    times: dict[str, Times]


class SsdLine(TypedDict):
    """Kernels of one Mamba-2 layer, by name."""

    batch: int
    length: int
    times: dict[str, Times]
    errors: dict[str, float]
    """||y - exact|| / ||exact|| of the scans."""


class VllmScanLine(TypedDict):
    """vLLM's Mamba-1 scan and ours on one step of prompts, by variant."""

    shape: str
    d_inner: int
    case: str
    lengths: list[int]
    """Of the prompts, in tokens."""
    state_dtype: str
    errors: dict[str, dict[str, float]]
    """||found - exact|| / ||exact|| of outputs (y) and last states (state)."""
    times: dict[str, Times]
    """Empty if nothing was timed."""


class ServingStepLine(TypedDict):
    """The mixers of one step of prompts, by variant."""

    shape: str
    case: str
    lengths: list[int]
    """Of the prompts, in tokens."""
    decodes: int
    """Sequences of one token beside them."""
    ms: dict[str, Times]
    """On the host's clock."""
    gpu_ms: dict[str, Times]
    """On the GPU alone."""


class LoadRun(TypedDict):
    """What the clients of one engine saw."""

    ttft_ms: float
    """From sending a request to its first token, median; and the 90th percentile."""
    ttft_p90_ms: float
    tokens_per_s: float
    """Of prompts; the median of the rounds."""
    rounds_tokens_per_s: list[float]


class VllmLoadCell(TypedDict):
    """One load on all engines, by variant."""

    length: int
    """Of each prompt, in tokens."""
    concurrency: int
    requests: int
    cut: dict[str, int]
    """Tokens of the cut prompts, by the keep ratio whose FLOPs they cost."""
    runs: dict[str, LoadRun]


class CrossoverLine(TypedDict):
    """Prefills of a short prompt, dense and pruned."""

    shape: str
    batch: int
    length: int
    times: dict[str, Times]


class _PrefillLine(TypedDict):
    shape: str
    batch: int
    length: int
    times: dict[str, Times]
    peak_mib: dict[str, float]
    """Memory above the model, MiB."""
    limit_ms: dict[str, float]
    """See `limits`, milliseconds."""


class PrefillLine(_PrefillLine, total=False):
    """Prefills of one prompt, by variant; early files lack the fields below."""

    peak_mib_without_states: dict[str, float]
    clocks: dict[str, dict[str, float]]
    """``mhz`` and ``watts`` of some variants."""


class Circumstances(TypedDict):
    """What a reader of measured times needs to know."""

    date: str
    commit: str | None
    gpu: str
    versions: dict[str, str | None]


class VllmLoadResult(Circumstances):
    """A file of ``vllm_load.py``."""

    vllm: str | None
    shape: str
    settings: dict[str, Any]
    """Of every engine."""
    answer: int
    """Tokens of each answer."""
    started: dict[str, float]
    """Seconds until an engine took requests, all starting at once."""
    cells: list[VllmLoadCell]
    failed: list[str]


class GpuResult(Circumstances, total=False):
    """A file of ``gpu.py``: the tables that were run."""

    rates: Rates
    kernels: list[KernelLine]
    select: list[SelectLine]
    prefill: list[PrefillLine]
    families: list[PrefillLine]
    crossover: list[CrossoverLine]


class SsdResult(Circumstances):
    """A file of ``ssd.py``."""

    kernels: list[SsdLine]


class LongMemory(TypedDict):
    """Memory of one prefill on the GPU, MiB, as torch's allocator counts it."""

    before_mib: float
    """Allocated before it: the model's weights (once, whatever else shares them) and the prompt."""
    peak_mib: float
    """The most that was allocated while it ran (`torch.cuda.max_memory_allocated`)."""
    above_mib: float
    """``peak_mib`` without ``before_mib``."""
    reserved_mib: float
    """The most that the allocator held (`torch.cuda.max_memory_reserved`), for graphs as well."""


class LongCell(TypedDict, total=False):
    """One variant's prefill of one prompt. It has ``times`` or says what is ``missing``."""

    run: int
    """Of `LongResult.runs`. Only cells of one run were timed side by side."""
    tokens: int
    """That the model reads: of the whole prompt, or of the cut one."""
    memory: LongMemory
    """Of the first prefill of this length, which finds no CUDA graphs; not on a CPU."""
    times: Times
    rounds: int
    """Timings behind ``times``."""
    tokens_per_second: float
    """Of the whole prompt, also where it was cut."""
    missing: str
    """Why there are no times, or no more."""


class LongLine(TypedDict):
    """Prefills of one long prompt, by variant."""

    shape: str
    length: int
    chunk_size: int
    variants: dict[str, LongCell]


class FirstTokenLine(TypedDict):
    """Time to the first token of a question about a document, by one variant."""

    run: int
    """Of `LongResult.runs`."""
    shape: str
    variant: str
    chunk_size: int
    document: int
    """Tokens."""
    question: int
    """Tokens."""
    rounds: int
    cold: Times
    """One prefill of document and question."""
    warm: dict[str, Times]
    """The document's states are there; by the way that they were kept."""


class LongResult(TypedDict):
    """A file of ``long_prompts.py``, which several runs may have filled."""

    runs: list[Circumstances]
    prefills: list[LongLine]
    first_token: list[FirstTokenLine]
