"""The replies of a judge behind an address, kept as they come, so that none is paid for twice.

A line of the file is one reply, `{"key": ..., "reply": ..., "tokens_in": ..., ...}`; its key is a hash of all that was
asked and of whom. A reply that is on the disk is not asked for again, by whatever command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stackllama.errors import RunError
from stackllama.files import raise_if_full

MOST_TOKENS = 1 << 40
"""A count of tokens above this is a mistake of who counted."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said. cut: whether it broke off at a limit of length. tokens_in, tokens_out: what the server counted
    for question and reply; counted: False where it did not, and they are estimated from the characters.
    """

    reply: str
    cut: bool
    tokens_in: int
    tokens_out: int
    counted: bool


class Replies:
    """The replies in a file of JSON lines, by key; what is kept is on disk once `keep` returns.

    Opening it cuts off a torn last line, which a killed process may have left; a line that is damaged otherwise is
    passed over and counted in `damaged`, and what it answered is asked again. Errors: RunError where the file cannot be
    read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._replies: dict[str, Reply] = {}
        if not path.exists():
            return
        try:
            whole = path.read_bytes()
            if whole and not whole.endswith(b"\n"):
                os.truncate(path, whole.rfind(b"\n") + 1)
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        for line in whole[: whole.rfind(b"\n") + 1].splitlines():
            self._read(line)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The reply to what has this key, None where there is none yet."""
        return self._replies.get(key)

    def keep(self, key: str, reply: Reply, about: Mapping[str, str | int]) -> None:
        """Write a reply down. about: what a reader of the file may want to know of it."""
        line = json.dumps({"key": key, **about, **asdict(reply)}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise_if_full(error, self.path, left=f"{len(self)} replies are kept")
            raise RunError(f"{self.path} cannot be written: {error.strerror}; check its permissions") from error
        self._replies[key] = reply

    def _read(self, line: bytes) -> None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("key"), str) and _fits(found):
            self._replies[found["key"]] = Reply(**{field.name: found[field.name] for field in fields(Reply)})
        else:
            self.damaged += 1


def _fits(found: Mapping[str, Any]) -> bool:
    kinds = {"reply": str, "cut": bool, "tokens_in": int, "tokens_out": int, "counted": bool}
    typed = all(type(found.get(name)) is kind for name, kind in kinds.items())
    return typed and all(0 <= found[name] <= MOST_TOKENS for name in ("tokens_in", "tokens_out"))
