"""The verbs: `sparsify` a model, `desparsify` it, run it `dense` for a while, `restore` it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from simba import criteria
from simba.config import SimbaConfig
from simba.errors import ConfigError, NotSparsifiedError, UnsupportedModelError
from simba.models import find_adapter, unwrap
from simba.models.refusals import refuse_unpatchable
from simba.models.state import CONFIG_KEY, SAVED_CONFIG, STATE, SparseState, kept_state, state_of
from simba.models.swapping import SwappedClass, swap_in, swap_out
from simba.ops import choose

M = TypeVar("M", bound=nn.Module)


def sparsify(model: M, final_keep: float | SimbaConfig | None = None, **options: Any) -> M:
    """Make a pretrained state-space model drop unimportant prompt tokens layer by layer.

    The same object is returned, changed in place: its modules take on subclasses of their classes,
    parameters are untouched. Everything is checked before anything is changed, and
    :func:`desparsify` undoes it exactly. Calling it again reconfigures from scratch.

    Afterwards ``model(...)`` takes ``prompt_length`` and its output has ``positions``; `generate`
    prunes the prompt and decodes from the survivors' states.

    Args:
        model: a causal language model or bare backbone of a supported family.
        final_keep: share of the prompt's tokens that the last layer processes, in (0, 1]; 0.1 if
            None. Or a whole :class:`SimbaConfig`, and no other options.
        **options: the other fields of :class:`SimbaConfig`.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: no adapter for this class, parameters on the meta device, or a
            forward of somebody's own, which would never run.
        ConfigError: an option is out of range, unknown, or contradicts another or the model, or a
            criterion can't be saved.
        BackendError: ``backend`` names one that can't run in this installation.
    """
    if isinstance(final_keep, SimbaConfig):
        if options:
            raise ConfigError(
                f"conflicting options: a SimbaConfig and {sorted(options)}; put them into the "
                "config, e.g. with dataclasses.replace"
            )
        config = final_keep
    else:
        known = SimbaConfig.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown options {unknown}; known: {sorted(known)}")
        config = SimbaConfig(final_keep=final_keep, **options)
    inner = _unwrapped(model)
    adapter = find_adapter(inner)
    backbone = adapter.backbone(inner)
    parts = adapter.parts(inner)
    refuse_unpatchable(inner, [module for module, _ in parts])
    adapter.check_layers(inner)
    num_layers = adapter.shape(inner).num_layers
    config = config.bound(num_layers)
    config.check_saves()
    state = SparseState(config, config.ratios(num_layers), criteria.from_config(config))
    if config.backend == "triton":
        choose("triton", next(inner.parameters()).device)
    _enter(parts, backbone, state)
    return model


def desparsify(model: M) -> M:
    """Give a sparsified model its own classes and forward back; others are left as they are.

    What :func:`restore` found in a checkpoint's config.json is forgotten as well: the model saves
    as a plain one.

    Returns:
        ``model``, the same object: classes, hooks, ``__dict__`` and state_dict as before
        :func:`sparsify`, logits bit-equal.

    Raises:
        UnsupportedModelError: this is no torch module.
    """
    inner = _unwrapped(model)
    for module in inner.modules():
        state = kept_state(module)
        if state is not None:
            state.graphs.clear()
            del module.__dict__[STATE]
            _forget_saved(module)
        swap_out(module)
    return model


@contextlib.contextmanager
def dense(model: M) -> Iterator[M]:
    """``with simba.dense(model):`` the model runs dense; behind it, sparsified as before.

    For the thread (or the task of asyncio) that entered it: what others run at the same time stays
    sparsified. Inside of it the model saves as a plain one.

    Raises:
        UnsupportedModelError: this is no torch module.
    """
    with contextlib.ExitStack() as stack:
        for module in _unwrapped(model).modules():
            if (state := kept_state(module)) is not None:
                stack.enter_context(state.dense.set(True))
        yield model


def restore(model: M, directory: str | os.PathLike[str] | None = None) -> M:
    """Sparsify a model as it was when it was saved: ``restore(from_pretrained(path))``.

    Args:
        model: as loaded.
        directory: where it was saved. For mamba-ssm's models, whose config.json holds no entries
            but mamba-ssm's: ``restore(MambaLMHeadModel.from_pretrained(path), path)``.

    Raises:
        NotSparsifiedError: the checkpoint was not saved from a sparsified model.
        ConfigError: what was saved is damaged, or of another version.
    """
    if directory is not None:
        file = Path(directory) / SAVED_CONFIG
        if not file.is_file():
            raise NotSparsifiedError(f"there is no {file}; call simba.sparsify")
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read {file}: {error}") from error
        return sparsify(model, SimbaConfig.from_dict(saved))
    inner = _unwrapped(model)
    saved = getattr(getattr(inner, "config", None), CONFIG_KEY, None)
    if saved is None:
        raise NotSparsifiedError(
            "this checkpoint's config.json holds no simba configuration; call simba.sparsify, or, "
            "for a model of mamba-ssm, simba.restore(model, directory)"
        )
    sparsify(model, SimbaConfig.from_dict(saved))
    _forget_saved(inner)  # from now on the model's state is what counts
    return model


def find_state(model: nn.Module) -> SparseState | None:
    """The state of a model that may or may not be sparsified; None inside of :func:`dense`."""
    for module in _unwrapped(model).modules():
        if isinstance(module, SwappedClass) and (state := state_of(module)) is not None:
            return state
    return None


def _unwrapped(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"simba works on torch modules, got {type(model).__name__}")
    return unwrap(model)


def _forget_saved(model: nn.Module) -> None:
    """Take the entry of a loaded checkpoint out of the model's config, if there is one."""
    config = getattr(model, "config", None)
    if CONFIG_KEY in getattr(config, "__dict__", {}):
        delattr(config, CONFIG_KEY)


def _enter(parts: list[tuple[nn.Module, type]], backbone: nn.Module, state: SparseState) -> None:
    for module, mixin in parts:
        if not isinstance(module, SwappedClass):
            swap_in(module, mixin)
    if (old := kept_state(backbone)) is not None:
        old.graphs.clear()
    backbone.__dict__[STATE] = state
