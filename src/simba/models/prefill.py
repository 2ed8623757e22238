"""A forward pass over a backbone, for every library: its plan, and its CUDA graph.

A backbone reads its arguments, makes a plan with :func:`plan_prompt` or :func:`plan_continuation`,
leaves out what the plan cuts off (:meth:`TokenPlan.cut`), makes a :class:`Pass` with
:meth:`Pass.settle`, and then runs the stock forward
(:attr:`Pass.only_native`), replays a CUDA graph (:func:`replay`), or runs its layers one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from simba.errors import InputError
from simba.models.block import SparseBlock
from simba.models.chunks import PASS_TOKENS, Chunk, cut_into_chunks, share_passes
from simba.models.inputs import read_prompt_length
from simba.models.layer import LayerCall
from simba.models.layer_states import LayerStates, StackedStates
from simba.models.mixer import SparseMixer
from simba.models.norms import Norm, Normed
from simba.models.parameters import log_once
from simba.models.plan import TokenPlan
from simba.models.protected import Protected, find_protected
from simba.models.state import Recorder, SparseState
from simba.models.tiles import Scratch

PromptLength = int | Sequence[int] | Tensor | None
"""The argument ``prompt_length`` of a forward."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass does, settled before it begins."""

    state: SparseState
    plan: TokenPlan
    resumed: bool = False
    """The tokens continue a prompt that is in the cache."""
    native: bool = False
    """The library's own forward computes the output."""
    recorder: Recorder | None = None
    """It gets the tokens and their scores, layer by layer, if anybody records them."""
    valid: set[Hashable] | None = None
    """Graphs that the passes before it found valid, so that this pass need not look again; see
    :meth:`PrefillGraphs.run`."""

    @classmethod
    def settle(
        cls,
        state: SparseState,
        plan: TokenPlan,
        length: int,
        mixers: Iterable[SparseMixer],
        *,
        resumed: bool,
        library: str,
        cut: int | None = None,
    ) -> Pass:
        """The pass over ``length`` columns that a plan asks for, of a model with these mixers.

        ``cut`` is how many columns were cut off in front of them; None if no prompt was cut.
        """
        # the libraries' own forwards continue a cached prompt by one token at a time
        ours = length > 1 if resumed else state.own_dense_path
        if not ours and state.prunes and any(plan.padding):
            mixers = list(mixers)
            ours = any(mixer.projects_padding for mixer in mixers)
        native = not (plan.prunes or ours or _must_follow_modules(state, mixers, library))
        recorder = None if resumed and not plan.prunes and cut is None else state.recorder
        if recorder is not None and cut:
            recorder = ShiftedRecorder(recorder, cut)
        return cls(state, plan, resumed, native, recorder)

    def call(
        self,
        layer_idx: int,
        positions: Tensor,
        *,
        normed: Normed | None = None,
        next_norm: Norm | None = None,
        columns: Tensor | None = None,
        scratch: Scratch | None = None,
        kind: type[LayerCall] = LayerCall,
    ) -> LayerCall:
        """What a layer is told of this pass. Arguments are the fields of :class:`LayerCall`, and
        the class itself."""
        make = LayerCall if kind is LayerCall else kind  # torch.compile traces the global class
        return make(
            layer_idx=layer_idx,
            plan=self.plan,
            state=self.state,
            positions=positions,
            columns=columns,
            resumed=self.resumed,
            native=self.native,
            recorder=self.recorder,
            scratch=Scratch() if scratch is None else scratch,
            normed=normed,
            next_norm=next_norm,
        )

    @property
    def only_native(self) -> bool:
        """Whether the library's own forward is all there is to do."""
        return self.native and self.recorder is None

    @property
    def repeats(self) -> bool:
        """Whether a pass with the same outline would do the same, so that a graph could run it."""
        return not self.native and self.recorder is None


class ShiftedRecorder(Recorder):
    """Tells another recorder about a pass over an input whose first columns were cut off."""

    def __init__(self, recorder: Recorder, columns: int) -> None:
        self._recorder, self._columns = recorder, columns

    def start(self, num_layers: int) -> None:
        self._recorder.start(num_layers)

    def layer(self, layer_idx: int, positions: Tensor, scores: Tensor) -> None:
        self._recorder.layer(layer_idx, shifted(positions, self._columns), scores)


def plan_prompt(
    state: SparseState,
    padding: Sequence[int],
    given: Tensor,
    prompt_length: PromptLength,
    *,
    resumed: bool = False,
) -> TokenPlan:
    """The plan of a prompt, or of a turn, of which ``padding`` columns are in front of each row.

    Raises:
        InputError: see :func:`read_prompt_length` and :func:`find_protected`.
    """
    length = given.shape[1]
    tokens = [length - columns for columns in padding]
    prompt = read_prompt_length(prompt_length, tokens)
    answer = [n - p for n, p in zip(tokens, prompt, strict=True)]
    if state.config.protect is not None:
        protected: TokenPlan = _plan_protected(state, padding, prompt, answer, given, resumed)
        return protected
    plan = TokenPlan.make(padding, prompt, answer, state.ratios, state.config.min_tokens)
    return plan.with_writers(state.writer_shares)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # counts depend on the tokens
