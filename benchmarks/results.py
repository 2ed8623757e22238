"""What the benchmarks' JSON files hold."""

from __future__ import annotations

from typing import TypedDict


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
