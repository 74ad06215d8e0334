"""A server on this machine that speaks the chat-completions protocol, and judges, or misbehaves, as told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Judge = Callable[[str, str, str], str]
"""(question, A's answer, B's answer) -> reply."""

SECTION = re.compile(
    r"\[([0-9a-f]{12}): begin of (.*?)\]\n(.*?)\n\[\1: end of \2\]",
    re.DOTALL,
)


@dataclass
class Plan:
    """How the next request is answered instead. after: seconds before it is; raw: the body as it is."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    after: float = 0.0


@dataclass
class Service:
    """A judge at an address, and what it was asked so far. plans: what it does instead of judging, the next times."""

    address: str
    judge: Judge
    plans: list[Plan] = field(default_factory=list)
    always: Plan | None = None
    usage: Mapping[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    finish: str = "stop"
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def sections(content: str) -> tuple[str, str, str]:
    """Question, A's answer and B's answer of a message."""
    found = {what: text for _, what, text in SECTION.findall(content)}
    return found["the question"], found["assistant A's answer"], found["assistant B's answer"]


@contextmanager
def serve(judge: Judge) -> Iterator[Service]:
    """A server on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    service = Service(f"http://127.0.0.1:{server.server_address[1]}/v1", judge)
    server.service = service  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        service: Service = self.server.service  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.asked.append(body)
            service.headers.append(dict(self.headers))
            service.paths.append(self.path)
            service.times.append(time.monotonic())
            plan = service.plans.pop(0) if service.plans else service.always or Plan()
        time.sleep(plan.after)
        try:
            self._give(service, body, plan)
        except OSError:  # the client gave up
            return

    def do_GET(self) -> None:
        raise AssertionError("a judge is asked by POST")

    def _give(self, service: Service, body: dict[str, Any], plan: Plan) -> None:
        content = plan.raw
        if content is None and plan.status == 200:
            said = service.judge(*sections(body["messages"][-1]["content"]))
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": service.finish}
            content = json.dumps({"choices": [choice], **({"usage": service.usage} if service.usage else {})}).encode()
        content = content or b""
        self.send_response(plan.status)
        for name, value in plan.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
