"""Faults of an answer that need no model to be seen: length, language, form, repetition, refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from preference.data.text_stats import script_of

RULES = ("length", "language", "format", "repetition", "refusal")
REPEATED = 0.5  # share of an answer's pieces that are copies of others: beyond that it turns in circles
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, han, hangul: each character counts as a word
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
PIECE = 4  # words (characters of scripts without spaces) of a piece
REFUSALS = re.compile(
    r"^\W*(i'?m|i am) (very |so |truly )?(sorry|afraid)\b.{0,40}\b(can'?t|cannot|unable|not able|won'?t)"
    r"|^\W*(unfortunately,? )?(as an? (ai|language model|assistant)\b.{0,40})?\bi (can'?t|cannot|am (not able|unable)|"
    r"'?m (not able|unable)|won'?t) (\w+ )?(help|assist|answer|provide|do|comply|fulfil+|discuss|give|write|create)"
    r"|^\W*(很抱歉|抱歉|对不起|非常抱歉).{0,12}(不能|无法|没办法)"
    r"|^\W*(作为(一个|一名)?(ai|人工智能|语言模型|助手).{0,12})?我(不能|无法|没办法)(为您|为你|给您|给你|向您)?(提供|回答|帮|协助|讨论)",
    re.IGNORECASE | re.DOTALL,
)
# A question that names a language or asks to translate may be answered in another one than its own.
NAMES_LANGUAGE = re.compile(
    r"translat|\b(english|chinese|mandarin|french|german|spanish|italian|portuguese|russian|japanese|korean|arabic|hindi|"
    r"latin|greek|dutch|polish|turkish|vietnamese|thai)\b|翻译|译成|译为|[英中法德日韩俄]文|[英汉法德日韩俄]语|西班牙语|阿拉伯语",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Wanted:
    """What the user asks of an answer. `form` is "json", "plain" (no Markdown) or a regular expression to be found."""

    rules: tuple[str, ...] = RULES
    shortest: int = 1  # characters
    longest: int = 20_000
    form: str = ""


def faults(question: str, answer: str, cut: bool, wanted: Wanted) -> list[str]:
    """The rules that an answer breaks, by name; "cut" is no choice, since a cut answer teaches to stop anywhere."""
    checks: dict[str, Callable[[], bool]] = {
        "length": lambda: not wanted.shortest <= len(answer) <= wanted.longest,
        "language": lambda: other_language(question, answer),
        "format": lambda: wrong_form(answer, wanted.form),
        "repetition": lambda: repeated_share(answer) > REPEATED,
        "refusal": lambda: bool(REFUSALS.search(answer.replace("\u2019", "'"))),
    }
    return (["cut"] if cut else []) + [name for name in wanted.rules if checks[name]()]


def other_language(question: str, answer: str) -> bool:
    """Whether an answer is in another script than the question, or, where it is long enough to tell, language."""
    texts = [re.sub(r"```.*?(```|$)|`[^`]*`|https?://\S+", " ", text, flags=re.DOTALL) for text in (question, answer)]
    letters = [sum(character.isalpha() for character in text) for text in texts]
    if min(letters) < 2 or NAMES_LANGUAGE.search(question):
        return False
    if script_of(texts[0]) != script_of(texts[1]):
        return True
    if min(letters) < 60:  # of fewer letters langid is often wrong
        return False
    (first, sure), (second, as_sure) = (_language()(text) for text in texts)
    return first != second and min(sure, as_sure) > 0.9


@lru_cache(maxsize=1)
def _language() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier.classify


def wrong_form(answer: str, form: str) -> bool:
    """An open fence is a fault always; the rest as `form` says."""
    if len(re.findall(r"^ {0,3}```", answer, re.MULTILINE)) % 2:
        return True
    if form == "json":
        inner = re.fullmatch(r"```(?:json)?\n(.*)\n```", answer.strip(), re.DOTALL)
        try:
            json.loads(inner[1] if inner else answer)
        except ValueError:
            return True
        return False
    if form == "plain":
        return bool(re.search(r"\*\*|^#{1,6} |^\s*[-*] |^```|\]\(http", answer, re.MULTILINE))
    return bool(form) and not re.search(form, answer)


def repeated_share(answer: str) -> float:
    """The share of pieces of PIECE words that stand in the answer before: 0 = none, near 1 = a loop."""
    words = WORD.findall(answer)
    pieces = [tuple(words[i : i + PIECE]) for i in range(len(words) - PIECE + 1)]
    return 1 - len(set(pieces)) / len(pieces) if len(pieces) >= 2 * PIECE else 0.0
