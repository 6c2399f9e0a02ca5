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

import os
from pathlib import Path
from typing import Any

from preference.arguments import Arguments, parse_arguments
from preference.launch.heartbeat import follow_launcher, watch_others
from preference.launch.process import (
    LOCAL_RANK,
    RANK,
    RESTARTS,
    WORLD_SIZE,
    begin_screen,
    leave_if_stopped,
    log_errors_in,
    quick_imports,
    run_script,
    say,
    stay_private,
)  # fmt: skip
from preference.launch.tool import modelscope_asked


def main() -> None:
    args = parse_arguments(environ=os.environ)
    begin_screen(args.run.lang)
    stay_private()
    follow_launcher(os.environ)

    with quick_imports():
        watch_others(os.environ, args.run.lost_after)
        from preference.launch.agreement import on_every_rank
        from preference.launch.signals import StoppedBySignal, StopSignals
        from preference.models.hardware import detect
        from preference.models.loading import load_tokenizer, untuned
        from preference.models.vocabulary import add_to_tokenizer, tokens_to_add
        from preference.plan.dry_run import on_paper
        from preference.plan.first_budget import fit_to_memory
        from preference.report.answers import Samples
        from preference.report.evaluation import Evaluation
        from preference.report.facts import plan_of, run_facts, show_plan
        from preference.report.progress import attach_progress
        from preference.report.results import write_results
        from preference.report.trackers import begin_reporting, trackers
        from preference.report.watch import serve
        from preference.terminal.console import terminal
        from preference.terminal.language import tr
        from preference.tokens.datasets import sets_of
        from preference.tokens.showing import show_pair
        from preference.train import setup
        from preference.train.resuming import finish, resume_after_restart
        from preference.train.run_data import load_data
        from preference.train.saving import save
        from preference.train.sharding import join_deepspeed
        from preference.train.stopping import StopTogether

    # ---- this process, among those of the run
    leave_if_stopped()
    output_dir = Path(args.run.output_dir)
    hardware = detect(args.run.use_cpu)
    training = setup.training_arguments(args, hardware, WORLD_SIZE, trackers(args.run.report_to))
    join_deepspeed(args.run.strategy)
    setup.compare_settings(args)
    restarted = resume_after_restart(training, RESTARTS)
    terminal.rows(tr("where"), [where(hardware, training, output_dir)])

    # ---- load, check, render, tokenize, filter
    with on_every_rank():
        if not args.run.dry_run:
            setup.claim_output(args, RANK)
            log_errors_in(output_dir)
        if RANK == 0 and args.run.watch:
            terminal.rows(tr("live"), [tr("watching", url=serve([output_dir]).url)])
        if RANK == 0 and not args.run.dry_run:
            begin_reporting(training.report_to, output_dir, training.run_name, os.environ)
        source = find_model(args)
        tokenizer = load_tokenizer(args.model.tokenizer_name_or_path or source.tokenizer, args.model)
        add_to_tokenizer(tokenizer, tokens_to_add(args.model.add_tokens))
        conversation = load_template(args, tokenizer)
    save_report = RANK == 0 and not args.run.dry_run
    with on_every_rank():
        train_set, eval_set, questions = load_data(
            args, conversation, tokenizer, save_report=save_report, terminal=terminal
        )
    setup.compare_data(train_set, eval_set)
    setup.check_length(args, training, len(train_set or ()))
    setup.check_kind(args, train_set, eval_set)
    first = (train_set or next(iter(sets_of(eval_set).values())))[0]
    show_pair(first, tokenizer, terminal)
    args, budget = fit_to_memory(args, source, hardware, setup.objective_of(args), training, train_set, say)
    if args.run.dry_run:
        look_at_headers(args, source, tokenizer, conversation, train_set, eval_set)
        say(on_paper(args, source, hardware, setup.objective_of(args), training, train_set, budget))
        return

    # ---- the model and its trainer
    trainer = setup.load_trainer(
        args, source, hardware, training, tokenizer, conversation, train_set, eval_set, budget=budget
    )
    facts = run_facts(args, source, trainer, conversation)
    start = setup.find_start(args, trainer, conversation, restarted) if args.run.do_train else None
    for note in start.notes if start else ():
        say(note)
    signals = StopSignals(silent=LOCAL_RANK > 0).install()
    stop = StopTogether(trainer, signals, start.step if start else 0)
    trainer.add_callback(stop)

    # ---- evaluate, train, save, evaluate
    samples = Samples(args, trainer, conversation, eval_set, questions)
    evaluation = Evaluation(trainer, eval_set, questions)
    progress = attach_progress(
        trainer, output_dir, prompts=samples.rows, stop_ids=samples.stop_ids, max_new_tokens=args.run.sample_tokens,
        titled=args.run.window_title,
    )  # fmt: skip
    progress.measure_peak()
    show_plan(facts, plan_of(args, trainer, progress.meter, train_set) if args.run.do_train else None, terminal)
    results: dict[str, float] = {}
    with untuned(trainer.model, scoring=not args.run.do_train) as separate:
        if args.run.do_train or separate:
            evaluation.run("base")
            setup.selection_of(args).check(evaluation.metrics.get("base", {}))
            samples.answer("base")
    if start:
        stop.start_training()
        done = trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
        results = done.metrics | {"train_steps": done.global_step}
        if stop.stopping:
            raise StoppedBySignal(done.global_step)
        signals.phase = "finishing"
        facts |= setup.end_with(trainer, args)
        save(trainer, conversation, facts)
    evaluation.run("tuned")
    samples.answer("tuned")

    # ---- what changed
    if RANK == 0:
        write_results(args, source.base, facts, results, evaluation, samples, terminal)
    if args.run.do_train:
        finish(trainer)


