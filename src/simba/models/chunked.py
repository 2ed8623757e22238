"""The loop of a chunked prefill, for every library: one pass after another, from states to states.

What the caller's cache holds is only written at the end, or when the loop is interrupted. Then it
holds all tokens of the passes that are complete, so the rest of the prompt can continue from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from simba.models.chunks import Chunk, Survivors, refuse_chunks
from simba.models.layer_states import LayerStates
from simba.models.plan import TokenPlan
from simba.models.prefill import Pass, Prefill, plan_chunk, replay
from simba.models.protected import Protected
from simba.models.state import SparseState


def prefill_chunks(
    state: SparseState,
    chunks: Sequence[Chunk],
    backbone: nn.Module,
    given: Tensor,
    past: LayerStates,
    prefill: Prefill,
    *,
    may_capture: Callable[[Tensor], bool],
    leave: Callable[[LayerStates], None],
    rows_to_keep: int,
    cut: int | None,
    protected: Protected | None,
) -> Survivors:
    """Run all passes, from CUDA graphs where that works.

    Args:
        state: the model's.
        chunks: what each pass runs over.
        backbone: the module whose weights are read.
        given: the input, token ids (B, T) or embeddings (B, T, d_model).
        past: the states to start from.
        prefill: runs one pass, and returns the last ``rows_to_keep`` survivors and the states.
        may_capture: whether a pass over such an input may run from a CUDA graph.
        leave: is given the states behind the last complete pass, once, also if an exception ends
            the loop; not if no pass is complete.
        rows_to_keep: the last so many survivors are returned; 0 for all.
        cut: columns that were cut off in front of ``given``; None if no prompt was cut.
        protected: the tokens that every layer keeps, of the whole input.

    Raises:
        InputError: the pass is to be recorded, or something wants a gradient.
    """
    assert state.config.chunk_size is not None
    refuse_chunks(state.config.chunk_size, backbone, given, recorded=state.recorder is not None)
    batch, length = given.shape[:2]
    everyone = tuple(range(batch))
    survivors = Survivors(batch, rows_to_keep)
    report = state.progress.get()
    if report is not None and torch.compiler.is_compiling():
        # what a traced function writes into variables around it would be lost
        torch._dynamo.graph_break()
    rows, done = everyone, 0
    plans: dict[Hashable, TokenPlan] = {}
    valid: set[Hashable] = set()
    try:
        for chunk in chunks:
            part = given[:, chunk.start : chunk.end]
            if chunk.rows != everyone:
                part = part[torch.tensor(chunk.rows, device=given.device)]
            past, rows = of_rows(past, rows, chunk.rows), chunk.rows
            key = replace(chunk, start=0, end=chunk.end - chunk.start)
            if key not in plans:
                plans[key] = plan_chunk(state, chunk)
            plan = plans[key]
            if protected is not None:
                part_of = protected.part(chunk.rows, chunk.start, chunk.end)
                plan = replace(plan, protected=part_of)
            # The first pass starts from zero states, so that all of them can share a CUDA graph.
            run, out = Pass(state, plan, resumed=True, valid=valid), None
            if may_capture(part):
                out = replay(run, backbone, part, past, prefill, outputs=("rows", rows_to_keep))
            if out is None:
                out = prefill(part, run, past)
            survivors.add(chunk, out.hidden_states, out.positions)
            past, done = out.states, chunk.end
            if report is not None:
                if given.device.type == "cuda":
                    torch.cuda.synchronize(given.device)
                report(done, length)
                valid.clear()  # it may have changed the model
    except BaseException as error:
        if 0 < done < length and hasattr(error, "add_note"):  # from Python 3.11 on
            # the rest of a prompt that was cut must not be cut again
            how = "prompt_length" if cut is None else "without prompt_length, since it is cut"
            front = cut or 0
            error.add_note(
                f"simba: the prefill ended behind column {front + done} of {front + length}. A "
                "cache that was passed in holds the tokens up to there; pass the rest of the input "
                f"with it, {'and ' if cut is None else ''}{how}, to go on (mamba-ssm's: add "
                f"{front + done} to its seqlen_offset first)"
                + (". Positions that protect names count no further" if protected else "")
            )
        raise
    finally:
        if done > 0:
            leave(of_rows(past, rows, everyone))
    return survivors


def of_rows(states: LayerStates, rows: Sequence[int], wanted: Sequence[int]) -> LayerStates:
    """The states of the rows ``wanted``, of those of ``rows``; what is missing is zero.

    So a row that begins in a later chunk is left out until then.
    """
    if tuple(rows) == tuple(wanted):
        return states
    kept = [row for row in rows if row in wanted]
    source = torch.tensor([rows.index(row) for row in kept])
    target = torch.tensor([wanted.index(row) for row in kept])

    def pick(state: Tensor) -> Tensor:
        zeros = state.new_zeros((len(wanted), *state.shape[1:]))
        device = state.device  # layers may be on several
        return zeros.index_copy_(0, target.to(device), state[source.to(device)])

    return [tuple(pick(state) for state in layer) for layer in states]
