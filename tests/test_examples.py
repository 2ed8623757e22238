"""The commands that the README names, at the smallest size: they run and say what they should."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
import transformers

import prefill
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT
from simba.presets import PRESETS

PRESETS_SHOWN = ("paper", "recall", "fast")


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_demo(tmp_path):
    said = command(
        "examples/demo.py", "--out", tmp_path, "--context", 120, "--snippets", 2, "--repeats", 1,
        "--facts", 4, "--more",
    )  # fmt: skip
    for name in PRESETS_SHOWN:
        picture = tmp_path / f"trapezoid-{name}.png"
        assert str(picture) in said.replace("\n", "")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"preset {name}: of " in said
    report = json.loads((tmp_path / "demo.json").read_text())
    rows = report["results"]
    pruned = [f"preset {name}" for name in PRESETS_SHOWN]
    pruned += ["final_keep=0.5", "recency", "uniform", "random"]
    assert [row["name"] for row in rows[::2]] == ["dense", *["prompt cut"] * len(pruned)]
    assert [row["name"] for row in rows[1::2]] == pruned == [row["rival"] for row in rows[2::2]]
    for row, cut in zip(rows[1::2], rows[2::2], strict=True):
        assert 0 <= row["flops"] - cut["flops"] < 1 / 120  # the same FLOPs, to a token's
        assert cut["prompt_tokens"] < row["prompt_tokens"] == 120
    assert report["presets"]["paper"] == dict(PRESETS["paper"])
    assert report["presets"]["recall"]["schedule"] == str(PRESETS["recall"]["schedule"])
    assert all(10 < row["perplexity"] < 500 for row in rows)
    assert rows[0]["nats_over_dense"] == 0
    assert rows[0]["answer"] == report["expected"]
    assert sum(rows[0]["found"]) >= 3  # dense, of 4

    assert len(report["places"]) == 4 and report["verdicts"][0]["early"] == sum(
        place < 0.4 for place in report["places"]
    )
    assert (
        all(row["seconds"] > 0 for row in report["speed"])
        and len(report["speed"]) == 2 * len(pruned) + 2
    )


def run_here(main, *arguments: object) -> str:
    """What a script says, without a process of its own: those take longest to start."""
    said = io.StringIO()
    verbosity = transformers.logging.get_verbosity()
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["a script", *map(str, arguments)])
        main()
    transformers.logging.set_verbosity(verbosity)
    torch.set_float32_matmul_precision(precision)
    return said.getvalue()


def test_prefill_benchmark(tmp_path, monkeypatch):
    """With the variants that others are compared with, and one with an environment of its own."""
    names = ("transformers", "transformers, malloc thresholds raised", "simba, dense")
    monkeypatch.setattr(prefill, "VARIANTS", {name: prefill.VARIANTS[name] for name in names})
    monkeypatch.setattr(prefill, "CUTS", {})
    said = run_here(
        prefill.main, "--shape", "tiny", "--seq-len", 200, "--repeats", 1, "--threads", 1,
        "--json", tmp_path / "prefill.json",
    )  # fmt: skip
    assert "malloc thresholds raised" in said
    rows = json.loads((tmp_path / "prefill.json").read_text())["rows"]
    assert tuple(rows) == names and all(row["median"] > 0 for row in rows.values())


def script(name: str):
    """What `python examples/NAME.py` runs."""
    return lambda: runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", [*prefill.VARIANTS, *prefill.CUTS])
def test_variants_of_the_prefill_benchmark(name, monkeypatch):
    """What the process of each does: it says that it is ready, then it answers."""
    monkeypatch.setattr(sys, "stdin", ["\n", "\n"])
    cut = name in prefill.CUTS
    options, _ = prefill.VARIANTS[prefill.CUTS.get(name, name)]
    said = run_here(lambda: prefill.serve("tiny", 200, options, cut, torch.get_num_threads()))
    ready, *answers = map(json.loads, said.splitlines())
    assert (80 < ready["tokens"] < 150) if cut else ready == {"tokens": 200}
    assert len(answers) == 2 and all(answer["seconds"] > 0 for answer in answers)


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_training_from_scratch(tmp_path, family):
    pytest.importorskip("accelerate")
    text = tmp_path / "text.txt"
    text.write_text(DEMO_TEXT.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    arguments = [
        "--data", text, "--out", tmp_path / "model", "--d-model", 16,
        "--layers", 2, "--vocab-size", 300, "--context", 32, "--steps", 60, "--batch-size", 4,
        "--log-every", 20, "--learning-rate", 0.02, "--family", family,
    ]  # fmt: skip
    said = run_here(script("train_mamba"), *arguments)
    losses = [
        float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0] - 0.3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import simba

    model = simba.sparsify(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 0.5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("It is a truth universally acknowledged", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "It is a truth universally acknowledged"
    assert model(ids).logits.shape[1] == round(ids.shape[1] / 2)


def test_new_mamba2_layers_do_not_forget_at_once(monkeypatch):
    """Their step sizes are small, in a hybrid as without attention."""
    pytest.importorskip("accelerate")
    from transformers import AutoTokenizer

    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_mamba

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    for family, scans in (("mamba2", 5), ("bamba", 4)):
        torch.manual_seed(0)
        model = train_mamba.build(family, 32, 5, tokenizer)
        assert model.config.model_type == family
        biases = [p for name, p in model.named_parameters() if name.endswith("dt_bias")]
        steps = torch.nn.functional.softplus(torch.stack(biases))
        assert len(steps) == scans and 0.0009 < steps.min() < steps.max() < 0.11
        assert steps.min() < 0.01 < steps.max() and steps.std() > 0


def test_training_for_recall(tmp_path):
    """It learns, and what it saves can be measured."""
    said = run_here(
        script("train_recall"), "copying", "--out", tmp_path / "model", "--items", 2,
        "--symbols", 3, "--length", 8, "--layers", 1, "--d-model", 32, "--steps", 200,
        "--batch-size", 64, "--learning-rate", 0.01, "--log-every", 50, "--device", "cpu",
    )  # fmt: skip
    losses = [
        float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if "loss" in line
    ]
    assert losses[-1] < 0.8 < losses[0]  # of three symbols, knowing nothing: 1.1
    from transformers import AutoModelForCausalLM

    from simba import evaluate

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert evaluate.task_of(model) == evaluate.Task("copying", 2, 3)
    dense, *_ = evaluate.trained_task(
        model, task="copying", lengths=[8], criteria=["recency"], keeps=[0.2], examples=100
    )
    assert dense.accuracy.low > 0.5 and dense.benefit.low > 0.3
