"""`simba generate` on the embedded model: its text is that of a plain loop over single steps."""

from __future__ import annotations

import copy
import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import tokenizers
import torch
from rich.console import Console
from rich.file_proxy import FileProxy
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, tiny_mamba
from simba import cli, evaluate
from simba.cli import generate, loading, terminal
from simba.cli.answering import last_tokens
from simba.cli.options import CHUNK_SIZE, PruningOptions
from simba.cli.streaming import AnswerStream
from simba.errors import ConfigError
from simba.fates import Skip, Write

TEXT = DEMO_TEXT.read_text(encoding="utf-8")[50_000:50_900]
KEPT, CHUNK, NEW = 0.3, 64, 8
PRUNING = ["--keep", KEPT, "--chunk-size", CHUNK, "--criterion", "recency"]


def sparsified(model):
    """The model as `PRUNING` says."""
    return simba.sparsify(model, KEPT, criterion="recency", chunk_size=CHUNK)


@pytest.fixture(autouse=True)
def one_load(monkeypatch, demo):
    """The same weights in every test, read once. (Some tests undo this.)"""
    monkeypatch.setattr(loading, "load_model", lambda name, dtype, device: demo[0])
    monkeypatch.setattr(loading, "load_tokenizer", lambda name: demo[1])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def simba_generate(*arguments, stdin=None, new=NEW):
    options = ["--model", DEMO_MODEL, "--device", "cpu", "--max-new-tokens", new, *arguments]
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, ["generate", *map(str, options)], input=stdin
    )


def answered(*arguments, **more):
    result = simba_generate(*arguments, **more)
    assert result.exit_code == 0, result.output
    return result


def refused(result, *messages):
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for message in messages:
        assert message in line
    assert result.stdout == ""


@torch.no_grad()
def plain_loop(model, tokenizer, *turns, new=NEW):
    """The likeliest token again and again, a call of the model each; and the last output."""
    cache = None
    for ids in turns:
        given = torch.tensor([ids])
        out = first = model(
            given,
            cache_params=cache,
            use_cache=True,
            logits_to_keep=1,
            **({} if cache is None else {"prompt_length": len(ids)}),
        )
        cache = out.cache_params
    made = []
    while len(made) < new:
        made.append(int(out.logits[0, -1].argmax()))
        if made[-1] == tokenizer.eos_token_id:
            break
        out = model(torch.tensor([[made[-1]]]), cache_params=cache, use_cache=True)
    return tokenizer.decode(made, skip_special_tokens=True), first


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [CHUNK, 0])
def test_the_text_is_that_of_a_plain_loop(file, demo, chunk):
    model, tokenizer = demo
    result = answered("--file", file, "--keep", KEPT, "--chunk-size", chunk)
    simba.sparsify(model, KEPT, chunk_size=chunk or None)
    ids = tokenizer(TEXT).input_ids
    text, _ = plain_loop(model, tokenizer, ids)
    assert len(ids) > 2 * CHUNK and text
    assert result.stdout == text
    assert answered("--prompt", TEXT, "--keep", KEPT, "--chunk-size", chunk).stdout == text
    from_stdin = answered("--file", "-", "--keep", KEPT, "--chunk-size", chunk, stdin=TEXT)
    assert from_stdin.stdout == text


def test_questions_follow_one_document(file, demo, tmp_path):
    """Each of them as if it were the only one, and the document is read once."""
    model, tokenizer = demo
    path, questions = tmp_path / "out.json", [" What did Anne say to him, then?", " Why"]
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args or (kwargs["input_ids"],))[0].shape[1]),
        with_kwargs=True,
    )
    asked = [option for question in questions for option in ("--question", question)]
    result = answered("--file", file, *PRUNING, *asked, "--json", path)
    hook.remove()
    document, *turns = (tokenizer(text).input_ids for text in (TEXT, *questions))
    assert len(turns[1]) == 1  # a question of one token is a turn as well
    assert [n for n in calls if n > 1] == [len(document), len(turns[0])]
    sparsified(model)
    texts = [plain_loop(model, tokenizer, document, ids)[0] for ids in turns]
    assert result.stdout == "\n".join(texts)
    content = json.loads(path.read_text())
    assert [answer["text"] for answer in content["answers"]] == texts
    assert [answer["question"] for answer in content["answers"]] == questions
    assert [turn["tokens"] for turn in content["turns"]] == [len(document), *map(len, turns)]
    assert content["document_seconds"] > 0
    assert "question: Why\n" in result.stderr and "question 2: 1 token, not" in result.stderr


