"""The states of a model behind some segments, and how they are made and gone on from."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from simba.checks import whole
from simba.errors import InputError, UnsupportedModelError
from simba.models import find_adapter, unwrap
from simba.models.adapter import Backbone
from simba.models.layer_states import LayerStates, StackedStates
from simba.reuse import files
from simba.reuse.segments import NOTHING, Segment
from simba.reuse.watch import Context, Watch, described


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a model knows behind some segments: the states of one row, which never change.

    :meth:`PromptCache.prefill` and :meth:`PromptCache.lookup` return them. The snapshot of no
    segments is what the model knows before the first token.
    """

    segments: int
    """How many segments it stands for."""
    tokens: int
    """How many tokens these have."""
    key: str = field(repr=False)
    """Hash of the segments."""
    states: LayerStates = field(repr=False)
    """Of one row, without the batch's dimension."""
    context: Context = field(repr=False)
    source: Source = field(repr=False)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of its states. They do not depend on the number of tokens."""
        if isinstance(self.states, StackedStates):
            return sum(kind.nbytes for kind in self.states.kinds)
        return sum(state.nbytes for layer in self.states for state in layer)

    def fork(self, rows: int = 1) -> Any:
        """The library's own cache, from which the model goes on.

        It is a copy: whatever the model does with it, the snapshot and other forks stay as they
        are.

        Args:
            rows: how many rows are to go on, all from this snapshot.

        Returns:
            transformers' ``DynamicCache``, for ``cache_params``; or mamba-ssm's
            ``InferenceParams``, for ``inference_params``.

        Raises:
            InputError: the model or its configuration is not the one of the snapshot any more, or
                ``rows`` is not a positive integer.
        """
        self.check_current()
        return self.source.fork(self, whole(rows, "rows"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save it into a file (safetensors) that :meth:`PromptCache.load` reads.

        Raises:
            InputError: as for :meth:`fork` and :meth:`PromptCache.save`; or there are no segments.
        """
        if not self.segments:
            raise InputError("a snapshot of no segments holds nothing that could be saved")
        self.source.save(path, [self])

    def check_current(self) -> None:
        """Raise InputError if the model is not the one of the snapshot any more."""
        now = self.source.context()
        if now != self.context:
            raise InputError(
                "this snapshot does not belong to the model as it is now: "
                f"{self.context.difference(now)}. Prefill its segments again: cache.prefill(...)"
            )


class Source:
    """A sparsified model, as a prompt cache sees it."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"a prompt cache works on torch modules, got a {type(model).__name__}"
            )
        _refuse_virtual_tokens(model)
        self.model = unwrap(model)
        self.adapter = find_adapter(self.model)
        self.adapter.check_use("simba.PromptCache")
        backbone = self.adapter.backbone(self.model)
        self._watch = Watch(self.model, backbone)
        self.context()  # raises if the model is not sparsified

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller."""
        return self.adapter.shape(self.model).vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        return next(self.model.parameters()).device

    def context(self) -> Context:
        """What a prefill depends on now; see :class:`Watch`."""
        return self._watch.context()

    def nothing(self, context: Context) -> Snapshot:
        """The snapshot of no segments."""
        return Snapshot(0, 0, NOTHING, (), context, self)

    # Tensors of inference mode could not be written to outside of it, so none are made.

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self, snapshot: Snapshot, rows: int) -> object:
        """See :meth:`Snapshot.fork`; it checks nothing."""
        states = _copies(snapshot.states, rows)
        return self.adapter.new_cache(self.model, states, snapshot.tokens)

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, before: Snapshot, segment: Segment, cache: object) -> Snapshot:
        """The snapshot of a cache into which a segment was prefilled, behind ``before``.

        The states are copied, so the cache may be used further, and views keep no batch alive.
        """
        cached = self.adapter.cached_states(self.model, cache)
        stacked = StackedStates.of(cached)
        states: LayerStates
        if stacked is None:
            states = [tuple(_copy(state[0]) for state in layer) for layer in cached]
        else:
            states = StackedStates([kind[:, 0] for kind in stacked.kinds])
        tokens = before.tokens + segment.ids.shape[1]
        return Snapshot(before.segments + 1, tokens, segment.key, states, before.context, self)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prefill(self, before: Snapshot, segment: Segment) -> Snapshot:
        """Go on from a snapshot by one segment."""
        cache = self.fork(before, 1)
        ids = segment.ids.to(self.device)
        self.adapter.prefill(self.model, ids, cache, prompt=segment.prompt)
        return self.take(before, segment, cache)

    # --- files ---

    def save(self, path: str | os.PathLike[str], snapshots: list[Snapshot]) -> None:
        """Save snapshots, which must be those of the model as it is now, least important first."""
        context, fingerprint = self._watch.fingerprint()
        for snapshot in snapshots:
            if snapshot.context != context:
                snapshot.check_current()
        entries = [
            files.Entry(snapshot.segments, snapshot.tokens, snapshot.key, snapshot.states)
            for snapshot in snapshots
        ]
        files.write(path, fingerprint, entries)

    def load(self, path: str | os.PathLike[str]) -> list[Snapshot]:
        """The snapshots of a file, in order.

        Raises:
            InputError: the file can't be read or is damaged, or is of another model or
                configuration.
        """
        context, fingerprint = self._watch.fingerprint()
        saved, entries = files.read(path)
        self._check(path, saved, fingerprint)
        layers = self._layers()
        return [
            Snapshot(
                entry.segments,
                entry.tokens,
                entry.key,
                [
                    tuple(state.to(_device_of(layer)) for state in states)
                    for layer, states in zip(layers, entry.states, strict=True)
                ],
                context,
                self,
            )
            for entry in entries
        ]

    def _check(
        self, path: str | os.PathLike[str], saved: Mapping[str, str], now: Mapping[str, str]
    ) -> None:
        if saved != now:
            raise InputError(
                f"the snapshots of {os.fspath(path)} belong to another model or configuration: "
                f"{described(saved, now)}. Load the model that they were made with, or prefill "
                "again and save"
            )

    def _layers(self) -> list[nn.Module]:
        backbone: Backbone = self.adapter.backbone(self.model)  # type: ignore[assignment]
        return [layer.mixer for layer in backbone.layers]


def _copies(states: LayerStates, rows: int) -> list[tuple[Tensor, ...]]:
    """``rows`` copies of each state, (rows, ...)."""
    if not isinstance(states, StackedStates):
        return [tuple(_repeated(state[None], rows)[0] for state in layer) for layer in states]
    kinds = [_repeated(kind, rows) for kind in states.kinds]
    # .data, or a write to one layer's state would count as a write to the others'
    return list(zip(*([layer.data for layer in kind.unbind()] for kind in kinds), strict=True))


def _repeated(kind: Tensor, rows: int) -> Tensor:
    """(layers, rows, ...), a copy of the states (layers, ...)."""
    return _copy(kind[:, None].expand(len(kind), rows, *kind.shape[1:]))


def _copy(state: Tensor) -> Tensor:
    return state.clone(memory_format=torch.contiguous_format)


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Raise UnsupportedModelError for adapters that put tokens of their own before the prompt."""
    configs: object = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        for name, config in configs.items():
            if getattr(config, "is_prompt_learning", False):
                raise UnsupportedModelError(
                    f"adapter {name!r} puts tokens of its own before the prompt "
                    f"({type(config).__name__}), which a prompt cache does not know of"
                )
