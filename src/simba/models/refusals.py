"""Checks of a model: errors for what simba can't sparsify, or can no longer run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from simba.errors import UnsupportedModelError
from simba.models.layout import of_libraries
from simba.models.swapping import SwappedClass, mixin_and_stock, replaced_forward


def refuse_unpatchable(model: nn.Module, modules: list[nn.Module]) -> None:
    """Check that changing the classes of ``modules`` will have its effect, and no other.

    Raises:
        UnsupportedModelError: a module has a forward of its own, a class has a forward that is not
            the library's, or parameters are on the meta device.
    """
    for module in modules:
        if isinstance(module, SwappedClass):
            kind = mixin_and_stock(module)[1]
        elif replaced_forward(module):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward has been replaced on the instance (by "
                "accelerate's prepare, torch.compile or the like); call simba.sparsify before that"
            )
        else:
            kind = type(module)
        if (found := foreign_forward(kind)) is not None:
            raise UnsupportedModelError(
                f"{found} is not the library's own. simba takes its place and would never call it. "
                "Put what it adds into a hook (register_forward_hook) or into a module around the "
                "model; if it comes from a patch of the library, undo that before simba.sparsify"
            )
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if on_meta:
        raise UnsupportedModelError(
            f"{len(on_meta)} parameters are on the meta device (the first: {on_meta[0]}), so the "
            "model has no weights to run with; load it first, e.g. with from_pretrained, without "
            "offloading to disk"
        )


def _methods_replaced(name: str) -> bool:
    """Whether our forwards run in the place of a stock method of this name."""
    return name in ("__call__", "step") or "forward" in name


def foreign_forward(kind: type) -> str | None:
    """The name of a method that simba would replace and that no library it knows has written.

    It may belong to a subclass of the user's, or to a patch of the library's class. None if there
    is none.
    """
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if _methods_replaced(name) and not of_libraries(value):
                return f"{base.__module__}.{base.__qualname__}.{name}"
    return None


def refuse_exchanged(layers: Sequence[nn.Module], count: int) -> None:
    """Check that these are the ``count`` layers that :func:`simba.sparsify` changed.

    Raises:
        UnsupportedModelError: there are more or fewer, or others.
    """
    again = "call simba.sparsify(model) again"
    if len(layers) != count:
        raise UnsupportedModelError(
            f"the model has {len(layers)} layers now and had {count} at simba.sparsify; {again}"
        )
    for i, layer in enumerate(layers):
        mixer = layer._modules.get("mixer")
        if not (isinstance(layer, SwappedClass) and isinstance(mixer, SwappedClass)):
            raise UnsupportedModelError(
                f"layer {i} or its mixer was exchanged after simba.sparsify; {again}"
            )


def refuse_offloaded(module: nn.Module) -> None:
    """Check that a module's weights are there, since simba reads them without calling the module.

    Raises:
        UnsupportedModelError: they arrive only when the module is called (accelerate's offloading).
    """
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        raise UnsupportedModelError(
            f"the weight of a {type(module).__name__} is on the meta device: the model is "
            "offloaded (by accelerate's cpu_offload or a device_map), and simba reads weights "
            "before accelerate would load them; keep the model on its devices, or run it under "
            "simba.dense"
        )
