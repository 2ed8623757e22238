"""Fingerprints: short hashes of a model's weights, and of tensors."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint_weights(model: nn.Module) -> str:
    """Hash of everything that a loaded model's results depend on.

    That is the names, shapes, dtypes and bytes of its parameters and buffers, and its
    configuration. It takes about a second per GB.
    """
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, (tensor for _, tensor in tensors))
        parts = [
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}"
            for (name, tensor), digest in zip(tensors, digests, strict=True)
        ]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        settings = config.to_diff_dict()
        # not where it came from, and not how it was pruned when saved: experiments set that anew
        for name in ("_name_or_path", "architectures", "dtype", "simba", "transformers_version"):
            settings.pop(name, None)
        parts.append(json.dumps(settings, sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content: Any = plain.numpy()
    return hashlib.sha256(content).hexdigest()
