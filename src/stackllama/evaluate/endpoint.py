"""One request to an OpenAI-compatible chat-completions endpoint: vLLM, a llama.cpp server, Ollama, OpenAI and others.

    endpoint = open_endpoint("http://localhost:8000/v1", key=None, key_from="OPENAI_API_KEY", timeout=120)
    reply = ask(endpoint, {"model": "...", "messages": [...]})

The key is a header of the request and nothing else: it is in no message, and what a server sends back of it is masked,
as are a password and a query in the url. No redirect is followed, so the key goes to the host that was named and to no
other. Left out on purpose: streaming, and client libraries of single services.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

from stackllama.data.download.remote import (
    MOVED,
    BrokenError,
    asked_wait,
    is_loopback,
    named,
    pieces,
    reading_proxy,
    send,
)
from stackllama.environment import package_version
from stackllama.errors import DumpError, JudgeError, RecipeError
from stackllama.evaluate.replies import MOST_TOKENS, Reply

LARGEST = 1 << 23
"""Bytes of an answer that are read; a judge's reply is some thousands."""
CHARACTERS = 4
"""Characters of a token, roughly, where nothing was counted."""
SHORTEST_SECRET = 8
"""Characters of a key, or of a value in a query, below which it is a word such as EMPTY, which servers without keys are
given.
"""
SHORTEST_PASSWORD = 4
"""The same of a password in the url: a shorter one would mask half of what is said."""

_PATH = "/chat/completions"
_PASSING = (408, 409, 425, 429)
_DENIED = (401, 403)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a judge is asked. address: without password and query, to be shown and kept; host: with its port.

    sent: in words, what goes there to be let in, such as `the key in OPENAI_API_KEY`; empty where nothing does. proxy:
    whether a proxy of the environment can read that on its way. url, authorization and secrets are secret, or may be,
    and are shown by no representation; secrets: what is masked, the longest first.
    """

    address: str
    host: str
    loopback: bool
    key_from: str
    timeout: float
    sent: str
    proxy: bool
    url: str = field(repr=False)
    authorization: str | None = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    def masked(self, text: str) -> str:
        """The text without the key, and without password and query of the url."""
        for secret in self.secrets:
            text = text.replace(secret, "[the key]")
        return text


def open_endpoint(url: str, *, key: str | None, key_from: str, timeout: float) -> Endpoint:
    """The endpoint at `url`, which may end before or after `/chat/completions`.

    key: what the environment variable `key_from` holds; a password in the url goes before it. timeout: seconds for one
    answer. Errors: RecipeError for an address or a key that cannot be used; the message has neither password nor key.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.fragment
    except ValueError:
        usable = False
    if not usable or not all("!" <= letter <= "~" for letter in url) or "\\" in url:
        raise RecipeError(
            "--url cannot be used; give the address of the service up to its version, as in http://localhost:8000/v1 "
            "or https://HOST/v1"
        )
    host = parts.netloc.rpartition("@")[2]
    path = parts.path.rstrip("/")
    path = path if path.endswith(_PATH) else path + _PATH
    address = f"{parts.scheme}://{host}{path}"
    key = (key or "").strip() or None
    if key and not all("!" <= letter <= "~" for letter in key):
        raise RecipeError(f"the key in {key_from} has spaces or signs that no header can hold; set it anew")
    authorization, sent = (f"Bearer {key}", f"the key in {key_from}") if key else (None, "")
    basic = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        basic = base64.b64encode(pair.encode()).decode()
        authorization, sent = f"Basic {basic}", "the user and password in --url"
    return Endpoint(
        address=address,
        host=host,
        loopback=is_loopback(parts.hostname or ""),
        key_from=key_from,
        timeout=timeout,
        sent=sent,
        proxy=reading_proxy(address),
        url=address + (f"?{parts.query}" if parts.query else ""),
        authorization=authorization,
        secrets=_secrets(key, parts, basic),
    )


