"""The training and evaluation set of a run, from its flags: read, check, split, sample, render, tokenize, filter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.data.headline import show_data
from preference.data.inputs import Input, keep, parse_inputs, take_wanted
from preference.data.kept_rows import KeptRows
from preference.data.languages import add_languages
from preference.data.near_duplicates import near_duplicates
from preference.data.report import DataReport
from preference.data.row import Row
from preference.data.rows import load_rows
from preference.data.singles import alike
from preference.data.sources import HUB, find, said
from preference.data.text_stats import shared_prompts
from preference.files import log_file
from preference.terminal.console import Terminal
from preference.tokens.datasets import build_dataset, split_by_prompt

Found = list[tuple[Input, list[str]]]  # inputs, each with its sources


def load_data(
    args: Arguments, conversation: Any, tokenizer: Any, *, save_report: bool, terminal: Terminal
) -> tuple[Any, Any, Mapping[str, str]]:
    """(training set, evaluation set, questions of the latter by source); a set is None where this run needs none.

    Several named evaluation sets are a dict of them.

    Args:
        save_report: write data_report.json, which says what was left out, and why; also where nothing is left.
    """
    data, report = args.data, DataReport()
    training_source = f"hub:{data.dataset_name}" if data.dataset_name else data.train_file_dir
    prepared = Path(args.model.cache_dir or "cache") / "prepared"
    held_out = args.run.do_eval and not args.evaluation_files and data.validation_split_percentage > 0

    # no token is longer than the longest of the vocabulary: what cannot fit is not even kept
    most_tokens = data.max_source_length + data.max_target_length
    longest = None if data.truncate else most_tokens * max(map(len, tokenizer.get_vocab()))

    def load(found: Found, section: str) -> KeptRows:
        sources = [source for _, read in found for source in read]
        rows = load_rows(
            sources,
            report,
            data_check=data.data_check,
            section=section,
            longest=longest,
            keep_in=prepared,
            **args.reading(),
        )
        wanted = take_wanted(rows, found, args.run.seed, report)
        return alike(wanted, report, prepared) if args.reading()["unpaired"] else wanted

    def build(rows: KeptRows, limit: int, section: str) -> Any:
        return build_dataset(
            sample(rows, limit, args.run.seed, report),
            conversation,
            tokenizer,
            max_source_length=data.max_source_length,
            max_target_length=data.max_target_length,
            report=report,
            truncate=data.truncate,
            cache_dir=prepared,
            prompt_is_rendered=bool(data.prompt_is_rendered),
            section=section,
        )

    try:
        purpose = "train" if args.run.do_train else "evaluate"
        training, own_split = find_inputs(training_source, purpose, report, held_out)
        train_rows = load(training, "train_text") if args.run.do_train else None
        sets: dict[str, KeptRows] = {}
        if args.evaluation_files and args.run.do_eval:
            for name, inputs in args.evaluation_sets.items():
                evaluation, _ = find_inputs(inputs, "evaluate", report, False)
                sets[name] = load(evaluation, f"{section_of(name)}_text")
        elif held_out and own_split and train_rows:
            sets[""] = load([(Input(""), own_split)], "evaluation_text")
        elif held_out and train_rows:
            train_rows, sets[""] = split_by_prompt(train_rows, data.validation_split_percentage, args.run.seed)
        elif not args.run.do_train and not args.evaluation_files:
            sets[""] = load(training, "evaluation_text")
        eval_rows = next(iter(sets.values())) if len(sets) == 1 else KeptRows(chain(*sets.values()), prepared)
        shared_prompts(train_rows or (), eval_rows, report)
        near_duplicates(train_rows or (), eval_rows, report)
        add_languages(train_rows or eval_rows, report)
        train_set = build(train_rows, data.max_train_samples, "train") if train_rows else None
        built = {
            name: build(rows, data.max_eval_samples, section_of(name)) for name, rows in sets.items() if rows or name
        }
    finally:
        if save_report:
            report.save(log_file(args.run.output_dir, "data_report.json"))
    show_data(report, terminal)
    return train_set, built.get("") if built.keys() <= {""} else built, Questions(eval_rows)


def section_of(name: str) -> str:
    """The section of the data report about an evaluation set."""
    return f"evaluation_{name}" if name else "evaluation"


class Questions(Mapping[str, str]):
    """The question of each row by its source, "file:line"; read when it is asked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._places = {f"{row.file}:{row.line}": place for place, row in enumerate(rows)}

    def __getitem__(self, source: str) -> str:
        row = self._rows[self._places[source]]
        return row.question if row.prompt is None else row.prompt

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def find_inputs(text: str | None, purpose: str, report: DataReport, held_out: bool) -> tuple[Found, list[str]]:
    """The sources of each input for a purpose, and, if `held_out`, those of a split that evaluates what they train.

    What is not read of a folder is said in the report. Raises DataError, ValueError.
    """
    found: Found = []
    evaluation: list[str] = []
    for one in [Input(text)] if text and text.startswith(HUB) else parse_inputs(text or ""):
        chosen = find(one.path, purpose, report)
        if not held_out:
            chosen = replace(chosen, evaluation=[], left=chosen.evaluation + chosen.left)
        found.append((one, chosen.read))
        evaluation += chosen.evaluation
        if chosen.left or chosen.evaluation:
            report.warn(said(one.path, chosen))
    return found, evaluation


def sample(rows: KeptRows, limit: int, seed: int, report: DataReport) -> KeptRows:
    """`limit` rows drawn with the seed, in their order; the head of a file is seldom like the rest of it."""
    if limit < 0 or limit >= len(rows):
        return rows
    return keep(rows, set(random.Random(seed).sample(range(len(rows)), limit)), report)
