"""chat.py as a program: its terminal, and its answers to a file of prompts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from talk import chat_with

import chat
from conversation import get_conv_template
from preference.data.report import DataReport
from preference.data.rows import load_rows
from preference.screen import shown
from preference.serve.collect import CollectError, Collector
from preference.serve.drawing import Growing, finished_blocks
from preference.serve.generation import Sampling, Turn
from preference.serve.talk import TalkError
from preference.serve.terminal import Terminal

# ---- the terminal


class Speaker:
    """Stands for a Chat: answers with the next of `texts`, cut or not, and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.turns, self.cut, self.sampling = [*texts], [], False, Sampling()

    def fit(self, turn: Turn) -> tuple[Turn, int]:
        return turn, 0

    def resample(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def stream(self, turn: Turn, seed: int, within: object = None):
        self.turns.append((turn, seed))
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        yield text[:2]
        yield text[2:]


class Told:
    """Stands for Models."""

    def __init__(self, *texts: str, name: str = "one") -> None:
        self.tuned, self.name = Speaker(*(texts or ["answer\x1b[2J"])), name
        self.resample = self.tuned.resample

    @property
    def turns(self) -> list[Turn]:
        return [turn for turn, _ in self.tuned.turns]

    def base(self):
        return Speaker("untuned"), nullcontext


def terminal_of(models: Told, folder: Path, **options: object) -> Terminal:
    return Terminal(models, None, False, Collector(folder), **options)


def kept(terminal: Terminal) -> list[str]:
    return [exchange.kept.text for exchange in terminal.talk.exchanges]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = Told()
    terminal = terminal_of(models, tmp_path)
    for line in ("Hi.", "//x", "/system Be brief.", "And?", "/bogus", "/reset", "/system", "Hi again.", "/reset now"):
        terminal.handle(line)
    asked = [(turn.question, len(turn.history), turn.system) for turn in models.turns]
    assert asked == [("Hi.", 0, None), ("/x", 1, None), ("And?", 2, "Be brief."), ("Hi again.", 0, None)]
    assert models.turns[1].history[0][1] == "answer\x1b[2J"
    out = capsys.readouterr()
    assert "\x1b" not in out.out and "no command is called /bogus" in out.err and "called /reset now" in out.err


def test_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = Told()
    terminal = terminal_of(models, tmp_path)
    terminal.handle("/both Which?")
    shown = capsys.readouterr().out
    assert "untuned" in shown and "answer" in shown and "2 tuned" in shown and "\x1b" not in shown
    terminal.handle("Alone.")
    assert "untuned" not in capsys.readouterr().out
    terminal.handle("/both")
    terminal.handle("Again.")
    assert "untuned" in capsys.readouterr().out
    assert kept(terminal) == ["answer\x1b[2J"] * 3  # the tuned model's


def test_regen_edit_and_temp(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = Told("first", "second", "third")
    terminal = terminal_of(models, tmp_path)
    for line in ("Hi.", "/temp 1.25", "/regen", "/edit Hello?", "So?"):
        terminal.handle(line)
    asked = [(turn.question, turn.history) for turn in models.turns]
    assert asked == [("Hi.", ()), ("Hi.", ()), ("Hello?", ()), ("So?", (("Hello?", "third"),))]
    assert len({seed for _, seed in models.tuned.turns}) == 4 and models.tuned.sampling.temperature == 1.25
    for line, message in (("/temp warm", "0"), ("/temp -1", "0"), ("/temp nan", "0"), ("/better 3", "regen")):
        with pytest.raises(TalkError, match=message):
            terminal.handle(line)
    terminal.handle("/temp 0")
    capsys.readouterr()
    terminal.handle("/regen")
    assert "will be the same" in capsys.readouterr().err
    with pytest.raises(TalkError, match="nothing was asked"):
        terminal_of(models, tmp_path).handle("/regen")


def test_two_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = Told("left"), Told("right", name="two")
    terminal = terminal_of(one, tmp_path, rival=two)
    for line in ("Hi.", "/better 2", "And?"):
        terminal.handle(line)
    shown = capsys.readouterr().out
    assert "1 one" in shown and "2 two" in shown and "left" in shown and "right" in shown
    assert one.turns == two.turns and one.turns[1].history == (("Hi.", "right"),)  # it goes on with the better one
    assert kept(terminal) == ["right", "left"]
    with pytest.raises(TalkError, match="two models answer already"):
        terminal.handle("/both")


def test_what_is_collected_is_what_training_reads(tmp_path: Path) -> None:
    """Pairs by /better, by /good and /bad of one question; single answers for loss=kto."""
    terminal = terminal_of(Told("old", "new", "Apple.", "Soil.", "Pear."), tmp_path)
    for line in ("Hi.", "/regen", "/better 1", "/better 1", "/system Be brief.", "Juice?", "/good", "/good"):
        terminal.handle(line)
    for line in ("/regen", "/bad", "/regen", "/good"):
        terminal.handle(line)
    report = DataReport()
    rows = load_rows([tmp_path / "pairs"], report)
    found = [(row.question, row.history, row.system, row.chosen, row.rejected) for row in rows]
    juice = ("Juice?", (("Hi.", "old"),), "Be brief.")
    assert found == [("Hi.", (), None, "old", "new"), (*juice, "Apple.", "Soil."), (*juice, "Pear.", "Soil.")]
    assert not report.dropped
    labels = [(row["question"], row["response"], row["label"]) for row in rows_of(tmp_path / "labels" / "chat.jsonl")]
    assert labels == [("Juice?", "Apple.", True), ("Juice?", "Soil.", False), ("Juice?", "Pear.", True)]
    with pytest.raises(CollectError, match="called good before"):
        terminal.handle("/bad")


def test_what_teaches_nothing_or_wrongly_is_not_collected(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="NUL"):
        Collector(tmp_path).better(Turn("Hi."), "yes", "n\0")
    models = Told("same", "same", "", "cut off")
    terminal = terminal_of(models, tmp_path)
    for line in ("Hi.", "/regen"):
        terminal.handle(line)
    with pytest.raises(CollectError, match="are the same"):
        terminal.handle("/better 2")
    terminal.handle("/regen")
    with pytest.raises(CollectError, match="empty"):
        terminal.handle("/good")
    models.tuned.cut = True
    terminal.handle("/regen")
    for line in ("/good", "/better 2"):
        with pytest.raises(CollectError, match="cut|empty"):
            terminal.handle(line)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_what_could_not_be_written_can_be_judged_again(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    collector = Collector(tmp_path / "here")
    with pytest.raises(CollectError, match="cannot be written .*--collect"):
        collector.label(Turn("Hi."), "yes", good=True)
    (tmp_path / "here").unlink()
    assert "written to" in collector.label(Turn("Hi."), "yes", good=True)


def test_a_line_that_a_crash_has_cut_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "pairs" / "chat.jsonl"
    path.parent.mkdir()
    path.write_text('{"question": "Hi')
    Collector(tmp_path).better(Turn("Hi."), "yes", "no")
    assert len(path.read_text().splitlines()) == 2 and json.loads(path.read_text().splitlines()[1])


def test_a_conversation_is_saved_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    terminal = terminal_of(Told("**bold**"), tmp_path)
    for line in ("/system Be brief.", "Hi.", f"/save {tmp_path / 'a.json'}", f"/save {tmp_path / 'a.md'}"):
        terminal.handle(line)
    messages = json.loads((tmp_path / "a.json").read_text())
    assert [message["content"] for message in messages] == ["Be brief.", "Hi.", "**bold**"]
    assert (tmp_path / "a.md").read_text().endswith("**assistant**\n\n**bold**\n")
    for name, message in (("a.md", "there already"), ("no/a.md", "cannot be written")):
        with pytest.raises(TalkError, match=message):
            terminal.handle(f"/save {tmp_path / name}")


def test_answers_grow_as_markdown() -> None:
    """Whole blocks are printed once, an open fence is not cut at its blank lines, nothing acts on the terminal."""
    text = "# Title\n\nSome **bold** and [a](http://x.y)\x1b[2J\n\n```python\nx = 1\n\ny = 2\n```\n\n- one\n- two"
    assert text[finished_blocks(text) :] == "- one\n- two"
    open_fence = text[: text.index("y = 2")]
    assert open_fence[finished_blocks(open_fence) :].startswith("```python")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    with Growing(console) as growing:
        for start in range(0, len(text), 7):
            growing.feed(text[start : start + 7])
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()]
    assert "x = 1" in lines and any("• two" in line for line in lines) and "␛[2J" in out.getvalue()
    assert "**" not in lines[-8:] and "http://x.y" in out.getvalue() and "\x1b]8" not in out.getvalue()


def test_control_characters_are_made_visible() -> None:
    assert shown("a\n\tb\x1b[31m\x07\x7f\x9b 中🙂\u202e") == "a\n\tb␛[31m␇␡\\u009b 中🙂\\u202e"


PROMPT, ANSWERING = b"\x1b[?2004h", b"\x1b[?2004l"  # bracketed paste is on while a line is typed


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(run: Path, root: Path) -> None:
    command = [sys.executable, root / "chat.py", run, "--use_cpu", "--max_new_tokens", "1900", "--temperature", "0"]
    controller, terminal = pty.openpty()
    environment = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color"}  # nobody answers here
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, env=environment
    )
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
        if seen.rfind(PROMPT) > seen.rfind(ANSWERING):
            os.write(controller, b"Hi.\n")
        else:
            process.send_signal(signal.SIGINT)

    try:
        wait_for(PROMPT)
        os.write(controller, b"/both\n")
        wait_for(b"side by side")
        os.write(controller, b"Hi.\n")
        wait_for(b"(stopped)", nudge=interrupt_the_answer)
        wait_for(PROMPT)
        os.write(controller, b"/temp 0.5\n")
        wait_for(b"temperature 0.5")
        wait_for(PROMPT)
        os.write(controller, b"\x1b[A\n")  # the line before, by the arrow up
        wait_for(b"temperature 0.5")
        wait_for(PROMPT)
        os.write(controller, b"/system x\n")
        # again if a late interrupt took the line
        wait_for(b"system text set", nudge=lambda: os.write(controller, b"/system x\n"))
        wait_for(PROMPT)  # an interrupt before the prompt is there ends the command instead
        # again if it fell between the prompt and the wait for a key: it is then seen with the next key or interrupt
        wait_for(b"Ctrl-D or /quit", nudge=lambda: process.send_signal(signal.SIGINT))
        wait_for(PROMPT)
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
    assert [cut for _, cut in talk.draw([Turn("Hi.")], 0)] == [True]  # 16 tokens end no answer of a random model
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
