"""Mamba-1 and its pruning once more, written independently of simba: one token, one channel group at
a time, in float64, straight from the formulas. Slow and plain; the tests' judge."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SlowRun:
    logits: Tensor  # (K, vocab)
    positions: list[list[int]]  # [layer] columns that it processed
    scores: list[list[float]]  # [layer] of each processed prompt token
    conv_states: list[Tensor] = field(default_factory=list)  # [layer] (d_inner, width)
    ssm_states: list[Tensor] = field(default_factory=list)  # [layer] (d_inner, d_state)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def influence_scores(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, bias_in_decay: bool
) -> Tensor:
    """(K, d_inner): what each token adds to each channel of the output at the last one; equation 4
    term by term, multiplying the decays one after the other."""
    K = x.shape[0]
    step = softplus(dt + dt_bias)
    fading = step if bias_in_decay else softplus(dt)
    result = torch.zeros_like(x)
    for t in range(K):
        contribution = step[t][:, None] * B[t][None, :] * x[t][:, None]  # B̄_t x_t
        for k in range(t + 1, K):
            contribution = torch.exp(A * fading[k][:, None]) * contribution  # Ā_k ...
        result[t] = (contribution * C[K - 1][None, :]).sum(1)  # C_T ...
    return result


def reduce_scores(influences: Tensor, reduce: str) -> Tensor:
    if reduce == "max":
        return influences.max(dim=1).values
    if reduce == "absmax":
        return influences.abs().max(dim=1).values
    return influences.pow(2).sum(1).sqrt()


@torch.no_grad()
def slow_forward(
    model,
    input_ids: list[int],
    keep: list[int],
    prompt_length: int,
    *,
    reduce: str = "max",
    bias_in_decay: bool = False,
    past: SlowRun | None = None,
    protected: frozenset[int] | set[int] = frozenset(),
) -> SlowRun:
    """One row through a transformers Mamba: layer l processes the best ``keep[l]`` prompt tokens
    and everything behind the prompt. It starts from the states of ``past``, if there is one. Columns in
    ``protected`` are always among the best."""
    config = model.config
    backbone = model.backbone
    get = lambda p: p.detach().double()  # noqa: E731
    embeddings = get(backbone.embeddings.weight)
    hidden = [embeddings[token] for token in input_ids]
    columns = list(range(len(input_ids)))
    run = SlowRun(torch.empty(0), [], [])
    for layer, block in enumerate(backbone.layers):
        mixer = block.mixer
        W_in, W_x, W_dt, W_out = (
            get(m.weight) for m in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
        )
        conv_w, conv_b = get(mixer.conv1d.weight)[:, 0], get(mixer.conv1d.bias)
        dt_bias, D = get(mixer.dt_proj.bias), get(mixer.D)
        A = -torch.exp(mixer.A_log.detach().float()).double()  # as transformers rounds it
        d_inner, d_state = A.shape
        rank, width = W_dt.shape[1], conv_w.shape[1]

        run.positions.append(list(columns))
        raw, gates = [], []
        for h in hidden:
            normed = rms_norm(h, get(block.norm.weight), config.layer_norm_epsilon)
            projected = W_in @ normed
            raw.append(projected[:d_inner])
            gates.append(projected[d_inner:])
        nothing = torch.zeros(d_inner, width, dtype=torch.float64)
        before = nothing if past is None else past.conv_states[layer]
        xs, dts, Bs, Cs = [], [], [], []
        for t in range(len(hidden)):
            acc = conv_b.clone()
            for lag in range(width):
                acc += conv_w[:, width - 1 - lag] * (
                    raw[t - lag] if t >= lag else before[:, t - lag]
                )
            x = silu(acc)
            projected = W_x @ x
            xs.append(x)
            dts.append(W_dt @ projected[:rank])
            Bs.append(projected[rank : rank + d_state])
            Cs.append(projected[rank + d_state :])
        state = torch.zeros(d_inner, d_state, dtype=torch.float64)
        if past is not None:
            state = past.ssm_states[layer]
        outputs = []
        for t in range(len(hidden)):
            step = softplus(dts[t] + dt_bias)
            state = torch.exp(A * step[:, None]) * state
            state = state + (step * xs[t])[:, None] * Bs[t][None, :]
            y = (state * Cs[t][None, :]).sum(1) + D * xs[t]
            outputs.append(hidden[t] + W_out @ (y * silu(gates[t])))
        run.conv_states.append(torch.cat([before, torch.stack(raw, 1)], 1)[:, -width:])
        run.ssm_states.append(state)

        prompt = sum(column < prompt_length for column in columns)
        stacked = [torch.stack(values[:prompt]) for values in (xs, dts, Bs, Cs)]
        scores = reduce_scores(
            influence_scores(
                stacked[0], stacked[1], A, stacked[2], stacked[3], dt_bias, bias_in_decay
            ),
            reduce,
        ).tolist()
        run.scores.append(scores)
        hidden = outputs
        if layer + 1 < len(keep) and keep[layer + 1] < prompt:
            held = [t for t in range(prompt - 1) if columns[t] in protected]
            others = [t for t in range(prompt - 1) if columns[t] not in protected]
            others = sorted(others, key=lambda t: (scores[t], t), reverse=True)
            places = keep[layer + 1] - 1 - len(held)
            best = [*sorted(held + others[:places]), prompt - 1]
            stay = best + list(range(prompt, len(hidden)))
            hidden = [hidden[t] for t in stay]
            columns = [columns[t] for t in stay]
    head = get(model.lm_head.weight)
    final = get(backbone.norm_f.weight)
    run.logits = torch.stack([head @ rms_norm(h, final, config.layer_norm_epsilon) for h in hidden])
    run.positions.append(columns)
    return run
