"""Judges: a server that speaks OpenAI's protocol, and a local model by likelihood; both asked in both orders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from talk import chat_with

from preference.serve import judge as judging
from preference.serve.generation import Turn
from preference.serve.judge import JudgeError, LocalJudge, ServerJudge, compare, conversation_text
from preference.serve.models import open_judge

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class Server:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.models = ["wise"]
        self.answer: Answer = lambda values: (200, reply("[[A]]"))
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.give(200, {"data": [{"id": name} for name in server.models]})

            def do_POST(self) -> None:
                values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, values, self.headers.get("Authorization")))
                self.give(*server.answer(values))

            def give(self, status: int, body: dict[str, Any]) -> None:
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", server.url + "/models")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def reply(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judging, "PAUSES", (0.0, 0.0))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


TURN = Turn("And juice?", (("Hi.", "Hello."),), "Be brief.")


def prefers(text: str) -> Answer:
    """A judge that finds `text` better wherever it stands."""

    def answer(values: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        content = values["messages"][0]["content"]
        first = content.partition("[Answer A]\n")[2].partition("\n[End")[0]
        return 200, reply("It could be [[B]] or [[A]]; " + ("[[A]]" if first == text else "[[b]]"))

    return answer


def test_both_orders_are_asked_and_the_last_verdict_counts(server: Server) -> None:
    server.answer = prefers("Apple.")
    judge = open_judge(server.url + "/chat/completions", None, "secret")
    assert compare(judge, TURN, "Apple.", "Soil.") == 1 and compare(judge, TURN, "Soil.", "Apple.") == 0
    path, values, key = server.asked[0]
    assert (path, values["model"], values["temperature"], key) == ("/v1/chat/completions", "wise", 0, "Bearer secret")
    assert conversation_text(TURN) in values["messages"][0]["content"]
    server.answer = lambda values: (200, reply("[[A]]"))  # whatever is shown first
    assert compare(judge, TURN, "Apple.", "Soil.") == 0.5
    server.answer = lambda values: (200, reply("[[C]]"))
    assert compare(judge, TURN, "Apple.", "Soil.") == 0.5


def test_a_busy_server_is_asked_again_and_a_wrong_one_is_named(server: Server) -> None:
    judge = ServerJudge(server.url, "wise")
    replies = [(503, {}), (429, {}), (200, reply("[[B]]"))]
    server.answer = lambda values: replies.pop(0)
    assert judge.favours(TURN, "x", "y") == 0 and not replies
    for answer, message in (
        ((503, {}), "503"),
        ((401, {"error": "no key"}), "401 .*no key"),
        ((302, {}), "302"),
        ((200, {"x": 1}), "OpenAI-compatible"),
        ((200, reply("Both are fine.")), "no verdict"),
    ):
        server.asked.clear()
        server.answer = lambda values, answer=answer: answer
        with pytest.raises(JudgeError, match=message):
            judge.favours(TURN, "x", "y")
        assert len(server.asked) == (3 if answer[0] == 503 else 1)
    server.models = ["a", "b"]
    with pytest.raises(JudgeError, match=r"2 models \(a, b\): name one with --judge_model"):
        ServerJudge(server.url)
    with pytest.raises(JudgeError, match="no address"):
        ServerJudge("localhost", "x").favours(TURN, "x", "y")


def test_no_proxy_stands_before_a_judge_on_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    assert ServerJudge(server.url).favours(TURN, "x", "y") == 1
    elsewhere = [
        handler for handler in ServerJudge("http://10.0.0.2/v1", "x").opener.handlers if hasattr(handler, "proxies")
    ]
    assert elsewhere[0].proxies["http"] == "http://127.0.0.1:9"


def test_a_local_judge_compares_the_letters_probabilities(run: Path) -> None:
    chat = chat_with(run)
    judge = open_judge(str(run), None, None, dtype="float32", use_cpu=True)
    assert isinstance(judge, LocalJudge)
    share = judge.favours(TURN, "Apple.", "Soil.")
    prompt = chat.encode(Turn(judging.question_text(TURN, "Apple.", "Soil.", LocalJudge.ENDING)))
    with torch.no_grad():
        logps = chat.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    a, b = (logps[chat.tokenizer.convert_tokens_to_ids(letter)].exp().item() for letter in "AB")
    assert share == pytest.approx(a / (a + b)) and 0 < share < 1
    assert compare(judge, TURN, "Apple.", "Soil.") == pytest.approx(
        (share + 1 - judge.favours(TURN, "Soil.", "Apple.")) / 2
    )
    with pytest.raises(JudgeError, match="reads"):
        judge.favours(TURN, "Apple." * 5000, "Soil.")
