"""A data-parallel training on CPUs, in two processes; tests/test_train.py starts it. Also the training
itself, which the test runs in one process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch
import typer

import simba
import simba.train
from conftest import relative_error, tiny_mamba, tokens
from simba.cli import finetune


def ragged_rows(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of different lengths, each with an answer."""
    lengths = torch.randint(6, length - 1, (count,), generator=torch.Generator().manual_seed(3))
    return [
        {"input_ids": ids, "labels": ids, "prompt_length": prompt}
        for ids, prompt in zip(tokens(count, length), lengths)
    ]


def make(
    out: Path, batch_size: int, model=None, recipe=None, **options
) -> simba.train.SparseTrainer:
    """For three steps; SGD, since Adam makes large steps of rounding errors."""
    model = simba.sparsify(tiny_mamba(), 0.3) if model is None else model
    arguments = simba.train.arguments(
        out,
        **{
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "ddp_find_unused_parameters": True,  # under which DDP rebuilds outputs
            "disable_tqdm": True,
            "per_device_train_batch_size": batch_size,
            **options,
        },
    )
    rows = ragged_rows(32, 24)
    return simba.train.SparseTrainer(model, arguments, train_dataset=rows, recipe=recipe)


def train(out: Path, batch_size: int, model=None, **options) -> simba.train.SparseTrainer:
    """A trainer that has trained."""
    trainer = make(out, batch_size, model, **options)
    trainer.train()
    return trainer


def interrupted(out: Path, rank: int) -> int:
    """The step after which this process of `simba finetune` stops if the second one hears of an
    interrupt in the second step."""
    trainer = make(out, batch_size=2, save_strategy="steps")
    draw = simba.train.KeepRatios.draw

    def interrupt(self, step, *arguments, **keywords) -> float:
        if step == 1 and rank == 1:
            signal.raise_signal(signal.SIGINT)
        return draw(self, step, *arguments, **keywords)

    record = finetune._Record(out / "finetune.json", {}, None)
    with (
        unittest.mock.patch.object(simba.train.KeepRatios, "draw", interrupt),
        pytest.raises(typer.Exit),
    ):
        finetune._train(trainer, record, 3)
    assert rank == 1 or (out / "checkpoint-2" / "model.safetensors").exists()
    return trainer.state.global_step


def sharded_gradients(rank: int) -> list[float]:
    """FSDP2: relative errors of gradients, against those of one model with all rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = simba.sparsify(tiny_mamba(), 0.3).train()
    sharded = simba.sparsify(tiny_mamba(), 0.3).train()
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.backbone.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = tokens(4, 24)
    for recipe in (simba.train.Paper(), simba.train.Distil(dense=0, hidden=1)):
        simba.train.backward(sharded, ids[2 * rank : 2 * rank + 2], keep=0.3, recipe=recipe)
        simba.train.backward(whole, ids, keep=0.3, recipe=recipe)
    return [
        relative_error(ours.grad.full_tensor(), theirs.grad)
        for ours, theirs in zip(sharded.parameters(), whole.parameters())
    ]


@contextlib.contextmanager
def fsdp_on_cpus():
    """accelerate leaves out FSDP where there is no GPU; not so within this block."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    stock = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **keywords) -> None:
        stock(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with unittest.mock.patch.object(AcceleratorState, "__init__", init):
        yield


def sharded(out: Path, unsharded: simba.train.SparseTrainer) -> None:
    """FSDP2 in the Trainer does what DistributedDataParallel did: in training, in bfloat16, when it is
    saved, and when it is resumed from a checkpoint in shards."""

    def fsdp(**config) -> dict[str, object]:
        config = {"transformer_layer_cls_to_wrap": ["MambaBlock"], **config}
        return {"fsdp": True, "fsdp_config": config}

    def parameters(trainer) -> torch.Tensor:
        return torch.cat([each.full_tensor().flatten() for each in trainer.model.parameters()])

    with pytest.raises(simba.ConfigError, match="leaves out FSDP on CPUs"):
        make(out, 2, **fsdp())
    with fsdp_on_cpus():
        with pytest.raises(simba.ConfigError, match="gradient_checkpointing=True instead"):
            make(out, 2, **fsdp(activation_checkpointing=True))
        with pytest.raises(simba.ConfigError, match="FSDP1"):
            make(out, 2, **fsdp(version=1, sync_module_states=False))
        saves = {"save_strategy": "steps", "save_steps": 2}
        in_shards = {"state_dict_type": "SHARDED_STATE_DICT"}
        trained = train(out, 2, **saves, **fsdp(**in_shards))
        resumed = make(out, 2, **fsdp(**in_shards))
        resumed.train(str(out / "checkpoint-2"))
        half = train(out, 2, bf16=True, max_steps=1, **fsdp())
    expected = torch.cat([each.detach().flatten() for each in unsharded.model.parameters()])
    weights = parameters(trained)
    assert relative_error(weights, expected) < 1e-5
    assert torch.equal(parameters(resumed), weights)
    first, other = (trainer.state.log_history[0]["loss"] for trainer in (unsharded, half))
    assert other == pytest.approx(first, rel=0.02)
    with pytest.raises(simba.UnsupportedModelError, match="by FSDP"):
        simba.desparsify(trained.model)
    assert simba.status(trained.model).config.final_keep == 0.3  # and nothing is undone

    trained.save_model(str(out / "saved"))
    whole = trained.accelerator.get_state_dict(trained.model)
    if trained.is_world_process_zero():
        tokenizer = unittest.mock.Mock()
        finetune._save(trained, tokenizer, out / "by command", whole, lora=False)
    torch.distributed.barrier()
    for folder in ("saved", "by command"):
        loaded = simba.restore(type(tiny_mamba()).from_pretrained(out / folder))
        assert simba.status(loaded).config.final_keep == 0.3
        assert torch.equal(torch.cat([each.flatten() for each in loaded.parameters()]), weights)


def shared_teacher(out: Path, rank: int) -> bool:
    """Whether a teacher, of which only the first process has the weights, is whole in all."""
    teacher = simba.train.frozen_copy(simba.sparsify(tiny_mamba(), 0.3))
    if rank:
        for parameter in teacher.parameters():
            parameter.zero_()
    make(out, 2, recipe=simba.train.Distil(teacher=teacher))
    pairs = zip(teacher.parameters(), tiny_mamba().parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


if __name__ == "__main__":
    assert "transformers.trainer" not in sys.modules  # `import simba.train` is cheap
    assert "accelerate" not in sys.modules
    torch.set_num_threads(1)
    import transformers.models.mamba.modeling_mamba
    import transformers.trainer  # noqa: F401

    child = os.fork()  # two processes and one import
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
    trained = train(Path(sys.argv[1]), batch_size=2)
    assert trained.args.world_size == 2
    if trained.is_world_process_zero():
        weights = trained.accelerator.unwrap_model(trained.model).state_dict()
        losses = [entry for entry in trained.state.log_history if "keep" in entry]
        torch.save({"weights": weights, "losses": losses}, Path(sys.argv[1]) / "trained.pt")
    assert interrupted(Path(sys.argv[1]) / "stopped", trained.args.process_index) == 2
    assert max(sharded_gradients(trained.args.process_index)) < 1e-5
    assert shared_teacher(Path(sys.argv[1]) / "distilled", trained.args.process_index)
    sharded(Path(sys.argv[1]) / "sharded", trained)
    torch.distributed.destroy_process_group()
    assert child == 0 or os.waitpid(child, 0)[1] == 0
