"""The page of chat.py --web: gradio's, for this machine alone."""

from __future__ import annotations

import importlib.util
import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import count
from typing import Any

from preference.errors import PreferenceError
from preference.serve.generation import Chat, Turn, Within
from preference.serve.guard import Guard
from preference.serve.models import Models, note

HOST = "127.0.0.1"  # of the page: no other machine can open it
# An answer is shown as Markdown, and an image in it would be fetched from anywhere.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' data: blob:">"""
UNTUNED, TUNED = "before tuning", "after tuning"  # the page's headings of two answers to a question


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


def serve(models: Models, args: Namespace) -> None:
    """The page, for this machine alone: no public link, no statistics, no font or script from elsewhere."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("NO_PROXY", "no_proxy"):  # gradio looks at its own page first, which a proxy cannot show
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    import gradio
    from starlette.middleware import Middleware  # which gradio brings

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
        seed = next(seeds)
        shown: list[dict[str, Any]] = []
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
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(Guard)]},
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    note(f"open http://{HOST}:{args.port} in a browser of this machine; Ctrl-C ends it")
    page.block_thread()
