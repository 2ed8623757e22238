"""Hybrids of state-space layers and attention: identities that hold for every family, and what is
refused. (What a pruned hybrid computes is compared with a judge of its own elsewhere.)"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

import simba
from conftest import VOCAB, relative_error, tokens
from simba.criteria import Criterion
from simba.models import find_adapter
from simba.models.hf.hybrid import run
from simba.ops import REDUCTIONS
from simba.ops.naive import reduce_channels
from simba.schedules import hold, keep_counts
from test_fates_write import Fickle, gradients_of_first_choices

S, A = "linear_attention", "full_attention"

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_d_state": 4,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
FAMILIES = {
    # attention first, and once more
    "Bamba": {**MAMBA2, "num_hidden_layers": 5, "attn_layer_indices": [0, 3]},
    # experts; one attention layer, the last
    "GraniteMoeHybrid": {
        **MAMBA2,
        "layer_types": [S, S, S, A],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 12,
        "position_embedding_type": "rope",
        "residual_multiplier": 0.8,
        "logits_scaling": 1.5,
    },
    # one mixer in a block; an MLP at the end, and a layer before it that can't score either
    "NemotronH": {
        "layers_block_type": [S, "moe", A, S, A, "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "ssm_state_size": 4,
        "n_groups": 2,
        "chunk_size": 8,
        "head_dim": 6,
        "n_routed_experts": 4,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
    },
    "Jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "num_experts": 4,
    },
    "Zamba2": {
        "layers_block_type": [S, "hybrid", S, "hybrid"],
        "n_mamba_heads": 8,
        "mamba_d_state": 4,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "adapter_rank": 3,
    },
    # with the norm behind the scan, which 5.17 gets wrong for single tokens
    "FalconH1": {
        **MAMBA2,
        "num_hidden_layers": 3,
        "mamba_d_ssm": 32,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "ssm_in_multiplier": 1.2,
        "embedding_multiplier": 1.5,
    },
    "Zamba": {
        "layers_block_type": [S, "hybrid", S, "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "num_key_value_heads": 4,
    },
}
ALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny(family, dtype=torch.float64, **changes):
    """A causal language model whose tokens differ a lot in influence."""
    kind = getattr(transformers, f"{family}ForCausalLM")
    options = ALL | FAMILIES[family] | changes
    for types in ("layer_types", "layers_block_type"):
        if types in options:
            options["num_hidden_layers"] = len(options[types])
    torch.manual_seed(0)
    config = kind.config_class(**options)
    config._experts_implementation = "eager"  # the others can't compute in float64
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "A_log" in name:
                weight.uniform_(-4.0, 0.5)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif weight.dim() == 1 or name.endswith(("dt_proj_bias", ".D")):
                weight.normal_(std=0.5)
            else:
                weight.normal_(std=1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5)
    return model.to(dtype).eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def bamba():
    return tiny("Bamba")


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def padded(*rows):
    """Rows (1, T) as one batch, and its mask."""
    width = max(row.shape[1] for row in rows)
    batch = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return batch, (batch != 0).long()


def generate(model, ids, **options):
    """Tokens that were generated, and the logits (B, new, vocab) before each."""
    given = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    given |= options  # without a mask, tokens like the padding would be taken for padding
    out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **given)
    logits = torch.stack(out.logits, 1)
    return out.sequences[:, -logits.shape[1] :], logits, out.past_key_values


def close(actual, expected):
    return actual.shape == expected.shape and relative_error(actual, expected) < 1e-5


@dataclass(frozen=True)
class Noting(Criterion):
    """Influence that notes what each layer shows."""

    name: ClassVar[str] = "noting"
    names: ClassVar[tuple[str, ...]] = ("x", "dt", "A", "B", "C", "output_at_anchor")
    seen: ClassVar[dict] = {}

    def score(self, layer, keep):
        shown = {name: getattr(layer, name) for name in self.names}
        for reduce in REDUCTIONS:
            shown[reduce] = layer.influence(reduce, True)
        self.seen[layer.layer_idx] = shown
        return shown["max"]


def test_what_a_rule_sees_of_layers_with_heads(model):
    """Influences, token by token and channel by channel, and their sum: the output without D x."""
    simba.sparsify(model, 0.4)
    model.model._simba.criterion = Noting()  # put in its place, since it is not registered
    Noting.seen.clear()
    ids, mask = padded(tokens(1, 15), tokens(1, 9, seed=2))
    model(ids, attention_mask=mask)
    assert Noting.seen
    for place, seen in Noting.seen.items():
        x, d_inner = seen["x"], seen["x"].shape[2]
        A, dt, B, C = (seen[name] for name in ("A", "dt", "B", "C"))
        A = A if A.dim() == 2 else A.repeat_interleave(d_inner // len(A))[:, None]
        dt = dt.repeat_interleave(d_inner // dt.shape[2], 2)
        if B.dim() == 3:  # one for all channels
            B, C = B[:, :, None], C[:, :, None]
        B, C = (each.repeat_interleave(d_inner // each.shape[2], 2) for each in (B, C))
        behind = dt.flip(1).cumsum(1).flip(1) - dt  # steps of the tokens behind each
        decay = torch.exp(A * behind[..., None])
        influences = (C[:, -1:] * decay * B).sum(-1) * dt * x
        for reduce in REDUCTIONS:
            assert relative_error(seen[reduce], reduce_channels(influences, reduce)) < 1e-5
        layer = model.model.layers[place]
        D = layer.ssm_of(layer).D.flatten()
        skip = D.repeat_interleave(d_inner // len(D)) * x[:, -1]
        assert relative_error(seen["output_at_anchor"] - skip, influences.sum(1)) < 1e-5


# --- the dense path -----------------------------------------------------------------------------


def test_keep_1_is_the_stock_model(model):
    ids, mask = padded(tokens(1, 19), tokens(1, 13, seed=2))
    dense = model(ids, attention_mask=mask).logits
    _, steps, _ = generate(model, ids[:1])
    simba.sparsify(model, 1.0)
    assert torch.equal(model(ids, attention_mask=mask).logits, dense)
    with simba.record(model) as run:
        assert torch.equal(model(ids, attention_mask=mask).logits, dense)
    scores = find_adapter(model).scores(model)
    assert [not bool(each.isnan().all()) for each in run.scores] == scores
    _, again, cache = generate(model, ids[:1])
    assert torch.equal(again, steps) and type(cache) is DynamicCache
    simba.sparsify(model, 1.0, dense_path="simba")
    whole, short = model(ids).logits, model(ids, attention_mask=mask).logits[1, 6:]
    assert close(whole[0], dense[0]) and close(short, dense[1, 6:])


@pytest.mark.parametrize("family", ["Bamba", "Jamba"])
def test_keep_1_has_the_stock_models_loss(family):
    experts = family != "Bamba"
    options = (
        {"output_router_logits": True} if experts else {}
    )  # and with them the experts' balance
    model = tiny(family, **({} if experts else {"z_loss_coefficient": 0.1}))
    ids, mask = padded(tokens(1, 12), tokens(1, 8, seed=2))
    labels = ids.masked_fill(mask == 0, -100)
    stock = model(ids, attention_mask=mask, labels=labels, **options).loss
    simba.sparsify(model, 1.0)
    assert torch.equal(model(ids, attention_mask=mask, labels=labels, **options).loss, stock)


def test_undo_is_bit_for_bit(model):
    ids = tokens(2, 17)
    before = model(ids).logits
    classes, names = [type(each) for each in model.modules()], set(vars(model.model))
    simba.sparsify(model, 0.3)
    out = model(ids)
    assert out.logits.shape[1] < 17
    with simba.dense(model):
        assert torch.equal(model(ids).logits, before)
    simba.desparsify(model)
    assert torch.equal(model(ids).logits, before)
    assert [type(each) for each in model.modules()] == classes
    assert set(vars(model.model)) == names
    with pytest.raises(simba.InputError, match="sparsified model"):  # not a wrong mask
        model(ids[:, :2], past_key_values=out.past_key_values)


def test_a_saved_model_is_restored(bamba, tmp_path):
    simba.sparsify(bamba, 0.3, schedule=simba.PruneAt([2]), protect=2)
    ids = tokens(1, 19)
    bamba.save_pretrained(tmp_path)
    loaded = type(bamba).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert simba.restore(loaded) is loaded
    assert torch.equal(loaded(ids).logits, bamba(ids).logits)
    assert simba.status(loaded).config == simba.status(bamba).config


# --- pruning ------------------------------------------------------------------------------------


def test_a_row_in_a_padded_batch_is_the_row_alone(model):
    simba.sparsify(model, 0.3)
    long, short = tokens(1, 23), tokens(1, 14, seed=2)
    ids, mask = padded(long, short)
    batch, alone = model(ids, attention_mask=mask), model(short)
    kept = alone.logits.shape[1]
    assert torch.equal(batch.positions[1, -kept:] - 9, alone.positions[0])
    assert close(batch.logits[1, -kept:], alone.logits[0])
    assert close(batch.logits[0], model(long).logits[0])
    answers, logits, _ = generate(model, ids, attention_mask=mask)
    for row, each in enumerate((long, short)):
        own, own_logits, _ = generate(model, each)
        assert torch.equal(answers[row], own[0]) and close(logits[row], own_logits[0])


@pytest.mark.parametrize("criterion", ["influence", "attention"])
def test_padded_rows_that_attention_takes_by_themselves(model, monkeypatch, criterion):
    simba.sparsify(model, 0.4, criterion=criterion)
    rows = [tokens(1, length, seed=length) for length in (17, 11)]
    ids, mask = padded(*rows, rows[1].flip(1), rows[0].flip(1))
    together = model(ids, attention_mask=mask, use_cache=True)
    monkeypatch.setattr(run, "BY_ROWS", 2)
    monkeypatch.setattr(run, "create_causal_mask", None)  # nobody calls it
    apart = model(ids, attention_mask=mask, use_cache=True)
    assert torch.equal(apart.positions, together.positions)
    there = apart.positions >= 0
    assert close(apart.logits[there], together.logits[there])
    pairs = zip(apart.past_key_values.layers, together.past_key_values.layers, strict=True)
    for place, (ours, theirs) in enumerate(pairs):
        held = apart.past_key_values.simba.padding.get(place)
        if held is not None:
            own = torch.arange(ours.keys.shape[2]) >= held
            for name in ("keys", "values"):
                actual, expected = (getattr(each, name).transpose(1, 2) for each in (ours, theirs))
                assert close(actual[own], expected[own])


class Largest(TorchDispatchMode):
    """Notes the most numbers in a tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *(each.numel() for each in made)])
        return out


