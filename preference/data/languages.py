"""Which languages rows are in, told by py3langid from a sample of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

FEWEST = 500  # rows from which languages are told: loading the model takes longer than reading a small file
SAMPLE = 400
CHARACTERS = 200  # of question and answer each


class LanguageSample:
    """Every n-th text of a stream, n growing with it, so that at most 2 x SAMPLE texts are held."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.step, self.seen = 1, 0

    def add(self, question: str, answer: str) -> None:
        if self.seen % self.step == 0:
            self.texts.append(f"{question[:CHARACTERS]}\n{answer[:CHARACTERS]}")
            if len(self.texts) == 2 * SAMPLE:
                self.texts, self.step = self.texts[::2], 2 * self.step
        self.seen += 1

    def to_dict(self) -> dict[str, float]:
        """{language (ISO 639-1): share of the sample}, the most frequent first; {} for few rows."""
        return shares(self.texts) if self.seen >= FEWEST else {}


def shares(texts: Sequence[str]) -> dict[str, float]:
    """{language: share}; those of less than one in a hundred together are "other"."""
    import py3langid

    counts = Counter(py3langid.classify(text)[0] for text in texts)
    told = {name: count for name, count in counts.most_common() if count * 100 >= len(texts)}
    if rest := len(texts) - sum(told.values()):
        told["other"] = rest
    return {name: round(count / len(texts), 3) for name, count in told.items()}
