"""chat.py --web: the page that gradio makes, in a real browser. Without either, its tests are skipped and say so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Browser
from tuned import make_base, write_run_files

import chat
from docs.screenshots import find_chromium
from preference.serve.collect import CollectError, Collector
from preference.serve.generation import Turn
from preference.serve.models import Models
from preference.serve.page import HOST, TUNED, UNTUNED, Judged, said
from tiny import tiny_model

WORDS = ["--use_cpu", "--temperature", "0", "--max_new_tokens", "300"]
BOTH = "document.querySelector('input[type=checkbox]').click()"
SAID = "[...document.querySelectorAll('[data-testid=bot]')].map(bot => bot.ariaLabel.replace(/^.*?message: /s, ''))"
IDLE = "!!document.querySelector('.submit-button') && !document.querySelector('textarea').disabled"

in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="no gradio here: pip install -r requirements-dev.txt"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(seed=5).save_pretrained(folder / "run")
    write_run_files(folder / "run", str(make_base(folder / "base")))
    return folder / "run"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(
    run: Path, outside: tuple[socket.socket, dict[str, str]], tmp_path_factory: pytest.TempPathFactory, root: Path
) -> Iterator[str]:
    """The page's address, as the program says it. The environment asks for all that the page must not do."""
    unwanted = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"} | outside[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB", "GRADIO"))}
    command = [
        sys.executable,
        root / "chat.py",
        run,
        "--collect",
        run.parent / "collected",
        "--web",
        "--port",
        str(free_port()),
        *WORDS,
    ]
    log = tmp_path_factory.mktemp("page") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=log.parent, stdout=out, stderr=out, env=environment | unwanted)
    try:
        end = time.monotonic() + 180
        while "open http" not in (text := log.read_text()):
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.2)
        yield text.partition("open ")[2].split()[0]
    finally:
        process.terminate()
        process.wait()


def ask(browser: Browser, question: str) -> None:
    browser.wait(IDLE)
    browser.evaluate("document.querySelector('textarea').focus()")
    browser.type(question)
    browser.press("Enter")


def write_system_text(browser: Browser, text: str) -> None:
    browser.wait(IDLE)
    browser.evaluate("document.querySelectorAll('textarea')[1].select()")
    browser.type(text)


def answers(browser: Browser, expected: list[str]) -> list[list[str]]:
    """Wait until the page shows `expected`; returns what it showed on the way."""
    seen: list[list[str]] = []
    end = time.monotonic() + 120
    while not seen or seen[-1] != expected:
        assert time.monotonic() < end, f"{seen[-1:]} instead of {expected}"
        if (now := browser.evaluate(SAID)) not in seen[-1:]:
            seen.append(now)
        time.sleep(0.02)
    return seen


