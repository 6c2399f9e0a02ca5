"""What stands before a page for this machine alone: who may call it, with how much, and what a browser may do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from preference.report import local

MAX_BODY = 1 << 20  # bytes of a request: a question and its conversation, never a file
HEADERS = (
    *((name.encode(), value.encode()) for name, value in local.HEADERS),
    (b"content-security-policy", b"frame-ancestors 'none'"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def fault(scope: Message) -> tuple[int, str] | None:
    """(HTTP status, reason) of a request that is refused by its headers."""
    headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    if reason := local.stranger(headers.get(b"host", ""), headers.get(b"origin")):
        return 403, reason
    length = headers.get(b"content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return 413, f"a request may have {MAX_BODY} bytes"
    if scope["path"].rstrip("/").endswith("/upload"):
        return 403, "nothing is uploaded here"
    return None


class Guard:
    """ASGI middleware around a page's application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = fault(scope)
        if refused and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})
        elif refused:
            await answer(send, *refused)
        else:
            await self.app(scope, limited(receive), with_headers(send))


def limited(receive: Receive) -> Receive:
    """`receive` that ends a body without a length when it grows too long."""
    seen = 0

    async def wrapped() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > MAX_BODY else message

    return wrapped


def with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            mine = {name for name, _ in HEADERS}
            message["headers"] = [*(h for h in message.get("headers", ()) if h[0].lower() not in mine), *HEADERS]
        await send(message)

    return wrapped


async def answer(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
