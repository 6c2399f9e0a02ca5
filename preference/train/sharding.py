"""Strategies that share a model's weights out among processes: FSDP2 through accelerate, ZeRO through DeepSpeed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from preference.errors import PreferenceError

CONFIGS = Path(__file__).resolve().parents[2] / "torchrun"


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


class Sharded:
    """Mixin for `transformers.Trainer`: under FSDP2 a model can be evaluated, and can generate, before it is trained.

    accelerate shards a model together with its optimizer only. Sharding it first is the same in-place operation, and
    `train` then makes the optimizer over the shards.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            self._shard_on_cpu()

    def _shard_on_cpu(self) -> None:
        """accelerate passes over FSDP on CPU processes without a word, although FSDP2 works there through gloo."""
        state = self.accelerator.state
        if state.distributed_type != DistributedType.MULTI_CPU:
            raise StrategyError(f"FSDP was asked for, but accelerate runs as {state.distributed_type.value}")
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def shard(self) -> None:
        """Share the weights out now, where the strategy does so and it has not been done."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.model = self.model_wrapped = fsdp2_prepare_model(self.accelerator, self.model)
            self.accelerator._models.append(self.model)
            register_fsdp_forward_method(self.model, "generate")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Gathered from its shards, a weight that two layers share comes twice; it is saved once, as by one process."""
        if state_dict is not None:
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
            state_dict = {name: w for name, w in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass leaves the last layers gathered; the optimizer is for the shards."""
        if self.is_fsdp_enabled:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return super().create_optimizer(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The engine that DeepSpeed makes for an evaluation under stage 3 cannot train, and it would be kept."""
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            self.deepspeed.destroy()
            self.deepspeed, self.model_wrapped = None, self.model
            self.accelerator._models.clear()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.shard()
        before_training = self.is_deepspeed_enabled and self.deepspeed is None and not is_deepspeed_zero3_enabled()
        if not before_training:
            return super().evaluation_loop(*args, **kwargs)
        # DeepSpeed makes an engine for training or for stage 3 only; until then each rank holds the whole model.
        self.is_deepspeed_enabled = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._forget_evaluation()
            self.is_deepspeed_enabled = True
