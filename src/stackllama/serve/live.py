"""`stackllama watch`: the report of a run, drawn anew while its stages write, in a browser on this machine.

One page at one address. Each request that finds the run's files changed draws the page anew, one request at a time; the
browser asks again by itself (a `Refresh` header, so the page needs no script). It listens on the loopback address only,
and answers only requests whose Host names that address, so that a page of somewhere else cannot have a browser read the
report under another name (DNS rebinding).
"""

from __future__ import annotations

import html
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stackllama.errors import RunError, StackllamaError
from stackllama.report.page import render
from stackllama.report.reading import read_run

LOOPBACK = "127.0.0.1"
READ = ("*.json", "*.yaml", "*/*.json", "*/*.jsonl")
"""Files of a run that the page is drawn from, and some more."""
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
WAITING = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>{name} · stackllama</title><body style="font-family: sans-serif; margin: 4rem auto; max-width: 40rem">
<h1>{name}</h1><p>{reason}</p><p>This page looks again every {every} seconds.</p></body></html>
"""


class LivePage:
    """The report of a run as it is now. defaults: the recipe's default settings; those that differ are shown."""

    def __init__(self, folder: Path, *, defaults: dict[str, Any] | None, every: int) -> None:
        self.folder = folder
        self.every = every
        self._defaults = defaults
        self._lock = threading.Lock()
        self._seen: object = None
        self._page = b""

    def page(self) -> bytes:
        """The page, drawn anew where a file of the run has changed since the last time."""
        with self._lock:
            now = self._state()
            if now != self._seen:
                self._page, self._seen = self._draw(), now
            return self._page

    def _draw(self) -> bytes:
        try:
            text = render(read_run(self.folder), defaults=self._defaults)
        except StackllamaError as error:  # nothing yet; or a file that somebody broke, which the sentence names
            words = {"name": html.escape(self.folder.resolve().name), "reason": html.escape(str(error))}
            text = WAITING.format(**words, every=self.every)
        return text.encode("utf-8", "replace")

    def _state(self) -> object:
        """What changes when a file does: name, size and time of each."""
        found = []
        for path in sorted({path for pattern in READ for path in self.folder.glob(pattern)}):
            try:
                about = path.stat()
            except OSError:  # replaced just now
                continue
            found.append((str(path), about.st_size, about.st_mtime_ns))
        return found


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version, sys_version = "stackllama", ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if self.headers.get("Host", "") not in self.server.names:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "this is not the address that the page is served at")
        elif self.headers.get("Origin") not in (None, *(f"http://{name}" for name in self.server.names)):
            self.send_error(HTTPStatus.FORBIDDEN, "a page of another origin asked")
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND, "there is one page, /")
        else:
            page = self.server.live.page()
            self.send_response(HTTPStatus.OK)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Refresh", str(self.server.live.every))
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if body:
                self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: a line for each look would bury what the user wants to read. (The base class names `format`.)"""


class LiveServer(ThreadingHTTPServer):
    """The page on the loopback address. port: 0 takes a free one. Use it in a `with`.

    Raises:
        RunError: where the port is taken, or not allowed.
    """

    daemon_threads = True

    def __init__(self, live: LivePage, port: int) -> None:
        self.live = live
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(f"port {port} of {LOOPBACK} cannot be listened on: {error}; give another --port") from error
        self.names = (f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}")

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{self.names[0]}/"


def watch(folder: Path, *, port: int, every: int, defaults: dict[str, Any] | None) -> None:
    """Serve the report of the run in `folder` until Ctrl-C. every: seconds between two looks of the browser."""
    with LiveServer(LivePage(folder, defaults=defaults, every=every), port) as server:
        print(f"{server.address} shows {folder} while it is made; end with Ctrl-C", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
