"""Flags of the rows, from files to lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preference.arguments.unused import NO_EVALUATION, NO_TRAINING
from preference.data.formats import check_encoding, parse_columns, parse_labels
from preference.data.inputs import parse_inputs, parse_sets
from preference.flags.declaration import Unused, flag


@dataclass
class DataArguments:
    """the data"""

    train_file_dir: str | None = flag(
        "data/train",
        "files and folders (read recursively; .jsonl, .json, .csv, .parquet, packed or not), with commas; behind a "
        "colon a cap or a share of the rows: a.jsonl:5000,b/:0.3",
        check=parse_inputs,
        unused=(Unused(lambda a: a.data.dataset_name is not None, "dataset_name gives the training rows"),),
        peers=("dataset", "datasets", "dataset_dir", "train_file", "train_data", "data_path", "train_dataset"),
    )
    validation_file_dir: str | None = flag(
        None,
        "the same for evaluation, or several sets, each with a name: med=DIR1,general=DIR2; unset: the test or "
        "validation split of a training folder, or a part of its rows",
        check=parse_sets,
        unused=(NO_EVALUATION,),
        peers=("eval_dataset", "val_dataset", "test_datasets", "validation_file", "eval_file"),
    )
    dataset_name: str | None = flag(None, "a hub dataset instead of files: owner/name, owner/name:config:split")
    validation_split_percentage: float = flag(
        5.0,
        "share of training prompts held out when there are no evaluation files, in percent",
        least=0,
        below=100,
        unused=(NO_EVALUATION, Unused(lambda a: a.evaluation_files, "validation_file_dir gives the evaluation rows")),
        peers=("val_size", "val_set_size", "split_dataset_ratio"),
    )
    template_name: str = flag(
        "auto",
        "conversation template: auto = the tokenizer's own; or a name from conversation.py --list",
        peers=("template", "template_type", "chat_template"),
    )
    fold_system: bool = flag(
        False, "write a system message into the first user turn where a template has no system turn"
    )
    rendered: str | None = flag(
        None,
        "texts that a chat template was applied to: split = into turns (unset: where the rows of a file agree), keep = "
        "as they stand, strict = drop the rows",
        choices=("split", "keep", "strict"),
    )
    prompt_is_rendered: bool | None = flag(
        None,
        "a string in the column prompt: true = use it as it stands, its control tokens are meant as such; false = it "
        "is a question; unset = as it stands where it begins or ends in a control token",
    )
    data_format: str = flag(
        "auto", "format of the files, if it is not to be recognised (data/README.md lists the names)"
    )
    columns: str | None = flag(None, "renamed columns: question=QUERY,chosen=GOOD,rejected=BAD", check=parse_columns)
    labels: str | None = flag(
        None,
        "what the values of a label mean, where the file does not say: 0=first,1=second,2=tie; of single answers "
        "5=good,1=bad",
        check=parse_labels,
    )
    ignore_columns: str | None = flag(None, "columns to read the rows without, with commas", peers=("remove_columns",))
    pairs: str = flag(
        "best-worst",
        "pairs made of several ranked answers: best-worst, all, best-random",
        choices=("best-worst", "all", "best-random"),
    )
    encoding: str | None = flag(
        None, "what text files are written in, if not UTF-8: gb18030, utf-16-le, ...", check=check_encoding
    )
    axis: str | None = flag(None, "PKU-SafeRLHF has two labels: which one decides", choices=("better", "safer"))
    min_score_gap: float | None = flag(None, "drop scored pairs whose scores differ by less", least=0)
    data_check: str = flag(
        "drop", "a faulty row: drop = drop it and report it; strict = stop", choices=("drop", "strict")
    )
    max_source_length: int = flag(
        1024,
        "tokens for the prompt; a pair is kept if prompt + answer fits in the sum of both",
        least=1,
        most=10**7,
        identity=True,
        peers=("max_prompt_length",),
    )
    max_target_length: int = flag(
        512,
        "tokens for an answer, stop token included; see max_source_length",
        least=1,
        most=10**7,
        identity=True,
        peers=("max_completion_length", "max_response_length"),
    )
    truncate: bool = flag(
        False,
        "cut rows that do not fit instead of dropping them; a cut answer has no stop token",
        identity=True,
        peers=("truncation_strategy", "truncation_mode"),
    )
    max_train_samples: int = flag(
        -1,
        "use that many training rows at most (-1: all)",
        least=1,
        also=(-1,),
        unused=(NO_TRAINING,),
        peers=("max_samples",),
    )
    max_eval_samples: int = flag(
        -1, "use that many evaluation rows at most, of each set (-1: all)", least=1, also=(-1,), unused=(NO_EVALUATION,)
    )

    def reading(self) -> dict[str, Any]:
        """The choices about reading files, by the names of their fields in `preference.data.formats.Options`."""
        names = ("columns", "labels", "ignore_columns", "pairs", "axis", "min_score_gap", "rendered",
                 "prompt_is_rendered", "encoding")  # fmt: skip
        return {"format": self.data_format, **{name: getattr(self, name) for name in names}}
