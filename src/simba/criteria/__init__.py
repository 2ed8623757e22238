"""Rules that rank the tokens of a layer, one a file, found by name."""

from simba.criteria.base import Criterion, LayerView
from simba.criteria.delta import Delta
from simba.criteria.influence import Influence
from simba.criteria.random import Random
from simba.criteria.recency import Recency
from simba.criteria.registry import from_config, from_dict, names, register, to_dict
from simba.criteria.uniform import Uniform

__all__ = [
    "Criterion",
    "Delta",
    "Influence",
    "LayerView",
    "Random",
    "Recency",
    "Uniform",
    "from_config",
    "from_dict",
    "names",
    "register",
    "to_dict",
]