def test_long_padded_prompts_make_no_mask(bamba, monkeypatch):
    simba.sparsify(bamba, 0.4)
    length = 1100
    ids, mask = padded(tokens(1, length), tokens(1, length - 100, seed=2))
    assert length >= run.BY_ROWS
    with Largest() as apart:
        bamba(ids, attention_mask=mask, logits_to_keep=1)
    monkeypatch.setattr(run, "BY_ROWS", length + 1)
    with Largest() as together:
        bamba(ids, attention_mask=mask, logits_to_keep=1)
    assert apart.numbers < length**2 <= together.numbers


def test_one_survivor_of_each_row(model):
    simba.sparsify(model, 0.01)  # batches of single tokens in the last layers
    ids = tokens(2, 12)
    out = model(ids)
    assert out.positions.tolist() == [[11], [11]]
    assert close(out.logits[1:], model(ids[1:]).logits)


def test_prefill_and_steps_are_one_pass(model):
    simba.sparsify(model, 0.3)
    ids = tokens(2, 21)
    answers, logits, cache = generate(model, ids)
    whole = model(torch.cat([ids, answers], 1), prompt_length=21)
    assert close(logits[:, 1:], whole.logits[:, -4:-1].float())
    # what each layer holds: the plan's tokens, and three new ones
    state = find_adapter(model).backbone(model)._simba
    counts = keep_counts(state.ratios, 21)
    assert counts[-1] == 6
    held = {
        place: layer.keys.shape[2]
        for place, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None
    }
    assert held and held == {place: counts[place] + 3 for place in held}
    flops = simba.flops(model, 21, batch_size=2)
    kept = [layer.kv_bytes for layer in flops.layers]
    for place, layer in enumerate(cache.layers):
        size = 0
        if place in held:
            size = (layer.keys[:, :, 3:].numel() + layer.values[:, :, 3:].numel()) * 8
        assert kept[place] == size
    assert sum(kept) == flops.kv_bytes < flops.dense_kv_bytes and flops.ratio < 1


