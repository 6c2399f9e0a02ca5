"""Strategies that share a model's weights out among processes: FSDP2 through accelerate, ZeRO through DeepSpeed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from preference.engine.forward import causal_lm
from preference.errors import PreferenceError

CONFIGS = Path(__file__).parent / "zero"


class StrategyError(PreferenceError, ValueError):
    """A strategy that cannot be had here; the message says what to install or choose."""


def strategy_options(strategy: str, world_size: int) -> dict[str, Any]:
    """What TrainingArguments take besides for `strategy`: ddp, fsdp, zero2, zero3 or zero3_offload."""
    if strategy == "ddp":
        return {}
    if world_size < 2:
        raise StrategyError(
            f"strategy={strategy} shares a model out among processes, and there is one: NPROC=2 strategy={strategy} sh "
            "torchrun/run_single_node.sh, or strategy=ddp"
        )
    if strategy == "fsdp":
        # The full state dict is what plain transformers and peft load, and any number of processes resumes from.
        config = {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": config}
    if importlib.util.find_spec("deepspeed") is None:
        raise StrategyError(
            f"strategy={strategy} needs DeepSpeed, which is not installed: pip install deepspeed, or strategy=fsdp, "
            "which shares out weights, gradients and optimizer as zero3 does and needs nothing else"
        )
    return {"deepspeed": str(CONFIGS / f"{strategy}.json")}


def join_deepspeed(strategy: str) -> None:
    """Tell DeepSpeed of the process group that accelerate has made: on CPU processes accelerate does not, and ZeRO-3
    would take each process for the only one. Before a model is loaded.
    """
    if strategy.startswith("zero") and torch.distributed.is_initialized():
        import deepspeed

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


def takes_all_ranks(trainer: Any) -> bool:
    """Whether every rank has to take part in every forward pass, generation included."""
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


def enable_on_cpu(accelerator: Any, plugin_args: dict[str, Any]) -> None:
    """Turn on FSDP2 on CPU processes: accelerate passes over it there without a word, although gloo carries it."""
    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        raise StrategyError(f"FSDP was asked for, but accelerate runs as {state.distributed_type.value}")
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def keep_float32(accelerator: Any) -> None:
    """Only products are computed in the mixed precision; what leaves a module, and gradients while they are added up
    over ranks, are float32. accelerate's own policy rounds both: sums of log-probabilities were off by 30 in bfloat16.
    """
    state = accelerator.state
    if state.mixed_precision != "no":
        computed = {"bf16": torch.bfloat16, "fp16": torch.float16}[state.mixed_precision]
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=computed, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def layer_classes(model: nn.Module) -> list[str]:
    """The classes of layers that are sharded one by one: of those that the family names, the ones in this model.

    Qwen3.5 names the layers of its vision tower too, which its text model lacks; accelerate would stop there.
    """
    lm = causal_lm(model)
    return sorted({type(module).__name__ for module in lm.modules()} & set(lm._no_split_modules or ()))


def shard_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shard a model under FSDP2 before its training, so that it can be evaluated and can generate.

    accelerate shards a model together with its optimizer only. Sharding it first is the same in-place operation, and
    training then makes the optimizer over the shards.
    """
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(model)
    model = fsdp2_prepare_model(accelerator, model)
    # Groups settle their dtypes by the weights that need a gradient then: now, not in a first forward whose adapter is
    # switched off, as the reference's is.
    fully_shard.state(model)._lazy_init()
    accelerator._models.append(model)
    register_fsdp_forward_method(model, "generate")
    return model


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass has left gathered: the last layers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def without_copies(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """A gathered state dict in which a weight that two layers share is there once, as one process saves it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in state_dict.items() if tied.get(name) not in state_dict}


def forget_preparation(model: Any) -> None:
    """Undo what an evaluation before training did to a model.

    Trainer.evaluate has accelerate prepare the model for evaluation, which marks it as prepared: training would then
    leave it out of DistributedDataParallel, and the ranks would diverge.
    """
    model._is_accelerate_prepared = False
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")
