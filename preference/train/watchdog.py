"""Stops a training run before a non-finite loss, gradient or weight does harm, and names the rows.

Each optimizer step costs one host sync and, with several ranks, one small all-reduce, so that all ranks stop together.
On CUDA the host does not wait: a fused optimizer skips a bad step by itself, and the host reads of it a step later.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from preference.errors import PreferenceError

logger = logging.getLogger(__name__)

SHOWN = 20  # rows written out in a message; `TrainingError.rows` holds all of them


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


def _differ(mean: Any, mean_square: Any) -> Any:
    """Whether norms with this mean and mean square are not all the same."""
    return mean_square - mean**2 > 1e-4 * mean**2


def _is_bad(loss_is_bad: Tensor, norm_is_bad: Tensor, loss: Tensor, mean: Tensor, mean_square: Tensor) -> Tensor:
    """Whether the step must not be taken, on the device."""
    return (loss_is_bad > 0) | (norm_is_bad > 0) | _differ(mean, mean_square)


@dataclass(frozen=True)
class _Unread:
    """What was found in an optimizer step, on its way to the host."""

    facts: Tensor
    arrived: torch.cuda.Event | None
    watched: list[tuple[Tensor, list[str]]]
    step: int

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.facts.tolist()


def _to_host(facts: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that nobody waits for, and when it is there."""
    if facts.device.type != "cuda":
        return facts, None
    host = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True)
    host.copy_(facts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _skips_on_device(optimizer: Any) -> bool:
    """Whether a step of it does nothing where its `found_inf` is 1: torch's fused kernels, over whole weights."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    groups = optimizer.param_groups
    return all(g.get("fused") for g in groups) and not any(hasattr(p, "to_local") for g in groups for p in g["params"])


class Watchdog:
    """Knows the losses of the current optimizer step and the rows behind them.

    Call `watch` for every loss that is back-propagated, `check` between the gradient and the optimizer step, and
    `require_finite` before weights are kept. Under DeepSpeed the optimizer steps inside the backward pass; losses are
    then checked as they come, gradients are not.

    In float16 a gradient may be too large once its loss is scaled up: the scaler skips that step and halves its scale,
    and training goes on. At a scale of 1 it is the gradient itself that is too large.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.watched: list[tuple[Tensor, list[str]]] = []
        self.spikes = SpikeMeter()
        self.later = accelerator.device.type == "cuda"  # read what was found in a step when the next is checked
        self.unread: _Unread | None = None
        self.steps, self.skipped = 0, 0  # of this process: gradients that were checked, and that overflowed

    def watch(self, loss: Tensor, rows: list[str], step: int) -> None:
        """Note a loss of optimizer step `step` (counted from 1) and the rows that it comes from.

        Args:
            loss: this rank's, scaled so that the step's losses sum to the rank's loss.
        """
        self.watched.append((loss.detach(), rows))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_finite(torch.zeros((), device=loss.device), step)

    def check(self, grad_norm: Any, step: int, optimizer: Any = None) -> None:
        """Check the step's losses and the norm of its gradient (None: there is none), and forget them.

        Args:
            optimizer: what will take the step. Where it can skip it on the device, this may raise a step later.

        Raises:
            TrainingError: on all ranks; one of them is not finite, or the ranks' gradients differ.
        """
        self.settle()
        if self.watched and grad_norm is not None:
            optimizer = getattr(optimizer, "optimizer", optimizer)  # under accelerate's
            if self.later and self.accelerator.scaler is None and _skips_on_device(optimizer):
                facts = self._facts(grad_norm)
                optimizer.found_inf = _is_bad(*facts.unbind()).float()
                self.unread = _Unread(*_to_host(facts), self.watched, step)
            else:
                self._check_finite(grad_norm, step)
        self.watched = []

    def settle(self) -> None:
        """Judge a step that was not read yet.

        Raises:
            TrainingError: as `check`.
        """
        if self.unread is None:
            return
        unread, self.unread, watched = self.unread, None, self.watched
        self.watched = unread.watched
        self._judge(unread.read(), unread.step)
        self.watched = watched

    def _check_finite(self, grad_norm: Any, step: int) -> None:
        self._judge(self._facts(grad_norm).tolist(), step)

    def _facts(self, grad_norm: Any) -> Tensor:
        """Over all ranks: shares with a bad loss and with a bad norm; the means of loss, norm and squared norm."""
        losses = torch.stack([loss.float() for loss, _ in self.watched])
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        norm = torch.as_tensor(norm, dtype=torch.float32, device=losses.device).reshape(())
        bad_loss = ~losses.isfinite().all()
        total, known_norm = losses.sum().nan_to_num(0, 0, 0), norm.nan_to_num(0, 0, 0)
        facts = torch.stack([bad_loss.float(), (~norm.isfinite()).float(), total, known_norm, known_norm**2])
        return self.accelerator.reduce(facts, "mean")

    def _judge(self, facts: list[float], step: int) -> None:
        loss_is_bad, norm_is_bad, loss, mean, mean_square = facts
        self.steps += 1
        if loss_is_bad or (norm_is_bad and not self._scaler_handles_it()):
            self._stop("loss" if loss_is_bad else "gradient", step)
        if norm_is_bad:
            self._report_skip(step)
        if _differ(mean, mean_square):
            raise TrainingError(f"step {step}: the ranks have different gradients and diverge")
        self._report_spike(loss, step)

    def _scaler_handles_it(self) -> bool:
        """fp16's loss scaler skips steps whose gradient overflows, and lowers its scale; at 1 there is nothing left
        to lower.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    def _stop(self, what: str, step: int) -> None:
        own = [row for loss, rows in self.watched if not loss.isfinite() for row in rows]
        rows = gather_object(own) or gather_object([row for _, rows in self.watched for row in rows])
        where = "rows of the micro-batches that gave it" if what == "loss" else "rows of this step"
        self.watched = []
        reach = ""
        if self.accelerator.mixed_precision == "fp16":
            lowest = "" if what == "loss" else ", also at the lowest scale of the gradient"
            reach = f" It may be float16, which ends at 65504{lowest}: fp16=false computes without it."
        raise TrainingError(
            f"the {what} of step {step} is not finite. Stopped before the optimizer step: the "
            f"weights and the checkpoints are those of before.{reach} {where.capitalize()}: {name_rows(rows)}",
            rows,
        )

    def _report_skip(self, step: int) -> None:
        self.skipped += 1
        if self.accelerator.is_main_process:
            scale = self.accelerator.scaler.get_scale()
            message = "step %d is skipped: its gradient overflows float16 at a scale of %g, which is now halved"
            logger.warning(message, step, scale)

    def require_steps(self) -> None:
        """Raises TrainingError if no gradient of training could be used."""
        if self.steps and self.skipped == self.steps:
            raise TrainingError(
                f"nothing was learned: the gradient of each of the {self.steps} steps overflows float16, whose scale "
                "falls by half with each. Train for more steps, or with fp16=false"
            )

    def _report_spike(self, loss: float, step: int) -> None:
        usual = self.spikes.mean
        if self.spikes(loss):
            rows = gather_object([row for _, rows in self.watched for row in rows])
            if self.accelerator.is_main_process:
                message = "step %d: the loss is %.4g, against %.4g before; rows of this step: %s"
                logger.warning(message, step, loss, usual, name_rows(rows))

    def require_finite(self, model: nn.Module, step: int) -> None:
        """A finite gradient can still make infinite weights (a learning rate far too high); they must not be kept.

        Raises:
            TrainingError: on all ranks; a trained weight is not finite, or the last step was bad.
        """
        self.settle()
        weights = [p.detach() for p in model.parameters() if p.requires_grad]
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
        flags = [p.isfinite().all().float() for p in weights if p.is_floating_point() and p.numel()]
        device = self.accelerator.device
        finite = torch.stack(flags).min() if flags else torch.ones((), device=device)
        if self.accelerator.reduce(finite.to(device), "mean").item() < 1:
            raise TrainingError(
                f"the weights are not finite after step {step}; nothing was written, the last "
                "checkpoint is the one before. A lower learning_rate is the usual cure"
            )
