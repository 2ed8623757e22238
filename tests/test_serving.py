"""The plugin's parts that need no vLLM: options, refusals, and a step's layout."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

import simba
from conftest import DEMO_MODEL, DEMO_TEXT, tiny_mamba
from simba import ops
from simba.criteria import Influence
from simba.ops import varlen
from simba.schedules import keep_counts
from simba.serving import steps
from simba.serving.mixers import (
    Requests,
    convolve,
    decode_mamba,
    prefill_mamba,
    prefill_mamba2,
    survivors_of,
)
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
        "runner": "generate", "microbatches": False, "threshold": 0, **changes,
    }  # fmt: skip
    space = types.SimpleNamespace
    return space(
        parallel_config=space(
            pipeline_parallel_size=values["pipeline"], use_ubatching=values["microbatches"]
        ),
        lora_config=values["lora"],
        speculative_config=values["speculative"],
        cache_config=space(enable_prefix_caching=values["prefix"]),
        scheduler_config=space(
            enable_chunked_prefill=values["chunked"],
            long_prefill_token_threshold=values["threshold"],
        ),
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
        cut = configuration(chunked=True, threshold=100)
        refuse(cut, ServingOptions.of(given(final_keep=1.0)), "0.32.0")
        refuse(
            cut,
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
            ({"microbatches": True}, "--ubatch-size"),
            ({"threshold": 100}, "--long-prefill-token-threshold"),
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


def test_prompts_that_go_on_are_known_on_the_host():
    """Else their states are not read. A prompt of one token may be one's last chunk."""
    ends = torch.tensor([3, 10, 50, 51])  # three decodes are before them
    fresh = steps.Prompts.of(ends, torch.tensor([7, 40, 1]))
    assert fresh == (tuple(LENGTHS), False)
    assert steps.Prompts.of(ends, torch.tensor([7, 40, 2])) == (tuple(LENGTHS), True)
    assert steps.Prompts.of(ends, torch.tensor([8, 40, 1])).continued
    assert steps.Prompts.of(ends, None).continued  # where nobody knows, they are read


def test_a_step_is_laid_out():
    """Each prompt has its own counts, and the short ones all of their tokens."""
    layers = steps.lay_out(LENGTHS, RATIOS, 10, torch.device("cpu"))
    counts = keep_counts(RATIOS, 40)
    for i, layer in enumerate(layers):
        assert layer.lengths == (7, counts[i], 1)
        assert layer.kept == (7, counts[min(i + 1, 2)], 1)
        assert layer.cu_seqlens.tolist() == [0, 7, 7 + counts[i], 8 + counts[i]]
        assert layer.cu_kept.diff().tolist() == list(layer.kept)
        assert layer.prunes == (i < 2)
        assert layer.anchors.tolist() == [part.stop - 1 for part in parts(layer)]


def test_decodes_stand_behind_the_prompts():
    """Sequences of one token, which min_tokens=1 does not prune either; the prompts' part of a
    layer's tables is that of the same step without decodes."""
    device = torch.device("cpu")
    layers = steps.lay_out(LENGTHS, RATIOS, 1, device, decodes=5)
    for layer, without in zip(layers, steps.lay_out(LENGTHS, RATIOS, 1, device), strict=True):
        assert (layer.lengths, layer.kept, layer.decodes) == (without.lengths, without.kept, 5)
        assert torch.equal(layer.cu_seqlens[:4], without.cu_seqlens)
        assert layer.cu_seqlens.diff().tolist() == [*layer.lengths, 1, 1, 1, 1, 1]
        assert layer.cu_kept.diff().tolist() == [*layer.kept, 1, 1, 1, 1, 1]
        assert torch.equal(
            layer.prompt_places, ops.chunk_places(without.cu_seqlens, sum(layer.lengths))
        )
        owners = [i for i, n in enumerate([*layer.lengths, 1, 1, 1, 1, 1]) for _ in range(n)]
        assert layer.owners.tolist() == owners


@pytest.mark.parametrize("decodes", [0, 3])
@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_layers_share_compiled_kernels(prompts, decodes):
    """Triton asks of each tensor whether it begins at a multiple of 16 bytes."""
    ratios = simba.SimbaConfig(final_keep=0.1).ratios(16)
    layers = steps.lay_out([600] * prompts, ratios, 10, torch.device("cpu"), decodes)
    assert len({layer.lengths for layer in layers}) == 16
    for name in ("cu_seqlens", "cu_kept", "ends", "kept_ends", "anchors", "places", "owners"):
        tensors = [getattr(layer, name) for layer in layers]
        assert len({tensor.data_ptr() % 16 for tensor in tensors}) == 1, name
        assert all(tensor.is_contiguous() for tensor in tensors), name


