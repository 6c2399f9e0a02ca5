"""A run's words and its terminal never end it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preference.errors import of_the_system
from preference.files import JsonLines, read_lines
from preference.launch.process import run_script

TALK = """
import sys
from preference.launch.output import outlive_streams
outlive_streams()
for i in range(2000):
    print("\\u27e6step\\u27e7", i, flush=True)
sys.exit(3)
"""


def talk(root: Path, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", TALK], cwd=root, stderr=subprocess.PIPE, **options)


def test_a_closed_pipe_ends_nothing_and_is_said_once(root):
    process = talk(root, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(60) == 3 and said == "stdout is gone (Broken pipe): the run does without it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_ends_nothing(root):
    with open("/dev/full", "wb") as full:
        process = talk(root, stdout=full)
    assert b"stdout is gone (No space left on device)" in process.stderr.read() and process.wait(60) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_a_terminal_without_a_character_gets_an_escape(root, encoding):
    process = talk(root, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert process.stdout.readline() == b"\\u27e6step\\u27e7 0\n"
    process.stdout.read()
    assert process.wait(60) == 3 and process.stderr.read() == b""


def test_a_full_disk_under_a_log_is_said_once_and_later_records_are_whole(tmp_path, caplog, monkeypatch):
    lines = JsonLines(tmp_path, "metrics.jsonl")
    lines.begin(lambda record: True)
    lines.append({"step": 1})
    with monkeypatch.context() as patch:

        def full(self, *args, **kwargs):
            with open(self, "a") as file:
                file.write('{"step"')
            raise OSError(28, "No space left on device")

        patch.setattr(Path, "open", full)
        lines.append({"step": 2})
        lines.append({"step": 3})
    lines.append({"step": 4})
    assert read_lines(lines.path) == [{"step": 1}, {"step": 4}]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl cannot be written (No space left on device)" in warning


REFUSED = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EFBIG, errno.ENOENT)


@pytest.mark.parametrize("code", REFUSED)
def test_what_the_system_refuses_is_one_sentence(code, capsys):
    def main() -> None:
        raise OSError(code, os.strerror(code), "/data/cache")

    with pytest.raises(SystemExit) as end:
        run_script(main, "orpo_train.py")
    assert str(end.value).startswith(f"orpo_train.py: {os.strerror(code)} (/data/cache): ")
    assert "output_dir" in str(end.value) or code in (errno.ENAMETOOLONG, errno.ENOENT)
    assert of_the_system(ValueError("x"), "--output") is None and of_the_system(OSError("no model"), "--output") is None
