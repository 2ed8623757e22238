"""The command line on the embedded model, few tokens each."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, tiny_mamba
from simba import cli, evaluate, plots
from simba.cli import lm_eval, loading, terminal
from simba.cli.grouping import flattened
from simba.cli.options import ModelOptions, OutputOptions
from simba.errors import InputError
from simba.evaluate.store import Store, cells_of, read, write
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.texts import fingerprint_folder
from simba.fingerprints import fingerprint_weights
from simba.presets import PURPOSES

MODEL = ["--model", str(DEMO_MODEL), "--device", "cpu"]
COMMANDS = {
    "ppl": ["--contexts", "32,64", "--snippet", "20"],
    "redundancy": ["--length", "64"],
    "flow": ["--length", "64", "--criteria", "influence,window:0.5+delta"],
    "ablate": [
        "--context",
        "64",
        "--snippet",
        "20",
        "--keep",
        "0.5",
        "--criteria",
        "window:0.5+delta",
    ],
    "speed": ["--lengths", "32", "--repeats", "1"],
    "recall": ["--distances", "16", "--passage", "20", "--keep", "0.5", "--criteria", "delta"],
}
PASSKEY = ["--task", "passkey", "--lengths", "64", "--keep", "0.5,0.02", "--criteria", "delta"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables must not depend on the window that the tests run in."""
    monkeypatch.setattr(terminal.console, "width", 120)
    monkeypatch.setattr(terminal.errors, "width", 120)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two short documents, in one file of JSON lines."""
    text = DEMO_TEXT.read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("texts") / "two.jsonl"
    rows = [{"title": str(i), "text": text[i : i + 2000]} for i in (50_000, 90_000)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def one_load(monkeypatch, _demo):
    """The same weights again and again: read once. (`test_the_whole_way` reads them.)"""
    monkeypatch.setattr(loading, "load_model", lambda name, dtype, device: _demo[0])


def simba_command(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def command(name, texts, *more):
    text = [] if name == "speed" else ["--text", texts]
    return simba_command(name, *MODEL, *text, *COMMANDS[name], *more)


@pytest.fixture(scope="module")
def results(texts, tmp_path_factory, _demo):
    """Every experiment once."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", lambda name, dtype, device: _demo[0])
        for name in COMMANDS:
            paths = ["--json", folder / f"{name}.json", "--plot", folder / f"{name}.svg"]
            result = command(name, texts, *paths)
            assert result.exit_code == 0, result.output
        paths = ["--json", folder / "task.json", "--plot", folder / "task.svg"]
        result = simba_command("recall", *MODEL, "--text", texts, *PASSKEY, *paths)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", [*COMMANDS, "task"])  # eval: test_lm_eval.py
