"""GuardedTrainer: what both engines need of transformers.Trainer that it does not do itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from preference.launch.signals import StoppedBySignal
from preference.models.adapters import FROZEN, activate_both
from preference.models.names import strip_folders
from preference.optimization.lora_plus import raise_rate_of_b
from preference.optimization.schedules import make_schedule
from preference.train import sharding
from preference.train.checkpoints import CheckpointWriter
from preference.train.held import HeldHalves
from preference.train.moving import MovingAverage
from preference.train.stalls import waiting_for_rows
from preference.train.watchdog import Watchdog

NEEDED = (
    "get_batch_samples", "_get_grad_norm", "_save_checkpoint", "_get_output_dir", "_run_epoch", "_evaluate",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler",
)  # fmt: skip
if missing := [name for name in NEEDED if not hasattr(Trainer, name)]:
    raise ImportError(
        f"this transformers' Trainer has no {', '.join(missing)}; this toolkit is written for 5.17 to 5.23"
    )


class GuardedTrainer(Trainer):
    """A Trainer that stops before it does harm, and whose checkpoints are complete or not there.

    PairTrainer is one, and so are TRL's trainers as engine=trl runs them. It overrides

    - get_batch_samples: rows that do not come are reported (train/stalls.py);
    - _get_grad_norm: called between the gradient and the optimizer step, whether it clips or not; the only place where
      losses and gradients are known and the weights are still good (train/watchdog.py);
    - log: no line is written of a step before the watchdog knows it to be good;
    - _save_checkpoint, _get_output_dir: a checkpoint is written elsewhere, verified and renamed
      (train/checkpoints.py). An on_save callback comes after the folder has its name and cannot stop a bad one;
    - _load_optimizer_and_scheduler: a moving average of the weights resumes with them (train/moving.py);
    - _load_from_checkpoint: the Trainer switches every adapter off but one;
    - _run_epoch: resumed from the last step's checkpoint, or from where it had stopped early, the Trainer would train a
      step too many;
    - _evaluate: an evaluation that a signal breaks off ends in a checkpoint (train/stopping.py);
    - create_accelerator_and_postprocess: accelerate passes over FSDP and float16 on CPU processes, and under FSDP
      rounds log-probabilities and gradients to the mixed precision (train/sharding.py);
    - create_scheduler: the warm-up starts above 0 (optimization/schedules.py);
    - create_optimizer: the optimizer is made over the shards, and a forward pass leaves some layers gathered;
    - _save: gathered from its shards, a weight that two layers share comes twice; and PEFT writes the base model's
      whole path into what others will read;
    - train, evaluation_loop: a model may be evaluated before it is trained, which accelerate does not expect under
      DistributedDataParallel, FSDP2 and DeepSpeed. `eval_on_start` is no way around it: it evaluates what training
      has been resumed from, where the model as it was before training is wanted.

    Attributes:
        watchdog, checkpoints: plain objects that do the work.
        loraplus_lr_ratio: how much faster the B of an adapter learns than its A; None: as fast.
        average: of the weights, where one is kept.
        held: what of an adapter stays as it is (train/held.py); None: nothing.
    """

    loraplus_lr_ratio: float | None = None
    average: MovingAverage | None = None
    held: HeldHalves | None = None
    budget: Any = None  # of tokens per micro-batch (train/budget.py); the packed engine alone has one
    # What transformers sets in a method of its own, for type checkers
    model: Any
    lr_scheduler: Any
    deepspeed: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watchdog = Watchdog(self.accelerator)
        gathers = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.checkpoints = CheckpointWriter(self.args, self.accelerator, gathers=gathers)

    def hold(self, held: HeldHalves) -> None:
        """Let a part of the adapter stay as it is."""
        self.held = held
        self.add_callback(held)

    # ---- the step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with waiting_for_rows(self.state.global_step + 1, self.args.process_index):
            return super().get_batch_samples(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.watchdog.check(grad_norm, self.state.global_step + 1, self.optimizer)
        return grad_norm

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.watchdog.settle()
        super().log(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.place(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.watchdog.require_finite(self.model, self.state.global_step)
        self.checkpoints.write(self.state.global_step, functools.partial(self._write_checkpoint, model, trial))

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.average is not None and self.args.should_save:
            self.average.save(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.load(Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if FROZEN in getattr(model, "peft_config", {}):
            activate_both(model, trainable=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            state_dict = sharding.without_copies(state_dict, self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            for place in (folder, folder / FROZEN):
                strip_folders(place)

    # ---- before, during and after training

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            sharding.enable_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            sharding.keep_float32(self.accelerator)
        if self.args.fp16 and self.args.device.type == "cpu" and not self.is_deepspeed_enabled:
            # accelerate would compute in float32 there, without a word
            self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            args, options = self.args, self.args.lr_scheduler_kwargs or {}
            name, optimizer = args.lr_scheduler_type.value, optimizer or self.optimizer
            schedule = make_schedule(
                name, optimizer, args.warmup_steps, num_training_steps, options, args.learning_rate
            )
            self.lr_scheduler, self._created_lr_scheduler = schedule, True  # the Trainer drops what it made itself
        return self.lr_scheduler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            sharding.reshard(self.model)
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.loraplus_lr_ratio is not None:
            raise_rate_of_b(optimizer, self.model, self.loraplus_lr_ratio)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            # The engine that DeepSpeed makes for an evaluation under stage 3 cannot train, and it would be kept.
            self.deepspeed.destroy()
            self.deepspeed, self.model_wrapped = None, self.model
            self.accelerator._models.clear()
        self.prepare_anew()
        self.shard()
        result = super().train(*args, **kwargs)
        self.watchdog.require_steps()
        self.watchdog.require_finite(self.model, self.state.global_step)
        return result

    def prepare_anew(self) -> None:
        """Let a model that was evaluated before training be prepared for training."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # these are prepared for both at once
        if self.model_wrapped is self.model and not sharded:
            sharding.forget_preparation(self.model)

    def shard(self) -> None:
        """Share the weights out now, where the strategy does so and it has not been done."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.model = self.model_wrapped = sharding.shard_model(self.accelerator, self.model)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except StoppedBySignal:
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
            return {}

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
            self.prepare_anew()
            self.is_deepspeed_enabled = True
