"""Things to remember in ordinary prose, and the script that teaches a small model to find them."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BambaConfig, MambaConfig

from conftest import DEMO_MODEL
from conftest import DEMO_TEXT as TEXT
from simba import InputError, evaluate
from simba.evaluate.prose import KINDS, LABELS, PLACES, Pools, draw, prose_in_text, tokens_of
from simba.evaluate.synthetic import passkey_in_text
from test_examples import run_here, script

ROOM = {"room": 400, "prompts": 3, "seed": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return evaluate.read_documents([TEXT], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_was_said(kind, documents, tokenizer):
    rows = prose_in_text(kind, documents, tokenizer, length=250, **ROOM)
    control = prose_in_text(kind, documents, tokenizer, length=250, present=False, **ROOM)
    asked = rows.ids[:, rows.targets]
    assert rows.ids.shape == (3, 250 + len(rows.targets)) and rows.prompt == 250
    assert torch.equal(rows.ids.gather(1, rows.needles), asked)
    assert torch.equal(control.ids[:, rows.targets], asked)
    assert bool((control.ids.gather(1, rows.needles) != asked).any(1).all())
    changed = (rows.ids != control.ids).sum(1)
    assert bool((changed >= 1).all()) and (kind == "fewshot" or bool((changed <= 2).all()))
    assert torch.equal(prose_in_text(kind, documents, tokenizer, length=250, **ROOM).ids, rows.ids)
    # a shorter prompt asks the same, and ends with the same text
    shorter = prose_in_text(kind, documents, tokenizer, length=220, **ROOM)
    assert torch.equal(shorter.ids[:, -8:], rows.ids[:, -8:])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_statement_tells_the_answer(kind, tokenizer):
    pools = Pools.of(tokenizer)
    answers = set()
    for seed in range(60):
        item, other = (
            draw(kind, pools, Random(seed), present=present) for present in (True, False)
        )
        answers.add(item.answer)
        assert item.statement[item.place] == item.answer != other.statement[item.place]
        assert (item.question, item.answer, item.beside) == (
            other.question, other.answer, other.beside
        )  # fmt: skip
        said = "".join(item.statement)
        if kind == "pairs":  # the control's list does not hold the answer at all
            assert item.answer not in other.statement
            assert said.count(item.answer + ",") + said.count(item.answer + ".") == 1
        if kind == "fact":
            assert not any(item.answer in text for text in (*item.beside, item.question))
        if kind == "fewshot":
            word = item.question.split()[-2]
            assert f" {word} is" not in item.statement  # the word asked for is a new one
            assert item.statement.count(item.answer) == 3
    assert len(answers) >= 5
    assert {len(tokens_of(answer, tokenizer)) for answer in answers} == {1}


def test_a_tokenizer_with_no_two_answers_alike():
    def one_each(text, **_):
        return {"input_ids": list(range((*PLACES, *LABELS, text[1:]).index(text[1:])))}

    with pytest.raises(InputError, match="answers can't be compared"):
        Pools.of(one_each)


def test_places(documents, tokenizer):
    """What is asked for stands where it should; all else is as it was."""
    options = {**ROOM, "length": 250, "prompts": 20}
    anywhere = prose_in_text("fact", documents, tokenizer, **options)
    far = prose_in_text("fact", documents, tokenizer, **options, places=(0, 0.4))
    near = prose_in_text("fact", documents, tokenizer, **options, places=[0.5, 1])
    around = 250 - 40  # at least so much text
    assert far.needles.max() < 0.4 * 250 + 40 and near.needles.min() >= 0.5 * around
    assert anywhere.needles.min() < 0.2 * 250 and anywhere.needles.max() > 0.8 * around
    assert torch.equal(far.ids[:, far.targets], anywhere.ids[:, anywhere.targets])
    keys = {"length": 250, "room": 250, "digits": 3, "keys": 20, "seed": 0}
    told = passkey_in_text(documents, tokenizer, **keys, places=(0, 0.3)).ids
    at = (told == tokens_of(" Remember", tokenizer)[0]).int().argmax(1)
    assert 0 < at.max() < 0.3 * 250 + 20
    for wrong in ((0.4, 0.2), (0, 1.1), (0,), "0,1", ("a", "b"), 0.4):
        with pytest.raises(InputError, match="places must be"):
            prose_in_text("fact", documents, tokenizer, **options, places=wrong)


def test_measured_like_other_tasks(documents, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    cells = evaluate.prose_task(
        model, documents, tokenizer, task="fact", lengths=[120], criteria=["recency"], keeps=[0.5],
        prompts=2, batch_size=2,
    )  # fmt: skip
    assert [cell.criterion for cell in cells][:2] == ["dense", "recency"]
    assert cells[0].survived == (1.0,) and len(cells[0].losses) == len(documents)
    with pytest.raises(InputError, match="kind must be one of"):
        prose_in_text("riddle", documents, tokenizer, length=250, **ROOM)
    with pytest.raises(InputError, match="no room"):
        prose_in_text("fact", documents, tokenizer, length=30, **ROOM)
    with pytest.raises(InputError, match="no documents"):
        prose_in_text("fact", [], tokenizer, length=250, **ROOM)


SIZES = {"vocab_size": 8192, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
HYBRID = {
    "num_hidden_layers": 2, "attn_layer_indices": [1], "intermediate_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_d_state": 4, "mamba_chunk_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tiny", "options"),
    [
        (MambaConfig(**SIZES, state_size=4, bos_token_id=0, eos_token_id=0), []),
        (BambaConfig(**SIZES | HYBRID, bos_token_id=0, eos_token_id=0), ["--native"]),
    ],
    ids=["mamba", "hybrid"],
)
def test_the_training_script(tmp_path, tokenizer, tiny, options):
    """Answers get likelier, and what it saves is a model with its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    arguments = [
        "--model", tmp_path / "start", "--data", TEXT, "--held-out",
        TEXT, "--out", tmp_path / "model", "--length", 256, "--start-length", 128, "--tokens", 512,
        "--items", 3, "--steps", 30, "--check", 200, "--prompts", 1, "--check-every", 15,
        "--learning-rate", 0.02, "--workers", 0, "--device", "cpu", *options,
    ]  # fmt: skip
    said = run_here(script("train_memory"), *arguments)
    lines = [line.split() for line in said.splitlines() if line.startswith("step")]
    losses = [float(line[line.index("answers") + 1]) for line in lines]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert {"fact", "pairs", "fewshot", "passkey"} <= set(lines[-1])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 16
