"""output_dir belongs to one run at a time, and what a finished one has left there goes only when that is asked for."""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from preference.errors import PreferenceError
from preference.files import NEXT, save_json
from preference.integrity import read_manifest
from preference.train.checkpoints import finish_result
from preference.train.run_record import read_run

logger = logging.getLogger(__name__)

LOCK, HOLDER = ".lock", ".lock.json"  # in output_dir; the lock ends with its process, whatever ends that
WAIT = 15.0  # seconds: data workers of a run that was killed hold its lock until they notice, 5 s
WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")

_held: dict[Path, FileLock] = {}  # by folder, until this process ends


class OutputError(PreferenceError, RuntimeError):
    """An output_dir that this run may not write to; the message says why and what to set."""


def make_folder(output_dir: Path) -> None:
    """Make output_dir where it is not there.

    Raises:
        OutputError: it is a file, or the system refuses; with its reason.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "nothing can be written there")
    except FileExistsError:
        raise OutputError(f"output_dir {output_dir} is a file: name a folder") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"output_dir {output_dir} cannot be made or written to ({reason}): set another") from None


def claim(output_dir: Path, inputs: Mapping[str, str | None], *, train: bool, overwrite: bool) -> None:
    """Make output_dir this process's until it ends. For the first rank.

    Args:
        inputs: what the run reads, by flag; names that are no paths (hub ids) do no harm.
        train: whether the run will leave a model.
        overwrite: whether a result there may be replaced, once the new one is complete.

    Raises:
        OutputError: output_dir is an input or holds one, another run is at work in it, or it holds a result.
    """
    make_folder(output_dir)
    for flag, name in inputs.items():
        if name and Path(name).expanduser().exists():
            path = Path(name).expanduser().resolve()
            if path.is_relative_to(output_dir.resolve()):
                raise OutputError(f"output_dir {output_dir} is or holds {flag} {name}, which is read: set another")
            if "_file_dir" in flag and path.is_dir() and output_dir.resolve().is_relative_to(path):
                raise OutputError(f"output_dir {output_dir} lies in {flag} {name}, which is read: set another")
    _lock(output_dir)
    finish_result(output_dir)
    what, in_the_way = _result(output_dir)
    if what and not train:
        raise OutputError(f"{output_dir} holds {what}, whose figures scoring would replace: set another output_dir")
    if in_the_way and not overwrite:
        raise OutputError(
            f"{output_dir} holds {what}: set another output_dir, or overwrite_output_dir=true to replace it"
        )
    if in_the_way:  # it stays as it is, with all that describes it, until the new model is complete
        (output_dir / NEXT).mkdir(exist_ok=True)


def _result(output_dir: Path) -> tuple[str | None, bool]:
    """(what a run has left in output_dir, whether a new run would replace a result by its own)."""
    run, _ = read_run(output_dir)
    if run.get("finished"):
        return "a finished run", True
    weights = next((path.name for pattern in WEIGHTS for path in sorted(output_dir.glob(pattern))), None)
    if weights and not run:
        return f"a model that no run of this toolkit has recorded there ({weights})", True
    by = (read_manifest(output_dir) or {}).get("run")
    if weights and by != run.get("run"):
        return "an earlier result, which another run began to replace", True
    return ("an unfinished run" if run else None), False


def _lock(output_dir: Path) -> None:
    if output_dir.resolve() in _held:
        return
    lock = FileLock(output_dir / LOCK)
    try:
        lock.acquire(timeout=WAIT, poll_interval=0.2)
    except Timeout:
        raise OutputError(
            f"another run is at work in {output_dir}: {_holder(output_dir)}. Wait for it, or set another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): take care that no other run uses it", output_dir, error)
        return
    _held[output_dir.resolve()] = lock
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    host = socket.gethostname()
    save_json(output_dir / HOLDER, {"host": host, "pid": os.getpid(), "since": since, "command": sys.argv})


def _holder(output_dir: Path) -> str:
    try:
        holder: dict[str, Any] = json.loads((output_dir / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not yet said which"
