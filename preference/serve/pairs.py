"""From questions to pairs: answers are drawn, scored, and the best and the worst of each question become a row.

What was drawn and scored is kept line by line beside the output until that is whole. Every draw has a seed of its own,
so a run that is killed and started again gives the file, to the byte, that it would have given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from preference.errors import PreferenceError
from preference.files import save_json
from preference.serve.generation import Chat, Turn
from preference.serve.rules import Wanted, faults
from preference.serve.scoring import Scorer

Say = Callable[[str], None]


class MakingError(PreferenceError, ValueError):
    """Pairs that cannot be made as asked; str() says what to change."""


@dataclass(frozen=True)
class Plan:
    """How answers are drawn and pairs made. `temperatures` are taken in turn; a pair's scores differ by more than
    `min_margin`."""

    answers: int
    temperatures: tuple[float, ...]
    batch_size: int
    seed: int
    wanted: Wanted
    min_margin: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """An answer, the temperature of its draw, and the rules that it breaks."""

    text: str
    temperature: float
    faults: tuple[str, ...]


class Journal:
    """A jsonl file of keyed records: what is in it was done; a line that a crash has cut is taken off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Any] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            record = json.loads(line)
            self.records[record["key"]] = record["value"]
        self.file = path.open("r+b" if path.exists() else "w+b")
        self.file.truncate(len(whole))
        self.file.seek(len(whole))

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of `key`, made and written down the first time."""
        if key not in self.records:
            value = make()
            self.file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.records[key] = json.loads(json.dumps(value))
        return self.records[key]


def open_workplace(output: Path, identity: dict[str, Any]) -> Path:
    """The folder beside `output` that keeps what is done; one of another run is refused.

    Raises:
        MakingError: the output is there already, or an unfinished one of other settings.
    """
    if output.exists():
        raise MakingError(f"{output} is there already: choose another --output, or remove it")
    folder = output.with_name(f".{output.name}.work")
    written = folder / "identity.json"
    if written.exists():
        before = json.loads(written.read_text(encoding="utf-8"))
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            raise MakingError(
                f"{folder} holds an unfinished run with another {', '.join(changed)}: type that run's command to "
                "finish it, or remove the folder to begin anew"
            )
    else:
        save_json(written, identity)
    return folder


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def draw(chat: Chat, turns: Sequence[Turn], plan: Plan, journal: Journal, say: Say) -> list[list[Drawn]]:
    """`plan.answers` answers to every question, one draw of one batch of questions after another."""
    texts: list[list[Drawn]] = [[] for _ in turns]
    batches = range(0, len(turns), plan.batch_size)
    for number, start in enumerate(batches):
        part = turns[start : start + plan.batch_size]
        for i in range(plan.answers):
            temperature = plan.temperatures[i % len(plan.temperatures)]
            seed = plan.seed + number * plan.answers + i  # of this draw alone, whatever was drawn before

            def answers(part: Sequence[Turn] = part, temperature: float = temperature, seed: int = seed) -> Any:
                chat.resample(replace(chat.sampling, temperature=temperature))
                return chat.draw(part, seed)

            for j, (text, cut) in enumerate(journal.once(f"{start}/{i}", answers)):
                found = faults(part[j].question, text, cut, plan.wanted)
                texts[start + j].append(Drawn(text, temperature, tuple(found)))
        say(f"answered {min(start + plan.batch_size, len(turns))} of {len(turns)} questions")
    return texts


def distinct(answers: Sequence[Drawn]) -> list[Drawn]:
    """Each text once; empty ones never, and none with a NUL character, which no reader of data takes."""
    found: dict[str, Drawn] = {}
    for answer in answers:
        if answer.text and "\0" not in answer.text:
            found.setdefault(answer.text, answer)
    return list(found.values())


def best_and_worst(
    answers: Sequence[Drawn], scores: Sequence[float | None], min_margin: float
) -> tuple[int, int, float] | str:
    """(chosen, rejected, margin), or why there is no pair.

    An answer that breaks a rule is never chosen, and comes below all that break none, by one for each rule that it
    breaks; the first of equals is taken.
    """
    rated = {i: score for i, score in enumerate(scores) if score is not None}
    good = [i for i in rated if not answers[i].faults]
    if not good:
        return "no answer without a fault" if rated else "nobody chose"
    chosen = max(good, key=lambda i: (rated[i], -i))
    rejected = max(
        (i for i in rated if i != chosen), key=lambda i: (len(answers[i].faults), -rated[i], -i), default=None
    )
    if rejected is None:
        return "one answer alone"
    margin = rated[chosen] - rated[rejected] + len(answers[rejected].faults)
    return (chosen, rejected, margin) if margin > min_margin else "no clear difference"


def rows(
    turns: Sequence[Turn], drawn: Sequence[Sequence[Drawn]], scorer: Scorer, plan: Plan, model: str, journal: Journal
) -> Iterator[dict[str, Any] | str]:
    """A row for each question, or why it has none. The score of each answer goes with the row."""
    for number, (turn, answers) in enumerate(zip(turns, map(distinct, drawn), strict=True)):
        if len(answers) < 2:
            yield "all answers the same" if answers else "empty answers"
            continue
        texts = [answer.text for answer in answers]
        scores = journal.once(str(number), partial(scorer.scores, turn, texts))
        found = best_and_worst(answers, scores, plan.min_margin)
        if isinstance(found, str):
            yield found
            continue
        chosen, rejected, margin = found
        yield {
            "system": turn.system or "",
            "history": [list(pair) for pair in turn.history],
            "question": turn.question,
            "response_chosen": answers[chosen].text,
            "response_rejected": answers[rejected].text,
            "score_margin": margin,
            "source_model": model,
            "source_scorer": scorer.name,
            "source_answers": len(answers),
            "source_scores": [scores[chosen], scores[rejected]],
            "source_temperatures": [answers[chosen].temperature, answers[rejected].temperature],
            "source_faults": list(answers[rejected].faults),
        }


def finish(output: Path, folder: Path, found: Sequence[dict[str, Any]]) -> None:
    """The output whole in its place, then the workplace goes."""
    partial = folder / "output"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(output)
    shutil.rmtree(folder)
