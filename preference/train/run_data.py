"""The training and evaluation set of a run, from its flags: read, check, split, sample, render, tokenize, filter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference.arguments import Arguments
from preference.data.headline import headline
from preference.data.report import DataReport
from preference.data.row import Row
from preference.data.rows import load_rows
from preference.data.text_stats import shared_prompts
from preference.tokens.datasets import build_dataset, split_by_prompt


def load_data(
    args: Arguments, conversation: Any, tokenizer: Any, *, save_report: bool, say: Callable[[str], None]
) -> tuple[Any, Any, dict[str, str]]:
    """(training set, evaluation set, questions of the latter by source); a set is None where this run needs none.

    Args:
        save_report: write data_report.json, which says what was left out, and why; also where nothing is left.
    """
    data, report = args.data, DataReport()
    training_source = f"hub:{data.dataset_name}" if data.dataset_name else data.train_file_dir
    held_out = args.run.do_eval and not args.evaluation_files and data.validation_split_percentage > 0

    def load(source: Any, section: str) -> list[Row]:
        return load_rows(
            [source],
            report,
            data_check=data.data_check,
            section=section,
            **data.reading(),
        )

    def build(rows: list[Row], limit: int, section: str) -> Any:
        return build_dataset(
            sample(rows, limit, args.run.seed, report),
            conversation,
            tokenizer,
            max_source_length=data.max_source_length,
            max_target_length=data.max_target_length,
            report=report,
            truncate=data.truncate,
            cache_dir=Path(args.model.cache_dir or "cache") / "prepared",
            prompt_is_rendered=bool(data.prompt_is_rendered),
            section=section,
        )

    try:
        train_rows = load(training_source, "train_text") if args.run.do_train else None
        if args.evaluation_files:
            eval_rows = load(data.validation_file_dir, "evaluation_text") if args.run.do_eval else None
        elif held_out and args.run.do_train:
            train_rows, eval_rows = split_by_prompt(train_rows, data.validation_split_percentage, args.run.seed)
        else:
            eval_rows = None if args.run.do_train else load(training_source, "evaluation_text")
        shared_prompts(train_rows or (), eval_rows or (), report)
        train_set = build(train_rows, data.max_train_samples, "train") if train_rows else None
        eval_set = build(eval_rows, data.max_eval_samples, "evaluation") if eval_rows else None
    finally:
        if save_report:
            report.save(Path(args.run.output_dir) / "data_report.json")
    say(headline(report))
    return train_set, eval_set, {f"{row.file}:{row.line}": row.question or row.prompt for row in eval_rows or ()}


def sample(rows: list[Row], limit: int, seed: int, report: DataReport) -> list[Row]:
    """`limit` rows drawn with the seed, in their order; the head of a file is seldom like the rest of it."""
    if limit < 0 or limit >= len(rows):
        return rows
    chosen = set(random.Random(seed).sample(range(len(rows)), limit))
    for i, row in enumerate(rows):
        if i not in chosen:
            report.drop("not_sampled", row.file, row.line)
    return [rows[i] for i in sorted(chosen)]
