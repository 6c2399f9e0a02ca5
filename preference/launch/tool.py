"""The life of a script that is no training run: chat, export, examination, conversion."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from preference.errors import PreferenceError, of_the_system
from preference.screen import clean_logging, show_everything, shown

INTERRUPTED = 130  # exit status after Ctrl+C, as shells have it


class ToolError(PreferenceError, ValueError):
    """A file that a script may not write to; the message names the flag and says what to do."""


def check_output(flag: str, output: str | None, inputs: Iterable[str | None]) -> None:
    """Before the work: whether `output` can be written, and is nothing that the script reads.

    Args:
        inputs: files and folders that are read; names that are no paths (hub ids) do no harm.

    Raises:
        ToolError: it cannot, or is.
    """
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise ToolError(f"{flag} {output} is a folder: name a file")
    if not path.parent.is_dir():
        raise ToolError(f"{flag} {output} cannot be written: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ToolError(f"{flag} {output} cannot be written (permission denied): name a file in a folder of yours")
    for name in filter(None, inputs):
        if path.exists() and Path(name).exists() and path.resolve().is_relative_to(Path(name).resolve()):
            raise ToolError(f"{flag} {output} would overwrite what is read ({name}): name another file")


def is_url(name: str) -> bool:
    """Whether a judge is a server: everything else is a model on this machine."""
    return name.startswith(("http://", "https://"))


def modelscope_asked() -> bool:
    """Whether USE_MODELSCOPE_HUB says that models come from ModelScope."""
    return os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")


def run_tool(main: Callable[[], None], name: str) -> None:
    """Run a script's `main`. Whatever the user can put right ends it with one sentence and exit status 1.

    Ctrl+C ends it with 130. Faults of the program keep their traceback.
    """
    show_everything()
    clean_logging()
    try:
        main()
        sys.stdout.flush()  # what cannot be written is said here, not ignored at exit
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except PreferenceError as error:
        sys.exit(shown(f"{name}: {error}"))
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes there at exit
        sys.exit(shown(f"{name}: {of_the_system(error, '--output') or error}"))
