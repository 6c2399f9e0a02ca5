"""The part of the data report that needs no tokenizer: repeats, near-identical answers, length bias, scripts, odd text.

`TextStats.add(row)` once a row, `to_dict()` at the end. Memory is 36 bytes a row (three hashes, three lengths).
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from preference.data.report import DataReport
    from preference.data.row import Row

SCRIPT_SAMPLE = 50  # characters of question and answer each that are looked at to tell the script
ANSWER_SAMPLE = 1000  # characters of an answer that are compared in detail with the other's
# Unicode blocks of 256 characters by the script that fills them (letters only are counted)
_BLOCKS = {
    **dict.fromkeys((0x00, 0x01, 0x02, 0x1E), "latin"), 0x03: "greek", 0x04: "cyrillic", 0x05: "hebrew", 0x06: "arabic",
    0x09: "devanagari", 0x0E: "thai", 0x11: "hangul", 0x30: "kana", **dict.fromkeys(range(0x34, 0xA0), "han"),
    **dict.fromkeys(range(0xAC, 0xD8), "hangul"),
}  # fmt: skip
_CONTROL = re.compile(
    r"<\|[A-Za-z][\w ▁:.-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>"  # ChatML, Llama 3, Phi, DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|mask|sep|cls)>|\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|<(?:start|end)_of_turn>|<\|?end_?of_?text\|?>|</?tool_call>|</?think>"
)


def normalised(text: str) -> str:
    """Text in the form in which two writings of it count as the same: case folded, white space collapsed."""
    if text.isascii() and text.isprintable() and "  " not in text:  # nearly all English: the same, in half the time
        return text.casefold().strip()
    return " ".join(text.casefold().split())


def prompt_key(row: Row) -> int:
    """64 bits, equal within one process for rows with the same system, history and question after normalisation."""
    question = row.question if row.prompt is None else row.prompt
    history = tuple(normalised(text) for turn in row.history for text in turn) if row.history else ()
    return hash((normalised(row.system) if row.system else "", history, normalised(question)))


def pair_key(row: Row, prompt: int | None = None) -> int:
    """64 bits, equal within one process for rows with equal prompt and answers after normalisation."""
    key = prompt_key(row) if prompt is None else prompt
    return hash((key, normalised(row.chosen), normalised(row.rejected) if row.label is None else row.label))


def script_of(text: str) -> str:
    """The script that most letters of the text are in ('other' without letters)."""
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else "other"
    counts: Counter[str] = Counter(_BLOCKS.get(ord(char) >> 8, "other") for char in text if char.isalpha())
    if not counts:
        return "other"
    if counts["kana"] * 5 > counts["han"] + counts["latin"]:
        return "kana"  # Japanese text has both
    weight = {"latin": 1}  # a Latin letter says about a quarter of what a Han character says
    return max(counts, key=lambda name: counts[name] * weight.get(name, 4))


def nearly_identical(a: str, b: str) -> bool:
    """Whether two answers of about equal length are the same but for case and white space, or share 80% of their
    neighbouring pairs of characters (of the first 1,000)."""
    if abs(len(a) - len(b)) > max(len(a), len(b)) // 10:
        return False
    if normalised(a) == normalised(b):
        return True
    a, b = a[:ANSWER_SAMPLE], b[:ANSWER_SAMPLE]
    ours, theirs = set(itertools.pairwise(a)), set(itertools.pairwise(b))
    return len(ours & theirs) >= 0.8 * len(ours | theirs) > 0


class TextStats:
    """Figures over the rows that were kept by the readers."""

    def __init__(self) -> None:
        self.rows = 0
        self.prompts, self.pairs, self.mirrored = array("q"), array("q"), array("q")
        self.lengths = {name: array("I") for name in ("prompt", "chosen", "rejected")}
        self.scripts: Counter[str] = Counter()
        self.control: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.system_rows = self.history_rows = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        prompt = row.question if row.prompt is None else row.prompt
        key = prompt_key(row)
        self.prompts.append(key)
        self._judged(row, key, normalised(row.chosen))
        context = sum(len(text) for turn in row.history for text in turn) if row.history else 0
        context += len(row.system) if row.system else 0
        self.lengths["prompt"].append(len(prompt) + context)
        self.scripts[script_of(prompt[:SCRIPT_SAMPLE] + row.chosen[:SCRIPT_SAMPLE])] += 1
        self.system_rows += row.system is not None
        self.history_rows += bool(row.history)
        if row.label is None and nearly_identical(row.chosen, row.rejected):
            self.counts["near_identical_answers"] += 1
        self._control_text(row)

    def _judged(self, row: Row, key: int, chosen: str) -> None:
        """What was judged, and the opposite judgement of it. A single answer counts on the side of its label."""
        if row.label is not None:
            self.pairs.append(hash((key, chosen, row.label)))
            self.mirrored.append(hash((key, chosen, not row.label)))
            self.lengths["chosen" if row.label else "rejected"].append(len(row.chosen))
            self.counts["single_answers"] += 1
            return
        rejected = normalised(row.rejected)
        self.pairs.append(hash((key, chosen, rejected)))
        self.mirrored.append(hash((key, rejected, chosen)))
        self.lengths["chosen"].append(len(row.chosen))
        self.lengths["rejected"].append(len(row.rejected))

    def _control_text(self, row: Row) -> None:
        texts = [row.question, row.prompt or "", row.chosen, row.rejected, row.system or ""]
        if row.history:
            texts += [text for turn in row.history for text in turn]
        marked = [text for text in texts if "<" in text or "[" in text]
        found = {match for text in marked for match in _CONTROL.findall(text)} if marked else ()
        if found:
            self.counts["control_text_rows"] += 1
            for token in found:
                if token in self.control or len(self.control) < 50:
                    self.control[token] += 1

    def _length_bias(self) -> dict[str, float]:
        import numpy as np

        chosen, rejected = (np.asarray(self.lengths[name]) for name in ("chosen", "rejected"))
        return length_bias(int((chosen > rejected).sum()), int((chosen == rejected).sum()), self.rows)

    def to_dict(self) -> dict[str, Any]:
        import numpy as np  # here, so that reading rows needs no numpy

        single = self.counts["single_answers"]
        pairs = np.unique(self.pairs)
        return {
            "rows": self.rows,
            **({"single_answers": single} if single else {}),
            "with_system": self.system_rows,
            "with_history": self.history_rows,
            "duplicate_pairs": self.rows - len(pairs),
            "repeated_prompts": self.rows - len(np.unique(self.prompts)),
            "contradicting_pairs": _also_in(pairs, self.mirrored) // 2,
            "near_identical_answers": self.counts["near_identical_answers"],
            "characters": {name: spread(values) for name, values in self.lengths.items()},
            **({} if single else {"length_bias": self._length_bias()}),
            "scripts": dict(self.scripts.most_common()),
            "control_text_rows": self.counts["control_text_rows"],
            "control_text": dict(self.control.most_common(20)),
        }


def _also_in(sorted_N: np.ndarray, others: array[int]) -> int:
    """How many of the distinct sorted values are among the others; np.isin takes five times the memory for it."""
    import numpy as np

    among_M = np.unique(others)
    if not len(among_M):
        return 0
    places_N = np.searchsorted(among_M, sorted_N).clip(max=len(among_M) - 1)
    return int((among_M[places_N] == sorted_N).sum())


def spread(values: Sequence[int]) -> dict[str, float]:
    """Mean and quantiles of lengths ({} for none)."""
    import numpy as np

    if not len(values):
        return {}
    points: np.ndarray = np.percentile(values, [0, 50, 90, 99, 100], method="higher")  # lengths that occur
    quantiles = dict(zip(("min", "p50", "p90", "p99", "max"), map(int, points), strict=True))
    return {"mean": round(float(np.mean(values)), 1), **quantiles}


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
    """The evaluation rows whose prompt (after normalisation) is trained on too; with `report`, a warning for them."""
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