def _plan_protected(
    state: SparseState,
    padding: Sequence[int],
    prompt: Sequence[int],
    answer: Sequence[int],
    given: Tensor,
    resumed: bool,
) -> TokenPlan:
    config = state.config
    protected = find_protected(config.protect, given, padding, prompt, resumed=resumed)
    held = () if protected is None else protected.held(padding, prompt)
    plan = TokenPlan.make(padding, prompt, answer, state.ratios, config.min_tokens, held)
    return replace(plan.with_writers(state.writer_shares), protected=protected)


def plan_continuation(
    state: SparseState, padding: Sequence[int], given: Tensor, prompt_length: PromptLength
) -> TokenPlan:
    """The plan of rows that continue what is in the cache, of which ``padding`` columns are in
    front of each row.

    Without ``prompt_length`` they are an answer, which is never pruned. With it, so many of them
    are a prompt: the next turn of a conversation. A single token is never pruned.

    Raises:
        InputError: see :func:`plan_prompt`.
    """
    length = given.shape[1]
    if not any(padding) and (prompt_length is None or length == 1):
        return TokenPlan.whole(len(padding), length, len(state.ratios))
    if prompt_length is None and state.cuts:
        tokens = tuple(length - columns for columns in padding)
        return TokenPlan(tuple(padding), tokens, (0,) * len(tokens), (tokens,) * len(state.ratios))
    return plan_prompt(state, padding, given, prompt_length, resumed=True)


def plan_chunks(
    state: SparseState,
    plan: TokenPlan,
    device: torch.device,
    *,
    resumed: bool,
    prompt_length: PromptLength,
) -> list[Chunk]:
    """What each pass of a chunked prefill runs over; nothing if the prefill is not chunked.

    That is so without the option ``chunk_size``, for short prompts, and for tokens that continue a
    cache as an answer.

    Raises:
        InputError: see :func:`cut_into_chunks`; or rows would be padded in later layers, because
            chunks of theirs hold different numbers of protected tokens.
    """
    chunk_size = state.config.chunk_size
    if chunk_size is None or (resumed and prompt_length is None):
        return []
    chunks = cut_into_chunks(plan.padding, plan.prompt, plan.answer, chunk_size)
    if len(chunks) <= 1:
        return []
    if plan.protected is not None:
        chunks = [_holding(state, chunk, plan, resumed) for chunk in chunks]
    tokens = state.config.pass_tokens
    if tokens is None:
        tokens = PASS_TOKENS.get(device.type, 0)
    return share_passes(chunks, chunk_size, tokens)


def _holding(state: SparseState, chunk: Chunk, whole: TokenPlan, resumed: bool) -> Chunk:
    """The chunk with the protected tokens that it has to hold, if they exceed its budget."""
    assert whole.protected is not None
    protected = whole.protected.part(chunk.rows, chunk.start, chunk.end)
    held = protected.held(chunk.padding, chunk.prompt)
    if all(n <= kept for n, kept in zip(held, plan_chunk(state, chunk).keep[-1], strict=True)):
        return chunk
    chunk = replace(chunk, held=held)
    for place in plan_chunk(state, chunk).padded():
        if resumed or whole.padding[chunk.rows[place]] < chunk.start:
            raise InputError(
                f"chunk_size={state.config.chunk_size}: the rows of this batch have different "
                f"numbers of protected tokens in columns {chunk.start} to {chunk.end - 1} "
                f"({list(held)} with the anchor), more than a chunk keeps; pass the rows one at a "
                "time, or let final_keep or chunk_size be larger"
            )
    return chunk


def plan_chunk(state: SparseState, chunk: Chunk) -> TokenPlan:
    """The plan of a pass over one chunk, or over several whole ones. Each is planned by itself."""
    ratios, least = state.ratios_of_read, state.config.min_tokens
    if chunk.count == 1:
        plan = TokenPlan.make(chunk.padding, chunk.prompt, chunk.answer, ratios, least, chunk.held)
    else:
        size = chunk.prompt[0] // chunk.count
        plan = TokenPlan.of_chunks(len(chunk.rows), chunk.count, size, ratios, least)
    return plan.with_writers(state.writer_shares)


def columns(plan: TokenPlan, length: int, device: torch.device) -> Tensor:
    """(B, length) int64: 0, 1, ... and -1 on padding."""
    numbers = torch.arange(length, device=device).expand(len(plan.padding), length)
    if not any(plan.padding):
        return numbers
    return numbers.masked_fill(numbers < plan.on(device).origin, -1)


