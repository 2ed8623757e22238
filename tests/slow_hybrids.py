"""Hybrids of state-space layers and attention, and their pruning, written once more, independently of
simba: one row at a time, no padding, in float64, straight from the formulas. It reads a transformers
model's weights and its configuration, nothing else of it. Slow and plain; the tests' judge.

    keep = slow_keep(model, ratios, len(prompt))  # tokens by layer, held where a layer can't score
    run = slow_hybrid(model, prompt, keep)  # logits of the survivors, survivors and states by layer
    more = slow_hybrid(model, answer, past=run)  # goes on from there; nothing is pruned
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from slow_reference import reduce_scores, silu, softplus


@dataclass
class Memory:
    """What a layer leaves for the tokens behind."""

    conv: Tensor | None = None  # (channels, width), the convolution's last inputs
    state: Tensor | None = None  # (d_inner, d_state); Mamba-2's channels are heads x head_dim
    keys: Tensor | None = None  # (kv_heads, tokens, head_dim), rotated
    values: Tensor | None = None


@dataclass
class SlowHybrid:
    seen: int  # positions that are taken, also by tokens that are gone
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # (survivors, vocab)
    positions: list[list[int]] = field(default_factory=list)  # [layer] that it processed
    scores: list[list[float] | None] = field(default_factory=list)  # [layer] of its prompt tokens
    influences: list[Tensor | None] = field(default_factory=list)  # [layer] (prompt, d_inner)
    readouts: list[Tensor | None] = field(default_factory=list)  # [layer] y - D x at the anchor
    attended: list[Tensor | None] = field(default_factory=list)  # [layer] p v, (all keys, channels)
    memory: list[Memory] = field(default_factory=list)  # [layer]
    inputs: list[Tensor] = field(default_factory=list)  # [layer] (tokens, d_model), and the end's


def get(parameter: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if parameter is None else parameter.double()


def linear(module, x: Tensor) -> Tensor:
    return x @ get(module.weight).T + get(module.bias)


def norm(module, x: Tensor, groups: int = 1) -> Tensor:
    """Root-mean-square norm, of each group of channels by itself."""
    grouped = x.unflatten(-1, (groups, -1))
    mean = grouped.pow(2).mean(-1, keepdim=True)
    return get(module.weight) * (grouped / torch.sqrt(mean + module.variance_epsilon)).flatten(-2)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def relu2(x: Tensor) -> Tensor:
    return x.clamp(min=0) ** 2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "relu2": relu2}


class Layer:
    """One layer on one row: what it gets beside the hidden states, and what it leaves."""

    def __init__(self, config: Any, block: Any, index: int, original: Tensor) -> None:
        self.config, self.block, self.index, self.original = config, block, index, original
        self.positions = torch.empty(0)
        self.prompt = 0  # this many tokens are scored, the others behind them are not
        self.bias_in_decay = False
        self.past = Memory()
        self.memory = Memory()
        self.influences: Tensor | None = None
        self.readout: Tensor | None = None
        self.attended: Tensor | None = None  # p_t v_t of the anchor

    # --- State-space layers ---------------------------------------------------------------------

    def convolve(self, conv, raw: Tensor) -> Tensor:
        """out_t = silu(bias + Σ_lag weight[width - 1 - lag] raw_{t - lag}), per channel."""
        weight = get(conv.weight)[:, 0]
        channels, width = weight.shape
        before = self.past.conv
        if before is None:
            before = torch.zeros(channels, width, dtype=torch.float64)
        everything = torch.cat([before.T, raw])
        out = []
        for t in range(len(raw)):
            acc = get(conv.bias) + torch.zeros(channels, dtype=torch.float64)
            for lag in range(width):
                acc = acc + weight[:, width - 1 - lag] * everything[width + t - lag]
            out.append(silu(acc))
        self.memory.conv = everything[-width:].T
        return torch.stack(out)

    def scan(
        self, x: Tensor, step: Tensor, fading: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        """h_t = exp(A Δ_t) h_{t-1} + Δ_t B_t x_t and y_t = C_t h_t + D x_t, channel by channel.

        x, step, fading: (K, d); A: (d, n); B, C: (K, d, n); D: (d,). Beside the state goes what each
        prompt token has put into it (equation 4), which fades with ``fading`` instead of ``step``.
        """
        state = torch.zeros_like(A) if self.past.state is None else self.past.state
        parts = torch.zeros(0, *A.shape, dtype=torch.float64)
        ys = []
        for t in range(len(x)):
            new = step[t][:, None] * B[t] * x[t][:, None]
            state = torch.exp(A * step[t][:, None]) * state + new
            ys.append((C[t] * state).sum(1) + D * x[t])
            if t < self.prompt:
                parts = torch.cat([torch.exp(A * fading[t][:, None]) * parts, new[None]])
            if t == self.prompt - 1:
                self.influences = (C[t] * parts).sum(2)
                self.readout = ys[-1] - D * x[t]
        self.memory.state = state
        return torch.stack(ys)

    def mamba1(self, mixer, hidden: Tensor) -> Tensor:
        """Mamba-1. Jamba norms dt, B and C; Zamba has heads, each with projections of its own."""
        d, rank = mixer.out_proj.in_features, self.config.mamba_dt_rank
        projected = linear(mixer.in_proj, hidden)
        if self.config.model_type == "zamba":
            x, z = projected[:, 0::2], projected[:, 1::2]
            W_x, W_dt, dt_bias = mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias
        else:
            x, z = projected[:, :d], projected[:, d:]
            W_x, W_dt, dt_bias = mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias
        heads = W_x.shape[0] if W_x.dim() == 3 else 1
        W_x, W_dt = (get(weight).view(heads, -1, weight.shape[-1]) for weight in (W_x, W_dt))
        A = -torch.exp(get(mixer.A_log)).reshape(d, -1)
        x = self.convolve(mixer.conv1d, x)
        dts, Bs, Cs = [], [], []
        for head, channels in enumerate(x.chunk(heads, 1)):
            dt, B, C = (channels @ W_x[head].T).split([rank, A.shape[1], A.shape[1]], 1)
            if self.config.model_type == "jamba":
                dt, B = norm(mixer.dt_layernorm, dt), norm(mixer.b_layernorm, B)
                C = norm(mixer.c_layernorm, C)
            dts.append(dt @ W_dt[head].T)
            Bs.append(B[:, None].expand(-1, d // heads, -1))
            Cs.append(C[:, None].expand(-1, d // heads, -1))
        dt = torch.cat(dts, 1)
        step = softplus(dt + get(dt_bias).flatten())
        fading = step if self.bias_in_decay else softplus(dt)
        D = get(mixer.D).flatten()
        y = self.scan(x, step, fading, A, torch.cat(Bs, 1), torch.cat(Cs, 1), D)
        return linear(mixer.out_proj, y * silu(z))

    def mamba2(
        self,
        mixer,
        hidden: Tensor,
        groups: int,
        limit: tuple[float, float],
        scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
    ) -> Tensor:
        """Mamba-2, with the gated norm behind it. ``scales``: of z, x, B, C and dt."""
        heads, d = mixer.A_log.numel(), mixer.out_proj.in_features
        width = d // heads
        n = (mixer.conv1d.weight.shape[0] - d) // (2 * groups)
        of_head = [head * groups // heads for head in range(heads)]
        z, x, B, C, dt = linear(mixer.in_proj, hidden).split(
            [d, d, groups * n, groups * n, heads], -1
        )
        z, x, B, C, dt = (
            value * scale for value, scale in zip((z, x, B, C, dt), scales, strict=True)
        )
        x, B, C = self.convolve(mixer.conv1d, torch.cat([x, B, C], 1)).split(
            [d, groups * n, groups * n], -1
        )
        # heads of a group share B and C, channels of a head share all but x
        B, C = (v.unflatten(1, (groups, n))[:, of_head].repeat_interleave(width, 1) for v in (B, C))
        A = -torch.exp(get(mixer.A_log)).repeat_interleave(width)[:, None].expand(d, n)
        step = softplus(dt + get(mixer.dt_bias)).clamp(*limit)
        fading = step if self.bias_in_decay else softplus(dt).clamp(*limit)
        step, fading = step.repeat_interleave(width, 1), fading.repeat_interleave(width, 1)
        y = self.scan(x, step, fading, A, B, C, get(mixer.D).repeat_interleave(width))
        return linear(mixer.out_proj, self.gated(mixer, y, z, groups))

    def gated(self, mixer, y: Tensor, z: Tensor, groups: int) -> Tensor:
        if self.config.model_type == "falcon_h1":
            if not self.config.mamba_rms_norm:
                return y * silu(z)
            if self.config.mamba_norm_before_gate:
                return norm(mixer.norm, y, groups) * silu(z)
        elif self.config.model_type in ("bamba", "granitemoehybrid"):
            groups = groups if hasattr(mixer.norm, "group_size") else 1  # transformers 5.17: one
        return norm(mixer.norm, y * silu(z), groups)

    # --- Attention ------------------------------------------------------------------------------

    def attention(
        self,
        module,
        x: Tensor,
        scale: float | None = None,
        rotary: int = 0,
        adapters: Sequence[Any] = (None, None, None),
        key_scale: float = 1.0,
    ) -> Tensor:
        """Softmax attention of each token to itself and all before it that are still there.

        ``rotary``: of how many channels of a head, at the original positions.
        """
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = (
            linear(projection, x)
            + (0 if adapter is None else linear(adapter[1], linear(adapter[0], x)))
            for projection, adapter in zip(
                (module.q_proj, module.k_proj, module.v_proj), adapters, strict=True
            )
        )
        q = q.unflatten(1, (heads, -1)).transpose(0, 1)
        k, v = (t.unflatten(1, (kv_heads, -1)).transpose(0, 1) for t in (k * key_scale, v))
        if rotary:
            q, k = self.rotate(q, rotary), self.rotate(k, rotary)
        if self.past.keys is not None and self.past.values is not None:
            k, v = torch.cat([self.past.keys, k], 1), torch.cat([self.past.values, v], 1)
        self.memory.keys, self.memory.values = k, v
        K, tokens = len(x), k.shape[1]
        outs, attended = [], []
        for head in range(heads):
            kv = head * kv_heads // heads
            logits = q[head] @ k[kv].T * (q.shape[2] ** -0.5 if scale is None else scale)
            for t in range(K):
                logits[t, tokens - K + t + 1 :] = -math.inf
            weights = torch.exp(logits - logits.max(1, keepdim=True).values)
            p = weights / weights.sum(1, keepdim=True)
            outs.append(p @ v[kv])
            if self.prompt:
                attended.append(p[self.prompt - 1, :, None] * v[kv])
        self.attended = torch.cat(attended, 1) if attended else None
        return linear(module.o_proj, torch.cat(outs, 1))

    def rotate(self, x: Tensor, width: int) -> Tensor:
        """Channels i and i + width / 2 as a vector in the plane, turned by position θ^(-2 i / width)."""
        theta = float(self.config.rope_parameters["rope_theta"])
        half = width // 2
        turns = theta ** (-2 * torch.arange(half, dtype=torch.float64) / width)
        angles = self.positions.double()[:, None] * turns
        a, b, rest = x[..., :half], x[..., half:width], x[..., width:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

    # --- Layers of tokens ---------------------------------------------------------------------

    def act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.config.hidden_act](x)

    def mlp(self, module, x: Tensor) -> Tensor:
        return linear(
            module.down_proj, self.act(linear(module.gate_proj, x)) * linear(module.up_proj, x)
        )

    def experts(self, module, token: Tensor, chosen: list[int], weights: Tensor) -> Tensor:
        """Gated experts of one token."""
        out = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = (get(module.gate_up_proj)[expert] @ token).chunk(2)
            out = out + weight * (get(module.down_proj)[expert] @ (self.act(gate) * up))
        return out


def bamba_layer(layer: Layer, hidden: Tensor) -> Tensor:
    block, config = layer.block, layer.config
    normed = norm(block.input_layernorm, hidden)
    if hasattr(block, "mamba"):
        mixed = layer.mamba2(block.mamba, normed, config.mamba_n_groups, config.time_step_limit)
    else:
        mixed = layer.attention(block.self_attn, normed, rotary=block.self_attn.head_dim // 2)
    hidden = hidden + mixed
    return hidden + layer.mlp(block.feed_forward, norm(block.pre_ff_layernorm, hidden))


def top(scores: Tensor, count: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:count]


def granite_layer(layer: Layer, hidden: Tensor) -> Tensor:
    block, config = layer.block, layer.config
    normed = norm(block.input_layernorm, hidden)
    if block.mamba is not None:
        mixed = layer.mamba2(block.mamba, normed, config.mamba_n_groups, config.time_step_limit)
    else:
        rope = config.position_embedding_type == "rope"
        width = block.self_attn.head_dim if rope else 0
        mixed = layer.attention(block.self_attn, normed, config.attention_multiplier, width)
    hidden = hidden + config.residual_multiplier * mixed
    normed = norm(block.post_attention_layernorm, hidden)
    mixed = granite_mlp(layer, block.shared_mlp, normed)
    if config.num_local_experts:
        mixed = mixed + granite_experts(layer, block.block_sparse_moe, normed)
    return hidden + config.residual_multiplier * mixed


def granite_mlp(layer: Layer, module, x: Tensor) -> Tensor:
    gate, up = linear(module.input_linear, x).chunk(2, -1)
    return linear(module.output_linear, layer.act(gate) * up)


def granite_experts(layer: Layer, module, x: Tensor) -> Tensor:
    """The best experts, weighted by the softmax among them."""
    outs = []
    for token, logits in zip(x, x @ get(module.router.weight).T, strict=True):
        best = top(logits, layer.config.num_experts_per_tok)
        weights = logits[best].softmax(0)
        outs.append(layer.experts(module.experts, token, best, weights))
    return torch.stack(outs)


def nemotron_layer(layer: Layer, hidden: Tensor) -> Tensor:
    block, config = layer.block, layer.config
    normed = norm(block.norm, hidden)
    kind = config.layers_block_type[layer.index]
    if kind == "linear_attention":
        limit = (config.time_step_min, math.inf)
        return hidden + layer.mamba2(block.mixer, normed, config.n_groups, limit)
    if kind == "full_attention":
        return hidden + layer.attention(block.mixer, normed)
    if kind == "mlp":
        return hidden + nemotron_mlp(block.mixer, normed)
    return hidden + nemotron_experts(config, block.mixer, normed)


def nemotron_mlp(module, x: Tensor) -> Tensor:
    return linear(module.down_proj, relu2(linear(module.up_proj, x)))


def nemotron_experts(config, module, x: Tensor) -> Tensor:
    """The best experts of the best groups, by the sigmoid plus a correction that chooses only."""
    outs = []
    for token in x:
        scores = torch.sigmoid(get(module.gate.weight) @ token)
        choice = scores + get(module.gate.e_score_correction_bias)
        groups = choice.view(config.n_group, -1)
        sums = torch.stack([group.sort(descending=True).values[:2].sum() for group in groups])
        allowed = torch.full_like(groups, -math.inf)
        for group in top(sums, config.topk_group):
            allowed[group] = groups[group]
        best = top(allowed.flatten(), config.num_experts_per_tok)
        weights = scores[best]
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        latent = token if config.moe_latent_size is None else linear(module.fc1_latent_proj, token)
        out = torch.zeros_like(latent)
        for expert, weight in zip(best, config.routed_scaling_factor * weights, strict=True):
            up, down = get(module.experts.up_proj)[expert], get(module.experts.down_proj)[expert]
            out = out + weight * (down @ relu2(up @ latent))
        if config.moe_latent_size is not None:
            out = linear(module.fc2_latent_proj, out)
        outs.append(out)
    return torch.stack(outs) + nemotron_mlp(module.shared_experts, x)


def jamba_layer(layer: Layer, hidden: Tensor) -> Tensor:
    block, config = layer.block, layer.config
    normed = norm(block.input_layernorm, hidden)
    if hasattr(block, "mamba"):
        mixed = layer.mamba1(block.mamba, normed)
    else:
        mixed = layer.attention(block.self_attn, normed)
    hidden = hidden + mixed
    normed, module = norm(block.pre_ff_layernorm, hidden), block.feed_forward
    if config.layers_num_experts[layer.index] == 1:
        return hidden + layer.mlp(module, normed)
    outs = []  # the best experts, weighted by the softmax over all
    for token, logits in zip(normed, normed @ get(module.router.weight).T, strict=True):
        best = top(logits, config.num_experts_per_tok)
        outs.append(layer.experts(module.experts, token, best, logits.softmax(0)[best]))
    return hidden + torch.stack(outs)


def zamba_layer(layer: Layer, hidden: Tensor) -> Tensor:
    """The shared transformer's output is added to what the Mamba layer reads, not to the residual."""
    block, config = layer.block, layer.config
    read = hidden
    if hasattr(block, "mamba_decoder"):
        first = config.model_type == "zamba"
        shared = block.shared_transf if first else block.shared_transformer
        both = norm(shared.input_layernorm, torch.cat([hidden, layer.original], 1))
        attend, scale = shared.self_attn, (shared.self_attn.head_dim / 2) ** -0.5
        if first:
            out = layer.attention(attend, both, scale)
            out = layer.mlp(shared.feed_forward, norm(shared.pre_ff_layernorm, out))
        else:
            turn = config.hybrid_layer_ids.index(layer.index)
            adapters = (None, None, None)
            if config.use_shared_attention_adapter:
                adapters = (
                    attend.linear_q_adapter_list[turn],
                    attend.linear_k_adapter_list[turn],
                    attend.linear_v_adapter_list[turn],
                )
            rotary = attend.head_dim if config.use_mem_rope else 0
            out = layer.attention(attend, both, scale, rotary, adapters)
            out = zamba2_mlp(layer, shared.feed_forward, norm(shared.pre_ff_layernorm, out), turn)
        read = hidden + linear(block.linear, out)
        block = block.mamba_decoder
    read = norm(block.input_layernorm, read)
    if config.model_type == "zamba":
        return hidden + layer.mamba1(block.mamba, read)
    limit = (config.time_step_min, math.inf)
    return hidden + layer.mamba2(block.mamba, read, config.mamba_ngroups, limit)


