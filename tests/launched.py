"""Runs that are started through a wrapper, as a user starts them, and their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import orpo_train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4000  # so many that a signal comes before the end
STARTED: list[subprocess.Popen] = []  # conftest.py ends what a failed test has left of them


FLAGS = ("--max_steps", str(STEPS), "--logging_steps", "1", "--use_cpu", "true", "--optim", "sgd")


def settings_of(folder: Path, output: Path) -> dict[str, str]:
    return {
        "model_name_or_path": str(folder / "model"), "cache_dir": str(folder / "cache"),
        "train_file_dir": str(folder / "rows.jsonl"), "output_dir": str(output), "use_peft": "false", "bf16": "false",
        "do_eval": "false", "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2",
    }  # fmt: skip


def alone(folder: Path, output: Path, *words: str, **settings: str) -> None:
    """What `launch` of run_orpo.sh would run, in this process."""
    values = {"template_name": "qwen"} | settings_of(folder, output) | settings
    given = [f"--{name}={value}" for name, value in values.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["orpo_train.py", *FLAGS, *words, "--defaults", *given])
        orpo_train.main()


def launch(
    folder: Path,
    output: Path,
    *words: str,
    script: str = "torchrun/run_single_node.sh",
    within: Sequence[str] = (),
    **settings: str,
) -> subprocess.Popen:
    """Start a run of the tiny model without evaluation; its process, whose output goes to output.log.

    Args:
        within: a command that runs the one behind it.
    """
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "2"}
    settings = own | settings_of(folder, output) | settings
    output.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".log").open("a") as log:
        command = [*within, "sh", str(ROOT / script), *FLAGS, *words]
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    STARTED.append(process)
    return process


def wait_for_step(output: Path, process: subprocess.Popen, step: int, timeout: float = 120) -> None:
    """Until the run has logged the step."""
    end = time.monotonic() + timeout
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        log = output.with_suffix(".log").read_text()
        assert process.poll() is None and time.monotonic() < end, log[-3000:]
        time.sleep(0.05)


def wait_for_log(output: Path, process: subprocess.Popen, text: str, times: int, timeout: float = 120) -> None:
    """Until the run's output holds `text` that often."""
    end, log = time.monotonic() + timeout, output.with_suffix(".log")
    while log.read_text().count(text) < times:
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)


def _parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return found


def below(launcher: int) -> list[int]:
    """All processes that `launcher` has started, directly or not."""
    parents = _parents()
    found, level = [], [launcher]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def workers(launcher: int) -> list[int]:
    """The training processes under `launcher`, by rank."""
    ranks = {}
    for pid in below(launcher):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"orpo_train.py") for word in words[:4]) and b"torchrun/launch.py" not in words:
            environment = dict(
                item.split(b"=", 1) for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in item
            )
            ranks.setdefault(int(environment[b"RANK"]), pid)  # loader workers come later, with the same words
    return [ranks[rank] for rank in sorted(ranks)]


def end_all() -> None:
    """Kill what is left of the runs that were started."""
    while STARTED:
        process = STARTED.pop()
        for pid in [process.pid, *below(process.pid)] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()
