"""engine=trl: TRL's ORPO, DPO and KTO trainers on our datasets. It is what the packed engine is measured against.

TRL's own semantics are left as they are where they are a choice: its NLL is a mean per micro-batch, so a step's loss
and gradient depend on how the global batch is cut (the packed engine's do not), and its evaluation averages over
batches. What would harm a run is guarded; tests/train/test_trl_engine.py has a test for each guard:

- our ids are used as they are: no second tokenization, no BOS or EOS added, one prompt for both answers, nothing cut;
- rows with an empty part, or longer than max_length, are refused by name (0/0 there turns all weights into NaN);
- log(1 - exp(x)) is finite in value and gradient for every answer, also one of a single, certain token;
- dropout stays as asked, and adapter weights keep their dtype;
- the model is an object: none is loaded by name in bfloat16 or spread over devices behind the caller's back;
- a non-finite loss is not hidden from the log, and stops the run (train/watchdog.py);
- several evaluation sets and group_by_length work;
- ORPO's metrics are reduced once per log, not eleven times per micro-batch;
- TRL's usage ping is not sent unless asked for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor
from transformers import Trainer, TrainingArguments

from preference.engine.batching import ID_COLUMNS, RUN_COLUMNS, row_lengths
from preference.errors import PreferenceError
from preference.losses import Objective, log1mexp
from preference.losses.answers import wins
from preference.train.guarded import GuardedTrainer
from preference.train.reference import is_fresh_adapter
from preference.train.trl_collators import DpoCollator, KtoCollator, OrpoCollator
from preference.train.watchdog import name_rows

TESTED = "1.16.0"
STAND_IN = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]} | {name: [[1]] for name in ID_COLUMNS}


class TrlError(PreferenceError, ValueError):
    """What TRL's trainers cannot do; the message names engine=packed where that can."""


class _Guards(GuardedTrainer):
    """What all of TRL's trainers need besides; goes before them in the bases."""

    def __init__(self, *args: Any, send_usage: bool, **kwargs: Any) -> None:
        self.send_usage = send_usage
        self.eval_prefix = "eval"
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        if self.send_usage:
            super()._send_telemetry()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        rows = inputs.pop("source", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.held is not None:
            self.held.drop_gradients()
        self.watchdog.watch(loss, rows, self.state.global_step + 1)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k != "source"}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Without TRL's copy of the adapter as it was at the start, which is DPO's reference."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self.eval_prefix = metric_key_prefix
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)


