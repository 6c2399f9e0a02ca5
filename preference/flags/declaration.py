"""A flag's one declaration: name, type, default, range, help, topic, and when it has no effect."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from preference.errors import PreferenceError

TRUE = ("true", "yes", "on", "y", "t", "1")
FALSE = ("false", "no", "off", "n", "f", "0")
WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
SHOWN, LONGEST_ERROR = 80, 400  # characters of a value, of what is wrong with it
LARGEST = 2**32 - 1  # whole numbers end up in C sooner or later, and nothing else here is as large
LONGEST_NUMBER = 50  # digits that are read of a whole number: more of them are too large all the same
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


class ArgumentError(PreferenceError, ValueError):
    """A flag or a config file that cannot be used; the message says what to write instead."""


def quoted(text: str) -> str:
    """`text` on one line, in quotation marks, and no longer than can be read."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text)} characters)"


@dataclass(frozen=True)
class Unused:
    """When a flag has no effect, and why: `test` is asked with all arguments of the run."""

    test: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes: finite ones between two ends, and a few `also` outside of them."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {end:.15g}" for word, end in ends.items() if end is not None)
        return " or ".join([*(f"{number:.15g}" for number in self.also), *([words] if words else [])])


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        group: the field of the arguments object that holds its value.
        kind: bool, int, float or str.
        optional: whether it may be unset, which is None.
        auto: whether "auto" means its default: there is a choice by hardware or model.
        choices: the values there are; a function where a library says which.
        check: raises ValueError for a text that means nothing, with the reason.
        unused: when it has no effect.
        identity: whether the weights of a run depend on it, so that a checkpoint is resumed with the same value only.
        local: whether it may differ from one process of a run to another.
        soft: whether a value that run_orpo.sh hands over is dropped unsaid where it has no effect.
        peers: what other toolkits call it.
    """

    name: str
    group: str
    kind: type
    optional: bool
    default: Any
    help: str
    topic: str
    auto: bool
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]]
    range: Range
    check: Callable[[str], object] | None
    unused: tuple[Unused, ...]
    identity: bool
    local: bool
    soft: bool
    peers: tuple[str, ...]

    def why_unused(self, arguments: Any) -> str | None:
        """Why the flag has no effect in this run; None where it has one."""
        return next((case.reason for case in self.unused if case.test(arguments)), None)

    def takes(self) -> str:
        """What may be written behind it, in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "one of " + ", ".join(self.names) if self.choices else "a text"
        number = "a whole number" if self.kind is int else "a number"
        return ", ".join(filter(None, [number, str(self.range)])) + (", or auto" if self.auto else "")

    @property
    def names(self) -> tuple[str, ...]:
        """The values of a flag that has choices."""
        return self.choices() if callable(self.choices) else self.choices

    def parse(self, text: str) -> Any:
        """The value that `text` writes.

        Raises:
            ArgumentError: it is none that the flag takes.
        """
        if (self.auto and text.strip().lower() == "auto") or (self.optional and not text.strip()):
            return self.default if self.auto else None
        value = self._value(text)
        if self.kind in (int, float) and value is not None and LARGEST < abs(value) < math.inf:
            raise ArgumentError(f"{self.name} takes {self.takes()}; {quoted(text)} is too large")
        if value is None or (self.kind in (int, float) and value not in self.range):
            raise ArgumentError(f"{self.name} takes {self.takes()}; got {quoted(text)}{self._near(text)}")
        if self.check is not None:
            try:
                self.check(text)
            except (ValueError, OSError) as error:
                said = " ".join(str(error).split())[:LONGEST_ERROR]
                raise ArgumentError(f"{self.name} {quoted(text)}: {said}") from None
        return value

    def _value(self, text: str) -> Any:
        if self.kind is bool:
            word = text.strip().lower()
            return True if word in TRUE else False if word in FALSE else None
        if self.kind is int:
            digits = text.strip()
            return int(digits[:LONGEST_NUMBER]) if WHOLE.fullmatch(digits) else None  # as large as need be
        if self.kind is float:
            return float(text) if NUMBER.fullmatch(text.strip()) else None
        if self.choices and text != self.default and text not in self.names:
            return None
        return text if text.strip() else None

    def _near(self, text: str) -> str:
        near = difflib.get_close_matches(text, self.names, n=1) if self.choices else []
        return f"; did you mean {near[0]}?" if near else ""


def flag(
    default: Any,
    help: str,
    *,
    topic: str = "",
    choices: Iterable[str] | Callable[[], tuple[str, ...]] = (),
    auto: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    also: tuple[float, ...] = (),
    check: Callable[[str], object] | None = None,
    unused: tuple[Unused, ...] = (),
    identity: bool = False,
    local: bool = False,
    soft: bool = True,
    peers: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that declares a flag: see `Flag`. Its name and type are the field's."""
    declared = {
        "help": help, "topic": topic, "choices": choices if callable(choices) else tuple(choices), "auto": auto,
        "range": Range(least, above, most, below, also), "check": check, "unused": unused, "identity": identity,
        "local": local, "soft": soft, "peers": peers,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=declared)


def flags_of(groups: Mapping[str, type]) -> dict[str, Flag]:
    """The flags that dataclasses declare, by name; `groups` maps the attribute that holds a group to its class."""
    found = {}
    for group, declared in groups.items():
        hints = typing.get_type_hints(declared)
        for field in dataclasses.fields(declared):
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            kind = next(kind for kind in kinds if kind is not types.NoneType)
            metadata = dict(field.metadata)
            metadata["topic"] = metadata["topic"] or (declared.__doc__ or "")
            found[field.name] = Flag(
                field.name, group, kind, types.NoneType in kinds, field.default, **metadata
            )  # fmt: skip
    return found