def test_beams(model):
    simba.sparsify(model, 0.3)
    ids, mask = padded(tokens(1, 16), tokens(1, 9, seed=2))
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_sampled_rows_and_repeated_rows(bamba):
    simba.sparsify(bamba, 0.3)
    ids = tokens(2, 15)
    out = bamba.generate(ids, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert out.shape == (4, 18)
    batch, mask = padded(ids[:1], ids[1:, 6:])
    cache = bamba(batch, attention_mask=mask).past_key_values
    expected = bamba(tokens(2, 3, seed=7), past_key_values=copy.deepcopy(cache)).logits
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    again = bamba(tokens(2, 3, seed=7)[[1, 1, 0]], past_key_values=cache).logits
    assert close(again, expected[[1, 1, 0]])


def test_a_second_turn(model):
    simba.sparsify(model, 0.4)
    long, short = tokens(1, 20), tokens(1, 13, seed=2)
    ids, mask = padded(long, short)
    turn = tokens(2, 9, seed=3)
    answers, _, cache = generate(model, ids, attention_mask=mask)
    new = torch.cat([answers[:, -1:], turn], 1)
    # several tokens are what they are one by one
    together = model(new, past_key_values=copy.deepcopy(cache))
    steps = copy.deepcopy(cache)
    one_by_one = [model(new[:, i : i + 1], past_key_values=steps).logits for i in range(10)]
    assert close(together.logits, torch.cat(one_by_one, 1))
    with simba.dense(model):
        assert torch.equal(model(new, past_key_values=copy.deepcopy(cache)).logits, together.logits)
    # generate, of a padded batch that goes on, prunes the turn as it does of each row alone
    masks = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], 1)
    given = torch.cat([ids, answers, turn], 1)
    options = {"past_key_values": cache, "attention_mask": masks}
    batch, logits, cache = generate(model, given, prompt_length=torch.tensor([10, 10]), **options)
    assert cache.get_seq_length() == 20 + 4 + 9 + 3
    for row, prompt in enumerate((long, short)):
        _, _, own = generate(model, prompt)
        given = torch.cat([prompt, answers[row : row + 1], turn[row : row + 1]], 1)
        alone, own_logits, _ = generate(
            model, given, past_key_values=own, prompt_length=torch.tensor([10])
        )
        assert torch.equal(batch[row], alone[0]) and close(logits[row], own_logits[0])


