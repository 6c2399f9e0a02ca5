"""An exported folder takes its place in one step, and what a killed export left is cleared by the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preference.serve import placing


def folder(path: Path, word: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(word)
    return path


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_one_replaces_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    output = folder(tmp_path / "out", "old")
    work = placing.workspace(output)
    (work / "config.json").write_text("new")
    placing.move_into_place(work, output)
    assert (output / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_a_second_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    output = folder(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        placing.move_into_place(tmp_path / "gone", output)
    assert (output / "config.json").read_text() == "old"


def test_leftovers_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = folder(tmp_path / f".out.part-{gone.pid}-x", "half")
    running = folder(tmp_path / f".out.part-{os.getpid()}-y", "half")
    other = folder(tmp_path / f".out2.part-{gone.pid}-x", "half")
    work = placing.workspace(tmp_path / "out")
    assert not left.exists() and running.exists() and other.exists() and work.parent == tmp_path
