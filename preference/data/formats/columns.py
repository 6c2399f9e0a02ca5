"""Any table of pairs whose columns have other names: --columns question=...,chosen=...,rejected=..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.messages import pair_of_dialogues
from preference.data.formats.trl import pair_of_prompt

MEANINGS = ("question", "chosen", "rejected", "system", "history")


def parse_columns(text: str | Mapping[str, str]) -> dict[str, str]:
    """{"question": "QUERY", ...} out of "question=QUERY,...". Raises ValueError for an unknown or missing meaning."""
    if not isinstance(text, str):
        columns = dict(text)
    else:
        parts = [part.partition("=") for part in text.split(",") if part.strip()]
        columns = {meaning.strip(): column.strip() for meaning, _, column in parts}
    unknown = [meaning for meaning in columns if meaning not in MEANINGS]
    missing = [meaning for meaning in ("chosen", "rejected") if not columns.get(meaning)]
    if unknown or missing:
        raise ValueError(
            f"columns must say question=...,chosen=...,rejected=... (and may say system=...,history=...): "
            f"{'unknown ' + ', '.join(map(repr, unknown)) if unknown else 'missing ' + ', '.join(missing)}"
        )
    return columns


def pairs(row: RowDict, options: Options) -> Iterator[Pair]:
    columns = options.columns or {}
    system = row.get(columns["system"]) if "system" in columns else None
    chosen, rejected = take(row, columns["chosen"], columns["rejected"])
    if "question" not in columns:
        yield pair_of_dialogues(chosen, rejected, system)
        return
    (question,) = take(row, columns["question"])
    history = row.get(columns["history"]) if "history" in columns else None
    pair = pair_of_prompt(question, chosen, rejected, system, history)
    pair.prompt = None
    yield pair


COLUMNS = Format(name="columns", what="columns named by the user", needs=(), pairs=pairs, detected=False)
