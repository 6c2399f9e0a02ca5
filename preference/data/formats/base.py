"""What every format shares: its description, the pair it makes, the fault it raises, the user's choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from preference.data.row import Dialogue

RowDict = Mapping[str, Any]


PAIR_NUMBERS = {"pair_weight": 1.0, "score_margin": 0.0}  # a row of any format may have them -> where it has none


class Drop(Exception):
    """One row (or one pair of a row) that cannot be used: a stable reason word and a detail for the reader."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class NotRecognised(Exception):
    """A file that no format may read: a reason word and what to tell the user."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason, self.message = reason, message


class Ask(NotRecognised):
    """A file whose meaning only the user can tell: the question, with what to type."""

    def __init__(self, question: str):
        super().__init__("choice_needed", question)


@dataclass(slots=True)
class Pair:
    """A pair as a format finds it: texts not stripped, nothing checked but its shape."""

    question: Any
    chosen: Any
    rejected: Any
    system: Any = None
    history: Any = ()
    prompt: Any = None  # the string prompt of {prompt, chosen, rejected}: training uses it as it stands
    extra: dict[str, Any] = field(default_factory=dict)
    label: bool | None = None  # a single answer, in `chosen`: whether it is good
    dialogue: Dialogue | None = None  # of answers that only a template can write as wholes


@dataclass(frozen=True)
class Options:
    """What the user chose about reading. Raises ValueError for a value that means nothing."""

    format: str = "auto"
    columns: Mapping[str, str] | None = None  # question=..., chosen=..., rejected=... (+ system, history)
    axis: str | None = None  # better | safer, where a dataset has both labels
    min_score_gap: float | None = None  # None: drop ties only
    pairs: str = "best-worst"  # of a ranked list: best-worst | all | best-random
    split_system: bool = False  # take a system prompt out of the question where one is written into it
    seed: int = 0  # of best-random
    encoding: str | None = None  # of text that is not UTF-8
    rendered: str | None = (
        None  # split | keep | strict: texts that a template was applied to; None: split where all are
    )
    prompt_is_rendered: bool | None = (
        None  # a string in the prompt column: as it stands or a question; None: by its looks
    )
    labels: Mapping[str, str] | None = None  # what a label's values mean: first | second | tie, or good | bad | tie
    unpaired: bool = False  # rows of one answer, labelled good or bad, are read too
    ignore_columns: frozenset[str] = frozenset()  # read rows as if they had not these

    def __post_init__(self) -> None:
        if self.axis not in (None, "better", "safer"):
            raise ValueError(f"axis must be better or safer, not {self.axis!r}")
        if self.pairs not in ("best-worst", "all", "best-random"):
            raise ValueError(f"pairs must be best-worst, all or best-random, not {self.pairs!r}")
        if self.rendered not in (None, "split", "keep", "strict"):
            raise ValueError(f"rendered must be split, keep or strict, not {self.rendered!r}")
        if self.encoding is not None:
            check_encoding(self.encoding)
        if self.min_score_gap is not None and not math.isfinite(self.min_score_gap):
            raise ValueError(f"min_score_gap must be a number, not {self.min_score_gap}")
        if "good" in (self.labels or {}).values() and not self.unpaired:
            raise ValueError("labels that mean good and bad are those of single answers: loss=kto (--unpaired)")
        if self.columns and self.format not in ("auto", "columns"):
            raise ValueError(f"columns name the columns of a format of their own: not together with {self.format!r}")
        if named := self.ignore_columns & set((self.columns or {}).values()):
            raise ValueError(f"{sorted(named)[0]} is named by both columns and ignore_columns")

    def labels_of(self, meaning: str) -> Mapping[str, str] | None:
        """The labels, if they are those of two answers ("first") or of single ones ("good")."""
        return self.labels if self.labels and meaning in self.labels.values() else None


def meant(labels: Mapping[str, str], value: Any) -> str | None:
    """What `labels` say that a value means: 1 and 1.0 are the same, as are true and True."""
    found = number(value)
    said = labels.get(str(value).strip() if found is None else f"{found:g}")
    return labels.get(str(value).lower()) if said is None and isinstance(value, bool) else said


def check_encoding(name: str) -> None:
    """Raises ValueError for a name that is no encoding of text."""
    try:
        "a".encode(name).decode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"no encoding of text is called {name!r}: gb18030, utf-16-le, big5, cp1252, ...") from error


LABEL_MEANINGS = ("first", "second", "tie", "good", "bad")


def parse_labels(text: str | Mapping[str, str]) -> dict[str, str]:
    """{"0": "first", ...} out of "0=first,1=second,2=tie" or "5=good,1=bad". Raises ValueError for anything else."""
    if not isinstance(text, str):
        return dict(text)
    labels: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        value, _, meaning = (piece.strip() for piece in part.partition("="))
        if value in LABEL_MEANINGS and meaning not in LABEL_MEANINGS:
            value, meaning = meaning, value
        if not value or meaning not in LABEL_MEANINGS or value in labels:
            raise ValueError(
                "labels must be value=first, value=second or value=tie with commas (value=good, value=bad for single "
                f"answers), not {part.strip()!r}"
            )
        labels[value] = meaning
    if set(labels.values()) - {"tie"} not in ({"first", "second"}, {"good", "bad"}):
        raise ValueError(
            "labels must say which value prefers the first answer and which the second, or of single answers which "
            "value is good and which is bad"
        )
    return labels


def parse_names(text: str | Iterable[str] | None) -> frozenset[str]:
    """The names in "a,b,c"."""
    parts = text.split(",") if isinstance(text, str) else text or ()
    return frozenset(name for part in parts if (name := part.strip()))


OPTIONAL = {"axis": None, "pairs": "best-worst", "labels": None}  # choices that few formats know: the defaults
RANKED = frozenset({"pairs"})


@dataclass(frozen=True)
class Format:
    """One family of datasets. `name` is what --format takes; `answers` are the columns that hold the two answers."""

    name: str
    what: str
    needs: tuple[str, ...]  # keys of a row; "a|b" means either
    pairs: Callable[[RowDict, Options], Iterable[Pair | Drop]]
    also: Callable[[RowDict], bool] | None = None  # a condition on values, where keys alone do not tell
    answers: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    bind: Callable[[Format, Iterable[RowDict], Options], Format] | None = None  # the format for the rows of one file;
    # raises Ask for a question that only the user can answer
    reads: Callable[[RowDict], Iterable[str]] | None = None  # columns it reads besides `needs` and `answers`
    own: frozenset[str] = frozenset()  # columns beside the question that it puts into the pair itself
    ignores: frozenset[str] = frozenset()  # columns that it leaves out, and why is known
    sure: bool = False  # nothing else has its columns: rows that do not read are faulty rows of it
    scored: bool = False  # it compares scores itself; else columns that score the two sides are looked for
    guess: Callable[[RowDict], str] | None = None  # what is guessed in reading such a row, which strict refuses
    single: bool = False  # its rows have one answer, labelled good or bad: only where the user wants such (unpaired)
    only_when_named: str = ""  # why it is never chosen by itself
    detected: bool = True  # False: of the same shape as another format, so it has to be named
    uses: frozenset[str] = frozenset()  # those of OPTIONAL that make a difference to its pairs

    def question_column(self, row: RowDict) -> str:
        """Where a row that matches has its question, in a format that takes it from one column."""
        return next(key for key in self.present(row) if key not in self.answers)

    def columns_read(self, row: RowDict) -> frozenset[str]:
        """The columns of a row that matches from which its pairs are made."""
        more = self.reads(row) if self.reads else ()
        return frozenset((*(self.present(row) if not self.lacks(row) else ()), *(self.answers & row.keys()), *more))

    def unused(self, options: Options) -> list[str]:
        """The choices of the user that make no difference to this format."""
        labelled = options.labels_of("good" if self.single else "first") is not None
        used = self.uses if labelled else self.uses - {"labels"}
        return [name for name in OPTIONAL if getattr(options, name) != OPTIONAL[name] and name not in used]

    def matches(self, row: RowDict) -> bool:
        return not self.lacks(row) and (self.also is None or self.also(row))

    def present(self, row: RowDict) -> list[str]:
        """The keys by which a row that matches does so."""
        return [next(key for key in need.split("|") if row.get(key) is not None) for need in self.needs]

    def lacks(self, row: RowDict) -> list[str]:
        """The keys of `needs` that the row has not (null counts as not there)."""
        return [need for need in self.needs if all(row.get(key) is None for key in need.split("|"))]


def take(row: RowDict, *keys: str) -> list[Any]:
    """The values of `keys` ("a|b": the first that is there). Raises Drop('missing_key') that names the absent ones."""
    values = [row.get(key) for key in keys]
    if None not in values:
        return values
    values, missing = [], []
    for alternatives in keys:
        value = next((row[key] for key in alternatives.split("|") if row.get(key) is not None), None)
        values.append(value)
        if value is None:
            null = any(key in row for key in alternatives.split("|"))
            missing.append(repr(alternatives.split("|")[0]) + (" (null)" if null else ""))
    if missing:
        raise Drop("missing_key", f"no {', '.join(missing)}; keys are {shown_keys(row)}")
    return values


def shown_keys(row: RowDict) -> str:
    keys = [str(key)[:40] for key in row]
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")


def number(value: Any) -> float | None:
    """A score as a float, out of a number or its text; None for anything else ("N/A", nan, true)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def flag(value: Any) -> bool | None:
    """True or False out of a bool, 0/1 or its text (CSV), else None."""
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if value is None or isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def index(value: Any, size: int) -> int:
    """A label that names one of `size` answers, counted from 0. Raises Drop('wrong_label')."""
    found = number(value)
    if found is None or found not in range(size):
        raise Drop("wrong_label", f"the label must be one of 0..{size - 1}, not {str(value)[:40]!r}")
    return int(found)