def test_convolution_of_prompts_behind_one_another():
    """Each as if it were alone, from the inputs before it; the cache has the last of them."""
    torch.manual_seed(0)
    layer = steps.lay_out(LENGTHS, RATIOS, 10, torch.device("cpu"))[0]
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
    x = torch.randn(61, 6)
    found = []
    for lengths, start in (([n], 20), ([20, n, 41 - n], 0)):
        layer = steps.lay_out(lengths, RATIOS, 100, torch.device("cpu"))[0]
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
    layer = steps.lay_out([40], RATIOS, 10, torch.device("cpu"))[0]
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
def test_a_prompt_alone_and_among_others_keeps_the_same_tokens(
    backend, where_kernels_run, monkeypatch
):
    """With ties; and where the kernels made the selection, its inverse is right."""
    from simba.ops import selection

    chosen = selection.choose
    monkeypatch.setattr(selection, "choose", lambda _, *more: chosen(backend, *more))
    criterion = simba.SimbaConfig(final_keep=0.2).criterion
    scores = torch.randint(0, 9, (97,)).double()

    def survivors(lengths, values, decodes=0):
        layer = steps.lay_out(lengths, RATIOS, 10, where_kernels_run, decodes)[0]
        return survivors_of(values, layer, criterion, lambda own, reduce: own)

    together, _ = survivors([40, 57], scores)
    first, targets = survivors([40], scores[:40])
    second, _ = survivors([57], scores[40:])
    assert together.tolist() == [*first.tolist(), *(second + 40).tolist()]
    beside, _ = survivors([40, 57], scores, decodes=3)
    assert beside.tolist() == [*together.tolist(), 97, 98, 99]
    scores[:5] = float("nan")  # they are kept, which leaves the decodes their places
    first, targets = survivors([40], scores[:40], decodes=3)
    assert set(range(5)) < set(first.tolist())
    assert first.tolist() == [*survivors([40], scores[:40])[0].tolist(), 40, 41, 42]
    assert (targets is not None) == (backend == "triton")
    if targets is not None:
        inverse = torch.full((43,), -1, dtype=torch.int32)
        inverse[first] = torch.arange(len(first), dtype=torch.int32)
        assert torch.equal(targets, inverse)


def mamba_stub(slots, d_inner=6, d_state=3, dtype=torch.float32):
    """vLLM's MambaMixer as far as the prefill reads it. It has no matrix products, whose rounding
    depends on the number of rows."""

    def transform(x):
        return (x - 1).transpose(-2, -1), x[:, :d_state], x[:, -d_state:]

    conv = torch.nn.Conv1d(d_inner, d_inner, 4, groups=d_inner)
    caches = torch.randn(slots, 3, d_inner), torch.randn(slots, d_inner, d_state)
    return types.SimpleNamespace(
        in_proj=lambda hidden: (hidden, None), conv1d=conv, activation="silu",
        _ssm_transform=transform, dt_proj=types.SimpleNamespace(bias=torch.randn(d_inner)),
        A=-torch.rand(d_inner, d_state) - 0.1, D=torch.randn(d_inner),
        kv_cache=tuple(cache.to(dtype) for cache in caches), out_proj=lambda y: (y, None),
    ), 2 * d_inner  # fmt: skip


def mamba2_stub(slots, heads=4, head_dim=3, groups=2, d_state=5, dtype=torch.float32):
    """vLLM's MambaMixer2 likewise."""
    inner, side = heads * head_dim, groups * d_state
    sizes = [inner, inner + 2 * side, heads]
    conv = torch.nn.Conv1d(sizes[1], sizes[1], 4, groups=sizes[1], padding=3)
    caches = torch.randn(slots, 3, sizes[1]), torch.randn(slots, heads, head_dim, d_state)
    return types.SimpleNamespace(
        in_proj=lambda hidden: (hidden, None), conv1d=conv, activation="silu",
        tped_intermediate_size=sizes[0], tped_conv_size=sizes[1], tped_dt_size=sizes[2],
        split_hidden_states_B_C_fn=lambda wide: wide.split([inner, side, side], -1),
        head_dim=head_dim, n_groups=2 * groups, tp_size=2,
        A=-torch.rand(heads) - 0.1, D=torch.randn(heads), dt_bias=torch.randn(heads) - 2,
        kv_cache=tuple(cache.to(dtype) for cache in caches),
        norm=lambda y, z: y * z, out_proj=lambda y: (y, None),
    ), sum(sizes)  # fmt: skip


