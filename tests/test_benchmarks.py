"""The benchmarks' parts that need no GPU: limits, timing's arithmetic, and tables of saved files."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

import chunk_memory
import gpu
import gpu_prefills
import hybrids
import limits
import live_tokens
import long_prompts
import long_summary
import plot_gpu
import plot_long_prompts
import presets
import serving_steps
import simba
import timing
import vllm_scan
from conftest import ROOT
from simba.presets import PRESETS

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
        for kernel, times in line["times"].items():
            assert row[heads.index(kernel)] == f"{1e6 * times['ms'] / tokens:.0f}"
    _, _, *rows = (cells(line) for line in plot_gpu.crossover_table(result["crossover"]))
    for row, line in zip(rows, result["crossover"], strict=True):
        dense, pruned = (line["times"][which]["ms"] for which in ("simba dense", "simba 0.1"))
        assert row == [
            line["shape"], str(line["length"]), f"{dense:.2f}", f"{pruned:.2f}",
            f"{dense / pruned:.2f}", "", "",
        ]  # fmt: skip


def test_the_crossover_shows_the_cut():
    ms = {"simba dense": 4.0, "simba 0.1": 5.0, gpu_prefills.CUT: 2.0}
    times = {name: {"ms": value, "p20": value, "p80": value} for name, value in ms.items()}
    _, _, shown = plot_gpu.crossover_table(
        [{"shape": "130m", "batch": 1, "length": 64, "times": times}]
    )
    assert cells(shown) == ["130m", "64", "4.00", "5.00", "0.80", "2.00", "2.00"]


@pytest.mark.parametrize("name", ["h100.json", "h200.json"])
def test_figures_and_tables_from_the_command_line(tmp_path, name):
    command = [sys.executable, "benchmarks/plot_gpu.py", f"benchmarks/{name}", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("kernels" in RESULTS[name]) == (name == "h100.json")
    for part in ("kernels", "prefill"):
        figure = f"gpu-{part}.png"
        assert (figure in done.stdout) == (part in RESULTS[name]) == (tmp_path / figure).exists()
        if part in RESULTS[name]:
            assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    table = plot_gpu.prefill_table(RESULTS[name]["prefill"])
    assert "\n".join(table) in done.stdout


def test_the_figure_of_prefills_has_the_cut(tmp_path, monkeypatch):
    """Beside the pruned model, as high as the file says; no pruned bar is without it."""
    figures = []
    monkeypatch.setattr(
        plot_gpu.Figure, "savefig", lambda figure, *args, **options: figures.append(figure)
    )
    plot_gpu.draw_prefill(RESULTS["h200.json"], tmp_path)
    [axes] = figures[0].axes
    bars = {group.get_label(): [bar.get_height() for bar in group] for group in axes.containers}
    assert list(bars) == list(plot_gpu.DRAWN)
    for name, heights in bars.items():
        lines = [x["times"] for x in RESULTS["h200.json"]["prefill"] if name in x["times"]]
        expected = [times["mamba-ssm fused"]["ms"] / times[name]["ms"] for times in lines]
        assert heights == pytest.approx(expected)
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown.index(gpu_prefills.CUT) == shown.index("simba 0.1") + 1
    assert plot_gpu.colour(gpu_prefills.CUT) != plot_gpu.colour("simba 0.1")


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


SCRIPTS = """
import pathlib, runpy, sys
sys.path[0] = sys.argv[1]
for name, *more in (["gpu"], ["ssd"], ["agreement", "MODEL", "text.txt"], ["long_prompts"]):
    sys.argv[1:] = more
    try:
        runpy.run_path(str(pathlib.Path(sys.path[0], name + ".py")), run_name="__main__")
    except SystemExit as end:
        print(name, end.code)
"""


def test_without_a_gpu_they_say_so():
    """All imports work; nothing is measured. One process for all, since torch takes long to import."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS, ROOT / "benchmarks"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    said = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in said] == ["gpu", "ssd", "agreement", "long_prompts"]
    assert all(text.startswith("no GPU here") for _, text in said)


