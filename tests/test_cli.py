"""The command line on the embedded model, few tokens each."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, tiny_mamba
from simba import cli, evaluate
from simba.evaluate.store import Store
from simba.evaluate.tables import EXPERIMENTS
from simba.evaluate.texts import fingerprint_folder

MODEL = ["--model", str(DEMO_MODEL), "--device", "cpu"]
COMMANDS = {
    "ppl": ["--contexts", "32,64", "--snippet", "20"],
    "redundancy": ["--length", "64"],
    "flow": ["--length", "64"],
    "ablate": ["--context", "64", "--snippet", "20", "--keep", "0.5", "--criteria", "recency"],
    "speed": ["--lengths", "32", "--repeats", "1"],
    "recall": ["--distances", "16", "--passage", "20", "--keep", "0.5", "--criteria", "delta"],
}
PASSKEY = ["--task", "passkey", "--lengths", "64", "--keep", "0.5,0.02", "--criteria", "delta"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables must not depend on the window that the tests run in."""
    monkeypatch.setattr(cli.console, "width", 120)
    monkeypatch.setattr(cli.errors, "width", 120)


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
    monkeypatch.setattr(cli, "_load", lambda name, dtype, device: _demo[0])


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
        patch.setattr(cli, "_load", lambda name, dtype, device: _demo[0])
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
    monkeypatch.setattr(evaluate.contexts, "measure", lambda *a: (runs.append(1), original(*a))[1])
    result = command("ppl", texts, "--json", path)
    assert result.exit_code == 0, result.output
    assert len(runs) == 1
    assert f"{2.718281828:.2f}" in result.output
    again = json.loads(path.read_text())["cells"]
    assert again[:-1] == content["cells"]
    assert again[-1]["losses"] == pytest.approx(lost["losses"])


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
    for keeps, cells in (("0.5", 4), ("0.5,0.02", 6)):
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
        (["--task", "sums"], "--task must be one of passage, passkey"),
        (["--task", "passage"], "give --text"),
        (["--task", "mqar"], "was trained on copying, not on mqar"),
        (["--task", "copying", "--cue", "3"], "--cue does nothing in copying, which takes --len"),
        (["--task", "copying", "--text", "some.txt"], "leave out --text"),
        (["--task", "copying", "--lengths", "4"], "no room"),
    ],
)
def test_what_a_task_cannot_do_is_said(monkeypatch, options, message):
    monkeypatch.setattr(cli, "_load", lambda name, dtype, device: trained_model())
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
    assert result.exit_code == 0 and "1 documents" in result.output, result.output
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
        ({"model": "/models/one"}, "one file a model"),
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
        prints.append(fingerprint_folder(folder, cli.TASK_FILES))
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
        ("ppl", ["--dataset", "pg19"], "--text FILE, or --dataset NAME"),
        ("ablate", ["--split", "train"], "belong to --dataset"),
    ],
)
def test_errors_are_one_line_that_says_what(texts, name, options, message):
    result = command(name, texts, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", [*COMMANDS, "flops", "curve", "report", "env"])
def test_help_has_an_example(name):
    result = simba_command(name, "--help")
    assert result.exit_code == 0
    assert f"simba {name}" in result.output.split("Example:")[1]


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