def _secrets(key: str | None, parts: SplitResult, basic: str) -> tuple[str, ...]:
    """What no message may hold, the longest first: as it is sent, and as a server may have decoded it."""
    values = [value for pair in parts.query.split("&") for value in (pair, pair.partition("=")[2])]
    long = [key or "", unquote(parts.username or ""), parts.query, *values, *(unquote_plus(value) for value in values)]
    short = [basic, parts.password or "", unquote(parts.password or "")]
    found = {text for text in long if len(text) >= SHORTEST_SECRET}
    found |= {text for text in short if len(text) >= SHORTEST_PASSWORD}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def ask(endpoint: Endpoint, body: Mapping[str, Any]) -> Reply:
    """Post one request and read the reply.

    Errors: BrokenError where another try may help (its `wait` is what the server asks for), JudgeError where not.
    """
    headers = {
        "User-Agent": f"stackllama/{package_version('stackllama')}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
    }
    if endpoint.authorization:
        headers["Authorization"] = endpoint.authorization
    until = time.monotonic() + endpoint.timeout
    try:
        response = send(endpoint.url, headers, endpoint.timeout, body=json.dumps(body).encode(), shown=endpoint.address)
        with closing(response):
            content = _content(response, endpoint, until)
    except DumpError as error:  # the words are those of a download, and stay true
        raise JudgeError(endpoint.masked(str(error))) from None
    if response.status != HTTPStatus.OK:
        raise _refusal(endpoint, response, content)
    return _reply(endpoint, body, content)


def patiently(
    asks: Callable[[], Reply], waits: tuple[float, ...], *, pause: Callable[[float], bool], note: Callable[[str], None]
) -> Reply | None:
    """Ask until there is a reply, with these seconds before each further try, or what the server asks for.

    pause: waits so many seconds; True where nobody wants the reply any more, which gives None. Errors: JudgeError after
    the last try.
    """
    for at in range(len(waits) + 1):
        try:
            return asks()
        except BrokenError as error:
            if at == len(waits):
                raise JudgeError(f"{error}, {at + 1} times in a row") from None
            wait = max(waits[at], error.wait)
            note(f"{error}; try {at + 2} of {len(waits) + 1} in {wait:g} s")
        if pause(wait):
            return None
    return None


def _content(response: HTTPResponse, endpoint: Endpoint, until: float) -> bytes:
    """The body, as far as it is needed. Raises BrokenError where it does not come in time."""
    content = b""
    for piece in pieces(response, endpoint.address):
        content += piece
        if len(content) > LARGEST:
            raise JudgeError(f"{endpoint.host} sends more than {LARGEST:,} bytes for one reply; is it a judge?")
        if time.monotonic() > until:
            raise BrokenError(f"{endpoint.host} does not end its answer within {endpoint.timeout:g} s")
    return content


def _refusal(endpoint: Endpoint, response: HTTPResponse, content: bytes) -> Exception:
    """What an answer with another status than 200 means, as an error."""
    status = response.status
    said = f"{endpoint.host} answers {named(status)}"
    if status in _PASSING or status >= 500:
        return BrokenError(said, status=status, wait=asked_wait(response))
    if status in _DENIED:  # what it says of the key stays out of the message
        if endpoint.authorization is None:
            return JudgeError(f"{said}, and no key was sent: {endpoint.key_from} is not set; set it, or use --key-from")
        return JudgeError(f"{said}: {endpoint.sent} is not taken; set another, or use --key-from")
    if status in MOVED:
        target = endpoint.masked(response.headers.get("Location", "nowhere"))
        return JudgeError(f"{said} and leads to {target}, which is not followed; if you trust it, give it as --url")
    return JudgeError(f"{said}: {_complaint(endpoint, content)}")


def _complaint(endpoint: Endpoint, content: bytes) -> str:
    """What a server says is wrong: the message in its JSON, else the beginning of its text."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    for name in ("error", "message", "detail"):
        if isinstance(found, dict):
            found = found.get(name, found)
    told = found if isinstance(found, str) else text
    return endpoint.masked(" ".join(told.split()))[:300] or "it says no more"


def _reply(endpoint: Endpoint, body: Mapping[str, Any], content: bytes) -> Reply:
    """The reply in the JSON of an answer. Raises JudgeError where it is something else."""
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = _complaint(endpoint, content)
        raise JudgeError(
            f"{endpoint.host} does not answer as a chat-completions endpoint does, but: {said}; look at --url"
        ) from None
    said = endpoint.masked(text) if isinstance(text, str) else ""
    cut = choice.get("finish_reason") == "length"
    usage = found.get("usage")
    counts = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    if counts[0] is None or counts[1] is None:
        return Reply(said, cut, tokens_of(body), -(-len(said) // CHARACTERS), counted=False)
    return Reply(said, cut, counts[0], counts[1], counted=True)


def _count(usage: Any, name: str) -> int | None:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if type(found) is int and 0 <= found <= MOST_TOKENS else None


def tokens_of(body: Mapping[str, Any]) -> int:
    """Tokens of a request's messages, roughly."""
    return -(-sum(len(message["content"]) for message in body["messages"]) // CHARACTERS)
