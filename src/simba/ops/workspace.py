"""Memory that an operation uses again at its next call.

On a CPU, fresh memory costs a page fault every 4 KiB, which for the scan's chunk buffers is more
than the arithmetic on them. Devices have caching allocators and need none of this.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOCAL = threading.local()


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, valid until the same thread asks for the same name again."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    buffers: dict[Any, Tensor] = _LOCAL.__dict__
    size = math.prod(shape)
    flat = buffers.get((name, dtype))
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # a later call, outside of it, may write there as well
            flat = buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return flat[:size].view(tuple(shape))
