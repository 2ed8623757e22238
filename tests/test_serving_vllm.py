"""The plugin in a running vLLM, on a CPU (`make test-vllm`, which makes an environment of its own)
or on a GPU with vLLM 0.26.

Equality with `sparsify` on transformers: greedy tokens, and the first token's log-probability. vLLM
runs matrix products of a step's prompts together, so these differ in rounding from a prompt alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import simba
from conftest import DEMO_MODEL, DEMO_TEXT

pytestmark = pytest.mark.timeout(600)
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_CPU_OMP_THREADS_BIND="nobind"
)
if torch.cuda.is_available():  # whose state no fork may inherit
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
LENGTHS = (1, 3, 40, 127, 128, 300, 511, 600, 777, 1000)
MIN_TOKENS = 100
ANSWER = 8
CLOSE = 1e-4
"""Of log-probabilities in float32."""
TF32 = 3e-3
"""Where vLLM's own Mamba-2 kernels may run on a GPU. Their products round float32 to TF32 (1.2e-3 was
seen); simba's do not."""
OPTIONS = {"simba_final_keep": 0.1, "simba_min_tokens": MIN_TOKENS}


def prompts_of(vocabulary, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@contextlib.contextmanager
def engine(model, options, **more):
    """An engine whose every prompt is prefilled as a whole; ended afterwards."""
    from vllm import LLM

    settings = {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096, **more}
    if torch.cuda.is_available():  # several tests may share it
        settings |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30}
    running = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=1024, seed=0,
        hf_overrides=options, skip_tokenizer_init=True, **settings,
    )  # fmt: skip
    try:
        yield running
    finally:
        shut_down = getattr(running.llm_engine.engine_core, "shutdown", None)
        if shut_down is not None:
            shut_down()