def zamba2_mlp(layer: Layer, module, x: Tensor, turn: int) -> Tensor:
    down, up = module.gate_up_proj_adapter_list[turn]
    gate, value = (linear(module.gate_up_proj, x) + linear(up, linear(down, x))).chunk(2, -1)
    return linear(module.down_proj, layer.act(gate) * value)


def falcon_h1_layer(layer: Layer, hidden: Tensor) -> Tensor:
    block, config = layer.block, layer.config
    normed = norm(block.input_layernorm, hidden)
    mixed = config.ssm_out_multiplier * layer.mamba2(
        block.mamba,
        config.ssm_in_multiplier * normed,
        config.mamba_n_groups,
        config.time_step_limit,
        config.ssm_multipliers,
    )
    attended = layer.attention(
        block.self_attn,
        config.attention_in_multiplier * normed,
        rotary=block.self_attn.head_dim,
        key_scale=config.key_multiplier,
    )
    hidden = hidden + mixed + config.attention_out_multiplier * attended
    normed, mlp = norm(block.pre_ff_layernorm, hidden), block.feed_forward
    gate_scale, down_scale = config.mlp_multipliers
    gate = layer.act(gate_scale * linear(mlp.gate_proj, normed))
    return hidden + down_scale * linear(mlp.down_proj, gate * linear(mlp.up_proj, normed))


