"""The benchmarks' parts that need no GPU: limits, timing's arithmetic, and tables of saved files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gpu
import limits
import plot_gpu
import timing
from conftest import ROOT

FILES = sorted((ROOT / "benchmarks").glob("*.json"))
RESULTS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
PREFILLS = [
    pytest.param(name, part, id=f"{name}-{part}")
    for name, result in RESULTS.items()
    for part in ("prefill", "families")
    if part in result
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("name", "part"), PREFILLS)
def test_limits_of_saved_files_are_what_the_code_says(name, part):
    """The same arithmetic, from the rates that the file holds."""
    result = RESULTS[name]
    compared = 0
    for line in result[part]:
        for variant, saved in line["limit_ms"].items():
            keep = 1.0 if variant == "simba dense" else float(variant.split()[1])
            limit = limits.least_milliseconds(
                line["shape"], line["batch"], line["length"], keep, result["rates"]
            )
            assert limit == pytest.approx(saved, rel=1e-9)
            assert limit < line["times"][variant]["ms"]  # nothing is faster than arithmetic
            compared += 1
    assert compared >= 2 * len(result[part])


def test_a_limit_by_hand():
    """130m, one token in one layer, with rates that leave one term at a time."""
    shape = limits.SHAPES["130m"]
    infinite = {"flops": float("inf"), "bytes": float("inf"), "exponentials": float("inf")}
    # in_proj 768 x 3072, x_proj 1536 x (48 + 32), dt_proj 48 x 1536, out_proj 1536 x 768
    products = 768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768
    assert limits.seconds_per_token(shape, {**infinite, "flops": 1.0}) == 2 * products
    assert limits.seconds_per_token(shape, {**infinite, "exponentials": 1.0}) == 1536 * 16
    assert limits.seconds_per_token(shape, {**infinite, "bytes": 1.0}) == 12 * 1536 + 12 * 768
    dense, pruned = (
        limits.least_milliseconds("130m", 2, 100, keep, {**infinite, "exponentials": 1.0})
        for keep in (1.0, 0.5)
    )
    assert dense == pytest.approx(1e3 * 2 * 100 * 24 * 1536 * 16)
    assert pruned == pytest.approx(0.75 * dense)  # linear from 1 to 0.5


def test_times_are_medians_and_percentiles():
    assert timing.summary([float(i) for i in range(10, 0, -1)]) == {"ms": 5.5, "p20": 3, "p80": 9}
    assert timing.summary([2.0]) == {"ms": 2, "p20": 2, "p80": 2}


@pytest.mark.parametrize(("name", "part"), PREFILLS)
def test_prefill_tables_show_what_the_file_holds(name, part):
    lines = RESULTS[name][part]
    heads, _, *rows = (cells(line) for line in plot_gpu.prefill_table(lines))
    assert len(rows) == sum(len(line["times"]) for line in lines)
    assert {len(row) for row in rows} == {len(heads)}
    expected = [(line, variant) for line in lines for variant in line["times"]]
    for row, (line, variant) in zip(rows, expected, strict=True):
        found = dict(zip(heads, row, strict=True))
        milliseconds = line["times"][variant]["ms"]
        assert found[""] == variant and found["ms"] == f"{milliseconds:.1f}"
        dense = line["times"]["simba dense"]["ms"]
        assert found["× simba dense"] == f"{dense / milliseconds:.2f}"
        bound = line["limit_ms"].get(variant)
        assert found["limit, ms"] == ("" if bound is None else f"{bound:.1f}")


@pytest.mark.parametrize("name", [name for name in RESULTS if "crossover" in RESULTS[name]])
def test_other_tables_show_what_the_file_holds(name):
    result = RESULTS[name]
    heads, _, *rows = (cells(line) for line in plot_gpu.kernel_table(result["kernels"]))
    for row, line in zip(rows, result["kernels"], strict=True):
        tokens = line["batch"] * line["length"]
        assert row[:2] == [str(line["d_inner"]), f"{line['batch']} × {line['length']}"]
        for kernel, time in line["times"].items():
            assert row[heads.index(kernel)] == f"{1e6 * time['ms'] / tokens:.0f}"
    _, _, *rows = (cells(line) for line in plot_gpu.crossover_table(result["crossover"]))
    for row, line in zip(rows, result["crossover"], strict=True):
        dense, pruned = (line["times"][which]["ms"] for which in ("simba dense", "simba 0.1"))
        assert row == [
            line["shape"], str(line["length"]), f"{dense:.2f}", f"{pruned:.2f}",
            f"{dense / pruned:.2f}",
        ]  # fmt: skip


def test_figures_and_tables_from_the_command_line(tmp_path):
    command = [sys.executable, "benchmarks/plot_gpu.py", "benchmarks/h100.json", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("gpu-kernels.png", "gpu-prefill.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in done.stdout
    table = plot_gpu.prefill_table(RESULTS["h100.json"]["prefill"])
    assert "\n".join(table) in done.stdout


def test_the_gpu_benchmarks_command_line():
    plain = gpu.arguments(["--commit", "abc"])
    assert plain.only == gpu.TABLES and plain.rounds == 10 and plain.json is None
    assert plain.prefill == gpu.PREFILLS and plain.keeps == gpu.KEEPS and plain.commit == "abc"
    some = gpu.arguments(
        ["--only", "select", "prefill", "--prefill", "130m:1:2048", "2.8b:8:64", "--keeps", "0.2"]
    )
    assert some.only == ["select", "prefill"] and some.keeps == [0.2]
    assert some.prefill == [("130m", 1, 2048), ("2.8b", 8, 64)]
    for wrong in ("2.8b:1", "2.8b:one:64"):
        with pytest.raises(SystemExit):
            gpu.arguments(["--prefill", wrong])


@pytest.mark.parametrize("script", ["gpu.py", "ssd.py", "agreement.py"])
def test_without_a_gpu_they_say_so(script, tmp_path):
    """All imports work; nothing is measured."""
    more = ["MODEL", tmp_path / "text.txt"] if script == "agreement.py" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, more)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU here")