@functools.cache
def _orpo_classes() -> tuple[type, type]:
    """(config, trainer). The only place that touches trl.experimental, which may lose ORPO in any release."""
    import trl
    from trl.import_utils import TRLExperimentalWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TRLExperimentalWarning)
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    except ImportError as error:
        raise TrlError(
            f"trl {trl.__version__} has no ORPOTrainer ({error}): engine=packed needs none, or install trl=={TESTED}"
        ) from error

    class GuardedOrpo(_Guards, ORPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

        def odds_ratio_loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, ...]:
            chosen_B, rejected_B = policy_chosen_logps.float(), policy_rejected_logps.float()
            log_odds_B = (chosen_B - rejected_B) - (log1mexp(chosen_B) - log1mexp(rejected_B))
            ratio_B = F.logsigmoid(log_odds_B)
            rewards = (self.beta * chosen_B.detach(), self.beta * rejected_B.detach())
            return self.beta * ratio_B, *rewards, ratio_B.mean(), log_odds_B.mean()

        def get_batch_loss_metrics(
            self, model: Any, batch: dict[str, Any], train_eval: str = "train"
        ) -> tuple[Tensor, dict[str, Any]]:
            chosen_B, rejected_B, chosen_logits, rejected_logits, nll, *aux = self.concatenated_forward(model, batch)
            ratios_B, chosen_reward_B, rejected_reward_B, ratio, log_odds = self.odds_ratio_loss(chosen_B, rejected_B)
            loss = nll - ratios_B.mean()
            metrics = {
                "rewards/chosen": chosen_reward_B.mean(),
                "rewards/rejected": rejected_reward_B.mean(),
                "rewards/accuracies": wins(chosen_reward_B, rejected_reward_B).mean(),
                "preference/accuracies": wins(chosen_B, rejected_B).mean(),
                "preference/margins": (chosen_B - rejected_B).mean(),
                "rewards/margins": (chosen_reward_B - rejected_reward_B).mean(),
                "logps/chosen": chosen_B.mean(),
                "logps/rejected": rejected_B.mean(),
                "logits/chosen": chosen_logits.detach().mean(),
                "logits/rejected": rejected_logits.detach().mean(),
                "nll_loss": nll,
                "log_odds_ratio": ratio,
                "log_odds_chosen": log_odds,
            }
            prefix = "eval_" if train_eval == "eval" else ""
            return loss + self.aux_loss_coef * aux[0] if aux else loss, {
                f"{prefix}{name}": value.detach().float() for name, value in metrics.items()
            }

        def store_metrics(self, metrics: dict[str, Any], train_eval: str = "train") -> None:
            if train_eval == "eval":  # TRL writes every evaluation set under "eval_"
                metrics = {f"{self.eval_prefix}_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
            super().store_metrics(metrics, train_eval)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            stored = self._stored_metrics["train" if "loss" in logs else "eval"]
            if stored:
                means = torch.stack([torch.stack(values).mean() for values in stored.values()])
                for name, mean in zip(list(stored), self.accelerator.reduce(means, "mean").tolist(), strict=True):
                    stored[name] = [mean]
            super().log(logs, start_time)

    return ORPOConfig, GuardedOrpo


class _Prepared(_Guards):
    """What TRL's trainers that prepare their datasets themselves need besides."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["eval"]
        if not self.model.training and self.eval_prefix != "eval":  # TRL writes every evaluation set under "eval_"
            for name in list(metrics):
                metrics[f"{self.eval_prefix.removeprefix('eval_')}_{name}"] = metrics.pop(name)
        super().log(logs, start_time)


@functools.cache
def _dpo_classes() -> tuple[type, type]:
    from trl import DPOConfig, DPOTrainer

    class GuardedDpo(_Prepared, DPOTrainer):
        pass

    return DPOConfig, GuardedDpo


@functools.cache
def _kto_classes() -> tuple[type, type]:
    from trl import KTOConfig, KTOTrainer

    class GuardedKto(_Prepared, KTOTrainer):
        pass

    return KTOConfig, GuardedKto


def _check_rows(dataset: Dataset, what: str, max_length: int | None) -> None:
    if not len(dataset):
        raise TrlError(f"there are no {what} rows")
    lengths = row_lengths(dataset)
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    faults = {
        "have an empty prompt or answer": (lengths == 0).any(axis=1),
        f"are longer than max_length={max_length} tokens": longest > (max_length or np.iinfo(np.int64).max),
    }
    for fault, bad in faults.items():
        if bad.any():
            names = [str(dataset[int(i)].get("source", i)) for i in np.flatnonzero(bad)]
            raise TrlError(f"{len(names)} of the {what} rows {fault}: {name_rows(names)}")


def check_kind(dataset: Dataset, what: str, objective: Objective) -> None:
    """Raises TrlError for pairs or single answers that TRL's trainer for the objective would learn otherwise."""
    single = "desirable" in dataset.column_names
    if objective.loss != "dpo" and set(RUN_COLUMNS) & set(dataset.column_names):
        raise TrlError(
            f"some answers of the {what} rows hold turns that are not learned, which TRL's trainer for "
            f"loss={objective.loss} would learn: engine=packed"
        )
    if single and objective.loss != "kto":
        raise TrlError(f"the {what} rows have one answer each, and loss={objective.loss} compares two: loss=kto")
    if not single and objective.loss == "kto":
        raise TrlError(
            f"the {what} rows are pairs, of which TRL's KTOTrainer estimates another KL divergence than loss=kto here: "
            "engine=packed, or data/convert.py --unpaired, which writes each pair as two rows for either engine"
        )


def _with_lengths(dataset: Dataset | None, args: TrainingArguments) -> Dataset | None:
    """The sampler of group_by_length looks for `input_ids` unless there is a column of lengths."""
    if dataset is None or args.train_sampling_strategy == "random" or args.length_column_name in dataset.column_names:
        return dataset
    lengths = row_lengths(dataset)
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)
    return dataset.add_column(args.length_column_name, longest.tolist())


