"""Instructions that a program can check, as IFEval has them (Zhou et al. 2023, arXiv 2311.07911), English and Chinese.

A row has a prompt and the instructions in it: {"prompt", "instruction_id_list", "kwargs"}, as in the files of
google/IFEval and its kin in other languages. The answer is checked as it is (strict), and in eight forms, with and
without its first line, its last line and its asterisks, one of which must do (loose).

IFEval counts sentences with NLTK's model and tells languages with langdetect, which would have to be downloaded or draw
at random; here a sentence ends at its marks, and py3langid tells languages. A Han or kana character counts as a word.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preference.errors import PreferenceError
from preference.serve.exams import Score

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
MARKS = re.compile(r"(?:(?<!\w)\.|\.(?!\w)|[!?。！？…])+")  # not the point of 3.5 or e.g
DIGITS = r"[\d一二三四五六七八九十]+"


class InstructionsError(PreferenceError, ValueError):
    """A file of instructions that cannot be checked; the message names file and line."""


@dataclass(frozen=True)
class Task:
    """A prompt, and (id, arguments) of each instruction in it."""

    prompt: str
    instructions: tuple[tuple[str, Mapping[str, Any]], ...]


# ---- what is counted


def words(text: str) -> list[str]:
    return WORD.findall(text)


def sentences(text: str) -> int:
    return sum(re.search(r"\w", part) is not None for part in MARKS.split(text))


def _relation(count: int, wanted: int, relation: str | None) -> bool:
    """IFEval has two relations; files in Chinese translate them."""
    return count < wanted if relation in ("less than", "少于", "小于") else count >= wanted


def _found(keyword: str, text: str) -> bool:
    return keyword.lower() in text.lower()


def _paragraphs(text: str, mark: str) -> list[str] | None:
    """The parts between marks; None where one in between is empty. Empty ones at either end do not count."""
    parts = [part.strip() for part in re.split(mark, text)]
    if parts and not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return parts if all(parts) else None


def _language(text: str) -> str:
    import py3langid

    return str(py3langid.classify(text)[0])


# ---- the instructions: (answer, arguments) -> followed?


def _existence(text: str, keywords: Sequence[str], **_: Any) -> bool:
    return all(_found(keyword, text) for keyword in keywords)


def _forbidden(text: str, forbidden_words: Sequence[str], **_: Any) -> bool:
    def there(word: str) -> bool:
        if re.search(f"[{CJK}]", word):
            return word in text
        return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None

    return not any(map(there, forbidden_words))


def _frequency(text: str, keyword: str, frequency: int, relation: str | None = None, **_: Any) -> bool:
    return _relation(text.lower().count(keyword.lower()), frequency, relation)


def _letter(text: str, letter: str, let_frequency: int, let_relation: str | None = None, **_: Any) -> bool:
    return _relation(text.lower().count(letter.lower()), let_frequency, let_relation)


def _is_language(text: str, language: str, **_: Any) -> bool:
    return _language(text) == language.split("-")[0].lower()


def _sentences(text: str, num_sentences: int, relation: str | None = None, **_: Any) -> bool:
    return _relation(sentences(text), num_sentences, relation)


def _words(text: str, num_words: int, relation: str | None = None, **_: Any) -> bool:
    return _relation(len(words(text)), num_words, relation)


def _number_of_paragraphs(text: str, num_paragraphs: int, **_: Any) -> bool:
    parts = _paragraphs(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str, **_: Any) -> bool:
    parts = re.split(r"\n\n", text)
    if len([part for part in parts if part.strip()]) != num_paragraphs or nth_paragraph > len(parts):
        return False
    paragraph = parts[nth_paragraph - 1].strip().lstrip("'\"“‘「")
    if re.search(f"[{CJK}]", first_word):
        return paragraph.startswith(first_word)
    first = re.match(r"[^\s.,?!'\"]*", paragraph)
    return first is not None and first[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int, **_: Any) -> bool:
    return len(re.findall(r"\[.*?\]|【.*?】", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str, **_: Any) -> bool:
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    mark = spaced.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(mark, text.lower()) is not None


def _bullets(text: str, num_bullets: int, **_: Any) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str, **_: Any) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int, **_: Any) -> bool:
    parts = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in parts) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int, **_: Any) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?{DIGITS}\s?", text)) - 1 >= num_sections


def _json(text: str, **_: Any) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def _title(text: str, **_: Any) -> bool:
    return any(part.strip("<>《》").strip() for part in re.findall(r"<<[^\n]+>>|《[^\n]+》", text))


def _two_answers(text: str, **_: Any) -> bool:
    parts = _paragraphs(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, prompt_to_repeat: str, **_: Any) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str, **_: Any) -> bool:
    return text.strip().strip('"”“').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str, **_: Any) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] + text[-1] in ('""', "“”", "「」", "『』")


def _capital_words(text: str, capital_frequency: int, capital_relation: str | None = None, **_: Any) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text))
    return _relation(count, capital_frequency, capital_relation)


def _no_comma(text: str, **_: Any) -> bool:
    return "," not in text and "，" not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter,
    "language:response_language": _is_language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _number_of_paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_answers,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, **_: text.isupper() and _language(text.lower()) == "en",
    "change_case:english_lowercase": lambda text, **_: text.islower() and _language(text) == "en",
    "punctuation:no_comma": _no_comma,
}
MEASURES = {
    "prompt, strict": "prompts all of whose instructions the answer follows",
    "prompt, loose": "the same where one form of the answer must do: without its first or last line, without asterisks",
    "instruction, strict": "instructions that the answers follow",
    "instruction, loose": "the same, of one form of the answer",
}


def follows(answer: str, instruction: tuple[str, Mapping[str, Any]]) -> bool:
    """Whether an answer follows an instruction; an empty one follows none."""
    name, arguments = instruction
    return bool(answer.strip()) and CHECKS[name](answer, **arguments)


def forms(answer: str) -> list[str]:
    """What IFEval's loose measure tries."""
    lines = answer.split("\n")
    cut = [answer, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [form for text in cut for form in (text, text.replace("*", ""))]


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a jsonl file.

    Raises:
        InstructionsError: it cannot be read, or a row holds what no checker knows; with file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InstructionsError(f"--instructions {path}: {error}") from None
    tasks = [_task(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise InstructionsError(f"--instructions {path} holds no row")
    return tasks


def _task(where: str, line: str) -> Task:
    try:
        row = json.loads(line)
        prompt, names, arguments = row["prompt"], row["instruction_id_list"], row["kwargs"]
        # one table for all rows has every argument in each of them
        given = [{name: value for name, value in each.items() if value is not None} for each in arguments]
        pairs = tuple(zip(map(str, names), given, strict=True))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InstructionsError(
            f"{where}: a row is {{prompt, instruction_id_list, kwargs}} with as many kwargs as instructions ({error!r})"
        ) from None
    for name, each in pairs:
        if name not in CHECKS:
            raise InstructionsError(f"{where}: no instruction is called {name!r}; there are {', '.join(CHECKS)}")
        try:
            follows("word", (name, each))
        except (TypeError, AttributeError) as error:
            raise InstructionsError(f"{where}: {name} with {each}: {error}") from None
    return Task(str(prompt), pairs)


def score(name: str, tasks: Sequence[Task], answers: Mapping[str, Sequence[str]]) -> list[Score]:
    """Every measure of MEASURES. `answers`: of each model, one to each task."""
    strict: dict[str, list[list[bool]]] = {
        model: [[follows(answer, one) for one in task.instructions] for task, answer in zip(tasks, given, strict=True)]
        for model, given in answers.items()
    }
    loose: dict[str, list[list[bool]]] = {
        model: [
            [any(follows(form, one) for form in forms(answer)) for one in task.instructions]
            for task, answer in zip(tasks, given, strict=True)
        ]
        for model, given in answers.items()
    }

    def of(measure: str, rows: Callable[[str], list[int]]) -> Score:
        return Score(name, measure, {model: np.array(rows(model)) for model in answers})

    def whole(kind: Mapping[str, list[list[bool]]], model: str) -> list[int]:
        return [int(all(each)) for each in kind[model]]

    def single(kind: Mapping[str, list[list[bool]]], model: str) -> list[int]:
        return [int(one) for each in kind[model] for one in each]

    return [
        of("prompt, strict", functools.partial(whole, strict)),
        of("prompt, loose", functools.partial(whole, loose)),
        of("instruction, strict", functools.partial(single, strict)),
        of("instruction, loose", functools.partial(single, loose)),
    ]
