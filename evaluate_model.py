#!/usr/bin/env python3
"""Let a tuned model and its base sit exams, follow instructions, and be judged against each other.

    python evaluate_model.py outputs/run --mcq CMB.json medqa_test.jsonl mmlu_anatomy_test.csv
    python evaluate_model.py outputs/run --instructions ifeval.jsonl ifeval_zh.jsonl
    python evaluate_model.py outputs/run --win_rate questions.jsonl --judge http://127.0.0.1:8000/v1
    python evaluate_model.py outputs/run --win_rate questions.jsonl --judge Qwen/Qwen2.5-7B-Instruct

--mcq: multiple-choice files as CMB, CMExam, MedQA, MMLU, C-Eval, MedMCQA and ARC come (JSON, JSON lines, CSV).
An option is chosen by likelihood, in three ways (see the table). Questions with several right answers are left out
and counted.
--instructions: instructions that a program can check, in IFEval's form, on greedy answers.
--win_rate: a judge compares the greedy answers of both models, in both orders: an OpenAI-compatible server, or a
local model by likelihood. Every judgement is kept in a jsonl file.
A run's output folder is compared with the model that it was tuned from. Nothing leaves this machine unless --judge
is the URL of another one; a key for it comes from the environment variable JUDGE_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preference.launch.process import stay_private
from preference.launch.tool import check_output, is_url, modelscope_asked, run_tool
from preference.screen import shown


def main() -> None:
    args = parse_arguments()
    stay_private()
    run_tool(lambda: evaluate(args), "evaluate_model.py")


def evaluate(args: argparse.Namespace) -> None:
    from preference.serve.answer_file import read_prompts, to_turn
    from preference.serve.candidates import Candidates
    from preference.serve.exam_files import read_exam
    from preference.serve.exams import MEASURES, sit
    from preference.serve.generation import Turn
    from preference.serve.instructions import MEASURES as FOLLOWED
    from preference.serve.instructions import read_tasks, score

    # before the model: a mistake shows at once
    read = [*args.mcq, *args.instructions, args.win_rate, args.model, args.base_model]
    check_output("--output", args.output, read)
    check_output("--judgements", args.judgements, read)
    exams = [read_exam(path) for path in args.mcq]
    tasks = {Path(path).name: read_tasks(path) for path in args.instructions}
    rows = read_prompts(args.win_rate, "--win_rate") if args.win_rate else []
    for exam in exams:
        left = ", ".join(f"{count} left out: {why}" for why, count in exam.left_out.items())
        note(f"{exam.name}: {len(exam.questions)} questions{'; ' + left if left else ''}")
        exam.questions = exam.questions[: args.limit or None]
    candidates = Candidates(args, modelscope_asked())
    scores = [score for exam in exams for score in sit(exam, candidates.models, candidates.tokenizer, tell)]
    meanings = dict(MEASURES) if exams else {}
    for name, found in tasks.items():
        found = found[: args.limit or None]
        answers = candidates.answer([Turn(task.prompt) for task in found])
        scores += score(name, found, answers)
        meanings |= FOLLOWED
    if scores:
        write_scores(args, scores, meanings)
    if rows:
        compare(args, candidates, [to_turn(row) for row in rows[: args.limit or None]])


def write_scores(args: argparse.Namespace, scores: Sequence[Any], meanings: dict[str, str]) -> None:
    from preference.serve.exams import table

    note("")
    print(shown(table(scores)))
    for measure, meaning in meanings.items():
        print(f"({measure}: {meaning})")
    if args.output:
        rows = [
            {"exam": s.exam, "measure": s.measure, "right": {name: row.tolist() for name, row in s.right.items()},
             "interval": {name: s.interval(name) for name in s.right}, "change": s.change()}
            for s in scores
        ]  # fmt: skip
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compare(args: argparse.Namespace, candidates: Any, turns: Sequence[Any]) -> None:
    """The win rate of the tuned model against its base."""
    import numpy as np

    from preference.serve.judge import NoVerdict, stays_here
    from preference.serve.models import open_judge
    from preference.serve.win_rate import judge_all, summary, table

    if is_url(args.judge):
        where = "on this machine" if stays_here(args.judge) else "another machine"
        note(f"questions and the answers of both models are sent to {args.judge}, {where}")
    key = os.environ.get("JUDGE_API_KEY")
    judge = open_judge(
        args.judge, args.judge_model, key, dtype=args.torch_dtype, use_cpu=args.use_cpu, hub=candidates.hub
    )
    answers = candidates.answer(turns)
    place = Path(args.judgements)
    with place.open("x", encoding="utf-8") as file:
        scores_N2 = judge_all(judge, turns, answers, file, tell)
    base, tuned = answers.values()
    figures = summary(scores_N2, np.array([len(b) - len(a) for a, b in zip(base, tuned, strict=True)]))
    note("")
    print(shown(table(figures, judge.name)))
    print(shown(f"every judgement: {place}"))
    if not figures["questions"]:
        raise NoVerdict(f"{judge.name} gave no verdict on any question: {place} has what it said; name another --judge")


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
    add("--mcq", nargs="+", metavar="FILE", default=[], help="multiple-choice files")
    add("--instructions", nargs="+", metavar="FILE", default=[], help="jsonl files in IFEval's form")
    add("--win_rate", metavar="FILE", help='jsonl of {"question"} or {"prompt"} rows, else one question a line')
    add(
        "--judge", metavar="URL|MODEL", help="who judges: an OpenAI-compatible server (http://.../v1), or a local model"
    )
    add("--judge_model", help="the server's name of the model (default: the only one that it has)")
    add(
        "--judgements",
        metavar="FILE",
        help="where every judgement goes (default: win_rate.jsonl in the model's folder)",
    )
    add("--base_model", help="the model that it was tuned from, where it is not found or not written down")
    add("--limit", type=int, default=0, help="the first questions of each file only")
    add("--output", metavar="FILE", help="write every question's outcome of --mcq and --instructions as JSON")
    add("--max_new_tokens", type=int, default=512, help="longest answer")
    add("--batch_size", type=int, default=8, help="prompts answered at once")
    add("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--use_cpu", action="store_true", help="leave the GPU alone")
    args = parser.parse_args(words)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the flags mean together; ends the process with a sentence where they do not."""
    if not (args.mcq or args.instructions or args.win_rate):
        parser.error("nothing to evaluate: give --mcq, --instructions or --win_rate")
    if bool(args.win_rate) != bool(args.judge):
        parser.error("--win_rate and --judge go together")
    if args.judge_model and not is_url(args.judge or ""):
        parser.error("--judge_model is the name of a server's model: it goes with --judge URL")
    if args.judgements and not args.win_rate:
        parser.error("--judgements goes with --win_rate")
    if args.output and not (args.mcq or args.instructions):
        parser.error("--output goes with --mcq and --instructions; --judgements is the file of --win_rate")
    if args.limit < 0:
        parser.error("--limit is at least 0")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is at least 1")
    if args.win_rate:
        folder = Path(args.model) if Path(args.model).is_dir() else Path()
        args.judgements = args.judgements or str(folder / "win_rate.jsonl")
        if Path(args.judgements).exists():
            parser.error(f"{args.judgements} is there already: move it away, or give another file with --judgements")


if __name__ == "__main__":
    main()