def test_sampling(demo, file):
    model, tokenizer = demo
    options = ["--file", file, *PRUNING, "--temperature", 0.9, "--top-p", 0.95]
    result = answered(*options, "--seed", 3)
    assert answered(*options, "--seed", 3).stdout == result.stdout
    assert answered(*options).stdout != result.stdout
    sparsified(model)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    torch.manual_seed(3)
    drawn = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **drawn)
    assert result.stdout == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["the", "the man"])
def test_the_shortest_prompts(demo, prompt):
    model, tokenizer = demo
    ids = tokenizer(prompt).input_ids
    assert len(ids) == len(prompt.split())
    result = answered("--prompt", prompt)
    simba.sparsify(model, chunk_size=CHUNK_SIZE)
    assert result.stdout == plain_loop(model, tokenizer, ids)[0]
    assert answered("--prompt", prompt, new=1).stdout == plain_loop(model, tokenizer, ids, new=1)[0]


def test_the_dense_model_answers_beside(demo, tmp_path):
    """On the whole prompt and on a cut one; its text is the stock model's, and not on stdout."""
    model, tokenizer = demo
    prompt, question = TEXT[:200], " Anne said"
    document, asked = tokenizer(prompt).input_ids, tokenizer(question).input_ids
    stock, texts = copy.deepcopy(model), []
    for rival, questions in (("cut", []), ("cut", [question]), ("dense", [])):
        path = tmp_path / "out.json"
        options = ["--prompt", prompt, "--keep", 0.02, "--criterion", "uniform"]
        options += ["--compare", rival, "--json", path]
        options += [option for each in questions for option in ("--question", each)]
        result = answered(*options)
        simba.sparsify(model, 0.02, criterion="uniform", chunk_size=CHUNK_SIZE)
        turns = [document, *([asked] if questions else [])]
        whole = [token for turn in turns for token in turn]
        read = sum(evaluate.cut_length(model, len(turn)) for turn in turns)
        read = whole[-read:] if rival == "cut" else whole
        assert (len(read) < len(whole)) == (rival == "cut")
        text, _ = plain_loop(stock, tokenizer, read)
        assert result.stdout == plain_loop(model, tokenizer, *turns)[0] != text
        assert text in result.stderr and f" {len(read)} tokens" in result.stderr
        compared = json.loads(path.read_text())["compared"]
        assert compared["with"] == rival and compared["answers"][0]["text"] == text
        assert compared["answers"][0]["prompt_tokens"] == len(read)
        texts.append(text)
    assert len(set(texts)) == 3


