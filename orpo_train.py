#!/usr/bin/env python3
"""Train a chat model on pairs of a chosen and a rejected answer: ORPO, DPO and kin.

    sh run_orpo.sh                                        the values of run_orpo.sh, on this machine's GPU or CPU
    python orpo_train.py --config my_run.yaml --seed 7    flags from a file, overridden on the command line
    python orpo_train.py --do_train false ...             only score a model on validation_file_dir
    sh torchrun/run_single_node.sh                        one process per GPU of this machine
    sh torchrun/run_multi_node.sh                         several machines

main() reads as the data flows: load, check, render, tokenize, filter, train, evaluate, save.
"""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from preference.arguments import Arguments, parse_arguments
from preference.launch.heartbeat import tell_of_failure, watch_machines

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
LOST_TOUCH = ("onnection closed", "onnection reset", "roken pipe", "NCCL")  # said by a collective that another left
ELASTIC = "ORPO_ELASTIC" in os.environ  # set by torchrun/launch.py where machines may come and go
STOP_FILE = Path(os.environ["ORPO_STOP_FILE"]) if "ORPO_STOP_FILE" in os.environ else None  # of torchrun/launch.py


def main() -> None:
    args = parse_arguments()
    stay_private()
    watch_machines(os.environ, args.run.lost_after)

    from preference.launch.agreement import on_every_rank
    from preference.launch.signals import StoppedBySignal, StopSignals, StopTogether
    from preference.models.hardware import detect
    from preference.models.loading import load_tokenizer, untuned
    from preference.report.answers import Samples
    from preference.report.evaluation import Evaluation
    from preference.report.progress import attach_progress
    from preference.report.results import write_results
    from preference.report.trackers import begin_reporting
    from preference.train.resuming import finish, go_on_after_restart
    from preference.train.run_data import load_data
    from preference.train.sharding import join_deepspeed

    leave_if_stopped()
    output_dir = Path(args.run.output_dir)
    if not args.run.dry_run:
        output_dir.mkdir(parents=True, exist_ok=True)
    hardware = detect(args.run.use_cpu)
    training = training_arguments(args, hardware)
    join_deepspeed(args.run.strategy)
    compare_settings(args)
    restarted = go_on_after_restart(training, RESTARTS)
    say(f"device: {hardware}; computing in {'bfloat16' if training.bf16 else 'float32'}")
    with on_every_rank():
        if RANK == 0 and not args.run.dry_run:
            begin_reporting(training.report_to, output_dir, training.run_name, os.environ)
        source = find_model(args)
        tokenizer = load_tokenizer(args.model.tokenizer_name_or_path or source, args.model)
        conversation = load_template(args, tokenizer)

    # ---- load, check, render, tokenize, filter
    save_report = RANK == 0 and not args.run.dry_run
    with on_every_rank():
        train_set, eval_set, questions = load_data(args, conversation, tokenizer, save_report=save_report, say=say)
    compare_data(train_set, eval_set)
    show_first_pair(train_set or eval_set, tokenizer)
    if args.run.dry_run:
        say(on_paper(args, source, hardware, training, train_set))
        return

    # ---- the model and its trainer
    trainer = load_trainer(args, source, hardware, training, tokenizer, train_set, eval_set)
    facts = describe(args, trainer, conversation, train_set)
    start = find_start(args, trainer, conversation, restarted) if args.run.do_train else None
    signals = StopSignals().install()
    stop = StopTogether(trainer, signals)
    trainer.add_callback(stop)

    # ---- evaluate, train, save, evaluate
    samples = Samples(args, trainer, conversation, eval_set, questions)
    evaluation = Evaluation(trainer, eval_set, questions)
    attach_progress(
        trainer, output_dir, prompts=samples.rows, stop_ids=samples.stop_ids, max_new_tokens=args.run.sample_tokens
    )
    results: dict[str, float] = {}
    with untuned(trainer.model) as separate:
        if args.run.do_train or separate:
            evaluation.run("base")
            samples.answer("base")
    if args.run.do_train:
        results = train(trainer, start)
        if stop.stopping:
            raise StoppedBySignal
        signals.phase = "finishing"
        save(trainer, conversation)
    evaluation.run("tuned")
    samples.answer("tuned")

    # ---- what changed
    if RANK == 0:
        write_results(args, source, facts, results, evaluation, samples, say)
    if args.run.do_train:
        finish(trainer)


def say(text: str = "") -> None:
    """Print once, not once per process."""
    if RANK == 0:
        print(text, flush=True)


def leave_if_stopped() -> None:
    """torchrun/launch.py was told to stop while torchrun started its processes anew."""
    if STOP_FILE is not None and STOP_FILE.exists():
        sys.exit(0)