FAMILIES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "bamba": bamba_layer,
    "granitemoehybrid": granite_layer,
    "nemotron_h": nemotron_layer,
    "jamba": jamba_layer,
    "zamba2": zamba_layer,
    "falcon_h1": falcon_h1_layer,
    "zamba": zamba_layer,
}


# --- The model, and pruning between its layers ------------------------------------------------------


def mixers(model) -> list[Any]:
    """The state-space mixer of each layer, None where there is none: such a layer can't score."""
    blocks = [getattr(block, "mamba_decoder", block) for block in model.model.layers]
    found = [getattr(block, "mamba", getattr(block, "mixer", None)) for block in blocks]
    return [mixer if hasattr(mixer, "A_log") else None for mixer in found]


def attends(model) -> list[bool]:
    """Which layers have attention."""
    names = ("self_attn", "shared_transf", "shared_transformer")
    return [
        any(hasattr(block, name) for name in names if getattr(block, name, None) is not None)
        or hasattr(getattr(block, "mixer", None), "q_proj")
        for block in model.model.layers
    ]


def slow_keep(
    model,
    ratios: Sequence[float | Fraction],
    prompt: int,
    min_tokens: int = 1,
    *,
    by_attention: bool = False,
) -> list[int]:
    """How many prompt tokens each layer processes: its ratio of them, rounded half to even.

    Behind a layer that can't score nothing is pruned, so the next layer holds what that one had.
    Behind the last that can, the ratio is the last one, so that the end of the schedule is reached.
    """
    exact = [ratio if isinstance(ratio, Fraction) else Fraction(repr(ratio)) for ratio in ratios]
    counts = [max(round(ratio * prompt), min(min_tokens, prompt), 1) for ratio in exact]
    scoring = [
        index
        for index, (mixer, attention) in enumerate(zip(mixers(model), attends(model), strict=True))
        if (mixer is not None or (by_attention and attention)) and index + 1 < len(counts)
    ]
    held = counts[:1]
    for layer in range(len(counts) - 1):
        if layer not in scoring:
            held.append(held[-1])
        else:
            held.append(counts[-1] if layer == scoring[-1] else counts[layer + 1])
    return held


