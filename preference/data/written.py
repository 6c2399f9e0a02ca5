"""What this toolkit writes itself, and models: never read as data where a folder of rows holds it.

A second run whose output_dir lies inside its train_file_dir would otherwise train on the first one's worst pairs.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

# A folder with one of these is that of a run, a checkpoint, an adapter or a prepared cache
_MARKS = frozenset({"run_identity.json", "trainer_state.json", "all_results.json", "adapter_config.json",
                    "outcome.json", "sweep.json"})  # fmt: skip
_MODEL = frozenset({"tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json",
                    "generation_config.json"})  # fmt: skip
# What lies in such a folder under fixed names; a user's file beside it is still read where the folder itself is named
_FILES = frozenset(
    """run.json run_identity.json trainer_state.json all_results.json train_results.json eval_results.json manifest.json
    data_report.json worst_pairs.json best_pairs.json changes.json
    samples.json evaluation.json answers.jsonl metrics.jsonl outcome.json sweep.json
    config.json generation_config.json adapter_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json preprocessor_config.json processor_config.json model.safetensors.index.json
    dataset_info.json state.json""".split()
)
_REPORT = re.compile(rb'\s*\{\s*(?:"format": "[^"]*",\s*)?"rows_read": \d+,\s*"rows_(?:kept|written)": \d+')


def is_own_folder(names: Set[str]) -> bool:
    """Whether a folder with these names in it is a run's output, a checkpoint, a model or a prepared cache."""
    return bool(names & _MARKS) or ("config.json" in names and bool(names & _MODEL))


def is_own_file(path: Path, names: Set[str]) -> bool:
    """Whether `path`, in a folder with these names, is what a run wrote there; or a data report, wherever it lies."""
    return (path.name in _FILES and is_own_folder(names)) or (path.suffix == ".json" and _is_report(path))


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _REPORT.match(file.read(512)) is not None
    except OSError:
        return False