def mask_of(plan: TokenPlan, given: Tensor) -> Tensor:
    """(B, T) int64, the attention mask of an input with a plan: 1 on tokens and 0 on padding."""
    return (columns(plan, given.shape[1], given.device) >= 0).long()


def shifted(positions: Tensor, columns: int) -> Tensor:
    """Positions (B, K) in an input that has ``columns`` more columns in front; -1 on padding."""
    return torch.where(positions < 0, -1, positions + columns) if columns else positions


class PrefillOutput(NamedTuple):
    """What a prefill computes."""

    hidden_states: Tensor
    """(B, K, d_model), behind the last norm."""
    positions: Tensor
    """(B, K) int64"""
    states: LayerStates = ()
    """Empty if nobody keeps them."""


class Prefill(Protocol):
    """A library's way through its layers."""

    def __call__(self, given: Tensor, run: Pass, past: LayerStates) -> PrefillOutput:
        """Run the layers.

        Args:
            given: the input, token ids (B, T) or embeddings (B, T, d_model).
            run: the pass.
            past: the states that a resumed pass starts from. They are not written to.
        """


def replay(
    run: Pass,
    backbone: nn.Module,
    given: Tensor,
    past: LayerStates,
    prefill: Prefill,
    *,
    outputs: Hashable,
) -> PrefillOutput | None:
    """Run a prefill from a CUDA graph.

    Args:
        run: the pass.
        backbone: the module whose weights are read.
        given: the input, token ids or embeddings.
        past: the states that a resumed pass starts from.
        prefill: runs the layers, of an input, a pass of the same outline, and states.
        outputs: what ``prefill`` returns, such as whether it returns the states.

    Returns:
        None if this prefill is to run without a graph.
    """
    state, resumed = run.state, run.resumed
    protected = run.plan.protected
    masks = [] if protected is None else [protected.on(given.device)]
    masked = protected is not None

    def function(inputs: Sequence[Tensor], plan: TokenPlan) -> tuple[Tensor, ...]:
        static, *kinds = inputs
        if masked:
            plan = replace(plan, protected=Protected(kinds.pop(0)))
        done = prefill(static, Pass(state, plan, resumed=resumed), StackedStates(kinds))
        return done.hidden_states, done.positions, *map(torch.stack, zip(*done.states, strict=True))

    always = state.config.cuda_graph == "always"
    stacked = StackedStates.of(past)
    if stacked is None:
        return None
    inputs = (given, *masks, *stacked.kinds)
    results = state.graphs.run(
        (outputs, resumed),
        inputs,
        run.plan,
        backbone,
        state.criterion,
        function,
        always=always,
        valid=run.valid,
    )
    if results is None:
        return None
    hidden_states, positions, *kinds = results
    return PrefillOutput(hidden_states, positions, StackedStates(kinds))


def zero_states(mixers: Sequence[SparseMixer], rows: int) -> LayerStates:
    """The states in front of the first token."""
    convolutions = [cast(nn.Conv1d, mixer._modules["conv1d"]) for mixer in mixers]
    weights = [conv1d.weight for conv1d in convolutions]
    kinds = {(weight.device, weight.dtype, weight.shape) for weight in weights}
    if len(kinds) > 1 or len({mixer.state_shape for mixer in mixers}) > 1:
        return [mixer.zero_states(rows) for mixer in mixers]
    first = mixers[0].zero_states(rows)
    return StackedStates([zero.new_zeros((len(mixers), *zero.shape)) for zero in first])


def last_rows(output: PrefillOutput, rows: int) -> PrefillOutput:
    """The same with the last ``rows`` survivors only, which keep no others in memory; 0 for all."""
    if not 0 < rows < output.positions.shape[1]:
        return output
    hidden_states, positions = (each[:, -rows:].clone() for each in output[:2])
    return PrefillOutput(hidden_states, positions, output.states)


def mixers_of(blocks: Sequence[SparseBlock]) -> Iterator[SparseMixer]:
    """The mixers of blocks; before each token, so past the modules' slow ``__getattr__``."""
    for block in blocks:
        mixer = block._modules["mixer"]
        assert isinstance(mixer, SparseMixer)
        yield mixer


def _must_follow_modules(state: SparseState, mixers: Iterable[SparseMixer], library: str) -> bool:
    """Whether a module on the way is more than its weights, so that simba's forward must run.

    The library's own forward, or its single steps, would read the weight of such a module, say one
    with a LoRA adapter, past what was put on it. Our prefills call it, so everything that belongs
    to them must.
    """
    adapted = None
    for mixer in mixers:
        adapted = mixer.adapted_module()
        if adapted is not None:
            break
    if adapted is None:
        return False
    if state.prunes or state.own_dense_path:
        return True
    log_once(
        logging.WARNING,
        f"{library}'s forward, which runs where nothing is pruned, reads the weight of %s past "
        "what was put on it; dense_path='simba' follows it",
        adapted,
    )
    return False