def linear_ratios(final_keep: Fraction | float, layers: int) -> list[Fraction]:
    final = final_keep if isinstance(final_keep, Fraction) else Fraction(repr(final_keep))
    return [1 - (1 - final) * layer / (layers - 1) for layer in range(layers)]


@torch.no_grad()
def slow_hybrid(*args: Any, **options: Any) -> SlowHybrid:
    """:func:`differentiable_hybrid` without the gradients, which take time."""
    return differentiable_hybrid(*args, **options)


def differentiable_hybrid(
    model,
    input_ids: Sequence[int],
    keep: Sequence[int] | None = None,
    prompt_length: int | None = None,
    *,
    reduce: str = "max",
    bias_in_decay: bool = False,
    past: SlowHybrid | None = None,
    protected: frozenset[int] | set[int] = frozenset(),
    by_attention: bool = False,
) -> SlowHybrid:
    """One row: layer l processes the best ``keep[l]`` prompt tokens and everything behind the prompt.

    The prompt is all of ``input_ids``, or its first ``prompt_length``. The row starts from what
    ``past`` left, if there is one, and at the position behind it. Columns in ``protected`` are always
    among the best. Without ``keep`` nothing is pruned. ``by_attention``: layers with attention score by
    what their attention adds to the anchor.
    """
    config, backbone = model.config, model.model
    prompt_length = len(input_ids) if prompt_length is None else prompt_length
    seen = 0 if past is None else past.seen
    run = SlowHybrid(seen + len(input_ids))
    embeddings = backbone.get_input_embeddings()
    hidden = get(embeddings.weight)[list(input_ids)] * getattr(config, "embedding_multiplier", 1.0)
    original = hidden
    columns = list(range(len(input_ids)))
    for index, block in enumerate(backbone.layers):
        layer = Layer(config, block, index, original)
        layer.positions = torch.tensor(columns) + seen
        layer.prompt = sum(column < prompt_length for column in columns)
        layer.bias_in_decay = bias_in_decay
        layer.past = Memory() if past is None else past.memory[index]
        run.inputs.append(hidden)
        hidden = FAMILIES[config.model_type](layer, hidden)
        run.positions.append([seen + column for column in columns])
        run.memory.append(layer.memory)
        run.influences.append(layer.influences)
        run.readouts.append(layer.readout)
        scores = None
        run.attended.append(layer.attended)
        if by_attention and layer.attended is not None:
            own = layer.attended[-len(columns) :][: layer.prompt]  # behind the keys of the past
            scores = reduce_scores(own, reduce).tolist()
        elif layer.influences is not None:
            scores = reduce_scores(layer.influences, reduce).tolist()
        run.scores.append(scores)
        after = layer.prompt if keep is None or index + 1 == len(keep) else keep[index + 1]
        if after < layer.prompt:
            stay = survivors(layer, scores, after, [c in protected for c in columns], len(columns))
            hidden, original = hidden[stay], original[stay]
            columns = [columns[t] for t in stay]
    run.inputs.append(hidden)
    final = next(
        getattr(backbone, name)
        for name in ("final_layernorm", "norm_f", "norm")
        if hasattr(backbone, name)
    )
    logits = norm(final, hidden) @ get(model.lm_head.weight).T
    run.logits = logits * getattr(config, "lm_head_multiplier", 1.0)
    run.logits = run.logits / getattr(config, "logits_scaling", 1.0)
    return run


