"""The plugin's parts that need no vLLM: options, refusals, and a step's layout."""

from __future__ import annotations

import copy
import itertools
import types

import pytest
import torch

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, tiny_mamba
from simba.ops import naive
from simba.schedules import keep_counts
from simba.serving import steps
from simba.serving.mixers import Requests, convolve, prefill_mamba2, survivors_of
from simba.serving.options import ServingOptions, refuse


def test_the_launcher_sparsifies_what_the_server_loads(monkeypatch):
    """Options replace entries of a saved configuration; afterwards the server loads as before."""
    from transformers.cli.serving.model_manager import ModelManager

    from simba.cli.options import PruningOptions
    from simba.cli.serve import sparsified_loads

    model = tiny_mamba()
    model.config.simba = simba.SimbaConfig(final_keep=0.5, min_tokens=3).to_dict()

    def stock(manager, name):
        assert name == "model@main"
        return model

    monkeypatch.setattr(ModelManager, "_load_model", stock)
    with sparsified_loads(PruningOptions(final_keep=0.25)):
        assert ModelManager._load_model(None, "model@main") is model
    assert ModelManager._load_model is stock
    config = simba.status(model).config
    assert (config.final_keep, config.min_tokens) == (0.25, 3)


def test_the_launcher_says_what_is_missing(monkeypatch):
    from typer.testing import CliRunner

    from simba.cli import app

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    for options, said in ((), "simba-ssm[serve]"), (("--keep", "2"), "final_keep"):
        result = CliRunner().invoke(app, ["serve", "--model", "m", "--device", "cpu", *options])
        assert result.exit_code == 1 and said in result.output.replace("\n", " ")


def test_a_pruned_model_stops_at_strings():
    """`generate` hands the tokenizer on to the model; a server always passes one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    simba.sparsify(model, final_keep=0.5)
    ids = tokenizer(DEMO_TEXT.read_text(encoding="utf-8")[:300], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False}
    whole = model.generate(ids, **options)[0]
    stop = tokenizer.decode(whole[ids.shape[1] + 4 : ids.shape[1] + 6])
    ended = model.generate(ids, **options, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert ids.shape[1] < len(ended) < len(whole)
    assert torch.equal(ended, whole[: len(ended)])


def given(**options):
    return types.SimpleNamespace(
        hidden_size=8, **{f"simba_{name}": value for name, value in options.items()}
    )


def configuration(**changes):
    """A server's configuration that is served, but for the changes."""
    values = {
        "pipeline": 1, "lora": None, "speculative": None, "prefix": False, "chunked": False,
        "runner": "generate", **changes,
    }  # fmt: skip
    space = types.SimpleNamespace
    return space(
        parallel_config=space(pipeline_parallel_size=values["pipeline"]),
        lora_config=values["lora"],
        speculative_config=values["speculative"],
        cache_config=space(enable_prefix_caching=values["prefix"]),
        scheduler_config=space(enable_chunked_prefill=values["chunked"]),
        model_config=space(max_model_len=4096, runner_type=values["runner"]),
    )


class TestOptions:
    def test_none_of_ours_is_stock(self):
        assert ServingOptions.of(given()) is None

    def test_a_checkpoint_that_was_saved_pruned_is_not_served_dense_without_a_word(self):
        saved = given()
        saved.simba = simba.SimbaConfig(final_keep=0.3).to_dict()
        with pytest.raises(simba.ConfigError, match=r"simba_final_keep.*0\.3"):
            ServingOptions.of(saved)
        saved.simba_final_keep = 1.0
        assert not ServingOptions.of(saved).prunes

    def test_as_sparsify_takes_them(self):
        options = ServingOptions.of(given(final_keep=0.1, reduce="l2", min_tokens=64))
        assert options.config == simba.SimbaConfig(final_keep=0.1, reduce="l2")
        assert (options.min_tokens, options.chunks, options.prunes) == (64, "refused", True)
        assert ServingOptions.of(given(final_keep=0.5)).min_tokens == 512
        assert not ServingOptions.of(given(final_keep=1.0)).prunes

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"final_kep": 0.1}, "Did you mean simba_final_keep"),
            ({"final_keep": 2}, "final_keep"),
            ({"final_keep": 0.1, "chunks": "yes"}, "simba_chunks"),
            ({"final_keep": 0.1, "min_tokens": 0}, "simba_min_tokens"),
            ({"final_keep": 0.1, "schedule": "cut"}, "cut"),
            ({"criterion": "random"}, "unknown option simba_criterion"),
        ],
    )
    def test_mistakes_are_named(self, options, said):
        with pytest.raises(simba.ConfigError, match=said):
            ServingOptions.of(given(**options))


