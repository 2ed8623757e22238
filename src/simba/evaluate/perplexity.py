"""Perplexity of fixed snippets after a context that may be pruned (paper, section 4.2, figure 4).

The context is the prompt. The snippet after it is never pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError
from simba.evaluate.intervals import exp


@dataclass(frozen=True)
class SnippetLoss:
    """Negative log-likelihood of the snippets, nats per token."""

    per_snippet: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over all tokens; all snippets have the same length."""
        return sum(self.per_snippet) / len(self.per_snippet)

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return exp(self.mean)


def windows(ids: Tensor, context: int, snippet: int, count: int | None = None) -> Tensor:
    """Cut a text's tokens into disjoint windows of context and snippet, spread over the text.

    Args:
        ids: (tokens,) int64.
        context: tokens before each snippet.
        snippet: tokens of a snippet.
        count: number of windows; None for all that fit.

    Returns:
        (count, context + snippet) int64.

    Raises:
        InputError: the text is too short, or a size is not an integer of at least 1.
    """
    size = whole(context, "context") + whole(snippet, "snippet")
    count = None if count is None else whole(count, "count")
    available = ids.shape[0] // size
    if available < (count or 1):
        raise InputError(
            f"{ids.shape[0]} tokens hold {available} windows of {size} tokens, not {count or 1}"
        )
    starts = torch.arange(available) * size
    if count is not None:
        starts = starts[torch.arange(count) * available // count]
    return torch.stack([ids[start : start + size] for start in starts.tolist()])


@torch.no_grad()
def snippet_loss(
    model: nn.Module,
    batch: Tensor,
    snippet: int,
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> SnippetLoss:
    """Measure the loss on the last ``snippet`` tokens of each row; the others are the prompt.

    Args:
        model: a causal language model. If it isn't sparsified, nothing is pruned.
        batch: (N, context + snippet) int64, on any device.
        snippet: tokens that are scored.
        batch_size: rows per batch; the result does not depend on it.
        progress: called after each batch with the number of finished rows.

    Raises:
        InputError: no context is left, or a size is not an integer of at least 1.
    """
    snippet, batch_size = whole(snippet, "snippet"), whole(batch_size, "batch_size")
    if batch.dim() != 2 or 0 in batch.shape:
        raise InputError(f"batch must hold rows of tokens, (N, length), got {tuple(batch.shape)}")
    context = batch.shape[1] - snippet
    if context < 1:
        raise InputError(
            f"rows of {batch.shape[1]} tokens leave no context before a snippet of {snippet}"
        )
    device = next(model.parameters()).device
    losses: list[float] = []
    for rows in torch.split(batch, batch_size):
        ids = rows.to(device)
        # the prompt's last token predicts the snippet's first; the snippet's last predicts nothing
        logits = model(
            ids, prompt_length=context, logits_to_keep=snippet + 1, use_cache=False
        ).logits[:, :-1]
        nll = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), ids[:, context:], reduction="none"
        )
        losses += nll.mean(1).tolist()
        if progress is not None:
            progress(len(losses))
    return SnippetLoss(tuple(losses))