@pytest.mark.parametrize("turn", [0, 4])
def test_a_mask_with_a_hole_over_tokens_that_were_read(model, turn):
    """generate makes one where a token has the padding's id, if it is given none."""
    simba.sparsify(model, 0.4)
    ids, mask = padded(tokens(1, 15), tokens(1, 11, seed=2))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=places).past_key_values
    answer = torch.tensor([[7, 3], [0, 5]])  # the second row's looks like padding
    model(answer[:, :1], past_key_values=cache)
    given = torch.cat([ids, answer, tokens(2, turn, seed=3).clamp(min=1)], 1)

    def go_on(**options):
        return generate(model, given, past_key_values=copy.deepcopy(cache), **options)[1]

    with pytest.raises(simba.InputError, match=r"contradict the cache in rows \[1\].*pass it"):
        go_on(attention_mask=None)
    with simba.dense(model), pytest.raises(simba.InputError, match="contradict the cache"):
        model(
            given[:, 16:], past_key_values=copy.deepcopy(cache), attention_mask=(given > 0).long()
        )
    right = go_on(attention_mask=torch.cat([mask, torch.ones(2, 2 + turn, dtype=torch.long)], 1))
    alone = model(ids[1:, 4:]).past_key_values
    model(answer[1:, :1], past_key_values=alone)
    _, own, _ = generate(model, given[1:, 4:], past_key_values=alone)
    assert close(right[1], own[0])


def test_other_positions_than_those_behind_the_cache(bamba):
    simba.sparsify(bamba, 0.4)
    ids, mask = padded(tokens(1, 15), tokens(1, 11, seed=2))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = bamba(ids, attention_mask=mask, position_ids=places).past_key_values
    new, behind = tokens(2, 2, seed=3), places[:, -1:] + torch.tensor([[1, 2]])

    def go_on(length, **options):
        return bamba(new[:, :length], past_key_values=copy.deepcopy(cache), **options).logits

    assert torch.equal(go_on(2, position_ids=behind), go_on(2))
    for length in (1, 2):
        for options in (
            {"position_ids": behind[:, :length] - torch.tensor([[0], [1]])},
            {"attention_mask": torch.ones(2, 15 + length)},  # there was padding
        ):
            with pytest.raises(simba.InputError, match=r"contradict the cache in rows \[1\]"):
                go_on(length, **options)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat([mask.flip(0), torch.ones(2, 2, dtype=torch.long)], 1)
    assert close(go_on(2, attention_mask=mask, position_ids=behind.flip(0)), go_on(2))


def test_several_tokens_behind_the_dense_models_cache(model):
    ids = tokens(2, 18)
    whole = model(ids).logits[:, 11:]
    cache = model(ids[:, :11]).past_key_values
    simba.sparsify(model, 0.3)
    out = model(ids[:, 11:], past_key_values=copy.deepcopy(cache)).logits
    assert close(out, whole)  # Jamba's and Zamba's own forwards start from a state of zero
    with simba.dense(model):
        assert torch.equal(model(ids[:, 11:], past_key_values=cache).logits, out)


