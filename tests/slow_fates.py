"""What becomes of pruned tokens, written independently of simba: one token after the other, in float64,
through a cell for each layer that a token may write to without reading it."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from slow_reference import SlowRun, reduce_scores, rms_norm, silu, softplus


def get(parameter: Tensor | None) -> Tensor:
    return (
        torch.zeros((), dtype=torch.float64) if parameter is None else parameter.detach().double()
    )


class Cell:
    """A layer's convolution window and state. What each token has left in the state is also kept on
    its own, fading with every token that comes, as the score fades it."""

    def __init__(self, mixer, bias_in_decay: bool, past: tuple[Tensor, Tensor] | None) -> None:
        self.mixer, self.bias_in_decay = mixer, bias_in_decay
        self.taps, self.tap_bias = get(mixer.conv1d.weight)[:, 0], get(mixer.conv1d.bias)
        self.A = -torch.exp(mixer.A_log.detach().float()).double()  # as transformers rounds it
        self.W_in, self.b_in = get(mixer.in_proj.weight), get(mixer.in_proj.bias)
        self.W_out, self.b_out = get(mixer.out_proj.weight), get(mixer.out_proj.bias)
        self.window = torch.zeros_like(self.taps)
        self.state: Tensor | float = 0.0
        if past is not None:
            self.window, self.state = past
        self.left: list[Tensor] = []
        self.steps: list[float] = []

    def convolve(self, raw: Tensor) -> Tensor:
        self.window = torch.cat([self.window[:, 1:], raw[:, None]], 1)
        return silu((self.window * self.taps).sum(1) + self.tap_bias)

    def project(self, h: Tensor, rows: slice) -> Tensor:
        return self.W_in[rows] @ h + (self.b_in if self.b_in.dim() == 0 else self.b_in[rows])


class Mamba1Cell(Cell):
    """Also FalconMamba's, which has norms on dt, B and C."""

    def __init__(self, mixer, bias_in_decay, past):
        super().__init__(mixer, bias_in_decay, past)
        self.eps = getattr(mixer.config, "mixer_rms_eps", None) if has_norms(mixer) else None
        self.d_inner, self.d_state = self.A.shape

    def normed(self, x: Tensor) -> Tensor:
        if self.eps is None:
            return x
        return rms_norm(x, torch.ones((), dtype=torch.float64), self.eps)

    def write(self, h: Tensor) -> Tensor:
        x = self.convolve(self.project(h, slice(self.d_inner)))
        W_x, rank = get(self.mixer.x_proj.weight), self.mixer.dt_proj.weight.shape[1]
        dt = get(self.mixer.dt_proj.weight) @ self.normed(W_x[:rank] @ x)
        B = self.normed(W_x[rank : rank + self.d_state] @ x)
        bias = get(self.mixer.dt_proj.bias)
        step = softplus(dt + bias)
        fading = step if self.bias_in_decay else softplus(dt)
        fresh = (step * x)[:, None] * B
        self.steps.append(float(step.norm()))
        self.state = torch.exp(self.A * step[:, None]) * self.state + fresh
        self.left = [torch.exp(self.A * fading[:, None]) * old for old in self.left] + [fresh]
        return x

    def seen(self, contribution: Tensor, x: Tensor) -> Tensor:
        """(d_inner,): a part of the state as the token of the scan input x reads it."""
        C = self.normed(get(self.mixer.x_proj.weight)[-self.d_state :] @ x)
        return (contribution * C).sum(1)

    def read(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.seen(self.state, x) + get(self.mixer.D) * x
        gate = silu(self.project(h, slice(self.d_inner, None)))
        return self.W_out @ (y * gate) + self.b_out

    def influences(self, x: Tensor) -> Tensor:
        return torch.stack([self.seen(contribution, x) for contribution in self.left])


class Mamba2Cell(Cell):
    def __init__(self, mixer, bias_in_decay, past):
        super().__init__(mixer, bias_in_decay, past)
        self.heads, self.head_dim = mixer.num_heads, mixer.head_dim
        self.d_inner, self.d_state = self.heads * self.head_dim, mixer.ssm_state_size
        self.group = [h * mixer.n_groups // self.heads for h in range(self.heads)]

    def write(self, h: Tensor) -> Tensor:
        xBC = self.convolve(self.project(h, slice(self.d_inner, -self.heads)))
        dt = self.project(h, slice(-self.heads, None))
        x, B = xBC[: self.d_inner].view(self.heads, -1), self.by_head(xBC)[0]
        bias = get(self.mixer.dt_bias)
        step, plain = (softplus(d).clamp(*self.mixer.time_step_limit) for d in (dt + bias, dt))
        fading = step if self.bias_in_decay else plain
        fresh = (step[:, None] * x)[:, :, None] * B[:, None]
        fade = lambda by: torch.exp(self.A * by)[:, None, None]  # noqa: E731
        self.steps.append(float(step.norm()))
        self.state = fade(step) * self.state + fresh
        self.left = [fade(fading) * old for old in self.left] + [fresh]
        return xBC

    def by_head(self, xBC: Tensor) -> Tensor:
        return xBC[self.d_inner :].view(2, -1, self.d_state)[:, self.group]

    def seen(self, contribution: Tensor, xBC: Tensor) -> Tensor:
        return (contribution * self.by_head(xBC)[1][:, None]).sum(2).flatten()

    def read(self, h: Tensor, xBC: Tensor) -> Tensor:
        D = get(self.mixer.D).repeat_interleave(self.head_dim)
        y = self.seen(self.state, xBC) + D * xBC[: self.d_inner]
        y = y * silu(self.project(h, slice(self.d_inner)))
        size = getattr(self.mixer.norm, "group_size", self.d_inner)  # one group in 5.17
        weights = get(self.mixer.norm.weight).split(size)
        eps = self.mixer.norm.variance_epsilon
        parts = zip(y.split(size), weights, strict=True)
        return self.W_out @ torch.cat([rms_norm(a, w, eps) for a, w in parts]) + self.b_out

    def influences(self, xBC: Tensor) -> Tensor:
        return torch.stack([self.seen(contribution, xBC) for contribution in self.left])


def has_norms(mixer) -> bool:
    return mixer.config.model_type == "falcon_mamba"


@torch.no_grad()
def slow_forward(
    model,
    input_ids: list[int],
    keep: list[int],
    prompt_length: int,
    fate: str,
    *,
    reduce: str = "max",
    bias_in_decay: bool = False,
    past: SlowRun | None = None,
) -> SlowRun:
    """One row. Layer l reads ``keep[l]`` prompt tokens and all behind the prompt; the others it takes
    in, and leaves them as they are. ``scores`` are those of the tokens that it reads. The fate
    ``"write:0.5"`` is ``"write"`` in the first half of the layers; the others take in what they read.
    Behind each layer of ``"write:1:0.3"`` some tokens are forgotten that it did not read, nor the next
    one will: those with the smallest steps, so that of all these 0.3 are left in the last layer."""
    config, backbone = model.config, model.backbone
    kind = Mamba2Cell if config.model_type == "mamba2" else Mamba1Cell
    residual = [get(backbone.embeddings.weight)[token] for token in input_ids]
    anchor, length = prompt_length - 1, len(input_ids)
    live = list(range(length))
    fate, until, left, power = (*fate.split(":"), *("", "1", "1")[fate.count(":") :])[:4]
    taken_in = round(float(until or 1) * len(backbone.layers))
    first = next((i for i, n in enumerate(keep) if n < prompt_length), len(keep))
    there = list(range(length))
    run = SlowRun(torch.empty(0), [], [])
    for layer, block in enumerate(backbone.layers):
        before = None if past is None else (past.conv_states[layer], past.ssm_states[layer])
        cell = kind(block.mixer, bias_in_decay, before)
        scores: dict[int, float] = {}
        for t in there:
            h = rms_norm(residual[t], get(block.norm.weight), config.layer_norm_epsilon)
            token = cell.write(h)
            if t in live:
                residual[t] = residual[t] + cell.read(h, token)
            if t == anchor:
                found = reduce_scores(cell.influences(token), reduce).tolist()
                scores = dict(zip(there, found, strict=False))
        run.positions.append(live)
        run.scores.append([scores[t] for t in live if t <= anchor])
        run.conv_states.append(cell.window)
        run.ssm_states.append(cell.state)
        if layer + 1 < len(keep):
            among = {"write": live, "skip": range(length)}[fate]
            ranked = sorted(
                (math.inf if t == anchor else scores[t], t) for t in among if t <= anchor
            )
            best = [t for _, t in ranked[-keep[layer + 1] :]]
            live = sorted(best) + list(range(prompt_length, length))
        steps = dict(zip(there, cell.steps, strict=True))
        if fate == "skip" or (float(left) == 1 and layer + 1 < taken_in):
            continue
        number = 0  # of the tokens that only write
        if layer + 1 < taken_in:
            depth = Fraction(max(layer + 2 - first, 0), taken_in - first)
            share = 1 - (1 - Fraction(left)) * depth ** int(power) if depth else 1
            number = round(share * (prompt_length - keep[layer + 1]))
        others = sorted((steps[t], t) for t in there if t not in live)
        there = sorted(live + [t for _, t in others[len(others) - number :]])
    final, head = get(backbone.norm_f.weight), get(model.lm_head.weight)
    eps = config.layer_norm_epsilon
    run.logits = torch.stack([head @ rms_norm(residual[t], final, eps) for t in live])
    return run
