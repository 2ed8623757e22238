"""What can't be sparsified, or can't be run any more, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from simba.errors import UnsupportedModelError
from simba.models.layout import of_libraries
from simba.models.swapping import SwappedClass, bases, replaced_forward


def refuse_unpatchable(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raise UnsupportedModelError for what would make a patch wrong or useless."""
    for module in modules:
        if isinstance(module, SwappedClass):
            kind = bases(module)[1]
        elif replaced_forward(module):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward has been replaced on the instance (by "
                "accelerate's prepare, torch.compile or alike); call simba.sparsify before that"
            )
        else:
            kind = type(module)
        if (found := foreign_forward(kind)) is not None:
            raise UnsupportedModelError(
                f"{found} is not the library's own: simba replaces it and would never call it. "
                "Put what it adds into a hook (register_forward_hook) or into a module around the "
                "model; if a patch for all models did this, undo the patch before simba.sparsify"
            )
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if on_meta:
        raise UnsupportedModelError(
            f"{len(on_meta)} parameters are on the meta device (the first: {on_meta[0]}), so the "
            "model has no weights to run with; load it first, e.g. with from_pretrained, without "
            "offloading to disk"
        )


def _methods_replaced(name: str) -> bool:
    """Whether a stock method of this name does not run where ours do."""
    return name in ("__call__", "step") or "forward" in name


def foreign_forward(kind: type) -> str | None:
    """The name of a method that our forwards stand in for and that is not of a library that simba
    knows: of a subclass of the user's own, or put on the library's class for everybody."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if _methods_replaced(name) and not of_libraries(value):
                return f"{base.__module__}.{base.__qualname__}.{name}"
    return None


def refuse_exchanged(layers: Sequence[nn.Module], count: int) -> None:
    """Raise UnsupportedModelError if these are not the layers that `sparsify` met."""
    again = "call simba.sparsify(model) again"
    if len(layers) != count:
        raise UnsupportedModelError(
            f"the model has {len(layers)} layers now and had {count} at simba.sparsify; {again}"
        )
    for i, layer in enumerate(layers):
        mixer = layer._modules.get("mixer")
        if not (isinstance(layer, SwappedClass) and isinstance(mixer, SwappedClass)):
            raise UnsupportedModelError(
                f"layer {i}, or its mixer, was exchanged after simba.sparsify; {again}"
            )


def refuse_offloaded(module: nn.Module) -> None:
    """Raise UnsupportedModelError if a module's weights are elsewhere until it is called, as
    accelerate's offloading has it: we read them without a call."""
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        raise UnsupportedModelError(
            f"the weight of a {type(module).__name__} is on the meta device: the model is "
            "offloaded (by accelerate's cpu_offload or a device_map), and simba's layers can't "
            "wait for weights one by one; keep the model on its devices, or run it under "
            "simba.dense"
        )