def answers(running, prompts, **sampling):
    """(tokens, log-probability of the first) of each prompt, all sent at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=ANSWER, logprobs=1, detokenize=False, ignore_eos=True, **sampling
    )
    found = running.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    outputs = [each.outputs[0] for each in found]
    return [(list(o.token_ids), o.logprobs[0][o.token_ids[0]].logprob) for o in outputs]


def loaded(path, final_keep):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return simba.sparsify(model, final_keep=final_keep) if final_keep < 1 else model


def expected(model, prompt):
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        first = model(ids, use_cache=True).logits[0, -1].log_softmax(-1)
        whole = model.generate(
            ids, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    tokens = whole[0, len(prompt) :].tolist()
    return tokens, float(first[tokens[0]])


def assert_same(found, wanted, vllms=()):
    """``vllms`` are the prompts, by number, that vLLM's own Mamba-2 kernels may run."""
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        close = TF32 if i in vllms and torch.cuda.is_available() else CLOSE
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=close)


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory):
    """A random Mamba-2 whose next token depends on the prompt."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=4, state_size=16, num_heads=8,
        head_dim=16, n_groups=1, expand=2, chunk_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_bias.sub_(2)  # long memory
            block.mixer.in_proj.weight.mul_(4)
        model.backbone.embeddings.weight.normal_()
        model.lm_head.weight.normal_(std=0.3)
    path = tmp_path_factory.mktemp("mamba2")
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(request, mamba2):
    return DEMO_MODEL if request.param == "mamba" else mamba2


def vocabulary(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]


def test_metadata_say_what_the_prompts_of_a_step_are():
    """Those behind two decodes; whether one of them goes on from its states, which vLLM cuts also
    without chunked prefill (``long_prefill_token_threshold``)."""
    from simba.serving.models import prompts_of, with_prompts

    class Builder:
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            ends = common_attn_metadata.query_start_loc_cpu[2:] - 2
            return types.SimpleNamespace(num_prefills=prefills, query_start_loc_p=ends)

    class Backend:
        @staticmethod
        def get_builder_cls():
            return Builder

    builder = with_prompts(Backend).get_builder_cls()()
    for seen, continued in (([90, 7, 40, 5], False), ([90, 7, 41, 5], True)):
        common = types.SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 1, 2, 42, 47]),
            seq_lens_cpu_upper_bound=torch.tensor(seen),
        )
        prefills = 2
        metadata = builder.build(common_prefix_len=0, common_attn_metadata=common)
        assert prompts_of(metadata) == ((40, 5), continued)
        del metadata.simba_prompts
        assert prompts_of(metadata) == ((40, 5), True)
        prefills = 0
        assert not hasattr(builder.build(0, common), "simba_prompts")


@pytest.mark.parametrize("model", ["mamba", "mamba2"], indirect=True)
def test_prompts_are_pruned_as_by_sparsify(model):
    """Together in few steps; alone, and among fifty; in steps of prompts beside decodes."""
    prompts = prompts_of(vocabulary(model))
    pruned, dense = loaded(model, 0.1), loaded(model, 1.0)
    wanted = [expected(pruned if len(p) >= MIN_TOKENS else dense, p) for p in prompts]
    without = [expected(dense, p) for p in prompts]
    assert max(abs(a[1] - b[1]) for a, b in zip(wanted, without, strict=True)) > 100 * CLOSE
    others = prompts_of(vocabulary(model), [17 + 15 * i for i in range(49)], seed=1)
    short = [i for i, n in enumerate(LENGTHS) if n < MIN_TOKENS and model != DEMO_MODEL]
    with engine(model, OPTIONS) as running:
        assert_same(answers(running, prompts), wanted, short)
        for prompt, each in zip(prompts[-2:], wanted[-2:], strict=True):
            assert_same(answers(running, [prompt]), [each])
            among = [*others[:25], prompt, *others[25:]]
            assert_same(answers(running, among)[25:26], [each])
    with engine(model, OPTIONS, max_num_batched_tokens=1024, max_num_seqs=3) as running:
        assert_same(answers(running, prompts), wanted, short)


@pytest.mark.parametrize("model", ["mamba", "mamba2"], indirect=True)
def test_nothing_is_pruned(model):
    """final_keep=1.0 is the model, and vLLM's own where it runs on a CPU; also in chunks."""
    prompts = prompts_of(vocabulary(model))
    dense = loaded(model, 1.0)
    wanted = [expected(dense, p) for p in prompts]
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 256}
    vllms = range(len(prompts)) if model != DEMO_MODEL else ()
    with engine(model, {"simba_final_keep": 1.0}, **chunked) as running:
        assert_same(answers(running, prompts), wanted, vllms)
    if model != DEMO_MODEL or torch.cuda.is_available():
        with engine(model, {}) as running:
            assert_same(answers(running, prompts), wanted, vllms)


def test_chunks_that_the_user_chose():
    """Prompts that fit a chunk are pruned as a whole; longer ones chunk by chunk, from states."""
    prompts = prompts_of(vocabulary(DEMO_MODEL), (200, 900))
    pruned = loaded(DEMO_MODEL, 0.1)
    options = {**OPTIONS, "simba_chunks": "scheduled"}
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 300}
    simba.desparsify(in_chunks := loaded(DEMO_MODEL, 0.1))
    simba.sparsify(in_chunks, final_keep=0.1, chunk_size=300)
    with engine(DEMO_MODEL, options, **chunked) as running:
        for prompt, reference in zip(prompts, (pruned, in_chunks), strict=True):
            assert_same(answers(running, [prompt]), [expected(reference, prompt)])


def test_tensor_parallel():
    prompts = prompts_of(vocabulary(DEMO_MODEL))
    pruned, dense = loaded(DEMO_MODEL, 0.1), loaded(DEMO_MODEL, 1.0)
    wanted = [expected(pruned if len(p) >= MIN_TOKENS else dense, p) for p in prompts]
    with engine(DEMO_MODEL, OPTIONS, tensor_parallel_size=2) as running:
        assert_same(answers(running, prompts), wanted)


def test_log_probabilities_of_pruned_prompts_are_no_numbers():
    """vLLM would read rows that were dropped. It gets NaN for them, never a plausible number."""
    prompt = prompts_of(vocabulary(DEMO_MODEL), (400,))[0]
    from vllm import SamplingParams

    with engine(DEMO_MODEL, OPTIONS) as running:
        wants = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = running.generate([{"prompt_token_ids": prompt}], wants, use_tqdm=False)
        values = [next(iter(each.values())).logprob for each in found[0].prompt_logprobs[1:]]
        assert sum(value != value for value in values) > 300


