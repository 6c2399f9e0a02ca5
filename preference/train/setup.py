"""From flags to a trainer: transformers' arguments, the objective, the model in its trainer, and where it starts."""

from __future__ import annotations

import datetime
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from preference.arguments import FLAGS, Arguments
from preference.launch.agreement import code_fingerprint, compare_ranks, versions
from preference.launch.process import say
from preference.losses import Objective
from preference.losses.schedule import Schedule
from preference.models.hardware import Hardware, batch_plan, half_type
from preference.models.limits import check_positions, check_vocabulary, template_ids
from preference.models.loading import adapt, load_base
from preference.models.parameters import count_parameters
from preference.models.sources import ModelSource
from preference.models.vocabulary import add_rows, tokens_to_add
from preference.optimization.keywords import keywords
from preference.tokens.datasets import sets_of
from preference.train.budget import Budget
from preference.train.held import HeldHalves
from preference.train.identity import run_identity
from preference.train.moving import MovingAverage
from preference.train.output_folder import claim, make_folder
from preference.train.reference import data_fingerprint
from preference.train.resuming import Start, resolve_start
from preference.train.selection import Follow, Selection, SelectionError, choose, said
from preference.train.sharding import strategy_options


def training_arguments(args: Arguments, hardware: Hardware, world_size: int, report_to: list[str]) -> Any:
    """transformers' TrainingArguments; making them also sets up the process group of a torchrun launch."""
    run = args.run
    checkpointing = checkpointing_options() if run.gradient_checkpointing else {}
    precision = hardware.precision(run.bf16, run.fp16)
    if precision["fp16"] and hardware.device == "cpu":
        say("warning: products in float16 are slow on a CPU: fp16=false takes what is fast here")
    pairs, accumulation = batch_plan(run.per_device_train_batch_size, run.gradient_accumulation_steps, hardware)
    return TrainingArguments(
        output_dir=run.output_dir,
        per_device_train_batch_size=pairs,
        per_device_eval_batch_size=run.per_device_eval_batch_size or pairs,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=run.num_train_epochs,
        max_steps=run.max_steps,
        learning_rate=args.run.learning_rate or 0.0,  # load_trainer fills it in: it depends on the model
        lr_scheduler_type=run.lr_scheduler_type,
        lr_scheduler_kwargs=keywords(run.lr_scheduler_kwargs),
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        optim=run.optim,
        optim_args=run.optim_args,
        optim_target_modules=_modules(run.optim_target_modules),
        max_grad_norm=run.max_grad_norm,
        eval_strategy="steps" if run.do_eval and run.eval_steps else "no",
        eval_steps=_steps(run.eval_steps) or None,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=_steps(run.save_steps) or 500,
        save_total_limit=run.save_total_limit,
        logging_steps=run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        **precision,
        torch_compile=run.torch_compile and args.objective.engine == "trl",
        dataloader_num_workers=run.dataloader_num_workers,
        remove_unused_columns=False,
        report_to=report_to,
        run_name=run.run_name or f"{Path(run.output_dir).name}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}",
        use_cpu=hardware.device == "cpu",
        ddp_find_unused_parameters=False,
        seed=run.seed,
        do_train=run.do_train,
        do_eval=run.do_eval,
        **checkpointing,
        **({} if run.dry_run else strategy_options(run.strategy, world_size)),
    )


def checkpointing_options() -> dict[str, Any]:
    """What TrainingArguments take for gradient checkpointing."""
    # transformers renamed it between the versions that this runs on
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def _steps(value: float) -> float:
    """A number of steps as an int; a share of the run, which the Trainer turns into steps, as it is."""
    return int(value) if value >= 1 else value


def _modules(names: str | None) -> str | list[str] | None:
    return names if names is None or names == "all-linear" else [name.strip() for name in names.split(",")]


def check_length(args: Arguments, training: TrainingArguments, pairs: int) -> None:
    """Whether a run over so many pairs is long enough.

    Raises:
        OptimizationError: not for its learning rate's schedule.
        SelectionError: not for the checkpoints that are to be averaged.
    """
    if args.run.do_train:
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        of_epochs = math.ceil(math.ceil(pairs / batch) * args.run.num_train_epochs)
        steps = args.run.max_steps if args.run.max_steps > 0 else of_epochs
        args.check_schedule(steps)
        every = args.run.save_steps if args.run.save_steps >= 1 else math.ceil(steps * args.run.save_steps)
        written = math.ceil(steps / every) if every else 0
        if args.run.average_checkpoints > written:
            raise SelectionError(
                f"average_checkpoints={args.run.average_checkpoints}, and {steps} steps write {written} checkpoints: "
                "set a smaller save_steps"
            )


def check_kind(args: Arguments, train_set: Any, eval_set: Any) -> None:
    """Whether the objective and the engine take rows of these kinds.

    Raises:
        ObjectiveError: the objective does not.
        TrlError: TRL's trainer does not.
    """
    objective = objective_of(args)
    for what, rows in [("training", train_set), *sets_of(eval_set).items()]:
        if rows is not None and "desirable" in rows.column_names:
            objective.check_single_answers()
        if rows is not None and args.objective.engine == "trl":
            from preference.train import trl_engine

            trl_engine.check_kind(rows, what or "evaluation", objective)


def selection_of(args: Arguments) -> Selection:
    run = args.run
    return Selection(
        run.metric_for_best_model,
        run.greater_is_better,
        run.load_best_model_at_end,
        run.average_checkpoints,
        run.early_stopping_patience,
        run.early_stopping_threshold,
    )