def _config(kind: type, args: TrainingArguments, **ours: Any) -> Any:
    """`args` as TRL's config: every field of it, as TRL has defaults of its own (bfloat16, checkpointing, learning
    rate).
    """
    values = {f.name: copy.copy(getattr(args, f.name)) for f in fields(args) if f.init}
    ours |= {"remove_unused_columns": False, "logging_nan_inf_filter": False, "disable_dropout": False}
    return kind(**values | ours)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def make_trl_trainer(
    model: Any,
    args: TrainingArguments,
    *,
    objective: Objective,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | dict[str, Dataset] | None = None,
    processing_class: Any,
    callbacks: list[Any] | None = None,
    max_length: int | None = None,
    send_usage: bool = False,
) -> Trainer:
    """TRL's ORPOTrainer (loss=orpo), DPOTrainer (dpo) or KTOTrainer (kto, single answers), guarded (see the module).

    Args:
        model: a causal LM, already wrapped in its PEFT adapter if there is one.
        args: plain TrainingArguments; every value holds, also where TRL's configs have other defaults.
        train_dataset, eval_dataset: columns prompt_ids, chosen_ids, rejected_ids, source; eval_dataset may be
            several by name.
        max_length: refuse rows with more tokens, prompt and answer together.
        send_usage: let TRL report to its makers that a trainer was started.

    Raises:
        TrlError: an objective that TRL's trainers do not compute, rows that they cannot take, or a trl without ORPO.
    """
    if isinstance(model, str):
        raise TrlError(
            "make_trl_trainer takes a loaded model: TRL loads a model by name in bfloat16 and over all devices"
        )
    weights = {name: getattr(objective, name) for name in ("kto_desirable_weight", "kto_undesirable_weight")}
    plain = objective == Objective(objective.loss, objective.beta, **weights)
    if objective.loss not in ("orpo", "dpo", "kto") or not plain:
        raise TrlError(
            "engine=trl computes loss=orpo with nll_scope=sequence, loss=dpo and loss=kto, without label smoothing; "
            f"got {objective}. engine=packed computes all of them"
        )
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for what, dataset in {"training": train_dataset, **sets}.items():
        if dataset is not None:
            _check_rows(dataset, what, max_length)
            check_kind(dataset, what, objective)
    train_dataset = _with_lengths(train_dataset, args)
    if isinstance(eval_dataset, dict):
        eval_dataset = {name: _with_lengths(dataset, args) for name, dataset in eval_dataset.items()}
    else:
        eval_dataset = _with_lengths(eval_dataset, args)
    pad_id = next(i for i in (processing_class.pad_token_id, processing_class.eos_token_id, 0) if i is not None)
    make = {"orpo": _make_orpo, "dpo": _make_dpo, "kto": _make_kto}[objective.loss]
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    trainer = make(
        model, args, objective, train_dataset, eval_dataset, pad_id,
        processing_class=processing_class, callbacks=callbacks, send_usage=send_usage,
    )  # fmt: skip
    for name, p in model.named_parameters():  # DPOTrainer turns the adapter of a 4-bit model into bfloat16
        if name in trained and p.dtype != trained[name].dtype:
            p.data = trained[name].to(p.device)
    return trainer


def _make_orpo(model, args, objective, train_dataset, eval_dataset, pad_id, **rest) -> Trainer:
    config_class, trainer_class = _orpo_classes()
    config = _config(config_class, args, beta=objective.beta, padding_value=pad_id, max_length=1 << 30)
    stand_in = Dataset.from_dict(STAND_IN)  # what TRL does to the datasets that it is given is thrown away
    with _no_progress_bars():
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=stand_in,
            eval_dataset=None if eval_dataset is None else stand_in,
            data_collator=OrpoCollator(pad_id),
            **rest,
        )
    trainer.train_dataset, trainer.eval_dataset = train_dataset, eval_dataset
    trainer.use_dpo_data_collator = True  # same names of tensors; TRL warns at every evaluation step otherwise
    return trainer


def _make_dpo(model, args, objective, train_dataset, eval_dataset, pad_id, **rest) -> Trainer:
    config_class, trainer_class = _dpo_classes()
    config = _config(config_class, args, beta=objective.beta, max_length=None, router_aux_loss_coef=_router(model))
    return _with_reference(trainer_class, config, model, train_dataset, eval_dataset, DpoCollator(pad_id), **rest)


def _make_kto(model, args, objective, train_dataset, eval_dataset, pad_id, **rest) -> Trainer:
    if args.per_device_train_batch_size < 2:
        raise TrlError("TRL's KTOTrainer takes two rows a micro-batch at least: per_device_train_batch_size=2")
    config_class, trainer_class = _kto_classes()
    constants = {name: getattr(objective, f"kto_{name}") for name in ("desirable_weight", "undesirable_weight")}
    order = {"train_sampling_strategy": "sequential"}  # TRL's condition, as its mismatched answers hang on the order
    constants |= {"beta": objective.beta, "max_length": None, "router_aux_loss_coef": _router(model)}
    config = _config(config_class, args, **constants, **order)
    trainer = _with_reference(trainer_class, config, model, train_dataset, eval_dataset, KtoCollator(pad_id), **rest)
    config.train_sampling_strategy = args.train_sampling_strategy  # ours are in the rows: any order will do
    return trainer


def _router(model: Any) -> float | None:
    """As ORPOTrainer: a router's auxiliary loss only where the model's config asks for it."""
    return None if getattr(model.config.get_text_config(), "output_router_logits", False) else 0.0


def _with_reference(trainer_class, config, model, train_dataset, eval_dataset, collator, **rest) -> Trainer:
    peft = hasattr(model, "peft_config")
    fresh = is_fresh_adapter(model)
    reference = None if peft else copy.deepcopy(model).eval().requires_grad_(False)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_dict(STAND_IN) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        **rest,
    )
    if train_dataset is None:
        trainer.train_dataset = None
    if fresh and "ref" in model.peft_config:  # TRL's copy of the adapter adds nothing, and would be saved beside it
        model.delete_adapter("ref")
    return trainer