@pytest.fixture
def one_thread():
    """More of them wait for each other where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_long_prompts_on_a_cpu(tmp_path, one_thread):
    """Two runs into one file: every variant is measured, or the file says why it is not."""
    out, figure = tmp_path / "long.json", tmp_path / "long.png"
    common = ["--smoke", "--out", str(out), "--commit", "abc"]
    long_prompts.main([*common, "--only", "first-token"])
    first = json.loads(out.read_text())
    assert first["prefills"] == [] and len(first["runs"]) == 1
    long_prompts.main([*common, "--only", "prefills", "--figure", str(figure)])
    result = json.loads(out.read_text())
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert result["runs"][0] == first["runs"][0] and result["runs"][1]["commit"] == "abc"
    assert result["first_token"] == first["first_token"]
    variants = [*long_prompts.SIMBA, gpu_prefills.CUT]
    assert [line["variant"] for line in result["first_token"]] == variants
    for line in result["first_token"]:
        assert (line["document"], line["question"], line["rounds"]) == (128, 8, 2)
        assert line["cold"]["ms"] > 0 and line["warm"]["copied states"]["ms"] > 0
    assert [line["length"] for line in result["prefills"]] == long_prompts.LENGTHS["tiny"]
    for line in result["prefills"]:
        assert set(line["variants"]) == set(long_prompts.VARIANTS)
        for name, cell in line["variants"].items():
            if name == "mamba-ssm with states":
                assert cell == {"run": 1, "missing": "not run: it needs a GPU"}
                continue
            assert cell["run"] == 1 and cell["rounds"] == 2 and "missing" not in cell
            speed = 1e3 * line["length"] / cell["times"]["ms"]
            assert cell["tokens_per_second"] == pytest.approx(speed)
            if name != gpu_prefills.CUT:
                assert cell["tokens"] == line["length"]
        cut = line["variants"][gpu_prefills.CUT]["tokens"]
        assert 0.5 * line["length"] < cut < 0.6 * line["length"]  # (1 + 0.1) / 2, and the scores
    check_tables(result)


def check_tables(result):
    """They show what the file holds."""
    heads, _, *rows = map(cells, plot_long_prompts.prefill_table(result["prefills"]))
    assert set(plot_long_prompts.STYLES) == set(long_prompts.VARIANTS)
    expected = [(line, name) for line in result["prefills"] for name in plot_long_prompts.STYLES]
    for row, (line, name) in zip(rows, expected, strict=True):
        cell = line["variants"][name]
        found = dict(zip(heads, row, strict=True))
        assert row[1] == (f"{name} of 64" if name.endswith("chunks") else name)
        assert row[-1] == cell.get("missing", "")
        assert found["ms"] == (f"{cell['times']['ms']:.1f}" if "times" in cell else "")
    _, _, *rows = map(cells, plot_long_prompts.first_token_table(result["first_token"]))
    for row, line in zip(rows, result["first_token"], strict=True):
        assert list(line["warm"]) == ["copied states", "simba.PromptCache"]
        share = line["warm"]["simba.PromptCache"]["ms"] / line["cold"]["ms"]
        assert row[1] == line["variant"] and row[-1] == f"{share:.1%}"


@pytest.mark.parametrize("keep", [1.0, 0.1])
def test_copied_states_answer_every_question_as_a_run_without_them(keep, one_thread):
    """Three questions about one document: none sees the others."""
    model = gpu_prefills.our_model("tiny", device="cpu").float()
    simba.sparsify(model, keep, dense_path="simba", chunk_size=16)
    document, *questions = (torch.randint(0, 50000, (1, n)) for n in (40, 8, 8, 8))
    with torch.no_grad():
        ask = long_prompts.copied_states(model, document)
        for question in questions:
            cache = model(document, use_cache=True).cache_params
            logits = model(question, cache_params=cache, prompt_length=8).logits
            assert ask(question) == int(logits[0, -1].argmax())
    assert len({ask(question) for question in questions}) > 1


class FakeVariant(long_prompts.Variant):
    """Does what it is told instead of a prefill."""

    def __init__(self, tokens, does):
        super().__init__(None, torch.zeros(1, tokens, dtype=torch.int64))
        self.does = does

    def __call__(self):
        return self.does()


def raises(error):
    def does():
        raise error

    return does


@pytest.fixture
def bench():
    args = long_prompts.arguments(["--smoke", "--limit", "0.2", "--seconds", "60"])
    result = {"runs": [{}], "prefills": [], "first_token": []}
    return long_prompts.Bench(args, "cpu", result, end=time.monotonic() + 60)


def test_a_prefill_that_fails_is_written_down(bench):
    def first(name, does, tokens=100):
        return bench.first_run("tiny", name, FakeVariant(tokens, does))

    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert first("transformers", raises(memory)) == (
        {"run": 0, "tokens": 100, "missing": "out of memory"},
        None,
    )
    cell, taken = first("simba 0.1", raises(memory))
    assert cell["missing"] == "out of memory" and taken is None
    cell, _ = first("transformers", raises(RuntimeError("CUDA error: illegal\nmore")))
    assert cell["missing"] == "RuntimeError: CUDA error: illegal"
    with pytest.raises(RuntimeError, match="our fault"):
        first("simba 0.1", raises(RuntimeError("our fault")))


def test_a_prefill_that_takes_too_long_is_stopped_and_longer_ones_do_not_start(bench):
    def slow():
        for _ in range(1000):
            time.sleep(0.01)

    variant = FakeVariant(100, slow)
    start = time.monotonic()
    cell, taken = bench.first_run("tiny", "transformers", variant)
    assert time.monotonic() - start < 5
    assert cell["missing"] == "stopped after 0.2 s" and taken is None
    cell, _ = bench.first_run("tiny", "transformers", FakeVariant(400, raises(AssertionError())))
    assert cell["missing"].startswith("not started: 1 s expected from 100 tokens")
    cell, taken = bench.first_run("tiny", "simba 0.1", FakeVariant(400, lambda: None))
    assert "missing" not in cell and taken >= 0


def test_memory_is_counted_behind_a_cleared_allocator(monkeypatch):
    mib, order = 2**20, []
    counted = {"memory_allocated": 300, "max_memory_allocated": 350, "max_memory_reserved": 400}
    for name, value in counted.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name, v=value: order.append(name) or v * mib
        )
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: order.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, memory = long_prompts.with_memory(lambda: order.append("call"), None)
    assert memory == {"before_mib": 300, "peak_mib": 350, "above_mib": 50, "reserved_mib": 400}
    assert order == [
        "synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated",
        "synchronize", "call", "synchronize", "max_memory_allocated", "max_memory_reserved",
    ]  # fmt: skip


def test_a_file_of_another_benchmark_is_not_added_to(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"prefill": []}')
    with pytest.raises(SystemExit, match="not a file of this benchmark"):
        long_prompts.main(["--smoke", "--out", str(other)])
    assert other.read_text() == '{"prefill": []}'


def test_rounds_end_when_the_time_is_over():
    calls = []
    now = time.monotonic()
    for warm, least, until, timed in ((1, 2, now, 2), (2, 1, now, 1), (1, 1, now + 60, 5)):
        calls.clear()
        two = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
        times, without = long_prompts.take_turns(two, warm, least, 5, until)
        assert calls == ["a", "b"] * (warm + timed)  # they take turns
        assert {name: len(values) for name, values in times.items()} == {"a": timed, "b": timed}
        assert without == []
    times, without = long_prompts.take_turns(
        {"a": raises(torch.OutOfMemoryError("no")), "b": lambda: None}, 1, 2, 2, now
    )
    assert times["a"] == [] and len(times["b"]) == 2 and without == ["a"]


def test_a_run_without_time_leaves_what_an_earlier_one_measured(bench):
    line = bench.line("tiny", 96)
    measured = {"run": 0, "tokens": 96, "times": {"ms": 1.0, "p20": 1.0, "p80": 1.0}}
    bench.put(line, "transformers", measured)
    bench.result["runs"].append({})
    bench.end = time.monotonic() - 1
    cell, taken = bench.first_run("tiny", "transformers", FakeVariant(96, raises(AssertionError())))
    assert cell["missing"] == "not started: the run's 60 seconds were over" and taken is None
    bench.put(line, "transformers", cell)
    assert bench.line("tiny", 96)["variants"]["transformers"] == measured
    bench.put(line, "simba 0.1", cell)
    assert line["variants"]["simba 0.1"] == cell


def test_the_time_is_shared_by_the_work_that_is_left(bench):
    for length in (100, 300):
        bench.plan("tiny", length, length)
    left = bench.end - time.monotonic()
    assert bench.until("tiny", 100) - time.monotonic() == pytest.approx(left / 4, rel=0.01)
    assert bench.until("tiny", 300) == pytest.approx(bench.end)


def test_overhead_and_flatness_by_hand():
    def cell(run, ms, peak, above):
        return {"run": run, "times": {"ms": ms}, "memory": {"peak_mib": peak, "above_mib": above}}

    def line(length, whole, chunked):
        variants = {"simba 0.1": whole, "simba 0.1, chunks": chunked}
        return {"shape": "130m", "length": length, "chunk_size": 2048, "variants": variants}

    lines = [
        line(8192, cell(0, 4.0, 400, 150), cell(0, 5.0, 300, 50)),
        line(32768, cell(0, 16.0, 800, 550), cell(1, 18.0, 306, 55)),
        line(131072, {"run": 0, "missing": "out of memory"}, cell(0, 72.0, 303, 53)),
    ]
    assert [long_summary.overhead(x, "simba 0.1") for x in lines] == [1.25, None, None]
    flat = long_summary.flatness(lines, "simba 0.1, chunks")
    assert flat == {"peak": pytest.approx(1.02), "above": pytest.approx(1.1)}
    assert long_summary.flatness(lines[:1], "simba 0.1, chunks") == {}
    first = {
        "shape": "130m", "variant": "simba 0.1", "document": 32768, "question": 64,
        "cold": {"ms": 40.0}, "warm": {"copied states": {"ms": 3.0}},
    }  # fmt: skip
    assert long_summary.summary({"prefills": lines, "first_token": [first]}) == [
        "130m, 8192 tokens, simba 0.1: chunks of 2048 take 1.250 x the time of the whole prompt",
        "130m, 8192 to 131072 tokens, simba 0.1, chunks of 2048: peak memory, largest over "
        "smallest 1.020, above the weights 1.100",
        "130m, 32768 + 64 tokens, simba 0.1: first token after 40.0 ms, with copied states after "
        "3.0 ms (7.5%)",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_chunks_does_not_grow_with_the_prompt():
    short, long, cut, at_once = chunk_memory.peaks(
        0.1, (1024, 256), (4096, 256), (4096, chunk_memory.CUT), (4096, 0)
    )
    assert long < 1.05 * short
    assert at_once > 1.04 * long  # so growth would be seen
    assert at_once > cut


def test_live_tokens_on_a_cpu(tmp_path, capsys, one_thread):
    path = tmp_path / "live.json"
    options = ["--smoke", "--seconds", "0", "--layers", "2", "--lengths", "24", "--shares", "0.25"]
    live_tokens.main([*options, "1", "--json", str(path), "--commit", "abc"])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["commit"] == "abc" and result["seconds in front"] <= result["seconds"]
    for part, names in (
        ("layers", {"dense", "0.25 live", "1 live"}),
        ("prefills", {"dense", "paper", "paper, final_keep=0.5", "write, window:0.5+delta",
                      "skip, window:0.5+delta", *live_tokens.STEPS,
                      *(f"dense, cut to the FLOPs of {name}"
                        for name in ("paper", "write", *live_tokens.STEPS)),
                      *(f"dense, cut to {share}" for share in live_tokens.CUTS)}),
    ):  # fmt: skip
        assert [line["family"] for line in result[part]] == list(live_tokens.FAMILIES)
        for line in result[part]:
            times = line["times"]
            assert set(times) == names and line["rounds"] == live_tokens.LEAST
            for each in times.values():
                assert 0 < each["p20"] <= each["ms"] <= each["p80"]
                assert each["of dense"] == pytest.approx(each["ms"] / times["dense"]["ms"])
            if part == "prefills":
                flops = {name: each["flops of dense"] for name, each in times.items()}
                assert flops["paper"] < flops["write, window:0.5+delta"] < flops["dense"] == 1.0
                assert flops["dense, cut to 0.5"] == pytest.approx(0.5, abs=0.05)
    lines = 3 + 7 + 2 * len(live_tokens.STEPS) + len(live_tokens.CUTS)
    assert capsys.readouterr().out.count("of dense") == 2 * lines


def test_presets_on_a_cpu(tmp_path, capsys, one_thread):
    path = tmp_path / "presets.json"
    options = ["--smoke", "--layers", "10", "--lengths", "200", "--rounds", "3"]
    presets.main([*options, "--json", str(path), "--commit", "abc"])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["commit"] == "abc"
    assert [line["family"] for line in result["prefills"]] == list(live_tokens.FAMILIES)
    for line in result["prefills"]:
        assert (line["length"], line["layers"], line["rounds"]) == (200, 10, 3)
        flops = {name: times["flops of dense"] for name, times in line["times"].items()}
        assert flops["dense"] == 1.0
        assert flops["paper"] < flops["fast"] < flops["recall"] < 1.0
        for name in ("paper", "recall", "fast"):
            assert flops[f"cut to the FLOPs of {name}"] == pytest.approx(flops[name], abs=0.01)
        assert set(flops) == {
            "dense", *PRESETS, *(f"cut to the FLOPs of {x}" for x in ("paper", "recall", "fast")),
        }  # fmt: skip
    assert capsys.readouterr().out.count("of dense") == 2 * 8
    presets.main([*options, "--presets", "fast", "--families", "mamba2-2.7b"])
    assert capsys.readouterr().out.count("of dense") == 3


def test_cut_of_the_same_time():
    """Between the two cuts whose times are next."""
    times = {f"dense, cut to {share}": {"ms": 10 * share + 1} for share in live_tokens.CUTS}
    times["dense"] = {"ms": 13.0}
    for ms, share in ((6.5, 0.55), (10.0, 0.9), (11.5, 0.95), (13.0, 1.0), (13.1, None), (1, None)):
        assert live_tokens.cut_of_the_same_time(times, ms) == (share and pytest.approx(share))


def test_layers_of_live_tokens_are_what_they_say(monkeypatch):
    """The same call with all tokens live is the dense layer, and fewer change only theirs."""
    like = live_tokens.random_model("mamba-2.8b", 3, "cpu", smoke=True)
    models = [live_tokens.random_model("mamba-2.8b", 3, "cpu", True, like) for _ in range(2)]
    with torch.no_grad():
        dense, some = (
            live_tokens.layer(model, 24, share)() for model, share in zip(models, (1.0, 0.25))
        )
    changed = ((dense - some).abs() > 1e-6).any(-1)[0]
    assert dense.shape == some.shape == (1, 24, 32)
    assert changed.sum() == 24 - 6 and not changed[-1]


def test_turns_end_when_the_time_is_over():
    ticks = iter(range(100))
    timers = {"dense": lambda: float(next(ticks)), "other": lambda: 10.0}
    found = live_tokens.take_turns(timers, time.perf_counter() - 1, 30)
    assert found["rounds"] == live_tokens.LEAST == 3
    assert found["times"]["dense"]["ms"] == 1.0 and found["times"]["other"]["of dense"] == 10.0
    assert live_tokens.take_turns(timers, time.perf_counter() + 60, 5)["rounds"] == 5


SELECTIVE_SCAN_FWD = (  # of vLLM 0.26.0's library
    "selective_scan_fwd(Tensor! u, Tensor! delta,Tensor! A, Tensor! B, Tensor! C,Tensor? D_, Tensor!? z_, "
    "Tensor? delta_bias_,bool delta_softplus,Tensor? query_start_loc,Tensor? cache_indices,Tensor? has_initial_state,"
    "Tensor! ssm_states,int null_block_id,int block_size,Tensor? block_idx_first_scheduled_token,"
    "Tensor? block_idx_last_scheduled_token,Tensor? initial_state_idx,Tensor? cu_chunk_seqlen,"
    "Tensor? last_chunk_indices) -> ()"
)


def scan_in_place_of_vllm(
    u, delta, A, B, C, D, z, bias, softplus, starts, indices, continued, cache, null, *rest
):
    """What vLLM's operator is documented to do: token by token, channels first, output into z."""
    assert softplus and null == 0 and rest[1:] == (None,) * 5
    assert all(t.stride(-1) == 1 for t in (u, delta, B, C, z))
    for i, row in enumerate(indices.tolist()):
        h = cache[row].float() if continued[i] else torch.zeros_like(cache[row], dtype=torch.float)
        for t in range(starts[i], starts[i + 1]):
            step = torch.nn.functional.softplus(delta[:, t].float() + bias)[:, None]
            h = torch.exp(step * A) * h + step * B[0, :, t].float() * u[:, t, None].float()
            y = (h * C[0, :, t].float()).sum(1) + D * u[:, t].float()
            z[:, t] = (y * torch.nn.functional.silu(z[:, t].float())).to(z.dtype)
        cache[row] = h.to(cache.dtype)


