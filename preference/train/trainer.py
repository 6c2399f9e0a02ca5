"""PairTrainer: the packed engine on transformers.Trainer.

The Trainer's loop, schedules, checkpoints, logging and callbacks are used as they are. What differs: an item of the
data loader is a whole optimizer step of one rank (engine/batching.py), `training_step` runs its micro-batches,
and each contributes its exact share to the loss of the global batch (preference/losses/share.py). So loss, gradient and
logged metrics do not depend on how the global batch is cut into micro-batches, accumulation steps and ranks; and
evaluation is exact in the same way, the set being one batch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from preference.engine.batching import (
    RUN_COLUMNS,
    Cut,
    EvaluationPlan,
    PackSteps,
    TrainingPlan,
    learned_lengths,
    plan_loader,
    row_lengths,
    shared_prefix,
)
from preference.engine.compiled import compile_layers
from preference.engine.forward import causal_lm, pair_logps
from preference.engine.layers.lora import hold_frozen
from preference.engine.probe import prepare_model
from preference.engine.transfer import to_device
from preference.losses import Objective, PairLogps, Totals, objective_share
from preference.losses.answers import weighted_sums
from preference.losses.schedule import Schedule
from preference.losses.share import as_means
from preference.models.hardware import half_type
from preference.train.budget import Budget, CudaMeter, Meter, fit_step
from preference.train.coupled import couple_set, couple_step
from preference.train.gradients import clip, exact_norm
from preference.train.guarded import GuardedTrainer
from preference.train.packed_arguments import of_the_loop, refuse_what_has_no_place
from preference.train.reference import References, reference_model
from preference.train.scores import MetricSums, PairScores
from preference.train.watchdog import TrainingError

logger = logging.getLogger(__name__)


class PairTrainer(GuardedTrainer):
    """Trains a causal LM on preference pairs.

    Besides what GuardedTrainer does for both engines it overrides, of transformers.Trainer,

    - get_train_dataloader, get_eval_dataloader, get_test_dataloader: an item is a whole optimizer step of this rank;
    - get_total_train_batch_size: pairs, of which the Trainer sees one "batch" a step;
    - training_step: runs the step's micro-batches, each with its exact share of the loss;
    - _clip_grad_norm, _get_grad_norm: on a CPU torch's norm is off by up to 1e-3 (train/gradients.py);
    - evaluation_loop, prediction_step: metrics are exact sums over the set, and each pair's scores are kept;
    - train: the reference's log-probabilities are computed before a checkpoint is loaded over its weights;
    - log: adds the metrics of the steps since the last log;
    - floating_point_ops, _track_num_input_tokens: count the tokens that are computed, shared prompts once.

    Args:
        model: the model, already wrapped in its PEFT adapter if there is one. Its forward is extended
            (`prepare_model`).
        objective, schedule: what is learned, and how it changes in the course of the run; evaluations measure what it
            ends with.
        args: per_device_train_batch_size x gradient_accumulation_steps x ranks pairs make an optimizer step.
        train_dataset, eval_dataset: columns prompt_ids, chosen_ids, rejected_ids and source (and `desirable`, for rows
            of one answer, see engine/batching.py); eval_dataset may be
            several by name, whose metrics are then called eval_NAME_loss and so on.
        budget: of tokens per micro-batch, settled in the first steps (train/budget.py); None: as the next says.
        max_tokens_per_micro_batch: cut a step into micro-batches of at most that many tokens rather than by
            per_device_train_batch_size (and evaluation likewise); 0: by pairs.
        share_prompt: compute a prompt once for both of its answers, and what prompts of a micro-batch begin with alike
            once for all of them, where the model allows it.
        attention: how the attention of a packed row is computed (`prepare_model`).
        torch_compile: compile each decoder layer (engine/compiled.py), rather than the model as transformers would.
        reference: for losses that need one: "auto", "adapter" or "precompute" (train/reference.py).
        cache_dir: where precomputed reference log-probabilities are kept.

    Raises:
        EngineError: the packed engine cannot run the model exactly; the message names engine=trl.
        ValueError: an argument that would have no effect.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        objective: Objective,
        schedule: Schedule | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        max_tokens_per_micro_batch: int = 0,
        budget: Budget | None = None,
        share_prompt: bool = True,
        attention: str = "auto",
        torch_compile: bool = False,
        reference: str = "auto",
        cache_dir: str | Path | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        refuse_what_has_no_place(args)
        self.schedule = schedule or Schedule(objective)
        self.objective = objective
        self.max_tokens, self.budget = max_tokens_per_micro_batch, budget
        self.meter: Meter = CudaMeter()
        self.accumulation = args.gradient_accumulation_steps
        self.engine = prepare_model(
            _on_device(model, args),
            share_prompt=share_prompt,
            attention=attention,
            lighten=not torch_compile,
            **_run_of(args),
        )
        if torch_compile:
            compile_layers(model)
        super().__init__(
            model=model,
            args=of_the_loop(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        half = half_type(self.args)
        if half and self.args.device.type == "cpu" and not sharded:
            hold_frozen(model, half)
        self.references: References | None = None
        if objective.needs_reference:
            precision = f"{self.args.mixed_precision} {causal_lm(model).dtype}"
            if objective.ld_alpha != 1:
                precision += f" ld_alpha {objective.ld_alpha}"
            self.references = References(
                model, self._reference_logps, how=reference, cache_dir=cache_dir, precision=precision
            )
        self.train_metrics = MetricSums()
        self.eval_metrics: MetricSums | None = None  # None: only scores are wanted, not the objective
        self.collecting: PairScores | None = None  # of the evaluation that is running
        self.collecting_reference: PairScores | None = None
        self.eval_coupled: dict[str, Tensor] | None = None  # by row of its set, for losses that need to know the batch
        # evaluation set -> [n, 2] (chosen, rejected) sums of log-probabilities, of its last evaluation
        self.scores: dict[str, np.ndarray] = {}

    # ---- data

    def _cut(self, dataset: Dataset, pairs: int) -> Cut:
        tokens = self.budget.tokens if self.budget else self.max_tokens
        return Cut(pairs, tokens, self.args.world_size, self.engine.share_prompt, shared_prefix(dataset))

    def _loader(
        self, dataset: Dataset, plan: Any, reference: np.ndarray | None, persistent: bool = False
    ) -> DataLoader:
        args = self.args
        return plan_loader(
            dataset,
            plan,
            PackSteps(self.engine.share_prompt, self.objective.needs_prompt, reference),
            num_workers=args.dataloader_num_workers,
            pin_memory=False,  # engine/transfer.py pins each micro-batch whole
            persistent_workers=persistent,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
        )

    def _reference_of(self, dataset: Dataset) -> np.ndarray | None:
        return self.references.of(dataset) if self.references else None

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's optimizer steps. It is not prepared by accelerate: it is sharded already."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        plan = TrainingPlan(
            row_lengths(self.train_dataset),
            self.objective,
            self._cut(self.train_dataset, args.per_device_train_batch_size),
            rank=args.process_index,
            global_batch=self.get_total_train_batch_size(args),
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: self.state.global_step // len(plan),
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
            learned=learned_of(self.train_dataset),
        )
        reference = self._reference_of(self.train_dataset)
        self.train_loader = self._loader(self.train_dataset, plan, reference, args.dataloader_persistent_workers)
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._eval_loader(dataset, self._reference_of(dataset))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _eval_loader(self, dataset: Dataset, reference: np.ndarray | None) -> DataLoader:
        cut = self._cut(dataset, self.args.per_device_eval_batch_size)
        learned = learned_of(dataset)
        plan = EvaluationPlan(row_lengths(dataset), self.objective, cut, rank=self.args.process_index, learned=learned)
        return self._loader(dataset, plan, reference)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of an optimizer step, over all ranks."""
        return args.per_device_train_batch_size * self.accumulation * args.world_size

    # ---- the step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over this rank's micro-batches of one optimizer step.

        Returns:
            This rank's share of the step's loss, times the number of ranks: the Trainer logs the mean over ranks.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        if self.budget is not None and not self.budget.settled:
            inputs = fit_step(self, model, inputs)
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"scale_wrt_gas": False} if deepspeed else {}
        totals, batches = inputs["totals"], [to_device(batch, self.args.device) for batch in inputs["micro_batches"]]
        objective = self.schedule.at(self.state.global_step / max(self.state.max_steps, 1))
        coupled = self._couple(model, batches) if objective.needs_batch else None
        losses = []
        for i, (batch, rows) in enumerate(zip(batches, inputs["source"], strict=True)):
            last = i == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                share, metrics = self._share(model, batch, totals, objective, coupled[i] if coupled else None)
                loss = share * self.args.world_size  # gradients are averaged over ranks, and shares are to be summed
                self.watchdog.watch(loss, rows, self.state.global_step + 1)
                self.accelerator.backward(loss, **options)
            losses.append(loss.detach())
            self.train_metrics.add(metrics, 1 / totals.pairs)
        if self.held is not None:
            self.held.drop_gradients()
        self.train_metrics.steps += 1
        return torch.stack(losses).sum()

    def _logps(self, model: Any, batch: dict[str, Any]) -> PairLogps:
        return pair_logps(model, batch, tails=self.objective.ld_alpha != 1)

    def _reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """(chosen, rejected) sums of the reference model, [B] each; None where the loss has none."""
        if self.references is None:
            return None
        if not self.references.live:
            return batch["reference"].unbind(1)
        with reference_model(self.model, self.accelerator.unwrap_model(self.model)) as frozen:
            return weighted_sums(self.objective, self._logps(frozen, batch))

    def _couple(self, model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """A first pass without gradient and without dropout, for losses that need to know their global batch."""
        model.eval()
        with torch.no_grad():
            logps = [self._logps(model, batch) for batch in batches]
        model.train()
        references = [sums for batch in batches if (sums := self._reference_sums(batch)) is not None]
        return couple_step(self.objective, logps, references, self.args.process_index)

    def _share(
        self,
        model: Any,
        batch: dict[str, Any],
        totals: Totals,
        objective: Objective,
        coupled: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference = self._reference_sums(batch)
        logps = self._logps(model, batch)
        if self.collecting is not None:
            self.collecting.add(batch["rows"], logps)
        return objective_share(objective, logps, totals, reference, coupled)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.references:  # before a checkpoint is loaded over the reference's weights
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for dataset in (self.train_dataset, *sets.values()):
                if dataset is not None:
                    self._reference_of(dataset)
            self.references.freeze()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; the Trainer's own loss is the same number as ours
            means = as_means(self.train_metrics.read(self.accelerator))
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
        super().log(logs, start_time)

    # ---- the gradient's norm

    def _exact_norm(self, model: Any) -> Tensor | None:
        """On a CPU; None where accelerate's will do. Of the loss's own gradients: a scaler's factor is taken out."""
        if self.args.device.type != "cpu" or self.is_deepspeed_enabled:
            return None
        self.accelerator.unscale_gradients()
        add_up = functools.partial(self.accelerator.reduce, reduction="sum") if self.is_fsdp_enabled else None
        return exact_norm(model.parameters(), add_up)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = self._exact_norm(model)
        if norm is None:
            return super()._clip_grad_norm(model)
        clip(model.parameters(), norm, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self._exact_norm(model) if grad_norm is None else grad_norm)

    # ---- evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        try:
            self._couple_set(dataloader, description)
            self.eval_metrics = MetricSums()
            self.collecting = PairScores(len(dataloader.dataset), self.args.device)
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            self.scores[metric_key_prefix] = self.collecting.read(self.accelerator)
            means = as_means(self.eval_metrics.read(self.accelerator))
        finally:
            self.collecting = self.eval_metrics = self.eval_coupled = None
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Adds the batch's share to the set's metrics; there are no predictions to gather."""
        with torch.no_grad():
            for batch in inputs["micro_batches"]:
                batch = to_device(batch, self.args.device)
                if self.eval_metrics is None:
                    self._collect(model, batch)
                else:
                    whole = self.eval_coupled
                    coupled = whole and {name: values_N2[batch["rows"]] for name, values_N2 in whole.items()}
                    _, metrics = self._share(model, batch, inputs["totals"], self.schedule.last, coupled)
                    self.eval_metrics.add(metrics, 1 / inputs["totals"].pairs)
        return None, None, None

    def _collect(self, model: Any, batch: dict[str, Any]) -> None:
        assert self.collecting is not None  # whoever starts a loop without metrics sets it
        logps = self._logps(model, batch)
        self.collecting.add(batch["rows"], logps, weighted_sums(self.objective, logps))
        if self.collecting_reference is not None:
            self.collecting_reference.add(batch["rows"], logps, self._reference_sums(batch))

    def _couple_set(self, dataloader: DataLoader, description: str) -> None:
        """The first pass over an evaluation set, where the loss needs one."""
        if not self.objective.needs_batch:
            return
        self.collecting, self.collecting_reference = (
            PairScores(len(dataloader.dataset), self.args.device) for _ in range(2)
        )
        try:
            super().evaluation_loop(dataloader, description, True)
            sums = [scores.reduced(self.accelerator) for scores in (self.collecting, self.collecting_reference)]
        finally:
            self.collecting = self.collecting_reference = None
        self.eval_coupled = couple_set(self.objective, *sums)

    def _reference_logps(self, dataset: Dataset) -> np.ndarray:
        """[n, 2] float32: what the model, as it stands, gives the answers of each row. All ranks together."""
        logger.info("Computing the reference log-probabilities of %d pairs, once", len(dataset))
        self.collecting = PairScores(len(dataset), self.args.device)
        try:
            super().evaluation_loop(self._eval_loader(dataset, None), "Reference", True)
            values = self.collecting.read(self.accelerator)
        finally:
            self.collecting = None
        if not np.isfinite(values).all():
            raise TrainingError("the model, untrained, gives some answers a log-probability that is not finite")
        return values

    # ---- accounting

    @functools.cached_property
    def _matmul_parameters(self) -> int:
        return causal_lm(self.model).num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Forward and backward over the tokens that are computed (shared prompts once), as the Trainer counts: 6 per
        weight.
        """
        return 6 * inputs["num_tokens"] * self._matmul_parameters

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs["num_tokens"], device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum").item())


def learned_of(dataset: Dataset) -> np.ndarray | None:
    """Tokens of the chosen answers that are learned, [n]; None where all of them are."""
    return learned_lengths(dataset)[:, 0] if set(RUN_COLUMNS) & set(dataset.column_names) else None


def _run_of(args: TrainingArguments) -> dict[str, Any]:
    """What `prepare_model` is told of the run: its device and autocast."""
    return {"device": args.device.type, "autocast": half_type(args)}


def _on_device(model: Any, args: TrainingArguments) -> Any:
    """The model where it will run, so that the engine is compared there; strategies that deal it out move it."""
    dealt_out = args.deepspeed or args.fsdp
    weights = list(model.parameters())
    if args.device.type == "cpu" or dealt_out or any(p.is_meta or p.device.type != "cpu" for p in weights):
        return model
    return model.to(args.device)
