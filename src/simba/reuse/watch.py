"""Whether a model is still the one that a snapshot was made with.

Hashing the weights takes a second per GB, so it is done for files only. In memory it is enough to
notice that something has changed since the last look. That is done for every request, so it is
written as loops that Python runs in C, and still takes milliseconds for a model of 64 layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.dropout import _DropoutNd

from simba.criteria.registry import CRITERIA
from simba.errors import InputError, NotSparsifiedError, UnsupportedModelError
from simba.fingerprints import fingerprint_weights
from simba.models.graphs import PrefillGraphs, Views
from simba.models.layout import (
    GLOBAL_HOOKS,
    LIBRARIES,
    MEANS_NOTHING,
    is_plain,
    plain_attributes,
    values_of,
)
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
    criterion: tuple[type, ...]
    """The classes of the criterion and of those that it is made of."""

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

    It keeps no weights in memory, unless a CUDA graph of the model does: then it keeps views of
    them, which are dropped with the graphs.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        self._model = model
        self._backbone = backbone
        self._lock = threading.Lock()
        self._changes = 0
        self._facts: list[object] = []
        self._storages: list[StorageWeakRef] = []
        """They keep no memory alive, but the address by which a storage is known."""
        self._names = _Names([], [])
        self._adapter_names = _Names([], []), _Names([], [])
        self._adapter_values = self._adapter_hash = ""
        self._places = _Places([])
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
        modules = _modules(self._model)
        self._refuse_dropout(modules)
        kinds = list(map(type, modules))
        foreign = {kind for kind in set(kinds) if _foreign(kind)}
        adapters = list(compress(modules, map(foreign.__contains__, kinds)))
        others = [m for m in modules if type(m) not in foreign] if foreign else modules
        with self._lock:
            settings = {
                "the configuration of simba": json.dumps(config, sort_keys=True),
                "autocast": self._autocast(),
                "forward hooks": self._hooks(modules),
                "adapters": self._adapters(adapters) if adapters else "none",
            }
            self._look(modules, others, state.graphs)
            changes = self._changes
        return Context(changes, tuple(settings.items()), tuple(map(type, criterion.parts)))

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
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in context.criterion]
        return context, {
            "simba": __version__,
            "the model's class": f"{kind.__module__}.{kind.__qualname__}",
            "the model's weights and configuration": hashed,
            "the model's settings": _plain_config(getattr(self._model, "config", None)),
            "the criterion's class": " + ".join(kinds),
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

    def _refuse_dropout(self, modules: list[nn.Module]) -> None:
        if not any(issubclass(kind, _DropoutNd) for kind in set(map(type, modules))):
            return
        for name, module in self._model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise InputError(
                    f"{name} drops values at random in training mode, so no two prefills are the "
                    "same; call model.eval()"
                )

    def _hooks(self, modules: list[nn.Module]) -> str:
        hooks: list[object] = [tuple(known) for known in GLOBAL_HOOKS if known]
        if any(map(_hooks, modules)) or any(map(_pre_hooks, modules)):
            hooks += [
                (name, tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
                for name, module in self._model.named_modules()
                if module._forward_hooks or module._forward_pre_hooks
            ]
        return _hash(hooks)

    def _adapters(self, modules: list[nn.Module]) -> str:
        """The settings of modules that no library we know has written, hashed when they change."""
        plain, rest = (names.values(modules) for names in self._adapter_names)
        known = plain is not None and rest is not None and not any(map(is_plain, rest))
        if not known or repr(plain) != self._adapter_values:
            settings = list(map(plain_attributes, modules))
            others = [
                [name for name in vars(module) if name not in {*_NO_SETTINGS, *own}]
                for module, own in zip(modules, settings, strict=True)
            ]
            self._adapter_names = _Names(modules, settings), _Names(modules, others)
            self._adapter_values = repr(self._adapter_names[0].values(modules))
            self._adapter_hash = _hash(
                [
                    (name, type(module).__qualname__, _ordered(plain_attributes(module)))
                    for name, module in self._model.named_modules()
                    if _foreign(type(module))
                ]
            )
        return self._adapter_hash

    def _look(
        self, modules: list[nn.Module], of_libraries: list[nn.Module], graphs: PrefillGraphs
    ) -> None:
        """Count a change if there is one."""
        dicts = chain(map(_parameters, modules), map(_buffers, modules))
        tensors = [tensor for tensor in values_of(filter(None, dicts)) if tensor is not None]
        try:
            storages = list(map(Tensor.untyped_storage, tensors))
        except (NotImplementedError, RuntimeError) as error:
            kinds = sorted({type(t).__name__ for t in tensors} - {"Parameter", "Tensor"})
            raise UnsupportedModelError(
                f"a prompt cache can't tell whether these weights change: {', '.join(kinds)}"
            ) from error
        values = self._names.values(of_libraries)
        if values is None:
            names = [[n for n in vars(m) if n not in _NO_SETTINGS] for m in of_libraries]
            self._names = _Names(of_libraries, names)
            values = self._names.values(of_libraries) or []
        facts = [
            _versions(tensors),
            *(list(map(fact, tensors)) for fact in _FACTS),
            list(map(torch.UntypedStorage.nbytes, storages)),
            list(compress(values, map(_SETTINGS.__contains__, map(type, values)))),
        ]
        known = [storage.cdata for storage in self._storages]
        same = [storage._cdata for storage in storages] == known and facts == self._facts
        places = self._places if same else _Places(tensors)
        views = graphs.views_of(places)
        if views is None:  # making them takes longer than reading them
            views = places.views(tensors)
            graphs.keep_views(places, views)
        sample = _bytes(views)
        if same and sample == self._sample:
            return
        self._changes += 1
        self._facts, self._places, self._sample = facts, places, sample
        weakly: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef
        self._storages = list(map(weakly, storages))


_SETTINGS = frozenset({bool, int, float, str, tuple})
_NO_SETTINGS = MEANS_NOTHING | {"training"}

_children = attrgetter("_modules")
_parameters, _buffers = attrgetter("_parameters"), attrgetter("_buffers")
_hooks, _pre_hooks = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")
_version = attrgetter("_version")
_FACTS: tuple[Callable[[Tensor], object], ...] = (
    attrgetter("dtype"),
    attrgetter("shape"),
    Tensor.stride,
    Tensor.storage_offset,
)


def _modules(root: nn.Module) -> list[nn.Module]:
    """What ``root.modules()`` yields, level by level."""
    found: dict[nn.Module, None] = {}
    level = [root]
    while level:
        found.update(dict.fromkeys(level))
        children = values_of(filter(None, map(_children, level)))
        level = [child for child in children if child is not None and child not in found]
    return list(found)


def _foreign(kind: type) -> bool:
    """Whether a module's class is of another library, such as one with an adapter."""
    return kind.__module__.partition(".")[0] not in LIBRARIES


