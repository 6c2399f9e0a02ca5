"""Keyword arguments written as one text: a=1,b=0.5, or a JSON object."""

from __future__ import annotations

import json
from typing import Any

from preference.errors import PreferenceError


class OptimizationError(PreferenceError, ValueError):
    """An optimizer or a schedule that is not to be had so; the message says what it takes."""


def keywords(text: str | None) -> dict[str, Any]:
    """Names and values; numbers, true and false are read as such.

    Raises:
        OptimizationError: `text` is not written so, or names something twice.
    """
    text = (text or "").strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            raise OptimizationError('keywords are written a=1,b=0.5 or {"a": 1, "b": 0.5}') from None
    else:
        parts = [part.partition("=") for part in text.split(",")]
        if not all(name.strip().isidentifier() and equals and value.strip() for name, equals, value in parts):
            raise OptimizationError('keywords are written a=1,b=0.5 or {"a": 1, "b": 0.5}')
        pairs = [(name.strip(), _value(value.strip())) for name, _, value in parts]
    found = dict(pairs)
    if len(found) < len(pairs) or any(isinstance(value, (list, dict)) for value in found.values()):
        raise OptimizationError("each keyword is written once and has one plain value")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        try:
            return float(text)  # JSON knows no .5 and no 1.
        except ValueError:
            return text
