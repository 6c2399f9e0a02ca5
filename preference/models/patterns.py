"""Regular expressions that come with an adapter: peft matches them with the name of every layer, however long it takes.

`(a+)+b` takes hours on a name of forty letters. They are tried in a process of their own first, whose time is limited:
a match cannot be interrupted on every system, and not on every thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from preference.models.folder import ModelError

SECONDS = 20.0  # matching some ten thousand names takes well below one
PLAIN = re.compile(r"[\w./-]*")  # a name or a part of one: as a pattern it is done at once
# How peft 0.21 matches the entries of adapter_config.json
WHOLE = ("target_modules", "exclude_modules")  # where they are one text
PARTS = {
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
TRY = "import json, re, sys; p, n = json.load(sys.stdin); [getattr(re, how)(w, x) for how, w in p for x in n]"


def check_patterns(adapter: str, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse an adapter whose regular expressions are none, or are not done with the names of a model's layers soon.

    Args:
        config: the content of its adapter_config.json.
        names: of the model's layers.

    Raises:
        ModelError: with the entries that hold them.
    """
    found = [*_patterns(config)]
    if not found:
        return
    entries = ", ".join(dict.fromkeys(entry for entry, *_ in found))
    where = f"the adapter {adapter}: the regular expressions in its adapter_config.json ({entries})"
    content = json.dumps([[call for _, *call in found], list(names)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", TRY], input=content, text=True, stderr=subprocess.PIPE, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{where} are not done with the names of the model's layers after {SECONDS:g} s: write the names of the "
            "layers there as a list, or get the adapter anew"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{where} cannot be used: {reason}: get the adapter anew")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(entry, function of re, its pattern) for what is more than a name."""
    for entry in WHOLE:
        if isinstance(text := config.get(entry), str) and not PLAIN.fullmatch(text):
            yield entry, "fullmatch", text
    for entry, form in PARTS.items():
        value = config.get(entry)
        for text in value if isinstance(value, (list, dict)) else [value]:
            if isinstance(text, str) and not PLAIN.fullmatch(text):
                yield entry, "match", form.replace("{}", text)
