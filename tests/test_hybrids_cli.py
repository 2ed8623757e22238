"""The command line on checkpoints of hybrids: it works without options, or says which one helps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT
from simba import cli
from simba.cli.ablate import CRITERIA
from simba.cli.options import PruningOptions
from test_cli import refused
from test_hybrids import tiny
from test_hybrids_placed import FAMILIES as PLACED
from test_hybrids_placed import placed

TEXT = DEMO_TEXT.read_text(encoding="utf-8")[50_000:50_900]
FAMILIES = ["Bamba", "NemotronH"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tokenizer, tmp_path_factory):
    """A checkpoint with a tokenizer, of random weights."""
    path = tmp_path_factory.mktemp(request.param)
    tiny(request.param, torch.float32, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def simba_run(command, folder, *arguments, device="cpu"):
    given = [command, "--model", folder, *arguments]
    given += [] if device is None else ["--device", device]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*map(str, given)])


def greedy(folder, tokenizer, *turns, new=5, **options):
    """The likeliest tokens behind turns, by single calls of the sparsified model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    simba.sparsify(model, **options)
    cache, made = None, []
    with torch.no_grad():
        for text in turns:
            ids = torch.tensor([tokenizer(text).input_ids])
            turn = {} if cache is None else {"prompt_length": ids.shape[1]}
            out = model(ids, past_key_values=cache, use_cache=True, **turn)
            cache = out.past_key_values
        while len(made) < new:
            made.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([made[-1:]]), past_key_values=cache, use_cache=True)
    return tokenizer.decode(made, clean_up_tokenization_spaces=False)


def test_generate_reads_the_prompt_as_a_whole(folder, tokenizer):
    result = simba_run("generate", folder, "--prompt", TEXT, "--keep", 0.3, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    options = {"final_keep": 0.3, "dense_path": "simba"}
    assert result.stdout == greedy(folder, tokenizer, TEXT, **options)
    assert "  read as a whole: hybrids with attention can't be read in chunks" in result.stderr
    question = " Where was it?"
    asked = simba_run(
        "generate", folder, "--prompt", TEXT, "--keep", 0.3, "--max-new-tokens", 5,
        "--question", question,
    )  # fmt: skip
    assert asked.exit_code == 0, asked.output
    assert asked.stdout == greedy(folder, tokenizer, TEXT, question, **options) != result.stdout


def test_pipeline(folder, tokenizer):
    """A batch of two texts, the shorter one padded on the left, and each as alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    simba.sparsify(model, 0.3)
    texts = [TEXT[:300], TEXT[300:420]]
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    with simba.record(model) as recorded:
        found = [made[0]["generated_text"] for made in writer(texts, batch_size=2, **options)]
    assert recorded.positions[-1].shape[1] < recorded.positions[0].shape[1]
    assert found == [greedy(folder, tokenizer, text, final_keep=0.3) for text in texts]


def kv_by_layer(model, ids):
    """Bytes of keys and values in the cache behind a prefill."""
    cache = model(ids, use_cache=True).past_key_values
    held = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    return [sum(t.nbytes for t in pair if t is not None) for pair in held]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_count_the_bytes_of_keys_and_values(folder, tokenizer, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "flops.json"
    result = simba_run(
        "flops", tmp_path / "model", "--length", 50, "--keep", 0.3, "--json", path, device=None
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text(encoding="utf-8"))
    ids = torch.tensor([tokenizer(TEXT).input_ids[:50]])
    dense = kv_by_layer(model, ids)
    assert found["dense_kv_bytes"] == sum(dense) == simba.flops(model, 50).kv_bytes
    pruned = kv_by_layer(simba.sparsify(model, 0.3), ids)
    assert [layer["kv_bytes"] for layer in found["layers"]] == pruned
    assert found["kv_bytes"] == sum(pruned) < sum(dense)
    assert found["total"] == simba.flops(model, 50).total
    cut = kv_by_layer(simba.sparsify(model, 0.3, schedule="cut"), ids)
    counted = simba.summary(model, 50).flops
    assert [layer.kv_bytes for layer in counted.layers] == cut == [n * 15 // 50 for n in dense]
    assert counted.dense_kv_bytes == sum(dense)


def test_presets_and_options_that_do_not_work(folder):
    def generate(*options):
        return simba_run("generate", folder, "--prompt", TEXT, "--max-new-tokens", 1, *options)

    refused(generate("--chunk-size", 64), "chunk_size=64", "--chunk-size 0")
    refused(generate("--preset", "recall"), "fate=write does not work with hybrids")
    for preset in ("paper", "text"):
        assert generate("--preset", preset).exit_code == 0
    assert "cut to the last" in generate("--schedule", "cut", "--keep", 0.3).stderr


@pytest.mark.parametrize("family", PLACED)
def test_ablate_leaves_out_criteria_that_cannot_score(family, tokenizer, tmp_path):
    """Without --criteria; one that is asked for by name is refused."""
    placed(family, vocab_size=len(tokenizer)).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text, path = tmp_path / "text.txt", tmp_path / "ablate.json"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--text", text, "--context", 40, "--snippet", 8, "--keep", 0.5, "--no-cut"]
    result = simba_run("ablate", tmp_path, *options, "--json", path)
    assert result.exit_code == 0, result.output
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [each["criterion"] for each in cells] == ["dense", "recency", "uniform", "random"]
    assert "can't score this model's layers: influence, delta\n" in result.stderr
    named = simba_run("ablate", tmp_path, *options, "--criteria", "recency,delta")
    refused(named, "criterion 'delta' scores layers by their scan")


def test_ablate_measures_all_that_can_score(folder, tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "ablate.json"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--text", text, "--context", 40, "--snippet", 8, "--keep", 0.5, "--no-cut"]
    result = simba_run("ablate", folder, *options, "--json", path)
    assert result.exit_code == 0, result.output
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [each["criterion"] for each in cells] == ["dense", *CRITERIA.split(",")]
    assert "left out" not in result.stderr


def test_memory_that_runs_out(folder, monkeypatch):
    """It does not send the user to an option that would be refused."""
    from simba.cli.answering import Session

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Session, "answer", full)
    result = simba_run("generate", folder, "--prompt", TEXT)
    refused(result, "out of memory", "--schedule cut")
    assert "--chunk-size" not in result.stderr


def test_a_server_reads_prompts_as_a_whole(monkeypatch):
    from transformers.cli.serving.model_manager import ModelManager

    from simba.cli.serve import sparsified_loads

    monkeypatch.setattr(ModelManager, "_load_model", lambda *_: tiny("Bamba", torch.float32))
    with sparsified_loads(PruningOptions(final_keep=0.25)):
        served = ModelManager._load_model(None, "bamba")
    config = simba.status(served).config
    assert config == simba.SimbaConfig(0.25, dense_path="simba").bound(5)


def test_what_the_other_commands_refuse(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    refused(simba_run("tune", folder, "--text", text), "simba.tune does not work with hybrids")
    for command in ("flow", "redundancy"):
        result = simba_run(command, folder, "--text", text, "--length", 50)
        refused(result, f"simba.evaluate.{command} does not work with hybrids")
    chunked = simba_run("ppl", folder, "--text", text, "--contexts", 50, "--chunk-sizes", 16)
    refused(chunked, "chunk_size=16 does not work with hybrids")
