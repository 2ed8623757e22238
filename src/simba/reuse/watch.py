"""Whether a model is still the one that a snapshot was made with.

Hashing the weights takes a second per GB, so it is done for files only. In memory it is enough to
notice that something has changed since the last look, which takes milliseconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.dropout import _DropoutNd

from simba.criteria.registry import CRITERIA
from simba.errors import InputError, NotSparsifiedError, UnsupportedModelError
from simba.fingerprints import fingerprint_weights
from simba.models.layout import GLOBAL_HOOKS, LIBRARIES, plain_attributes
from simba.models.state import SparseState, kept_state, state_of
from simba.version import __version__

SAMPLE = 8
"""Values of each tensor that are compared."""


@dataclass(frozen=True)
class Context:
    """What a prefill depends on, besides its tokens. Two are equal if it would do the same."""

    weights: int
    """Counts the changes of the weights, and of the libraries' modules."""
    settings: tuple[tuple[str, str], ...]
    """Everything else, by name."""
    criterion: type

    def difference(self, other: Context) -> str:
        """What differs between this and another, for people."""
        if self.weights != other.weights:
            return (
                "the model's weights have changed, or their dtype or device, or a setting of its "
                "modules"
            )
        if self.settings == other.settings:
            return "the criterion's class was defined anew"
        return described(dict(self.settings), dict(other.settings))


