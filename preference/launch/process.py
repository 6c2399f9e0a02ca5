"""The life of one process of a run: who it is, what it says, and how it ends when others end or a signal comes.

The only place below the scripts that reads the environment: torchrun's variables, and two of torchrun/launch.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from preference.errors import PreferenceError, of_the_system
from preference.launch.heartbeat import tell_of_failure
from preference.launch.output import outlive_streams
from preference.screen import clean_logging, shown
from preference.terminal.console import terminal
from preference.terminal.failure import Failure, end_with

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
error_log: Path | None = None  # where a traceback goes
ELASTIC = "ORPO_ELASTIC" in os.environ  # set by torchrun/launch.py where nodes may come and go
STOP_FILE = Path(os.environ["ORPO_STOP_FILE"]) if "ORPO_STOP_FILE" in os.environ else None  # of torchrun/launch.py
LOST_TOUCH = ("onnection closed", "onnection reset", "roken pipe", "NCCL")  # said by a collective that another left
QUIET = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # bars of libraries, in the middle of our own lines
NO_PINGS = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


class LaunchError(PreferenceError, RuntimeError):
    """Processes that were not started as asked; str() says the command to type."""


def refuse_lone_process(environ: Mapping[str, str]) -> None:
    """accelerate launch without --multi_gpu starts one process where several were asked for, and says nothing.

    Raises:
        LaunchError: this is such a process.
    """
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one: add --multi_gpu (on a CPU too), or "
            "type torchrun --standalone --nproc_per_node N orpo_train.py"
        )


def run_script(main: Callable[[], None], name: str) -> None:
    """Run a training script's `main` as one process of a run, and end it with the exit code that its end deserves.

    Exit codes: 0 done as asked, 75 stopped by a signal with a checkpoint, anything else a failure.
    """
    outlive_streams()
    clean_logging()
    for variable in QUIET:
        os.environ.setdefault(variable, "1")
    begin_screen()
    try:
        refuse_lone_process(os.environ)
        main()
        if WORLD_SIZE > 1:
            end_process()
    except Exception as error:
        terminal.stop_bar()
        from preference.launch.signals import StoppedBySignal

        if isinstance(error, StoppedBySignal):
            leave_after_signal(error.step)
        tell_of_failure()
        let_the_cause_speak(error, name)
        explain(error, name)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Nothing that libraries make while they are imported is garbage: to look for it is a fifth of a start's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def begin_screen(lang: str = "auto") -> None:
    """How things are said, from the environment of this process; by the first of several alone."""
    terminal.silent = RANK != 0
    terminal.begin(os.environ, lang)


def log_errors_in(folder: Path) -> None:
    """From here on the traceback of an unexpected error goes to a file in `folder`, and what was left there goes."""
    global error_log
    error_log = folder / ("error.log" if RANK == 0 else f"error-rank{RANK}.log")
    error_log.unlink(missing_ok=True)


def explain(error: Exception, name: str) -> NoReturn:
    """Say what ended the run and end it: one sentence, in a box where there is a terminal.

    A fault of the program leaves its traceback with versions and the command line in error.log, or on standard error
    where there is no folder for it yet.
    """
    sentence = of_the_system(error, "output_dir and cache_dir")
    expected = sentence is not None or isinstance(error, PreferenceError)
    failure = Failure(name, "" if sentence else type(error).__name__, sentence or str(error),
                      getattr(error, "file", ""), getattr(error, "line", 0))  # fmt: skip
    if not expected:
        trace = shown("".join(traceback.format_exception(error)))
        if error_log is None or not _written(error_log, trace):
            sys.stderr.write(trace)
            sys.exit(1)
    end_with(failure, None if expected else error_log, os.environ)


def _written(path: Path, trace: str) -> bool:
    """Whether what a maintainer needs to know of an unexpected error is in the file now."""
    from preference.launch.agreement import versions

    told = [f"{n} {v}" for n, v in {"python": sys.version.split()[0], **versions()}.items()]
    lines = [
        f"command: {shlex.join([sys.executable, *sys.argv])}",
        f"versions: {', '.join(told)}",
        f"platform: {platform.platform()}",
        f"time: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        "",
        trace,
    ]
    try:
        path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return False
    return True


def say(text: str = "") -> None:
    """Print once, not once per process."""
    if RANK == 0:
        terminal.say(text)


def stay_private() -> None:
    """No usage pings unless the user has turned them on: the data may be medical."""
    for name in NO_PINGS:
        os.environ.setdefault(name, "1")


def leave_if_stopped() -> None:
    """torchrun/launch.py was told to stop while torchrun started its processes anew."""
    if STOP_FILE is not None and STOP_FILE.exists():
        sys.exit(0)


def leave_after_signal(step: int) -> None:
    """End with the code that says: start it again and it resumes.

    torchrun takes any code but 0 for a failure, and would start the processes anew; its launcher gives the code.
    """
    from preference.launch.signals import EXIT_STOPPED

    if ELASTIC and STOP_FILE is not None and not STOP_FILE.exists():  # torchrun's own SIGTERM: another node has come
        say("torchrun starts the processes anew" + ("; they resume from the checkpoint" if step else ""))
        sys.exit(1)
    if step:
        say(f"stopped by a signal; the same command resumes from the checkpoint of step {step}")
    else:
        say("stopped by a signal before a step was trained: there is nothing to resume; the same command starts again")
    if STOP_FILE is not None:
        STOP_FILE.touch()
    sys.exit(EXIT_STOPPED if STOP_FILE is None else 0)


def let_the_cause_speak(error: Exception, name: str) -> None:
    """Wait where another process has the same to say, or the reason why this one lost touch with it.

    torchrun ends this process meanwhile, so that the cause is shown once. If it is on another node a line says so.
    """
    if WORLD_SIZE == 1:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if any(words in str(error) for words in LOST_TOUCH):
        time.sleep(10)
        reason = str(error).splitlines()[0]
        sys.exit(f"{name}: rank {RANK} lost touch with another, whose output says why ({reason})")
    time.sleep(8 if LOCAL_RANK else 0)


def end_process() -> None:
    """End one process of several without Python's own last steps, in which a thread of gloo that still wants the
    interpreter aborts it (seen with FSDP2): torchrun would take the finished run for a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
