"""The model on loan, and what is measured on it: the same text and recall for every trial."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simba.config import SimbaConfig
from simba.errors import InputError, UnsupportedModelError
from simba.evaluate import contexts, passage_recall
from simba.evaluate.cells import vocabulary_size
from simba.evaluate.prefill_time import WARM_UPS, prefill_seconds
from simba.evaluate.prose import prose_in_text
from simba.evaluate.synthetic import Rows
from simba.evaluate.texts import Document, Tokenizer
from simba.evaluate.trained import answers
from simba.introspection import flops
from simba.models import find_adapter, unwrap
from simba.models.state import STATE, SparseState, kept_state
from simba.verbs import left_as_it_was, sparsify

PASSAGE = "passage"
"""The recall task that needs no tokenizer: a passage that returns."""


def refuse_unmeasurable(model: object) -> None:
    """Check that a model is one that the evaluations can measure.

    Raises:
        UnsupportedModelError: its family is not supported, it is mamba-ssm's, or it has no head.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"simba works on torch modules, got a {type(model).__name__}")
    inner = unwrap(model)
    adapter = find_adapter(inner)
    adapter.check_use("simba.tune")
    name = type(inner).__name__
    if not hasattr(inner, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"simba.tune measures language models of transformers, and {name} is of mamba-ssm; "
            "tune the same checkpoint in transformers' form, and give its configuration to "
            "simba.sparsify with this model"
        )
    if inner is adapter.backbone(inner):
        raise UnsupportedModelError(
            f"simba.tune measures the loss of a language model, and {name} has no head; give it "
            "the model that this backbone belongs to, such as MambaForCausalLM"
        )


class Loan:
    """A model whose configuration may be changed, because it is given back as it was."""

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        adapter = find_adapter(inner)
        self.model = model
        self.num_layers = adapter.shape(inner).num_layers
        self._scores = adapter.scores(inner)
        self._backbone = adapter.backbone(inner)

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module) -> Iterator[Loan]:
        """Borrow a model for the duration of a ``with`` block.

        Afterwards, also after an exception or an interrupt, it is sparsified as before, or not at
        all, and holds what its checkpoint says of simba.
        """
        loan = cls(model)
        with left_as_it_was(model):
            if kept_state(loan._backbone) is None:
                sparsify(model, 1.0)
            yield loan

    @contextlib.contextmanager
    def variants(self, *configs: SimbaConfig) -> Iterator[Callable[[int], None]]:
        """Let configurations take turns; yields a function that takes the number of the next one.

        The first one is set already. What they have made, such as CUDA graphs, is freed afterwards.
        """
        states = [SparseState.of(config, self._scores) for config in configs]

        def take(number: int) -> None:
            self._backbone.__dict__[STATE] = states[number]

        try:
            take(0)
            yield take
        finally:
            for state in states:
                state.graphs.clear()

    def flops(self, config: SimbaConfig, seq_len: int) -> float:
        """FLOPs of a prefill as a share of the dense model's."""
        with self.variants(config):
            return flops(self.model, seq_len).ratio


@dataclass(frozen=True)
class Probes:
    """The texts that every trial is measured on."""

    text: Tensor
    """(rows, seq_len + snippet) int64: snippets behind their prompts."""
    present: Rows | Tensor
    """Prompts with something to remember, and what is scored behind them."""
    absent: Rows | Tensor
    """The same prompts without it: the control."""
    snippet: int
    snippets: int
    counted: int
    """Tokens of a returning passage that are scored."""
    prompts: int
    batch_size: int

    @classmethod
    def of(
        cls,
        documents: Sequence[Document],
        tokenizer: Tokenizer | None,
        *,
        seq_len: int,
        recall: str,
        snippet: int,
        snippets: int,
        passage: int,
        cue: int,
        prompts: int,
        batch_size: int,
        seed: int,
    ) -> Probes:
        """The same probes as those of `simba.evaluate`, with prompts of ``seq_len`` tokens.

        Raises:
            InputError: a document is too short, or so is ``seq_len``.
        """
        text = contexts.cut(documents, seq_len, snippet, snippets, seq_len)

        def make(present: bool) -> Rows | Tensor:
            if recall == PASSAGE:
                distance = seq_len - passage - cue
                if distance < 0:
                    raise InputError(
                        f"prompts of seq_len={seq_len} tokens do not hold a passage of {passage} "
                        f"and its cue of {cue}"
                    )
                return passage_recall.returning(
                    documents,
                    distance=distance,
                    room=distance,
                    passage=passage,
                    cue=cue,
                    passages=prompts,
                    present=present,
                )
            assert tokenizer is not None
            return prose_in_text(
                recall,
                documents,
                tokenizer,
                length=seq_len,
                room=seq_len,
                prompts=prompts,
                seed=seed,
                present=present,
            )

        sizes = snippet, snippets, passage - cue, prompts, batch_size
        return cls(text, make(True), make(False), *sizes)

    def losses(self, model: nn.Module) -> tuple[float, ...]:
        """Text loss by document, as `simba.evaluate.perplexity_by_context` measures it."""
        return contexts.measure(model, self.text, self.snippet, self.snippets, self.batch_size)

    def gains(self, model: nn.Module) -> tuple[float, ...]:
        """The benefit by document, as `simba.evaluate.recall` or `prose_task` measures it."""
        with_it, without_it = (self._answers(model, each) for each in (self.present, self.absent))
        return tuple(b - a for a, b in zip(with_it, without_it, strict=True))

    def _answers(self, model: nn.Module, rows: Rows | Tensor) -> tuple[float, ...]:
        if isinstance(rows, Tensor):
            return contexts.measure(model, rows, self.counted, self.prompts, self.batch_size)
        _, losses = answers(model, rows, self.batch_size)
        return tuple(losses.view(-1, self.prompts).mean(1).tolist())


class Clock:
    """Times prefills of one length."""

    def __init__(self, loan: Loan, seq_len: int, repeats: int, seed: int) -> None:
        self._loan, self._repeats = loan, repeats
        device = next(loan.model.parameters()).device
        self._warm_ups = WARM_UPS.get(device.type, 1)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = vocabulary_size(unwrap(loan.model))
        self._ids = torch.randint(vocabulary, (1, seq_len), generator=generator).to(device)

    @torch.no_grad()
    def milliseconds(self, *configs: SimbaConfig) -> list[float]:
        """The median of each configuration's prefills. They take turns."""
        times: list[list[float]] = [[] for _ in configs]
        with self._loan.variants(*configs) as take:
            for repeat in range(-self._warm_ups, self._repeats):
                for number, own in enumerate(times):
                    take(number)
                    took = prefill_seconds(self._loan.model, self._ids)
                    if repeat >= 0:
                        own.append(1000 * took)
        return [statistics.median(own) for own in times]
