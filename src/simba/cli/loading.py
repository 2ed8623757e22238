"""Checkpoints, tokenizers and devices by name, with errors that say what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from simba.cli.terminal import errors
from simba.errors import InputError
from simba.evaluate.tokenizers import LoadedTokenizer, explained, load_tokenizer

__all__ = ["DTYPES", "LoadedTokenizer", "explained", "find_device", "load_model", "load_tokenizer"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device of this name; ``"auto"`` is the GPU if there is one.

    Raises:
        InputError: this machine has no such device, or it holds no values (meta).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if torch.device(name).type == "meta":
        raise InputError("--device meta: nothing can be measured on a device that holds no values")
    return torch.device(name)


def load_model(name: str, dtype: str, device: torch.device) -> nn.Module:
    """A causal language model in evaluation mode.

    Raises:
        InputError: no such data type, or the checkpoint is damaged, incomplete, missing, or in
            mamba-ssm's format.
    """
    import transformers

    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with errors.status(f"loading {name}"):
        with explained(f"the model {name!r}"):
            _refuse_mamba_ssm(transformers.PretrainedConfig.get_config_dict(name)[0])
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the error below can name them
            )
            # transformers fills in random numbers for what a checkpoint lacks
            lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            if lacking:
                raise InputError(
                    f"the checkpoint lacks {len(lacking)} of the model's weights, or has them in "
                    f"another shape, among them {', '.join(lacking[:3])}"
                )
        with explained(f"the model {name!r} to {device}"):
            loaded: nn.Module = model.to(device).eval()
            return loaded


def _refuse_mamba_ssm(config: Mapping[str, object]) -> None:
    """Refuse a checkpoint whose config.json is mamba-ssm's."""
    if "model_type" not in config and {"d_model", "n_layer"} <= config.keys():
        raise InputError(
            "it is a checkpoint of mamba-ssm, and the command line loads those of transformers "
            "only. Take one that is converted (such as state-spaces/mamba-130m-hf), or load this "
            "one in Python with mamba_ssm's MambaLMHeadModel and call simba.sparsify"
        )