def test_every_experiment_writes_its_cells_and_figure(results, name):
    content = json.loads((results / f"{name}.json").read_text())
    assert content["experiment"] == name
    assert content["environment"]["simba"] == simba.__version__
    kind = EXPERIMENTS[name].kind
    cells = [kind.from_dict(cell) for cell in content["cells"]]
    assert len({cell.key for cell in cells}) == len(cells) >= 1
    assert (results / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    assert len(EXPERIMENTS[name].table(cells).rows) >= len(cells)


def test_a_run_goes_on_where_it_was(results, texts, monkeypatch, tmp_path):
    """Cells in the file are taken, not run: a changed one comes back as it is, a missing one is
    computed, and the file is complete again."""
    path = tmp_path / "ppl.json"
    content = json.loads((results / "ppl.json").read_text())
    lost = content["cells"].pop()
    content["cells"][0]["losses"] = [1.0, 1.0]
    path.write_text(json.dumps(content))
    runs = []
    original = evaluate.contexts.measure

    def counted(*arguments):
        runs.append(1)
        return original(*arguments)

    monkeypatch.setattr(evaluate.contexts, "measure", counted)
    result = command("ppl", texts, "--json", path)
    assert result.exit_code == 0, result.output
    assert len(runs) == 1
    assert f"{2.718281828:.2f}" in result.output
    again = json.loads(path.read_text())["cells"]
    assert again[:-1] == content["cells"]
    assert again[-1]["losses"] == pytest.approx(lost["losses"])


@pytest.mark.parametrize(("name", "size"), [("ppl", 16), ("recall", 16)])
def test_chunks_and_cuts_join_a_file(results, texts, tmp_path, name, size):
    """Also one of an earlier version, whose cells lack the fields."""
    path = tmp_path / "old.json"
    content = json.loads((results / f"{name}.json").read_text())
    content["cells"] = [cell for cell in content["cells"] if cell["criterion"] != "cut"]
    for cell in content["cells"]:
        for new in ("chunk_size", "read", "survived", "pruner"):
            cell.pop(new, None)
    path.write_text(json.dumps(content))
    figure = tmp_path / "new.svg"
    more = ["--chunk-sizes", size, "--json", path, "--plot", figure]
    result = command(name, texts, *more)
    assert result.exit_code == 0, result.output
    cells = json.loads(path.read_text())["cells"]
    assert cells[: len(content["cells"])] == content["cells"]
    added = cells[len(content["cells"]) :]
    assert {cell["criterion"] for cell in added if cell["chunk_size"] is None} == {"cut"}
    assert {cell["chunk_size"] for cell in added} == {None, size}
    assert figure.exists()
    refused(command(name, texts, "--chunk-sizes", "512"), "chunk_size=512 does not chunk")


@pytest.mark.parametrize("name", ["ppl", "recall", "ablate", "speed"])
def test_every_pruned_row_has_its_cut(results, name):
    """By default: a row of its own, and in the rows of criteria the difference."""
    content = json.loads((results / f"{name}.json").read_text())
    kind = EXPERIMENTS[name].kind
    table = EXPERIMENTS[name].table([kind.from_dict(cell) for cell in content["cells"]])
    if name == "speed":
        assert any(row[1].startswith("cut, FLOPs of influence") for row in table.rows)
        return
    column = next(i for i, head in enumerate(table.columns) if "the cut prompt" in head)
    pruned = [row for row in table.rows if row[1] != "dense" and not row[1].startswith("cut")]
    assert pruned and all(row[column] for row in pruned)
    assert sum(row[1].startswith("cut to ") for row in table.rows) == len(pruned)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_tables_break_no_word(results, monkeypatch, capsys, width):
    """In any terminal: what does not fit as a table comes one result under the other."""
    monkeypatch.setattr(terminal.console, "width", width)
    for name in (*COMMANDS, "task"):
        content = json.loads((results / f"{name}.json").read_text())
        kind = EXPERIMENTS[name].kind
        table = EXPERIMENTS[name].table([kind.from_dict(cell) for cell in content["cells"]])
        terminal.show(table)
        shown = capsys.readouterr().out
        assert all(len(line) <= width for line in shown.splitlines())
        words = set(re.split(r"[\s│┃]+", shown))
        for row in table.rows:
            for value in row:
                assert set(value.split()) <= {*words, *(word.rstrip(",") for word in words)}, value
        if width == 160:
            assert shown.count("┏") == 1  # there it is a table


def test_a_stopped_run_keeps_its_cells(texts, monkeypatch, tmp_path):
    path = tmp_path / "ppl.json"
    original, runs = evaluate.contexts.measure, []

    def stopped(*arguments):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(1)
        return original(*arguments)

    monkeypatch.setattr(evaluate.contexts, "measure", stopped)
    result = command("ppl", texts, "--json", path)
    assert result.exit_code == 130
    assert len(json.loads(path.read_text())["cells"]) == 2


def trained_model():
    task = evaluate.Task("copying", 4, 5)
    model = tiny_mamba(vocab_size=task.vocab_size)
    model.config.simba_task = task.to_dict()
    return model


def test_a_trained_task(monkeypatch, tmp_path):
    """From a checkpoint that says what it was trained on, and on again where it was."""
    monkeypatch.undo()
    trained_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "copying.json"
    options = ["--model", tmp_path / "model", "--device", "cpu", "--json", path]
    options += ["--task", "copying", "--lengths", "20,30", "--examples", "10"]
    for keeps, cells in (("0.5", 6), ("0.5,0.02", 10)):
        result = simba_command("recall", *options, "--keep", keeps, "--criteria", "recency")
        assert result.exit_code == 0, result.output
        content = json.loads(path.read_text())
        assert len(content["cells"]) == cells
        assert content["settings"]["task"] == "copying"
        assert all(len(cell["correct"]) == 10 for cell in content["cells"])
    result = simba_command("recall", *options, "--seed", "1")
    assert result.exit_code == 1 and "another file" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "sums"], "--task must be one of passage, fact"),
        (["--task", "passage"], "give --text"),
        (["--task", "mqar"], "was trained on copying, not on mqar"),
        (["--task", "copying", "--cue", "3"], "--cue does nothing in copying, which takes --len"),
        (["--task", "copying", "--text", "some.txt"], "leave out --text"),
        (["--task", "copying", "--lengths", "4"], "no room"),
    ],
)
def test_what_a_task_cannot_do_is_said(monkeypatch, options, message):
    monkeypatch.setattr(loading, "load_model", lambda name, dtype, device: trained_model())
    result = simba_command("recall", *MODEL, *options)
    assert result.exit_code == 1 and message in result.output
    assert "Traceback" not in result.output


def test_other_settings_do_not_mix(results, texts, tmp_path):
    before = (results / "ppl.json").read_text()
    result = command("ppl", texts, "--snippets", "2", "--json", results / "ppl.json")
    assert result.exit_code == 1
    assert "another file" in result.output
    assert (results / "ppl.json").read_text() == before
    other = tmp_path / texts.name  # the same name, another text
    other.write_text(texts.read_text() + '{"text": "more"}', encoding="utf-8")
    assert command("ppl", other, "--json", results / "ppl.json").exit_code == 1
    assert command("recall", texts, "--json", results / "ppl.json").exit_code == 1


