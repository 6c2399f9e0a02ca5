"""The preview of conversation.py: one prompt and response, control tokens visible, ids on request."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.rows import load_rows
from preference.errors import PreferenceError
from preference.models.starter import resolve_model
from preference.screen import shown
from preference.templates.resolve import resolve_template, stop_token_ids

SAMPLE = Row(
    question="How much water should I drink a day?",
    chosen="About two litres for most adults, more in heat or when you exercise.",
    rejected="Water.",
    history=(("Hello.", "Hello. What can I do for you?"),),
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("conversation.py", description="Shows what a template makes of a row.")
    parser.add_argument("--list", action="store_true", help="the table of templates, then stop")
    parser.add_argument("--template", default="auto", help="a name of --list, or auto: the tokenizer's own (default)")
    parser.add_argument("--model", required=True, help="folder or hub id whose tokenizer is used")
    parser.add_argument("--data", help="file or folder of preference rows; without it a built-in row is shown")
    parser.add_argument("--row", type=int, default=1, help="which usable row of --data, from 1 (default 1)")
    parser.add_argument("--fold_system", action="store_true", help="put the system text before the first question")
    parser.add_argument("--ids", action="store_true", help="also print the token ids")
    return parser.parse_args(arguments)


def pick_row(path: str | None, number: int) -> Row:
    """Row `number` of the usable rows of `path`. Raises DataError if there are fewer."""
    if path is None:
        return SAMPLE
    rows = load_rows([path], DataReport())
    if not 1 <= number <= len(rows):
        raise DataError(f"{path} has usable rows 1 to {len(rows)}, not {number}")
    return rows[number - 1]


def visible(text: str, tokenizer: Any) -> str:
    """`text` with each control token of the tokenizer in brackets of its own, line ends kept."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    control = {tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.added_tokens_decoder}
    pattern = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or r"(?!)"
    return re.sub(pattern, r"⟦\g<0>⟧", text)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    from transformers import AutoTokenizer

    try:
        row = pick_row(options.data, options.row)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(options.model))
        conv, warnings = resolve_template(options.template, tokenizer, fold_system=options.fold_system)
        prompt = row.prompt if row.prompt is not None else conv.get_prompt(row.question, row.history, row.system)
        texts = {"prompt": prompt, "chosen": conv.get_response(row.chosen), "rejected": conv.get_response(row.rejected)}
    except PreferenceError as error:
        print(shown(f"error: {error}"), file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {options.model} has no tokenizer that can be loaded: {error}", file=sys.stderr)
        return 1
    for what, text in texts.items():
        print(shown(f"--- {what}" + (f" of {row.file}:{row.line}" if row.file else "")))
        print(shown(visible(text, tokenizer)))
        if options.ids:
            print("ids:", *tokenizer.encode(text, add_special_tokens=False))
    print(f"--- template {conv.name}, stops at {conv.stop_str} (ids {stop_token_ids(conv, tokenizer)})")
    agrees = "it renders what the tokenizer's own chat template renders"
    nothing = "the tokenizer has no chat template of its own to compare it with"
    print(shown("\n".join(warnings or [agrees if tokenizer.chat_template else nothing])))
    return 0
