"""Hybrids whose recurrent mixers stay stock ones, and rules that look at nothing but places. The
judge is the stock layers themselves, run by hand, one row at a time, on the tokens that are left."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import simba
from conftest import VOCAB, relative_error, tokens
from hybrid_configs import in_float64
from simba.schedules import keep_counts

L, A = "linear_attention", "full_attention"
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "head_dim": 4,
}
FAMILIES = {
    "Lfm2": {"layer_types": ["conv", A, "conv", "conv", A], "block_auto_adjust_ff_dim": False},
    "Qwen3Next": {
        **DELTA,
        "linear_num_value_heads": 4,
        "layer_types": [L, A, L, L, A],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "decoder_sparse_step": 2,
        "partial_rotary_factor": 0.5,
    },
    "OlmoHybrid": {**DELTA, "layer_types": [A, L, L, A, L]},
}
COUNTS = [21, 17, 14, 10, 6]  # of a prompt of 21 tokens, linear to 0.3


def placed(family, **changes):
    """A causal language model of one of these families."""
    kind = getattr(transformers, f"{family}ForCausalLM")
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 5,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = kind.config_class(**options | FAMILIES[family] | changes)
    config._experts_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "A_log" in name:
                weight.uniform_(-4.0, 0.5)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif weight.dim() == 1:
                weight.normal_(std=0.5)
            else:
                weight.normal_(std=1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5)
    return model.double().eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return placed(request.param)


@pytest.fixture(autouse=True)
def in_double(request):
    if "gradients" in request.node.name:
        yield  # a backward pass runs layers again outside of it
        return
    with in_float64():
        yield


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


@pytest.fixture
def stock(model):
    return copy.deepcopy(model)


def by_hand(stock, ids, kept):
    """Logits of the stock layers over the columns ``kept[layer]`` of a row (1, T)."""
    backbone = stock.model
    hidden, before = backbone.embed_tokens(ids), list(range(ids.shape[1]))
    for layer, columns in zip(backbone.layers, kept, strict=True):
        hidden = hidden[:, [before.index(column) for column in columns]]
        rotary = getattr(backbone, "rotary_emb", None)
        if rotary is not None:
            rotary = rotary(hidden, torch.tensor([columns]))
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        before = columns
    norm = getattr(backbone, "norm", None) or backbone.embedding_norm
    return stock.lm_head(norm(hidden))[0]


def close(actual, expected):
    return actual.shape == expected.shape and relative_error(actual, expected) < 1e-9


def generate(model, ids, mask, **options):
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


ROWS = tokens(1, 21).clamp(min=1), tokens(1, 15, seed=2).clamp(min=1)
IDS = torch.cat([ROWS[0], nn.functional.pad(ROWS[1], (6, 0))])
MASK = (IDS != 0).long()
PLACES = (MASK.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("criterion", ["recency", "uniform", "random", "window:0.5+random"])
def test_one_pass(model, stock, criterion):
    simba.sparsify(model, 0.3, criterion=criterion)
    with simba.record(model) as run:
        out = model(IDS, attention_mask=MASK, position_ids=PLACES)
    for row, ids in enumerate(ROWS):
        length = ids.shape[1]
        kept = [[c - 21 + length for c in each[row].tolist() if c >= 0] for each in run.positions]
        counts = keep_counts(model.model._simba.ratios, length)
        assert [len(columns) for columns in kept] == counts
        if length == 21:
            assert counts == COUNTS
        if criterion == "recency":
            assert kept == [list(range(length - count, length)) for count in counts]
        assert close(out.logits[row, -counts[-1] :], by_hand(stock, ids, kept))
        assert close(model(ids).logits[0], by_hand(stock, ids, kept))


@pytest.mark.parametrize("options", [{"criterion": "uniform"}, {"preset": "text"}])
def test_padding_that_a_stock_convolution_would_read(options):
    """in_proj's bias is on it."""
    model = simba.sparsify(placed("Lfm2", conv_bias=True), **options)
    with pytest.raises(simba.InputError, match="one at a time"):
        model(IDS, attention_mask=MASK)
    assert model(IDS[:, -9:]).logits.shape[0] == 2  # rows of one length have none
    simba.sparsify(model, 1.0)(IDS, attention_mask=MASK)  # is the stock model


def test_generation_turns_and_beams(model, stock):
    simba.sparsify(model, 0.3, criterion="recency")
    sequences, logits, cache = generate(model, IDS, MASK)
    turn = tokens(2, 7, seed=3).clamp(min=1)
    for row, ids in enumerate(ROWS):
        start, length = 21 - ids.shape[1], ids.shape[1]
        whole = sequences[row : row + 1, start:]
        answer = list(range(length, length + 3))
        counts = keep_counts(model.model._simba.ratios, length)
        kept = [[*range(length - count, length), *answer] for count in counts]
        assert close(logits[row], by_hand(stock, whole[:, :-1], kept)[-4:].to(logits.dtype))
    held = [each.keys.shape[2] for each in cache.layers if getattr(each, "keys", None) is not None]
    kinds = model.config.layer_types
    assert held == [n + 3 for n, kind in zip(COUNTS, kinds, strict=True) if kind == A]
    # several tokens behind it are what they are one by one, also under simba.dense
    new = torch.cat([sequences[:, -1:], turn], 1)
    together = model(new, past_key_values=copy.deepcopy(cache)).logits
    steps = copy.deepcopy(cache)
    one_by_one = [model(new[:, i : i + 1], past_key_values=steps).logits for i in range(8)]
    assert close(together, torch.cat(one_by_one, 1))
    with simba.dense(model):
        assert close(model(new, past_key_values=copy.deepcopy(cache)).logits, together)
    pruned = model(new, past_key_values=copy.deepcopy(cache), prompt_length=8)
    assert pruned.positions.tolist() == [[6, 7]] * 2
    options = {"attention_mask": MASK, "num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options)
    )