def test_a_dataset_gives_what_its_file_gives(results, texts, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(texts.read_bytes())
    options = ["--dataset", folder, "--split", "train", "--column", "text"]
    path = tmp_path / "ppl.json"
    result = simba_command("ppl", *MODEL, *options, *COMMANDS["ppl"], "--json", path)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert content["cells"] == json.loads((results / "ppl.json").read_text())["cells"]
    options[3] = "default:train[:1]"
    result = simba_command("ppl", *MODEL, *options, *COMMANDS["ppl"])
    assert result.exit_code == 0 and "1 document, " in result.output, result.output
    options[3] = "train"
    other = json.loads(texts.read_text().splitlines()[0])
    (folder / "train.jsonl").write_text(json.dumps({**other, "text": other["text"] * 2}))
    result = simba_command("ppl", *MODEL, *options, *COMMANDS["ppl"], "--json", path)
    assert result.exit_code == 1 and "another file" in result.output


def test_report_holds_every_experiment(results):
    result = simba_command("report", results)
    assert result.exit_code == 0, result.output
    page = (results / "report.md").read_text()
    for name in COMMANDS:
        assert f"## {EXPERIMENTS[name].title}: {name}" in page
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in page
    cell = json.loads((results / "ppl.json").read_text())["cells"][0]
    perplexity = evaluate.ContextCell.from_dict(cell).perplexity.estimate
    assert f"| {perplexity:.2f} (" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_report_of_nothing_and_of_something_else(tmp_path):
    assert simba_command("report", tmp_path).exit_code == 1
    (tmp_path / "other.json").write_text("{}")
    result = simba_command("report", tmp_path)
    assert result.exit_code == 1
    assert "other.json" in result.output


def curve_file(folder, name, flops, losses, **settings):
    """What `simba ppl` leaves of a model: dense, and pruned for half of the FLOPs."""
    path = folder / f"{name}.json"
    common = {"model": f"/models/{name}", "dtype": "float32", "device": "cpu", "texts": ["a"]}
    store = Store(path, "ppl", {**common, **settings}, evaluate.ContextCell, {})
    for criterion, keep, share, more in (("dense", 1.0, 1.0, 0.0), ("influence", 0.1, 0.5, 0.1)):
        cost = int(share * flops)
        values = tuple(loss + more for loss in losses)
        store.add(evaluate.ContextCell(64, criterion, keep, cost, share, values))
    return path


def test_curve_compares_with_what_costs_no_more(tmp_path):
    small = curve_file(tmp_path, "small", 4_000_000_000, (3.0, 5.0))
    large = curve_file(tmp_path, "large", 10_000_000_000, (2.0, 4.5))
    points = evaluate.curve([large, small])
    assert [(p.model, p.criterion, p.flops / 1e9) for p in points] == [
        ("small", "influence", 2),
        ("small", "dense", 4),
        ("large", "influence", 5),
        ("large", "dense", 10),
    ]
    assert [p.rival for p in points] == [None, None, "small", "small"]
    assert points[2].over.estimate == pytest.approx((2.1 - 3.0 + 4.6 - 5.0) / 2)
    assert points[2].over.low == pytest.approx(-0.9) and points[2].over.high == pytest.approx(-0.4)
    assert points[2].quality.estimate == pytest.approx(3.35)

    out, plot = tmp_path / "out.json", tmp_path / "curve.png"
    result = simba_command("curve", large, small, "--json", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "small" in result.output and "-0.650" in result.output
    written = json.loads(out.read_text())
    assert [point["over"] for point in written][:2] == [None, None]
    assert written[2]["over"][0] == pytest.approx(-0.65)
    assert plot.read_bytes().startswith(b"\x89PNG")
    out.unlink()
    assert simba_command("report", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert "## FLOPs and quality: large small" in page and "(curve-large-small.png)" in page


def test_curve_compares_with_the_cut_of_the_same_model(tmp_path):
    path = curve_file(tmp_path, "one", 1_000_000, (3.0, 5.0))
    content = json.loads(path.read_text())
    cuts = ((0.1, 0.5, 3.05, "influence"), (0.1, 0.4, 9.0, "delta"), (0.2, 0.5, 8.0, "influence"))
    for keep, share, loss, pruner in cuts:
        cut = {**content["cells"][0], "criterion": "cut", "final_keep": keep, "pruner": pruner}
        losses = [loss, loss + 2]
        content["cells"].append(
            {**cut, "flops": int(1e6 * share), "flops_ratio": share, "losses": losses}
        )
    path.write_text(json.dumps(content))
    over = {(p.criterion, p.final_keep): p.over_cut for p in evaluate.curve([path])}
    assert over.pop(("influence", 0.1)).estimate == pytest.approx(0.05)  # the nearest in FLOPs
    assert len(over) == 3 and set(over.values()) == {None}
    out = tmp_path / "out.json"
    result = simba_command("curve", path, "--json", out)
    assert result.exit_code == 0 and "+0.050 (+0.050 to +0.050)" in result.output
    assert sum(point["over_cut"] is not None for point in json.loads(out.read_text())) == 1


def test_curve_of_task_scores(tmp_path):
    paths = []
    for model, flops, right in (("a", 10, (0.0, 1.0)), ("b", 20, (1.0, 1.0))):
        path = tmp_path / f"{model}.json"
        store = Store(path, "eval", {"model": model}, evaluate.TaskCell, {})
        score = sum(right) / 2
        store.add(
            evaluate.TaskCell(
                "piqa", 3, "dense", 1.0, "acc", score, 0.1, (), right, "1", 9.0, 2.0, 0, flops, 1.0
            )
        )
        paths.append(path)
    worse, better = evaluate.curve(paths)
    assert (worse.place, worse.measure, worse.rival) == ("piqa", "acc", None)
    assert better.rival == "a" and better.over.estimate == 0.5
    assert better.quality.low == pytest.approx(1 - 0.196)


def test_report_of_two_files_of_one_model_compares_nothing(tmp_path):
    for name in ("one", "two"):
        curve_file(tmp_path, name, 10, (1.0, 2.0), model="the same")
    assert simba_command("report", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert ": one\n" in page and ": two\n" in page and "FLOPs and quality" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["b"]}, "can't be compared: texts is"),
        ({"model": "/models/one"}, "one file per model"),
    ],
)
def test_curve_of_what_can_t_be_compared(tmp_path, change, message):
    paths = [
        curve_file(tmp_path, "one", 10, (1.0,)),
        curve_file(tmp_path, "two", 20, (1.0,), **change),
    ]
    result = simba_command("curve", *paths)
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_curve_of_another_experiment(results):
    result = simba_command("curve", results / "flow.json")
    assert result.exit_code == 1 and "'flow'" in result.output