def leave_after_signal() -> None:
    """End with the code that says: start it again and it goes on.

    torchrun takes any code but 0 for a failure, and would start the processes anew; its launcher gives the code.
    """
    from preference.launch.signals import EXIT_STOPPED

    if ELASTIC and not STOP_FILE.exists():  # torchrun's own SIGTERM: another machine has come
        say("torchrun starts the processes anew; they go on from the checkpoint")
        sys.exit(1)
    say("stopped by a signal; the same command goes on from the checkpoint")
    if STOP_FILE is not None:
        STOP_FILE.touch()
    sys.exit(EXIT_STOPPED if STOP_FILE is None else 0)


def let_the_cause_speak(error: Exception) -> None:
    """Wait where another process has the same to say, or the reason why this one lost touch with it.

    torchrun ends this process meanwhile, so that the cause is shown once. If it is on another machine a line says so.
    """
    if WORLD_SIZE == 1:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if any(words in str(error) for words in LOST_TOUCH):
        time.sleep(10)
        reason = str(error).splitlines()[0]
        sys.exit(f"orpo_train.py: rank {RANK} lost touch with another, whose output says why ({reason})")
    time.sleep(3 if int(os.environ.get("LOCAL_RANK", "0")) else 0)


def end_process() -> None:
    """End one process of several without Python's own last steps, in which a thread of gloo that still wants the
    interpreter aborts it (seen with FSDP2): torchrun would take the finished run for a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def compare_settings(args: Arguments) -> None:
    """Before any other exchange between processes: are they the same program with the same settings?"""
    from preference.launch.agreement import code_fingerprint, compare_ranks

    groups = (args.model, args.data, args.objective, args.run)
    flags = {name: value for group in groups for name, value in vars(group).items() if name != "cache_dir"}
    compare_ranks({"code": code_fingerprint(), "versions": versions(), **flags})


def compare_data(train_set: Any, eval_set: Any) -> None:
    from preference.launch.agreement import compare_ranks
    from preference.train.reference import data_fingerprint

    sets = {"training data": train_set, "evaluation data": eval_set}
    compare_ranks({name: rows and (len(rows), data_fingerprint(rows)[:16]) for name, rows in sets.items()})


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "datasets", "peft", "accelerate")}


def stay_private() -> None:
    """No usage pings unless the user has turned them on: the data may be medical."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")


def find_model(args: Arguments) -> str:
    from preference.models.starter import resolve_model

    modelscope = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
    name = args.model.model_name_or_path
    weights = not args.run.dry_run
    return resolve_model(name, use_modelscope=modelscope, cache_dir=args.model.cache_dir, weights=weights)


def training_arguments(args: Arguments, hardware: Any) -> Any:
    """transformers' TrainingArguments; making them also sets up the process group of a torchrun launch."""
    from transformers import TrainingArguments

    from preference.models.hardware import batch_plan
    from preference.report.trackers import trackers
    from preference.train.sharding import strategy_options

    run = args.run
    # transformers renamed it between the versions that this runs on
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    options = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointing = options if run.gradient_checkpointing else {}
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
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        optim=run.optim,
        max_grad_norm=run.max_grad_norm,
        eval_strategy="steps" if run.do_eval and run.eval_steps else "no",
        eval_steps=run.eval_steps or None,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        save_total_limit=run.save_total_limit,
        logging_steps=run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        bf16=hardware.bf16 if run.bf16 is None else run.bf16,
        torch_compile=run.torch_compile,
        dataloader_num_workers=run.dataloader_num_workers,
        remove_unused_columns=False,
        report_to=trackers(run.report_to),
        run_name=run.run_name or f"{Path(run.output_dir).name}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}",
        use_cpu=hardware.device == "cpu",
        ddp_find_unused_parameters=False,
        seed=run.seed,
        do_train=run.do_train,
        do_eval=run.do_eval,
        **checkpointing,
        **({} if run.dry_run else strategy_options(run.strategy, WORLD_SIZE)),
    )


def objective_of(args: Arguments) -> Any:
    from preference.losses import Objective

    choice = args.objective
    return Objective(
        loss=choice.loss,
        beta=args.beta,
        nll_scope=choice.nll_scope,
        label_smoothing=choice.label_smoothing,
        simpo_gamma=choice.simpo_gamma,
        cpo_alpha=choice.cpo_alpha,
    )


def load_template(args: Arguments, tokenizer: Any) -> Any:
    from preference.templates.resolve import resolve_template

    conversation, warnings = resolve_template(args.data.template_name, tokenizer, fold_system=args.data.fold_system)
    say(f"template: {conversation.name}, stop text {conversation.stop_str!r}")
    for warning in warnings:
        say(f"warning: {warning}")
    return conversation


def show_first_pair(dataset: Any, tokenizer: Any) -> None:
    from preference.tokens.datasets import describe_pair

    say(f"\nthe first pair, as the model sees it:\n{describe_pair(dataset[0], tokenizer)}\n")


