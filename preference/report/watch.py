"""A run watched live in a browser on this machine, from the files that it writes anyway.

    python -m preference.report watch outputs/orpo            a run at work, or a finished one
    python -m preference.report watch outputs/a outputs/b     several over each other

Python's own HTTP server on 127.0.0.1, read-only: a page, its script, one JSON of all runs, and the same as server-sent
events whenever a file has changed. Nothing is loaded from anywhere else.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preference.errors import PreferenceError
from preference.report.live import Watched
from preference.report.local_handler import POLICY, LocalHandler

PORT = 6060  # or any that is free
EVERY, PING = 1.0, 15.0  # seconds between two looks, and between two signs of life
READERS, RUNS = 32, 6  # pages open at once, and runs in one page, at most
BROKEN = re.compile("[\ud800-\udfff\ufffd]")
PAGES = Path(__file__).parent / "pages"
STATIC = {
    "/": ("watch.html", "text/html; charset=utf-8"),
    "/watch.js": ("watch.js", "text/javascript; charset=utf-8"),
    "/watch.css": ("watch.css", "text/css; charset=utf-8"),
}


class WatchError(PreferenceError, ValueError):
    """What cannot be watched; the message says why."""


class Server(ThreadingHTTPServer):
    """The server of `watched`; `closing` is set once it is to end."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched, self.closing = watched, threading.Event()
        self.readers = threading.BoundedSemaphore(READERS)
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error of ours."""

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(LocalHandler):
    """GET and HEAD of the few paths that there are."""

    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.refused():
            return
        if path in STATIC:
            name, kind = STATIC[path]
            self.send(200, (PAGES / name).read_bytes(), kind, policy=POLICY)
        elif path == "/state":
            self.send(200, _json(self.server.watched.look()[1]), "application/json")
        elif path == "/events":
            self._events()
        elif path.startswith("/report/") and (page := self._report(path.removeprefix("/report/"))):
            self.send(200, page, "text/html; charset=utf-8")  # it has a policy of its own
        else:
            self.send(404, b"there is no such page")

    do_HEAD = do_GET

    def _report(self, number: str) -> bytes | None:
        """The report of the run of that number, if it has one."""
        folders = self.server.watched.folders
        if not number.isdecimal() or int(number) >= len(folders):
            return None
        try:
            return (folders[int(number)] / "report.html").read_bytes()
        except OSError:
            return None

    def _events(self) -> None:
        if not self.server.readers.acquire(blocking=False):
            self.send(503, b"too many pages are open")
            return
        try:
            self.head(200, "text/event-stream")
            self.end_headers()
            self._tell()
        except OSError:  # the page was closed
            pass
        finally:
            self.server.readers.release()

    def _tell(self) -> None:
        told, last = 0, 0.0
        while self.command == "GET":
            version, state = self.server.watched.look()
            now = time.monotonic()
            if version != told:
                self.wfile.write(b"data: " + _json(state) + b"\n\n")
                told, last = version, now
            elif now - last > PING:
                self.wfile.write(b": still there\n\n")
                last = now
            self.wfile.flush()
            if self.server.closing.wait(EVERY):
                return


def _json(state: Any) -> bytes:
    """JSON that a browser reads: no NaN; lone surrogates and U+FFFD, which are no characters of anybody, as escapes."""
    text = json.dumps(state, ensure_ascii=False, allow_nan=False, default=str)
    return BROKEN.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text).encode()


def serve(folders: Sequence[str | Path], port: int = PORT) -> Server:
    """Start watching the runs of these folders, in threads that end with the program; any free port if that is taken.

    Raises:
        WatchError: too many folders, or none.
    """
    if not 1 <= len(folders) <= RUNS:
        raise WatchError(f"1 to {RUNS} runs can be watched at once; got {len(folders)}")
    watched = Watched(folders)
    try:
        server = Server(watched, port)
    except OSError:
        server = Server(watched, 0)
    threading.Thread(target=server.serve_forever, name="watch", daemon=True).start()
    return server


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m preference.report watch", description="Watch runs in a browser.")
    parser.add_argument("output_dir", nargs="+", help="folders of runs, at work or finished")
    parser.add_argument("--port", type=int, default=PORT, help="port on 127.0.0.1 (%(default)s, or any that is free)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        parser.error(f"--port {options.port}: a port is a number from 0 to 65535")
    if missing := [name for name in options.output_dir if not Path(name).is_dir()]:
        parser.error(f"{missing[0]} is not a run's folder")
    try:
        server = serve(options.output_dir, options.port)
    except WatchError as error:
        parser.error(str(error))
    say(f"watch {', '.join(options.output_dir)} at {server.url} (Ctrl-C ends this)")
    try:
        server.closing.wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
