#!/usr/bin/env python3
"""Talk to a tuned model in the terminal, compare it with its base, or answer a file of prompts.

    python chat.py outputs/run                          a run's output folder, a model folder or a hub id
    python chat.py outputs/run --both                   base and tuned answers side by side
    python chat.py outputs/run outputs/other            two models side by side
    python chat.py outputs/run --prompts questions.txt --output answers.jsonl
    python chat.py outputs/run --web                    a page in the browser (pip install gradio)

The prompt is written by the template that the model was trained with, and answers end where training ended them.
/good, /bad and /better 1|2 collect what you think of the answers as rows to train on (/help lists all commands).
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from preference.launch.process import quick_imports, stay_private
from preference.launch.tool import check_output, modelscope_asked, run_tool


def main() -> None:
    args = parse_arguments()
    stay_private()
    run_tool(lambda: chat(args), "chat.py")


def chat(args: argparse.Namespace) -> None:
    with quick_imports():
        from preference.serve.answer_file import answer_file, read_prompts
        from preference.serve.collect import Collector
        from preference.serve.models import Models
        from preference.serve.page import require_page, serve
        from preference.serve.terminal import Terminal

    check_output("--output", args.output, [args.prompts, args.model, args.base_model])
    prompts = read_prompts(args.prompts) if args.prompts else []  # before the model: a mistake shows at once
    if args.web:
        require_page(args.port)
    hub = modelscope_asked()
    models = Models(args, hub)
    rival = Models(argparse.Namespace(**vars(args) | {"model": args.rival}), hub) if args.rival else None
    collector = Collector(Path(args.collect))
    if args.prompts:
        answer_file(models, prompts, args)
    elif args.web:
        serve(models, args, collector, rival)
    else:
        Terminal(models, args.system, args.both, collector, rival).run()


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="a run's output folder, one of its checkpoints, a model folder or a hub id")
    add("rival", nargs="?", metavar="model2", help="a second one that answers beside it")
    add("--base_model", help="the model that it was tuned from, where it is not found or not written down")
    add("--template_name", help="conversation template, if not the one saved with the model")
    add("--system", help="system text to begin with")
    add("--both", action="store_true", help="also show what the model answered before tuning")
    add("--temperature", type=float, help="0 = the most likely word each time (default: 0.7; 0 with --prompts)")
    add("--top_p", type=float, default=0.9, help="draw from the likeliest tokens of this total probability")
    add("--max_new_tokens", type=int, default=512, help="longest answer")
    add(
        "--collect", metavar="DIR", default="collected", help="where /good, /bad and /better write (default: collected)"
    )
    add("--seed", type=int, default=42, help="seed of the draw")
    add("--torch_dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--use_cpu", action="store_true", help="leave the GPU alone")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    add("--prompts", metavar="FILE", help="answer these: jsonl ({question} or {prompt} rows), else one question a line")
    add("--output", metavar="FILE", help="where --prompts writes its jsonl (default: standard output)")
    add("--batch_size", type=int, default=8, help="prompts that --prompts answers at once")
    add("--web", action="store_true", help="a page in the browser instead of the terminal (needs gradio)")
    add("--port", type=int, default=7860, help="port of --web; the page is for this machine alone")
    args = parser.parse_args(words)
    if args.web and args.prompts:
        parser.error("--web and --prompts are two different things to do")
    if args.rival and (args.both or args.prompts):
        parser.error(f"two models answer side by side: {'--both' if args.both else '--prompts'} takes one")
    if args.output and not args.prompts:
        parser.error("--output goes with --prompts")
    if args.temperature is None:
        args.temperature = 0.0 if args.prompts else 0.7
    for name, good, wanted in (
        ("temperature", 0 <= args.temperature <= 1000, "at least 0 and at most 1000"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**32, "from 0 to 4294967295"),
        ("port", 1 <= args.port <= 65535, "from 1 to 65535"),
    ):
        if not good:
            parser.error(f"--{name} is {wanted}")
    return args


def command() -> None:
    """The console script."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    main()


if __name__ == "__main__":
    command()
