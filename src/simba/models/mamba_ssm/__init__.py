"""mamba-ssm's own models: MambaLMHeadModel and MixerModel, of Mamba-1 or of Mamba-2 layers.

Their forwards hand keyword arguments down to the mixers, so the loop over the layers, the first and
the last norm, the embedding and the head stay mamba-ssm's own. A :class:`LayerLoop` travels along:
mixers score the tokens, choose the survivors and scan, and each block gathers the residual to
match, in one kernel with the sum and the next norm where nobody looks at what is in between. All
rows of a batch have the same length: mamba-ssm knows no padding.

States go where mamba-ssm keeps them, ``inference_params.key_value_memory_dict[layer_idx]``, in the
dtype that they have there. Decoding, also from CUDA graphs (``generate(..., cg=True)``), is
mamba-ssm's, which ignores Mamba-2's ``dt_limit`` in single steps.

Nothing here imports mamba-ssm. Pruned passes do not need causal-conv1d. mamba-ssm's own forward of
Mamba-2 layers, which runs where nothing is to be pruned, needs it, or else inference_params or
``use_mem_eff_path=False``.
"""
