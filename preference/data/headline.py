"""What a run says of its data before it trains: a line a file, what was dropped, how long the pairs are.

Everything else that is known stands in data_report.json. Zeros are not told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preference.data.report import DataReport

FILES, REASONS = 8, 5  # lines at most
BLOCKS = " ▁▂▃▄▅▆▇█"
TOLD = (  # (section's key, in words) where the count is not zero
    ("duplicate_pairs", "pairs stand there more than once"),
    ("contradicting_pairs", "pairs are judged both ways round: the same two answers, each better once"),
    ("repeated_prompts", "rows repeat an earlier prompt with other answers"),
    ("near_identical_answers", "pairs have nearly the same answer on both sides"),
    ("control_text_rows", "rows hold text that looks like control tokens or markup"),
)
LENGTH_TELLS = 0.6  # accuracy of length alone from which it is worth a line


def headline(report: DataReport) -> str:
    """A few lines for the screen."""
    lines = [f"data: {report.rows_read:,} rows read, {report.rows_kept:,} kept"]
    lines += _files(report)
    for reason, count in report.dropped.most_common(REASONS):
        first = report.examples[reason][0]
        where = f"{first['file']}:{first['line']}"
        lines.append(f"  dropped {count:>6} {reason}, first at {where} {first['detail'][:120]}".rstrip())
    if len(report.dropped) > REASONS:
        others = sum(count for _, count in report.dropped.most_common()[REASONS:])
        lines.append(f"  dropped {others:>6} for {len(report.dropped) - REASONS} other reasons")
    lines += [f"  note: {count} x {name}" for name, count in report.notes.most_common()]
    lines += [f"  warning: {warning}" for warning in report.warnings]
    lines += report.unread_lines()
    for name, section in report.sections.items():
        if name == "train" or (name.startswith("evaluation") and not name.endswith("_text")):
            lines += _pairs(name.replace("_", " ", 1), section, report.sections.get(f"{name}_text", {}))
    shared = report.sections.get("prompts_in_train_and_eval", {}).get("rows", 0)
    if shared:
        lines.append(f"  {shared} evaluation rows have a prompt of the training data: their figures flatter")
    return "\n".join(lines)


def _files(report: DataReport) -> Iterator[str]:
    named = sorted(report.files.items())
    width = max((len(name) for name, _ in named[:FILES]), default=0)
    for name, entry in named[:FILES]:
        kept = entry["rows_read"] - entry["dropped"].total()
        yield f"  {name:{width}}  {kept:>7,} of {entry['rows_read']:,}  {entry['format']}".rstrip()
    if rest := named[FILES:]:
        read = sum(entry["rows_read"] for _, entry in rest)
        yield f"  and {len(rest)} more files with {read:,} rows: data_report.json"


def _pairs(name: str, tokens: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    if not tokens.get("pairs"):
        return
    medians = ", ".join(f"{side} {tokens[side]['p50']}" for side in ("prompt", "chosen", "rejected"))
    longest = tokens["prompt"]["max"] + max(tokens["chosen"]["max"], tokens["rejected"]["max"])
    line = f"  {name}: {tokens['pairs']:,} pairs; median tokens: {medians}; none needs more than {longest:,}"
    yield f"{line}  answers {blocks([bin['chosen'] + bin['rejected'] for bin in tokens['histogram']])}"
    bias = tokens["length_bias"]["accuracy_of_length_alone"]
    if bias >= LENGTH_TELLS:
        yield f"  {name}: length alone tells the answers apart in {bias:.0%} of the pairs; a model may learn just that"
    for key, words in TOLD:
        if text.get(key):
            yield f"  {name}: {text[key]:,} {words}"
    rows = tokens.get("control_look_alikes", {}).get("rows", 0)
    if rows:
        yield f"  {name}: {rows:,} rows hold control tokens as text; they stay text and end no turn"


def blocks(counts: Sequence[int]) -> str:
    """A histogram in one line of block characters; a bin that is not empty shows at least the lowest."""
    top = max(counts, default=0)
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // top)] if top else " " for count in counts).rstrip()