def where(hardware: Any, training: Any, output_dir: Path) -> str:
    from preference.models.hardware import half_type, type_name
    from preference.terminal.language import tr

    dtype = type_name(half_type(training))
    return "; ".join([str(hardware), tr("computing", dtype=dtype), tr("into", folder=output_dir)])


def find_model(args: Arguments) -> Any:
    """What is handed in: a base, and the adapter over it if there is one."""
    from preference.models.sources import find_model

    return find_model(
        args.model.model_name_or_path,
        args.adapter,
        base_given="model_name_or_path" in args.given,
        use_modelscope=modelscope_asked(),
        cache_dir=args.model.cache_dir,
        weights=not args.run.dry_run,
        warn=lambda text: say(f"warning: {text}"),
    )


def look_at_headers(args: Arguments, source: Any, tokenizer: Any, conversation: Any, *sets: Any) -> None:
    """The look that a run has at its model, from the headers of the weight files."""
    from preference.models.adapters import check_on_paper
    from preference.models.look import look_on_paper
    from preference.models.quantized import as_stored, check_trainable, quantizer_of
    from preference.models.vocabulary import add_rows, tokens_to_add
    from preference.train.setup import check_room

    cache, code = args.model.cache_dir, args.model.trust_remote_code
    model = look_on_paper(source.base, cache_dir=cache, trust_remote_code=code) if source.fetched else None
    if model is None:
        say("the weights are not on this machine: whether they are whole is seen when the run starts")
        return
    if source.adapter:
        check_on_paper(model, source.adapter)
    add_rows(model, tokenizer, tokens_to_add(args.model.add_tokens))
    check_room(model, tokenizer, conversation, *sets)
    stored = as_stored(source.base, model.config)
    if stored is None or stored.dense:
        say(f"weights of {source.base}: every tensor is there, of the right shape")
    else:
        check_trainable(source.base, quantizer_of(model.config), args.model.use_peft)
        say(f"weights of {source.base}: quantised with {stored.name}; the run itself sees whether they are whole")
    if source.adapter:
        say(f"adapter {source.adapter}: every tensor has its place there")


def load_template(args: Arguments, tokenizer: Any) -> Any:
    from preference.templates.resolve import resolve_template
    from preference.terminal.console import terminal
    from preference.terminal.language import tr

    conversation, warnings = resolve_template(args.data.template_name, tokenizer, fold_system=args.data.fold_system)
    terminal.rows(tr("template"), [tr("template_stop", name=conversation.name, stop=conversation.stop_str)])
    for warning in warnings:
        terminal.rows(tr("warning"), [terminal.cut(warning, 2) if terminal.coloured else warning], style="yellow")
    return conversation


def command() -> None:
    """The console script."""
    run_script(main, "orpo_train.py")


if __name__ == "__main__":
    command()
