"""What comes from data, names and models cannot act on a terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preference.errors import PreferenceError
from preference.launch import process, tool
from preference.screen import Shown, shown

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202eabc\u2066\udc80"


def test_every_character_that_acts_is_replaced_and_no_other() -> None:
    assert shown(HOSTILE) == "␛]0;owned␇␛[2J\\u009b31m␡\\u202eabc\\u2066\\udc80"
    text = "Zeile\n\tTab é 中文 🙂 👩\u200d⚕️ \u200fשלום"
    assert shown(text) == text
    acting = {chr(i) for i in range(0x10000) if shown(chr(i)) != chr(i)}
    assert acting == {*map(chr, [*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)]),
                      *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}  # fmt: skip


@pytest.mark.parametrize("kind, kept", [(PreferenceError, ""), (RuntimeError, "Traceback")])
def test_what_a_run_says_and_ends_with(
    kind: type[Exception], kept: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "error_log", None)  # as before a run has a folder

    def main() -> None:
        process.say(HOSTILE)
        raise kind(HOSTILE)

    with pytest.raises(SystemExit) as end:
        process.run_script(main, "orpo_train.py")
    out, err = capsys.readouterr()
    said = f"{out}{err}{end.value.code}"
    assert "owned" in said and not {"\x1b", "\x07", "\x9b", "\x7f", "\u202e"} & set(said)
    assert kept in err


def test_log_records_are_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "row %s", (HOSTILE,), None)
    assert Shown().filter(record) and "\x1b" not in record.getMessage()


@pytest.mark.parametrize("run", [process.run_script, tool.run_tool])
def test_a_kernel_that_nobody_needs_is_not_asked_for(
    run: Callable[[Callable[[], None], str], None], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes says on every CPU that a kernel of a package that is not there was not found; errors are heard."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)  # whatever a test before has set
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def main() -> None:
        logger.warning("Failed to load CPU gemm_4bit_forward")
        logger.error("broken library")

    run(main, "x.py")
    assert capsys.readouterr().err == "broken library\n"


EACH = """
import gc, json, os, runpy, sys
gc.disable()
import preference.serve.models, preference.report.results, preference.train.setup  # once for all of them
gc.freeze()
for script, *words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    print("ended:", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_hostile_name_on_the_command_line(root: Path, tmp_path: Path) -> None:
    name = HOSTILE[:-1]
    commands = {
        "orpo_train.py": ["--train_file_dir", name], "chat.py": [name], "export_model.py": [name, "--output", "o"],
    }  # fmt: skip
    words = json.dumps([[str(root / script), *rest] for script, rest in commands.items()])
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", EACH, words], cwd=tmp_path, env=environment, capture_output=True, timeout=600
    )
    assert b"\x1b" not in done.stdout + done.stderr and b"\x07" not in done.stderr
    assert done.stdout.count(b"ended: 1\n") == len(commands), done
    said = done.stderr.decode()
    assert all(f"{script}: " in said for script in commands) and said.count("owned") >= len(commands), said
