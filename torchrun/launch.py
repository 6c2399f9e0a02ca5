"""torchrun whose processes can finish their step and save: `python -m torch.distributed.run` with other signals.

torchrun answers SIGTERM by ending its processes after 30 seconds, knows nothing of SIGUSR1, and its exit code does not
tell a stopped run from a failed one. Here a first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is handed on to the processes,
which have the time that a step and a checkpoint take; a second one ends them. Exit codes: 0 finished, 75 stopped by a
signal with a checkpoint (start it again and it resumes), anything else a failure. run_orpo.sh calls this.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from meeting import MeetingError, meet, settings

from preference.launch.signals import ECHO, EXIT_STOPPED, SIGNALS, outlives_terminal

SIGNALS_OF_TORCHRUN = "SIGQUIT"


def children() -> list[int]:
    """Processes that this one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(path.parent.name))
    return found


class Relay:
    """Hands the first signal on; lets torchrun act on the second."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.at: float | None = None

    def install(self) -> None:
        for number in SIGNALS:
            if not outlives_terminal(number):
                signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.at is not None:
            if time.monotonic() - self.at > ECHO:
                raise SignalException("second signal", signal.Signals(number))
            return
        self.at = time.monotonic()
        self.stop_file.touch()  # processes that torchrun is about to start leave at once
        for process in children():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        if "ORPO_ELASTIC" in os.environ:  # the other nodes train on; torchrun would wait five minutes for their end
            threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        while children():
            time.sleep(0.5)
        os._exit(EXIT_STOPPED)


def main() -> int:
    nodes = settings(sys.argv[1:])
    try:
        store = nodes and meet(nodes)  # noqa: F841  torchrun finds it open
    except MeetingError as error:
        print(f"torchrun: {error}", file=sys.stderr)
        return 1
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS_OF_TORCHRUN  # older ones have no flag for it
    if any(before == "--nnodes" and ":" in word for before, word in zip(sys.argv, sys.argv[1:], strict=False)):
        os.environ["ORPO_ELASTIC"] = "1"
    # Otherwise the processes of a restart find in the store what the dead ones had left (torch 2.13), and wait for them
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    folder = tempfile.TemporaryDirectory(prefix="orpo-stop-")
    stop_file = Path(folder.name) / "stop"
    os.environ["ORPO_STOP_FILE"] = str(stop_file)
    relay = Relay(stop_file)
    relay.install()

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

    named = ["--signals_to_handle", SIGNALS_OF_TORCHRUN] if hasattr(LaunchConfig, "signals_to_handle") else []
    try:
        run.main([*named, *sys.argv[1:]])
    except ChildFailedError as failed:  # the process has shown its traceback; torchrun's own would hide it
        rank, failure = failed.get_first_failure()
        if relay.at is not None and -failure.exitcode in SIGNALS:  # it came before training: nothing was lost
            return EXIT_STOPPED
        print(f"torchrun: rank {rank} ended first, with {describe(failure.exitcode)}; the others were ended",
              file=sys.stderr)  # fmt: skip
        return 1
    except SignalException:
        print("torchrun: stopped at once by a second signal; the last checkpoint stands", file=sys.stderr)
        return 1
    return EXIT_STOPPED if stop_file.exists() else 0


def describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
