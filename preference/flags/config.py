"""A YAML file of flags: `name: value` lines, each value the text that stands there.

Only the events of YAML's grammar are read, never its types: YAML 1.1 takes 0123 for 83, 1:30 for 90, `no` for false and
1e-4 for a text. A flag knows its own type.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preference.flags.declaration import ArgumentError

LONGEST = 1 << 20
UNSET = ("", "~", "null", "Null", "NULL")


class Entry(NamedTuple):
    """A line of the file; `text` is None where nothing, null or ~ is written."""

    name: str
    text: str | None
    where: str


def read_config(path: str) -> list[Entry]:
    """The entries of a file, in order.

    Raises:
        ArgumentError: it cannot be read, is not flat `name: value` lines, or names something twice.
    """
    import yaml

    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:  # no UTF-8, or no name that a file can have
        raise ArgumentError(f"--config {path!r}: {' '.join(str(error).split())}") from None
    if len(text) > LONGEST:
        raise ArgumentError(f"--config {path}: longer than {LONGEST} characters: that is no list of flags")
    try:
        return _entries(path, yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ArgumentError(f"--config {path}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ArgumentError(f"--config {path}: {' '.join(str(error).split())}") from None


def _entries(path: str, events: Iterator[Any]) -> list[Entry]:
    from yaml import events as kinds

    found: dict[str, Entry] = {}
    name, inside = None, False
    for event in events:
        where = f"--config {path}, line {event.start_mark.line + 1}"
        if isinstance(event, (kinds.StreamStartEvent, kinds.StreamEndEvent, kinds.DocumentEndEvent)):
            continue
        if isinstance(event, kinds.DocumentStartEvent):
            if found:
                raise ArgumentError(f"{where}: a second document begins; write one, without --- between")
        elif isinstance(event, kinds.MappingStartEvent) and not inside:
            inside = True
        elif isinstance(event, kinds.MappingEndEvent):
            inside = False
        elif not inside:
            raise ArgumentError(f"{where}: expected `name: value` lines")
        elif not isinstance(event, kinds.ScalarEvent) or event.tag is not None:
            what = f"{name} takes one value" if name else "a name is one word"
            raise ArgumentError(f"{where}: {what}; write a list as a,b,c and keywords as a=1,b=2")
        elif name is None:
            name = event.value.replace("-", "_")
            if name in found:
                raise ArgumentError(
                    f"{where}: {name} is written twice, first in {found[name].where.rpartition(', ')[2]}"
                )
        else:
            unset = event.style is None and event.value in UNSET
            found[name] = Entry(name, None if unset else event.value, where)
            name = None
    if not found:
        raise ArgumentError(f"--config {path}: expected `name: value` lines, and there are none")
    return list(found.values())
