"""chat.py as a program: its terminal, and its answers to a file of prompts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from talk import chat_with

import chat
from conversation import get_conv_template
from preference.screen import shown
from preference.serve.generation import Sampling, Turn
from preference.serve.terminal import Terminal

# ---- the terminal


class Told:
    """Stands for Models: remembers what it was asked."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.tuned = types.SimpleNamespace(
            fit=lambda turn: (turn, 0), stream=self.stream, sampling=Sampling(), template=None
        )

    def stream(self, turn: Turn, seed: int, within: object = None):
        self.turns.append(turn)
        yield "an"
        yield "swer\x1b[2J"

    def base(self):
        return types.SimpleNamespace(stream=lambda turn, seed, within: iter_closing(["untuned"])), None


def iter_closing(pieces: list[str]):
    yield from pieces


def test_commands(capsys: pytest.CaptureFixture) -> None:
    models = Told()
    terminal = Terminal(models, None, both=False)
    for line in ("Hi.", "//x", "/system Be brief.", "And?", "/bogus", "/reset", "/system", "Hi again."):
        terminal.handle(line)
    asked = [(turn.question, len(turn.history), turn.system) for turn in models.turns]
    assert asked == [("Hi.", 0, None), ("/x", 1, None), ("And?", 2, "Be brief."), ("Hi again.", 0, None)]
    assert models.turns[1].history[0][1] == "answer\x1b[2J"
    out = capsys.readouterr()
    assert "\x1b" not in out.out and "no command is called /bogus" in out.err


def test_both_sides(capsys: pytest.CaptureFixture) -> None:
    models = Told()
    terminal = Terminal(models, None, both=False)
    terminal.handle("/both Which?")
    shown = capsys.readouterr().out
    assert "untuned" in shown and "answer" in shown and "tuned" in shown and "\x1b" not in shown
    terminal.handle("Alone.")
    assert "untuned" not in capsys.readouterr().out
    terminal.handle("/both")
    terminal.handle("Again.")
    assert "untuned" in capsys.readouterr().out
    assert [answer for _, answer in terminal.history] == ["answer\x1b[2J"] * 3  # the tuned model's


def test_control_characters_are_made_visible() -> None:
    assert shown("a\n\tb\x1b[31m\x07\x7f\x9b 中🙂\u202e") == "a\n\tb␛[31m␇␡\\u009b 中🙂\\u202e"


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(run: Path, root: Path) -> None:
    command = [sys.executable, root / "chat.py", run, "--use_cpu", "--max_new_tokens", "1900", "--temperature", "0"]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = b""

    def wait_for(mark: bytes, nudge: Callable[[], None] = lambda: None) -> None:
        """Read up to `mark`, for two minutes at most, with a `nudge` every second."""
        nonlocal seen
        start = last = time.monotonic()
        while mark not in seen and last < start + 120:
            if select.select([controller], [], [], 0.2)[0]:
                seen += os.read(controller, 4096)
            if time.monotonic() > last + 1:
                last = time.monotonic()
                nudge()
        assert mark in seen, seen.decode(errors="replace")
        seen = seen[seen.index(mark) + len(mark) :]

    def interrupt_the_answer() -> None:
        """Again if it had not begun; ask again if it has ended, some seconds later."""
        if seen.endswith(b"> "):
            os.write(controller, b"Hi.\n")
        else:
            process.send_signal(signal.SIGINT)

    try:
        wait_for(b"> ")
        os.write(controller, b"/both\n")
        wait_for(b"side by side")
        os.write(controller, b"Hi.\n")
        wait_for(b"(stopped)", nudge=interrupt_the_answer)
        wait_for(b"> ")
        os.write(controller, b"/system x\n")
        # again if a late interrupt took the line
        wait_for(b"system text set", nudge=lambda: os.write(controller, b"/system x\n"))
        wait_for(b"> ")  # an interrupt before the prompt is there ends the command instead
        # again if it fell between the prompt and the wait for a key: it is then seen with the next key or interrupt
        wait_for(b"Ctrl-D or /quit", nudge=lambda: process.send_signal(signal.SIGINT))
        wait_for(b"> ")
        for _ in range(60):  # again if it came before the prompt read keys
            os.write(controller, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(controller)


def test_help_loads_nothing_heavy(root: Path) -> None:
    code = "import sys, chat, export_model; chat.parse_arguments(['x']); assert not {'torch', 'peft'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# ---- a file of prompts


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
    chat.main()


def test_prompts_of_a_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": " Hi. ", "id": 7},
        {"question": "And?", "history": [["Hi.", "Hello."]], "system": "Be brief.", "response_chosen": "x"},
        {"prompt": get_conv_template("qwen").get_prompt("Hi.")},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
    words = ["--prompts", source, "--output", out, "--max_new_tokens", 16, "--batch_size", 2, "--both", "--use_cpu"]
    run_main(monkeypatch, run, *words)
    answered = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("answer", "base_answer")} for row in answered] == rows
    talk = chat_with(run, Sampling(temperature=0, max_new_tokens=16))
    turns = [Turn("Hi."), Turn("And?", (("Hi.", "Hello."),), "Be brief."), Turn("Hi.")]
    assert [row["answer"] for row in answered] == [talk.answers([turn], 0)[0] for turn in turns]
    assert [row["base_answer"] for row in answered] == [
        talk.answers([turn], 0, talk.model.disable_adapter)[0] for turn in turns
    ]


def test_plain_lines_are_questions(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("Hi.\n\n感冒？\n", encoding="utf-8")
    run_main(monkeypatch, run, "--prompts", source, "--max_new_tokens", 4, "--use_cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["Hi.", "感冒？"]


@pytest.mark.parametrize(
    "content, message",
    [("", "holds no prompt"), ('{"question": 3}', ":1: a row needs"), ('{"question": "x"}\n{"q', ":2: not JSON")],
)
def test_faults_of_a_prompt_file_show_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(SystemExit, match=message):
        run_main(monkeypatch, "nowhere", "--prompts", source)


def test_the_prompts_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.txt"
    source.write_text("Hi.\n")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "nowhere", "--prompts", source, "--output", source)
    assert source.read_text() == "Hi.\n"
