"""Kill trainings with SIGKILL at random moments, resume them, and compare the final weights to the bit.

    python tests/system/faults/harness.py --kills 200 --seed 1

A process imports everything once and forks a child per attempt, so that a kill costs a second rather than ten. Moments
are drawn in turn from: some time after the start ("loading"), some time after a step, a write, a rename or a deletion
began. After each kill every folder that has a checkpoint's name must be a good one.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "system" / "faults"), str(ROOT)]

PHASES = ("loading", "step", "writing", "manifest", "renaming", "deleting", "any")


class Attempt:
    """A training in a forked child, which writes its phases into a pipe."""

    def __init__(self, folder: Path) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            self._child(folder, write)
        os.close(write)
        os.set_blocking(read, False)
        self.pipe, self.seen = read, b""
        self.status: int | None = None

    def _child(self, folder: Path, write: int) -> None:
        code = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from train import train

            result = train(folder, lambda phase: os.write(write, phase.encode() + b"\n"))
            folder.with_suffix(".hash").write_text(result)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def phases(self) -> list[str]:
        while True:
            try:
                chunk = os.read(self.pipe, 4096)
            except BlockingIOError:
                break
            if not chunk:
                break
            self.seen += chunk
        return self.seen.decode().split()

    def kill_in(self, phase: str, nth: int, delay: float) -> bool:
        """SIGKILL `delay` seconds into the nth beginning of `phase`; False if the training ended before."""
        while not self.ended():
            phases = self.phases()
            if (len(phases) if phase == "any" else phases.count(phase)) >= nth:
                time.sleep(delay)
                break
            time.sleep(0.0005)
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = -signal.SIGKILL
            return True
        return False

    def wait(self) -> int:
        while not self.ended():
            time.sleep(0.01)
        return self.status

    def close(self) -> None:
        os.close(self.pipe)


def check_folders(folder: Path) -> None:
    from preference.integrity import fault
    from preference.train.checkpoints import checkpoint_folders

    for path in checkpoint_folders(folder):
        assert fault(path) is None, f"{path}: {fault(path)}"


def finish(folder: Path) -> str:
    attempt = Attempt(folder)
    status = attempt.wait()
    attempt.close()
    assert status == 0, folder.with_suffix(".log").read_text()[-3000:]
    return folder.with_suffix(".hash").read_text()


def differing(log: str, expected: list[str]) -> list[str]:
    """Lines "step N: HASH" of a log that the uninterrupted run has not, and where the run began anew."""
    return [line for line in log.splitlines() if line not in expected and line.startswith(("step ", "resuming"))]


def campaign(kills: int, seed: int, work: Path, report: Callable[[str], None] = print) -> Counter:
    """Kill `kills` times, over as many runs as it takes; every run ends with the weights of an uninterrupted one.

    Raises:
        AssertionError: a run that ended otherwise, or a folder with a checkpoint's name that is no good checkpoint.
    """
    import torch

    torch.set_num_threads(1)
    import train  # noqa: F401  imported before the forks
    from training import make_trainer  # noqa: F401

    gc.freeze()  # what was imported is not searched for garbage at the end of each training
    draw = random.Random(seed)
    whole = work / "whole"
    expected = finish(whole)
    steps = whole.with_suffix(".log").read_text().splitlines()
    shutil.rmtree(whole)
    done, runs = Counter(), 0
    while done.total() < kills:
        folder = work / f"run{runs}"
        runs += 1
        for _ in range(draw.randint(1, 6)):
            phase = PHASES[(done.total()) % len(PHASES)]
            nth = draw.randint(1, {"step": 6, "any": 40}.get(phase, 1 if phase == "loading" else 3))
            delay = draw.random() * {"loading": 0.4, "step": 0.03, "writing": 0.03, "any": 0.05}.get(phase, 0.004)
            attempt = Attempt(folder)
            killed = attempt.kill_in(phase, nth, delay)
            attempt.close()
            check_folders(folder)
            if not killed:
                assert attempt.status == 0, folder.with_suffix(".log").read_text()[-3000:]
                break
            done[phase] += 1
            if done.total() >= kills:
                break
        result = finish(folder)
        log = folder.with_suffix(".log").read_text()
        assert result == expected, f"run {runs} ended with other weights; seed {seed}\n{differing(log, steps)}\n{log}"
        check_folders(folder)
        shutil.rmtree(folder)
        report(f"{done.total()} kills, {runs} runs, all ended with the weights of the uninterrupted one")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        done = campaign(args.kills, args.seed, Path(work))
    print(f"{done.total()} kills in {time.monotonic() - began:.0f} s: {dict(done)}")


if __name__ == "__main__":
    main()