def objective_of(args: Arguments) -> Objective:
    """The objective of a run in one stage; `schedule_of` has what changes on the way."""
    constants = {field.name: getattr(args.objective, field.name) for field in fields(Objective) if field.name != "beta"}
    return Objective(beta=args.beta, **constants)


def schedule_of(args: Arguments) -> Schedule:
    choice = args.objective
    return Schedule(
        objective_of(args), choice.orpo_stages, choice.sft_share, choice.orpo_beta_schedule, choice.align_nll
    )


def load_trainer(
    args: Arguments,
    source: ModelSource,
    hardware: Any,
    training: Any,
    tokenizer: Any,
    conversation: Any,
    train_set: Any,
    eval_set: Any,
    *,
    budget: Budget | None = None,
) -> Any:
    """The trainer of either engine with the model as it was handed in, looked at.

    Args:
        budget: of tokens per micro-batch, for the packed engine where the run finds it (train/budget.py).

    Raises:
        ModelError: the model is not whole, or has no room for the ids or the rows.
    """
    choice = args.objective
    set_seed(args.run.seed)
    model = load_base(source, args, hardware, half_type(training), say)
    parameters = count_parameters(model)[1]
    training.learning_rate = args.learning_rate(parameters).learning_rate
    args.beta_from = args.settle_beta(parameters)
    names = tokens_to_add(args.model.add_tokens)
    model = adapt(
        model, source, args, write=training.process_index == 0, say=say, grow=lambda m: add_rows(m, tokenizer, names)
    )
    check_room(model, tokenizer, conversation, train_set, eval_set)
    common = dict(
        objective=objective_of(args), train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    if choice.engine == "trl":
        from preference.train.trl_engine import make_trl_trainer

        return _equipped(make_trl_trainer(model, training, **common), args)
    from preference.train.trainer import PairTrainer

    trainer = PairTrainer(
        model,
        training,
        schedule=schedule_of(args),
        max_tokens_per_micro_batch=choice.max_tokens_per_micro_batch,
        budget=budget,
        share_prompt=choice.share_prompt,
        attention=choice.attn_implementation,
        torch_compile=args.run.torch_compile,
        cache_dir=Path(args.model.cache_dir or "cache") / "reference",
        **common,
    )
    return _equipped(trainer, args)


def _equipped(trainer: Any, args: Arguments) -> Any:
    """The trainer of either engine with what the run asks of it beyond the loss."""
    selection = selection_of(args)
    trainer.loraplus_lr_ratio = args.model.loraplus_lr_ratio
    trainer.checkpoints.wanted = lambda: selection.steps(trainer.state)
    trainer.checkpoints.besides = selection.keeps
    if selection.needs_metric:
        trainer.add_callback(Follow(trainer, selection, say))
    if args.model.use_peft and args.model.begins_in_weights:
        trainer.hold(HeldHalves(trainer.model))
    if args.run.ema_decay:
        trainer.average = MovingAverage(trainer.model, args.run.ema_decay)
        trainer.add_callback(trainer.average)
    return trainer


def end_with(trainer: Any, args: Arguments) -> dict[str, Any]:
    """Give the trained model the weights that the run is to end with, and say which; for run.json."""
    if trainer.average is not None:
        trainer.average.apply()
        say(f"the result has the moving average of the weights, decay {trainer.average.decay:g}")
        return {"weights": f"moving average, decay {trainer.average.decay:g}"}
    chosen = choose(trainer, selection_of(args))
    if chosen:
        say(said(chosen))
    return chosen


def check_room(model: Any, tokenizer: Any, conversation: Any, *sets: Any) -> None:
    """Whether the model has a row for every id, and a position for every token.

    Raises:
        ModelError
    """
    given = [rows for one in sets for rows in sets_of(one).values()]
    check_vocabulary(model, tokenizer, template_ids(conversation, tokenizer), given)
    if warning := check_positions(model, given):
        say(f"warning: {warning}")


def compare_settings(args: Arguments) -> None:
    """Before any other exchange between processes: are they the same program with the same settings?"""
    flags = {name: value for name, value in args.values().items() if not FLAGS[name].local}
    compare_ranks({"code": code_fingerprint(), "versions": versions(), **flags})


def compare_data(train_set: Any, eval_set: Any) -> None:
    sets = {"training data": train_set}
    sets |= {f"evaluation data {name}".rstrip(): rows for name, rows in (sets_of(eval_set) or {"": None}).items()}
    compare_ranks({name: rows and (len(rows), data_fingerprint(rows)[:16]) for name, rows in sets.items()})


def claim_output(args: Arguments, rank: int) -> None:
    """output_dir is there on every node, and the first rank has made sure that it is this run's alone."""
    make_folder(Path(args.run.output_dir))
    if rank == 0:
        inputs = {
            "model_name_or_path": args.model.model_name_or_path,
            "adapter_name_or_path": args.adapter,
            "tokenizer_name_or_path": args.model.tokenizer_name_or_path,
            "train_file_dir": args.data.train_file_dir,
        }
        inputs |= {f"validation_file_dir {name}".rstrip(): path for name, path in args.evaluation_sets.items()}
        run = args.run
        claim(Path(run.output_dir), inputs, train=run.do_train, overwrite=run.overwrite_output_dir)


def find_start(args: Arguments, trainer: Any, conversation: Any, restarted: bool) -> Start:
    """Step 0, or a checkpoint of an unfinished run in output_dir."""
    how = "auto" if restarted else args.resume
    identity = run_identity(args, trainer, conversation)
    return resolve_start(trainer, how, identity, strategy=args.run.strategy, anyway=args.run.resume_anyway)
