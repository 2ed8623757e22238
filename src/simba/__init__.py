"""simba makes pretrained Mamba language models faster at long prompts, without training.

    from simba import sparsify
    model = sparsify(model, final_keep=0.1)

Implements "Sparsified State-Space Models are Efficient Highway Networks" (Song et al., TMLR 2025).
"""

from simba import criteria, fates
from simba.config import SimbaConfig
from simba.errors import (
    BackendError,
    ConfigError,
    InputError,
    NotSparsifiedError,
    SimbaError,
    UnsupportedModelError,
)
from simba.introspection import flops, record, status, summary
from simba.prefill_progress import progress
from simba.protect import Protect
from simba.reuse import Answer, CacheStats, PromptCache, Snapshot
from simba.schedules import Curve, PruneAt
from simba.tuning import Trial, Tuned, tune
from simba.verbs import dense, desparsify, restore, sparsify
from simba.version import __version__

__all__ = [
    "Answer",
    "BackendError",
    "CacheStats",
    "ConfigError",
    "Curve",
    "InputError",
    "NotSparsifiedError",
    "PromptCache",
    "Protect",
    "PruneAt",
    "SimbaConfig",
    "SimbaError",
    "Snapshot",
    "Trial",
    "Tuned",
    "UnsupportedModelError",
    "__version__",
    "criteria",
    "dense",
    "desparsify",
    "fates",
    "flops",
    "progress",
    "record",
    "restore",
    "sparsify",
    "status",
    "summary",
    "tune",
]