class TestInABrowser:
    pytestmark = in_browser

    def test_it_answers_as_the_terminal_does(
        self, address: str, outside: tuple[socket.socket, dict[str, str]], run: Path, tmp_path: Path
    ) -> None:
        models = Models(chat.parse_arguments([str(run), *WORDS]))
        tuned, (base, _) = models.tuned, models.base()
        first = tuned.answers([Turn("Hi.")], 0)[0]
        turn = Turn("And juice?", (("Hi.", first),), "Be brief.")
        second = [base.answers([turn], 0)[0], tuned.answers([turn], 0)[0]]
        third = tuned.answers([Turn("So?", (*turn.history, (turn.question, second[1])), "Be brief.")], 0)[0]
        assert len({first, *second, third}) == 4
        with Browser(address, tmp_path / "profile") as browser:
            ask(browser, "Hi.")
            assert len(answers(browser, [first])) > 3  # pieces, as they are written
            write_system_text(browser, "Be brief.")
            browser.evaluate(BOTH)
            Path(models.source.base).rename(tmp_path / "base")
            ask(browser, "Lost?")  # a question without an answer is not part of the history
            browser.wait("document.body.innerText.includes('--base_model')")
            (tmp_path / "base").rename(models.source.base)
            ask(browser, "And juice?")
            answers(browser, [first, *second])
            assert all(title in browser.evaluate("document.body.innerText") for title in (UNTUNED, TUNED))
            browser.evaluate(BOTH)
            ask(browser, "So?")  # of the answers before tuning nothing is sent
            answers(browser, [first, *second, third])
            self.judge(browser, run.parent / "collected", third)
            browser.evaluate("document.querySelector('[aria-label=Clear]').click()")
            browser.wait(f"!{SAID}.length")
            write_system_text(browser, "")
            ask(browser, "Hi.")
            answers(browser, [first])
            assert not browser.errors and browser.hosts == {HOST}
        with pytest.raises(BlockingIOError):  # nothing left this machine
            outside[0].accept()

    def judge(self, browser: Browser, folder: Path, last: str) -> None:
        """The buttons go where the terminal's /good and /bad go, and so do their refusals."""
        click = "[...document.querySelectorAll('button')].find(button => button.innerText.trim() == '{0}').click()"
        browser.wait(IDLE)
        browser.evaluate(click.format("good"))
        browser.wait("document.body.innerText.includes('this answer was cut')")  # 300 tokens end none of this model's
        browser.evaluate(click.format("bad"))
        browser.wait("document.body.innerText.includes('for loss=kto')")
        row = json.loads((folder / "labels" / "chat.jsonl").read_text())
        assert (row["system"], row["question"], row["response"], row["label"]) == ("Be brief.", "So?", last, False)

    def test_nothing_is_fetched_from_elsewhere(self, address: str, tmp_path: Path) -> None:
        with Browser(address, tmp_path) as browser:
            ask(browser, '![x](http://one.invalid/x.png) <img src="http://two.invalid/x.png">')
            browser.wait("document.querySelectorAll('[data-testid=user] img').length == 2")
            browser.wait(IDLE)
            assert browser.hosts == {HOST}
            assert sum("Content Security Policy" in error for error in browser.errors) == len(browser.errors) == 2

    def test_an_answer_can_be_stopped(self, address: str, run: Path, tmp_path: Path) -> None:
        whole = Models(chat.parse_arguments([str(run), *WORDS])).tuned.answers([Turn("Hi.")], 0)[0]
        with Browser(address, tmp_path) as browser:
            ask(browser, "Hi.")
            browser.wait(f"!!document.querySelector('.stop-button') && {SAID}.length")
            browser.evaluate("document.querySelector('.stop-button').click()")
            browser.wait(IDLE)
            assert 0 < len(browser.evaluate(SAID)[0]) < len(whole)

    def test_no_other_machine_can_open_it(self, address: str) -> None:
        port = int(address.rpartition(":")[2])
        socket.create_connection((HOST, port), timeout=5).close()
        with pytest.raises(
            ConnectionRefusedError
        ):  # another address of this machine, where one that listens on all would answer
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_what_is_missing_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["chat.py", "nowhere", "--web", "--port", str(port)])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install gradio"):
            chat.main()
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        with pytest.raises(SystemExit, match=f"port {port} cannot be used .*--port"):
            chat.main()


def test_the_history_is_what_the_tuned_model_answered() -> None:
    def message(role: str, content: object, title: str | None = None) -> dict:
        return {"role": role, "content": content, "metadata": {"title": title}}

    messages = [
        message("user", "Hi."),
        message("assistant", [{"type": "text", "text": " Hel"}, {"type": "text", "text": "lo."}]),
        message("user", "Failed?"),
        message("user", "And juice?"),
        message("assistant", "Water.", UNTUNED),
        message("assistant", "Apple.", TUNED),
        message("user", "Stopped?"),
        message("assistant", "Water", UNTUNED),
    ]
    assert said(messages) == (("Hi.", "Hello."), ("And juice?", "Apple."))


def test_what_is_thought_of_the_last_answers(tmp_path: Path) -> None:
    def message(role: str, content: str) -> dict:
        return {"role": role, "content": content}

    judged = Judged(Collector(tmp_path))
    turn = Turn("And juice?", (("Hi.", "Hello."),), "Be brief.")
    for answer in ("Water.", "Apple."):
        judged.remember(turn, answer, cut=False)
    messages = [message("user", "Hi."), message("assistant", "Hello."), message("user", "And juice?")]
    both = [*messages, message("assistant", "Water."), message("assistant", " Apple. ")]
    judged.judge(both, "2")
    asked = {"system": "Be brief.", "history": [["Hi.", "Hello."]], "question": "And juice?"}
    row = json.loads((tmp_path / "pairs" / "chat.jsonl").read_text())
    assert row == asked | {"response_chosen": "Apple.", "response_rejected": "Water."}
    judged.judge(both, "bad", first=True)
    row = json.loads((tmp_path / "labels" / "chat.jsonl").read_text())
    assert row == asked | {"response": "Water.", "label": False}
    for said_so_far, what, message_of in (
        (messages[:2], "good", "before the page was started"),
        (both[:-1], "1", "one answer alone"),
        (messages, "good", "no answer"),
        ([], "2", "no answer"),
    ):
        with pytest.raises(CollectError, match=message_of):
            judged.judge(said_so_far, what)
