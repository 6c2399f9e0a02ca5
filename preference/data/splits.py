"""Which files of a folder train, which evaluate: by the names of their splits, as the dataset hub's loader reads them.

A name says its split by a word of its own (`train.jsonl`, `data/test-00000-of-00002.parquet`, `validation/x.csv`).
Several sets of one split (`train_prefs`, `train_gen`) are told apart where the hub writes them so, or where a word says
what they are for; the one for preferences is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from preference.data.report import DataError

_KINDS = {
    "train": ("train", "training", "trainset", "训练", "训练集"),
    "validation": ("validation", "valid", "val", "dev", "devset", "验证", "验证集"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "heldout", "holdout", "测试", "测试集"),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
_PREFERENCES = {"prefs", "pref", "preference", "preferences", "dpo", "pairwise"}
_OTHER_SETS = {"sft", "gen", "generation", "ppo", "prompts"}
_SHARD = re.compile(r"[-_]\d{1,6}[-_]of[-_]\d{1,6}$")
_BETWEEN = re.compile(r"[-._ \d]+")


class Name(NamedTuple):
    """What a path says about its rows: train, validation, test or "" for nothing; and which set of that split."""

    kind: str
    subset: str


@dataclass
class Chosen:
    """The sources of a folder, by what they are for."""

    read: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)  # beside those that train
    left: list[str] = field(default_factory=list)


def name_of(path: str) -> Name:
    """What the parts of a path, relative to the folder that was given, say; the outermost part that says a split."""
    for part in path.split("/"):
        stem = part.split(".")[0] if part.split(".")[0] else part
        shard = _SHARD.search(stem)
        words = [word for word in _BETWEEN.split(stem[: shard.start()] if shard else stem) if word]
        plain = [word for whole in words for word in whole.lower().split("_") if word]
        kinds = {kind for word in plain for kind in _kinds_of(word)}
        if len(kinds) == 1:
            rest = {word for word in plain if not _kinds_of(word)}
            return Name(kinds.pop(), _subset(rest, bool(shard)))
    return Name("", "")


def _kinds_of(word: str) -> list[str]:
    if word in _KIND_OF:
        return [_KIND_OF[word]]
    if word.isascii():
        return []
    return [kind for kind, words in _KINDS.items() if any(not other.isascii() and other in word for other in words)]


def _subset(words: set[str], is_shard: bool) -> str:
    if words & _PREFERENCES:
        return "preferences"
    known = words & _OTHER_SETS
    return "_".join(sorted(known or words)) if known or is_shard else ""


def choose(folder: str, sources: Sequence[tuple[str, str]], purpose: str) -> Chosen:
    """Which of the sources, (path, path relative to the folder), are read for a purpose: train, evaluate or convert.

    Raises DataError where the names do not say it: then the user has to name the files.
    """
    named = [(path, name_of(relative)) for path, relative in sources]
    kinds = {name.kind for _, name in named}
    held_out = kinds & {"validation", "test"}
    if not held_out:
        return _of_one_set(folder, named, [path for path, _ in named], purpose)
    if purpose == "evaluate":
        wanted = kinds if not {"train"} & kinds and len(held_out) == 1 else {_evaluating(kinds)}
        return _of_one_set(
            folder, [one for one in named if one[1].kind in wanted], [path for path, _ in named], purpose
        )
    if kinds == held_out and (purpose == "convert" and len(kinds) == 1):
        return _of_one_set(folder, named, [path for path, _ in named], purpose)
    if "train" not in kinds or "" in kinds:
        unnamed = next((path for path, name in named if not name.kind), None)
        why = (
            f"{unnamed} names no split, others do"
            if unnamed
            else f"it holds the split {' and '.join(sorted(kinds))} alone"
        )
        raise DataError.at(folder, 0, "ambiguous_split", f"{why}: give the files to read, with commas between them")
    found = _of_one_set(folder, [one for one in named if one[1].kind == "train"], [path for path, _ in named], purpose)
    evaluating = [one for one in named if one[1].kind == _evaluating(kinds)]
    found.evaluation = _of_one_set(folder, evaluating, [], purpose).read
    found.left = [path for path in found.left if path not in found.evaluation]
    return found


def _evaluating(kinds: set[str]) -> str:
    return "validation" if "validation" in kinds else "test"


def _of_one_set(folder: str, named: list[tuple[str, Name]], all_paths: list[str], purpose: str) -> Chosen:
    """Those of one split that are for preferences, where their names tell several sets apart."""
    subsets = {name.subset for _, name in named if name.kind}
    if len(subsets) > 1:
        if "preferences" in subsets:
            named = [one for one in named if one[1].subset == "preferences"]
        elif subsets - {""} <= _OTHER_SETS and "" in subsets:
            named = [one for one in named if not one[1].subset]
        else:
            choices = ", ".join(sorted(path for path, _ in named)[:8])
            raise DataError.at(
                folder,
                0,
                "ambiguous_split",
                f"several sets for one split ({choices}): give the files to read, with commas",
            )
    read = [path for path, _ in named]
    return Chosen(read, [], [path for path in all_paths if path not in set(read)])