def test_positions_go_on_without_position_ids(bamba):
    simba.sparsify(bamba, 0.4)
    ids, mask = padded(tokens(1, 16), tokens(1, 11, seed=2))
    given = (mask.cumsum(1) - 1).clamp(min=0)
    cache = bamba(ids, attention_mask=mask, position_ids=given).past_key_values
    new = tokens(2, 2, seed=3)
    with_ids = given[:, -1:] + torch.tensor([[1, 2]])
    expected = bamba(new, past_key_values=copy.deepcopy(cache), position_ids=with_ids).logits
    assert torch.equal(bamba(new, past_key_values=cache).logits, expected)


def test_short_prompts_lose_nothing_and_go_on(model):
    simba.sparsify(model, 0.2, min_tokens=30)
    rows = tokens(1, 14), tokens(1, 9, seed=2)
    ids, mask = padded(*rows)
    first = model(ids, attention_mask=mask).logits
    _, logits, _ = generate(model, ids, attention_mask=mask)
    simba.desparsify(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, first)
    for row, alone in enumerate(rows):
        assert close(logits[row], generate(model, alone)[1][0])


@pytest.mark.parametrize("options", [{"preset": "text"}, {"min_tokens": 64}])
@pytest.mark.parametrize("family", ["Bamba", "GraniteMoeHybrid", "Jamba", "FalconH1"])
def test_padding_where_all_is_read_and_in_proj_has_a_bias(family, options):
    """Stock layers read that bias on padding."""
    model = tiny(family, mamba_proj_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith("in_proj.bias"):
            nn.init.normal_(weight, std=0.5)
    rows = tokens(1, 20), tokens(1, 12, seed=2)
    ids, mask = padded(*rows)
    with torch.no_grad():
        stock = model(ids, attention_mask=mask).logits[1, -1]
        assert relative_error(stock, model(rows[1]).logits[0, -1]) > 0.01
        simba.sparsify(model, **options)
        out = model(ids, attention_mask=mask)
        for row, alone in enumerate(rows):
            real = out.positions[row] >= 0
            # alone, a row runs through transformers' scan, which is in float32
            assert relative_error(out.logits[row, real], model(alone).logits[0]) < 1e-3


def test_the_cut_is_the_dense_model_on_the_end(model):
    ids = tokens(2, 20)
    dense, more = model(ids[:, -8:]).logits, model(ids[:, -11:]).logits
    assert close(simba.sparsify(model, preset="text")(ids).logits, more)  # in simba's own pass
    simba.sparsify(model, 0.4, schedule="cut")
    out = model(ids)
    assert out.positions.tolist() == [list(range(12, 20))] * 2 and close(out.logits, dense)
    batch, mask = padded(ids[:1], tokens(1, 10, seed=2))
    answers, logits, _ = generate(model, batch, attention_mask=mask)
    simba.desparsify(model)
    for row, end in enumerate((ids[:1, -8:], tokens(1, 10, seed=2)[:, -4:])):
        own, own_logits, _ = generate(model, end)
        assert torch.equal(answers[row], own[0]) and close(logits[row], own_logits[0])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"criterion": "recency"}, [14, 15, 16, 17, 18, 19]),
        ({"criterion": "recency", "protect": 2}, [0, 1, 16, 17, 18, 19]),
        (
            {"criterion": "recency", "protect": simba.Protect(spans=[(3, 5)])},
            [3, 4, 16, 17, 18, 19],
        ),
    ],
)
def test_rules_that_need_no_scan_and_protected_tokens(model, options, kept):
    simba.sparsify(model, 0.3, **options)
    assert model(tokens(1, 20)).positions[0].tolist() == kept


