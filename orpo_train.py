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
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from preference.arguments import Arguments, parse_arguments
from preference.heartbeat import tell_of_failure, watch_machines

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

    from preference.agreement import on_every_rank
    from preference.evaluation import Evaluation
    from preference.hardware import detect
    from preference.model import load_tokenizer, untuned
    from preference.progress import attach_progress
    from preference.resuming import finish, go_on_after_restart
    from preference.sharding import join_deepspeed
    from preference.signals import StoppedBySignal, StopSignals, StopTogether

    leave_if_stopped()
    output_dir = Path(args.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hardware = detect(args.run.use_cpu)
    training = training_arguments(args, hardware)
    join_deepspeed(args.run.strategy)
    compare_settings(args)
    restarted = go_on_after_restart(training, RESTARTS)
    say(f"device: {hardware}; computing in {'bfloat16' if training.bf16 else 'float32'}")
    with on_every_rank():
        source = find_model(args)
        tokenizer = load_tokenizer(args.model.tokenizer_name_or_path or source, args.model)
        conversation = load_template(args, tokenizer)

    # ---- load, check, render, tokenize, filter
    with on_every_rank():
        train_set, eval_set, questions = load_data(args, conversation, tokenizer)
    compare_data(train_set, eval_set)
    show_first_pair(train_set or eval_set, tokenizer)

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
    report(args, source, facts, results, evaluation, samples)
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
    from preference.signals import EXIT_STOPPED

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
    from preference.agreement import code_fingerprint, compare_ranks

    groups = (args.model, args.data, args.objective, args.run)
    flags = {name: value for group in groups for name, value in vars(group).items() if name != "cache_dir"}
    compare_ranks({"code": code_fingerprint(), "versions": versions(), **flags})


def compare_data(train_set: Any, eval_set: Any) -> None:
    from preference.agreement import compare_ranks
    from preference.reference import data_fingerprint

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
    from preference.starter import resolve_model

    modelscope = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
    name = args.model.model_name_or_path
    return resolve_model(name, use_modelscope=modelscope, cache_dir=args.model.cache_dir)


def training_arguments(args: Arguments, hardware: Any) -> Any:
    """transformers' TrainingArguments; making them also sets up the process group of a torchrun launch."""
    from transformers import TrainingArguments

    from preference.hardware import batch_plan
    from preference.sharding import strategy_options

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
        report_to=run.report_to.split(","),
        run_name=run.run_name,
        use_cpu=hardware.device == "cpu",
        ddp_find_unused_parameters=False,
        seed=run.seed,
        do_train=run.do_train,
        do_eval=run.do_eval,
        **checkpointing,
        **strategy_options(run.strategy, WORLD_SIZE),
    )


def load_template(args: Arguments, tokenizer: Any) -> Any:
    from preference.templates import resolve_template

    conversation, warnings = resolve_template(args.data.template_name, tokenizer, fold_system=args.data.fold_system)
    say(f"template: {conversation.name}, stop text {conversation.stop_str!r}")
    for warning in warnings:
        say(f"warning: {warning}")
    return conversation


def load_data(args: Arguments, conversation: Any, tokenizer: Any) -> tuple[Any, Any, dict[str, str]]:
    """(training set, evaluation set, questions of the latter by source); a set is None where this run needs none.

    data_report.json says what was left out, and why.
    """
    from preference.text_stats import shared_prompts
    from preference.tokenization import build_dataset, split_by_prompt
    from preference.triples import DataReport, load_rows

    data, report = args.data, DataReport()
    training_source = f"hub:{data.dataset_name}" if data.dataset_name else data.train_file_dir
    held_out = args.run.do_eval and not args.evaluation_files and data.validation_split_percentage > 0

    def load(source: Any, section: str) -> list[Any]:
        return load_rows(
            [source],
            report,
            data_check=data.data_check,
            format=data.data_format,
            columns=data.columns,
            axis=data.axis,
            min_score_gap=data.min_score_gap,
            section=section,
        )

    def build(rows: list[Any], limit: int, section: str) -> Any:
        return build_dataset(
            sample(rows, limit, args.run.seed, report),
            conversation,
            tokenizer,
            max_source_length=data.max_source_length,
            max_target_length=data.max_target_length,
            report=report,
            truncate=data.truncate,
            cache_dir=Path(args.model.cache_dir or "cache") / "prepared",
            prompt_is_rendered=data.prompt_is_rendered,
            section=section,
        )

    try:
        train_rows = load(training_source, "train_text") if args.run.do_train else None
        if args.evaluation_files:
            eval_rows = load(data.validation_file_dir, "evaluation_text") if args.run.do_eval else None
        elif held_out and args.run.do_train:
            train_rows, eval_rows = split_by_prompt(train_rows, data.validation_split_percentage, args.run.seed)
        else:
            eval_rows = None if args.run.do_train else load(training_source, "evaluation_text")
        shared_prompts(train_rows or (), eval_rows or (), report)
        train_set = build(train_rows, data.max_train_samples, "train") if train_rows else None
        eval_set = build(eval_rows, data.max_eval_samples, "evaluation") if eval_rows else None
    finally:  # also where nothing is left: the report says why
        if RANK == 0:
            report.save(Path(args.run.output_dir) / "data_report.json")
    say(report.summary())
    return train_set, eval_set, {f"{row.file}:{row.line}": row.question or row.prompt for row in eval_rows or ()}


