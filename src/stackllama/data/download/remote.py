"""HTTP as a download needs it: failures that may pass are told from those that stay, and are tried again with patience.

    with closing(connect(url, timeout=30)) as response:
        for piece in pieces(response, url):
            ...

Redirects lead to http and https only. Left out on purpose: passwords, cookies, and other protocols.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import quote, urljoin, urlsplit

from stackllama.environment import package_version
from stackllama.errors import DumpError, RecipeError

PIECE = 1 << 18
"""Most bytes that come at a time."""
WORTH = 1 << 20
"""Bytes that have to be new before failed tries are forgiven: a server that sends one byte a try is given up on."""
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for a longer pause does not get it."""
_REDIRECTS = 10
_PASSING = (408, 425, 429, 500, 502, 503, 504)
MOVED = (301, 302, 303, 307, 308)
_KNOWN = (200, 206)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until a server that sends nothing is given up on, and seconds before each further try."""

    timeout: float = 30.0
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class BrokenError(Exception):
    """A try that failed, where another one may not. `status` is the server's answer, `wait` the seconds it asks for."""

    def __init__(self, message: str, *, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait


class UnknownHostError(BrokenError):
    """The name of the server cannot be looked up: it is wrong, or the network is gone for now."""


class StatusError(DumpError):
    """The server answers, and does not give what it was asked for. `status` says why."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_address(address: str) -> str:
    """`address` without a slash at its end. Raises RecipeError where it cannot be the address of a folder of files."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not all("!" <= letter <= "~" for letter in address) or set("?#@\\") & set(address):
        raise RecipeError(
            f"the address {address!r} cannot be used; give the folder that holds the archives as http://HOST/FOLDER or "
            "https://HOST/FOLDER, without password, ? and #"
        )
    return address.rstrip("/")


def connect(url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """The server's answer of status 200 or 206, redirects followed; to be closed.

    Raises BrokenError where another try may help, StatusError for an answer such as 404, and DumpError where the
    server cannot be spoken to.
    """
    sent = {
        "User-Agent": f"stackllama/{package_version('stackllama')}",
        "Accept-Encoding": "identity",
        **(headers or {}),
    }
    place = url
    for _ in range(_REDIRECTS + 1):
        response = send(place, sent, timeout)
        if response.status in _KNOWN:
            return response
        with response:
            target = response.headers.get("Location")
            if response.status not in MOVED or target is None:
                raise _refusal(place, response)
        place = _led_to(place, target)
    raise DumpError(f"{url} leads in circles: more than {_REDIRECTS} redirects; give another address")


def pieces(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The body as it comes, to its end. Raises BrokenError where it breaks off before that."""
    while True:
        try:
            piece = response.read1(PIECE)
        except (OSError, http.client.HTTPException) as error:
            raise _broken(url, error) from error
        if not piece:
            break
        yield piece
    if response.length:  # of the bytes that were said to come, those that did not
        raise BrokenError(f"the connection to {urlsplit(url).hostname} broke off")


def size_of(response: http.client.HTTPResponse, url: str) -> int:
    """The bytes that the server is going to send. Raises DumpError where it does not say."""
    size = response.headers.get("Content-Length", "")
    if not (size.isascii() and size.isdigit() and len(size) < 19):
        raise DumpError(
            f"{url}: the server does not say how large it is, so a download that broke off could not be told from a "
            "whole one; give another --address"
        )
    return int(size)


def validator_of(response: http.client.HTTPResponse) -> str | None:
    """What may stand in If-Range: an ETag that says that every byte is the same, else the time of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


class Tries:
    """How often in a row has it failed, and is it worth another try?"""

    def __init__(self, patience: Patience, note: Callable[[str], None]) -> None:
        self._patience = patience
        self._note = note
        self._failed = 0
        self._furthest = 0

    def failed(self, error: BrokenError, *, arrived: int = 0) -> None:
        """Say so and wait; `arrived` bytes are there by now. Raises DumpError when it has failed too often."""
        if arrived >= self._furthest + WORTH:
            self._failed, self._furthest = 0, arrived
        waits = self._patience.waits
        if self._failed == len(waits):
            raise DumpError(f"{error}, {len(waits) + 1} times in a row") from error
        wait = max(waits[self._failed], min(error.wait, LONGEST_WAIT))
        self._failed += 1
        self._note(f"{error}; try {self._failed + 1} of {len(waits) + 1} in {wait:g} s")
        time.sleep(wait)


def _opener(*more: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    usual = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), urllib.request.UnknownHandler())
    for handler in (*more, *usual):  # none of files, FTP or redirects: those are not followed unseen
        opener.add_handler(handler)
    return opener


_BY_PROXY = _opener(urllib.request.ProxyHandler())
_DIRECT = _opener()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reading_proxy(url: str) -> bool:
    """Whether what is sent to a url passes a proxy of the environment that can read it: over http, not to this machine.
    Over https a proxy passes on what it cannot read.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or is_loopback(parts.hostname or ""):
        return False
    return bool(urllib.request.getproxies().get("http")) and not urllib.request.proxy_bypass(parts.netloc)


def send(
    url: str, headers: Mapping[str, str], timeout: float, *, body: bytes | None = None, shown: str | None = None
) -> http.client.HTTPResponse:
    """The server's answer, whatever its status; to be closed. body: what is posted; None: it is a GET. Redirects are
    answers like others. timeout: seconds without a byte. shown: what messages say for the url. No proxy of the
    environment stands before this machine.

    Raises BrokenError where another try may help, DumpError where the server cannot be spoken to.
    """
    shown = url if shown is None else shown
    try:
        request = urllib.request.Request(url, body, dict(headers))  # noqa: S310 - the scheme has been checked
        opener = _DIRECT if is_loopback(urlsplit(url).hostname or "") else _BY_PROXY
        response = opener.open(request, timeout=timeout)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, OSError):
            raise DumpError(f"{shown} cannot be asked for: {error.reason}; give another address") from error
        raise _broken(url, error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(url, error) from error
    except ValueError as error:
        raise DumpError(f"{shown!r} is no address that can be asked: {error}; give another one") from error
    assert isinstance(response, http.client.HTTPResponse)
    return response


def _led_to(place: str, target: str) -> str:
    """Where a redirect leads. Raises DumpError where that is not to be followed."""
    try:
        found = quote(urljoin(place, target), safe=string.punctuation)
        followed = urlsplit(found).scheme in ("http", "https")
    except ValueError:
        found, followed = target, False
    if not followed:
        raise DumpError(f"{place} leads on to {found}, which is no address of the web; it is not followed")
    return found


def _broken(url: str, error: OSError | http.client.HTTPException) -> Exception:
    """What went wrong on the way, in plain words; a BrokenError unless it is there to stay."""
    host = urlsplit(url).hostname
    if isinstance(error, ssl.SSLCertVerificationError):
        return DumpError(f"{host} cannot show that it is {host} ({error.verify_message}); its answer is not used")
    if isinstance(error, socket.gaierror):
        return UnknownHostError(f"{host} is not found ({error.strerror})")
    if isinstance(error, TimeoutError):
        return BrokenError(f"{host} sends nothing")
    if isinstance(error, ConnectionRefusedError):
        return BrokenError(f"{host} takes no connection")
    if isinstance(error, OSError) and error.strerror:
        return BrokenError(f"the connection to {host} broke off ({error.strerror})")
    return BrokenError(f"the connection to {host} broke off")


def named(status: int) -> str:
    """A status with its name, such as `404 Not Found`."""
    return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)


def asked_wait(response: http.client.HTTPResponse) -> float:
    """Seconds that a server asks to wait, by a number or a date, up to LONGEST_WAIT; 0 where it says neither."""
    asked = response.headers.get("Retry-After", "")
    try:
        number = asked.isascii() and asked.isdigit()
        wait = float(asked) if number else parsedate_to_datetime(asked).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(0.0, wait), LONGEST_WAIT)


def _refusal(url: str, response: http.client.HTTPResponse) -> Exception:
    status = response.status
    if status in _PASSING or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        said = f"{urlsplit(url).hostname} answers {named(status)}"
        return BrokenError(said, status=status, wait=asked_wait(response))
    return StatusError(f"{url} answers {named(status)}", status=status)
