"""A tokenized pair for the eye: the prompt, what is learned of it, and the tokens at its ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from preference.terminal.console import LABEL, Terminal
from preference.terminal.language import tr
from preference.tokens.pairs import SIDES, decode

MAX_CHARS = 800  # of each text, in plain lines
MOST_BYTES = 4  # tokens that one character may take: those of its bytes
STYLES = {"prompt": "", "chosen": "green", "rejected": "red"}
LINES = {"prompt": 2, "chosen": 1, "rejected": 1}


def show_pair(row: Mapping[str, Any], tokenizer: Any, terminal: Terminal) -> None:
    """One pair of `build_dataset` in at most five lines of a terminal, or as `describe_pair` in plain lines."""
    single = "desirable" in row
    if not terminal.coloured:
        terminal.say(f"\n{tr('first_single' if single else 'first_pair')}:\n{describe_pair(row, tokenizer)}\n")
        return
    controls = sorted({*map(str, tokenizer.all_special_tokens), *map(str, tokenizer.get_added_vocab())}, key=len)[::-1]
    texts: list[str | Text] = [terminal.cut(_head(row, "pair_short"), 1)]
    for side in ("prompt", *_answers(row)):
        label = f"{side:<9}" if side != "prompt" else ""
        words = _readable(decode(tokenizer, [int(i) for i in row[f"{side}_ids"]])).replace("\n", "⏎").replace("\t", " ")
        if not terminal.writes("⏎"):
            words = words.replace("⏎", "\\n")
        text = terminal.cut(words, LINES[side], LABEL + 1 + len(label))
        text.stylize(STYLES[side])
        text.highlight_words(controls, "bold" if side != "prompt" else "dim")
        texts.append(Text.assemble((label, "dim"), text))
    terminal.rows(tr("one_single" if single else "one_pair"), texts)


def describe_pair(row: Mapping[str, Any], tokenizer: Any, max_chars: int = MAX_CHARS) -> str:
    """The prompt, the learned text between ⟦ and ⟧, and its first and last tokens with their ids."""
    lines = [_head(row), "prompt", _shortened(_readable(decode(tokenizer, row["prompt_ids"])), max_chars)]
    for side, name in _answers(row).items():
        ids = [int(i) for i in row[f"{side}_ids"]]
        learned = "⟧…⟦".join(_shortened(_readable(decode(tokenizer, part)), max_chars) for part in _learned(row, side))
        lines += [tr("learned_between", side=name), f"⟦{learned}⟧"]
        tokens = list(readable_tokens(tokenizer, ids))
        named = [f"{text!r}={'+'.join(map(str, group))}" for text, group in tokens]
        ends = [*named[:3], "…", *named[-2:]] if len(named) > 5 else named
        lines.append(f"  {tr('tokens')}: {' '.join(ends)}")
    return "\n".join(lines)


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """(text, its ids): a token, or the tokens that only together are a character."""
    group: list[int] = []
    for i in ids:
        group.append(i)
        text = decode(tokenizer, group)
        if "\ufffd" not in text or len(group) == MOST_BYTES:
            yield _readable(text), group
            group = []
    if group:  # cut inside a character
        yield _readable(decode(tokenizer, group)), group


def _head(row: Mapping[str, Any], key: str = "pair_head") -> str:
    key = "single_head" if "desirable" in row else key
    return tr(key, source=row["source"], **{side: len(row[f"{side}_ids"]) for side in SIDES})


def _learned(row: Mapping[str, Any], side: str) -> Iterator[list[int]]:
    """The ids of an answer that are learned, in their parts."""
    start = 0
    for place, run in enumerate(row.get(f"{side}_runs") or [len(row[f"{side}_ids"])]):
        if place % 2 == 0:
            yield [int(i) for i in row[f"{side}_ids"][start : start + run]]
        start += run


def _answers(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns of the answers that are learned, and what they are: of a single one, whether it is good."""
    if "desirable" not in row:
        return {"chosen": "chosen", "rejected": "rejected"}
    return {"chosen": tr("good_answer" if row["desirable"] else "bad_answer")}


def _readable(text: str) -> str:
    """`text` with what no text was written for as an escape."""
    return text.replace("\ufffd", "\\ufffd")


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} {tr('characters', count=len(text) - 2 * half)} {text[-half:]}"
