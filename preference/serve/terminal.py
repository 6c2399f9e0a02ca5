"""A conversation with a model in a terminal, or over piped lines."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from typing import Any

from preference.errors import PreferenceError
from preference.report.tables import side_by_side
from preference.screen import shown
from preference.serve.collect import Collector
from preference.serve.drawing import Growing, columns, drawing_console
from preference.serve.generation import Turn
from preference.serve.models import Models, note
from preference.serve.talk import Answer, Speaker, Talk

HELP = """\
/regen            answer the last question again; both answers stay to be compared
/edit [QUESTION]  ask this instead of the last question
/both             show base and tuned answers side by side, or stop doing so
/both QUESTION    do it for this question alone
/temp NUMBER      temperature: 0 = the likeliest word each time, 1 = as the model has it
/good, /bad       write the last answer down as good or bad (loss=kto; both for one question make a pair)
/better 1|2       write the last two answers down, this one as the better: a pair to train on
/system TEXT      what the model is told about itself; without TEXT the template's default
/save FILE        write the conversation: Markdown (.md), else JSON
/reset            forget the conversation
/quit             leave (or Ctrl-D); Ctrl-C stops an answer
//...             a question that begins with a slash"""


class Terminal:
    """The conversation in a terminal, or over piped lines."""

    def __init__(
        self, models: Models, system: str | None, both: bool, collector: Collector, rival: Models | None = None
    ) -> None:
        self.system, self.both = system, both
        self.talk = Talk(models, collector, self.show, rival)
        self.tty = sys.stdin.isatty()
        self.console = drawing_console()
        self.session: Any = None

    def run(self) -> None:
        if self.tty:
            self.session = _session()
            note("/help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                note("\n(Ctrl-D or /quit leaves)")
                continue
            if line in ("/quit", "/exit"):
                break
            if line:
                self._guarded(line)

    def _read(self, before: str = "") -> str:
        """A line; `before` stands in it already, to be changed."""
        if self.session is not None:
            print()
            return self.session.prompt("> ", default=before)
        return input("\n> " if self.tty else "")

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
        elif command in ("/regen", "/both", "/reset", "/good", "/bad", "/help") and not text:
            getattr(self, "_" + command[1:])()
        elif command in ("/edit", "/temp", "/better", "/system", "/save"):
            getattr(self, "_" + command[1:])(text)
        else:
            note(f"no command is called {line if text else command}\n{HELP}")

    def ask(self, question: str, both: bool) -> None:
        """Answer, and remember the answer: of the tuned model where both are asked."""
        self._said_dropped(self.talk.ask(question, self.system, both))

    def _said_dropped(self, dropped: int) -> None:
        if dropped:
            note(f"(the first {dropped} turns no longer fit the model's context and are left out)")

    def _regen(self) -> None:
        if self.talk.models.tuned.sampling.temperature == 0:
            note("(the temperature is 0, so the answer will be the same: /temp 0.7 draws others)")
        self.talk.again(self.both)
        if len(self.talk.speakers(self.both)) == 1:
            note("(/better 1 prefers the answer before, /better 2 this one)")

    def _edit(self, text: str) -> None:
        if not text and self.session is not None:
            text = self._read(self.talk.last().turn.question).strip()
        if not text:
            note("say what to ask instead: /edit QUESTION")
            return
        self._said_dropped(self.talk.edit(text, self.system, self.both))

    def _both(self) -> None:
        self.talk.speakers(not self.both)  # refused, or loaded, before anything is said
        self.both = not self.both
        note("base and tuned answers side by side" if self.both else "tuned answers alone")

    def _temp(self, text: str) -> None:
        self.talk.resample(text)
        note(f"temperature {self.talk.models.tuned.sampling.temperature:g}")

    def _good(self) -> None:
        note(self.talk.label(good=True))

    def _bad(self) -> None:
        note(self.talk.label(good=False))

    def _better(self, text: str) -> None:
        note(self.talk.better(text))

    def _system(self, text: str) -> None:
        self.system = text or None
        note("system text set" if text else "the template's default system text")

    def _save(self, text: str) -> None:
        note(self.talk.save(text, self.system) if text else "say where to: /save FILE")

    def _reset(self) -> None:
        self.talk.exchanges.clear()
        note("the conversation is forgotten")

    def _help(self) -> None:
        note(HELP)

    def show(self, speakers: list[Speaker], turn: Turn, seed: int) -> list[Answer]:
        """One answer as it is written, or two beside each other once both are there."""
        if len(speakers) == 1:
            return [self._stream(speakers[0], turn, seed)]
        answers = [_whole(speaker, turn, seed) for speaker in speakers]
        headed = [(f"{number} {answer.speaker}", answer.text) for number, answer in enumerate(answers, 1)]
        if self.console is not None:
            columns(self.console, headed)
        else:
            print(side_by_side(shown(turn.question), {shown(name): shown(text) for name, text in headed}), flush=True)
        return answers

    def _stream(self, speaker: Speaker, turn: Turn, seed: int) -> Answer:
        answer = ""
        with closing(speaker.chat.stream(turn, seed, speaker.within)) as pieces:
            try:
                if self.console is not None:
                    with Growing(self.console) as growing:
                        for piece in pieces:
                            answer += piece
                            growing.feed(piece)
                else:
                    for piece in pieces:
                        answer += piece
                        print(shown(piece), end="", flush=True)
                    print()
            except KeyboardInterrupt:
                note("\n(stopped)")
        return Answer(speaker.name, answer.strip(), speaker.chat.cut)


def _session() -> Any:
    """A line editor with history; None where prompt_toolkit is missing: input() with readline does then."""
    if importlib.util.find_spec("prompt_toolkit") is None:
        import readline  # noqa: F401  line editing and recall for input()

        return None
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory  # what was asked is written nowhere

    return PromptSession(history=InMemoryHistory())


def _whole(speaker: Speaker, turn: Turn, seed: int) -> Answer:
    """A streamed answer at its end: unlike a batch it can be stopped."""
    with closing(speaker.chat.stream(turn, seed, speaker.within)) as pieces:
        text = "".join(pieces).strip()
    return Answer(speaker.name, text, speaker.chat.cut)
