#!/usr/bin/env python3
"""From questions to pairs to train on: a model answers each several times, and the best and the worst become a row.

    python make_pairs.py questions.txt --model outputs/run --judge http://127.0.0.1:8000/v1 --output pairs.jsonl
    python make_pairs.py questions.jsonl --model outputs/run --judge Qwen/Qwen2.5-7B-Instruct --output pairs.jsonl
    python make_pairs.py questions.jsonl --model outputs/run --reward models/my-reward --output pairs.jsonl
    python make_pairs.py questions.txt --model outputs/run --person --output pairs.jsonl         (--web: on a page)

QUESTIONS is a file of one question a line, or of jsonl rows with "question" and, if there are, "system" and "history".
Without --judge, --reward or --person the rules alone decide. A run that was stopped goes on where it was when it is
started again, and gives the same file. Nothing is sent anywhere but to a --judge that is an address.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preference.errors import PreferenceError
from preference.launch.process import stay_private
from preference.launch.tool import INTERRUPTED, check_output, is_url, modelscope_asked, run_tool

if TYPE_CHECKING:
    from preference.serve.generation import Chat, Turn
    from preference.serve.scoring import Scorer

RULES = "length,language,format,repetition,refusal"


class PairsError(PreferenceError, ValueError):
    """Questions that give no pairs as asked; str() says what to change."""


def main() -> None:
    args = parse_arguments()
    stay_private()
    try:
        run_tool(lambda: make(args), "make_pairs.py")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("\nstopped: the same command goes on from here", file=sys.stderr)
        raise


def make(args: argparse.Namespace) -> None:
    from preference.serve.answer_file import read_prompts
    from preference.serve.models import note
    from preference.serve.pairs import Journal, Plan, draw, finish, open_workplace, rows
    from preference.serve.rules import Wanted

    check_output("--output", args.output, [args.questions, args.model, args.base_model])
    turns = questions_of(args, read_prompts(args.questions, "QUESTIONS"))  # before the model: a mistake shows at once
    wanted = Wanted(args.rules, args.min_length, args.max_length, args.format or "")
    plan = Plan(args.answers, args.temperature, args.batch_size, args.seed, wanted, args.min_margin)
    output = Path(args.output)
    folder = open_workplace(output, identity(args))
    page = page_of(args)
    chat = chat_of(args)
    drawn = draw(chat, turns, plan, Journal(folder / "answers.jsonl"), note)
    del chat  # its memory is the judge's
    scorer = page or scorer_of(args)
    note(f"scoring by {scorer.name}")
    faulty, drawn_in_all = sum(bool(answer.faults) for row in drawn for answer in row), sum(map(len, drawn))
    if args.person and faulty:
        note(f"{faulty} of {drawn_in_all} answers are cut or break a rule: one can be the worst, and never the best")
    found: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for row in rows(turns, drawn, scorer, plan, args.model, Journal(folder / "scores.jsonl")):
        if isinstance(row, str):
            without[row] += 1
        else:
            found.append(row)
    if not found:
        why = ", ".join(f"{count} {reason}" for reason, count in without.most_common())
        raise PairsError(f"no question gave a pair ({why}): more --answers, a higher --temperature, or fewer --rules")
    finish(output, folder, found)
    left = "; ".join(f"{count} without: {reason}" for reason, count in without.most_common())
    note(f"{output}: {len(found)} of {len(turns)} questions gave a pair{'; ' + left if left else ''}")


def questions_of(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[Turn]:
    """The conversations to answer, each once."""
    from preference.serve.answer_file import to_turn

    turns = []
    for number, row in enumerate(rows, 1):
        if "question" not in row:
            raise PairsError(f'{args.questions}, row {number}: pairs are made of rows with "question"')
        try:
            turns.append(to_turn(row if row.get("system") or not args.system else row | {"system": args.system}))
        except PreferenceError as error:
            raise PairsError(f"{args.questions}, row {number}: {error}") from None
    return list(dict.fromkeys(turns))


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """All that the output depends on: an unfinished run is finished by the same one alone."""
    from preference.serve.pairs import digest

    left_out = ("output", "questions", "judge_key_variable", "web", "port")
    return {"questions": digest(args.questions)} | {
        name: value if isinstance(value, (int, float, bool, str)) or value is None else list(value)
        for name, value in vars(args).items()
        if name not in left_out
    }


def chat_of(args: argparse.Namespace) -> Chat:
    from transformers.utils import logging

    from preference.models.hardware import detect
    from preference.serve.generation import Sampling
    from preference.serve.loading import find_source
    from preference.serve.models import note, open_chat

    note(f"loading {args.model} ...")
    logging.disable_progress_bar()
    code = args.trust_remote_code
    hub = modelscope_asked()
    source = find_source(args.model, base=args.base_model, use_modelscope=hub, trust_remote_code=code)
    sampling = Sampling(args.temperature[0], args.top_p, args.max_new_tokens, args.seed)
    return open_chat(source, detect(args.use_cpu), args.torch_dtype, sampling, hub, args.template_name)


def page_of(args: argparse.Namespace) -> Scorer | None:
    """The page for --person --web, before a model is loaded: a port that is taken shows at once."""
    if not args.web:
        return None
    from preference.serve.models import note
    from preference.serve.person_page import PersonPage

    page = PersonPage(args.port)
    note(f"open {page.url} in a browser of this machine; the questions come there once they are answered")
    return page


def scorer_of(args: argparse.Namespace) -> Scorer:
    from preference.models.hardware import detect
    from preference.serve.loading import pick_dtype
    from preference.serve.models import open_judge
    from preference.serve.scoring import JudgeScorer, Person, RewardScorer, RulesScorer

    if args.person:
        return Person()
    if args.judge:
        key = os.environ.get(args.judge_key_variable)
        options = {"dtype": args.torch_dtype, "use_cpu": args.use_cpu, "hub": modelscope_asked()}
        return JudgeScorer(open_judge(args.judge, args.judge_model, key, **options))
    if args.reward:
        hardware = detect(args.use_cpu)
        dtype = pick_dtype(args.torch_dtype, hardware)
        return RewardScorer(args.reward, hardware.device, dtype, args.trust_remote_code)
    return RulesScorer()


def numbers(text: str) -> tuple[float, ...]:
    found = tuple(float(word) for word in text.split(","))
    if not all(0 <= value < 100 for value in found):
        raise ValueError(text)
    return found


def rules(text: str) -> tuple[str, ...]:
    words = tuple(filter(None, text.split(",")))
    if set(words) - set(RULES.split(",")):
        raise argparse.ArgumentTypeError(f"takes names of {RULES}, with commas between them, or nothing")
    return words


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("questions", metavar="QUESTIONS", help="a file of questions")
    add("--model", required=True, help="who answers: a run's output folder, a model folder or a hub id")
    add("--output", required=True, metavar="FILE", help="jsonl of pairs to write; it appears whole or not at all")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--judge", metavar="URL|MODEL", help="an OpenAI-compatible server (http://.../v1) or a local model"
    )
    who.add_argument("--reward", metavar="MODEL", help="a reward model: one output over a conversation")
    who.add_argument("--person", action="store_true", help="ask in this terminal for the best and the worst answer")
    add("--web", action="store_true", help="with --person: ask in a browser, on a page for this machine alone")
    add("--port", type=int, default=7860, help="of the page of --web (default: 7860; 0: any that is free)")
    add("--judge_model", help="name of the model at --judge, where its server has several")
    add("--judge_key_variable", default="JUDGE_API_KEY", help="environment variable with the key for --judge")
    add("--answers", type=int, default=4, help="answers to each question (default: 4)")
    add("--temperature", type=numbers, default=(0.7, 1.0), help="of the answers, in turn (default: 0.7,1.0)")
    add("--top_p", type=float, default=0.95, help="draw from the likeliest tokens of this total probability")
    add("--max_new_tokens", type=int, default=512, help="longest answer; one that is cut there is never the better")
    add("--min_margin", type=float, default=0.0, help="scores of a pair differ by more than this")
    add("--rules", type=rules, default=RULES, help=f"what the better answer may not break (default: {RULES})")
    add("--min_length", type=int, default=1, help="rule length: characters")
    add("--max_length", type=int, default=20_000, help="rule length: characters")
    add("--format", help='rule format: "json", "plain" (no Markdown) or a regular expression that must be found')
    add("--system", help="system text for rows that have none")
    add("--template_name", help="conversation template, if not the one saved with the model")
    add("--base_model", help="the model that --model was tuned from, where it is not found")
    add("--batch_size", type=int, default=8, help="questions that are answered at once")
    add("--seed", type=int, default=42, help="seed of the draws")
    add("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--use_cpu", action="store_true", help="leave the GPU alone")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    args = parser.parse_args(words)
    for name, good, wanted in (
        ("answers", args.answers >= 2, "at least 2"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("min_margin", args.min_margin >= 0, "at least 0"),
        ("seed", 0 <= args.seed < 2**32, "from 0 to 4294967295"),
        ("min_length", "length" in args.rules or args.min_length == 1, "for --rules with length"),
        ("max_length", "length" in args.rules or args.max_length == 20_000, "for --rules with length"),
        ("max_length", 0 <= args.min_length <= args.max_length, "at least --min_length, and that at least 0"),
        ("temperature", any(args.temperature), "above 0 for one answer at least: at 0 all are the same"),
        ("web", args.person or not args.web, "for --person"),
        ("port", args.web or args.port == 7860, "for --web"),
        ("port", 0 <= args.port < 65536, "from 0 to 65535"),
        ("judge_model", is_url(args.judge or "") or not args.judge_model, "for --judge URL"),
        ("format", not args.format or "format" in args.rules, "for --rules with format"),
        ("format", args.format in (None, "json", "plain") or is_pattern(args.format), "no regular expression"),
    ):
        if not good:
            parser.error(f"--{name} is {wanted}")
    return args


def is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


if __name__ == "__main__":
    main()
