"""Kills and flipped bits, a few of each; docs/reliability.md has the commands for many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "faults" / "harness.py"


@pytest.mark.slow
def test_ten_kills() -> None:
    """In a process of its own: it forks, which a process with threads must not."""
    command = [sys.executable, str(HARNESS), "--kills", "10", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("10 kills in ")
    kinds = json.loads(last.partition(": ")[2].replace("'", '"'))
    assert sum(kinds.values()) == 10 and len(kinds) >= 4


@pytest.mark.slow
def test_two_hundred_flipped_bits() -> None:
    command = [sys.executable, str(HARNESS.with_name("flips.py")), "--flips", "200", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip().splitlines()[-1].startswith("200 flips in ") and "silent: 0" in done.stdout