def test_a_folder_of_tasks_is_the_same_elsewhere(tmp_path):
    prints = []
    for name, question in (("a", "Why?"), ("b", "Why?"), ("c", "Who?")):
        folder = tmp_path / name / "tasks"
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "test.jsonl").write_text(json.dumps({"question": question}))
        (folder / "one.yaml").write_text(json.dumps({"dataset_path": str(folder / "data")}))
        (folder / "notes.md").write_text(name)
        prints.append(fingerprint_folder(folder, lm_eval.TASK_FILES))
    assert prints[0] == prints[1] != prints[2] and prints[0].startswith("tasks ")


def test_store_replaces_nothing_that_is_there(tmp_path):
    cell = evaluate.ContextCell(8, "recency", 0.5, 10, 0.7, (1.0, 2.0))
    path = tmp_path / "deep" / "x.json"
    store = Store(path, "ppl", {}, evaluate.ContextCell, {})
    store.add(cell)
    store.add(cell)
    assert Store(path, "ppl", {}, evaluate.ContextCell, {}).cells == [cell]
    assert sorted(p.name for p in path.parent.iterdir()) == [".x.json.lock", "x.json"]


def test_flops_agrees_with_python(tmp_path, demo):
    path = tmp_path / "flops.json"
    result = simba_command("flops", "--model", DEMO_MODEL, "--length", "300", "--json", path)
    assert result.exit_code == 0, result.output
    expected = simba.flops(simba.sparsify(demo[0], 0.1), 300)
    assert json.loads(path.read_text())["total"] == expected.total
    assert str(expected) in result.output


def test_env_names_versions_and_backend(tmp_path):
    result = simba_command("env", "--device", "cpu", "--json", tmp_path / "env.json")
    assert result.exit_code == 0
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["backend"] == "torch"
    assert simba.__version__ in result.output


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppl", ["--criteria", "nonsense"], "unknown criterion"),
        ("ppl", ["--keep", "2"], "final_keep"),
        ("ppl", ["--contexts", "a,b"], "--contexts takes numbers"),
        ("ppl", ["--contexts", "100000"], "tokens"),
        ("flow", ["--layers", "99"], "layers 0 to 11"),
        ("recall", ["--cue", "50"], "cue"),
        ("redundancy", ["--device", "nowhere"], "--device nowhere"),
        ("ppl", ["--dataset", "pg19"], "--text or as --dataset, not both"),
        ("ablate", ["--split", "train"], "belong to --dataset"),
    ],
)
def test_errors_are_one_line_that_says_what(texts, name, options, message):
    result = command(name, texts, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "name", [*COMMANDS, "generate", "serve", "flops", "curve", "report", "env"]
)
def test_help_has_an_example(name):
    result = simba_command(name, "--help")
    assert result.exit_code == 0
    assert f"simba {name}" in result.output.split("Example:")[1]


@pytest.mark.parametrize("command", [[], ["generate"], ["serve"]])
def test_help_says_what_presets_are_for(command):
    words = " ".join(re.sub(r"[│\n]", " ", simba_command(*command, "--help").output).split())
    for name, purpose in PURPOSES.items():
        assert name in words and purpose in words


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_no_command_is_a_long_list_of_parameters(name):
    """Shared options are groups; a command's own parameters fit on a screen."""
    function = cli.COMMANDS[name]
    assert len(inspect.signature(function).parameters) <= 14
    assert len(inspect.getsource(function).splitlines()) <= 70


def test_groups_of_options_are_options():
    """Typer sees the fields of the groups; the command gets the groups."""
    seen = []

    def a_command(model: ModelOptions, *, output: OutputOptions, keep: float = 0.1) -> None:
        """Says what it got."""
        seen.append((model, output, keep))
        if keep > 1:
            raise InputError("keep is\ntoo large")

    app = typer.Typer()
    app.command("one")(flattened(a_command))
    result = CliRunner().invoke(app, ["--model", "m", "--plot", "x.png", "--keep", "0.5"])
    assert result.exit_code == 0, result.output
    assert seen == [(ModelOptions("m", "float32", "auto"), OutputOptions(None, Path("x.png")), 0.5)]
    refused(CliRunner().invoke(app, ["--model", "m", "--keep", "2"]), "error: keep is too large")
    assert CliRunner().invoke(app, ["--keep", "0.5"]).exit_code == 2  # no --model


