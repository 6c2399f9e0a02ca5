"""The base of every error that is written for a user."""

from __future__ import annotations


class PreferenceError(Exception):
    """Something that the user can put right: str() is one clear sentence that says what, where and what to type.

    Scripts print it as it is; any other exception is a fault of the program and keeps its traceback.
    """
