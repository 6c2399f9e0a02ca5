"""The words of a command line, taken apart into names and texts; values come later, from the flags' declarations."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from preference.flags.config import read_config
from preference.flags.declaration import ArgumentError, Flag, quoted
from preference.flags.peers import ELSEWHERE, elsewhere

DEFAULTS = "--defaults"  # what stands behind it comes from run_orpo.sh: --name=value words only


@dataclass
class Given:
    """What was written, by flag: `texts` by the user, here or in a config file; `soft` by the launcher."""

    texts: dict[str, str] = field(default_factory=dict)
    soft: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    help: str = ""  # "common" or "all", where it was asked for


def read_words(words: Sequence[str], flags: Mapping[str, Flag]) -> Given:
    """Take the words apart. The command line overrides the config file, and both override the launcher's values.

    Raises:
        ArgumentError: a word that belongs to no flag, a flag that is unknown or lacks its value, a faulty config file.
    """
    cut = words.index(DEFAULTS) if DEFAULTS in words else len(words)
    given = Given()
    typed: dict[str, str] = {}
    for name, text in _pairs(words[:cut], flags):
        if name == "help":
            given.help = text
        elif name == "config":
            for entry in read_config(text):
                flag = known(entry.name, flags, entry.where + ": ")
                if entry.text is not None:
                    given.texts[flag], given.where[flag] = entry.text, entry.where + ": "
        else:
            typed[name] = text
    given.texts |= typed
    given.where = {name: where for name, where in given.where.items() if name not in typed}
    for word in words[cut + 1 :]:
        if not word.startswith("--") or "=" not in word:
            raise ArgumentError(f"behind {DEFAULTS} stand --name=value words only; got {quoted(word)}")
        name, _, text = word[2:].partition("=")
        given.soft[known(name, flags)] = text
    return given


def _pairs(words: Sequence[str], flags: Mapping[str, Flag]) -> Iterator[tuple[str, str]]:
    left = list(reversed(words))
    while left:
        word = left.pop()
        if word in ("-h", "--help"):
            yield "help", left.pop() if left[-1:] == ["all"] else "common"
            continue
        if not word.startswith("--") or word == "--":
            raise ArgumentError(f"{quoted(word)} belongs to no flag: flags are written --name value")
        written, equals, text = word[2:].partition("=")
        name = written.replace("-", "_")
        if name.startswith("no_") and name not in flags and name[3:] in flags and flags[name[3:]].kind is bool:
            if equals:
                raise ArgumentError(f"--{written} takes no value: write --{name[3:]} {quoted(text)} or --{written}")
            yield name[3:], "false"
            continue
        if name != "config":
            name = known(written, flags)
        if not equals:
            if left and not left[-1].startswith("--"):
                text = left.pop()
            elif name in flags and flags[name].kind is bool:
                text = "true"
            else:
                what = "a YAML file" if name == "config" else flags[name].takes()
                raise ArgumentError(
                    f"--{name} needs a value: {what} (one that begins with -- is written --{name}=--...)"
                )
        elif name == "config" and not text:
            raise ArgumentError("--config takes a YAML file")
        yield name, text


def known(written: str, flags: Mapping[str, Flag], where: str = "") -> str:
    """The flag's name: `written` with underscores.

    Raises:
        ArgumentError: there is none of that name; the message says what is nearest or does the same.
    """
    name = written.replace("-", "_")
    if name in flags:
        return name
    raise ArgumentError(f"{where}unknown flag {_shown(written)}{_suggest(name.lower(), flags)}")


def _shown(written: str) -> str:
    return f"--{written}" if re.fullmatch(r"[\w-]{1,60}", written) else quoted(f"--{written}")


def _suggest(name: str, flags: Mapping[str, Flag]) -> str:
    """What to write instead: the same by its name here, what does it otherwise, or the nearest name."""
    peers = {peer: flag for flag in flags.values() for peer in flag.peers}
    if name in peers:
        return f": here it is --{peers[name].name} ({peers[name].help})"
    if name in ELSEWHERE:
        return f": {ELSEWHERE[name]}"
    said = None if difflib.get_close_matches(name, flags, n=1, cutoff=0.8) else elsewhere(name)
    if said:
        return f": {said}"
    near = difflib.get_close_matches(name, [*flags, *peers], n=1, cutoff=0.6)
    if near:
        return f"; did you mean --{peers[near[0]].name if near[0] in peers else near[0]}?"
    return "; --help all lists all flags"
