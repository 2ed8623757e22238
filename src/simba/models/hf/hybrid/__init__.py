"""Hybrids of state-space layers and attention in transformers (5.17 to 5.23).

Here the stock backbone runs the layers, and every layer its stock forward. A sparse backbone makes
the plan, and hands the layers a :class:`~simba.models.hf.hybrid.run.HybridRun` in the keyword
``simba``. A sparse layer gives its attention the causal mask of the tokens that *this* layer has,
and its state-space mixer a :class:`~simba.models.hf.hybrid.run.LayerPart`, in the place of the
padding mask, which all families hand on. The mixer scores the tokens, and the layer passes on the
survivors.

Layers without a state-space mixer can't score: there the ratio is held
(:func:`simba.schedules.hold`). Survivors keep the positions that they have in the input. The cache
becomes a :class:`~simba.models.hf.hybrid.cache.PrunedCache`, since its layers hold different
numbers of tokens.

A family is one file: which attributes of its layers are what.
"""
