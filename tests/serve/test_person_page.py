"""The page on which a person labels answers: who may ask and judge, what becomes of a verdict, and a real browser."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

import make_pairs
from docs.screenshots import find_chromium
from preference.serve.generation import Turn
from preference.serve.person_page import PersonPage, PersonPageError

HOSTILE = '<img src=x onerror="document.title=1">'
ASKED = Turn("Which one?", (("Hi.", "Hello."),), "Be brief.")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def page() -> Iterator[PersonPage]:
    made = PersonPage(0)
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(page: PersonPage, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server.server_address[1], timeout=20)
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request(method, path, text if body is not None else None, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


class Scoring(threading.Thread):
    """`page.scores` of a question, waiting for its verdict."""

    def __init__(self, page: PersonPage, *answers: str) -> None:
        super().__init__(daemon=True)
        self.page, self.answers, self.found = page, answers, None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.page.scores(ASKED, self.answers)
        except KeyboardInterrupt:
            self.found = "stopped"

    def result(self) -> object:
        self.join(20)
        assert not self.is_alive()
        return self.found


def question(page: PersonPage) -> dict[str, Any]:
    """The one that waits, or comes next."""
    return json.loads(ask(page, "GET", f"/question?after={page.number - (page.question is not None)}")[1])


def test_verdicts_become_scores(page: PersonPage) -> None:
    waiting = Scoring(page, "one", "two", "three")
    told = question(page)
    n = {"number": told["number"]}
    assert told["answers"] == ["one", "two", "three"]
    assert told["asked"] == [["system", "Be brief."], ["user", "Hi."], ["assistant", "Hello."], ["user", "Which one?"]]
    for wrong in (
        {"number": n["number"] + 1, "best": 0, "worst": 1}, n | {"best": 0}, n | {"best": 0, "worst": 0},
        n | {"best": 0, "worst": 3}, n | {"best": True, "worst": 0}, n | {"stop": 1.5}, n | {"best": -1, "worst": 0},
        {"best": 0, "worst": 1}, [1], "{",
    ):  # fmt: skip
        assert ask(page, "POST", "/verdict", wrong, **JSON)[0] == 409
    assert waiting.is_alive()
    assert ask(page, "POST", "/verdict", n | {"best": 2, "worst": 0}, **JSON)[0] == 200
    assert waiting.result() == [0.0, None, 1.0]
    assert ask(page, "POST", "/verdict", n | {"best": 2, "worst": 0}, **JSON)[0] == 409  # nothing waits
    for verdict, expected in (({}, [None, None]), ({"stop": True}, "stopped")):
        waiting = Scoring(page, "one", "two")
        number = question(page)["number"]
        assert ask(page, "POST", "/verdict", {"number": number} | verdict, **JSON)[0] == 200
        assert waiting.result() == expected


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/question", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Origin": "http://evil.example"}, 403),
        ("POST", "/verdict", JSON | {"Host": "evil.example"}, 403),
        ("POST", "/verdict", JSON | {"Origin": "http://evil.example"}, 403),
        ("POST", "/verdict", {"Content-Type": "text/plain"}, 404),  # what a form of another page could send
        ("POST", "/question", JSON, 404),
        ("PUT", "/verdict", JSON, 501),
        ("GET", "/verdict", {}, 404),
        ("GET", "/../person_page.py", {}, 404),
    ],
)
def test_strangers_neither_read_nor_judge(
    page: PersonPage, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    waiting = Scoring(page, "a secret", "b")
    number = question(page)["number"]
    body = {"number": number, "best": 0, "worst": 1} if method == "POST" else None
    found, text = ask(page, method, path, body, **headers)
    assert found == status and b"secret" not in text and waiting.is_alive()
    assert ask(page, "POST", "/verdict", "x" * 2000, **JSON)[0] == 413
    assert page.judge({"number": number}) and waiting.result() == [None, None]


def test_a_port_that_is_taken(page: PersonPage) -> None:
    port = page.server.server_address[1]
    assert page.server.server_address[0] == "127.0.0.1"
    with pytest.raises(PersonPageError, match=f"port {port} cannot be used .*--port"):
        PersonPage(port)


@pytest.mark.parametrize(
    "words, message",
    [(["--web"], "for --person"), (["--person", "--port", "80"], "for --web"),
     (["--person", "--web", "--port", "-1"], "from 0 to 65535")],
)  # fmt: skip
def test_settings_of_the_page(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        make_pairs.parse_arguments(["q.txt", "--model", "m", "--output", "o", *words])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")
def test_by_the_keyboard_in_a_browser(page: PersonPage, tmp_path: Path) -> None:
    waiting = Scoring(page, "one", HOSTILE, "three")
    with Browser(page.url, tmp_path) as browser:
        browser.wait("document.querySelectorAll('.answer').length === 3")
        assert HOSTILE in browser.evaluate("document.body.innerText") and not browser.evaluate("document.images.length")

        def press(key: str) -> None:
            browser.evaluate(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")

        press("1")
        assert "worst" in browser.evaluate("document.getElementById('help').textContent")
        press("u")
        press("3")
        press("2")
        assert waiting.result() == [None, 0.0, 1.0]
        waiting = Scoring(page, "one", "two")
        browser.wait("document.querySelectorAll('.answer').length === 2")
        press("2")
        assert waiting.result() == [0.0, 1.0]
        waiting = Scoring(page, "one", "two")
        browser.wait("document.querySelectorAll('.answer').length === 2")
        browser.evaluate("document.getElementById('skip').click()")
        assert waiting.result() == [None, None]
        assert browser.errors == [] and browser.hosts == {"127.0.0.1"}
