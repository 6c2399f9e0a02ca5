"""One conversation: what was asked and answered, by one speaker or two side by side, and what is thought of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from preference.errors import PreferenceError
from preference.serve.collect import Collector
from preference.serve.generation import Chat, Turn, Within
from preference.serve.models import Models


class TalkError(PreferenceError, ValueError):
    """Something that cannot be done at this point of a conversation; str() says what can."""


@dataclass(frozen=True)
class Speaker:
    """Who answers; `within` is entered meanwhile."""

    name: str
    chat: Chat
    within: Within = nullcontext


@dataclass(frozen=True)
class Answer:
    speaker: str
    text: str
    cut: bool  # by Ctrl-C or the greatest length, not ended by the model


@dataclass
class Exchange:
    """A question with what came before it, and its last one or two answers; the talk goes on with `kept`."""

    turn: Turn
    answers: list[Answer]
    kept: Answer


class Talk:
    """The state of a conversation. `show(speakers, turn, seed)` draws the answers and puts them before the user."""

    def __init__(
        self,
        models: Models,
        collector: Collector,
        show: Callable[[list[Speaker], Turn, int], list[Answer]],
        rival: Models | None = None,
    ) -> None:
        self.models, self.rival, self.collector, self.show = models, rival, collector, show
        self.exchanges: list[Exchange] = []
        self.seeds = count(models.tuned.sampling.seed)

    def speakers(self, both: bool) -> list[Speaker]:
        """One, or two of which the talk goes on with the tuned (or the first named) model's answer."""
        tuned = Speaker("tuned", self.models.tuned)
        if self.rival is not None and both:
            raise TalkError("two models answer already; the base has no place beside them")
        if self.rival is not None:
            return [replace(tuned, name=self.models.name), Speaker(self.rival.name, self.rival.tuned)]
        return [Speaker("base", *self.models.base()), tuned] if both else [tuned]

    def ask(self, question: str, system: str | None, both: bool) -> int:
        """Answer and remember; returns how many of the first pairs no longer fit the context and were left out."""
        history = tuple((exchange.turn.question, exchange.kept.text) for exchange in self.exchanges)
        speakers = self.speakers(both)
        turn, dropped = Turn(question, history, system), 0
        for speaker in speakers:
            turn, more = speaker.chat.fit(turn)
            dropped += more
        answers = self.show(speakers, turn, next(self.seeds))
        self.exchanges.append(Exchange(turn, answers, answers[0] if self.rival else answers[-1]))
        return dropped

    def again(self, both: bool) -> None:
        """Draw the last answer anew. One that stood alone stays beside the new one, to be compared."""
        last = self.last()
        speakers = self.speakers(both)
        answers = self.show(speakers, last.turn, next(self.seeds))
        last.kept = answers[0] if self.rival else answers[-1]
        last.answers = answers if len(answers) > 1 else [last.answers[-1], *answers]

    def edit(self, question: str, system: str | None, both: bool) -> int:
        """The last question in other words: asked instead of it."""
        last = self.last()
        self.exchanges.pop()
        try:
            return self.ask(question, system, both)
        except BaseException:
            self.exchanges.append(last)
            raise

    def last(self) -> Exchange:
        if not self.exchanges:
            raise TalkError("nothing was asked yet: type a question")
        return self.exchanges[-1]

    def label(self, good: bool) -> str:
        """Write the last answer down as good or bad."""
        last = self.last()
        return self.collector.label(last.turn, last.kept.text, good, last.kept.cut)

    def better(self, which: str) -> str:
        """Write the last two answers down, the better one (1 or 2) as chosen; the talk goes on with it."""
        last = self.last()
        if len(last.answers) < 2:
            raise TalkError("there is one answer alone: /regen draws a second one, /both QUESTION asks two models")
        if which not in ("1", "2"):
            raise TalkError("say which of the two: /better 1 or /better 2")
        chosen, rejected = last.answers if which == "1" else last.answers[::-1]
        said = self.collector.better(last.turn, chosen.text, rejected.text, chosen.cut)
        last.kept = chosen
        return said

    def resample(self, text: str) -> None:
        """Another temperature for all who speak."""
        try:
            temperature = float(text)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < 100:
            raise TalkError("a temperature is a number from 0 (the likeliest word each time) up: /temp 0.7")
        sampling = replace(self.models.tuned.sampling, temperature=temperature)
        for models in filter(None, (self.models, self.rival)):
            models.resample(sampling)

    def messages(self, system: str | None) -> list[dict[str, str]]:
        found = [{"role": "system", "content": system}] if system else []
        for exchange in self.exchanges:
            found.append({"role": "user", "content": exchange.turn.question})
            found.append({"role": "assistant", "content": exchange.kept.text})
        return found

    def save(self, name: str, system: str | None) -> str:
        """Write the conversation: Markdown to a name that ends in .md, else messages as JSON. Never over a file."""
        self.last()
        messages = self.messages(system)
        text = _markdown(messages) if name.endswith(".md") else json.dumps(messages, ensure_ascii=False, indent=1)
        try:
            with Path(name).open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise TalkError(f"{name} is there already: choose another name") from None
        except OSError as error:
            raise TalkError(f"{name} cannot be written: {error.strerror}") from None
        return f"the conversation is in {name}"


def _markdown(messages: Iterable[dict[str, str]]) -> str:
    return "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in messages)
