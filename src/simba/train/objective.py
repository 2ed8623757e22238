"""The loss as a plain function, for one's own training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simba import checks
from simba.errors import ConfigError, NotSparsifiedError
from simba.models.prefill import PromptLength
from simba.train.paper import Paper
from simba.train.recipe import Batch, Recipe, Term
from simba.verbs import find_state


def loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    keep: float | None = None,
    labels: Tensor | None = None,
    prompt_length: PromptLength = None,
    recipe: Recipe | None = None,
    items: Tensor | float | None = None,
) -> Tensor:
    """The loss of a batch, by the paper's recipe or another.

    There are two forms. Without ``prompt_length`` whole rows are pruned, and every survivor
    predicts its own next token of the input. With ``prompt_length`` the prompts are pruned and the
    model is trained on whole answers, of which nothing is pruned.

    ::

        ratios = simba.train.KeepRatios(seed=0)
        for step, ids in enumerate(batches):
            simba.train.loss(model, ids, keep=ratios.draw(step)).backward()

    Args:
        model: a sparsified model.
        input_ids: (B, T) int64.
        attention_mask: (B, T), ones and left padding; None for no padding.
        keep: the last layer's keep ratio for this batch, in (0, 1]; None for ``final_keep`` of the
            model.
        labels: (B, T) like ``input_ids``, -100 where there is no loss. None for all tokens, or with
            ``prompt_length`` for those of the answers.
        prompt_length: the number of prompt tokens of each row, not counting padding: an integer or
            one per row. None if the whole row is the prompt.
        recipe: what is computed; None for :class:`Paper`.
        items: what sums over labels are divided by; None for the number of labels that a token in
            this batch could predict. If several batches make a step, the number of all of them.

    Returns:
        A scalar, in nats a token.

    Raises:
        NotSparsifiedError: the model is not sparsified.
        ConfigError: ``keep`` is out of range, or the recipe does not fit the model.
        InputError: an argument does not fit, or no token with a label is left.
    """
    parts = [
        term.weight * term.compute()
        for term in _terms(
            model, input_ids, attention_mask, keep, labels, prompt_length, recipe, items
        )
    ]
    return sum(parts[1:], parts[0])


def backward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    keep: float | None = None,
    labels: Tensor | None = None,
    prompt_length: PromptLength = None,
    recipe: Recipe | None = None,
    items: Tensor | float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Take the gradients of :func:`loss`, part by part.

    So it holds one forward in memory at a time, where ``loss(...).backward()`` holds all.

    Args:
        model: as for :func:`loss`, and so are the other arguments.
        input_ids: (B, T) int64.
        attention_mask: (B, T), ones and left padding.
        keep: the last layer's keep ratio.
        labels: (B, T).
        prompt_length: prompt tokens of each row.
        recipe: what is computed.
        items: what sums over labels are divided by.
        scale: what gradients are multiplied by.

    Returns:
        The loss, a scalar without gradients, and without ``scale``.

    Raises:
        SimbaError: as for :func:`loss`.
    """
    total = torch.zeros((), device=input_ids.device)
    for term in _terms(
        model, input_ids, attention_mask, keep, labels, prompt_length, recipe, items
    ):
        part = term.weight * term.compute()
        (scale * part).backward()  # type: ignore[no-untyped-call]
        total = total + part.detach()
    return total


def _terms(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    keep: float | None,
    labels: Tensor | None,
    prompt_length: PromptLength,
    recipe: Recipe | None,
    items: Tensor | float | None,
) -> Sequence[Term]:
    state = find_state(model)
    if state is None:
        raise NotSparsifiedError(
            f"this {type(model).__name__} is not sparsified, or runs inside of simba.dense; call "
            "simba.sparsify(model) first"
        )
    recipe = Paper() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            "recipe must be simba.train.Paper(), Distil(), Dense() or another simba.train.Recipe, "
            f"got {recipe!r}"
        )
    ratio = float(state.ratios[-1]) if keep is None else checks.ratio(keep, "keep", ConfigError)
    recipe.check(model)
    batch = Batch.make(
        input_ids, attention_mask, labels=labels, prompt_length=prompt_length, items=items
    )
    return recipe.terms(model, batch, ratio)
