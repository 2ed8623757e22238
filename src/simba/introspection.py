"""Looking at a sparsified model: its status, what a forward pass kept, what it costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from simba.checks import whole
from simba.config import SimbaConfig
from simba.criteria import Influence
from simba.errors import InputError, NotSparsifiedError
from simba.models import find_adapter, unwrap
from simba.models.graphs import GraphStatus
from simba.models.plan import projects_only_survivors
from simba.models.state import Recorder
from simba.ops import Choice, choose
from simba.schedules import keep_counts
from simba.sparsify import find_state

# --- record ---------------------------------------------------------------------------------------


@dataclass
class Recording(Recorder):
    """What the last forward pass over a prompt did; see :func:`record`."""

    positions: list[Tensor] = field(default_factory=list)
    """``positions[l]`` (B, K_l) int64: columns of the input that layer l processed, ascending, -1
    for padding."""
    scores: list[Tensor] = field(default_factory=list)
    """``scores[l]`` (B, K_l): the criterion's score of each of them, in the criterion's own units
    (``influence``: equation 4 in float64); NaN on padding and on tokens behind the prompt."""

    def start(self, num_layers: int) -> None:
        self.positions, self.scores = [], []

    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        # A checkpointed layer runs again in the backward pass: same values, same place.
        self.positions[layer_idx : layer_idx + 1] = [positions]
        self.scores[layer_idx : layer_idx + 1] = [scores]


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """``with simba.record(model) as run: model(...)``: which tokens each layer processed, and why.

    Holds the last forward pass over a prompt (in `generate`: its prefill; later tokens leave it
    alone). While recording, all layers score, also the last, and also under ``final_keep=1.0``,
    whose logits stay those of the dense model bit for bit. Costs nothing when not used. Records
    what the thread (or the task of asyncio) runs that entered it, not what others do meanwhile.

    Raises:
        NotSparsifiedError: sparsify the model first (``final_keep=1.0`` to watch a dense one).
    """
    state = find_state(model)
    if state is None:
        raise NotSparsifiedError(
            "nothing to record: call simba.sparsify(model) first, with final_keep=1.0 to watch "
            "the dense model"
        )
    run = Recording()
    with state.recording.set(run):
        yield run


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """What was done to a model."""

    sparsified: bool
    family: str
    config: SimbaConfig | None
    keep_ratios: tuple[float, ...]
    """Of every layer."""
    backend: Choice
    """What runs on the device where the model is now, and why."""
    graphs: GraphStatus
    """CUDA graphs of its prefills, and why there are none."""


def status(model: nn.Module) -> Status:
    """Whether and how a model is sparsified, and which backend it will take.

    Raises:
        UnsupportedModelError: no adapter for this model.
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
    """One layer's share."""

    layer: int
    keep_ratio: float
    tokens: int
    """Tokens that it processes, those behind the prompt included."""
    parts: Mapping[str, int]
    """FLOPs by part: ``in_proj``, ``scan``, ..., ``score``."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, a multiply-add being 2 and an exponential 1. Prints as a table."""

    seq_len: int
    prompt_length: int
    layers: tuple[LayerFlops, ...]
    head: int
    """The language modelling head, on the rows of logits asked for."""
    dense: int
    """The dense model's total."""

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers) + self.head

    @property
    def ratio(self) -> float:
        """Share of the dense model's FLOPs."""
        return self.total / self.dense

    def __str__(self) -> str:
        header = f"{'layer':>5}  {'keep':>6}  {'tokens':>8}  {'GFLOPs':>10}"
        rows = [
            f"{row.layer:>5}  {row.keep_ratio:>6.1%}  {row.tokens:>8}  {row.total / 1e9:>10.3f}"
            for row in self.layers
        ]
        return "\n".join(
            [
                header,
                *rows,
                f"{'head':>5}  {'':>6}  {'':>8}  {self.head / 1e9:>10.3f}",
                f"total {self.total / 1e9:.3f} GFLOPs of {self.dense / 1e9:.3f} dense: "
                f"{self.ratio:.1%}, limit of the speed-up {1 / self.ratio:.2f}x",
            ]
        )


