"""The plugin's mixers on a step's prompts and decodes, against the equations; no vLLM is needed."""

from __future__ import annotations

import copy
import itertools
import types
from typing import Any

import pytest
import torch

import simba
from simba.ops import conv, naive, selection, varlen
from simba.serving import steps
from simba.serving.mixers import Requests, prefill_mamba, prefill_mamba2

pytestmark = pytest.mark.usefixtures("poisoned")
RATIOS = simba.SimbaConfig(final_keep=0.2).ratios(3)
CHANNELS, D_STATE, HEADS, GROUPS = 12, 5, 4, 2
SIDE = GROUPS * D_STATE
WIDE = {"mamba": CHANNELS, "mamba2": CHANNELS + 2 * SIDE}
"""Channels of the convolution."""
HIDDEN = {"mamba": 2 * CHANNELS, "mamba2": CHANNELS + WIDE["mamba2"] + HEADS}
PREFILLS = {"mamba": prefill_mamba, "mamba2": prefill_mamba2}


def mixer_of(family, dim_first):
    """vLLM's mixer as far as a prefill reads it, without the projections."""
    window = torch.randn(8, 3, WIDE[family])
    shared: dict[str, Any] = {
        "in_proj": lambda hidden: (hidden, None),
        "conv1d": torch.nn.Conv1d(WIDE[family], WIDE[family], 4, groups=WIDE[family], padding=3),
        "activation": "silu",
        "out_proj": lambda y: (y, None),
    }
    states = (CHANNELS, D_STATE) if family == "mamba" else (HEADS, CHANNELS // HEADS, D_STATE)
    window = window.transpose(1, 2).contiguous() if dim_first else window  # vLLM has both layouts
    shared["kv_cache"] = window, torch.randn(8, *states)
    if family == "mamba":
        return types.SimpleNamespace(
            **shared, A=-torch.rand(CHANNELS, D_STATE) - 0.1, D=torch.randn(CHANNELS),
            dt_proj=types.SimpleNamespace(bias=torch.randn(CHANNELS) - 2),
            _ssm_transform=lambda x: (
                (x * 0.5).transpose(-2, -1), x[:, :D_STATE], x[:, D_STATE : 2 * D_STATE]
            ),
        )  # fmt: skip
    return types.SimpleNamespace(
        **shared, A=-torch.rand(HEADS) - 0.1, D=torch.randn(HEADS), dt_bias=torch.randn(HEADS) - 2,
        tped_intermediate_size=CHANNELS, tped_conv_size=WIDE[family], tped_dt_size=HEADS,
        split_hidden_states_B_C_fn=lambda wide: wide.split([CHANNELS, SIDE, SIDE], -1),
        head_dim=CHANNELS // HEADS, n_groups=2 * GROUPS, tp_size=2, norm=lambda y, z: y * z,
    )  # fmt: skip


def exact_sequence(family, mixer, hidden, before, state, keep):
    """One sequence by the equations in float64: survivors, their outputs, the last states."""
    taps = copy.deepcopy(mixer.conv1d).double()
    hidden, before, state = hidden.double(), before.double(), state.double()[None]
    A, D = mixer.A.double(), mixer.D.double()
    if family == "mamba":
        wide, z = hidden.chunk(2, 1)
    else:
        z, wide, dt = hidden.split([CHANNELS, WIDE[family], HEADS], 1)
    inputs = torch.cat((before, wide))
    wide = torch.nn.functional.silu(taps(inputs.t()[None])[0, :, 3:-3].t())
    if family == "mamba":
        given = {"dt_bias": mixer.dt_proj.bias.double()}
        dt, B, C = mixer._ssm_transform(wide)
        five = wide[None], dt.t()[None], A, B[None], C[None]
        scores = naive.influence(*five, **given)[0]
        y, last = naive.selective_scan(*five, D, z[None], initial_state=state, **given)
        out = y[0]
    else:
        given = {"dt_bias": mixer.dt_bias.double()}
        x, B, C = wide.split([CHANNELS, SIDE, SIDE], 1)
        x, B, C = (t.unflatten(1, (n, -1))[None] for t, n in ((x, HEADS), (B, GROUPS), (C, GROUPS)))
        five = x, dt[None], A, B, C
        scores = naive.ssd_influence(*five, **given)[0]
        y, last = naive.ssd_scan(*five, D, initial_state=state, **given)
        out = y[0].flatten(1) * z
    best = scores[:-1].topk(keep - 1).indices.sort().values
    kept = torch.cat((best, torch.tensor([len(hidden) - 1])))
    return kept, out[kept], (inputs[-3:], last[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    ("lengths", "continued", "decodes", "dim_first"),
    [([40, 7, 30], True, 0, False), ([40, 7, 30], True, 2, True), ([40, 2, 30], False, 2, False),
     ([40], False, 1, True)],
)  # fmt: skip
def test_sequences_of_a_step_are_each_as_the_equations_say(
    family, lengths, continued, decodes, dim_first, backend, where_kernels_run, monkeypatch
):
    """Prompts, one of them too short to be pruned, and one that goes on from its states where
    prompts may; and decodes. Other requests' rows of the caches stay as they were."""
    for module in (conv, selection, varlen):
        chosen = module.choose
        monkeypatch.setattr(module, "choose", lambda _, *more, c=chosen: c(backend, *more))
    torch.manual_seed(0)
    mixer = mixer_of(family, dim_first)
    count = len(lengths)
    rows = [*[4, 1, 2][:count], *[7, 5][:decodes]]
    others = [row for row in range(8) if row not in rows]
    for cache in mixer.kv_cache:
        cache[others] = 7.0
    window, states = (cache.clone() for cache in mixer.kv_cache)
    window = window.transpose(1, 2) if dim_first else window
    goes_on = [continued and i == 2 for i in range(count)] + [True] * decodes
    layer = steps.lay_out(lengths, RATIOS, 10, where_kernels_run, decodes)[0]
    keep = [*layer.kept, *[1] * decodes]
    assert keep[0] < 40 and (count == 1 or (keep[1] == lengths[1] and keep[2] < 30))
    hidden = torch.randn(sum(lengths) + decodes, HIDDEN[family])
    requests = Requests(torch.tensor(rows), torch.tensor(goes_on) if continued else None, decodes)
    criterion = simba.SimbaConfig(final_keep=0.2).criterion
    survivors, outputs = [], []
    with torch.no_grad():
        found = PREFILLS[family](mixer, hidden, layer, requests, criterion, lambda own, reduce: own)
        after = mixer.kv_cache[0].transpose(1, 2) if dim_first else mixer.kv_cache[0]
        ends = itertools.accumulate([*lengths, *[1] * decodes], initial=0)
        for i, (start, end) in enumerate(itertools.pairwise(ends)):
            before, state = (cache[rows[i]] * goes_on[i] for cache in (window, states))
            part = hidden[start:end]
            kept, out, last = exact_sequence(family, mixer, part, before, state, keep[i])
            survivors.append(kept + start)
            outputs.append(out)
            assert torch.equal(after[rows[i]].double(), last[0])
            ours = mixer.kv_cache[1][rows[i]].double()
            torch.testing.assert_close(ours, last[1], rtol=1e-5, atol=1e-5)
    assert found.survivors is not None and torch.equal(found.survivors, torch.cat(survivors))
    torch.testing.assert_close(found.out.double(), torch.cat(outputs), rtol=1e-5, atol=1e-5)
    assert all((cache[others] == 7).all() for cache in mixer.kv_cache)


def test_states_of_decodes_are_each_layers_own():
    """They are read to the same memory in each layer; fresh prompts start from zero in all. A
    convolution's cache may have the shape of the states', and another dtype."""
    requests = Requests(torch.tensor([4, 1, 5, 2]), None, decodes=2)
    window, states, other = torch.randn(3, 6, 3, 2).unbind()
    wide = torch.randn(6, 3, 2, dtype=torch.float64)
    for cache in (window, states, wide, other, window.transpose(1, 2)):
        found = requests.read(cache)
        assert found is not None and found.dtype == cache.dtype
        assert torch.equal(found[2:], cache[[5, 2]]) and not found[:2].any()
    assert requests.read(window).data_ptr() == requests.read(other).data_ptr()
    assert Requests(torch.tensor([4, 1]), None).read(window) is None
