"""Look into a sparsified model: its status, what a forward pass kept, and what it costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from simba.checks import LARGEST, whole
from simba.config import SimbaConfig
from simba.errors import ConfigError, InputError, NotSparsifiedError
from simba.fates import Drop
from simba.models import find_adapter, unwrap
from simba.models.chunks import chunk_lengths
from simba.models.graphs import GraphStatus
from simba.models.plan import in_sequence, projects_only_survivors
from simba.models.state import Recorder
from simba.ops import Choice, choose
from simba.presets import PRESETS, PURPOSES
from simba.schedules import CUT, Curve, PruneAt, keep_counts
from simba.verbs import find_state

# --- record ---------------------------------------------------------------------------------------


@dataclass
class Recording(Recorder):
    """What the last forward pass over a prompt did; see :func:`record`. Empty before the first."""

    positions: list[Tensor] = field(default_factory=list)
    """``positions[l]`` (B, K_l) int64: the columns of the input that layer l processed, in
    ascending order; -1 is padding."""
    scores: list[Tensor] = field(default_factory=list)
    """``scores[l]`` (B, K_l): the criterion's score of each of these tokens, in the criterion's own
    units and dtype (for ``influence``, equation 4 in float64). Padding, tokens behind the prompt
    and all tokens of a layer that can't score (in hybrids) have NaN."""

    def start(self, num_layers: int) -> None:
        self.positions, self.scores = [], []

    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        # With gradient checkpointing, a layer runs again in the backward pass and writes the same.
        self.positions[layer_idx : layer_idx + 1] = [positions]
        self.scores[layer_idx : layer_idx + 1] = [scores]


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record which tokens each layer processed, and why: ``with simba.record(model) as run: ...``.

    ``run`` holds the last forward pass over a prompt. In `generate` that is the prefill; the single
    tokens after it are not recorded. While recording, every layer scores its tokens: also the last
    one, and also with ``final_keep=1.0``, where the logits stay those of the dense model, bit for
    bit. Only the thread (or asyncio task) that entered the block is recorded.

    Yields:
        The :class:`Recording`.

    Raises:
        NotSparsifiedError: the model is not sparsified. (To record a dense model, sparsify it with
            ``final_keep=1.0``.)
    """
    state = find_state(model)
    if state is None:
        raise NotSparsifiedError(
            "this model is not sparsified, so there is nothing to record; call "
            "simba.sparsify(model) first, with final_keep=1.0 to record the dense model"
        )
    run = Recording()
    with state.recording.set(run):
        yield run


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Whether and how a model is sparsified; see :func:`status`."""

    sparsified: bool
    family: str
    """The library and the kind of layers."""
    config: SimbaConfig | None
    """None if the model is not sparsified."""
    keep_ratios: tuple[float, ...]
    """The share of the prompt that each layer processes."""
    backend: Choice
    """The backend that runs on the model's device, and the reason."""
    graphs: GraphStatus
    """The CUDA graphs of its prefills, and the reason if there can be none."""


def status(model: nn.Module) -> Status:
    """Whether and how a model is sparsified, and which backend it uses.

    Raises:
        UnsupportedModelError: the model's family is not supported.
    """
    inner = unwrap(model)
    adapter = find_adapter(inner)
    state = find_state(model)
    ratios = [1] * adapter.shape(inner).num_layers if state is None else state.ratios
    requested = "auto" if state is None else state.config.backend
    backend = choose(requested, next(inner.parameters()).device)
    graphs = GraphStatus(obstacle="the model is not sparsified")
    if state is not None:
        graphs = state.graphs.status(state.config, adapter.backbone(inner), state.criterion)
    return Status(
        sparsified=state is not None,
        family=adapter.family,
        config=None if state is None else state.config,
        keep_ratios=tuple(float(ratio) for ratio in ratios),
        backend=backend,
        graphs=graphs,
    )