def on_paper(args: Arguments, source: str, hardware: Any, training: Any, train_set: Any) -> str:
    """What the run would do, need and take; no weight is loaded."""
    from preference.engine.batching import row_lengths, shared_prefix
    from preference.plan.dry_run import Setup, dry_run

    lengths, common = row_lengths(train_set), shared_prefix(train_set)
    setup = Setup(source, hardware, objective_of(args), training.bf16, lengths, common=common)
    cut = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return dry_run(args, setup, *cut, training.world_size)


def load_trainer(
    args: Arguments, source: str, hardware: Any, training: Any, tokenizer: Any, train_set: Any, eval_set: Any
) -> Any:
    from transformers import set_seed

    from preference.models.loading import add_adapter, load_model
    from preference.models.parameters import count_parameters

    choice = args.objective
    set_seed(args.run.seed)
    model = load_model(source, args, hardware, training.bf16)
    training.learning_rate = args.learning_rate(count_parameters(model)[1])
    if args.model.use_peft and args.run.do_train:
        model = add_adapter(model, args.model, args.run.seed)
    common = dict(
        objective=objective_of(args), train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    if choice.engine == "trl":
        from preference.train.trl_engine import make_trl_trainer

        return make_trl_trainer(model, training, **common)
    from preference.train.trainer import PairTrainer

    return PairTrainer(
        model,
        training,
        max_tokens_per_micro_batch=choice.max_tokens_per_micro_batch,
        share_prompt=choice.share_prompt,
        cache_dir=Path(args.model.cache_dir or "cache") / "reference",
        **common,
    )


def describe(args: Arguments, trainer: Any, conversation: Any, train_set: Any) -> dict[str, Any]:
    """What is about to be trained, in numbers; run.json keeps it."""
    from preference.models.hardware import detect
    from preference.models.parameters import count_parameters
    from preference.report.tables import save_json

    groups = (args.model, args.data, args.objective, args.run)
    trainable, parameters = count_parameters(trainer.model)
    pairs = trainer.get_total_train_batch_size(trainer.args)
    facts = {
        "arguments": {name: value for group in groups for name, value in vars(group).items()},
        "beta": args.beta,
        "learning_rate": trainer.args.learning_rate,
        "template": conversation.name,
        "hardware": str(detect(args.run.use_cpu)),
        "bf16": trainer.args.bf16,
        "world_size": trainer.args.world_size,
        "pairs_per_step": pairs,
        "parameters": parameters,
        "trainable": trainable,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }
    if RANK == 0:
        save_json(Path(args.run.output_dir) / "run.json", facts)
    name = args.model.model_name_or_path
    say(f"model: {name}, {parameters / 1e6:,.1f} M parameters, {trainable / 1e6:,.2f} M of them trained")
    if args.run.do_train:
        say(
            f"training: {len(train_set)} pairs, {pairs} per optimizer step, loss={args.objective.loss}, "
            f"engine={args.objective.engine}, learning rate {trainer.args.learning_rate:g}"
        )
    return facts


def find_start(args: Arguments, trainer: Any, conversation: Any, restarted: bool) -> Any:
    """Step 0, or a checkpoint of an unfinished run in output_dir."""
    from preference.train.identity import run_identity
    from preference.train.resuming import begin

    how = "auto" if restarted else args.resume
    identity = run_identity(args, trainer, conversation)
    start = begin(trainer, how, identity, strategy=args.run.strategy, anyway=args.run.resume_anyway)
    for note in start.notes:
        say(note)
    return start


def train(trainer: Any, start: Any) -> dict[str, float]:
    done = trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    return done.metrics | {"train_steps": done.global_step}


def save(trainer: Any, conversation: Any) -> None:
    """The adapter or model, with the tokenizer, the template and the stop tokens that it was trained with."""
    from preference.serve.loading import stop_ids
    from preference.templates.resolve import chat_template_to_save

    tokenizer = trainer.processing_class
    tokenizer.chat_template = chat_template_to_save(conversation, tokenizer)
    generation = trainer.model.generation_config
    stops = stop_ids(generation, conversation, tokenizer)  # the model's own too: Llama 3.1 has three
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = tokenizer.pad_token_id
    trainer.save_model()
    trainer.save_state()
    if RANK == 0:
        generation.save_pretrained(trainer.args.output_dir)


if __name__ == "__main__":
    try:
        main()
        if WORLD_SIZE > 1:
            end_process()
    except Exception as error:
        if type(error).__name__ == "StoppedBySignal":
            leave_after_signal()
        tell_of_failure()
        let_the_cause_speak(error)
        from preference.errors import PreferenceError

        if not isinstance(error, PreferenceError):  # a fault of the program: its traceback is wanted
            raise
        sys.exit(f"orpo_train.py: {type(error).__name__}: {error}")