def test_vllms_scan_is_called_as_vllm_calls_it():
    """On an operator of the same schema: both variants give the layer's outputs and states."""
    library = torch.library.Library("_C", "FRAGMENT")
    try:
        library.define(SELECTIVE_SCAN_FWD)
        library.impl("selective_scan_fwd", scan_in_place_of_vllm, "CPU")
        step = vllm_scan.make_step(8, [5, 1, 9], "cpu", torch.float32, some_continued=True)
        variants = {
            name: vllm_scan.vllm_scan(step, alone) for name, alone in (("copied", 0), ("alone", 1))
        }
        for _ in range(2):  # each call overwrites its inputs
            vllm_scan.asserted(vllm_scan.errors_of(step, variants))
        broken = {"copied": variants["copied"]._replace(cache=step.cache)}
        with pytest.raises(AssertionError, match="'copied'"):
            vllm_scan.asserted(vllm_scan.errors_of(step, broken))
    finally:
        library._destroy()


def test_serving_steps_run(capsys):
    """Without timing: a step's mixers, dense and pruned, with decodes and without."""
    sizes = ("--shapes", "tiny", "--tokens", "48", "--decodes", "0", "3")
    assert serving_steps.main(["--check", *sizes]) == 0
    out = capsys.readouterr().out
    assert "4 x 12, 0 decodes" in out and "4 x 12, 3 decodes" in out


def test_steps_of_mixed_lengths():
    for n in (1, 4, 16, 64):
        lengths = vllm_scan.mixed_lengths(n, 8192)
        assert len(lengths) == n and sum(lengths) == 8192 and min(lengths) >= 1
    assert len(set(lengths)) > 10


def test_hybrids_that_run_out_of_memory(one_thread, monkeypatch, capsys):
    config = hybrids.configs(smoke=True)["bamba-9b"]
    bench = hybrids.Bench(
        "tiny", hybrids.build(config, "cpu", torch.float32, False), "cpu", without_graphs=True
    )
    prefill = bench.prefill

    def limited(ids):
        if ids.shape[1] == 16 and simba.status(bench.model).config is None:
            raise torch.cuda.OutOfMemoryError("too much\nand more")
        return prefill(ids)

    monkeypatch.setattr(bench, "prefill", limited)
    found = bench.line(16, seconds=0, rounds=1)["cells"]
    assert found.pop("dense") == {"flops of dense": 1.0, "out of memory": "too much"}
    assert len(found) == 6 and all(cell["ms"] > 0 for cell in found.values())
    shown = capsys.readouterr().out
    assert shown.count("out of memory") == 1 and shown.count("no dense time") == 6
