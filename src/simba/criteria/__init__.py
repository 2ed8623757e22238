"""Criteria: rules that rank the tokens of a layer. One file each, found by name.

Every module of this package is imported here, so that a criterion is registered by writing its
file. How to write one stands in :class:`simba.criteria.Criterion`.
"""

from importlib import import_module
from pkgutil import iter_modules

from simba.criteria.attention import AttentionInfluence
from simba.criteria.base import Criterion, LayerView
from simba.criteria.chunk_local import ChunkLocal
from simba.criteria.delta import Delta
from simba.criteria.influence import Influence
from simba.criteria.random import Random
from simba.criteria.recency import Recency
from simba.criteria.registry import from_dict, make, names, parse, register, to_dict
from simba.criteria.uniform import Uniform
from simba.criteria.window import Window

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = [
    "AttentionInfluence",
    "ChunkLocal",
    "Criterion",
    "Delta",
    "Influence",
    "LayerView",
    "Random",
    "Recency",
    "Uniform",
    "Window",
    "from_dict",
    "make",
    "names",
    "parse",
    "register",
    "to_dict",
]
