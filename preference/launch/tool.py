"""The life of a script that is no training run: chat, export, examination, conversion."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from preference.errors import PreferenceError, of_the_system
from preference.screen import shown


def run_tool(main: Callable[[], None], name: str) -> None:
    """Run a script's `main`. Whatever the user can put right ends it with one sentence and exit status 1.

    Ctrl+C ends it with 130. Faults of the program keep their traceback.
    """
    try:
        main()
        sys.stdout.flush()  # what cannot be written is said here, not ignored at exit
    except KeyboardInterrupt:
        sys.exit(130)
    except PreferenceError as error:
        sys.exit(shown(f"{name}: {error}"))
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes there at exit
        sys.exit(shown(f"{name}: {of_the_system(error, '--output') or error}"))
