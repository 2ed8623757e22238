"""Reusing prefills: :class:`simba.PromptCache` and its parts.

- ``segments.py``: what a prompt is made of, and its keys;
- ``watch.py``: whether a model is still the one that a snapshot was made with;
- ``snapshot.py``: states behind some segments, and how they are made and gone on from;
- ``files.py``: snapshots on disk;
- ``prompt_cache.py``: the cache.
"""

from simba.reuse.prompt_cache import CacheStats, PromptCache
from simba.reuse.segments import Answer
from simba.reuse.snapshot import Snapshot

__all__ = ["Answer", "CacheStats", "PromptCache", "Snapshot"]