def test_the_whole_way(texts, monkeypatch):
    """Nothing replaced: the checkpoint is loaded by the command."""
    monkeypatch.undo()
    result = command("ppl", texts, "--contexts", "32", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "2 documents" in result.output
    result = simba_command("ppl", "--model", texts.parent, "--text", texts)
    assert result.exit_code == 1 and "can't load the model" in result.output
    result = command("ppl", texts, "--dtype", "int8")
    assert result.exit_code == 1 and "--dtype" in result.output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import simba.__main__ as m; m.main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("pip install 'simba-ssm[cli]'"), run.stderr


# --- refused before anything is loaded ------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """No model is loaded: what is wrong is found out before."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))


def refused(result, *messages):
    """One line that says what, and exit code 1."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for message in messages:
        assert message in line


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppl", ["--contexts", "32,128", "--room", "36"], "longest of contexts, 128 tokens, got 36"),
        ("ppl", ["--contexts", "-5"], "each of contexts must be an integer of at least 1, got -5"),
        ("ppl", ["--contexts", "0"], "each of contexts must be an integer of at least 1, got 0"),
        ("recall", ["--distances", "67", "--room", "1"], "longest of distances, 67 tokens, got 1"),
        ("recall", ["--distances", "-67"], "each of distances must be an integer of at least 0"),
        ("recall", ["--task", "passkey", "--lengths", "-1"], "each of lengths must be"),
        ("recall", ["--task", "passkey", "--lengths", "64", "--room", "9"], "longest of lengths, 64"),
        ("speed", ["--lengths", "0"], "each of lengths must be an integer of at least 1, got 0"),
        ("flow", ["--layers", "-1"], "each of layers must be an integer of at least 0, got -1"),
        ("ablate", ["--keep", "0.5,nan"], "keeps must be values of final_keep"),
        ("speed", ["--device", "meta"], "--device meta"),
    ],
)  # fmt: skip
def test_sizes_that_measure_something_else(texts, unloaded, name, options, message):
    given = COMMANDS[name] if "--task" not in options else []
    text = [] if name == "speed" else ["--text", texts]
    refused(simba_command(name, *MODEL, *text, *given, *options), message)


@pytest.mark.parametrize("said", ["", "two", "0", "-1"])
def test_no_number_of_processes(texts, unloaded, monkeypatch, tmp_path, said):
    """TrainingArguments would end in a traceback, or train alone."""
    monkeypatch.setenv("WORLD_SIZE", said)
    run = simba_command("finetune", *MODEL, "--text", texts, "--out", tmp_path / "out")
    refused(run, f"WORLD_SIZE in the environment must be a number of processes, got {said!r}")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_none(texts, unloaded, tmp_path):
    path = tmp_path / "null.jsonl"
    path.write_text(texts.read_text().splitlines()[0] + '\n{"text": null}\n', encoding="utf-8")
    refused(command("ppl", path), "null.jsonl:2", "must be a string, got null")


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("name", ["ppl", "flops", "curve", "env"])
def test_outputs_are_tried_first(results, texts, unloaded, monkeypatch, tmp_path, name, option):
    """A file stands where a folder should: nobody can write there, not even root."""
    if option == "--plot" and name in ("flops", "env"):
        return
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.png").mkdir()
    commands = {
        "ppl": ("ppl", *MODEL, "--text", texts, *COMMANDS["ppl"]),
        "flops": ("flops", "--model", "nowhere"),
        "curve": ("curve", tmp_path / "missing.json"),
        "env": ("env", "--device", "nowhere"),
    }
    refused(
        simba_command(*commands[name], option, tmp_path / "file" / "out.png"), "can't write", "file"
    )
    refused(simba_command(*commands[name], option, tmp_path / "folder.png"), "it is a folder")

    def full(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    refused(simba_command(*commands[name], option, tmp_path / "new.png"), "Read-only file system")
    assert not (tmp_path / "new.png").exists()


@pytest.mark.parametrize("name", ["figure", "figure.xyz", "figure.json", "figure.pgf"])
def test_a_figure_s_ending_is_looked_at_first(results, texts, unloaded, tmp_path, name):
    for arguments in (
        ("ppl", *MODEL, "--text", texts, *COMMANDS["ppl"]),
        ("curve", results / "ppl.json"),
    ):
        refused(simba_command(*arguments, "--plot", tmp_path / name), ".png, .svg or .pdf")
    same = tmp_path / "same.png"
    refused(command("ppl", texts, "--json", same, "--plot", same), "are one file")


def test_missing_folders_are_made(results, tmp_path):
    for name, arguments in (
        ("flops", ["--model", DEMO_MODEL]),
        ("env", ["--device", "cpu"]),
        ("curve", [results / "ppl.json", "--plot", tmp_path / "curve" / "deep" / "x.pdf"]),
    ):
        path = tmp_path / name / "deep" / "x.json"
        assert simba_command(name, *arguments, "--json", path).exit_code == 0
        assert json.loads(path.read_text())


# --- checkpoints ----------------------------------------------------------------------------------


def damaged(folder, name, change):
    """The embedded model with one file changed."""
    shutil.copytree(DEMO_MODEL, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(change(content))
    return folder


def without_one_weight(content):
    tensors = safetensors.torch.load(content)
    del tensors["backbone.layers.3.mixer.x_proj.weight"]
    return safetensors.torch.save(tensors, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "messages"),
    [
        ("model.safetensors", lambda c: c[: len(c) // 2], ["can't load the model", "Safetensor"]),
        ("model.safetensors", lambda c: b"", ["can't load the model"]),
        ("model.safetensors", without_one_weight, ["lacks 1", "layers.3.mixer.x_proj.weight"]),
        ("config.json", lambda c: c[:99], ["can't load the model", "config.json"]),
        ("config.json", lambda c: b"[]", ["can't load the model"]),
        ("config.json", lambda c: c.replace(b": 256", b': "a"'), ["can't load the model"]),
        ("config.json", lambda c: c.replace(b'_size": 16', b'_size": 8'), ["another shape"]),
        ("tokenizer.json", lambda c: c[:999], ["can't load the tokenizer"]),
        ("tokenizer.json", lambda c: b"[]", ["can't load the tokenizer"]),
        ("tokenizer_config.json", lambda c: b"{", ["can't load the tokenizer"]),
    ],
)
def test_damaged_checkpoints(texts, monkeypatch, tmp_path, name, change, messages):
    monkeypatch.undo()
    folder = damaged(tmp_path / "model", name, change)
    assert (folder / name).read_bytes() != (DEMO_MODEL / name).read_bytes()
    options = ["--model", folder, "--device", "cpu", "--text", texts]
    refused(simba_command("ppl", *options, *COMMANDS["ppl"]), *messages)
    if name == "config.json" and "shape" not in messages[0]:
        refused(simba_command("flops", "--model", folder), "can't load the configuration")


def test_a_tokenizer_of_another_model(texts, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: tiny_mamba())
    refused(command("ppl", texts), "is not the model's", "has 61")


# --- results --------------------------------------------------------------------------------------


def test_results_are_finite_or_there_are_none(texts, monkeypatch, tmp_path, demo):
    """NaN is not JSON. Cells that were finite stay."""
    model, path = demo[0], tmp_path / "ppl.json"
    monkeypatch.setattr(loading, "load_model", lambda *_: model)
    original, runs = evaluate.contexts.measure, []

    def measure(*arguments):
        runs.append(1)
        return original(*arguments) if len(runs) < 4 else (1.0, float("nan"))

    monkeypatch.setattr(evaluate.contexts, "measure", measure)
    refused(command("ppl", texts, "--json", path), "64 dense 1.0", "nan, which is not finite")
    assert len(json.loads(path.read_text(), parse_constant=pytest.fail)["cells"]) == 3
    monkeypatch.undo()
    model.backbone.norm_f.weight.data.fill_(float("nan"))
    monkeypatch.setattr(loading, "load_model", lambda *_: model)
    other = tmp_path / "other.json"
    refused(command("ppl", texts, "--json", other), "32 dense 1.0", "nan, which is not finite")
    assert not other.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_writes_what_is_not_finite(tmp_path, value):
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"result\.a\[1\]\.b is (nan|inf), which is not finite"):
        write(path, {"a": [1.0, {"b": value}]})
    assert not path.exists()
    path.write_text(json.dumps({"format": 1, "a": value}))
    with pytest.raises(InputError, match="which is not JSON"):
        read(path)


def saved(folder, model):
    """A model of tests, with a task that needs no tokenizer, in a folder."""
    model.save_pretrained(folder)
    return [
        "--model", folder, "--device", "cpu", "--task", "copying", "--lengths", "20",
        "--examples", "4", "--criteria", "recency",
    ]  # fmt: skip


def test_other_weights_in_the_same_folder_do_not_mix(monkeypatch, tmp_path):
    monkeypatch.undo()
    model, path = trained_model(), tmp_path / "results.json"
    options = [*saved(tmp_path / "model", model), "--json", path]
    assert simba_command("recall", *options, "--keep", "0.5").exit_code == 0
    assert simba_command("recall", *options, "--keep", "0.4").exit_code == 0
    before = path.read_text()
    assert len(json.loads(before)["cells"]) == 1 + 2 + 2  # dense, pruned, and the cuts beside them
    with torch.no_grad():  # the last value of one layer's bias
        model.backbone.layers[3].mixer.conv1d.bias[-1] += 1e-3
    saved(tmp_path / "model", model)
    refused(simba_command("recall", *options, "--keep", "0.3"), "weights", "another file")
    assert path.read_text() == before
    with torch.no_grad():
        model.backbone.layers[3].mixer.conv1d.bias[-1] -= 1e-3
    model.config.layer_norm_epsilon *= 10
    saved(tmp_path / "model", model)
    refused(simba_command("recall", *options, "--keep", "0.3"), "weights", "another file")
    content = json.loads(before)
    del content["settings"]["weights"]
    path.write_text(json.dumps(content))  # as an earlier version left it
    refused(simba_command("recall", *options, "--keep", "0.3"), "does not say which weights")
    assert evaluate.AnswerCell.from_dict(content["cells"][0])


def test_a_fingerprint_knows_every_value():
    model = tiny_mamba()
    first = fingerprint_weights(model)
    assert first == fingerprint_weights(tiny_mamba())
    prints = {first}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.view(-1)[-1] += 0.5
            prints.add(fingerprint_weights(model))
            parameter.copy_(before)
        assert fingerprint_weights(model) == first, name
    assert len(prints) == 1 + len(list(model.parameters()))
    assert fingerprint_weights(tiny_mamba(dtype=torch.bfloat16)) not in prints
    pruned = simba.sparsify(tiny_mamba(), 0.5)
    assert fingerprint_weights(simba.desparsify(pruned)) == first


def test_another_tokenizer_does_not_mix(results, texts, monkeypatch, tmp_path, demo):
    path = tmp_path / "ppl.json"
    path.write_bytes((results / "ppl.json").read_bytes())
    assert command("ppl", texts, "--json", path).exit_code == 0

    class Other:
        def __call__(self, text, **options):
            return {"input_ids": demo[1](text, **options)["input_ids"][::-1]}

    monkeypatch.setattr(loading, "load_tokenizer", lambda name: Other())
    refused(command("ppl", texts, "--json", path), "tokens", "another file")


def test_stores_of_one_file_add_up(tmp_path):
    path = tmp_path / "x.json"
    cells = [evaluate.ContextCell(8, "recency", k / 10, 10, 0.7, (1.0, 2.0)) for k in range(1, 7)]
    one, two = (Store(path, "ppl", {"a": 1}, evaluate.ContextCell, {}) for _ in range(2))
    for store, cell in zip((one, two, one, two, two, one), cells, strict=True):
        store.add(cell)
    two.add(cells[0])
    found = Store(path, "ppl", {"a": 1}, evaluate.ContextCell, {}).cells
    assert found == cells and one.cells == cells
    other = Store(tmp_path / "y.json", "ppl", {"a": 2}, evaluate.ContextCell, {})
    other.path = path  # as if the file had not been there when it began
    with pytest.raises(InputError, match=r"made with a 1, this run has 2; give another file"):
        other.add(cells[0])
    path.unlink()
    one.add(evaluate.ContextCell(9, "recency", 0.1, 10, 0.7, (1.0, 2.0)))
    assert len(Store(path, "ppl", {"a": 1}, evaluate.ContextCell, {}).cells) == 7


def test_keeps_of_many_digits_are_known_again(tmp_path):
    path = tmp_path / "x.json"
    for _ in range(2):
        for keep in (1 / 3, 0.33333334):
            store = Store(path, "ppl", {}, evaluate.ContextCell, {})
            store.add(evaluate.ContextCell(8, "recency", keep, 10, 0.7, (1 / 3, 2.0)))
    cells = Store(path, "ppl", {}, evaluate.ContextCell, {}).cells
    assert [cell.final_keep for cell in cells] == [1 / 3, 0.33333334]
    assert cells[0].losses == (0.3333333, 2.0)


TWO = """
import os, pathlib, sys, time
from simba import cli
from simba.cli import experiment
from simba.evaluate import store
import transformers.models.mamba.modeling_mamba
child = os.fork()  # two processes and one import
folder, *keeps = sys.argv[1:4]
number = int(child == 0)
ready, go = (pathlib.Path(folder, name) for name in (f"ready{number}", "go"))
class Slow(store.Store):
    def add(self, cell):
        super().add(cell)
        time.sleep(0.02)
    def bind(self, **found):
        super().bind(**found)
        ready.touch()
        while not go.exists():
            time.sleep(0.005)
experiment.Store = Slow
sys.argv[1:] = [*sys.argv[4:], "--keep", keeps[number]]
try:
    cli.main()
finally:
    if child and os.waitpid(child, 0)[1]:
        os._exit(1)
"""


def test_two_processes_share_a_file(tmp_path):
    """Both have opened it before either has a cell: each one's cells are in it behind them."""
    path = tmp_path / "results.json"
    options = saved(tmp_path / "model", trained_model())
    keeps = [[f"0.{i:03}" for i in range(start, 410, 50)] for start in (10, 35)]
    command = [sys.executable, "-c", TWO, tmp_path, *map(",".join, keeps)]
    command += ["recall", *options, "--json", path]
    with subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        deadline = time.monotonic() + 120
        try:
            while not all((tmp_path / f"ready{number}").exists() for number in range(2)):
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.05)
        finally:
            (tmp_path / "go").touch()
        output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 1 + 2 * (8 + 8)
    wanted = {("dense", 1.0)} | {
        (name, float(keep)) for name in ("recency", "cut") for part in keeps for keep in part
    }
    assert {(cell["criterion"], cell["final_keep"]) for cell in cells} == wanted