def sample(rows: list[Any], limit: int, seed: int, report: Any) -> list[Any]:
    """`limit` rows drawn with the seed, in their order; the head of a file is seldom like the rest of it."""
    if limit < 0 or limit >= len(rows):
        return rows
    chosen = set(random.Random(seed).sample(range(len(rows)), limit))
    for i, row in enumerate(rows):
        if i not in chosen:
            report.drop("not_sampled", row.file, row.line)
    return [rows[i] for i in sorted(chosen)]


def show_first_pair(dataset: Any, tokenizer: Any) -> None:
    from preference.tokenization import describe_pair

    say(f"\nthe first pair, as the model sees it:\n{describe_pair(dataset[0], tokenizer)}\n")


def load_trainer(
    args: Arguments, source: str, hardware: Any, training: Any, tokenizer: Any, train_set: Any, eval_set: Any
) -> Any:
    from transformers import set_seed

    from preference.losses import Objective
    from preference.model import add_adapter, count_parameters, load_model

    choice = args.objective
    objective = Objective(
        loss=choice.loss,
        beta=args.beta,
        nll_scope=choice.nll_scope,
        label_smoothing=choice.label_smoothing,
        simpo_gamma=choice.simpo_gamma,
        cpo_alpha=choice.cpo_alpha,
    )
    set_seed(args.run.seed)
    model = load_model(source, args, hardware, training.bf16)
    training.learning_rate = args.learning_rate(count_parameters(model)[1])
    if args.model.use_peft and args.run.do_train:
        model = add_adapter(model, args.model, args.run.seed)
    common = dict(objective=objective, train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer)
    if choice.engine == "trl":
        from preference.trl_engine import make_trl_trainer

        return make_trl_trainer(model, training, **common)
    from preference.trainer import PairTrainer

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
    from preference.hardware import detect
    from preference.model import count_parameters
    from preference.outcome import save_json

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


class Samples:
    """A few evaluation questions, answered greedily by the base and by the tuned model."""

    def __init__(self, args: Arguments, trainer: Any, conversation: Any, eval_set: Any, questions: dict) -> None:
        from preference.templates import stop_token_ids

        count = min(args.run.sample_answers, len(eval_set)) if eval_set is not None else 0
        picked = sorted(random.Random(args.run.seed).sample(range(len(eval_set)), count)) if count else []
        self.rows = [eval_set[i] | {"question": questions[eval_set[i]["source"]]} for i in picked]
        self.records = [{key: row[key] for key in ("source", "question", "chosen")} for row in self.rows]
        self.trainer, self.tokens = trainer, args.run.sample_tokens
        self.stop_ids = stop_token_ids(conversation, trainer.processing_class)

    def answer(self, who: str) -> None:
        """The first rank generates; all of them do where the model's weights are shared out."""
        from preference.outcome import greedy_answers
        from preference.sharding import takes_all_ranks

        if RANK == 0 or takes_all_ranks(self.trainer):
            self.trainer.shard()
            prompts = [row["prompt_ids"] for row in self.rows]
            tokenizer = self.trainer.processing_class
            answers = greedy_answers(self.trainer.model, tokenizer, prompts, self.stop_ids, self.tokens)
            for record, answer in zip(self.records, answers, strict=True):
                record[who] = answer


def find_start(args: Arguments, trainer: Any, conversation: Any, restarted: bool) -> Any:
    """Step 0, or a checkpoint of an unfinished run in output_dir."""
    from preference.identity import run_identity
    from preference.resuming import begin

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
    from preference.loading import stop_ids
    from preference.templates import chat_template_to_save

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


def report(
    args: Arguments, source: str, facts: dict[str, Any], results: dict[str, float], evaluation: Any, samples: Samples
) -> None:
    """What changed: figures and answers as files, report.html, the model card, and the same on the screen."""
    from preference.evaluation import table
    from preference.outcome import comparison, model_card, save_json, side_by_side
    from preference.report import write_report

    if RANK != 0:
        return
    output_dir = Path(args.run.output_dir)
    before, after = (evaluation.metrics.get(who, {}) for who in ("base", "tuned"))
    analysis, compared = evaluation.analysis(), comparison(before, after)
    base = {f"base_{name}": value for name, value in before.items()}
    save_json(output_dir / "all_results.json", {**results, **base, **after})
    save_json(output_dir / "samples.json", samples.records)
    if analysis:
        save_json(output_dir / "evaluation.json", analysis)
        save_json(output_dir / "worst_pairs.json", evaluation.worst("tuned"))
    if args.run.do_train:
        (output_dir / "README.md").write_text(model_card(source, facts, results, compared), encoding="utf-8")
    for record in samples.records:
        answers = {name: record[name] for name in ("base", "tuned") if name in record}
        say("\n" + side_by_side(record["question"], answers))
    say(f"\n{compared}")
    if analysis:
        say(f"\n{table(analysis)}")
    say(f"\nsaved in {output_dir}" + (f"; read {write_report(output_dir)}" if args.run.html_report else ""))


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
        # The project's own errors are written for the user; a traceback would only hide them. All others are faults.
        if not type(error).__module__.startswith(("preference", "conversation")):
            raise
        sys.exit(f"orpo_train.py: {type(error).__name__}: {error}")
