"""Who may call a page that is for this machine alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from preference.serve.guard import MAX_BODY, Guard


def call(
    path: str = "/", body: tuple[bytes, ...] = (b"",), kind: str = "http", **headers: str
) -> tuple[list[dict], list[bytes]]:
    """(what came back, the bodies that the application saw) of one request through the guard."""
    seen: list[bytes] = []
    sent: list[dict[str, Any]] = []
    parts = list(body)

    async def app(scope: dict, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            seen.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})

    async def receive() -> dict:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app)({"type": kind, "path": path, "headers": raw}, receive, send))
    return sent, seen


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_this_machine_gets_through(host: str) -> None:
    sent, seen = call(host=host, origin=f"http://{host}")
    assert sent[0]["status"] == 200 and seen == [b""]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example:7860"}, 403),
        ({}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "content_length": str(MAX_BODY + 1)}, 413),
        ({"host": "localhost", "content_length": "-1"}, 413),
        ({"host": "localhost", "path": "/gradio_api/upload"}, 403),
    ],
)
def test_others_are_refused_before_the_application(headers: dict[str, str], status: int) -> None:
    sent, seen = call(**headers)
    assert sent[0]["status"] == status and not seen
    assert (b"x-frame-options", b"DENY") in sent[0]["headers"]


def test_a_websocket_from_elsewhere_is_closed() -> None:
    sent, seen = call(kind="websocket", host="evil.example")
    assert sent[0]["type"] == "websocket.close" and not seen


def test_a_body_without_a_length_ends_where_it_is_too_long() -> None:
    sent, seen = call(body=(b"x" * (MAX_BODY // 2 + 1),) * 3, host="localhost")
    assert len(seen) == 1 and sent[0]["status"] == 200
    assert sent[0]["headers"].count((b"x-frame-options", b"DENY")) == 1 and len(sent[0]["headers"]) == 5