def test_several_tokens_behind_the_dense_models_cache(model):
    ids = tokens(2, 18)
    whole = model(ids).logits[:, 11:]
    cache = model(ids[:, :11], use_cache=True).past_key_values
    simba.sparsify(model, 0.3, criterion="recency")
    assert close(model(ids[:, 11:], past_key_values=cache).logits, whole)


def test_an_interrupted_pass_leaves_the_cache_as_it_was(model):
    simba.sparsify(model, 0.4, criterion="recency")
    ids, turn = tokens(1, 16), tokens(1, 6, seed=2)
    cache = model(ids).past_key_values
    expected = model(turn, past_key_values=copy.deepcopy(cache)).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(turn, past_key_values=cache)
    empty = DynamicCache(config=model.config)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=empty)
    hook.remove()
    assert torch.equal(model(turn, past_key_values=cache).logits, expected)
    model(ids, past_key_values=empty)
    assert torch.equal(model(turn, past_key_values=empty).logits, expected)


def test_what_prunes_nothing_is_the_stock_model(model):
    dense, classes = model(IDS, attention_mask=MASK).logits, [type(m) for m in model.modules()]
    simba.sparsify(model, 1.0)
    with simba.record(model) as run:
        assert torch.equal(model(IDS, attention_mask=MASK).logits, dense)
    assert all(bool(scores.isnan().all()) for scores in run.scores)
    simba.sparsify(model, 0.3, criterion="uniform", protect=4)
    assert model(IDS[:1]).positions[0, :4].tolist() == [0, 1, 2, 3]
    with simba.dense(model):
        assert torch.equal(model(IDS, attention_mask=MASK).logits, dense)
    end = model(IDS[:1, -8:]).logits if simba.desparsify(model) else None
    assert torch.equal(model(IDS, attention_mask=MASK).logits, dense)
    assert [type(m) for m in model.modules()] == classes
    simba.sparsify(model, schedule="cut", final_keep=8 / 21)
    assert close(model(IDS[:1]).logits, end)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "influence"),
        ({"criterion": "delta"}, "delta"),
        ({"criterion": "chunk_local"}, "chunk_local"),
        ({"criterion": "window:0.5+influence"}, "window"),
        ({"criterion": "attention"}, "attention"),
    ],
)
def test_rules_that_need_a_score_are_refused(model, options, named):
    with pytest.raises(simba.ConfigError, match=rf"'{named}.*'recency', 'uniform' or 'random'"):
        simba.sparsify(model, 0.3, **options)
    assert not simba.status(model).sparsified


def test_flops_and_bytes(model):
    simba.sparsify(model, 0.3, criterion="recency")
    flops = simba.flops(model, 21)
    cache = model(IDS[:1]).past_key_values
    for layer, kind, count in zip(flops.layers, model.config.layer_types, COUNTS, strict=True):
        assert layer.tokens == count and layer.parts["score"] == 0
        held = cache.layers[layer.layer]
        assert layer.kv_bytes == (0 if kind != A else 2 * held.keys.numel() * 8)
        block = model.model.layers[layer.layer]
        # each weight of a matrix or a convolution, twice a token; of experts, the two that run
        matrices = [weight for weight in block.parameters() if weight.dim() == 2]
        stacked = [weight for weight in block.parameters() if weight.dim() == 3]
        least = sum(2 * weight.numel() for weight in matrices)
        for weight in stacked:
            least += 2 * (weight.numel() if weight.shape[1] == 1 else 2 * weight[0].numel())
        spent = sum(layer.parts.values()) / count
        assert least <= spent < 1.6 * least
    assert sum(layer.kv_bytes for layer in flops.layers) == flops.kv_bytes < flops.dense_kv_bytes


def test_gradients_with_checkpointing(model):
    simba.sparsify(model, 0.4, criterion="uniform")
    ids, gradients = tokens(2, 13), []
    for checkpointing in (None, True, False):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 30
    for other in gradients[1:]:
        assert all(map(torch.equal, other, gradients[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preset_text_is_the_dense_model_on_the_end(family):
    """In simba's own dense pass, which it asks for."""
    model, ids = placed(family), tokens(2, 40)
    with torch.no_grad():
        due = model(ids[:, -22:], use_cache=False).logits[:, -1]
        found = simba.sparsify(model, preset="text")(ids, use_cache=False).logits[:, -1]
    assert relative_error(found, due) < 1e-5
