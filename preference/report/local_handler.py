"""What the small HTTP servers for this machine alone have in common: who may ask, and how an answer is sent."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

from preference.report import local

# Nothing is loaded from anywhere else, no form is sent, and no other page may hold this one in a frame.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " \
         "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip


class LocalHandler(BaseHTTPRequestHandler):
    """Answers requests of pages whose Host and Origin are this machine."""

    server_version, sys_version = "preference", ""

    def refused(self) -> bool:
        """Whether the request comes from elsewhere; it is answered then."""
        reason = local.stranger(self.headers.get("Host", ""), self.headers.get("Origin"))
        if reason:
            self.send(403, reason.encode())
        return bool(reason)

    def send(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", policy: str = "") -> None:
        self.head(status, kind)
        self.send_header("Content-Length", str(len(body)))
        if policy:
            self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        for name, value in local.HEADERS:
            self.send_header(name, value)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line."""
