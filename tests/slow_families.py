"""The families other than Mamba-1, written once more, independently of simba: one token at a time, in
float64, straight from the formulas. The pruning around them is the same for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slow_reference import SlowRun, influence_scores, reduce_scores, rms_norm, silu, softplus


class Layer(NamedTuple):
    outputs: list[Tensor]  # of the mixer, one a token, (d_model,)
    influences: Tensor  # (prompt, d_inner), on the output at the last prompt token
    conv_state: Tensor  # (channels, width)
    state: Tensor  # as the cache holds it


def get(parameter: Tensor | None) -> Tensor:
    return torch.zeros(()).double() if parameter is None else parameter.detach().double()


Past = tuple[Tensor, Tensor]  # convolution state (channels, width) and state, as in Layer


def nothing(mixer, *shape: int) -> Past:
    channels, _, width = mixer.conv1d.weight.shape
    zeros = lambda *sizes: torch.zeros(sizes, dtype=torch.float64)  # noqa: E731
    return zeros(channels, width), zeros(*shape)


def convolve(mixer, raw: list[Tensor], before: Tensor) -> list[Tensor]:
    weight, bias = get(mixer.conv1d.weight)[:, 0], get(mixer.conv1d.bias)
    width = weight.shape[1]
    out = []
    for t in range(len(raw)):
        acc = bias + torch.zeros(weight.shape[0], dtype=torch.float64)
        for lag in range(width):
            earlier = raw[t - lag] if t >= lag else before[:, t - lag]
            acc = acc + weight[:, width - 1 - lag] * earlier
        out.append(silu(acc))
    return out


def last(raw: list[Tensor], before: Tensor) -> Tensor:
    return torch.cat([before, torch.stack(raw, 1)], 1)[:, -before.shape[1] :]


def falcon_layer(
    mixer, hidden: list[Tensor], prompt: int, bias_in_decay: bool, past: Past | None
) -> Layer:
    config = mixer.config
    W_in, W_x, W_dt, W_out = (
        get(m.weight) for m in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    )
    dt_bias, D = get(mixer.dt_proj.bias), get(mixer.D)
    A = -torch.exp(mixer.A_log.detach().float()).double()  # as transformers rounds it
    d_inner, d_state = A.shape
    rank, eps = W_dt.shape[1], config.mixer_rms_eps
    projected = [W_in @ h + get(mixer.in_proj.bias) for h in hidden]
    raw = [p[:d_inner] for p in projected]
    before, state = nothing(mixer, d_inner, d_state) if past is None else past
    xs = convolve(mixer, raw, before)
    ones = torch.ones((), dtype=torch.float64)
    dts, Bs, Cs = [], [], []
    for x in xs:
        p = W_x @ x
        dts.append(W_dt @ rms_norm(p[:rank], ones, eps))
        Bs.append(rms_norm(p[rank : rank + d_state], ones, eps))
        Cs.append(rms_norm(p[rank + d_state :], ones, eps))
    outputs = []
    for t, x in enumerate(xs):
        step = softplus(dts[t] + dt_bias)
        state = torch.exp(A * step[:, None]) * state + (step * x)[:, None] * Bs[t][None, :]
        y = (state * Cs[t][None, :]).sum(1) + D * x
        outputs.append(W_out @ (y * silu(projected[t][d_inner:])) + get(mixer.out_proj.bias))
    x, dt, B, C = (torch.stack(values[:prompt]) for values in (xs, dts, Bs, Cs))
    influences = influence_scores(x, dt, A, B, C, dt_bias, bias_in_decay)
    return Layer(outputs, influences, last(raw, before), state)


def mamba2_step(mixer, dt: Tensor, bias: Tensor | float) -> Tensor:
    return softplus(dt + bias).clamp(*mixer.time_step_limit)


def mamba2_layer(
    mixer, hidden: list[Tensor], prompt: int, bias_in_decay: bool, past: Past | None
) -> Layer:
    W_in, W_out = get(mixer.in_proj.weight), get(mixer.out_proj.weight)
    A = -torch.exp(mixer.A_log.detach().float()).double()  # as transformers rounds it
    D, dt_bias = get(mixer.D), get(mixer.dt_bias)
    heads, width, groups = mixer.num_heads, mixer.head_dim, mixer.n_groups
    d_state, d_inner = mixer.ssm_state_size, heads * width
    projected = [W_in @ h + get(mixer.in_proj.bias) for h in hidden]
    raw = [p[d_inner:-heads] for p in projected]
    group_of = [h * groups // heads for h in range(heads)]
    before, state = nothing(mixer, heads, width, d_state) if past is None else past
    xs, Bs, Cs, dts = [], [], [], []
    for p, out in zip(projected, convolve(mixer, raw, before), strict=True):
        xs.append(out[:d_inner].view(heads, width))
        B, C = out[d_inner:].view(2, groups, d_state)
        Bs.append(B[group_of])  # (heads, d_state)
        Cs.append(C[group_of])
        dts.append(p[-heads:])

    outputs = []
    for t, x in enumerate(xs):
        step = mamba2_step(mixer, dts[t], dt_bias)
        state = torch.exp(A * step)[:, None, None] * state
        state = state + step[:, None, None] * x[:, :, None] * Bs[t][:, None, :]
        y = (state * Cs[t][:, None, :]).sum(2) + D[:, None] * x
        y = y.flatten() * silu(projected[t][:d_inner])
        size = getattr(mixer.norm, "group_size", d_inner)  # transformers 5.17 has one group
        weight = get(mixer.norm.weight)
        y = torch.cat(
            [
                rms_norm(y[i : i + size], weight[i : i + size], mixer.norm.variance_epsilon)
                for i in range(0, d_inner, size)
            ]
        )
        outputs.append(W_out @ y + get(mixer.out_proj.bias))

    influences = torch.zeros(prompt, heads, width, dtype=torch.float64)
    for t in range(prompt):
        step = mamba2_step(mixer, dts[t], dt_bias)
        contribution = step[:, None, None] * xs[t][:, :, None] * Bs[t][:, None, :]
        for k in range(t + 1, prompt):
            fading = mamba2_step(mixer, dts[k], dt_bias if bias_in_decay else 0.0)
            contribution = torch.exp(A * fading)[:, None, None] * contribution
        influences[t] = (contribution * Cs[prompt - 1][:, None, :]).sum(2)
    return Layer(outputs, influences.flatten(1), last(raw, before), state)


LAYERS = {"falcon_mamba": falcon_layer, "mamba2": mamba2_layer}


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
    """One row: layer l processes the best ``keep[l]`` prompt tokens and all behind the prompt. It
    starts from the states of ``past``, if there is one."""
    config, backbone = model.config, model.backbone
    embeddings = get(backbone.embeddings.weight)
    hidden = [embeddings[token] for token in input_ids]
    columns = list(range(len(input_ids)))
    run = SlowRun(torch.empty(0), [], [])
    for layer, block in enumerate(backbone.layers):
        run.positions.append(list(columns))
        prompt = sum(column < prompt_length for column in columns)
        normed = [rms_norm(h, get(block.norm.weight), config.layer_norm_epsilon) for h in hidden]
        before = None if past is None else (past.conv_states[layer], past.ssm_states[layer])
        result = LAYERS[config.model_type](block.mixer, normed, prompt, bias_in_decay, before)
        run.conv_states.append(result.conv_state)
        run.ssm_states.append(result.state)
        scores = reduce_scores(result.influences, reduce).tolist()
        run.scores.append(scores)
        hidden = [h + out for h, out in zip(hidden, result.outputs, strict=True)]
        if layer + 1 < len(keep) and keep[layer + 1] < prompt:
            held = [t for t in range(prompt - 1) if columns[t] in protected]
            others = [t for t in range(prompt - 1) if columns[t] not in protected]
            others = sorted(others, key=lambda t: (scores[t], t), reverse=True)
            places = keep[layer + 1] - 1 - len(held)
            best = [*sorted(held + others[:places]), prompt - 1]
            stay = best + list(range(prompt, len(hidden)))
            hidden = [hidden[t] for t in stay]
            columns = [columns[t] for t in stay]
    head, final = get(model.lm_head.weight), get(backbone.norm_f.weight)
    run.logits = torch.stack([head @ rms_norm(h, final, config.layer_norm_epsilon) for h in hidden])
    run.positions.append(columns)
    return run
