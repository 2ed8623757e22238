"""The recipes in transformers' Trainer."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from simba.errors import ConfigError, InputError, NotSparsifiedError
from simba.train.keep import KeepRatios
from simba.train.paper import Dense, Paper
from simba.train.recipe import Batch, Recipe, predicted
from simba.verbs import find_state

logger = logging.getLogger("simba")

COLUMNS = frozenset({"input_ids", "attention_mask", "labels", "prompt_length"})
"""What a row of the data set may have."""


def arguments(output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
    """transformers' ``TrainingArguments`` with the paper's values (A.3).

    AdamW with a learning rate of 5e-5, linear warm-up over the first tenth of 400 steps, and cosine
    decay.

    Args:
        output_dir: where checkpoints go.
        **overrides: other values, and all other arguments of ``TrainingArguments``.
    """
    values: dict[str, Any] = {
        "optim": "adamw_torch",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # below 1, a share of all steps
        "max_steps": 400,
        "ddp_find_unused_parameters": False,  # every part of a loss uses all
        "report_to": "none",
        "logging_steps": 10,
    }
    return TrainingArguments(os.fspath(output_dir), **{**values, **overrides})


class SparseTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose loss is that of a recipe.

    Each micro-batch is trained at the keep ratio that :class:`KeepRatios` draws for it. Gradients
    are taken of one part of the loss after the other, so that memory holds one forward at a time.
    Gradient checkpointing and accumulation, mixed precision, resuming, adapters of PEFT,
    DistributedDataParallel (``torchrun``, ``accelerate launch``) and FSDP2 are the Trainer's own.

    Rows of the data set have ``input_ids`` and may have ``labels``, ``attention_mask`` and
    ``prompt_length``, as for :func:`simba.train.loss`. With ``labels``, steps are means over the
    labels of all their micro-batches and devices; without, each micro-batch counts alike.

    In evaluation the loss is that of the model as it is sparsified, on its survivors. Logs have a
    mean of each part, ``loss_dense``, ``loss_pruned`` and so on, and of the keep ratios, ``keep``.

    Args:
        *arguments: those of ``Trainer``; the model must be sparsified.
        recipe: what is computed; None for :class:`Paper`.
        keep: which keep ratios are drawn; None for the paper's, with the seed of the arguments.
        **keywords: those of ``Trainer``.

    Raises:
        NotSparsifiedError: the model is not sparsified.
        ConfigError: the recipe does not fit the model, or an argument asks for what can't be
            combined with it: label smoothing, ``compute_loss_func``, DeepSpeed, FSDP1, FSDP's own
            activation checkpointing, or DataParallel, which is what the Trainer takes for several
            GPUs in one process. Or accelerate would do something else than it was asked for:
            processes that train each by itself, or FSDP on CPUs.
    """

    def __init__(
        self,
        *arguments: Any,
        recipe: Recipe | None = None,
        keep: KeepRatios | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.recipe = Paper() if recipe is None else recipe
        self.keep = KeepRatios(seed=self.args.seed) if keep is None else keep
        if not isinstance(self.recipe, Recipe) or not isinstance(self.keep, KeepRatios):
            raise ConfigError(
                "SparseTrainer takes recipe=simba.train.Paper(), Distil(...), Dense() or another "
                f"Recipe, and keep=simba.train.KeepRatios(...); got {recipe!r} and {keep!r}"
            )
        if find_state(self.model) is None:
            raise NotSparsifiedError(
                f"this {type(self.model).__name__} is not sparsified; call simba.sparsify(model) "
                "before SparseTrainer(model, ...)"
            )
        self._refuse_unfit()
        self.recipe.check(self.model)
        teacher = getattr(self.recipe, "teacher", None)
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device)
            self._share(teacher)
        self.model_accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch
        self._step, self._micro_step = -1, 0
        self._warned = False
        self._sums: dict[str, Tensor] = {}
        self._steps_noted = 0

    def _refuse_unfit(self) -> None:
        """Raise ConfigError for what can't be combined with a recipe."""
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"this process sees {self.args.n_gpu} GPUs, for which the Trainer takes "
                "DataParallel: threads that each have a copy of the model. Start one process per "
                "GPU (torchrun --nproc-per-node 2 script.py), or set CUDA_VISIBLE_DEVICES=0"
            )
        if self.args.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor does nothing to the loss of a recipe; leave it at 0"
            )
        if self.compute_loss_func is not None:
            raise ConfigError("compute_loss_func and a recipe are two losses; leave one out")
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigError(
                "DeepSpeed takes one backward pass a micro-batch, and recipes take several; use "
                "DistributedDataParallel or FSDP2"
            )
        if self.args.world_size == 1:
            _refuse_alone(self.args.device)
        self._refuse_unfit_fsdp()

    def _refuse_unfit_fsdp(self) -> None:
        """Raise ConfigError for what FSDP can't do here."""
        # accelerate sets the variable for a Trainer, and leaves it set for the next one
        told = self.args.world_size > 1 and _is_set("ACCELERATE_USE_FSDP")
        asked = self.args.fsdp or told
        if asked and not self.is_fsdp_enabled:
            raise ConfigError(
                "accelerate leaves out FSDP on CPUs, and would train by DistributedDataParallel; "
                "train on GPUs, or without fsdp and ACCELERATE_USE_FSDP in the environment"
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(
                "FSDP1 can't be combined with a recipe; take FSDP2: fsdp_config={'version': 2}, or "
                "accelerate launch --use_fsdp --fsdp_version 2"
            )
        if plugin.activation_checkpointing:
            raise ConfigError(
                "FSDP's activation_checkpointing puts other modules in the place of the layers; "
                "pass gradient_checkpointing=True instead"
            )

    def _share(self, teacher: nn.Module) -> None:
        """Give all processes the first one's teacher.

        The model is the first one's, too. Under accelerate's ``cpu_ram_efficient_loading`` no other
        process has read the checkpoint, so copies of the model hold anything.
        """
        if self.args.world_size > 1:
            from torch.distributed.tensor import DTensor

            for tensor in (*teacher.parameters(), *teacher.buffers()):
                if not isinstance(tensor, DTensor):
                    first = tensor.detach().contiguous()
                    torch.distributed.broadcast(first, 0)
                    tensor.data.copy_(first)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The recipe's loss in training, of which gradients are taken but for its last part; and
        the model's own loss otherwise."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ConfigError("SparseTrainer.compute_loss has no outputs in training")
        if "input_ids" not in inputs or not set(inputs) <= COLUMNS:
            others = ", ".join(sorted(COLUMNS - {"input_ids"}))
            raise InputError(
                f"a recipe reads the column input_ids, may read {others}, and no others, got "
                f"{', '.join(sorted(inputs))}"
            )
        batch = Batch.make(
            inputs["input_ids"],
            inputs.get("attention_mask"),
            labels=inputs.get("labels"),
            prompt_length=inputs.get("prompt_length"),
            items=num_items_in_batch,
        )
        self._warn_of_short_prompts(batch)
        keep = self._draw()
        # What the Trainer does with the loss that is returned to it, for the parts that are not.
        micro_steps: int = self.current_gradient_accumulation_steps
        share = 1 / micro_steps if num_items_in_batch is None else 1.0
        # The Trainer leaves this to compute_loss: gradients are averaged over processes.
        scale = 1.0
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale = float(self.accelerator.num_processes)
        self._note("keep", torch.tensor(keep / micro_steps))
        *firsts, last = self.recipe.terms(model, batch, keep)
        total: Tensor | float = 0.0
        with self.accelerator.autocast():
            for term in firsts:
                with self._unsynchronized(model):
                    part = scale * term.compute()
                    self.accelerator.backward(share * term.weight * part)
                self._note(f"loss_{term.name}", share * part)
                total = total + term.weight * part.detach()
            part = scale * last.compute()
        self._note(f"loss_{last.name}", share * part)
        return total + last.weight * part

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the losses of a step are divided by: the labels that a token in front predicts.

        The Trainer also counts labels of padding, and that of the first token behind it.
        """
        counted = []
        for each in batch_samples:
            labels, mask = each.get("labels"), each.get("attention_mask")
            if labels is not None and (mask is None or mask.shape == labels.shape):  # else refused
                each = {**each, "labels": predicted(labels, mask)}
            counted.append(each)
        return super()._get_num_items_in_batch(counted, device)

    def _warn_of_short_prompts(self, batch: Batch) -> None:
        """Say once that a micro-batch has only prompts that the configuration never prunes."""
        state = find_state(self.model)
        assert state is not None
        least, lengths = state.config.min_tokens, batch.prompt_length
        longest = max(lengths) if lengths else batch.input_ids.shape[1]
        if not self._warned and not isinstance(self.recipe, Dense) and longest <= least > 1:
            self._warned = True
            logger.warning(
                "the longest prompt of a micro-batch has %d tokens, and every layer keeps at least "
                "%d (min_tokens), so nothing of it is pruned, whatever keep ratio is drawn",
                longest,
                least,
            )

    def _draw(self) -> float:
        """The keep ratio of the next micro-batch."""
        step = self.state.global_step
        if step == self._step:
            self._micro_step += 1
        else:
            self._step, self._micro_step = step, 0
            self._steps_noted += 1
        progress = step / max(self.state.max_steps, 1)
        return self.keep.draw(step, self._micro_step, progress=progress)

    def _unsynchronized(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over processes with the last part of the loss.

        FSDP2 does that with each part, since it can't tell the parts of a step apart.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, under FSDP from all its shards.

        Where checkpoints are sharded (accelerate's default), the Trainer would save none here.
        """
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        from torch.distributed.fsdp import StateDictType

        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir)
        finally:
            plugin.state_dict_type = before

    def _note(self, name: str, value: Tensor) -> None:
        """Add to a value that the next log shows."""
        known = self._sums.get(name)
        self._sums[name] = value.detach() if known is None else known + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with the training's loss, means of its parts and of the keep ratios since then."""
        if "loss" in logs and self._steps_noted:
            for name, value in self._sums.items():
                mean = self.accelerator.reduce(value.to(self.args.device), "mean")
                logs[name] = round(float(mean) / self._steps_noted, 6)
            self._sums, self._steps_noted = {}, 0
        super().log(logs, start_time)


LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun, and the mpirun of MPICH, Open MPI and MVAPICH, say how many processes they start.
On GPUs accelerate does not read MPI's."""


def _refuse_alone(device: torch.device) -> None:
    """Raise ConfigError if this process was started as one of several, but knows of no other."""
    for name in LAUNCHED:
        processes = int(os.environ.get(name) or "1")
        if processes <= 1:
            continue
        cause = "there is no GPU; pass use_cpu=True to train together on CPUs"
        if device.type == "cuda":  # of which accelerate shares none unless it is told which
            cause = "LOCAL_RANK is not set; start them with torchrun, which sets it"
        raise ConfigError(
            f"{name} says that this is one of {processes} processes, but each would train by "
            f"itself, because {cause}. If that is what you want, unset {name}"
        )
    # It sets the address for --num_processes above 1, but no WORLD_SIZE, and starts one process.
    alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if alone and _is_set("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; start "
            "several with torchrun or accelerate launch --multi_gpu, and pass use_cpu=True. If one "
            "is what you want, unset MASTER_ADDR"
        )


def _is_set(name: str) -> bool:
    """Whether accelerate's variable of the environment is true."""
    return os.environ.get(name, "").lower() == "true"
