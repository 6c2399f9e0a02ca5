"""What a run says of its data before it trains: a line a file, what was dropped, how long the pairs are.

Everything else that is known stands in data_report.json. Zeros are not told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preference.data.report import DataReport
from preference.terminal.console import LABEL, Terminal
from preference.terminal.language import tr

FILES, REASONS = 8, 5  # lines at most, in plain lines
ON_SCREEN, SETS, REMARKS = 3, 2, 2  # files, sets and remarks at most, on a terminal
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
TOLD = (
    "duplicate_pairs",
    "contradicting_pairs",
    "repeated_prompts",
    "near_identical_answers",
    "control_text_rows",
)  # where the count is not zero
SINGLE = TOLD[:3]  # said in other words of rows of one answer
LENGTH_TELLS = 0.6  # accuracy of length alone from which it is worth a line
SAMPLED = "not_sampled"  # no fault of the rows


def show_data(report: DataReport, terminal: Terminal) -> None:
    """What became of the data, in at most a dozen lines of a terminal, or as plain lines."""
    if not terminal.coloured:
        terminal.say(headline(report))
        return
    files = list(_files(report, ON_SCREEN, first=True))
    terminal.rows(tr("data"), [terminal.cut(line, 1) for line in files])
    remarks = [*report.warnings, *(line.strip() for line in report.unread_lines()), *_noted(report)]
    for name, tokens in list(_sets(report))[:SETS]:
        terminal.rows(_name(name)[:LABEL], [_lengths(tokens, terminal.writes(BLOCKS), short=name != "train")])
        remarks += [f"{_name(name)}: {line}" for line in _remarks(tokens, report.sections.get(f"{name}_text", {}))]
    shown = [terminal.cut(line, 2 if len(remarks) == 1 else 1) for line in remarks[:REMARKS]]
    if remarks:
        more = [tr("more_said", count=len(remarks) - REMARKS)] if len(remarks) > REMARKS else []
        terminal.rows(tr("note"), [*shown, *more], style="yellow")


def headline(report: DataReport) -> str:
    """The same as plain lines."""
    lines = [f"{tr('data')}: " + tr("rows", read=report.rows_read, kept=report.rows_kept)]
    lines += [f"  {line}" for line in _files(report, FILES)]
    for reason, count in report.dropped.most_common(REASONS):
        first = report.examples[reason][0]
        where = f"{first['file']}:{first['line']} {first['detail'][:120]}".rstrip()
        lines.append("  " + tr("dropped_at", count=count, reason=reason, where=where))
    if len(report.dropped) > REASONS:
        others = sum(count for _, count in report.dropped.most_common()[REASONS:])
        lines.append("  " + tr("dropped_more", count=others, reasons=len(report.dropped) - REASONS))
    lines += [f"  {tr('note')}: {line}" for line in _noted(report)]
    lines += [f"  {tr('warning')}: {warning}" for warning in report.warnings]
    lines += report.unread_lines()
    for name, tokens in _sets(report):
        told = _name(name)
        lines.append(f"  {told}: {_lengths(tokens, True)}")
        lines += [f"  {told}: {line}" for line in _remarks(tokens, report.sections.get(f"{name}_text", {}))]
    return "\n".join(lines)


def _sets(report: DataReport) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(section, figures of its tokens) of the training set and the evaluation sets that hold pairs."""
    for name, section in report.sections.items():
        wanted = name == "train" or (name.startswith("evaluation") and not name.endswith("_text"))
        if wanted and section.get("pairs"):
            yield name, section


def _name(section: str) -> str:
    """What a section is called on the screen; a named evaluation set by its name."""
    return tr(section) if section in ("train", "evaluation") else section.removeprefix("evaluation_")


def _files(report: DataReport, most: int, first: bool = False) -> Iterator[str]:
    """A line a file: rows kept, format; `first`: and the reason that took most of its rows, with the first place."""
    named = sorted(report.files.items())
    named, rest = (named[:most], named[most:]) if len(named) > most + 1 else (named, [])
    width = max((len(name) for name, _ in named), default=0)
    counts = [tr("of", kept=e["rows_read"] - e["dropped"].total(), read=e["rows_read"]) for _, e in named]
    for (name, entry), count in zip(named, counts, strict=True):
        why = _most(report, name, entry["dropped"]) if first else entry["format"]
        yield f"{name:{width}}  {count:>{max(map(len, counts))}}  {why}".rstrip()
    if rest:
        yield tr("more_files", files=len(rest), rows=sum(entry["rows_read"] for _, entry in rest))


def _most(report: DataReport, file: str, dropped: Counter[str]) -> str:
    """The reason that took most rows of a file and is a fault of theirs; else that they were not drawn."""
    faults = Counter({reason: count for reason, count in dropped.items() if reason != SAMPLED})
    for reason, count in (faults or dropped).most_common(1):
        place = next((e["line"] for e in report.examples[reason] if e["file"] == file), None)
        if reason == SAMPLED or place is None:
            return f"{count:,} {reason}"
        return tr("dropped", count=count, reason=reason, line=place)
    return ""


def _noted(report: DataReport) -> Iterator[str]:
    for name, count in report.notes.most_common():
        yield tr("noted", count=count, name=name)


def _lengths(tokens: Mapping[str, Any], unicode: bool, short: bool = False) -> str:
    single = tokens.get("single_answers", 0)
    words = {"prompt": "prompt", "chosen": "good" if single else "chosen", "rejected": "bad" if single else "rejected"}
    sides = {side: tokens[side] for side in words if tokens[side]}  # of single answers all may be good
    medians = ", ".join(f"{words[side]} {spread['p50']}" for side, spread in sides.items())
    longest = tokens["prompt"]["max"] + max(spread["max"] for side, spread in sides.items() if side != "prompt")
    drawn = blocks(
        [bin["chosen"] + bin["rejected"] for bin in tokens["histogram"]], BLOCKS if unicode else ASCII_BLOCKS
    )
    if single:
        return f"{tr('singles', count=single, good=tokens['good'], medians=medians, longest=longest)}  {drawn}"
    if short:
        return f"{tr('pairs_short', pairs=tokens['pairs'], longest=longest)}  {drawn}"
    return f"{tr('pairs', pairs=tokens['pairs'], medians=medians, longest=longest)}  {tr('answers')} {drawn}"


def _remarks(tokens: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    bias = tokens.get("length_bias", {}).get("accuracy_of_length_alone", 0.0)
    if bias >= LENGTH_TELLS:
        yield tr("length_tells", share=bias)
    yield from told_of(text)
    if rows := tokens.get("control_look_alikes", {}).get("rows", 0):
        yield tr("look_alikes", count=rows)


def told_of(text: Mapping[str, Any]) -> Iterator[str]:
    """What a set's section of figures about its text says of faults."""
    for key in TOLD:
        if text.get(key):
            yield tr(f"{key}_single" if text.get("single_answers") and key in SINGLE else key, count=text[key])


def blocks(counts: Sequence[int], levels: str = BLOCKS) -> str:
    """A histogram in one line of block characters; a bin that is not empty shows at least the lowest."""
    top = max(counts, default=0)
    return "".join(levels[-(-count * (len(levels) - 1) // top)] if top else " " for count in counts).rstrip()
