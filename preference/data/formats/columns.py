"""Any table of pairs whose columns have other names: --columns question=...,chosen=...,rejected=..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict, take
from preference.data.formats.context import complete
from preference.data.formats.messages import pair_of_dialogues, plain_reply
from preference.data.formats.trl import pair_of_prompt

MEANINGS = ("question", "chosen", "rejected", "system", "history", "context", "prefix")


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
            f"columns must say question=...,chosen=...,rejected=... (and may say system, history, context, prefix): "
            f"{'unknown ' + ', '.join(map(repr, unknown)) if unknown else 'missing ' + ', '.join(missing)}"
        )
    return columns


def pairs(row: RowDict, options: Options) -> Iterator[Pair]:
    columns = options.columns or {}
    system = row.get(columns["system"]) if "system" in columns else None
    chosen, rejected = take(row, columns["chosen"], columns["rejected"])
    if "prefix" in columns:
        chosen, rejected = (_behind(row.get(columns["prefix"]), plain_reply(answer)) for answer in (chosen, rejected))
    if "question" not in columns:
        yield pair_of_dialogues(chosen, rejected, system)
        return
    (question,) = take(row, columns["question"])
    history = row.get(columns["history"]) if "history" in columns else None
    pair = pair_of_prompt(question, chosen, rejected, system, history)
    pair.question, pair.prompt = (pair.question if pair.prompt is None else pair.prompt), None
    if "context" in columns:
        complete(pair, row, ((columns["context"], "context"),))
    yield pair


def _behind(prefix: object, answer: object) -> str:
    """The answer with what both go on from, as the steps so far of Step-DPO."""
    if not isinstance(prefix, str) or not isinstance(answer, str):
        raise Drop("wrong_type", "prefix and answers must be text")
    return prefix + answer if prefix[-1:].isspace() or answer[:1].isspace() else f"{prefix} {answer}"


COLUMNS = Format(name="columns", what="columns named by the user", needs=(), pairs=pairs, detected=False)
