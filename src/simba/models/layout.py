"""What a captured prefill relies on: where the weights are, which code runs, which settings hold.

A CUDA graph replays kernels and knows nothing of Python. So simba captures only models whose
modules it knows, with nothing on them that may behave differently the next time. With every replay
it checks that all of this is unchanged.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from itertools import chain
from numbers import Number
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from simba.criteria import Criterion

# --- settings -------------------------------------------------------------------------------------


def numerics() -> Hashable:
    """The settings of PyTorch that decide which kernels run and how they round."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _read(torch.utils.deterministic, "fill_uninitialized_memory"),
        _read(torch, "get_float32_matmul_precision", call=True),
        _read(torch.backends.cuda, "preferred_blas_library", call=True),
        *(_read(torch.backends, name) for name in ("fp32_precision",)),
        *(_read(matmul, name) for name in _MATMUL),
        *(_read(cudnn, name) for name in _CUDNN),
        _read(getattr(cudnn, "conv", None), "fp32_precision"),
    )


_MATMUL = (
    "allow_tf32",
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "fp32_precision",
)
_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32", "fp32_precision")


def attention_numerics() -> Hashable:
    """The same for PyTorch's attention: which of its kernels may run, and in which order."""
    order: Any = _read(torch._C, "_get_sdp_priority_order", call=True)  # a list
    return (
        *(_read(torch.backends.cuda, name, call=True) for name in _ATTENTION),
        None if order is None else tuple(order),
    )


_ATTENTION = (
    "flash_sdp_enabled",
    "mem_efficient_sdp_enabled",
    "math_sdp_enabled",
    "cudnn_sdp_enabled",
    "fp16_bf16_reduction_math_sdp_allowed",
)


def _read(where: Any, name: str, call: bool = False) -> Hashable:
    """A setting; None if this PyTorch does not have it.

    It is also None if PyTorch refuses to tell, because it was set by its newer name. That one is
    read as well.
    """
    try:
        value = getattr(where, name)
        return value() if call else value  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        return None


def watched() -> bool:
    """Whether a mode of PyTorch sees every operation, in order to count, log or replace it.

    (A mode sets the default device, too. That one does not matter to a graph.)
    """
    functions, operations = torch._C._len_torch_function_stack(), _operation_modes()
    if not functions and not operations:
        return False
    modes: Any = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return operations or any(type(mode).__name__ != "DeviceContext" for mode in modes)


def _operation_modes() -> bool:
    early = torch._C.DispatchKey.PreDispatch  # modes in front of autograd have a stack of their own
    included: bool = torch._C._dispatch_tls_is_dispatch_key_included(early)
    return included or torch._C._len_torch_dispatch_stack() > 0


# --- code -----------------------------------------------------------------------------------------

LIBRARIES = frozenset({"torch", "transformers", "mamba_ssm", "simba"})
"""Packages whose code simba knows."""


def of_libraries(value: Any) -> bool:
    """Whether ``value`` holds no code but that of the libraries, wrappers included."""
    if isinstance(value, property):
        value = value.fget
    while callable(value) and not isinstance(value, type):
        name: str = getattr(value, "__globals__", {}).get("__name__", "")
        if name.partition(".")[0] not in LIBRARIES:
            return False
        value = getattr(value, "__wrapped__", None)
    return True


GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)

