"""The verbs: `sparsify` a model, `desparsify` it, run it `dense` for a while, or `restore` it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from simba.config import SimbaConfig
from simba.errors import ConfigError, NotSparsifiedError, UnsupportedModelError
from simba.models import find_adapter, unwrap
from simba.models.refusals import refuse_unpatchable
from simba.models.state import CONFIG_KEY, SAVED_CONFIG, STATE, SparseState, kept_state, state_of
from simba.models.swapping import SwappedClass, mixin_and_stock, swap_in, swap_out
from simba.ops import choose
from simba.presets import preset_options
from simba.schedules import CUT

if TYPE_CHECKING:
    from simba.tuning import Trial, Tuned

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M,
    final_keep: float | SimbaConfig | Tuned | Trial | None = None,
    *,
    preset: str | None = None,
    **options: Any,
) -> M:
    """Make a pretrained state-space model prune unimportant prompt tokens layer by layer.

    The model is changed in place and returned: its modules get subclasses of their classes, and its
    parameters stay as they are. Everything is checked before anything is changed, and
    :func:`desparsify` undoes it exactly. Calling ``sparsify`` again replaces the configuration.

    Afterwards ``model(...)`` also takes ``prompt_length``, and its output also has ``positions``.
    ``model.generate(...)`` prunes the prompt and decodes from the states of the survivors.

    Args:
        model: a causal language model or a bare backbone of a supported family. Wrappers such as
            PEFT models and compiled models are unwrapped automatically.
        final_keep: the share of the prompt's tokens that the last layer processes, in (0, 1]; the
            default is 0.1. Or a complete :class:`SimbaConfig`, without other options; or what has
            one as its ``config``: what :func:`simba.tune` returns, or a trial of it.
        preset: a set of options for a purpose, see ``simba.presets.PRESETS``: ``"paper"``,
            ``"text"``, ``"recall"`` or ``"fast"``. Options that are given replace its own.
        **options: the other options of :class:`SimbaConfig`, and the parameters of the criterion if
            that is given by name: ``sparsify(model, criterion="influence", reduce="l2")``.

    Returns:
        ``model``, the same object.

    Raises:
        UnsupportedModelError: there is no adapter for the model's class, its parameters are on the
            meta device, or its forward has been replaced (the replacement would never run).
        ConfigError: an option is unknown, out of range, or contradicts another or the model; the
            criterion can't be saved; or the call stands inside of a block of :func:`dense`,
            :func:`record`, :func:`progress` or :func:`simba.train.at_keep` on this model.
        BackendError: ``backend`` names one that can't run here.
    """
    given = getattr(final_keep, "config", final_keep)
    if isinstance(given, SimbaConfig):
        if preset is not None:
            options = {"preset": preset, **options}
        if options:
            raise ConfigError(
                f"conflicting options: a SimbaConfig and {sorted(options)}; put them into the "
                "configuration, for example with dataclasses.replace"
            )
        config = given
    else:
        if final_keep is not None:
            options["final_keep"] = final_keep
        config = SimbaConfig(**(options if preset is None else preset_options(preset, options)))
    inner = _unwrapped(model)
    adapter = find_adapter(inner)
    backbone = adapter.backbone(inner)
    _refuse_inside_block(backbone)
    parts = adapter.parts(inner)
    refuse_unpatchable(inner, [module for module, _ in parts])
    adapter.check_layers(inner)
    prunes = not (config.schedule == CUT or config.final_keep == 1)
    asked = prunes or config.criterion != SimbaConfig().criterion
    scores = adapter.scores(inner, config.criterion if asked else None)
    config = config.bound(len(scores))
    config.check_saves()
    adapter.check_config(inner, config)
    state = SparseState.of(config, scores)
    if config.backend == "triton":
        choose("triton", next(inner.parameters()).device)
    _install(parts, backbone, state)
    return model


def desparsify(model: M) -> M:
    """Undo :func:`sparsify`. A model that is not sparsified is left as it is.

    A configuration that came with a checkpoint is removed as well, so that the model is saved as a
    plain one.

    Returns:
        ``model``, the same object, with classes, hooks, ``__dict__`` and state_dict as they were
        before :func:`sparsify`; its logits are equal bit for bit.

    Raises:
        UnsupportedModelError: ``model`` is not a torch module, or the class of one of its modules
            was changed since (by FSDP or the like).
    """
    inner = _unwrapped(model)
    for module in inner.modules():
        if isinstance(module, SwappedClass):
            mixin_and_stock(module)  # before anything is changed
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
    """Run a sparsified model dense for a while: ``with simba.dense(model): model(ids)``.

    A whole prompt runs through the library's own forward, bit for bit. Several tokens that continue
    a cache go on from its states: there transformers' Mamba and FalconMamba would start from a
    state of zero, and mamba-ssm takes one token at a time. A model that is not sparsified stays as
    it is; ``sparsify(model, 1.0)`` gives it these continuations and prunes nothing.

    Afterwards it is sparsified as before. This holds for the thread (or asyncio task) that entered
    the block; for others the model stays sparsified. Inside the block, the model is saved as a
    plain one.

    Raises:
        UnsupportedModelError: ``model`` is not a torch module.
    """
    with contextlib.ExitStack() as stack:
        for module in _unwrapped(model).modules():
            if (state := kept_state(module)) is not None:
                stack.enter_context(state.dense.set(True))
        yield model


def restore(model: M, directory: str | os.PathLike[str] | None = None) -> M:
    """Sparsify a model as it was when it was saved: ``restore(from_pretrained(path))``.

    Args:
        model: the loaded model.
        directory: where it was saved. Only for models of mamba-ssm, whose config.json has no room
            for simba's entry: ``restore(MambaLMHeadModel.from_pretrained(path), path)``.

    Returns:
        ``model``, the same object.

    Raises:
        NotSparsifiedError: the checkpoint was not saved from a sparsified model.
        ConfigError: the saved configuration is damaged, or of a newer version of simba.
    """
    if directory is not None:
        file = Path(directory) / SAVED_CONFIG
        if not file.is_file():
            raise NotSparsifiedError(
                f"{file} does not exist, so this model was not saved sparsified; call "
                "simba.sparsify(model)"
            )
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read {file}: {error}") from error
        return sparsify(model, SimbaConfig.from_dict(saved))
    inner = _unwrapped(model)
    saved = getattr(getattr(inner, "config", None), CONFIG_KEY, None)
    if saved is None:
        raise NotSparsifiedError(
            "this checkpoint's config.json holds no simba configuration; call "
            "simba.sparsify(model), or simba.restore(model, directory) for a model of mamba-ssm"
        )
    sparsify(model, SimbaConfig.from_dict(saved))
    _forget_saved(inner)  # from now on the model's own state counts
    return model


def find_state(model: nn.Module) -> SparseState | None:
    """The state of a sparsified model; None for other models, and inside :func:`dense`."""
    for module in _unwrapped(model).modules():
        if isinstance(module, SwappedClass) and (state := state_of(module)) is not None:
            return state
    return None


def _refuse_inside_block(backbone: nn.Module) -> None:
    """Raise ConfigError inside of a block that holds on to the state which sparsify replaces."""
    state = kept_state(backbone)
    if state is None:
        return
    blocks = {
        "dense": state.dense.get(),
        "record": state.recorder is not None,
        "progress": state.progress.get() is not None,
        "train.at_keep": state.at.get() is not None,
    }
    block = next((name for name, entered in blocks.items() if entered), None)
    if block is None:
        return
    raise ConfigError(
        f"simba.sparsify inside of `with simba.{block}(model):`, which belongs to the "
        "configuration that would be replaced; call it before or after the block"
    )


def _unwrapped(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"simba works on torch modules, got a {type(model).__name__}")
    return unwrap(model)


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo, behind a ``with`` block, all that :func:`sparsify` did to a model inside of it.

    The configuration that came with a checkpoint stays where it was, so that the model can still be
    restored.
    """
    inner = _unwrapped(model)
    backbone = find_adapter(inner).backbone(inner)
    before, config = kept_state(backbone), getattr(inner, "config", None)
    saved = getattr(config, "__dict__", {}).get(CONFIG_KEY)
    try:
        yield
    finally:
        if before is not None:
            backbone.__dict__[STATE] = before
        else:
            desparsify(model)
            if saved is not None:
                setattr(config, CONFIG_KEY, saved)


def _forget_saved(model: nn.Module) -> None:
    """Remove the entry of a loaded checkpoint from the model's config, if there is one."""
    config = getattr(model, "config", None)
    if CONFIG_KEY in getattr(config, "__dict__", {}):
        delattr(config, CONFIG_KEY)


def _install(parts: list[tuple[nn.Module, type]], backbone: nn.Module, state: SparseState) -> None:
    for module, mixin in parts:
        if not isinstance(module, SwappedClass):
            swap_in(module, mixin)
    if (old := kept_state(backbone)) is not None:
        old.graphs.clear()
    backbone.__dict__[STATE] = state