SERVER = "vllm.entrypoints.openai.api_server"
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
WHOLE = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024")


def command(*more):
    overrides = ("--hf-overrides", json.dumps(OPTIONS))
    return [sys.executable, "-m", SERVER, "--model", str(DEMO_MODEL), *COMMON, *overrides, *more]


def test_what_is_refused_when_the_server_starts():
    done = subprocess.run(
        command("--enable-prefix-caching", "--enable-chunked-prefill"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "simba can't serve this model so" in said
    assert "--no-enable-prefix-caching" in said and "--no-enable-chunked-prefill" in said


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    port = free_port()
    running = subprocess.Popen(
        command(*WHOLE, "--port", str(port), "--served-model-name", "demo"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        await_health(running, address)
        yield address
    finally:
        running.terminate()
        running.wait(60)


def await_health(running, address):
    for _ in range(240):
        assert running.poll() is None, "the server ended"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        time.sleep(1)
    pytest.fail("the server does not answer")


def running_requests(address):
    """Requests that the engine holds."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = [line for line in text.splitlines() if line.startswith(names)]
    assert len(lines) >= 2
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_fifty_clients_stream_and_some_leave(server):
    """Each answer is that of the prompt alone, whoever else asks; who leaves leaves nothing."""
    import openai

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=300, max_retries=0)
    prompts = prompts_of(vocabulary(DEMO_MODEL), [20 + 9 * i for i in range(50)])

    def ask(prompt, leave=False, tokens=ANSWER):
        stream = client.completions.create(
            model="demo", prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = []
        for piece in stream:
            pieces.append(piece.choices[0].text)
            if leave:
                stream.close()
                break
        return "".join(pieces)

    alone = [ask(prompts[i]) for i in (3, 30, 49)]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(ask, p) for p in prompts]
        leaving = [pool.submit(ask, p, True, 400) for p in prompts[::7]]
        together = [future.result() for future in futures]
        assert all(future.result() is not None for future in leaving)
    assert [together[i] for i in (3, 30, 49)] == alone
    for _ in range(30):
        if running_requests(server) == 0:
            break
        time.sleep(1)
    assert running_requests(server) == 0
    assert ask(prompts[30]) == alone[1]


def test_echo_of_a_pruned_prompt_is_refused(server):
    import openai

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60, max_retries=0)
    prompt = prompts_of(vocabulary(DEMO_MODEL), (400,))[0]
    ask = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    with pytest.raises(openai.APIStatusError, match="Out of range float"):
        client.completions.create(**ask, echo=True, logprobs=1)
    assert client.completions.create(**ask).choices[0].finish_reason == "length"
    short = {**ask, "prompt": prompt[: MIN_TOKENS - 1]}
    found = client.completions.create(**short, echo=True, logprobs=1).choices[0].logprobs
    assert all(value < 0 for value in found.token_logprobs[1:])


def test_simba_serve():
    """The launcher round transformers' server: the text of the pruned model, streamed or not."""
    import openai
    from transformers import AutoTokenizer

    port = free_port()
    where = ("--device", "cpu", "--port", str(port))
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "simba",
            "serve",
            "--model",
            str(DEMO_MODEL),
            "--keep",
            "0.1",
            *where,
        ]
    )
    try:
        address = f"http://localhost:{port}"
        await_health(running, address)
        text = DEMO_TEXT.read_text(encoding="utf-8")[:4000]
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        texts = {}
        for final_keep in (0.1, 1.0):
            out = loaded(DEMO_MODEL, final_keep).generate(ids, max_new_tokens=24, do_sample=False)
            texts[final_keep] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts[0.1] != texts[1.0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        ask = {"model": str(DEMO_MODEL), "prompt": text, "max_tokens": 24, "temperature": 0}
        assert client.completions.create(**ask).choices[0].text == texts[0.1]
        pieces = client.completions.create(**ask, stream=True)
        assert "".join(p.choices[0].text for p in pieces if p.choices) == texts[0.1]
    finally:
        running.terminate()
        running.wait(60)
