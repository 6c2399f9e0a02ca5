"""Who may call a page that is for this machine alone: its Host and its Origin must name this machine.

A page in another tab can make its host name point to 127.0.0.1 (DNS rebinding) and then talk to a server here. It can
choose neither the Host nor the Origin header that its browser sends.
"""

from __future__ import annotations

from urllib.parse import urlsplit

THIS_MACHINE = {"127.0.0.1", "localhost", "::1"}
HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)


def host_of(value: str) -> str | None:
    """The host name in a Host header ("localhost:7860") or an Origin ("http://localhost:7860"); None: unreadable."""
    try:
        return urlsplit(value if "//" in value else f"//{value}").hostname
    except ValueError:
        return None


def stranger(host: str, origin: str | None) -> str | None:
    """Why a request with these headers is refused; None where it is not."""
    if host_of(host) not in THIS_MACHINE:
        return "this page is for its own machine: open it as http://127.0.0.1"
    if origin is not None and host_of(origin) not in THIS_MACHINE:
        return "a page from elsewhere may not talk to this one"
    return None
