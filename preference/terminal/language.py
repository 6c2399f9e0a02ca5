"""The language that the screen speaks, and its messages in it."""

from __future__ import annotations

from collections.abc import Mapping

from preference.terminal.words import WORDS

LANGUAGES = ("en", "zh")
_spoken = "en"


def of_environment(environ: Mapping[str, str]) -> str:
    """The language that a user's locale asks for: the first of LC_ALL, LC_MESSAGES and LANG that is set decides."""
    locale = next((environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def speak(language: str) -> None:
    """From here on `tr` answers in `language`."""
    global _spoken
    assert language in LANGUAGES
    _spoken = language


def spoken() -> str:
    return _spoken


def tr(key: str, /, **values: object) -> str:
    """The message of that key in the language that is spoken, with `values` filled in."""
    text = WORDS[key][LANGUAGES.index(_spoken)]
    return text.format(**values) if values else text
