"""Flash attention in pruned hybrids, on a CPU: transformers' own code around it runs, and PyTorch
stands in for the two functions that it calls. It decides by masks and positions which tokens belong
together, and positions with gaps would mean several sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils

import simba
from hybrid_configs import CONFIGS, in_float64, tiny


def attend(q, k, v, causal, scale):
    """q, k, v (batch, tokens, heads, head_dim); the last query sees the last key."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(1, 2)


@pytest.fixture
def calls(monkeypatch):
    """How often each function of the library was called."""
    counted = {"flash": 0, "varlen": 0}

    def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert dropout_p == 0.0
        counted["flash"] += 1
        return attend(q, k, v, causal, softmax_scale)

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        counted["varlen"] += 1
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        rows = zip(queries, queries[1:], keys, keys[1:], strict=False)
        parts = [
            attend(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)[0]
            for a, b, c, d in rows
        ]
        return torch.cat(parts)

    functions = (flash, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    settings = flash_utils._lazy_define_process_function(varlen)
    newer = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")  # than transformers 5.17
    monkeypatch.setattr(
        flash_utils,
        "lazy_import_flash_attention",
        lambda *_, **__: (functions, (settings, settings) if newer else settings),
    )
    return counted


def answers(model, implementation):
    """Logits of a pruned prompt, of a left-padded batch, and of a second turn; generated tokens."""
    model.config._attn_implementation = implementation
    simba.sparsify(model, 0.3)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (3, 24), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :1] = 0
    with torch.no_grad():
        first = model(ids[:1], use_cache=True)
        again = torch.cat((ids[:1], ids[1:2, :5]), 1)
        turn = model(again[:, 24:], past_key_values=first.past_key_values, use_cache=True)
        batch = model(ids, attention_mask=mask, use_cache=True)
        options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
        tokens = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    simba.desparsify(model)
    return [first.logits[:, -1], turn.logits, batch.logits[:, -1]], tokens


@pytest.mark.parametrize("family", list(CONFIGS))
def test_as_with_sdpa(family, calls):
    with in_float64():
        model = tiny(family, next(iter(CONFIGS[family])))
        expected, tokens = answers(model, "sdpa")
        assert calls == {"flash": 0, "varlen": 0}
        found, chosen = answers(model, "flash_attention_2")
    assert calls["flash"] > 0 and calls["varlen"] > 0  # without and with padding
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
    assert torch.equal(chosen, tokens)