class TestRefusals:
    OPTIONS = ServingOptions.of(given(final_keep=0.1))

    def test_nothing(self):
        refuse(configuration(), self.OPTIONS, "0.26.0")
        refuse(configuration(chunked=True), ServingOptions.of(given(final_keep=1.0)), "0.32.0")
        refuse(
            configuration(chunked=True),
            ServingOptions.of(given(final_keep=0.1, chunks="scheduled")),
            "0.32.0+cpu",
        )

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"pipeline": 2}, "--tensor-parallel-size"),
            ({"lora": object()}, "LoRA"),
            ({"speculative": object()}, "--speculative-config"),
            ({"prefix": True}, "--no-enable-prefix-caching"),
            ({"chunked": True}, "--max-num-batched-tokens 4096"),
            ({"runner": "pooling"}, "pooling"),
        ],
    )
    def test_by_name_with_what_helps(self, changes, said):
        with pytest.raises(simba.ConfigError, match=said):
            refuse(configuration(**changes), self.OPTIONS, "0.26.0")

    def test_all_at_once(self):
        with pytest.raises(simba.ConfigError, match=r"pipeline.*LoRA.*prefix caching"):
            refuse(configuration(pipeline=2, lora=1, prefix=True), self.OPTIONS, "0.26.0")

    def test_another_vllm(self):
        with pytest.raises(simba.ConfigError, match=r"vLLM 0\.33\.0"):
            refuse(configuration(), self.OPTIONS, "0.33.0")


LENGTHS = [7, 40, 1]
RATIOS = simba.SimbaConfig(final_keep=0.2).ratios(3)


def parts(layer):
    """The tokens of each prompt."""
    ends = itertools.accumulate(layer.lengths, initial=0)
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def test_a_step_is_laid_out():
    """Each prompt has its own counts, and the short ones all of their tokens."""
    layers = steps.lay_out(LENGTHS, RATIOS, 10, torch.device("cpu"), taps=4)
    counts = keep_counts(RATIOS, 40)
    for i, layer in enumerate(layers):
        assert layer.lengths == (7, counts[i], 1)
        assert layer.kept == (7, counts[min(i + 1, 2)], 1)
        assert layer.cu_seqlens.tolist() == [0, 7, 7 + counts[i], 8 + counts[i]]
        assert layer.cu_kept.diff().tolist() == list(layer.kept)
        assert layer.prunes == (i < 2)
        assert layer.anchors.tolist() == [part.stop - 1 for part in parts(layer)]


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_layers_share_compiled_kernels(prompts):
    """Triton asks of each tensor whether it begins at a multiple of 16 bytes."""
    ratios = simba.SimbaConfig(final_keep=0.1).ratios(16)
    layers = steps.lay_out([600] * prompts, ratios, 10, torch.device("cpu"), taps=4)
    assert len({layer.lengths for layer in layers}) == 16
    for name in ("cu_seqlens", "cu_kept", "ends", "kept_ends", "anchors", "places"):
        tensors = [getattr(layer, name) for layer in layers]
        assert len({tensor.data_ptr() % 16 for tensor in tensors}) == 1, name
        assert all(tensor.is_contiguous() for tensor in tensors), name


