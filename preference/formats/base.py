"""What every format shares: the pair it makes, the fault it raises, and the reading of message lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Drop(Exception):
    """One row (or one pair of a row) that cannot be used: a stable reason word and a detail for the reader."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Pair:
    """A pair as a format finds it: texts not stripped, nothing checked but its shape."""

    question: Any
    chosen: Any
    rejected: Any
    system: Any = None
    history: Any = ()
    prompt: str | None = None  # a string prompt of {prompt, chosen, rejected}: used as it stands in training
    extra: dict[str, Any] = field(default_factory=dict)


def take(row: Mapping[str, Any], *keys: str) -> list[Any]:
    """The values of `keys`. Raises Drop('missing_key') that names each one which is absent or null."""
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        null = [key for key in missing if key in row]
        detail = "no " + ", ".join(repr(key) for key in missing) + (" (null)" if null else "")
        raise Drop("missing_key", f"{detail}; keys are {shown_keys(row)}")
    return [row[key] for key in keys]


def shown_keys(row: Mapping[str, Any]) -> str:
    keys = [str(key)[:40] for key in row]
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
