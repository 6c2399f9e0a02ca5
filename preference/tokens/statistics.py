"""What tokenization did to the rows: lengths, length bias, look-alikes of control tokens, drops and cuts."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from preference.data.text_stats import length_bias, spread

if TYPE_CHECKING:
    from preference.data.row import Row

_PLACES = 20  # places listed where rows are counted and not dropped
_SIDES = ("prompt", "chosen", "rejected")
_BINS = 24  # of the histograms


class TokenStats:
    """Counts rows as they pass. Lengths are in tokens, stop text included."""

    def __init__(self, max_source_length: int, max_target_length: int, truncate: bool) -> None:
        self.limits = {"max_source_length": max_source_length, "max_target_length": max_target_length}
        self.truncate = truncate
        self.rows = 0
        self.cut: Counter[str] = Counter()
        self._drops: list[tuple[str, str, int, str]] = []
        self._all = array("i")  # prompt, chosen, rejected of every row
        self._kept = array("i")
        self._single = 0  # of the kept ones, rows of one answer
        self._look_alikes: Counter[str] = Counter()
        self._look_alike_rows = 0
        self._look_alike_places: list[str] = []
        self._ready: Counter[str] = Counter()  # rows that bring their own prompt
        self._plain_places: list[str] = []

    def count_row(self, row: Row, rendered: bool, look_alikes: Sequence[str]) -> None:
        self.rows += 1
        place = f"{row.file}:{row.line}"
        if row.prompt is not None:
            self._ready["rendered" if rendered else "plain"] += 1
            if not rendered and len(self._plain_places) < _PLACES:
                self._plain_places.append(place)
        if look_alikes:
            self._look_alike_rows += 1
            self._look_alikes.update(look_alikes)
            if len(self._look_alike_places) < _PLACES:
                self._look_alike_places.append(place)

    def count_lengths(self, *lengths: int) -> None:
        """Prompt, chosen and rejected tokens of a row, before it is kept or not."""
        self._all.extend(lengths)

    def add(self, other: TokenStats) -> None:
        """Count the rows of `other` too, behind those counted so far."""
        self.rows += other.rows
        self.cut.update(other.cut)
        self._drops += other._drops
        self._all.extend(other._all)
        self._kept.extend(other._kept)
        self._single += other._single
        self._look_alikes.update(other._look_alikes)
        self._look_alike_rows += other._look_alike_rows
        self._look_alike_places = (self._look_alike_places + other._look_alike_places)[:_PLACES]
        self._ready.update(other._ready)
        self._plain_places = (self._plain_places + other._plain_places)[:_PLACES]

    def drop(self, reason: str, row: Row, detail: str) -> None:
        self._drops.append((reason, row.file, row.line, detail))

    def keep(self, prompt: int, chosen: int, rejected: int, label: bool | None = None) -> None:
        """A row that is kept. A single answer, given as `chosen`, counts on the side of its label."""
        if label is not None:
            self._single += 1
            chosen, rejected = (chosen, 0) if label else (0, chosen)
        self._kept.extend((prompt, chosen, rejected))

    def outcome(self) -> dict[str, Any]:
        """JSON-ready: drops, warnings, the report's section, and the message for the case that nothing is left."""
        return {
            "drops": self._drops,
            "warnings": self._warnings(),
            "section": self._section(),
            "nothing_left": self._nothing_left(),
        }

    def _section(self) -> dict[str, Any]:
        kept = np.array(self._kept, dtype=np.int64).reshape(-1, 3)
        section: dict[str, Any] = {"pairs": len(kept), **self.limits}
        if len(kept):
            section |= {side: spread(kept[kept[:, i] > 0, i]) for i, side in enumerate(_SIDES)}
            section["histogram"] = _histogram(kept)
        if self._single:
            section |= {"single_answers": self._single, "good": int((kept[:, 1] > 0).sum())}
        elif len(kept):
            longer, equal = (int(np.sum(which)) for which in (kept[:, 1] > kept[:, 2], kept[:, 1] == kept[:, 2]))
            section["length_bias"] = length_bias(longer, equal, len(kept))
        if self.truncate:
            section["cut"] = {side: self.cut[side] for side in _SIDES}
        if self._ready:
            section["ready_prompts"] = {name: self._ready[name] for name in ("rendered", "plain")}
        section["control_look_alikes"] = {
            "rows": self._look_alike_rows,
            "tokens": dict(self._look_alikes.most_common()),
            "places": self._look_alike_places,
        }
        return section

    def _warnings(self) -> list[str]:
        warnings = []
        if self._ready["plain"]:
            warnings.append(
                f"{self._ready['plain']} prompts of {{prompt, chosen, rejected}} rows do not begin and end as the "
                "template's do; they are used as plain text, without any turn markers, and control tokens in them are "
                f"read as characters (first at {self._plain_places[0]}); give question / response_chosen / "
                "response_rejected to have them rendered, or prompt_is_rendered=true if another template rendered them"
            )
        if self.cut:
            cuts = ", ".join(f"{self.cut[side]} {side}" for side in _SIDES)
            warnings.append(f"truncated: {cuts}; a cut answer carries no stop token")
        return warnings

    def _nothing_left(self) -> str:
        if not self.rows and not self._drops:
            return "there are no rows to tokenize"
        reasons = Counter(reason for reason, *_ in self._drops).most_common()
        rows = max(self.rows, len(self._drops))
        dropped = f"no pair is left of {rows}: " + ", ".join(f"{count} {reason}" for reason, count in reasons)
        lengths = np.array(self._all, dtype=np.int64).reshape(-1, 3)
        if not len(lengths):
            return f"{dropped}; {self._drops[0][-1]}"
        whole = lengths[:, 0] + lengths[:, 1:].max(axis=1)
        source, target = self.limits.values()
        lines = [
            dropped,
            f"max_source_length {source} + max_target_length {target} = {source + target} tokens for a prompt with its "
            f"longer answer; the shortest pair needs {int(whole.min())}",
            "tokens (stop text included):",
        ]
        columns = dict(zip(_SIDES, lengths.T, strict=True)) | {"prompt + longer answer": whole}
        for name, values in columns.items():
            figures = ", ".join(f"{key} {value}" for key, value in spread(values).items())
            lines.append(f"  {name}: {figures}")
        return "\n".join(lines)


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Rows by length, [n, 3] -> bins of equal width from `from` up to, but not including, `to`, with a count a side."""
    width = int(lengths.max()) // _BINS + 1
    edges = np.arange(0, int(lengths.max()) + width + 1, width)
    counts = [np.histogram(lengths[lengths[:, i] > 0, i], edges)[0].tolist() for i in range(len(_SIDES))]
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), *counts, strict=True)
    return [dict(zip(("from", "to", *_SIDES), each, strict=True)) for each in bins]
