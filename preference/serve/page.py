"""The page of chat.py --web: gradio's, for this machine alone."""

from __future__ import annotations

import importlib.util
import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from preference.errors import PreferenceError
from preference.serve.collect import CollectError, Collector
from preference.serve.generation import Chat, Turn, Within
from preference.serve.guard import Guard
from preference.serve.models import Models, note

HOST = "127.0.0.1"  # of the page: no other machine can open it
# An answer is shown as Markdown, and an image in it would be fetched from anywhere.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' data: blob:">"""
UNTUNED, TUNED = "before tuning", "after tuning"  # the page's headings of two answers to a question

# Buttons: what is thought of the last answers, collected as rows to train on
JUDGEMENTS = {"good": "good", "bad": "bad", "1 is better": "1", "2 is better": "2"}


class PageError(PreferenceError, RuntimeError):
    """A page that cannot be shown; the message says what to install or choose."""


def require_page(port: int) -> None:
    """What the page needs, asked before a model is loaded: gradio, and a port that nobody listens on."""
    if importlib.util.find_spec("gradio") is None:
        raise PageError("--web needs gradio, which is not installed: pip install gradio")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise PageError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


def text_of(message: dict[str, Any]) -> str:
    """A message's content is a string or a list of parts."""
    content = message["content"]
    return (content if isinstance(content, str) else "".join(part.get("text", "") for part in content)).strip()


def said(messages: list[dict[str, Any]], beside: str = UNTUNED) -> tuple[tuple[str, str], ...]:
    """What was asked and what the model answered, from the page's messages.

    Left out are answers of the one who speaks `beside` it, and a question that was stopped or failed before its answer.
    """
    pairs: list[list[str]] = []
    for message in messages:
        if message["role"] == "user":
            pairs.append([text_of(message), ""])
        elif (message.get("metadata") or {}).get("title") != beside:
            pairs[-1][1] = text_of(message)
    return tuple((question, answer) for question, answer in pairs if answer)


class Judged:
    """What was asked and answered on the page, so that what is thought of it becomes rows to train on."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.known: dict[tuple[str, str], tuple[Turn, bool]] = {}  # (question, answer): as asked, and whether it is cut

    def remember(self, turn: Turn, answer: str, cut: bool) -> None:
        self.known[turn.question, answer.strip()] = turn, cut

    def judge(self, messages: list[dict[str, Any]], what: str, first: bool = False) -> str:
        """What is thought of the last answers: "good" or "bad" of the one that the talk goes on with (the first of two
        where `first`), "1" or "2" for the better one of two. Returns what was written.

        Raises:
            CollectError: there is nothing to judge, or it cannot be trained on as it is.
        """
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        answers = [] if asked is None else [text_of(message) for message in messages[asked + 1 :]]
        if not answers or asked is None:
            raise CollectError("there is no answer to judge yet")
        if what in ("1", "2") and len(answers) < 2:
            raise CollectError("there is one answer alone: two are compared where two models answer")
        better = answers[int(what) - 1] if what in ("1", "2") else answers[0 if first else -1]
        question = text_of(messages[asked])
        if (question, better) not in self.known:
            raise CollectError("this answer is of before the page was started: ask again")
        turn, cut = self.known[question, better]
        if what in ("1", "2"):
            return self.collector.better(turn, better, answers[2 - int(what)], cut)
        return self.collector.label(turn, better, what == "good", cut)


def serve(models: Models, args: Namespace, collector: Collector, rival: Models | None = None) -> None:
    """The page, for this machine alone: no public link, no statistics, no font or script from elsewhere."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("NO_PROXY", "no_proxy"):  # gradio looks at its own page first, which a proxy cannot show
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    import gradio
    from starlette.middleware import Middleware  # which gradio brings

    seeds = count(args.seed)  # Retry draws anew
    judged = Judged(collector)

    def respond(
        question: str, messages: list[dict], system: str, temperature: float, both: bool = False
    ) -> Iterator[list[dict]]:
        """Gradio's own way with errors, to raise them, leaves a page that takes no further question."""
        try:
            for each in filter(None, (models, rival)):
                each.resample(replace(each.tuned.sampling, temperature=temperature))
            history = said(messages, rival.name if rival else UNTUNED)
            turn, dropped = models.tuned.fit(Turn(question, history, system or None))
            if dropped:
                gradio.Info(f"The first {dropped} turns no longer fit the model's context and are left out.")
            yield from talk(speakers(both), turn)
        except (PreferenceError, RuntimeError) as error:  # of loading, or no memory
            note(str(error))
            gradio.Warning(str(error), duration=None)

    def speakers(both: bool) -> list[tuple[str, Chat, Within]]:
        if rival is not None:
            return [(models.name, models.tuned, nullcontext), (rival.name, rival.tuned, nullcontext)]
        tuned = (TUNED, models.tuned, nullcontext)
        return [(UNTUNED, *models.base()), tuned] if both else [tuned]

    def talk(speakers: list[tuple[str, Chat, Within]], turn: Turn) -> Iterator[list[dict]]:
        seed = next(seeds)
        shown: list[dict[str, Any]] = []
        for title, speaker, within in speakers:
            shown.append({"role": "assistant", "content": "", "metadata": {"title": title} if speakers[1:] else {}})
            try:
                with closing(speaker.stream(turn, seed, within)) as pieces:
                    for piece in pieces:
                        shown[-1]["content"] += piece
                        yield [dict(message) for message in shown]
            finally:  # stopped or not
                judged.remember(turn, shown[-1]["content"], speaker.cut)

    def judge(what: str, messages: list[dict]) -> None:
        try:
            gradio.Info(judged.judge(messages, what, first=rival is not None))
        except PreferenceError as error:
            gradio.Warning(str(error), duration=None)

    both = [] if rival else [gradio.Checkbox(args.both, label="Also show what the model answered before tuning")]
    page = gradio.ChatInterface(
        respond,
        title=" and ".join(filter(None, (args.model, args.rival))),
        chatbot=gradio.Chatbot(buttons=["copy", "copy_all"], show_label=False, scale=1),  # none that uploads
        additional_inputs=[
            gradio.Textbox(args.system or "", label="System text (empty: the template's default)"),
            gradio.Slider(0, 2, args.temperature, step=0.05, label="Temperature (0: the likeliest word each time)"),
            *both,
        ],
        additional_inputs_accordion=gradio.Accordion("System text, temperature, model before tuning", open=True),
        editable=True,
    )
    with page, gradio.Row():
        for label, what in JUDGEMENTS.items():
            gradio.Button(label, size="sm").click(partial(judge, what), page.chatbot, None, api_visibility="private")
    page.launch(
        server_name=HOST,
        server_port=args.port,
        share=False,
        head=POLICY,
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(Guard)]},
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    note(f"open http://{HOST}:{args.port} in a browser of this machine; Ctrl-C ends it")
    page.block_thread()