def test_convolution_of_prompts_behind_one_another():
    """Each as if it were alone, from the inputs before it; the cache has the last of them."""
    torch.manual_seed(0)
    layer = steps.lay_out(LENGTHS, RATIOS, 10, torch.device("cpu"), taps=4)[0]
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    cache = torch.randn(5, 3, 6)
    for dim_first in (False, True):  # vLLM's two layouts
        mine = cache.clone()
        held = mine.transpose(1, 2).contiguous() if dim_first else mine
        mixer = types.SimpleNamespace(conv1d=conv, activation="silu", kv_cache=(held, None))
        rows = torch.tensor([4, 1, 2])
        requests = Requests(rows, torch.tensor([True, False, True]))
        x = torch.randn(48, 6)
        out = convolve(mixer, x, layer, requests)
        after = held.transpose(1, 2) if dim_first else held
        for i, part in enumerate(parts(layer)):
            before = cache[rows[i]] if i != 1 else torch.zeros(3, 6)
            whole = torch.cat((before, x[part]))
            exact = torch.nn.functional.silu(conv(whole.t()[None])[0, :, 3:-3].t())
            torch.testing.assert_close(out[part], exact, rtol=1e-5, atol=1e-6)
            assert torch.equal(after[rows[i]], whole[-3:])
        assert torch.equal(after[0], cache[0]) and torch.equal(after[3], cache[3])


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_convolution_of_a_fresh_prompt_alone_and_among_others(n):
    """Also where a prompt is shorter than the convolution's window."""
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(60, 6)
    found = []
    for lengths, start in (([n], 20), ([20, n, 40 - n], 0)):
        layer = steps.lay_out(lengths, RATIOS, 100, torch.device("cpu"), taps=4)[0]
        held = torch.full((4, 3, 6), 7.0)
        mixer = types.SimpleNamespace(conv1d=conv, activation="silu", kv_cache=(held, None))
        rows = torch.tensor([1, 2, 3]) if len(lengths) > 1 else torch.tensor([2])
        out = convolve(mixer, x[start : start + sum(lengths)], layer, Requests(rows, None))
        found.append((out[20 - start : 20 - start + n], held[2]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)  # of the CPU's lanes
    assert torch.equal(found[0][1], found[1][1])
    last = torch.cat((torch.zeros(3, 6), x[20 : 20 + n]))[-3:]
    assert torch.equal(found[0][1], last)


def test_all_ranks_choose_by_the_same_scores():
    layer = steps.lay_out([40], RATIOS, 10, torch.device("cpu"), taps=4)[0]
    scores = torch.rand(40, dtype=torch.float64)
    scores[5] = float("nan")
    elsewhere = torch.rand(40, dtype=torch.float64)
    criterion = simba.SimbaConfig(final_keep=0.2).criterion

    def agree(own, reduce):
        assert reduce == "max" and own[5] == float("inf")
        return torch.maximum(own, elsewhere)

    rows, _ = survivors_of(scores, layer, criterion, agree)
    kept = layer.kept[0]
    together = torch.maximum(scores.nan_to_num(nan=float("inf")), elsewhere)
    best = together[:39].topk(kept - 1).indices
    assert rows.tolist() == sorted([*best.tolist(), 39])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_prompt_alone_and_among_others_keeps_the_same_tokens(backend, monkeypatch):
    """With ties; and where the kernels made the selection, its inverse is right."""
    from simba.ops import selection

    chosen = selection.choose
    monkeypatch.setattr(selection, "choose", lambda _, *more: chosen(backend, *more))
    criterion = simba.SimbaConfig(final_keep=0.2).criterion
    scores = torch.randint(0, 9, (97,)).double()

    def survivors(lengths, values):
        layer = steps.lay_out(lengths, RATIOS, 10, torch.device("cpu"), taps=4)[0]
        return survivors_of(values, layer, criterion, lambda own, reduce: own)

    together, _ = survivors([40, 57], scores)
    first, targets = survivors([40], scores[:40])
    second, _ = survivors([57], scores[40:])
    assert together.tolist() == [*first.tolist(), *(second + 40).tolist()]
    assert (targets is not None) == (backend == "triton")
    if targets is not None:
        inverse = torch.full((40,), -1, dtype=torch.int32)
        inverse[first] = torch.arange(len(first), dtype=torch.int32)
        assert torch.equal(targets, inverse)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mamba2_prompts_of_a_step_are_each_as_the_equations_say(backend, monkeypatch):
    """Two fresh prompts, one of them too short to be pruned, beside one that goes on from its
    states. The mixer is vLLM's as far as the prefill reads it, without the projections."""
    from simba.ops import varlen

    chosen = varlen.choose
    monkeypatch.setattr(varlen, "choose", lambda _, *more: chosen(backend, *more))
    torch.manual_seed(0)
    lengths, rows, heads, head_dim, groups, d_state = [40, 7, 30], [4, 1, 2], 4, 3, 2, 5
    inner, side = heads * head_dim, groups * d_state
    sizes = [inner, inner + 2 * side, heads]
    conv = torch.nn.Conv1d(sizes[1], sizes[1], 4, groups=sizes[1], padding=3)
    exact = copy.deepcopy(conv).double()
    caches = torch.randn(5, 3, sizes[1]), torch.randn(5, heads, head_dim, d_state)
    mixer = types.SimpleNamespace(
        in_proj=lambda hidden: (hidden, None), conv1d=conv, activation="silu",
        tped_intermediate_size=sizes[0], tped_conv_size=sizes[1], tped_dt_size=sizes[2],
        split_hidden_states_B_C_fn=lambda wide: wide.split([inner, side, side], -1),
        head_dim=head_dim, n_groups=2 * groups, tp_size=2,
        A=-torch.rand(heads) - 0.1, D=torch.randn(heads), dt_bias=torch.randn(heads) - 2,
        kv_cache=tuple(cache.clone() for cache in caches),
        norm=lambda y, z: y * torch.sigmoid(z), out_proj=lambda y: (y, None),
    )  # fmt: skip
    layer = steps.lay_out(lengths, RATIOS, 10, torch.device("cpu"), taps=4)[0]
    assert layer.kept[0] < 40 and layer.kept[1] == 7 and layer.kept[2] < 30
    hidden = torch.randn(77, sum(sizes))
    requests = Requests(torch.tensor(rows), torch.tensor([False, False, True]))
    criterion = simba.SimbaConfig(final_keep=0.2).criterion
    with torch.no_grad():
        found = prefill_mamba2(mixer, hidden, layer, requests, criterion, lambda own, reduce: own)
        survivors, outputs = [], []
        for i, part in enumerate(parts(layer)):
            z, wide, dt = hidden[part].split(sizes, 1)
            before, state = (cache[rows[i]] * (i == 2) for cache in caches)
            wide = torch.cat((before, wide)).double()
            wide = torch.nn.functional.silu(exact(wide.t()[None])[0, :, 3:-3].t())
            x, B, C = wide.split([inner, side, side], 1)
            x, B, C = (t.unflatten(1, (n, -1))[None] for t, n in ((x, heads), (B, 2), (C, 2)))
            five = x, dt[None].double(), mixer.A.double(), B, C
            scores = naive.ssd_influence(*five, dt_bias=mixer.dt_bias.double())[0]
            best = scores[:-1].topk(layer.kept[i] - 1).indices.sort().values
            kept = torch.cat((best, torch.tensor([lengths[i] - 1])))
            y, last = naive.ssd_scan(
                *five, mixer.D.double(), dt_bias=mixer.dt_bias.double(),
                initial_state=state[None].double(),
            )  # fmt: skip
            survivors.append(kept + part.start)
            outputs.append((y[0].flatten(1) * torch.sigmoid(z.double()))[kept])
            torch.testing.assert_close(
                mixer.kv_cache[1][rows[i]].double(), last[0], rtol=1e-5, atol=1e-5
            )
    assert found.survivors is not None and torch.equal(found.survivors, torch.cat(survivors))
    torch.testing.assert_close(found.out.double(), torch.cat(outputs), rtol=1e-5, atol=1e-5)
    for kept_cache, cache in zip(mixer.kv_cache, caches, strict=True):
        assert torch.equal(kept_cache[[0, 3]], cache[[0, 3]])