def test_a_file_that_another_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("simba.evaluate.store.PATIENCE", 0.1)
    path = tmp_path / "x.json"
    store = Store(path, "ppl", {}, evaluate.ContextCell, {})
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    lock = str(tmp_path / ".x.json.lock")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(InputError, match="can't lock"):
                store.add(evaluate.ContextCell(8, "recency", 0.5, 10, 0.7, (1.0, 2.0)))
        finally:
            other.kill()
    store.add(evaluate.ContextCell(8, "delta", 0.5, 10, 0.7, (1.0, 2.0)))
    assert [cell.criterion for cell in store.cells] == ["delta"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["cells"].append(c["cells"][0]), "occurs twice"),
        (lambda c: c["cells"][1].update(final_keep="0.1"), "'0.1' instead of a number"),
        (lambda c: c["cells"][1].update(final_keep=True), "True instead of a number"),
        (lambda c: c["cells"][1].update(context=-3), "-3, which is out of range"),
        (lambda c: c["cells"][1].update(losses=[]), "0 losses"),
        (lambda c: c["cells"][1].update(losses=[1.0]), "2 documents"),
        (lambda c: c["cells"][1].update(losses=[1.0, float("nan")]), "NaN, which is not JSON"),
        (lambda c: c["cells"][1].update(criterion="\ud800"), "surrogates not allowed"),
        (lambda c: c.update(cells={}), "its cells should be a list"),
        (lambda c: c.pop("settings"), "its settings should be a mapping"),
        (lambda c: c.update(experiment=[]), "its experiment should be a name"),
    ],
)
def test_damaged_results(results, texts, tmp_path, change, message):
    content = json.loads((results / "ppl.json").read_text())
    change(content)
    path = tmp_path / "ppl.json"
    path.write_text(json.dumps(content))
    refused(simba_command("report", tmp_path), "ppl.json", message)
    if "documents" not in message:  # of one file, all the same: seen when they are compared
        refused(simba_command("curve", path), "ppl.json", message)
        refused(command("ppl", texts, "--json", path), "ppl.json", message)


