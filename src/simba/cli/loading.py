"""Checkpoints, tokenizers and devices by name, with errors that say what is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from simba.cli.terminal import errors
from simba.errors import InputError, SimbaError
from simba.evaluate.store import Vocabulary
from simba.evaluate.texts import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedTokenizer(Tokenizer, Vocabulary, Protocol):
    """What commands need of a tokenizer of transformers."""

    all_special_tokens: Sequence[str]

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of token numbers."""


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


def load_tokenizer(name: str) -> LoadedTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: it is damaged or missing.
    """
    import transformers

    with explained(f"the tokenizer of {name!r}"):
        tokenizer: LoadedTokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # transformers makes up an empty one for a checkpoint that has none
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise InputError("the checkpoint has no files of a tokenizer")
        return tokenizer


def _refuse_mamba_ssm(config: Mapping[str, object]) -> None:
    """Refuse a checkpoint whose config.json is mamba-ssm's."""
    if "model_type" not in config and {"d_model", "n_layer"} <= config.keys():
        raise InputError(
            "it is a checkpoint of mamba-ssm, and the command line loads those of transformers "
            "only. Take one that is converted (such as state-spaces/mamba-130m-hf), or load this "
            "one in Python with mamba_ssm's MambaLMHeadModel and call simba.sparsify"
        )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into one `InputError`.

    Libraries raise exceptions of every kind here, from ``OSError`` to ``TypeError``.
    """
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, (SimbaError, OSError)) else f"{type(error).__name__}: "
        raise InputError(f"can't load {what}: {name}{error}") from error