def flops(
    model: nn.Module,
    seq_len: int,
    *,
    prompt_length: int | None = None,
    logits_to_keep: int = 1,
    batch_size: int = 1,
) -> Flops:
    """FLOPs of one forward pass of ``model`` as it is configured now.

    Args:
        model: sparsified or not.
        seq_len: tokens of each row.
        prompt_length: how many of them are the prompt; None for all.
        logits_to_keep: rows of logits wanted, as in the model's forward: 1 is a prefill of
            `generate`, 0 all that survive.
        batch_size: rows.

    Raises:
        UnsupportedModelError: no adapter for this model.
        InputError: a length or size is no integer, or out of range.
    """
    seq_len, batch_size = whole(seq_len, "seq_len"), whole(batch_size, "batch_size")
    logits_to_keep = whole(logits_to_keep, "logits_to_keep", least=0)
    prompt = whole(seq_len if prompt_length is None else prompt_length, "prompt_length")
    if prompt > seq_len:
        raise InputError(f"prompt_length must be between 1 and seq_len={seq_len}, got {prompt}")
    inner = unwrap(model)
    adapter = find_adapter(inner)
    shape = adapter.shape(inner)
    per_token = dict(adapter.layer_flops(shape))
    score = per_token.pop("score")
    state = find_state(model)
    answer = seq_len - prompt
    if state is None:
        ratios, counts = [1.0] * shape.num_layers, [prompt] * shape.num_layers
    else:
        ratios = [float(ratio) for ratio in state.ratios]
        counts = keep_counts(state.ratios, prompt, state.config.min_tokens)
        if not isinstance(state.criterion, Influence):
            score = 0
    has_head = inner is not adapter.backbone(inner)

    def head(rows: int) -> int:
        wanted = rows if logits_to_keep == 0 else min(logits_to_keep, rows)
        return batch_size * wanted * 2 * shape.d_model * shape.vocab_size * has_head

    layers = []
    for layer, (ratio, kept) in enumerate(zip(ratios, counts, strict=True)):
        tokens = kept + answer
        parts = {part: batch_size * tokens * cost for part, cost in per_token.items()}
        passed_on = counts[min(layer + 1, shape.num_layers - 1)]
        parts["score"] = batch_size * kept * score * (passed_on < kept)
        if projects_only_survivors(tokens, passed_on + answer):
            parts["out_proj"] = batch_size * (passed_on + answer) * per_token["out_proj"]
        layers.append(LayerFlops(layer, ratio, tokens, parts))
    dense = shape.num_layers * batch_size * seq_len * sum(per_token.values()) + head(seq_len)
    return Flops(seq_len, prompt, tuple(layers), head(counts[-1] + answer), dense)


# --- summary --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A model's status and cost; print it."""

    status: Status
    flops: Flops

    def __str__(self) -> str:
        config = self.status.config
        if config is None:
            what = "not sparsified"
        else:
            criterion = getattr(config.criterion, "name", config.criterion)
            what = f"final_keep={config.final_keep}, criterion={criterion}"
        return (
            f"{self.status.family}: {what}\n"
            f"backend {self.status.backend.backend} ({self.status.backend.reason}), "
            f"a prompt of {self.flops.prompt_length} tokens\n{self.flops}"
        )


def summary(model: nn.Module, seq_len: int) -> Summary:
    """What happens to a prompt of ``seq_len`` tokens: ``print(simba.summary(model, 2048))``.

    Layer by layer the keep ratio, tokens and FLOPs, and the total against the dense model.

    Raises:
        UnsupportedModelError: no adapter for this model.
        InputError: ``seq_len`` is no integer of at least 1.
    """
    return Summary(status(model), flops(model, seq_len))