_KINDS = {
    *(nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm, nn.ModuleList, nn.Identity),
    *(nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid),
}
_PLACES = (
    "transformers.activations",
    "transformers.models.mamba.",
    "transformers.models.mamba2.",
    "transformers.models.falcon_mamba.",
    "transformers.models.bamba.",
    "transformers.models.falcon_h1.",
    "transformers.models.granitemoehybrid.",
    "transformers.models.nemotron_h.",
    "transformers.models.zamba2.",
    "mamba_ssm.",
)
"""Modules in which the other known kinds are defined."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
MEANS_NOTHING = _OF_EVERY_MODULE - {"training"} | {"_is_hf_initialized"}
"""Attributes of modules that are no settings: weights, children, hooks, ..."""
_NOR_IN_TORCH = MEANS_NOTHING | {"training", "in_features", "out_features"}


def criterion_fault(criterion: Criterion) -> str | None:
    """Why a criterion's scores can't be replayed; None if they can."""
    return next(filter(None, map(_criterion_fault, criterion.parts)), None)


def _criterion_fault(criterion: Criterion) -> str | None:
    """The same of a single part."""
    kind = type(criterion)
    if not vars(kind).get("replayable", False):
        return f"the criterion {kind.__qualname__} is not declared replayable"
    score = vars(kind).get("score")
    if "score" in vars(criterion) or (
        kind.__module__.startswith("simba.") and not of_libraries(score)
    ):
        return f"somebody patched the criterion {kind.__qualname__}"
    try:
        hash(criterion)
    except TypeError:
        return f"the criterion {kind.__qualname__} is not hashable: make it a frozen dataclass"
    return None


def fault(root: nn.Module) -> str | None:
    """Why a prefill of this backbone can't be captured; None if it can.

    A backbone may have reasons of its own, ``graph_fault()``, and ``graph_kinds``, kinds of modules
    that it has besides those that are known.
    """
    if any(GLOBAL_HOOKS):
        return "there are global hooks on modules"
    devices = {str(tensor.device) for tensor in chain(root.parameters(), root.buffers())}
    if len(devices) > 1:
        return f"the model lies on {' and '.join(sorted(devices))}, and a graph is of one device"
    also: Container[type] = getattr(root, "graph_kinds", ())
    known: set[type] = set()
    for name, module in root.named_modules():
        problem = _fault_of(module, known, also)
        if problem is not None:
            return f"{name or 'the backbone'} {problem}"
    own: Callable[[], str | None] | None = getattr(root, "graph_fault", None)
    return None if own is None else own()


def _fault_of(module: nn.Module, known: set[type], also: Container[type] = ()) -> str | None:
    kind = type(module)
    if kind not in known and not _known(kind, also):
        return f"is a {kind.__module__}.{kind.__qualname__}, or somebody patched that"
    known.add(kind)
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if "_hf_hook" in vars(module):
        return "has a hook of accelerate's, as a device_map puts them on every module"
    if module.training and kind not in _KINDS:
        return "is in training mode"
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE:
            continue
        inherited = getattr(kind, name, None)
        if callable(inherited) or (callable(value) and hasattr(kind, name)):
            return f"has a {name} of its own"
        if not (_is_code(value) or _is_config(value) or is_plain(value)):
            return f"holds {type(value).__qualname__} {name}, which may change unseen"
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if type(tensor) not in (Tensor, nn.Parameter, type(None)):
            return f"holds {name} as {type(tensor).__qualname__}"
    return None


def _known(kind: type, also: Container[type]) -> bool:
    """Whether this is a known class that nobody patched or decorated."""
    called = (vars(base).get(name) for base in kind.__mro__ for name in ("forward", "__call__"))
    if not all(map(of_libraries, called)):
        return False
    if len(kind.__bases__) == 2 and _is_found(kind.__bases__[0], ("simba.models.",)):
        if not all(map(of_libraries, vars(kind).values())):  # of ours, `sparsify` adds no others
            return False
        kind = kind.__bases__[1]
    return kind in _KINDS or kind in also or _is_found(kind, _PLACES)


def _is_found(kind: type, places: tuple[str, ...]) -> bool:
    """Whether this very class is found by its name in one of these places."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith(places) and getattr(module, kind.__qualname__, None) is kind


def _is_code(value: Any) -> bool:
    return isinstance(
        value, types.FunctionType | types.BuiltinFunctionType | types.ModuleType | type
    ) or type(value).__module__.startswith("simba.")


def _is_config(value: Any) -> bool:
    return type(value).__module__.startswith("transformers.") and hasattr(value, "to_dict")