def test_logits_and_losses_of_survivors(model):
    simba.sparsify(model, 0.3)
    ids, mask = padded(tokens(1, 20), tokens(1, 15, seed=2))
    out = model(ids, attention_mask=mask, prompt_length=[17, 12])
    assert torch.equal(out.positions[:, -4:], torch.tensor([[16, 17, 18, 19]] * 2))
    behind = torch.tensor([16, 18])
    some = model(ids, attention_mask=mask, prompt_length=[17, 12], logits_to_keep=behind)
    assert close(some.logits, out.logits[:, [-4, -2]])
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :17] = -100
    loss = model(ids, attention_mask=mask, prompt_length=[17, 12], labels=labels).loss
    expected = nn.functional.cross_entropy(
        out.logits[:, -4:-1].flatten(0, 1).double(), ids[:, 17:].flatten()
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    simba.sparsify(model, 0.3, full_length=True)
    by_column = model(ids, attention_mask=mask, prompt_length=[17, 12])
    assert by_column.logits.shape == (2, 20, VOCAB)
    assert torch.equal(by_column.logits[:, 16:], out.logits[:, -4:])


def test_gradients_with_checkpointing(model):
    simba.sparsify(model, 0.4)
    ids = tokens(2, 13)
    gradients = []
    for checkpointing in (None, True, False):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for other in gradients[1:]:
        assert all(map(torch.equal, other, gradients[0]))


def test_gradients_of_a_layer_that_runs_again(model):
    simba.sparsify(model, 0.4)
    find_adapter(model).backbone(model)._simba.criterion = Fickle()
    grads = gradients_of_first_choices(model, tokens(2, 13), 11)
    assert all(map(torch.equal, grads[1], grads[0])) and all(map(torch.equal, grads[2], grads[0]))


def test_gradients_without_pruning_are_the_stock_models():
    for family in ("Bamba", "Zamba"):
        model, ids = tiny(family).train(), tokens(2, 11)
        gradients = []
        for own in (False, True):
            if own:
                simba.sparsify(model, 1.0, dense_path="simba")
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for ours, stock in zip(*gradients, strict=True):
            assert relative_error(ours, stock) < 1e-4


def test_an_interrupted_pass_leaves_the_cache_as_it_was(bamba):
    simba.sparsify(bamba, 0.4)
    ids, turn = tokens(1, 16), tokens(1, 6, seed=2)
    cache = bamba(ids).past_key_values
    expected = bamba(turn, past_key_values=copy.deepcopy(cache)).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = bamba.model.layers[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bamba(turn, past_key_values=cache)
    empty = DynamicCache(config=bamba.config)
    with pytest.raises(KeyboardInterrupt):
        bamba(ids, past_key_values=empty)
    hook.remove()
    assert torch.equal(bamba(turn, past_key_values=cache).logits, expected)
    bamba(ids, past_key_values=empty)
    assert torch.equal(bamba(turn, past_key_values=empty).logits, expected)


def test_the_command_line_asks_several_questions(bamba):
    from simba.cli.answering import Session

    simba.sparsify(bamba, 0.4)
    document, questions = tokens(20).tolist(), (tokens(5, seed=2).tolist(), tokens(3).tolist())
    keywords = {"max_new_tokens": 4, "do_sample": False}

    def decode(ids):
        return "".join(f"{each} " for each in ids)

    session = Session(bamba, simba.status(bamba).config, decode, keywords, 0)
    cache, _ = session.read(document)
    for question in questions:
        text: list[str] = []
        session.answer(question, text.append, cache=cache)
        new = torch.tensor([document + question])
        own = bamba(torch.tensor([document])).past_key_values
        expected, _, _ = generate(bamba, new, past_key_values=own, prompt_length=len(question))
        assert "".join(text) == decode(expected[0].tolist())


# --- scores of attention ------------------------------------------------------------------------


def test_a_window_and_the_influence_through_attention(model):
    simba.sparsify(model, 0.5, criterion="window:0.5+attention:absmax")
    ids = tokens(2, 20)
    out = model(ids)
    assert out.positions.shape == (2, 10)
    with simba.record(model) as run:
        assert torch.equal(model(ids).logits, out.logits)
    kinds = find_adapter(model).kinds(model)
    for place, kind in enumerate(kinds[:-1]):
        kept = set(run.positions[place + 1][0].tolist())
        if kind:
            assert set(range(20 - len(kept) // 2, 20)) <= kept  # half of it are the last ones
        else:
            assert run.positions[place + 1].shape == run.positions[place].shape
    assert [bool(each.isnan().all()) for each in run.scores] == [not kind for kind in kinds]


def test_gradients_of_layers_that_attention_scores(model):
    simba.sparsify(model, 0.4, criterion="attention")
    ids = tokens(2, 13)
    gradients = []
    for checkpointing in (None, True, False):
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for other in gradients[1:]:
        assert all(map(torch.equal, other, gradients[0]))


def test_scores_of_attention_in_a_dense_pass(model):
    """Recorded where nothing is pruned, of layers that have attention; and undone."""
    ids, classes = tokens(1, 15), [type(each) for each in model.modules()]
    dense = model(ids).logits
    simba.sparsify(model, 1.0, criterion="attention")
    with simba.record(model) as run:
        assert torch.equal(model(ids).logits, dense)
    simba.sparsify(model, 1.0)
    with simba.record(model) as scans:
        model(ids)
    for kind, ours, theirs in zip(
        find_adapter(model).kinds(model), run.scores, scans.scores, strict=True
    ):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)) != ("attention" in kind)
    simba.desparsify(model)
    assert [type(each) for each in model.modules()] == classes


def test_flops_of_scores_of_attention(bamba):
    simba.sparsify(bamba, schedule=simba.PruneAt({0: 0.5, 3: 0.2}), criterion="attention")
    layers = simba.flops(bamba, 50).layers
    assert [layer.tokens for layer in layers] == [50, 25, 25, 25, 10]
    # 4 heads of 4 and 2 of values: products, softmax, largest value, product with p and largest
    each = 2 * 16 + 3 * 4 + 8 + 2 * 4
    assert [layer.parts["score"] for layer in layers] == [50 * each, 0, 0, 25 * each, 0]
    assert bamba(tokens(1, 50)).positions.shape == (1, 10)


def test_a_rule_that_asks_attention_for_a_scan(bamba):
    @dataclass(frozen=True)
    class Both(Criterion):
        name: ClassVar[str] = "both"

        @property
        def reads(self):
            return ("attention", "scan")

        def score(self, layer, keep):
            return layer.dt.sum(-1)

    simba.sparsify(bamba, 0.3, criterion="attention")
    bamba.model._simba.criterion = Both()  # put in its place, since it is not registered
    with pytest.raises(simba.ConfigError, match=r"asks layer 0 for its dt.*not scored by a scan"):
        bamba(tokens(1, 9))


# --- sizes --------------------------------------------------------------------------------------


def test_ratios_are_held_where_a_layer_cannot_score():
    ratios = [Fraction(10 - layer, 10) for layer in range(6)]
    scores = [False, True, False, True, True, True]
    held = hold(ratios, scores)
    assert held == (1, 1, Fraction(8, 10), Fraction(8, 10), Fraction(6, 10), Fraction(5, 10))
    assert hold(ratios, [True] * 6) == tuple(ratios)
    # final_keep is reached behind the last layer that scores
    assert hold(ratios, [True, False, True, False, False, False]) == (
        *(1, Fraction(9, 10), Fraction(9, 10)),
        *([Fraction(5, 10)] * 3),
    )
    with pytest.raises(simba.ConfigError, match="no layer"):
        hold(ratios, [False] * 5 + [True])
    with pytest.raises(simba.ConfigError, match="next layer that can is 3"):
        hold(ratios, scores, simba.PruneAt([2]))


def test_flops_count_pairs_and_active_experts():
    model = tiny("GraniteMoeHybrid", torch.bfloat16)
    flops = simba.flops(model, 50)
    parts = flops.layers[3].parts
    # q, o: 16 x 16; k, v: 16 x 8; 4 heads of 4: scores and sum, and the softmax
    assert parts["attention"] == 50 * 2 * 16 * (16 + 16 + 8 + 8) + 50 * 51 // 2 * (4 * 16 + 3 * 4)
    assert parts["experts"] == 50 * 2 * (2 * 16 * 2 * 24 + 2 * 24 * 16)
    assert parts["router"] == 50 * 2 * 4 * 16
    assert parts["mlp"] == 50 * (2 * 16 * 24 + 2 * 12 * 16 + 2 * 12)
    assert flops.layers[3].kv_bytes == flops.dense_kv_bytes == 50 * 2 * 8 * 2
    simba.sparsify(model, 0.5)
    text = str(simba.summary(model, 50))
    assert text.endswith("the paper; 'text': only the end of the prompt counts")  # no 'recall'
    assert simba.status(model).graphs.obstacle == "the model is on cpu"
    assert "GraniteMoeHybrid" in text and "KV cache 0.001 MiB of 0.002 dense: 50.0%" in text


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fate": "write"}, "fate=write.*use fate='drop'"),
        ({"fate": "skip"}, "fate=skip.*use fate='drop'"),
        ({"chunk_size": 8}, "chunk_size=8.*use chunk_size=None"),
        ({"cuda_graph": "always"}, "cuda_graph='always'.*use cuda_graph='auto'"),
        ({"schedule": simba.PruneAt([0])}, "layer 0 can't score.*next layer that can is 1"),
    ],
)
def test_options_that_do_not_work_yet(bamba, options, message):
    with pytest.raises(simba.ConfigError, match=message):
        simba.sparsify(bamba, 0.3, **options)
    assert not simba.status(bamba).sparsified


