"""Distillation: the pruned model learns to say what the dense one says."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from simba.errors import ConfigError
from simba.models import find_adapter, unwrap
from simba.ops.losses import divergence
from simba.train.recipe import Batch, Recipe, Survivors, Term, next_token, run, weight
from simba.verbs import find_state


class _Adapted(Protocol):
    """A model of PEFT."""

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Distil(Recipe):
    """Distil the dense model into the pruned one.

    The main part is KL(dense || pruned) of the next token, at the survivors whose next token has a
    label. The teacher runs densely, and no gradient goes through it. It is, in this order:

    - ``teacher``, if it is given: :func:`frozen_copy` makes one of the model before the training;
    - the model without its adapter, if it has one of PEFT;
    - the model itself, dense, as it is at this step.

    Args:
        dense: weight of the usual next-token loss of a dense forward, as in :class:`Paper`.
        divergence: weight of the divergence.
        pruned: weight of the survivors' next-token loss, as in :class:`Paper`.
        hidden: weight of the mean of ‖h - h_dense‖² / ‖h_dense‖² over the survivors, of the hidden
            states behind the last norm.
        temperature: what all logits of the divergence are divided by. The divergence is multiplied
            by its square, so that gradients keep their size.
        teacher: another model, sparsified, with the same tokens.

    Raises:
        ConfigError: a weight is negative, ``divergence`` and ``hidden`` are both 0, the temperature
            is not positive, or the teacher is not a sparsified model.
    """

    name: ClassVar[str] = "distil"

    dense: float = 1.0
    divergence: float = 1.0
    pruned: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("dense", "divergence", "pruned", "hidden"):
            weight(getattr(self, name), f"Distil: {name}")
        if not self.divergence and not self.hidden:
            raise ConfigError("Distil: divergence and hidden are both 0, so nothing is distilled")
        if not weight(self.temperature, "Distil: temperature"):
            raise ConfigError("Distil: temperature must be positive")
        if self.teacher is not None and find_state(self.teacher) is None:
            raise ConfigError(
                "Distil: teacher must be a sparsified model, which runs densely as a teacher; "
                "simba.train.frozen_copy(model) makes one, or call simba.sparsify(teacher)"
            )

    def check(self, model: nn.Module) -> None:
        if self.teacher is None:
            return
        ours, theirs = _vocabulary(model), _vocabulary(self.teacher)
        if ours != theirs:
            raise ConfigError(
                f"Distil: the teacher has {theirs} tokens and the model {ours}; take a teacher "
                "with the same tokenizer"
            )

    def terms(self, model: nn.Module, batch: Batch, keep: float) -> Sequence[Term]:
        taught: list[Survivors] = []
        own = self.teacher is None and not _has_adapter(model)

        def usual() -> Tensor:
            dense = run(model, batch, 1.0, hidden=own and self.hidden > 0)
            if own:  # the teacher is this very forward
                taught.append(_detached(dense))
            return next_token(dense, batch)

        def distilled() -> Tensor:
            if not taught:
                taught.append(self._teach(model, batch))
            teacher = taught.pop()
            survivors = run(model, batch, keep, hidden=self.hidden > 0)
            parts = [self._distance(survivors, teacher, batch)]
            if self.pruned:
                parts.append(self.pruned * next_token(survivors, batch))
            return torch.stack(parts).sum()

        both = [Term("dense", self.dense, usual), Term("distil", 1.0, distilled)]
        return [term for term in both if term.weight]

    @torch.no_grad()
    def _teach(self, model: nn.Module, batch: Batch) -> Survivors:
        hidden = self.hidden > 0
        if self.teacher is not None:
            return run(self.teacher, batch, 1.0, hidden=hidden)
        alone = _without_parallel(model)  # nobody has to hear of gradients that there are not
        with _adapter_off(alone):
            return run(alone, batch, 1.0, hidden=hidden)

    def _distance(self, survivors: Survivors, teacher: Survivors, batch: Batch) -> Tensor:
        """The weighted divergence and distance of hidden states."""
        length = batch.input_ids.shape[1]

        losses = survivors.logits.new_zeros(survivors.targets.shape)
        if self.divergence:
            count = teacher.logits.shape[1]
            places = survivors.places(count, length)
            first = torch.arange(len(places), device=places.device)[:, None] * count
            between = divergence(
                teacher.logits.flatten(0, 1),
                survivors.logits.flatten(0, 1),
                (first + places).flatten(),
                temperature=self.temperature,
                backend=survivors.backend,
            )
            losses = losses + self.divergence * between.view(losses.shape)
        if self.hidden:
            assert survivors.hidden_states is not None and teacher.hidden_states is not None
            theirs = teacher.hidden_states
            target = survivors.gathered(theirs, theirs.shape[1], length).float()
            apart = (survivors.hidden_states.float() - target).square().sum(-1)
            size = target.square().sum(-1).clamp(min=1e-12)
            losses = losses + self.hidden * apart / size
        return survivors.mean(losses, batch)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a sparsified model as it is now, which does not train: a teacher.

    Raises:
        ConfigError: the model is not sparsified.
    """
    inner = unwrap(model)
    if find_state(inner) is None:
        raise ConfigError("frozen_copy takes a sparsified model; call simba.sparsify(model) first")
    return copy.deepcopy(inner).requires_grad_(False).eval()


def _vocabulary(model: nn.Module) -> int:
    inner = unwrap(model)
    return find_adapter(inner).shape(inner).vocab_size


def _detached(survivors: Survivors) -> Survivors:
    states = survivors.hidden_states
    return survivors._replace(
        logits=survivors.logits.detach(),
        hidden_states=None if states is None else states.detach(),
    )


def _without_parallel(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, with its adapters."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(_without_parallel(model), "disable_adapter")


@contextlib.contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    if not _has_adapter(model):
        yield
        return
    with cast(_Adapted, model).disable_adapter():
        yield