def _is_constant(value: Any) -> bool:
    kinds = str | bytes | Number | None | torch.dtype | torch.device
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    return isinstance(value, kinds)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or the like, or a collection of such."""
    if isinstance(value, dict):
        return all(map(_is_constant, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return _is_constant(value)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes of plain types (numbers, strings, lists of them, ...), by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and is_plain(value)
    }


# --- layout ---------------------------------------------------------------------------------------


class Layout:
    """A backbone's modules, weights and attributes, and the code of its classes.

    It is compared with every replay. A model of 64 layers has hundreds of modules and thousands of
    attributes, so the comparison is written as loops that Python runs in C.
    """

    def __init__(self, root: nn.Module, criterion: Criterion | None = None) -> None:
        self._modules = list(root.modules())
        self._types = list(map(type, self._modules))
        self._dicts = list(map(vars, self._modules))
        self._sizes = list(map(len, self._dicts))
        self._child_dicts = list(filter(None, map(_children, self._modules)))
        self._children = list(values_of(self._child_dicts))
        both = (tensors for m in self._modules for tensors in (m._parameters, m._buffers))
        self._tensor_dicts = list(filter(None, both))
        tensors = self._tensors()
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._shapes = list(map(_shape, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._memory = list(map(Tensor.detach, tensors))

        attributes = [(vars(m), name) for m in self._modules for name in _attributes(m)]
        configs = {id(value): value for value in values_of(self._dicts) if _is_config(value)}
        attributes += [(vars(config), name) for config in configs.values() for name in vars(config)]
        self._holders = [holder for holder, _ in attributes]
        self._names = [name for _, name in attributes]
        self._attributes = list(map(dict.get, self._holders, self._names))
        mutable = [v for v in self._attributes if isinstance(v, list | dict | set) and is_plain(v)]
        self._contents = [(value, copy.deepcopy(value)) for value in mutable if value]

        rules = [] if criterion is None else map(type, criterion.parts)
        kinds = {base for kind in {*self._types, *rules} for base in kind.__mro__}
        self._kinds = list(kinds - {object})
        self._functions = list(_functions(self._kinds))

    def _tensors(self) -> list[Any]:
        return [tensor for tensor in values_of(self._tensor_dicts) if tensor is not None]

    def unchanged(self) -> bool:
        """Whether everything is as it was, except for the values of weights."""
        tensors = self._tensors()
        return (
            list(map(type, self._modules)) == self._types
            and not any(GLOBAL_HOOKS)
            and not any(map(_hooks, self._modules))
            and not any(map(_pre_hooks, self._modules))
            and _same(values_of(self._child_dicts), self._children)
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and list(map(_dtype, tensors)) == self._dtypes
            and list(map(_shape, tensors)) == self._shapes
            and list(map(Tensor.stride, tensors)) == self._strides
            and list(map(len, self._dicts)) == self._sizes
            and _same(map(dict.get, self._holders, self._names), self._attributes)
            and all(now == before for now, before in self._contents)
            and _same(_functions(self._kinds), self._functions)
        )


_dtype, _shape = attrgetter("dtype"), attrgetter("shape")
_children = attrgetter("_modules")
_hooks, _pre_hooks = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")


def _attributes(module: nn.Module) -> list[str]:
    """Names of a module's attributes that may matter, other than parameters, buffers and hooks."""
    others = _NOR_IN_TORCH if type(module) in _KINDS else MEANS_NOTHING
    return [name for name in vars(module) if name not in others]


def values_of(dicts: Iterable[Any]) -> Iterator[Any]:
    """The values of these dicts, one after another."""
    return chain.from_iterable(map(dict.values, dicts))


def _functions(kinds: Iterable[type]) -> Iterator[Any]:
    return chain.from_iterable(vars(kind).values() for kind in kinds)


def _same(now: Iterable[Any], before: list[Any]) -> bool:
    now = list(now)
    return len(now) == len(before) and all(map(is_, now, before))