def described(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two sets of settings, for people."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = []
    for name in names:
        old, new = before.get(name, "nothing"), now.get(name, "nothing")
        try:
            parsed = json.loads(old), json.loads(new)
        except ValueError:
            parsed = None, None
        if all(isinstance(values, dict) for values in parsed):
            was, has = parsed
            for key in {**was, **has}:
                if was.get(key) != has.get(key):
                    found.append(f"{name}: {key} was {was.get(key)!r} and is {has.get(key)!r}")
        else:
            found.append(f"{name} was {old} and is {new}")
    return "; ".join(found)


class Watch:
    """Looks at a model again and again.

    It notices other tensors (`.to()`, an exchanged layer, a new adapter) and values that were
    changed in place by operations that PyTorch counts (optimizers, `load_state_dict`, `copy_`).
    PyTorch does not count writes through `.data`. For these, it compares a few values of each
    tensor, and so notices when whole tensors change. It also notices other numbers in the modules
    of the libraries (``mixer.time_step_limit``), but no other code.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        self._model = model
        self._backbone = backbone
        self._lock = threading.Lock()
        self._changes = 0
        self._facts: list[object] = []
        self._storages: list[StorageWeakRef] = []
        """They keep no memory alive, but the address by which a storage is known."""
        self._sample = b""
        self._hashed: tuple[int, str] = (-1, "")

    def context(self) -> Context:
        """What a prefill depends on now.

        Raises:
            NotSparsifiedError: the model is not sparsified.
            InputError: inside of :func:`simba.dense`, or with dropout.
        """
        state = self._state()
        criterion = state.criterion
        config = {**state.config.to_dict(), "criterion": CRITERIA.to_dict(criterion)}
        settings = {
            "the configuration of simba": json.dumps(config, sort_keys=True),
            "autocast": self._autocast(),
            **self._modules(),
        }
        with self._lock:
            self._look()
            changes = self._changes
        return Context(changes, tuple(settings.items()), type(criterion))

    def fingerprint(self) -> tuple[Context, dict[str, str]]:
        """What a prefill depends on now, and the same by name and in full, for a file.

        Raises:
            InputError: the model has forward hooks, which a file can't describe.
        """
        context = self.context()
        settings = dict(context.settings)
        if settings.pop("forward hooks") != "none":
            raise InputError(
                "the model has forward hooks, and a file can't say what they do; remove them "
                "before snapshots are saved or loaded"
            )
        with self._lock:
            changes, hashed = self._hashed
        if changes != context.weights:
            hashed = fingerprint_weights(self._model)
            with self._lock:
                self._hashed = context.weights, hashed
        kind = type(self._model)
        criterion = context.criterion
        return context, {
            "simba": __version__,
            "the model's class": f"{kind.__module__}.{kind.__qualname__}",
            "the model's weights and configuration": hashed,
            "the model's settings": _plain_config(getattr(self._model, "config", None)),
            "the criterion's class": f"{criterion.__module__}.{criterion.__qualname__}",
            **settings,
        }

    def _state(self) -> SparseState:
        state = state_of(self._backbone)
        if state is not None:
            return state
        if kept_state(self._backbone) is None:
            raise NotSparsifiedError(
                "this model is not sparsified; call simba.sparsify(model) first, with "
                "final_keep=1.0 for a prompt cache of the dense model"
            )
        raise InputError(
            "a prompt cache inside of `with simba.dense(model):`, where the library's own forward "
            "can't continue a cache by several tokens; call simba.sparsify(model, 1.0) for a "
            "prompt cache of the dense model"
        )

    def _autocast(self) -> str:
        kind = next(self._model.parameters()).device.type
        if not torch.is_autocast_enabled(kind):
            return "off"
        return str(torch.get_autocast_dtype(kind))

    def _modules(self) -> dict[str, str]:
        """Hooks, and the settings of modules that no library we know has written (adapters)."""
        hooks: list[object] = [tuple(known) for known in GLOBAL_HOOKS if known]
        foreign: list[object] = []
        for name, module in self._model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                hooks.append((name, tuple(module._forward_hooks), tuple(module._forward_pre_hooks)))
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise InputError(
                    f"{name} drops values at random in training mode, so no two prefills are the "
                    "same; call model.eval()"
                )
            if _foreign(module):
                settings = _ordered(plain_attributes(module))
                foreign.append((name, type(module).__qualname__, settings))
        return {"forward hooks": _hash(hooks), "adapters": _hash(foreign)}

    @torch.no_grad()
    def _look(self) -> None:
        """Count a change if there is one."""
        modules = list(self._model.modules())
        tensors = [
            tensor
            for module in modules
            for group in (module._parameters, module._buffers)
            for tensor in group.values()
            if tensor is not None
        ]
        try:
            storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        except (NotImplementedError, RuntimeError) as error:
            kinds = sorted({type(t).__name__ for t in tensors} - {"Parameter", "Tensor"})
            raise UnsupportedModelError(
                f"a prompt cache can't tell whether these weights change: {', '.join(kinds)}"
            ) from error
        facts = [_facts(tensor) for tensor in tensors]
        for module in modules:
            if not _foreign(module):
                facts += [
                    value
                    for name, value in vars(module).items()
                    if type(value) in _SETTINGS and name != "training"
                ]
        sample = _sample(tensors)
        known = [storage.cdata for storage in self._storages]
        if (storages, facts, sample) == (known, self._facts, self._sample):
            return
        self._changes += 1
        self._facts, self._sample = facts, sample
        weakly: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef
        self._storages = [weakly(tensor.untyped_storage()) for tensor in tensors]


_SETTINGS = frozenset({bool, int, float, str, tuple})


def _foreign(module: nn.Module) -> bool:
    """Whether a module is of another library, such as one with an adapter."""
    return type(module).__module__.partition(".")[0] not in LIBRARIES


def _facts(tensor: Tensor) -> object:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.dtype, tensor.device, tensor.shape, tensor.storage_offset()


def _sample(tensors: list[Tensor]) -> bytes:
    """A few values of each tensor."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_meta:  # offloaded: the forward refuses it
            continue
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        size = min(tensor.numel(), stored - tensor.storage_offset())  # it may be expanded
        values = tensor.as_strided((min(size, SAMPLE),), (max(size // SAMPLE, 1),))
        groups.setdefault((tensor.device, tensor.dtype), []).append(values)
    joined: list[Any] = [
        torch.cat(group).view(torch.uint8).cpu().numpy() for group in groups.values()
    ]
    return b"".join(values.tobytes() for values in joined)


def _ordered(value: object) -> object:
    """The same with sets as sorted lists, so that it is written alike in every process."""
    if isinstance(value, dict):
        return {key: _ordered(inner) for key, inner in value.items()}
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value


def _hash(values: list[object]) -> str:
    if not values:
        return "none"
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _plain_config(config: object) -> str:
    """mamba-ssm's configuration; transformers' is part of the fingerprint of the weights."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)
    return "{}"