# --- FLOPs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerFlops:
    """The FLOPs of one layer."""

    layer: int
    keep_ratio: float
    tokens: int
    """The number of tokens per row that it processes in full, including those behind the prompt.
    With ``fate="write"`` or ``"skip"`` all others only write; :attr:`parts` counts them too."""
    parts: Mapping[str, int]
    """FLOPs by part: ``"in_proj"``, ``"scan"``, ..., ``"score"``; in hybrids also ``"attention"``,
    whose cost grows with the square of the tokens, and ``"mlp"`` or ``"experts"``, of which those
    count that a token is routed to."""
    kv_bytes: int = 0
    """Bytes of the keys and values that the layer leaves in the cache; 0 without attention."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one forward pass; see :func:`flops`. Prints as a table.

    A multiply-add counts as 2 FLOPs, an exponential as 1.
    """

    seq_len: int
    prompt_length: int
    layers: tuple[LayerFlops, ...]
    head: int
    """FLOPs of the language modelling head, for the rows of logits that were asked for."""
    dense: int
    """FLOPs of the dense model, including its head."""
    dense_kv_bytes: int = 0
    """Bytes of the keys and values that the dense model leaves in the cache."""

    @property
    def total(self) -> int:
        """FLOPs of all layers and the head."""
        return sum(layer.total for layer in self.layers) + self.head

    @property
    def ratio(self) -> float:
        """FLOPs as a share of the dense model's. Scoring may bring it slightly above 1."""
        return self.total / self.dense

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that all layers leave in the cache."""
        return sum(layer.kv_bytes for layer in self.layers)

    def __str__(self) -> str:
        header = f"{'layer':>5}  {'keep':>6}  {'tokens':>8}  {'GFLOPs':>10}"
        rows = [
            f"{row.layer:>5}  {row.keep_ratio:>6.1%}  {row.tokens:>8}  {row.total / 1e9:>10.3f}"
            for row in self.layers
        ]
        end = [
            f"{'head':>5}  {'':>6}  {'':>8}  {self.head / 1e9:>10.3f}",
            f"total {self.total / 1e9:.3f} GFLOPs of {self.dense / 1e9:.3f} dense: "
            f"{self.ratio:.1%}, limit of the speed-up {1 / self.ratio:.2f}x",
        ]
        if self.dense_kv_bytes:
            header += f"  {'KV MiB':>10}"
            rows = [
                f"{line}  {row.kv_bytes / 2**20:>10.3f}" if row.kv_bytes else line
                for line, row in zip(rows, self.layers, strict=True)
            ]
            share = self.kv_bytes / self.dense_kv_bytes
            end.append(
                f"KV cache {self.kv_bytes / 2**20:.3f} MiB of {self.dense_kv_bytes / 2**20:.3f} "
                f"dense: {share:.1%}"
            )
        return "\n".join([header, *rows, *end])


def flops(
    model: nn.Module,
    seq_len: int,
    *,
    prompt_length: int | None = None,
    logits_to_keep: int = 1,
    batch_size: int = 1,
) -> Flops:
    """Count the FLOPs of one forward pass of the model, as it is configured now.

    Tokens that ``protect`` names by position are counted where they let a budget grow. Those that
    it names by token ids can't be known here.

    Args:
        model: a supported model, sparsified or not.
        seq_len: the number of tokens in each row.
        prompt_length: how many of them are the prompt; by default all.
        logits_to_keep: for how many of the last tokens logits are computed, as in the model's
            forward: 1 as in the prefill of `generate`, or 0 for all survivors.
        batch_size: the number of rows.

    Raises:
        UnsupportedModelError: the model's family is not supported.
        InputError: a length or size is not an integer, or out of range.
    """
    seq_len, batch_size = whole(seq_len, "seq_len"), whole(batch_size, "batch_size")
    logits_to_keep = whole(logits_to_keep, "logits_to_keep", least=0)
    prompt = whole(seq_len if prompt_length is None else prompt_length, "prompt_length")
    if prompt > seq_len:
        raise InputError(f"prompt_length must be between 1 and seq_len={seq_len}, got {prompt}")
    inner = unwrap(model)
    adapter = find_adapter(inner)
    shape = adapter.shape(inner)
    costs = adapter.costs(inner)
    state = find_state(model)
    answer = seq_len - prompt
    influences, attends = 1, False
    present = [prompt] * shape.num_layers  # where pruned tokens stay in the sequence
    if state is None:
        ratios, by_chunk = [1.0] * shape.num_layers, [[prompt] * shape.num_layers]
    else:
        ratios = [float(ratio) for ratio in state.ratios]
        read = keep_counts(state.ratios, prompt, state.config.min_tokens)[0]  # of a cut: its end
        chunks = chunk_lengths(read, state.config.chunk_size)
        least = _least(state.config, chunks)
        by_chunk = [
            keep_counts(state.ratios_of_read, n, m) for n, m in zip(chunks, least, strict=True)
        ]
        if state.writer_shares is not None:
            present = [
                sum(in_sequence(share, *each) for each in zip(layer, chunks, strict=True))
                for share, layer in zip(
                    state.writer_shares, zip(*by_chunk, strict=True), strict=True
                )
            ]
        influences = sum(part.influences for part in state.criterion.parts)
        attends = "attention" in state.criterion.reads
    counts = [sum(layer) for layer in zip(*by_chunk, strict=True)]
    has_head = inner is not adapter.backbone(inner)

    def head(rows: int) -> int:
        computed = rows if logits_to_keep == 0 else min(logits_to_keep, rows)
        return batch_size * computed * 2 * shape.d_model * shape.vocab_size * has_head

    def projected(layer: int) -> int:
        """Tokens that go through out_proj in a layer that drops; each chunk is a pass."""
        rows = 0
        for place, kept in enumerate(by_chunk, start=1):
            behind = answer if place == len(by_chunk) else 0
            tokens, passed_on = (n + behind for n in kept[layer : layer + 2])
            rows += passed_on if projects_only_survivors(tokens, passed_on) else tokens
        return rows

    fate = Drop() if state is None else state.config.fate
    layers = []
    for layer, (ratio, kept, cost) in enumerate(zip(ratios, counts, costs, strict=True)):
        tokens, score = kept + answer, influences * cost.score
        if attends and cost.attention_score:
            score = cost.attention_score
        parts = {part: batch_size * tokens * flops for part, flops in cost.per_token.items()}
        last = layer + 1 == shape.num_layers
        passed_on = kept if last else counts[layer + 1]
        if fate.in_sequence_at(layer, shape.num_layers):  # all in the sequence are scored
            there = present[layer]
            for part in parts:
                parts[part] += batch_size * (there - kept) * cost.writing[part]
            chooses = not last and passed_on < (prompt if fate.may_return else kept)
            parts["score"] = batch_size * there * score * chooses
        else:
            parts["score"] = batch_size * kept * score * (passed_on < kept)
            if cost.projects_only_survivors and not last:
                parts["out_proj"] = batch_size * projected(layer) * cost.per_token["out_proj"]
        if cost.pair:
            parts["attention"] += batch_size * _pairs(tokens) * cost.pair
        kv_bytes = batch_size * tokens * cost.kv_bytes
        layers.append(LayerFlops(layer, ratio, tokens, parts, kv_bytes))
    dense = sum(
        batch_size * (seq_len * sum(cost.per_token.values()) + _pairs(seq_len) * cost.pair)
        for cost in costs
    )
    return Flops(
        seq_len,
        prompt,
        tuple(layers),
        head(counts[-1] + answer),
        dense + head(seq_len),
        dense_kv_bytes=batch_size * seq_len * sum(cost.kv_bytes for cost in costs),
    )


def _pairs(tokens: int) -> int:
    """Pairs of a token and one that it sees under a causal mask, itself included."""
    return tokens * (tokens + 1) // 2


def _least(config: SimbaConfig, chunks: list[int]) -> list[int]:
    """How many tokens every layer keeps at least, by chunk of the prompt."""
    least, start = [], 0
    for length in chunks:
        end = start + length
        held = set() if config.protect is None else config.protect.positions(end, start)
        least.append(max(config.min_tokens, len(held | {end - 1}) if held else 0))
        start = end
    return least


# --- summary --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A model's status and cost; see :func:`summary`. Prints as a table."""

    status: Status
    flops: Flops
    presets: tuple[str, ...] = tuple(PURPOSES)
    """Names of the presets that work with the model."""

    def __str__(self) -> str:
        config = self.status.config
        if config is None:
            what = "not sparsified"
        else:
            what = f"final_keep={config.final_keep}, "
            cut = config.schedule == CUT
            what += f"schedule={CUT}" if cut else f"criterion={config.criterion}"
            if not isinstance(config.fate, Drop):
                what += f", fate={config.fate}"
            if isinstance(config.schedule, (PruneAt, Curve)):
                what += f", schedule={config.schedule}"
            prompt = min(self.flops.prompt_length, config.chunk_size or LARGEST)
            least = config.min_tokens
            if least > 1 and any(row.keep_ratio * prompt < least for row in self.flops.layers):
                what += f"; every layer keeps {least} tokens at least (min_tokens)"
            if config.protect is not None:
                what += f"; every layer keeps {config.protect}, also beyond its budget"
        presets = "; ".join(f"{name!r}: {PURPOSES[name]}" for name in self.presets)
        return (
            f"{self.status.family}: {what}\n"
            f"backend {self.status.backend.backend} ({self.status.backend.reason}), "
            f"a prompt of {self.flops.prompt_length} tokens\n{self.flops}\n"
            f"sparsify(model, preset=...): {presets}"
        )


def summary(model: nn.Module, seq_len: int) -> Summary:
    """Summarize what happens to a prompt: ``print(simba.summary(model, 2048))``.

    The table has the keep ratio, the tokens and the FLOPs of every layer, and compares the total
    with the dense model's.

    Args:
        model: a supported model, sparsified or not.
        seq_len: the number of tokens in the prompt.

    Raises:
        UnsupportedModelError: the model's family is not supported.
        InputError: ``seq_len`` is not an integer of at least 1.
    """
    inner = unwrap(model)
    adapter, presets = find_adapter(inner), []
    for name in PURPOSES:
        with contextlib.suppress(ConfigError):
            adapter.check_config(inner, SimbaConfig(**PRESETS[name]))
            presets.append(name)
    return Summary(status(model), flops(model, seq_len), tuple(presets))
