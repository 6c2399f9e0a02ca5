#!/usr/bin/env python3
"""Talk to a tuned model in the terminal, compare it with its base, or answer a file of prompts.

    python chat.py outputs/run                          a run's output folder, a model folder or a hub id
    python chat.py outputs/run --both                   base and tuned answers side by side
    python chat.py outputs/run --prompts questions.txt --output answers.jsonl
    python chat.py outputs/run --web                    a page in the browser (pip install gradio)

The prompt is written by the template that the model was trained with, and answers end where training ended them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from preference.errors import PreferenceError

if TYPE_CHECKING:
    from preference.serve.generation import Chat, Turn, Within
    from preference.serve.loading import Source

HELP = """\
/both             show base and tuned answers side by side, or stop doing so
/both QUESTION    do it for this question alone
/system TEXT      what the model is told about itself; without TEXT the template's default
/reset            forget the conversation
/quit             leave (or Ctrl-D); Ctrl-C stops an answer
//...             a question that begins with a slash"""
HOST = "127.0.0.1"  # of the page: no other machine can open it
# An answer is shown as Markdown, and an image in it would be fetched from anywhere.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' data: blob:">"""
UNTUNED, TUNED = "before tuning", "after tuning"  # the page's headings of two answers to a question


def main() -> None:
    args = parse_arguments()
    prompts = read_prompts(args.prompts) if args.prompts else []  # before the model: a mistake shows at once
    if args.web:
        require_page(args.port)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")

    try:
        models = Models(args)
        if args.prompts:
            answer_file(models, prompts, args)
        elif args.web:
            serve(models, args)
        else:
            Terminal(models, args.system, args.both).run()
    except PreferenceError as error:
        sys.exit(f"chat.py: {error}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="a run's output folder, one of its checkpoints, a model folder or a hub id")
    add("--base_model", help="the model that it was tuned from, where it is not found or not written down")
    add("--template_name", help="conversation template, if not the one saved with the model")
    add("--system", help="system text to begin with")
    add("--both", action="store_true", help="also show what the model answered before tuning")
    add("--temperature", type=float, help="0 = the most likely word each time (default: 0.7; 0 with --prompts)")
    add("--top_p", type=float, default=0.9, help="draw from the likeliest tokens of this total probability")
    add("--max_new_tokens", type=int, default=512, help="longest answer")
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
    if args.output and not args.prompts:
        parser.error("--output goes with --prompts")
    if args.output and Path(args.output).exists() and Path(args.output).samefile(args.prompts):
        parser.error("--output would overwrite the file of --prompts")
    if args.temperature is None:
        args.temperature = 0.0 if args.prompts else 0.7
    for name, good, wanted in (
        ("temperature", args.temperature >= 0, "at least 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("batch_size", args.batch_size >= 1, "at least 1"),
        ("port", 1 <= args.port <= 65535, "from 1 to 65535"),
    ):
        if not good:
            parser.error(f"--{name} is {wanted}")
    return args


def note(text: str) -> None:
    """What is said about the answers goes to standard error, so that piped answers stay clean."""
    print(text, file=sys.stderr, flush=True)


class Models:
    """The tuned model and, once it is asked for, its base: the same weights without the adapter, or a second model."""

    def __init__(self, args: argparse.Namespace) -> None:
        note(f"loading {args.model} ...")
        from transformers.utils import logging

        from preference.models.hardware import detect
        from preference.serve.generation import Chat, Sampling
        from preference.serve.loading import (
            find_source,
            generation_config,
            load_template,
            load_tokenizer,
            load_tuned_model,
            pick_dtype,
        )

        logging.disable_progress_bar()
        self.modelscope = os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
        self.source: Source = find_source(
            args.model,
            base=args.base_model,
            use_modelscope=self.modelscope,
            trust_remote_code=args.trust_remote_code,
        )
        hardware = detect(args.use_cpu)
        self.device, self.dtype = hardware.device, pick_dtype(args.torch_dtype, hardware)
        tokenizer = load_tokenizer(self.source)
        self.template, warnings = load_template(self.source, tokenizer, args.template_name)
        for warning in warnings:
            note(f"warning: {warning}")
        model = load_tuned_model(self.source, self.dtype, self.device, self.modelscope)
        sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
        self.tuned = Chat(model, tokenizer, self.template, generation_config(self.source, model), sampling)
        self._base: Chat | None = None
        note(f"{args.model} on {hardware.name}, template {self.template.name}")

    def base(self) -> tuple[Chat, Within]:
        """The model before tuning: who answers, and what must be entered meanwhile."""
        if self.source.adapter:
            return self.tuned, self.tuned.model.disable_adapter
        if self._base is None:
            from preference.serve.generation import Chat
            from preference.serve.loading import load_base_model

            if self.source.base is not None:
                note(f"loading the base model {self.source.base} ...")
            model = load_base_model(self.source, self.dtype, self.device, self.modelscope)
            tuned = self.tuned  # the same prompts, stops and sampling, whatever the base says of itself
            self._base = Chat(model, tuned.tokenizer, self.template, tuned.config, tuned.sampling)
        return self._base, nullcontext


class Terminal:
    """The conversation in a terminal, or over piped lines."""

    def __init__(self, models: Models, system: str | None, both: bool) -> None:
        self.models, self.system, self.both = models, system, both
        self.history: list[tuple[str, str]] = []
        self.tty = sys.stdin.isatty()

    def run(self) -> None:
        if self.tty:
            import readline  # noqa: F401  line editing and recall for input()

            note("/help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = input("\n> " if self.tty else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                note("\n(Ctrl-D or /quit leaves)")
                continue
            if line in ("/quit", "/exit"):
                break
            if line:
                self._guarded(line)

    def _guarded(self, line: str) -> None:
        """One line; what goes wrong in it is said, and the program goes on."""

        try:
            self.handle(line)
        except PreferenceError as error:
            note(str(error))
        except KeyboardInterrupt:
            note("\n(stopped)")

    def handle(self, line: str) -> None:
        command, _, text = line.partition(" ")
        text = text.strip()
        if line.startswith("//") or not line.startswith("/"):
            self.ask(line.removeprefix("/") if line.startswith("//") else line, self.both)
        elif command == "/both" and text:
            self.ask(text, both=True)
        elif command == "/both":
            self.both = not self.both
            note("base and tuned answers side by side" if self.both else "tuned answers alone")
        elif command == "/system":
            self.system = text or None
            note("system text set" if text else "the template's default system text")
        elif command == "/reset":
            self.history.clear()
            note("the conversation is forgotten")
        elif command == "/help":
            note(HELP)
        else:
            note(f"no command is called {command}\n{HELP}")

    def ask(self, question: str, both: bool) -> None:
        """Answer, and remember the answer: of the tuned model where both are asked."""
        from preference.serve.generation import Turn

        turn, dropped = self.models.tuned.fit(Turn(question, tuple(self.history), self.system))
        if dropped:
            note(f"(the first {dropped} turns no longer fit the model's context and are left out)")
        seed = self.models.tuned.sampling.seed + len(self.history)
        answer = self._compare(turn, seed) if both else self._stream(turn, seed)
        self.history.append((question, answer))

    def _stream(self, turn: Turn, seed: int) -> str:
        from preference.serve.generation import printable

        answer = ""
        with closing(self.models.tuned.stream(turn, seed)) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    print(printable(piece), end="", flush=True)
                print()
            except KeyboardInterrupt:
                note("\n(stopped)")
        return answer.strip()

    def _compare(self, turn: Turn, seed: int) -> str:
        from preference.report.tables import side_by_side
        from preference.serve.generation import printable

        base, within = self.models.base()
        answers = {"base": _whole(base, turn, seed, within), "tuned": _whole(self.models.tuned, turn, seed)}
        print(side_by_side(turn.question, {name: printable(text) for name, text in answers.items()}), flush=True)
        return answers["tuned"]


def _whole(chat: Chat, turn: Turn, seed: int, within: Within = nullcontext) -> str:
    """A streamed answer at its end: unlike a batch it can be stopped."""
    with closing(chat.stream(turn, seed, within)) as pieces:
        return "".join(pieces).strip()


# ---- a file of prompts


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Rows of a jsonl file, or {"question": line} for each line of a file that is not one."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"chat.py: --prompts {path}: {error}")
    lines_of_json = any(line.lstrip().startswith("{") for line in lines)
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(f"{path}:{number}", line) if lines_of_json else {"question": line.strip()})
    if not rows:
        sys.exit(f"chat.py: --prompts {path} holds no prompt")
    return rows


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        sys.exit(f"chat.py: {where}: not JSON ({error})")
    if not isinstance(row, dict) or not isinstance(row.get("question", row.get("prompt")), str):
        sys.exit(f'chat.py: {where}: a row needs "question" or "prompt", a text')
    return row


def to_turn(row: dict[str, Any]) -> Turn:
    """The conversation of a row, read as in training: an empty system means the template's default."""
    from preference.serve.generation import Turn
    from preference.templates.conversation import checked_history

    if "question" not in row:
        return Turn("", prompt=row["prompt"])
    history = tuple((user.strip(), assistant.strip()) for user, assistant in checked_history(row.get("history") or ()))
    return Turn(row["question"].strip(), history, row.get("system") or None)


def answer_file(models: Models, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Each row with its "answer" (and "base_answer" with --both), in the order of the file."""

    turns = []
    for number, row in enumerate(rows, 1):
        try:
            turns.append(to_turn(row if "prompt" in row or not args.system else {"system": args.system, **row}))
            models.tuned.encode(turns[-1])
        except PreferenceError as error:
            sys.exit(f"chat.py: --prompts {args.prompts}, prompt {number}: {error}")
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as out:
        for done in _batches(models, rows, turns, args):
            _write(out, done)
    note(f"{len(rows)} prompts answered")


def _batches(models: Models, rows: list, turns: list[Turn], args: argparse.Namespace) -> Iterator[list[dict]]:
    for start in range(0, len(turns), args.batch_size):
        part = turns[start : start + args.batch_size]
        done = [dict(row) for row in rows[start : start + args.batch_size]]
        if args.both:
            base, within = models.base()
            for row, answer in zip(done, base.answers(part, args.seed + start, within), strict=True):
                row["base_answer"] = answer
        for row, answer in zip(done, models.tuned.answers(part, args.seed + start), strict=True):
            row["answer"] = answer
        yield done


def _write(out: TextIO, rows: list[dict]) -> None:
    out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.flush()


# ---- the page


def require_page(port: int) -> None:
    """What the page needs, asked before a model is loaded: gradio, and a port that nobody listens on."""
    import socket
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        sys.exit("chat.py: --web needs gradio, which is not installed: pip install gradio")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            sys.exit(f"chat.py: port {port} cannot be used ({error.strerror}): choose another with --port")


def said(messages: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """What was asked and what the tuned model answered, from the page's messages.

    A question that was stopped or failed before its answer is left out.
    """
    pairs: list[list[str]] = []
    for message in messages:
        content = message["content"]  # a string or a list of parts
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if message["role"] == "user":
            pairs.append([text, ""])
        elif (message.get("metadata") or {}).get("title") != UNTUNED:
            pairs[-1][1] = text.strip()
    return tuple((question, answer) for question, answer in pairs if answer)


def serve(models: Models, args: argparse.Namespace) -> None:
    """The page, for this machine alone: no public link, no statistics, no font or script from elsewhere."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("NO_PROXY", "no_proxy"):  # gradio looks at its own page first, which a proxy cannot show
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    import gradio

    from preference.serve.generation import Turn

    seeds = count(args.seed)  # Retry draws anew

    def respond(question: str, messages: list[dict], system: str, both: bool) -> Iterator[list[dict]]:
        """Gradio's own way with errors, to raise them, leaves a page that takes no further question."""
        try:
            turn, dropped = models.tuned.fit(Turn(question, said(messages), system or None))
            if dropped:
                gradio.Info(f"The first {dropped} turns no longer fit the model's context and are left out.")
            speakers = [(UNTUNED, *models.base())] if both else []
            yield from talk([*speakers, (TUNED, models.tuned, nullcontext)], turn)
        except (PreferenceError, RuntimeError) as error:  # of loading, or no memory
            note(str(error))
            gradio.Warning(str(error), duration=None)

    def talk(speakers: list[tuple[str, Chat, Within]], turn: Turn) -> Iterator[list[dict]]:
        seed, shown = next(seeds), []
        for title, speaker, within in speakers:
            shown.append({"role": "assistant", "content": "", "metadata": {"title": title} if speakers[1:] else {}})
            with closing(speaker.stream(turn, seed, within)) as pieces:
                for piece in pieces:
                    shown[-1]["content"] += piece
                    yield [dict(message) for message in shown]

    page = gradio.ChatInterface(
        respond,
        title=args.model,
        chatbot=gradio.Chatbot(buttons=["copy", "copy_all"], show_label=False, scale=1),  # none that uploads
        additional_inputs=[
            gradio.Textbox(args.system or "", label="System text (empty: the template's default)"),
            gradio.Checkbox(args.both, label="Also show what the model answered before tuning"),
        ],
        additional_inputs_accordion=gradio.Accordion("System text, model before tuning", open=True),
    )
    page.launch(
        server_name=HOST,
        server_port=args.port,
        share=False,
        head=POLICY,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    note(f"open http://{HOST}:{args.port} in a browser of this machine; Ctrl-C ends it")
    page.block_thread()


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