NONSENSE = (None, True, "x", "\ud800", [], {}, -1, 0, 10**400, 1e308, [[1]], float("inf"), KeyError)


def nodes(value, path=()):
    yield path
    names = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    for name in names:
        yield from nodes(value[name], (*path, name))


@pytest.mark.parametrize("name", [*COMMANDS, "task"])
def test_nonsense_in_results_is_refused_or_read(results, tmp_path, name):
    """Anywhere in a file: never another exception than ours."""
    whole = json.loads((results / f"{name}.json").read_text())
    text, rng = json.dumps(whole), random.Random(name)
    damaged_files = [text[: rng.randrange(len(text))] for _ in range(20)]
    for place in rng.choices([path for path in nodes(whole) if path], k=60):
        content = json.loads(text)
        above, (*before, last) = content, place
        for step in before:
            above = above[step]
        value = rng.choice(NONSENSE)
        if value is KeyError:
            del above[last]
        else:
            above[last] = value
        damaged_files.append(json.dumps(content))
    path = tmp_path / "x.json"
    refusals = 0
    for content in damaged_files:
        path.write_text(content, encoding="utf-8")
        try:
            read_again = read(path)
            experiment = EXPERIMENTS.get(read_again["experiment"])
            if experiment is not None:
                cells = cells_of(path, read_again, experiment.kind)
                experiment.table(cells)
                getattr(plots, experiment.figure)(cells)
        except InputError:
            refusals += 1
    assert 40 < refusals < len(damaged_files)