def test_a_cut_keeps_what_the_tokenizer_puts_in_front():
    assert last_tokens([7], [7, 1, 2, 3, 4], 3) == [7, 3, 4]
    assert last_tokens([7], [7, 1, 2], 3) == [7, 1, 2]
    assert last_tokens([7], [7, 1, 2], 1) == [2]
    assert last_tokens([], [1, 2, 3], 2) == [2, 3]


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_what_was_pruned_and_what_a_cut_costs(demo, file, tmp_path):
    model, tokenizer = demo
    path = tmp_path / "deep" / "out.json"
    result = answered("--file", file, *PRUNING, "--json", path, "--layers")
    content = json.loads(path.read_text())
    sparsified(model)
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        positions = model(torch.tensor([ids])).positions
    flops, cut = simba.flops(model, len(ids)), evaluate.cut_length(model, len(ids))
    (turn,) = content["turns"]
    assert turn["tokens_left"][-1] == positions.shape[1] < len(ids)
    assert (turn["flops"], turn["dense_flops"]) == (flops.total, flops.dense)
    assert turn["cut_tokens"] == cut and turn["chunks"] == -(-len(ids) // CHUNK)
    config = simba.SimbaConfig(KEPT, criterion="recency", chunk_size=CHUNK, dense_path="simba")
    assert content["config"] == config.to_dict()
    (answer,) = content["answers"]
    assert answer["text"] == result.stdout and answer["tokens"] == NEW
    assert answer["first_token_seconds"] > 0 and answer["tokens_per_second"] > 0
    assert content["peak_memory_bytes"] > 10**8
    assert f"prompt: {len(ids)} tokens in {turn['chunks']} chunks, {positions.shape[1]} left" in (
        result.stderr
    )
    assert f"{flops.ratio:.1%} of the dense model's FLOPs" in result.stderr
    assert f"cut to {cut} tokens" in result.stderr
    assert str(flops) in result.stderr
    # `simba report` knows the file, and leaves it out
    assert evaluate.markdown_report.others(path.parent) == {"out.json": "generate"}


def test_a_cut_prompt(demo, file):
    """The dense model's text after the end of the prompt, in chunks of its own."""
    model, tokenizer = demo
    ids = tokenizer(TEXT).input_ids
    kept = round(0.4 * len(ids))
    result = answered("--file", file, "--schedule", "cut", "--keep", 0.4, "--chunk-size", CHUNK)
    simba.sparsify(model, 1.0, dense_path="simba")
    assert result.stdout == plain_loop(model, tokenizer, ids[-kept:])[0]
    chunks = -(-kept // CHUNK)
    assert f"{len(ids)} tokens, cut to the last {kept} in {chunks} chunks" in result.stderr


def test_nothing_pruned_is_said(file):
    result = answered("--prompt", TEXT, "--keep", 1)
    assert "not pruned" in result.stderr
    assert "left at the last layer" not in result.stderr and "FLOPs" not in result.stderr


def test_a_bar_for_chunks_is_gone_before_the_text(monkeypatch, file):
    """A live bar of rich redirects stdout, so text written meanwhile would go astray."""
    alone = answered("--file", file, *PRUNING).stdout
    screen = Console(file=(shown := io.StringIO()), force_terminal=True)
    monkeypatch.setattr(terminal, "errors", screen)
    assert answered("--file", file, *PRUNING).stdout == alone != ""
    assert "reading the prompt" in shown.getvalue()
    live = []
    monkeypatch.setattr(
        generate, "write_text", lambda text: live.append(isinstance(sys.stdout, FileProxy))
    )
    answered("--file", file, *PRUNING)
    assert live and not any(live)


def test_a_bar_of_the_library_leaves_stdout_alone(monkeypatch, capsys):
    """So that `with simba.progress(model):` may stand around a streamer."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    model = simba.sparsify(tiny_mamba(), chunk_size=8)
    with torch.no_grad(), simba.progress(model):
        model(torch.arange(1, 41)[None])
        print("text")
    out, screen = capsys.readouterr()
    assert out == "text\n" and "prefill" in screen


# --- what it is called with -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the prompt as --prompt TEXT or as --file FILE"),
        (["--prompt", "a", "--file", "b"], "give the prompt as --prompt TEXT or as --file FILE"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--question", ""], "--question is empty"),
        (["--file", "missing.txt"], "can't read missing.txt: No such file"),
        (["--file", "."], "can't read .: Is a directory"),
        (["--file", "-"], "stdin is empty"),
        (["--prompt", "a", "--seed", "1"], "--seed does nothing without --temperature"),
        (["--prompt", "a", "--top-p", "0.9"], "--top-p does nothing without --temperature"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature must be a finite number"),
        (["--prompt", "a", "--keep", "2"], "final_keep must be"),
        (["--prompt", "a", "--criterion", "best"], "unknown criterion 'best'"),
        (["--prompt", "a", "--schedule", "1:x"], "--schedule takes pairs LAYER:RATIO"),
        (["--prompt", "a", "--schedule", "1,x"], "--schedule takes numbers"),
        (["--prompt", "a", "--schedule", "1,0.5", "--keep", "0.4"], "conflicting options"),
        (["--prompt", "a", "--min-tokens", "0"], "min_tokens"),
        (["--prompt", "a", "--compare", "worse"], "--compare must be cut or dense; got 'worse'"),
        (["--prompt", "a", "--json", "."], "can't write ."),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(monkeypatch, options, message):
    for loader in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(loading, loader, lambda *_: pytest.fail("something was loaded"))
    refused(simba_generate(*options, stdin=""), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not a text in UTF-8"),
        (b"MZ\x00\x00", "is not a text: it has a zero byte at 2"),
    ],
)
def test_files_that_hold_no_text(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(simba_generate("--file", path), message)
    refused(simba_generate("--file", "-", stdin=content), message)


def test_options_replace_what_a_checkpoint_says():
    saved = simba.SimbaConfig(0.4, "constant", "delta", min_tokens=7, chunk_size=64).to_dict()
    assert PruningOptions().config(saved).to_dict() == saved
    changed = PruningOptions(final_keep=0.2, criterion="recency", chunk_size=0).config(saved)
    expected = simba.SimbaConfig(0.2, "constant", "recency", min_tokens=7)
    assert changed.to_dict() == expected.to_dict()
    stepwise = PruningOptions(schedule="1:0.5,3:0.1").config(saved)
    assert stepwise.schedule == simba.PruneAt({1: 0.5, 3: 0.1}) and stepwise.final_keep == 0.1
    assert stepwise.min_tokens == 7
    composed = PruningOptions(criterion="window:0.5+delta", protect=4).config(saved)
    assert composed.protect == simba.Protect(4) and str(composed.criterion) == "window:0.5+delta"
    assert PruningOptions(protect=0).config(composed.to_dict()).protect is None
    writing = PruningOptions(fate="write:0.67").config(saved)
    assert writing.fate == Write(0.67) and PruningOptions().config(writing.to_dict()) == writing
    assert PruningOptions(preset="recall", fate="skip").config().fate == Skip()
    with pytest.raises(ConfigError, match="conflicting options"):
        PruningOptions(final_keep=0.2).config(stepwise.to_dict())
    assert PruningOptions().config().chunk_size == CHUNK_SIZE
    assert PruningOptions(chunk_size=0).config().chunk_size is None
    assert PruningOptions(schedule="1,0.5").config().schedule == (1.0, 0.5)
    curve = PruningOptions(schedule="power:0.5,hold:2").config().schedule
    assert curve == simba.Curve(0.5, hold=2)


def test_a_checkpoint_that_was_saved_sparsified(monkeypatch, demo, tmp_path, file):
    monkeypatch.undo()
    model, tokenizer = demo
    config = simba.SimbaConfig(0.2, criterion="recency", chunk_size=100)
    folder = tmp_path / "saved"
    simba.sparsify(model, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = tmp_path / "out.json"
    result = answered("--file", file, "--model", folder, "--json", path)
    assert json.loads(path.read_text())["config"] == config.to_dict()
    assert result.stdout == plain_loop(model, tokenizer, tokenizer(TEXT).input_ids)[0]


def test_memory_that_runs_out_is_said(monkeypatch, demo, file):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("x can't allocate memory y"),
    ):

        def full(*_, error=error, **__):
            raise error

        monkeypatch.setattr(type(demo[0]), "generate", full)
        refused(
            simba_generate("--file", file, "--chunk-size", 0), f"--chunk-size {CHUNK_SIZE} needs"
        )
        refused(simba_generate("--file", file, "--chunk-size", 9), "--chunk-size 4 needs less")
    monkeypatch.setattr(type(demo[0]), "generate", lambda *_, **__: 1 / 0)
    assert isinstance(simba_generate("--file", file).exception, ZeroDivisionError)


# --- checkpoints and tokenizers -------------------------------------------------------------------


def test_other_checkpoints_are_refused_by_name(monkeypatch, tmp_path, demo):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.undo()
    folder = tmp_path / "mamba-ssm"
    folder.mkdir()
    (folder / "config.json").write_text('{"d_model": 64, "n_layer": 2, "ssm_cfg": {}}')
    demo[1].save_pretrained(folder)
    refused(simba_generate("--prompt", "a", "--model", folder), "a checkpoint of mamba-ssm")
    with_attention = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8192)).save_pretrained(
        with_attention
    )
    demo[1].save_pretrained(with_attention)
    refused(simba_generate("--prompt", "a", "--model", with_attention), "GPT2LMHeadModel")


def test_a_checkpoint_without_its_tokenizer(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(loading, "load_model", lambda *_: tiny_mamba(vocab_size=200))
    tiny_mamba().config.save_pretrained(tmp_path)
    result = simba_generate("--prompt", "a", "--model", tmp_path)
    refused(result, "no files of a tokenizer", "--tokenizer NAME")
    result = simba_generate("--prompt", TEXT, "--model", tmp_path, "--tokenizer", DEMO_MODEL)
    refused(result, "the model knows 200", "another model's tokenizer")


def with_special_tokens(tokenizer):
    """A copy of the tokenizer that puts a token in front of every text, and one behind."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def test_special_tokens_stand_in_front_of_the_prompt_only(monkeypatch, demo, file):
    model, plain = demo
    adding = with_special_tokens(plain)
    document, question = (plain(text).input_ids for text in (TEXT, " Why did he go?"))
    assert adding(TEXT).input_ids == [0, *document, 0]
    monkeypatch.setattr(loading, "load_tokenizer", lambda _: adding)
    result = answered("--file", file, *PRUNING, "--question", " Why did he go?")
    sparsified(model)
    assert result.stdout == plain_loop(model, plain, [0, *document], question)[0]


def sentence_piece():
    """A tokenizer whose decoder drops the first space of what it is given, with single bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "\n", "▁▁▁▁"]
    model = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made), {word: i for i, word in enumerate(words)}


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_pieces_of_a_stream_are_the_whole_text(demo, kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "bytes":
        tokenizer = demo[1]
        rows = [tokenizer("a\n  b — “naïve” 🙂🙂 ﻿ \n\n c").input_ids]
        rows += torch.randint(8192, (20, 40), generator=generator).tolist()
        assert any("\ufffd" in tokenizer.decode(ids) for ids in rows)  # bytes that are no text
    else:
        tokenizer, number = sentence_piece()
        smile = [number[f"<0x{byte:02X}>"] for byte in "🙂".encode()]
        rows = [
            [number[word] for word in ("▁a", "b", "\n", "▁▁▁▁", "▁a", "▁", "b")],
            [*smile, 260, *smile],
        ]
        rows += torch.randint(257, 262, (20, 40), generator=generator).tolist()
        assert tokenizer.decode(rows[0]) == "a" + "b\n     a b"

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    for ids in rows:
        pieces: list[str] = []
        stream = AnswerStream(decode, pieces.append)
        stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for number_of_token, token in enumerate(ids, 1):
            stream.put(torch.tensor([token]))
            so_far = decode(ids[:number_of_token])
            if not so_far.endswith("\ufffd"):  # nothing is held back that could be written
                assert "".join(pieces) == so_far
        stream.end()
        stream.end()
        assert "".join(pieces) == stream.text == decode(ids)
        assert len(stream.times) == len(ids)


# --- interrupted: a process of its own ------------------------------------------------------------


def process(*arguments, **streams):
    """It hears SIGINT even if the tests don't: a shell starts jobs in the background deaf to it."""
    options = ["--model", DEMO_MODEL, "--device", "cpu", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "simba", "generate", *map(str, options)],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def test_interrupted_while_it_reads():
    """stdin, a real terminal for the bar, and nothing on stdout."""
    ours, theirs = pty.openpty()
    options = ["--file", "-", "--chunk-size", 16]
    with process(*options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs) as running:
        os.close(theirs)
        running.stdin.write((TEXT * 60).encode())
        running.stdin.close()
        seen = b""
        while b"reading the prompt" not in seen:
            seen += os.read(ours, 4096)
        running.send_signal(signal.SIGINT)
        while b"stopped" not in seen:
            seen += os.read(ours, 4096)
        assert running.wait() == 130
        assert running.stdout.read() == b""
    os.close(ours)
    assert b"Traceback" not in seen


def test_interrupted_while_it_writes(demo, file):
    """What is written stays, and is the beginning of the text."""
    options = ["--file", file, *PRUNING, "--max-new-tokens", 100_000]
    pipe = subprocess.PIPE
    with process(*options, stdout=pipe, stderr=pipe) as running:
        written = os.read(running.stdout.fileno(), 1)
        running.send_signal(signal.SIGINT)
        written += running.stdout.read()
        said = running.stderr.read().decode()
        assert running.wait() == 130, said
    assert said.strip().splitlines()[-1] == "stopped" and "Traceback" not in said
    model, tokenizer = demo
    sparsified(model)
    tokens = len(tokenizer(written.decode()).input_ids) + 1
    text, _ = plain_loop(model, tokenizer, tokenizer(TEXT).input_ids, new=tokens)
    assert written and text.startswith(written.decode())


def test_a_reader_that_goes_away(file):
    pipe = subprocess.PIPE
    with process(
        "--file", file, *PRUNING, "--max-new-tokens", 100_000, stdout=pipe, stderr=pipe
    ) as running:
        os.read(running.stdout.fileno(), 1)
        running.stdout.close()
        said = running.stderr.read().decode()
        assert running.wait() == 1
    assert said.strip() == ""
