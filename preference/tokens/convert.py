"""An open preference dataset in, triples out: {system, history, question, response_chosen, response_rejected}.

    python data/convert.py dpo_zh_demo.json --output train.jsonl --report report.json
    python data/convert.py hub:Anthropic/hh-rlhf::test --output hh_test.jsonl

INPUT: files or folders of .jsonl, .json (lines or an array), .csv (each also .gz) and .parquet; folders that
`Dataset.save_to_disk` wrote; hub:owner/name[:config[:split]]. Recognises the format of each file by the keys of its
rows and says so; data/README.md lists the formats. Exit status: 0 if every INPUT gave rows, 1 if one was refused or
nothing could be written, 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import sys
from pathlib import Path
from typing import IO, Any, Literal

from preference.data.formats import FORMATS, Format, Options, choose
from preference.data.inputs import Input, parse_inputs, take_wanted
from preference.data.kept_rows import KeptRows
from preference.data.packed import Position
from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.rows import Repeats, iter_rows
from preference.data.singles import single_answers
from preference.data.sources import HUB, find_sources
from preference.data.written import is_own_file
from preference.errors import of_the_system
from preference.screen import show_everything, shown
from preference.tokens.lengths import TokenLengths

EXAMPLES = 20  # places listed for each reason in the report
STEP = 500  # records between two updates of the progress bar


def arguments(argv: list[str] | None) -> argparse.Namespace:
    names = "formats:\n" + "\n".join(f"  {name:24} {format.what}" for name, format in sorted(FORMATS.items()))
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "input",
        nargs="+",
        metavar="INPUT",
        help="file, folder or hub:owner/name[:config[:split]]; "
        "a.jsonl:5000 and b/:0.3 take so many of its rows, or such a share, drawn with the seed",
    )
    add("--output", required=True, metavar="OUT.jsonl", help="where the triples go (.gz: compressed)")
    add("--format", default="auto", help="read every INPUT as this format instead of recognising it")
    add("--columns", metavar="question=A,chosen=B,rejected=C", help="names of the columns (also system=, history=)")
    add(
        "--labels",
        metavar="0=first,1=second,2=tie",
        help="what the values of a label mean, where the file does not say",
    )
    add("--ignore_columns", metavar="A,B", help="read the rows as if they had not these columns")
    add("--split-system", action="store_true", help="take a system prompt out of the question it is written into")
    add(
        "--rendered",
        choices=["split", "keep", "strict"],
        help="texts that a chat template was applied to: split them "
        "into turns, keep them as they stand, or drop the rows (default: split where the rows of a file agree)",
    )
    add(
        "--prompt-is-rendered",
        choices=["true", "false"],
        help="a string in the column prompt is used as it stands, or "
        "is a question (default: as it stands where it begins or ends in a control token)",
    )
    add("--encoding", help="what text files are written in, if not UTF-8: gb18030, utf-16-le, ...")
    add("--axis", choices=["better", "safer"], help="PKU-SafeRLHF: which label decides")
    add("--unpaired", action="store_true", help="read rows of one answer with a label good or bad too, for loss=kto")
    add("--min-score-gap", type=float, metavar="G", help="drop scored pairs that differ by less (default: ties only)")
    add("--pairs", default="best-worst", choices=["best-worst", "all", "best-random"], help="pairs of a ranked list")
    add("--max-per-prompt", type=int, default=0, metavar="N", help="keep at most N pairs of one prompt")
    add("--dedup", action="store_true", help="drop pairs that repeat an earlier one (case and white space aside)")
    add("--seed", type=int, default=0, help="of --pairs best-random and of caps")
    add("--report", metavar="R.json", help="counts, reasons and places as JSON")
    add("--tokenizer", metavar="FOLDER", help="report lengths in tokens of this tokenizer too")
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> Options:
    if args.max_per_prompt < 0:
        raise ValueError(f"--max-per-prompt must not be negative, it is {args.max_per_prompt}")
    inputs = [one.path for one in parsed(args.input)]
    if Path(args.output).resolve() in {Path(path).resolve() for path in inputs}:
        raise ValueError(f"{args.output} is both INPUT and OUTPUT")
    for name in ("output", "report"):
        if getattr(args, name) and Path(getattr(args, name)).is_dir():
            raise ValueError(f"--{name} must name a file, {getattr(args, name)} is a folder")
    _check_not_read(args, inputs)
    return choose(
        format=args.format,
        columns=args.columns,
        labels=args.labels,
        ignore_columns=args.ignore_columns,
        axis=args.axis,
        min_score_gap=args.min_score_gap,
        pairs=args.pairs,
        split_system=args.split_system,
        seed=args.seed,
        rendered=args.rendered,
        encoding=args.encoding,
        unpaired=args.unpaired,
        prompt_is_rendered={"true": True, "false": False}.get(args.prompt_is_rendered),
    )


def _check_not_read(args: argparse.Namespace, inputs: list[str]) -> None:
    """--output may replace what an earlier conversion left in an INPUT folder, and nothing else that is read."""
    output, report = Path(args.output).resolve(), Path(args.report).resolve() if args.report else None
    if report == output:
        raise ValueError(f"--report and --output name the same file, {args.output}")
    for path in (Path(name).resolve() for name in inputs if Path(name).exists()):
        if report and report.is_file() and report.is_relative_to(path) and not is_own_file(report, set()):
            raise ValueError(f"--report {args.report} would overwrite what is read: name another file")
        if output.is_file() and output != path and output.is_relative_to(path) and not _written_here(output):
            raise ValueError(
                f"--output {args.output} lies in INPUT {path} and was not written by a conversion: name another file"
            )


def _written_here(path: Path) -> bool:
    """Whether the first line of a file is one of `triple_line`."""
    try:
        with _open(path, path, "rt") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError, EOFError, RecursionError):
        return False
    context, answers = (["prompt"], ["system", "history", "question"]), (["chosen", "rejected"], ["response", "label"])
    made = [[*context[0], *answers[0]], [*context[1], "response_chosen", "response_rejected"]]
    made += [[*which, *answers[1]] for which in context]
    if isinstance(row, dict) and isinstance(row.get("chosen"), list):  # whole conversations
        made = [answers[0], [*answers[0], "tools"]]
    return isinstance(row, dict) and list(row) in made


def triple_line(row: Row) -> str:
    if row.dialogue is not None:
        whole = row.dialogue
        tools = {"tools": list(whole.tools)} if whole.tools else {}
        sides = {"chosen": list(whole.chosen), "rejected": list(whole.rejected)}
        return json.dumps(sides | tools, ensure_ascii=False) + "\n"
    if row.label is not None:
        context = {"prompt": row.prompt} if row.prompt is not None else _context(row)
        return json.dumps(context | {"response": row.chosen, "label": row.label}, ensure_ascii=False) + "\n"
    if row.prompt is not None:  # rendered already: training uses it as it stands
        ready = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        return json.dumps(ready, ensure_ascii=False) + "\n"
    triple = {**_context(row), "response_chosen": row.chosen, "response_rejected": row.rejected}
    return json.dumps(triple, ensure_ascii=False) + "\n"


def _context(row: Row) -> dict[str, Any]:
    return {"system": row.system or "", "history": [list(turn) for turn in row.history], "question": row.question}


class Progress:
    """A bar over the bytes of the local files and the rows read, on stderr."""

    def __init__(self, sources: list[str]):
        from tqdm import tqdm

        self.sizes = {source: os.path.getsize(source) for source in sources if os.path.isfile(source)}
        self.bar = tqdm(total=sum(self.sizes.values()) or None, unit="B", unit_scale=True, desc="reading", leave=False)
        self.source, self.before, self.records = "", 0, 0

    def __call__(self, source: str, position: Position) -> None:
        if source != self.source:
            self.before += self.sizes.get(self.source, 0)
            self.source = source
        self.records += 1
        if self.records % STEP == 0:
            self.bar.set_postfix_str(f"{self.records} rows", refresh=False)
            self.bar.update(self.before + position.bytes_read() - self.bar.n)

    def say(self, text: str) -> None:
        self.bar.clear()
        print(shown(text), file=sys.stderr)


def parsed(paths: list[str]) -> list[Input]:
    """The inputs that the words of the command line name. Raises ValueError."""
    return [one for path in paths for one in ([Input(path)] if path.startswith(HUB) else parse_inputs(path))]


def inputs_of(paths: list[str], output: Path, report: DataReport) -> list[tuple[Input, list[str]]]:
    """Each input with its sources, without the file that is written. Raises ValueError, DataError."""
    found: list[tuple[Input, list[str]]] = []
    seen: set[str] = set()
    for one in parsed(paths):
        own = [source for source in find_sources([one.path], "convert", report) if source not in seen]
        seen.update(own)
        found.append((one, [s for s in own if s.startswith(HUB) or Path(s).resolve() != output]))
    return found


def convert(
    paths: list[str], output: Path, options: Options, repeats: Repeats, report: DataReport, tokenizer: str | None = None
) -> int:
    """Write the triples of `paths` to `output` and return how many were written.

    A file appears whole or not at all; a pipe or device is written to as it is. Where a path has a cap or a share
    (a.jsonl:5000, b/:0.3), all its rows are read before the first is written; they lie on the disk meanwhile.
    """
    found = inputs_of(paths, output.resolve(), report)
    sources = [source for _, read in found for source in read]
    progress = Progress(sources)

    def say_format(source: str, format: Format, why: str) -> None:
        progress.say(f"{source}: {format.name} ({format.what}), because {why}")

    tokens = TokenLengths(tokenizer) if tokenizer else None
    written = 0
    special = output.exists() and not output.is_file()
    unfinished = output if special else output.with_name(output.name + ".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = iter_rows(sources, report, options, repeats=repeats, on_file=say_format, on_record=progress)
    if any(one.cap is not None or one.share is not None for one, _ in found):
        rows = iter(take_wanted(KeptRows(rows, output.parent), found, options.seed, report))
    rows = single_answers(rows, report) if options.unpaired else rows
    try:
        with _open(unfinished, output) as file:
            for row in tokens.watch(rows) if tokens else rows:
                file.write(triple_line(row))
                written += 1
        if tokens and written:
            report.add_section("tokens", tokens.to_dict())
        if written and not special:
            unfinished.replace(output)
    finally:
        progress.bar.close()  # what is said of an error stands on a line of its own
        if not special:
            with contextlib.suppress(OSError):  # where nothing could be written there is nothing to remove
                unfinished.unlink(missing_ok=True)
    return written


def _open(path: Path, named: Path, mode: Literal["wt", "rt"] = "wt") -> IO[str]:
    if named.suffix == ".gz":
        return gzip.open(path, mode, encoding="utf-8", newline="\n")
    return open(path, mode, encoding="utf-8", newline="\n")


def report_dict(report: DataReport, written: int) -> dict:
    content = report.to_dict(max_examples=EXAMPLES)
    formats = sorted({entry["format"] for entry in content["files"].values()} - {""})
    kept = content.pop("rows_kept")
    assert kept == written, f"{written} rows written, but {kept} counted as kept"
    head = {"format": "+".join(formats), "rows_read": content.pop("rows_read"), "rows_written": written}
    return head | content


def save_report(content: dict, path: str | None) -> None:
    if path:
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    show_everything()
    report = DataReport(max_listed=EXAMPLES)
    try:
        options = options_of(args)
        capped = any(one.cap is not None or one.share is not None for one in parsed(args.input))
        if args.seed and args.pairs != "best-random" and not capped:
            report.warn("--seed has no effect without --pairs best-random, a cap or a share")
        if args.report:  # before the work, which a report that cannot be written must not cost
            Path(args.report).parent.mkdir(parents=True, exist_ok=True)
        repeats = Repeats(args.dedup, args.max_per_prompt)
        written = convert(args.input, Path(args.output), options, repeats, report, args.tokenizer)
        content = report_dict(report, written)
        save_report(content, args.report)
    except (ValueError, OSError) as error:
        said = of_the_system(error, "--output") or error
        print(shown(f"error: {said}"), file=sys.stderr)
        if isinstance(error, DataError) and not report.rows_read:
            report.warn(str(error))
            save_report(report_dict(report, 0), args.report)
        return 2 if isinstance(error, ValueError) and not isinstance(error, DataError) else 1
    print(shown(report.summary()))
    what = "single answers" if options.unpaired else "triples"
    print(f"{written} {what} written to {args.output}" if written else f"nothing written to {args.output}")
    kept = [content["files"][one.path]["rows_kept"] for one in parsed(args.input) if one.path in content["files"]]
    return 0 if written and all(kept) else 1