def survivors(
    layer: Layer, scores: list[float] | None, keep: int, protected: list[bool], tokens: int
) -> list[int]:
    """The prompt's last token, protected ones, the best others (of equals the last), and all behind."""
    assert scores is not None, f"layer {layer.index} has no scores to prune by"
    last = layer.prompt - 1
    held = [t for t in range(last) if protected[t]]
    others = [t for t in range(last) if not protected[t]]
    others = sorted(others, key=lambda t: (scores[t], t), reverse=True)
    best = others[: max(keep - 1 - len(held), 0)]
    return [*sorted(held + best), last, *range(layer.prompt, tokens)]


# --- Generation -------------------------------------------------------------------------------------


def slow_greedy(
    model,
    prompt: Sequence[int],
    keep: Sequence[int] | None,
    new_tokens: int,
    past: SlowHybrid | None = None,
    **options: Any,
) -> tuple[list[int], list[Tensor], SlowHybrid]:
    """The best token again and again: the tokens, the logits (vocab,) before each, and what all but
    the last of them left behind."""
    run = slow_hybrid(model, prompt, keep, past=past, **options)
    tokens, logits = [], []
    while True:
        logits.append(run.logits[-1])
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == new_tokens:
            return tokens, logits, run
        run = slow_hybrid(model, tokens[-1:], past=run)


def slow_beams(
    model, prompt: Sequence[int], keep: Sequence[int] | None, new_tokens: int, beams: int
) -> tuple[list[int], float]:
    """Beam search without an end token: the best tokens, and the mean of their log-probabilities."""
    run = slow_hybrid(model, prompt, keep)
    candidates: list[tuple[float, list[int], SlowHybrid]] = [(0.0, [], run)]
    while True:
        longer = []
        for total, tokens, run in candidates:
            log_p = run.logits[-1].log_softmax(0)
            longer += [(total + float(p), [*tokens, t], run) for t, p in enumerate(log_p)]
        longer = sorted(longer, key=lambda each: each[0], reverse=True)[:beams]
        if len(longer[0][1]) == new_tokens:
            return longer[0][1], longer[0][0] / new_tokens
        candidates = [
            (total, tokens, slow_hybrid(model, tokens[-1:], past=run))
            for total, tokens, run in longer
        ]
