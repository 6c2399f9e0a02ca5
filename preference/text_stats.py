"""The part of the data report that needs no tokenizer: repeats, near-identical answers, length bias, scripts, odd text.

`TextStats.add(row)` once a row, `to_dict()` at the end. Memory is some 40 bytes a row (two hashes, three lengths).
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preference.data_report import DataReport
    from preference.triples import Row

SCRIPT_SAMPLE = 400  # characters of a text that are looked at to tell its script
_SCRIPTS = {
    "kana": "\u3040-\u30ff",  # before han: Japanese text has both
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "han": "\u4e00-\u9fff\u3400-\u4dbf",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0600-\u06ff",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "greek": "\u0370-\u03ff",
}
_SCRIPT_PATTERNS = {name: re.compile(f"[{chars}]") for name, chars in _SCRIPTS.items()}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_CONTROL = re.compile(
    r"<\|[A-Za-z][\w ▁:.-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>"  # ChatML, Llama 3, Phi, DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|mask|sep|cls)>|\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|<(?:start|end)_of_turn>|<\|?end_?of_?text\|?>|</?tool_call>|</?think>"
)
_SPACES = re.compile(r"\s+")


def normalised(text: str) -> str:
    """Text in the form in which two writings of it count as the same: NFKC, case folded, white space collapsed."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _SPACES.sub(" ", text).strip().casefold()


def _hash(*texts: str) -> int:
    digest = blake2b(digest_size=8)
    for text in texts:
        digest.update(normalised(text).encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")


def prompt_key(row: Row) -> int:
    """64 bits that are equal for rows with the same system, history and question after normalisation."""
    turns = [text for turn in row.history for text in turn]
    return _hash(row.system or "", *turns, row.question if row.prompt is None else row.prompt)


def pair_key(row: Row) -> int:
    return _hash(str(prompt_key(row)), row.chosen, row.rejected)


def script_of(text: str) -> str:
    """The script that most letters of the text's beginning are in ('other' without letters)."""
    sample = text[:SCRIPT_SAMPLE]
    latin = len(_LATIN.findall(sample))
    if sample.isascii():
        return "latin" if latin else "other"
    counts = {name: len(pattern.findall(sample)) for name, pattern in _SCRIPT_PATTERNS.items()}
    if counts["kana"]:
        counts["kana"] += counts.pop("han")
    counts["latin"] = latin / 4  # a Latin letter says about a quarter of what a Han character says
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "other"


def nearly_identical(a: str, b: str) -> bool:
    """Whether the answers differ in one short stretch only: at most 5% of the longer one, or in case and white space."""
    longer = max(len(a), len(b))
    allowed = longer // 20
    if abs(len(a) - len(b)) > max(allowed, 8):
        return False
    if a.casefold().split() == b.casefold().split():
        return True
    begin = _common_prefix(a, b)
    end = min(_common_prefix(a[::-1], b[::-1]), len(a) - begin, len(b) - begin)
    return longer - begin - end <= allowed


def _common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C, so bisection beats a loop over characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class TextStats:
    """Figures over the rows that were kept by the readers."""

    def __init__(self) -> None:
        self.rows = 0
        self.prompts, self.pairs = array("Q"), array("Q")
        self.lengths = {name: array("L") for name in ("prompt", "chosen", "rejected")}
        self.scripts: Counter[str] = Counter()
        self.control: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.system_rows = self.history_rows = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        prompt = row.question if row.prompt is None else row.prompt
        key = prompt_key(row)
        self.prompts.append(key)
        self.pairs.append(_hash(str(key), row.chosen, row.rejected))
        context = sum(len(text) for turn in row.history for text in turn) + len(row.system or "")
        self.lengths["prompt"].append(len(prompt) + context)
        self.lengths["chosen"].append(len(row.chosen))
        self.lengths["rejected"].append(len(row.rejected))
        self.scripts[script_of(prompt + " " + row.chosen[:SCRIPT_SAMPLE])] += 1
        self.system_rows += row.system is not None
        self.history_rows += bool(row.history)
        if nearly_identical(row.chosen, row.rejected):
            self.counts["near_identical_answers"] += 1
        self._control_text(row)

    def _control_text(self, row: Row) -> None:
        texts = [row.question, row.prompt or "", row.chosen, row.rejected, row.system or "", *sum(row.history, ())]
        found = {match for text in texts if "<" in text or "[" in text for match in _CONTROL.findall(text)}
        if found:
            self.counts["control_text_rows"] += 1
            for token in found:
                if token in self.control or len(self.control) < 50:
                    self.control[token] += 1

    def to_dict(self) -> dict[str, Any]:
        chosen, rejected = self.lengths["chosen"], self.lengths["rejected"]
        longer = sum(c > r for c, r in zip(chosen, rejected, strict=True))
        equal = sum(c == r for c, r in zip(chosen, rejected, strict=True))
        return {
            "rows": self.rows,
            "with_system": self.system_rows,
            "with_history": self.history_rows,
            "duplicate_pairs": self.rows - len(set(self.pairs)),
            "repeated_prompts": self.rows - len(set(self.prompts)),
            "near_identical_answers": self.counts["near_identical_answers"],
            "characters": {name: spread(values) for name, values in self.lengths.items()},
            "length_bias": length_bias(longer, equal, self.rows),
            "scripts": dict(self.scripts.most_common()),
            "control_text_rows": self.counts["control_text_rows"],
            "control_text": dict(self.control.most_common(20)),
        }


def spread(values: Iterable[int]) -> dict[str, float]:
    """Mean and quantiles of lengths ({} for none)."""
    ordered = sorted(values)
    if not ordered:
        return {}
    at = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    quantiles = {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}
    return {"mean": round(sum(ordered) / len(ordered), 1), **quantiles}


def length_bias(longer: int, equal: int, rows: int) -> dict[str, float]:
    """How far length alone tells chosen from rejected: the accuracy of 'always the longer' or 'always the shorter'.

    A pair of equal lengths counts as half right. 0.5: length says nothing.
    """
    if not rows:
        return {}
    always_longer = (longer + equal / 2) / rows
    return {
        "chosen_longer": round(longer / rows, 4),
        "equal": round(equal / rows, 4),
        "accuracy_of_length_alone": round(max(always_longer, 1 - always_longer), 4),
    }


def shared_prompts(train: Iterable[Row], evaluation: Iterable[Row], report: DataReport | None = None) -> list[Row]:
    """The evaluation rows whose prompt (after normalisation) is also in the training rows; a warning in `report` for them."""
    seen = {prompt_key(row) for row in train}
    shared = [row for row in evaluation if prompt_key(row) in seen]
    if report is not None:
        places = [f"{row.file}:{row.line}" for row in shared[:100]]
        report.add_section("prompts_in_train_and_eval", {"rows": len(shared), "places": places})
        if shared:
            report.warn(
                f"{len(shared)} evaluation rows have a prompt that is also trained on, the first at {places[0]}: "
                "the evaluation figures flatter the model"
            )
    return shared