def test_report_leaves_out_what_is_no_experiment(results, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for name in ("flops", "env", "curve"):
        arguments = {
            "flops": ["--model", DEMO_MODEL],
            "env": ["--device", "cpu"],
            "curve": [results / "ppl.json"],
        }[name]
        path = folder / f"my-{name}.json"
        assert simba_command(name, *arguments, "--json", path).exit_code == 0
    refused(simba_command("report", folder), "no results in", "my-env.json is of simba env")
    (folder / "ppl.json").write_bytes((results / "ppl.json").read_bytes())
    result = simba_command("report", folder)
    assert result.exit_code == 0, result.output
    page = (folder / "report.md").read_text()
    assert "## Perplexity by context: ppl" in page and page.count("\n## ") == 1
    for name in ("flops", "env", "curve"):
        assert f"my-{name}.json is of simba {name}" in page
        assert f"not shown: my-{name}.json, of simba {name}" in result.output
    for nonsense in ("{}", "[]", "3", "[1]", '{"total": 1}', '[{"place": 1}]'):
        (folder / "other.json").write_text(nonsense)
        refused(simba_command("report", folder), "other.json does not hold results of simba")
    (folder / "other.json").write_text('{"format": 1, "cells"')
    refused(simba_command("report", folder), "can't read results from", "other.json")


def test_curves_of_other_tokens_are_not_compared(tmp_path):
    old = curve_file(tmp_path, "old", 10, (1.0,))
    one = curve_file(tmp_path, "one", 20, (1.0,), tokens="a", weights="b")
    two = curve_file(tmp_path, "two", 30, (1.0,), tokens="c", weights="d")
    assert len(evaluate.curve([old, one])) == len(evaluate.curve([two, old])) == 4
    with pytest.raises(InputError, match="tokens is 'c' and 'a'"):
        evaluate.curve([one, two])
