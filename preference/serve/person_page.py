"""A person in a browser of this machine names the best and the worst answer, one question after the other.

Python's own HTTP server on 127.0.0.1: a page, its script and style, the question that waits, and the verdict on it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from preference.errors import PreferenceError
from preference.report.local_handler import POLICY, LocalHandler
from preference.serve.generation import Turn

PAGES = Path(__file__).parent / "pages"
STATIC = {
    "/": ("person.html", "text/html; charset=utf-8"),
    "/person.js": ("person.js", "text/javascript; charset=utf-8"),
    "/person.css": ("person.css", "text/css; charset=utf-8"),
}
LONGEST = 1000  # bytes of a verdict
PATIENCE = 20.0  # seconds that a page waits for a question before it asks again


class PersonPageError(PreferenceError, RuntimeError):
    """A page that cannot be shown; the message says what to choose."""


class PersonPage:
    """A scorer: the best answer gets 1, the worst 0, the others nothing. The page is there from the beginning.

    Raises:
        PersonPageError: the port is taken.
    """

    name = "person"

    def __init__(self, port: int) -> None:
        self.changed = threading.Condition()
        self.number = 0  # of the latest question, from 1
        self.question: dict[str, Any] | None = None  # while it waits for a verdict
        self.verdict: dict[str, Any] | None = None
        try:
            self.server = Server(self, port)
        except OSError as error:
            raise PersonPageError(
                f"port {port} cannot be used ({error.strerror}): choose another with --port"
            ) from None
        threading.Thread(target=self.server.serve_forever, name="person", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def scores(self, turn: Turn, answers: Sequence[str]) -> list[float | None]:
        """Raises KeyboardInterrupt where the person wants to stop."""
        asked = [("system", turn.system)] if turn.system else []
        for user, assistant in turn.history:
            asked += [("user", user), ("assistant", assistant)]
        with self.changed:
            self.number, self.verdict = self.number + 1, None
            self.question = {"number": self.number, "asked": [*asked, ("user", turn.question)], "answers": [*answers]}
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.verdict is not None)
            verdict: dict[str, Any] = self.verdict or {}
            self.question = None
        if "stop" in verdict:
            raise KeyboardInterrupt
        found: list[float | None] = [None] * len(answers)
        if verdict:
            found[verdict["best"]], found[verdict["worst"]] = 1.0, 0.0
        return found

    def wait_for_question(self, after: int) -> dict[str, Any] | None:
        """The question that waits, if it comes after the one of that number within PATIENCE."""
        with self.changed:
            self.changed.wait_for(lambda: self.question is not None and self.number > after, PATIENCE)
            return self.question if self.number > after else None

    def judge(self, said: Any) -> bool:
        """Take a verdict: {"number": N} and {"best": i, "worst": j}, {"stop": true}, or nothing more, which skips.

        Returns whether it is one on the question that waits; another page may have been faster.
        """
        with self.changed:
            if not isinstance(said, dict) or self.question is None or said.pop("number", None) != self.number:
                return False
            answers = len(self.question["answers"])
            places = [said.get(name) for name in ("best", "worst")]
            chosen = all(type(place) is int and 0 <= place < answers for place in places) and places[0] != places[1]
            if not (said in ({}, {"stop": True}) or (chosen and said.keys() == {"best", "worst"})):
                return False
            self.verdict = said
            self.changed.notify_all()
            return True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, page: PersonPage, port: int) -> None:
        self.page = page
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error of ours."""


class Handler(LocalHandler):
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if self.refused():
            return
        if url.path in STATIC:
            name, kind = STATIC[url.path]
            self.send(200, (PAGES / name).read_bytes(), kind, policy=POLICY)
        elif url.path == "/question":
            after = parse_qs(url.query).get("after", ["0"])[0]
            found = self.server.page.wait_for_question(int(after) if after.isdecimal() else 0)
            self.send(200, json.dumps(found or {"number": 0}).encode(), "application/json")
        else:
            self.send(404, b"there is no such page")

    def do_POST(self) -> None:
        """A verdict. JSON as a type of content is what no page from elsewhere can send unasked."""
        length = self.headers.get("Content-Length", "")
        if self.refused():
            return
        if self.headers.get_content_type() != "application/json" or urlsplit(self.path).path != "/verdict":
            self.send(404, b"there is no such page")
        elif not length.isdecimal() or int(length) > LONGEST:
            self.send(413, f"a verdict may have {LONGEST} bytes".encode())
        else:
            try:
                taken = self.server.page.judge(json.loads(self.rfile.read(int(length))))
            except ValueError:
                taken = False
            self.send(200 if taken else 409, b"taken" if taken else b"no verdict on the question that waits")
