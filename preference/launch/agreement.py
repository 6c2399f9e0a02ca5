"""Do all processes of a run see the same code, settings and data? Compared before anything depends on it."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from preference.errors import PreferenceError


class AgreementError(PreferenceError, RuntimeError):
    """The processes of a run differ; the message names those that do, and in what."""


def code_fingerprint() -> str:
    """A hash of the project's own Python files."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(root / "preference").rglob("*.py")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the libraries that a run's numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "trl", "datasets", "peft", "accelerate")}


def compare_ranks(facts: Mapping[str, Any]) -> None:
    """Compare `facts` (name -> a value with a short repr) over all processes. One small collective.

    Raises:
        AgreementError: on every rank, with the same message.
    """
    everyone = gather_object([(socket.gethostname(), dict(facts))])
    faults = []
    for name in facts:
        values = [repr(others.get(name)) for _, others in everyone]
        common, count = Counter(values).most_common(1)[0]
        odd = [(rank, value) for rank, value in enumerate(values) if value != common]
        if odd:
            who = ", ".join(f"rank {rank} on {everyone[rank][0]} has {value}" for rank, value in odd[:4])
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            faults.append(f"{name}: {who}{more}; {count} of {len(values)} have {common}")
    if faults:
        raise AgreementError(
            "the processes of this run are not alike, so they would diverge. " + ". ".join(faults)
            + ". Each node needs the same checkout, settings, model and data"
        )  # fmt: skip


@contextlib.contextmanager
def on_every_rank() -> Iterator[None]:
    """What fails within on one rank fails on all of them, by rank and host, instead of leaving them to wait for it.

    No collective may be called within; one small one is at the end.

    Raises:
        AgreementError: on the ranks that did not fail. The others raise what they had.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = gather_object([error and (socket.gethostname(), f"{type(error).__name__}: {error}")])
    if error is not None:
        raise error
    failed = [(rank, *failure) for rank, failure in enumerate(failures) if failure]
    if failed:
        rank, host, text = failed[0]
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise AgreementError(f"rank {rank} on {host}{more} failed: {text}")
