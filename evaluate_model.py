#!/usr/bin/env python3
"""Let a tuned model and its base sit multiple-choice exams, on this machine.

    python evaluate_model.py outputs/run --mcq CMB.json medqa_test.jsonl mmlu_anatomy_test.csv
    python evaluate_model.py Qwen/Qwen2.5-0.5B-Instruct --mcq ceval/*.csv --output scores.json

An option is chosen by likelihood, in three ways (see the table); no answer is generated, nothing is sent anywhere.
Files are read as CMB, CMExam, MedQA, MMLU, C-Eval, MedMCQA and ARC come: JSON, JSON lines or CSV. Questions with
several right answers are left out and counted. A run's output folder is compared with the model that it was tuned from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from preference.errors import PreferenceError
from preference.launch.process import stay_private
from preference.screen import shown


def main() -> None:
    args = parse_arguments()
    stay_private()
    try:
        evaluate(args)
    except PreferenceError as error:
        sys.exit(shown(f"evaluate_model.py: {error}"))


def evaluate(args: argparse.Namespace) -> None:
    from preference.serve.exam_files import read_exam
    from preference.serve.exams import MEASURES, sit, table

    exams = [read_exam(path) for path in args.mcq]  # before the model: a mistake shows at once
    for exam in exams:
        left = ", ".join(f"{count} left out: {why}" for why, count in exam.left_out.items())
        note(f"{exam.name}: {len(exam.questions)} questions{'; ' + left if left else ''}")
        exam.questions = exam.questions[: args.limit] if args.limit else exam.questions
    models, tokenizer = load(args)
    scores = [score for exam in exams for score in sit(exam, models, tokenizer, tell)]
    note("")
    print(shown(table(scores)))
    for measure, meaning in MEASURES.items():
        print(f"({measure}: {meaning})")
    if args.output:
        rows = [
            {"exam": s.exam, "measure": s.measure, "right": {name: row.tolist() for name, row in s.right.items()},
             "interval": {name: s.interval(name) for name in s.right}, "change": s.change()}
            for s in scores
        ]  # fmt: skip
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def load(args: argparse.Namespace) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """The models by name, each with what must be entered while it answers; and the tokenizer."""
    from preference.models.hardware import detect
    from preference.serve.loading import find_source, load_base_model, load_tokenizer, load_tuned_model, pick_dtype

    hub = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
    source = find_source(args.model, base=args.base_model, use_modelscope=hub)
    hardware = detect(args.use_cpu)
    dtype = pick_dtype(args.torch_dtype, hardware)
    note(f"loading {args.model} ...")
    tuned = load_tuned_model(source, dtype, hardware.device, hub)
    tokenizer = load_tokenizer(source)
    if source.adapter:
        return {"base": (tuned, tuned.disable_adapter), "tuned": (tuned, nullcontext)}, tokenizer
    if source.base is None:
        return {"model": (tuned, nullcontext)}, tokenizer
    note(f"loading the base model {source.base} ...")
    return {
        "base": (load_base_model(source, dtype, hardware.device, hub), nullcontext),
        "tuned": (tuned, nullcontext),
    }, (tokenizer)


def note(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def tell(who: str, done: int, of: int) -> None:
    if done % 50 == 0 or done == of:
        note(f"{who}: {done} of {of} questions")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="a run's output folder, one of its checkpoints, a model folder or a hub id")
    add("--mcq", nargs="+", metavar="FILE", required=True, help="multiple-choice files")
    add("--base_model", help="the model that it was tuned from, where it is not found or not written down")
    add("--limit", type=int, default=0, help="the first questions of each file only")
    add("--output", metavar="FILE", help="write every question's outcome as JSON")
    add("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--use_cpu", action="store_true", help="leave the GPU alone")
    args = parser.parse_args(words)
    if args.limit < 0:
        parser.error("--limit is at least 0")
    if args.output and any(Path(args.output).resolve() == Path(path).resolve() for path in args.mcq):
        parser.error("--output would overwrite an exam")
    return args


if __name__ == "__main__":
    main()
