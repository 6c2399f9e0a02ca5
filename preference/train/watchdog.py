"""Stops a training run before a non-finite loss, gradient or weight does harm, and names the rows.

`Watchdog` goes before `transformers.Trainer` in a class's bases. Both engines use it. Each optimizer step costs one
host sync and, with several ranks, one small all-reduce, so that all ranks stop together.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import Trainer

from preference.errors import PreferenceError
from preference.train.stalls import waiting_for_rows

logger = logging.getLogger(__name__)

SHOWN = 20  # rows written out in a message; `TrainingError.rows` holds all of them
NEEDED = ("get_batch_samples", "_get_grad_norm", "_save_checkpoint")
if missing := [name for name in NEEDED if not hasattr(Trainer, name)]:
    raise ImportError(
        f"this transformers' Trainer has no {', '.join(missing)}; the watchdog is written for 5.17 to 5.23"
    )


class TrainingError(PreferenceError, RuntimeError):
    """Training stopped. The weights are those of the last finished optimizer step.

    Attributes:
        rows: the rows behind it, as "file:line", of all ranks.
    """

    def __init__(self, message: str, rows: list[str] | None = None) -> None:
        super().__init__(message)
        self.rows = list(rows or [])


def name_rows(rows: list[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return (", ".join(rows[:SHOWN]) or "unknown") + more


class SpikeMeter:
    """Tells whether a number stands out from those before it: more than `width` standard deviations above a running
    mean.
    """

    def __init__(self, width: float = 6.0, warm_up: int = 20, decay: float = 0.92) -> None:
        self.width, self.warm_up, self.decay = width, warm_up, decay
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def __call__(self, value: float) -> bool:
        deviation = value - self.mean
        floor = 0.05 * abs(self.mean)  # a loss that has settled has next to no variance
        spike = self.seen >= self.warm_up and deviation > max(self.width * math.sqrt(self.variance), floor)
        self.seen += 1
        keep = min(self.decay, 1 - 1 / self.seen)
        if not spike:
            self.variance = keep * (self.variance + (1 - keep) * deviation**2)
            self.mean += (1 - keep) * deviation
        return spike


class Watchdog:
    """Mixin for `transformers.Trainer` (see the module).

    A subclass whose `training_step` is its own calls `watch` for every loss that it back-propagates; otherwise the
    batch's "source" entry (a list of "file:line") is taken out of it here and the step's loss is watched.

    Under DeepSpeed the optimizer steps inside the backward pass; losses are then checked as they come, gradients are
    not.
    """

    _watched: list[tuple[Tensor, list[str]]]
    _spike_meter: SpikeMeter

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with waiting_for_rows(self.state.global_step + 1, self.args.process_index):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        rows = inputs.pop("source", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch(loss, rows)
        return loss

    def watch(self, loss: Tensor, rows: list[str]) -> None:
        """Note a loss (this rank's, scaled so that the step's losses sum to the rank's loss) and the rows that it
        comes from.
        """
        self.__dict__.setdefault("_watched", []).append((loss.detach(), rows))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_finite(torch.zeros((), device=loss.device))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called by the Trainer between the gradient and the optimizer step, whether it clips or not."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        watched = self.__dict__.get("_watched", [])
        if watched and grad_norm is not None:
            self._check_finite(grad_norm)
        self._watched = []
        return grad_norm

    def _check_finite(self, grad_norm: Any) -> None:
        losses = torch.stack([loss.float() for loss, _ in self._watched])
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        norm = torch.as_tensor(norm, dtype=torch.float32, device=losses.device).reshape(())
        bad_loss = ~losses.isfinite().all()
        total, known_norm = losses.sum().nan_to_num(0, 0, 0), norm.nan_to_num(0, 0, 0)
        facts = torch.stack([bad_loss.float(), (~norm.isfinite()).float(), total, known_norm, known_norm**2])
        loss_is_bad, norm_is_bad, loss, mean, mean_square = self.accelerator.reduce(facts, "mean").tolist()
        if loss_is_bad or (norm_is_bad and not self._scaler_handles_it()):
            self._stop("loss" if loss_is_bad else "gradient")
        if mean_square - mean**2 > 1e-4 * mean**2:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the ranks have different gradients and train apart"
            )
        self._report_spike(loss)

    def _scaler_handles_it(self) -> bool:
        """fp16's loss scaler skips steps whose gradient overflows, and lowers its scale; at 1 there is nothing left
        to lower.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    def _stop(self, what: str) -> None:
        own = [row for loss, rows in self._watched if not loss.isfinite() for row in rows]
        rows = gather_object(own) or gather_object([row for _, rows in self._watched for row in rows])
        where = "rows of the micro-batches that gave it" if what == "loss" else "rows of this step"
        self._watched = []
        raise TrainingError(
            f"the {what} of step {self.state.global_step + 1} is not finite. Stopped before the optimizer step: the "
            f"weights and the checkpoints are those of before. {where.capitalize()}: {name_rows(rows)}",
            rows,
        )

    def _report_spike(self, loss: float) -> None:
        meter = self.__dict__.setdefault("_spike_meter", SpikeMeter())
        usual = meter.mean
        if meter(loss):
            rows = gather_object([row for _, rows in self._watched for row in rows])
            if self.is_world_process_zero():
                logger.warning(
                    "step %d: the loss is %.4g, against %.4g before; rows of this step: %s",
                    self.state.global_step + 1, loss, usual, name_rows(rows),
                )  # fmt: skip

    def _require_finite_weights(self) -> None:
        """A finite gradient can still make infinite weights (a learning rate far too high); they must not become a
        checkpoint.
        """
        weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
        flags = [p.isfinite().all().float() for p in weights if p.is_floating_point() and p.numel()]
        finite = torch.stack(flags).min() if flags else torch.ones((), device=self.args.device)
        if self.accelerator.reduce(finite.to(self.args.device), "mean").item() < 1:
            raise TrainingError(
                f"the weights are not finite after step {self.state.global_step}; nothing was written, the last "
                "checkpoint is the one before. A lower learning_rate is the usual cure"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._require_finite_weights()
        super()._save_checkpoint(model, trial)

    def _forget_evaluation(self) -> None:
        """Let a model that was evaluated before training be prepared for training.

        Trainer.evaluate has accelerate prepare the model for evaluation, which marks it as prepared: training would
        then leave it out of DistributedDataParallel, and each rank would train alone.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # these are prepared for both at once
        if self.model_wrapped is self.model and not sharded:
            self.model._is_accelerate_prepared = False
            if "_original_forward" in vars(self.model):
                self.model.forward = vars(self.model).pop("_original_forward")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_evaluation()
        result = super().train(*args, **kwargs)
        self._require_finite_weights()
        return result
