#!/usr/bin/env python3
"""Many short runs, one after another, and a line of JSON for each: the studies of docs/training.md.

    python benchmarks/study.py PLAN RESULTS [flags of every run]

PLAN (benchmarks/studies has some, each with its command) has a line for each run: its name, then its flags of
orpo_train.py; # begins a comment. A run whose name and flags are in RESULTS already is not repeated, so that a study
that was stopped resumes. A run is trained and evaluated on its held-out pairs, with --before also before it is trained
(`--do_train false` makes the base a run of its own);
--answers N writes answers to N held-out questions.

Each run is a fork of this process, which has imported everything once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import resource
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import orpo_train
from preference.arguments import parse_arguments
from preference.launch.process import say
from preference.models.hardware import detect
from preference.models.loading import load_tokenizer, untuned
from preference.report.evaluation import Evaluation, mean_margins
from preference.report.tables import greedy_answers
from preference.templates.resolve import stop_token_ids
from preference.terminal.console import terminal
from preference.train import setup
from preference.train.run_data import load_data


def run(words: list[str], answers: int, before: bool) -> dict[str, Any]:
    """One run: its figures, its answers, its CPU seconds."""
    args = parse_arguments(words)
    hardware = detect(args.run.use_cpu)
    training = setup.training_arguments(args, hardware, 1, [])
    source = orpo_train.find_model(args)
    tokenizer = load_tokenizer(source.tokenizer, args.model)
    conversation = orpo_train.load_template(args, tokenizer)
    train_set, eval_set, questions = load_data(args, conversation, tokenizer, save_report=False, terminal=terminal)
    trainer = setup.load_trainer(args, source, hardware, training, tokenizer, conversation, train_set, eval_set)
    evaluation = Evaluation(trainer, eval_set, questions)
    if before:
        evaluation.run("base")
    seconds, cpu = time.perf_counter(), time.process_time()
    training_metrics = trainer.train().metrics if args.run.do_train else {}
    spent = {"seconds": time.perf_counter() - seconds, "cpu_seconds": time.process_time() - cpu}
    asked = spread(eval_set, answers)
    with untuned(trainer.model, scoring=not args.run.do_train):
        evaluation.run("tuned")
        stop_ids, prompts = stop_token_ids(conversation, tokenizer), [row["prompt_ids"] for row in asked]
        found = greedy_answers(trainer.model, tokenizer, prompts, stop_ids, args.run.sample_tokens)
    analysis = evaluation.analysis()
    return {
        "learning_rate": training.learning_rate,
        "training": training_metrics,
        "before": evaluation.metrics.get("base", {}),
        "metrics": evaluation.metrics["tuned"],
        "script": {
            script: {key: figures["tuned"][key] for key in ("pairs", "accuracy", "margin")}
            | {"interval": figures["tuned"]["interval"]["accuracy"]}
            for script, figures in analysis.get("script", {}).items()
        },
        "all": analysis["all"]["tuned"],
        "margins": [round(float(m), 4) for m in mean_margins(evaluation.sums["tuned"], evaluation.lengths())],
        "answers": [
            {"question": questions[row["source"]], "answer": text} for row, text in zip(asked, found, strict=True)
        ],
        **spent,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def spread(rows: Any, count: int) -> list[dict[str, Any]]:
    """`count` rows at equal distances."""
    return [rows[i * len(rows) // count] for i in range(count)]


def record(words: list[str], answers: int, before: bool, send: Any) -> None:
    try:
        send.send(run(words, answers, before))
    except BaseException:
        send.send({"failed": traceback.format_exc()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--before", action="store_true")
    args, common = parser.parse_known_args()
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    seen = {(entry["name"], tuple(entry["words"])) for entry in map(json.loads, lines)}
    context = multiprocessing.get_context("fork")
    while todo := [run for run in planned(args.plan, common) if run not in seen]:  # the plan may grow meanwhile
        name, words = todo[0]
        receive, send = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            flags = [*words, f"--output_dir={folder}"]
            child = context.Process(target=record, args=(flags, args.answers, args.before, send))
            child.start()
            send.close()
            try:
                outcome = receive.recv()
            except EOFError:
                outcome = {"failed": "the process ended without a word"}
            child.join()
        entry = {"name": name, "words": words, "date": datetime.datetime.now().isoformat("T", "seconds"), **outcome}
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        seen.add((name, words))
        say(f"{name}: {outcome.get('failed') or outcome['all']['accuracy']}")


def planned(plan: Path, common: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(name, flags) of each line of the plan."""
    lines = [shlex.split(line, comments=True) for line in plan.read_text(encoding="utf-8").splitlines()]
    return [(words[0], (*words[1:], *common)) for words in lines if words]


if __name__ == "__main__":
    main()