def _versions(tensors: list[Tensor]) -> list[int | None]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # tensors of inference mode have none
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


class _Names:
    """Names of attributes of modules, remembered from look to look.

    Args:
        modules: the modules, which it does not keep.
        names: of each module, the names.
    """

    def __init__(self, modules: list[nn.Module], names: Sequence[Collection[str]]) -> None:
        self._kinds = list(map(type, modules))
        self._sizes = list(map(len, map(vars, modules)))
        self._counts = list(map(len, names))
        self._names = list(chain.from_iterable(names))

    def values(self, modules: list[nn.Module]) -> list[object] | None:
        """The values of these attributes; None if the modules have other attributes by now."""
        dicts = list(map(vars, modules))
        if list(map(type, modules)) != self._kinds or list(map(len, dicts)) != self._sizes:
            return None
        holders = chain.from_iterable(map(repeat, dicts, self._counts))
        try:
            return list(map(dict.__getitem__, holders, self._names))
        except KeyError:
            return None


class _Places:
    """Where a few values of each tensor are, as long as shapes, strides and storages stay."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._groups: dict[torch.device, dict[torch.dtype, _Group]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.is_meta:  # offloaded: the forward refuses it
                continue
            stored = tensor.untyped_storage().nbytes() // tensor.element_size()
            size = min(tensor.numel(), stored - int(tensor.storage_offset()))  # it may be expanded
            indices, sizes, strides = self._groups.setdefault(tensor.device, {}).setdefault(
                tensor.dtype, ([], [], [])
            )
            indices.append(index)
            sizes.append((min(size, SAMPLE),))
            strides.append((max(size // SAMPLE, 1),))

    @torch.inference_mode()
    def views(self, tensors: list[Tensor]) -> Views:
        """The values, where they are. They keep the tensors' memory alive."""
        return [
            [
                list(map(torch.as_strided, [tensors[index] for index in indices], sizes, strides))
                for indices, sizes, strides in groups.values()
            ]
            for groups in self._groups.values()
        ]


_Group = tuple[list[int], list[tuple[int]], list[tuple[int]]]
"""Of tensors of one device and dtype: their indices, and the sizes and strides of their samples."""


@torch.inference_mode()
def _bytes(views: Views) -> bytes:
    found: list[Any] = [
        torch.cat([torch.cat(group).view(torch.uint8) for group in by_dtype]).cpu().numpy()
        for by_dtype in views
    ]
    return b"".join(values.tobytes() for values in found)


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