def test_parts_of_simba_that_do_not_work_yet(bamba):
    from simba import evaluate
    from simba.tuning.bench import refuse_unmeasurable

    simba.sparsify(bamba, 0.3)
    documents = [evaluate.Document("text", torch.arange(50) % VOCAB)]
    for use in (
        lambda: simba.PromptCache(bamba),
        lambda: evaluate.flow(bamba, documents, length=20),
        lambda: evaluate.redundancy(bamba, documents, length=20),
        lambda: refuse_unmeasurable(bamba),
    ):
        with pytest.raises(simba.UnsupportedModelError, match="does not work with hybrids"):
            use()


def test_other_heads_and_other_hybrids():
    kind = transformers.ZambaForSequenceClassification
    config = kind.config_class(**ALL | FAMILIES["Zamba"], num_hidden_layers=4)
    with pytest.raises(simba.UnsupportedModelError, match="ZambaForCausalLM and ZambaModel"):
        simba.sparsify(kind(config))
    backbone = simba.sparsify(tiny("Zamba").model, 0.3)
    assert backbone(tokens(1, 10)).positions.shape == (1, 3)
    plain = tiny("Bamba", num_hidden_layers=2, attn_layer_indices=[0, 1])
    with pytest.raises(simba.UnsupportedModelError, match="no state-space layers"):
        simba.sparsify(plain)
    moved = tiny("Bamba")
    del moved.model.layers[1]
    with pytest.raises(simba.UnsupportedModelError, match="layer 1 has the place layer_idx=2"):
        simba.sparsify(moved)


