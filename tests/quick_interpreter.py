"""Triton's interpreter with less work around each operation. tests/conftest.py imports this module.

The interpreter computes with numpy, on small blocks, so nearly all of its time goes into what
surrounds numpy's work: it makes the same types and the same shapes of tensors over and over, patches
Triton's language in every call of a device function, and computes sums of integers in int64 for
assertions that it then leaves out. Here each type is made once, the language is patched once in a
launch, and what is left out isn't computed. The kernels' results stay the same to the bit. Kernels
can't be compiled behind this module.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

assert os.environ["TRITON_INTERPRET"] == "1"

# --- The language is patched once in a launch -----------------------------------------------------


def _builtins(where: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(where) if tl.core.is_builtin(member)]


_DESCRIPTORS = getattr(tl.core, "tensor_descriptor_base", tl.core.tensor)  # not in every Triton
_PLACES = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor, _DESCRIPTORS)
_NAMES = {place: _builtins(place) for place in _PLACES}
assert all(_NAMES[place] for place in (tl, tl.core, tl.tensor))  # none was patched before


def _patch_builtin(where: Any, builder: Any, scope: Any) -> None:
    if where not in _NAMES:
        _NAMES[where] = _builtins(where)
    for name in _NAMES[where]:
        member = getattr(where, name)
        if tl.core.is_builtin(member):
            _patch_attr(where, name, member, builder, scope)


_WRAPPER = tl.load.__code__  # which all functions of the language share: it checks `_semantic`


def _patch_attr(where: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    semantic = TritonSemantic(builder)
    function = member.__wrapped__ if member.__code__ is _WRAPPER else member

    def patched(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=semantic, **kwargs)

    scope.set_attr(where, name, patched)


_MODULES: dict[Any, list[Any]] = {}  # of the language, that a device function sees


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    modules = _MODULES.get(self.fn)
    if modules is None:
        seen = [value for value in self.fn.__globals__.values() if inspect.ismodule(value)]
        modules = _MODULES[self.fn] = [module for module in (tl, tl.core) if module in seen]
    if any(tl.core.is_builtin(module.load) for module in modules):
        interpreter._patch_lang(self.fn)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter._patch_builtin = _patch_builtin
interpreter.InterpretedFunction.__call__ = _call_device_function

# --- Types are made once, and so are the shapes of their tensors ----------------------------------

_BLOCKS: dict[Any, Any] = {}
_NUMPY: dict[str, Any] = {}
_make_block_type = tl.block_type.__init__
_make_tensor = tl.tensor.__init__
_equal_types = tl.dtype.__eq__
_numpy_dtype = interpreter._get_np_dtype


def _new_block_type(cls: Any, element_ty: Any, shape: Any) -> Any:
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    key = element_ty.name, getattr(element_ty, "address_space", None), sizes
    made = _BLOCKS.get(key)
    if made is None:
        made = object.__new__(cls)
        _make_block_type(made, element_ty, shape)
        _BLOCKS[key] = made
    return made


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    members = type.__dict__.get("members_of_tensors")
    if members is None:
        _make_tensor(self, handle, type)
        type.members_of_tensors = {n: v for n, v in self.__dict__.items() if n != "handle"}
    else:
        self.__dict__.update(members)
        self.handle = handle


def _init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data = data
    self.dtype = dtype
    self.attr = {} if attr is None else attr
    if not isinstance(dtype, tl.pointer_type) and 8 * data.itemsize > dtype.primitive_bitwidth:
        self.__post_init__()  # raises if the data are wider than their type


def _equal(self: Any, other: Any) -> bool:
    if isinstance(other, tl.dtype):
        return self is other or self.name == other.name
    return _equal_types(self, other)


def _get_np_dtype(type: Any) -> Any:
    made = _NUMPY.get(type.name)
    if made is None:
        made = _NUMPY[type.name] = _numpy_dtype(type)
    return made


tl.block_type.__new__ = _new_block_type
tl.block_type.__init__ = lambda self, element_ty, shape: None
tl.tensor.__init__ = _init_tensor
tl.dtype.__eq__ = _equal
interpreter.TensorHandle.__init__ = _init_handle
interpreter._get_np_dtype = _get_np_dtype

# --- What two operands are broadcast to is found out once -----------------------------------------

_COMMON: dict[tuple[str, str], tuple[Any, Any]] = {}
_broadcast = TritonSemantic.broadcast_impl_value


def _spread(semantic: TritonSemantic, value: Any, type: Any) -> Any:
    if value.type is type:
        return value
    if value.type.is_block():
        handle = semantic.builder.create_broadcast(value.handle, list(type.shape))
    else:
        handle = semantic.builder.create_splat(type, value.handle)
    return tl.tensor(handle, type)


def _broadcast_impl_value(self: TritonSemantic, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    left, right = lhs.type, rhs.type
    blocks = left.is_block() + right.is_block()
    if left is right or not blocks:
        return lhs, rhs
    common = _COMMON.get((left.name, right.name))
    if common is not None:
        return _spread(self, lhs, common[0]), _spread(self, rhs, common[1])
    lhs, rhs = _broadcast(self, lhs, rhs)
    if blocks == 1 or len(left.shape) == len(right.shape):
        _COMMON[left.name, right.name] = lhs.type, rhs.type
    return lhs, rhs


TritonSemantic.broadcast_impl_value = _broadcast_impl_value

# --- Operands of the same types are checked once, and a constant is made once ---------------------

_UNCHANGED: set[Any] = set()  # types and options with which no operand is cast
_CONSTANTS: dict[Any, Any] = {}
_check_operands = TritonSemantic.binary_op_type_checking_impl


def _binary_op_type_checking_impl(
    self: TritonSemantic,
    lhs: Any,
    rhs: Any,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> tuple[Any, Any]:
    options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
    kind = type(rhs)
    if type(lhs) is tl.tensor and kind is tl.tensor:
        key: Any = lhs.type.name, rhs.type.name, options
        if key in _UNCHANGED:
            return self.broadcast_impl_value(lhs, rhs)
        left, right = _check_operands(self, lhs, rhs, *options)
        if left.type.scalar == lhs.type.scalar and right.type.scalar == rhs.type.scalar:
            _UNCHANGED.add(key)
        return left, right
    if type(lhs) is tl.tensor and kind in (int, float):
        key = lhs.type.name, rhs.hex() if kind is float else rhs, options  # -0.0 is not 0.0
        constant = _CONSTANTS.get(key)
        if constant is not None:
            return lhs, constant
        left, right = _check_operands(self, lhs, rhs, *options)
        if left is lhs:
            right.handle.data.flags.writeable = False
            _CONSTANTS[key] = right
        return left, right
    return _check_operands(self, lhs, rhs, *options)


TritonSemantic.binary_op_type_checking_impl = _binary_op_type_checking_impl

# --- Sums for assertions that are left out aren't computed ----------------------------------------

_options = interpreter.interpreter_builder.options
assert not _options.debug
interpreter.interpreter_builder.options = dataclasses.replace(_options, sanitize_overflow=False)
