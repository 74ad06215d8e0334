"""A web server on this machine that misbehaves as told."""

from __future__ import annotations

import hashlib
import io
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import py7zr

from tests.data.dumps import answer, question, table


@dataclass
class Page:
    """What lies at a path, and how it is given out.

    breaks: after how many bytes of the body each of the next answers breaks off; then none does.
    statuses: what the next requests are answered with instead, where not 0.
    """

    content: bytes
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True
    content_range: str | None = None
    length: int | None = None
    chunked: bool = False
    location: str | None = None
    silent: threading.Event | None = None
    breaks: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    reset: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Callable[[Page], None] = lambda _: None  # is called after each answer


@dataclass
class Web:
    """The pages of a server by path, and the requests so far: path, Range and If-Range of each."""

    address: str
    pages: dict[str, Page] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def asked(self, path: str) -> list[tuple[str | None, str | None]]:
        """Range and If-Range of each request of a path."""
        return [(wanted, condition) for name, wanted, condition in self.requests if name == path]


@contextmanager
def serve() -> Iterator[Web]:
    """A server on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    web = Web(f"http://127.0.0.1:{server.server_address[1]}")
    server.web = web  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        web: Web = self.server.web  # type: ignore[attr-defined]
        asked = (self.headers.get("Range"), self.headers.get("If-Range"))
        web.requests.append((self.path, *asked))
        page = web.pages.get(self.path)
        status = page.statuses.pop(0) if page and page.statuses else 0
        if page is None or status:
            self._answer(status or 404, page, b"<html>an error</html>", {})
            return
        if page.location is not None:
            self._answer(302, page, b"", {"Location": page.location})
            return
        if page.silent is not None:
            page.silent.wait(20)
            return
        start = self._start(page, *asked)
        said = {"ETag": page.etag, "Last-Modified": page.modified}
        if start or page.content_range:
            said["Content-Range"] = page.content_range or f"bytes {start}-{len(page.content) - 1}/{len(page.content)}"
        self._answer(206 if "Content-Range" in said else 200, page, page.content[start:], said)
        page.then(page)

    def _start(self, page: Page, wanted: str | None, condition: str | None) -> int:
        if wanted is None or not page.ranges:
            return 0
        if page.if_range and condition not in (None, page.etag or page.modified):
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def _answer(self, status: int, page: Page | None, body: bytes, headers: Mapping[str, str | None]) -> None:
        self.send_response(status)
        for name, value in {**headers, **(page.headers if page else {})}.items():
            if value is not None:
                self.send_header(name, value)
        sent = body[: page.breaks.pop(0)] if page and page.breaks else body
        if page and page.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            sent = b"%x\r\n%b" % (len(body), sent) + (b"\r\n0\r\n\r\n" if sent is body else b"")
        else:
            length = page.length if page and page.length is not None and status == 200 else len(body)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(sent)
            self.wfile.flush()
        except OSError:  # nobody reads on
            return
        if page and page.reset and len(sent) < len(body):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def packed(*, bulk: int = 0, seed: int = 0) -> bytes:
    """A .7z with a small Posts.xml, and as many bytes of noise, which stay as they are."""
    noise = b"".join(hashlib.sha256(b"%d %d" % (seed, number)).digest() for number in range(bulk // 32))
    content = io.BytesIO()
    with py7zr.SevenZipFile(content, "w", filters=[{"id": py7zr.FILTER_COPY}]) as archive:
        archive.set_encoded_header_mode(False)  # else its length hangs on the time of day
        archive.writestr(table("Posts", [question(1), answer(2, 1)]), "Posts.xml")
        archive.writestr(noise, "noise.bin")
    return content.getvalue()


def listing(files: Mapping[str, bytes], *, more: Sequence[str] = ()) -> bytes:
    """A list as items of the Internet Archive have it."""
    entries = [
        f'  <file name="{name}" source="original">\n    <mtime>1712082123</mtime>\n    <size>{len(content)}</size>\n'
        f"    <md5>{hashlib.md5(content).hexdigest()}</md5>\n    <crc32>0a1b2c3d</crc32>\n"
        f"    <sha1>{hashlib.sha1(content).hexdigest()}</sha1>\n    <format>7z</format>\n  </file>"
        for name, content in files.items()
    ]
    return "\n".join(["<files>", *entries, *more, "</files>", ""]).encode()