def pruned_cache(model, rows=1):
    return model(tokens(rows, 12)).past_key_values


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ids: m(ids, promt_length=3), simba.InputError, "did you mean prompt_length"),
        (
            lambda m, ids: m(ids, cache_params=None),
            simba.InputError,
            "did you mean past_key_values",
        ),
        (
            lambda m, ids: m(ids, attention_mask=torch.ones(2, 1, 12, 12)),
            simba.InputError,
            r"found a tensor of shape \(2, 1, 12, 12\)",
        ),
        (
            lambda m, ids: m(ids, past_key_values=StaticCache(m.config, max_cache_len=20)),
            simba.InputError,
            "StaticCache.*DynamicCache",
        ),
        (
            lambda m, ids: m.generate(ids, max_new_tokens=2, cache_implementation="static"),
            simba.InputError,
            "found a dict.*cache_implementation",
        ),
        (
            lambda m, ids: m(ids, output_router_logits=True),
            simba.InputError,
            "output_router_logits",
        ),
        (
            lambda m, ids: m(ids, position_ids=(torch.arange(12) % 7)[None]),
            simba.InputError,
            "position_ids must rise by one",
        ),
        (
            lambda m, ids: m(ids, past_key_values=pruned_cache(m)),
            simba.InputError,
            "holds 1 rows, and 2 rows",
        ),
        (
            lambda m, ids: m(
                ids[:, :2],
                attention_mask=torch.tensor([[1, 1], [0, 1]]),
                past_key_values=pruned_cache(m, 2),
            ),
            simba.InputError,
            "can't be padded",
        ),
        (  # row 1's answer ended early, and its padding is in the cache
            lambda m, ids: m(
                ids[:, :2],
                attention_mask=torch.tensor([[1] * 14, [1] * 10 + [0] * 2 + [1] * 2]),
                past_key_values=pruned_cache(m, 2),
            ),
            simba.InputError,
            r"contradict the cache in rows \[1\]",
        ),
        (
            lambda m, ids: m(ids, prompt_length=[12, 5], past_key_values=pruned_cache(m, 2)),
            simba.InputError,
            "keep different numbers of tokens",
        ),
        (
            lambda m, ids: m(ids, past_key_values=pruned_cache(simba.sparsify(tiny("Jamba")), 2)),
            simba.InputError,
            "another model's",
        ),
    ],
)
def test_calls_that_could_not_be_right(bamba, call, error, message):
    simba.sparsify(bamba, 0.3)
    with pytest.raises(error, match=message):
        call(bamba, tokens(2, 12))


def test_attention_that_reads_more_than_a_mask(bamba):
    simba.sparsify(bamba, 0.3)
    bamba.config._attn_implementation = "flex_attention"
    with pytest.raises(simba.UnsupportedModelError, match=r"flex_attention.*eager, sdpa"):
        bamba(tokens(1, 12))


def test_padding_in_a_cache_of_the_dense_model(bamba):
    ids, mask = padded(tokens(1, 12), tokens(1, 8, seed=2))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = bamba(ids, attention_mask=mask, position_ids=places).logits[:, 9:]
    cache = bamba(ids[:, :9], attention_mask=mask[:, :9], position_ids=places[:, :9])
    simba.sparsify(bamba, 0.3)

    def go_on(**options):
        held = copy.deepcopy(cache.past_key_values)
        return bamba(ids[:, 9:], past_key_values=held, **options).logits

    assert close(go_on(attention_mask=mask, position_ids=places[:, 9:]), whole)
    with pytest.raises(simba.InputError, match="12 columns"):
        go_on(attention_mask=mask[:, 9:], position_ids=places[:, 9:])
    with pytest.raises(simba.InputError, match="position_ids, which say"):
        go_on(attention_mask=mask)
