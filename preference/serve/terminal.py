"""A conversation with a model in a terminal, or over piped lines."""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext

from preference.errors import PreferenceError
from preference.report.tables import side_by_side
from preference.screen import shown
from preference.serve.generation import Chat, Turn, Within
from preference.serve.models import Models, note

HELP = """\
/both             show base and tuned answers side by side, or stop doing so
/both QUESTION    do it for this question alone
/system TEXT      what the model is told about itself; without TEXT the template's default
/reset            forget the conversation
/quit             leave (or Ctrl-D); Ctrl-C stops an answer
//...             a question that begins with a slash"""


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
        turn, dropped = self.models.tuned.fit(Turn(question, tuple(self.history), self.system))
        if dropped:
            note(f"(the first {dropped} turns no longer fit the model's context and are left out)")
        seed = self.models.tuned.sampling.seed + len(self.history)
        answer = self._compare(turn, seed) if both else self._stream(turn, seed)
        self.history.append((question, answer))

    def _stream(self, turn: Turn, seed: int) -> str:
        answer = ""
        with closing(self.models.tuned.stream(turn, seed)) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    print(shown(piece), end="", flush=True)
                print()
            except KeyboardInterrupt:
                note("\n(stopped)")
        return answer.strip()

    def _compare(self, turn: Turn, seed: int) -> str:
        base, within = self.models.base()
        answers = {"base": whole(base, turn, seed, within), "tuned": whole(self.models.tuned, turn, seed)}
        print(side_by_side(turn.question, {name: shown(text) for name, text in answers.items()}), flush=True)
        return answers["tuned"]


def whole(chat: Chat, turn: Turn, seed: int, within: Within = nullcontext) -> str:
    """A streamed answer at its end: unlike a batch it can be stopped."""
    with closing(chat.stream(turn, seed, within)) as pieces:
        return "".join(pieces).strip()
