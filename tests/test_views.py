"""What a criterion sees of a layer, by name, against the equations and against the model's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import simba
from conftest import relative_error, tiny_mamba, tokens
from simba.criteria import Criterion, register
from simba.models import tiles
from test_families import falcon_mamba, limited_mamba2, mamba2

pytestmark = pytest.mark.usefixtures("poisoned")

MAKE = {
    "Mamba": tiny_mamba,
    "FalconMamba": falcon_mamba,
    "Mamba2": mamba2,
    "Mamba2 with limits": limited_mamba2,
}
NAMES = ("hidden_states", "x", "dt", "A", "B", "C", "output_at_anchor", "rank", "prompt_len")


@register
@dataclass(frozen=True)
class Noting(Criterion):
    """Recency that notes all that a layer shows, and what it gets when it asks for the influence."""

    name: ClassVar[str] = "noting"
    seen: ClassVar[list] = []

    def score(self, layer, keep):
        seen = {name: getattr(layer, name).clone() for name in NAMES}
        self.seen.append({**seen, "influence": layer.influence("max", True)})
        for name in NAMES:  # and writes into it
            getattr(layer, name).fill_(7)
        return layer.rank.double() * 0 + torch.arange(layer.rank.shape[1], device=layer.rank.device)


@pytest.fixture(params=MAKE)
def model(request):
    Noting.seen.clear()
    return MAKE[request.param](dtype=torch.float64)


def by_channel(seen):
    """A (d_inner, d_state), dt (B, K, d_inner), B and C (B, K, d_inner, d_state), as in Mamba-1."""
    A, dt, B, C = (seen[name] for name in ("A", "dt", "B", "C"))
    d_inner = seen["x"].shape[2]
    if A.dim() == 2:
        return A, dt, *(t[:, :, None].expand(-1, -1, d_inner, -1) for t in (B, C))
    A = A.repeat_interleave(d_inner // len(A))[:, None].expand(-1, B.shape[3])
    dt = dt.repeat_interleave(d_inner // dt.shape[2], 2)
    return A, dt, *(t.repeat_interleave(d_inner // t.shape[2], 2) for t in (B, C))


def influences(seen, row, anchor):
    """(anchor + 1, d_inner): equation 4, token by token and channel by channel."""
    A, dt, B, C = by_channel(seen)
    x, dt, B, C = seen["x"][row], dt[row], B[row], C[row, anchor]
    terms = []
    for t in range(anchor + 1):
        decay = torch.exp(A * dt[t + 1 : anchor + 1].sum(0)[:, None])
        terms.append(x[t] * dt[t] * (C * B[t] * decay).sum(-1))
    return torch.stack(terms)


def skip(mixer, x):
    return mixer.D.double().repeat_interleave(x.shape[-1] // len(mixer.D)) * x


@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_influences_and_the_skip_are_the_output(model, keep, tile, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    simba.sparsify(model, keep, criterion=Noting())
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad(), simba.record(model):
        model(tokens(2, 24), attention_mask=mask, prompt_length=[17, 21])
    mixers = [block.mixer for block in model.backbone.layers]
    assert len(Noting.seen) == len(mixers)
    for mixer, seen in zip(mixers, Noting.seen, strict=True):
        for row in range(2):
            anchor = int((seen["rank"][row] == seen["prompt_len"][row] - 1).nonzero())
            terms = influences(seen, row, anchor)
            expected = terms.sum(0) + skip(mixer, seen["x"][row, anchor])
            assert relative_error(seen["output_at_anchor"][row], expected) < 1e-10
            first = int((seen["rank"][row] < 0).sum())
            assert (seen["x"][row, :first] == 0).all()
            scores = seen["influence"][row, first : anchor + 1]
            assert relative_error(scores, terms[first:].amax(1)) < 1e-6


@pytest.mark.parametrize("tile", [5, 1024])
def test_hidden_states_are_what_the_mixer_reads(model, tile, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    simba.sparsify(model, 0.9, criterion=Noting())
    read = [[] for _ in model.backbone.layers]

    def note(mixer, args, read=read):
        read[mixer.layer_idx].append(args[0])
        return (args[0] * (1 + mixer.layer_idx), *args[1:])

    for block in model.backbone.layers:
        block.mixer.register_forward_pre_hook(note)
    with torch.no_grad(), simba.record(model):
        model(tokens(2, 24))
    assert (len(read[0]) > 1) == (tile == 5)
    for layer, (seen, parts) in enumerate(zip(Noting.seen, read, strict=True)):
        assert torch.equal(seen["hidden_states"], torch.cat(parts, 1) * (1 + layer))


def test_shapes(model):
    simba.sparsify(model, 0.5, criterion=Noting())
    with torch.no_grad():
        model(tokens(2, 12))
    seen, mixer = Noting.seen[0], model.backbone.layers[0].mixer
    if model.config.model_type == "mamba2":
        groups, heads = mixer.n_groups, mixer.num_heads
        shapes = {"A": (heads,), "dt": (2, 12, heads), "B": (2, 12, groups, 4)}
    else:
        shapes = {"A": (48, 4), "dt": (2, 12, 48), "B": (2, 12, 4)}
    shapes |= {"C": shapes["B"], "x": (2, 12, 48), "hidden_states": (2, 12, 24)}
    shapes |= {"output_at_anchor": (2, 48)}
    assert {name: tuple(seen[name].shape) for name in shapes} == shapes


def test_writing_into_what_is_seen_changes_nothing(model):
    simba.sparsify(model, 0.3, criterion="recency")
    with torch.no_grad():
        expected = model(tokens(2, 24))
        simba.sparsify(model, 0.3, criterion=Noting())
        out = model(tokens(2, 24))
    assert torch.equal(out.positions, expected.positions)
    assert torch.equal(out.logits, expected.logits)