STUBS = {"mamba": (mamba_stub, prefill_mamba), "mamba2": (mamba2_stub, prefill_mamba2)}
CRITERION = Influence()


def with_backend(monkeypatch, backend):
    """All operations of a layer run on it."""
    from simba.ops import conv, selection

    for module in (conv, selection, varlen):
        chosen = module.choose
        monkeypatch.setattr(module, "choose", lambda _, *more, c=chosen: c(backend, *more))


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("lengths", [[40], [40, 7, 30]])
@pytest.mark.parametrize("kind", STUBS)
def test_prompts_and_decodes_of_a_step_are_each_as_alone(
    kind, lengths, continues, where_kernels_run, monkeypatch
):
    """To the last bit, and so are their states, whether prompts go on from theirs or not. Two
    layers, which share what they read from the caches."""
    with_backend(monkeypatch, "triton")
    torch.manual_seed(0)
    build, prefill = STUBS[kind]
    device, decodes, count = where_kernels_run, 3, len(lengths) + 3
    mixers = [build(count + 1, dtype=torch.bfloat16) for _ in range(2)]
    hidden = torch.randn(sum(lengths) + decodes, mixers[0][1])
    rows = torch.randperm(count) + 1
    continued = torch.tensor([*(i % 2 == 0 for i in range(len(lengths))), True, True, True])
    continued = continued if continues else None
    layer = steps.lay_out(lengths, RATIOS, 10, device, decodes)[0]
    together = Requests(rows, continued, decodes)
    for mixer, _ in mixers:
        before = tuple(cache.clone() for cache in mixer.kv_cache)
        with torch.no_grad():
            out, survivors = prefill(mixer, hidden, layer, together, CRITERION, lambda own, _: own)
        after, kept = mixer.kv_cache, itertools.accumulate((*layer.kept, 1, 1, 1), initial=0)
        parts = zip(itertools.pairwise(layer.cu_seqlens.tolist()), itertools.pairwise(kept))
        for i, ((start, stop), place) in enumerate(parts):
            mixer.kv_cache = tuple(cache.clone() for cache in before)
            own = steps.lay_out([stop - start], RATIOS, 10, device)[0]
            goes_on = None if i < len(lengths) and not continues else torch.tensor([True])
            if continues:
                goes_on = continued[i : i + 1]
            requests = Requests(rows[i : i + 1], goes_on)
            with torch.no_grad():
                alone, chosen = prefill(
                    mixer, hidden[start:stop], own, requests, CRITERION, lambda own, _: own
                )
            assert torch.equal(out[slice(*place)], alone)
            whole = torch.arange(stop - start) if chosen is None else chosen
            assert torch.equal(survivors[slice(*place)], whole + start)
            for found, wanted in zip(after, mixer.kv_cache, strict=True):
                assert torch.equal(found[rows[i]], wanted[rows[i]])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decodes_beside_a_prompt_are_as_a_step_of_decodes_makes_them(
    backend, where_kernels_run, monkeypatch
):
    """The states' rows are not in order. Of one prompt of one token nothing can be dropped."""
    with_backend(monkeypatch, backend)
    torch.manual_seed(0)
    mixer, width = mamba_stub(8)
    before = tuple(cache.clone() for cache in mixer.kv_cache)
    rows = torch.tensor([5, 3, 7, 1])
    for length in (40, 1):
        mixer.kv_cache = tuple(cache.clone() for cache in before)
        layer = steps.lay_out([length], RATIOS, 10, where_kernels_run, decodes=3)[0]
        hidden = torch.randn(length + 3, width)
        requests = Requests(rows, None, 3)
        with torch.no_grad():
            out, survivors = prefill_mamba(
                mixer, hidden, layer, requests, CRITERION, lambda own, _: own
            )
            found, mixer.kv_cache = mixer.kv_cache, tuple(cache.clone() for cache in before)
            exact = decode_mamba(mixer, hidden[length:], rows[1:])
        assert (survivors is None) == (length == 1)
        torch.testing.assert_close(out[-3:], exact, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found, mixer.kv_cache, strict=True):
            torch.testing.assert_close(ours[rows[1:]], theirs[rows[1:]], rtol=1e-5, atol=1e-5)
            assert torch.equal(ours[[0, 2, 4, 6]], theirs[[0, 2, 4, 6]])
            assert not torch.equal(ours[5], theirs[5])  # the prompt's
