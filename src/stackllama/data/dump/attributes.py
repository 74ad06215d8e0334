"""The attributes of some rows of a dump, as columns.

Nearly every row of a dump is written in one way: `<row` with attributes in double quotes, and in them a handful of
entities. A block of such rows is taken apart by arithmetic on all its bytes at once (`read_plain`), several times as
fast as by a parser of XML, into texts that Arrow reads where they lie. Where a block has anything else, be it allowed
in XML or not, that is left to a parser; what is read here is what a parser would read.

Legend: B bytes of a block, Q its quotes, E its entities, V values of attributes, N rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MOST_FIELDS = 200
"""Attributes of a row; those of Stack Exchange have some 20."""

_MOST_BETWEEN, _LONGEST_BETWEEN = 1000, 200  # different texts between values, and their length; beyond it is no dump
# Behind a value: what ends its row and begins another, if that is so, and the name of the next value.
_BETWEEN = re.compile(
    r"(?:[ \t\r\n]*(?P<ends>/>)?[ \t\r\n]*(?P<begins><row))?[ \t\r\n]+(?P<name>[A-Za-z][A-Za-z0-9]*)="
)
_END = re.compile(r"[ \t\r\n]*/>[ \t\r\n]*")
_NO_CHARACTERS = ("\ufffe".encode(), "\uffff".encode())  # UTF-8 can write them, XML forbids them
_THEIR_FIRST_BYTE = b"\xef"  # looked for first: one byte is found faster than three
_PADDING = b" " * 8
_QUOTE, _AND, _LESS, _SPACE, _TAB = b'"&< \t'


class _Entity(NamedTuple):
    """`name` is the beginning of what stands behind the `&`, as a number whose lowest bits `mask` counts; `length` are
    its bytes with the semicolon.
    """

    name: np.uint32
    mask: np.uint32
    length: int
    meaning: int


def _entity(name: bytes, meaning: bytes) -> _Entity:
    number, mask = (np.uint32(int.from_bytes(some[: len(name)], "little")) for some in (name[:4], b"\xff" * 4))
    return _Entity(number, mask, len(name), meaning[0])


_ENTITIES = (
    _entity(b"lt;", b"<"),
    _entity(b"gt;", b">"),
    _entity(b"#xA;", b"\n"),
    _entity(b"quot;", b'"'),
    _entity(b"amp;", b"&"),
    _entity(b"#xD;", b"\r"),
    _entity(b"#x9;", b"\t"),
)


class Attributes:
    """The attributes of `rows` rows. Each has the number of its row, that of its name among `names`, and its place
    among `texts`, an array of strings.
    """

    def __init__(
        self,
        rows: int,
        names: Sequence[str],
        row_V: NDArray[np.int64],
        name_V: NDArray[np.int64],
        place_V: NDArray[np.int64],
        texts: pa.StringArray,
    ) -> None:
        self.rows = rows
        self._names = list(names)
        self._row_V = row_V
        self._name_V = name_V
        self._place_V = place_V
        self._texts = texts

    def column(self, name: str) -> pa.Array:
        """The values (N,) of an attribute, null in a row without it."""
        if name not in self._names:
            return pa.nulls(self.rows, pa.string())
        chosen = np.flatnonzero(self._name_V == self._names.index(name))
        if len(chosen) == self.rows:
            return self._texts.take(pa.array(self._place_V[chosen]))
        at_N = np.full(self.rows, -1)
        at_N[self._row_V[chosen]] = self._place_V[chosen]
        return self._texts.take(pa.array(at_N, mask=at_N < 0))

    def to_rows(self) -> list[dict[str, str]]:
        """Each row by itself, its attributes in their order."""
        rows: list[dict[str, str]] = [{} for _ in range(self.rows)]
        values = self._texts.take(pa.array(self._place_V)).to_pylist()
        for row, name, value in zip(self._row_V.tolist(), self._name_V.tolist(), values, strict=True):
            rows[row][self._names[name]] = value
        return rows


def of_rows(rows: Sequence[Mapping[str, str]]) -> Attributes:
    """The attributes of rows that were read one by one."""
    numbers: dict[str, int] = {}
    name_V = np.array([numbers.setdefault(name, len(numbers)) for row in rows for name in row], np.int64)
    row_V = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    texts = pa.array([value for row in rows for value in row.values()], pa.string())
    return Attributes(len(rows), list(numbers), row_V, name_V, np.arange(len(texts)), texts)


def read_plain(block: bytes) -> Attributes | None:
    """The rows of a block, which begins with a row and ends behind one; None where it has anything that a parser of XML
    should look at.
    """
    if not _is_text(block):
        return None
    byte_B = np.frombuffer(block + _PADDING, np.uint8).copy()
    if b"\t" in block:
        byte_B[byte_B == _TAB] = _SPACE  # as which XML reads it; one that is meant is written as a number
    quote_Q = np.flatnonzero(byte_B == _QUOTE)
    begun, controls = int(np.count_nonzero(byte_B == _LESS)), int(np.count_nonzero(byte_B < _SPACE))
    resolved = _resolve(byte_B)
    if resolved is None or not len(quote_Q) or len(quote_Q) % 2:
        return None
    at_E, gone_E = resolved
    before_Q = np.searchsorted(at_E, quote_Q)
    if (before_Q[1::2] - before_Q[::2]).sum() != len(at_E):  # an entity outside of the quotes
        return None
    byte_B[quote_Q] = 0
    content = byte_B[: len(block)].tobytes().translate(None, b"\0")
    # Where each quote stood, all that is left out taken off: the quotes before it, and parts of entities.
    stop_Q = quote_Q - np.arange(len(quote_Q)) - gone_E[before_Q]
    offsets = np.concatenate([[0], stop_Q, [len(content)]]).astype(np.int32)
    # In turn a text between values and a value, and a last text.
    all_texts = pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(content))
    return _named(all_texts, begun, controls)


def _is_text(block: bytes) -> bool:
    """Whether bytes are UTF-8 and may stand in XML, but for control characters other than zero."""
    if b"\0" in block:  # which will stand for what is left out
        return False
    whole = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, len(block)], np.int32)), pa.py_buffer(block))
    try:
        whole.validate(full=True)  # 20 times as fast as to decode it
    except pa.ArrowInvalid:
        return False
    return _THEIR_FIRST_BYTE not in block or not any(sign in block for sign in _NO_CHARACTERS)


def _resolve(byte_B: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Writes in place of each entity what it means and zeros. Gives where they are, and how many zeros are before each
    of them and in all; None where one is unknown.
    """
    at_E = np.flatnonzero(byte_B == _AND)
    # The four bytes from each byte on, as a number.
    four_B: NDArray[np.uint32] = np.ndarray((len(byte_B) - 3,), "<u4", byte_B, strides=(1,))
    name_E = four_B[at_E + 1]
    length_E, meaning_E = np.zeros(len(at_E), np.int64), np.zeros(len(at_E), np.uint8)
    for entity in _ENTITIES:
        is_E = name_E & entity.mask == entity.name
        if entity.length > 4:
            is_E &= byte_B[at_E + entity.length] == ord(";")
        length_E[is_E], meaning_E[is_E] = entity.length, entity.meaning
    if not length_E.all():
        return None
    byte_B[at_E] = meaning_E
    for further in range(1, 6):
        byte_B[at_E[length_E >= further] + further if further > 3 else at_E + further] = 0
    return at_E, np.concatenate([[0], np.cumsum(length_E)])


class _Between(NamedTuple):
    """What a text between two values says."""

    name: str
    ends: bool
    begins: bool
    controls: int


def _named(texts: pa.StringArray, begun: int, controls: int) -> Attributes | None:
    """The values among texts, by what stands between them; None where that is not what is between attributes. `begun`
    and `controls` say how often `<` and control characters stand in the block.
    """
    encoded = texts.take(pa.array(np.arange(0, len(texts) - 1, 2))).dictionary_encode()
    last = texts[len(texts) - 1].as_py()
    # Whose texts are remembered, so there are not many, and they are short.
    longest = max(len(last), pc.max(pc.binary_length(encoded.dictionary)).as_py())
    if len(encoded.dictionary) > _MOST_BETWEEN or longest > _LONGEST_BETWEEN or not _END.fullmatch(last):
        return None
    found = [_between(text) for text in encoded.dictionary.to_pylist()]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    code_V = encoded.indices.to_numpy()
    ends_V, begins_V, controls_V = (np.array([one[part] for one in known])[code_V] for part in range(1, 4))
    # A `<` within a value, and a line break that is none of ours, are for a parser.
    if (
        (ends_V[1:] != begins_V[1:]).any()
        or ends_V[0]
        or not begins_V[0]
        or begun != np.count_nonzero(begins_V)
        or controls != controls_V.sum() + _controls(last)
    ):
        return None
    names = list(dict.fromkeys(one.name for one in known))
    name_V = np.array([names.index(one.name) for one in known])[code_V]
    row_V = np.cumsum(begins_V) - 1
    field_V = np.sort(row_V * len(names) + name_V, kind="stable")  # which are nearly sorted
    if (field_V[1:] == field_V[:-1]).any() or np.bincount(row_V).max() > MOST_FIELDS:
        return None
    return Attributes(begun, names, row_V, name_V, np.arange(1, len(texts), 2), texts)


@lru_cache(maxsize=_MOST_BETWEEN)
def _between(text: str) -> _Between | None:
    match = _BETWEEN.fullmatch(text)
    if match is None or match["name"] == "xmlns":  # which names a namespace
        return None
    return _Between(match["name"], bool(match["ends"]), bool(match["begins"]), _controls(text))


def _controls(text: str) -> int:
    return sum(sign < " " for sign in text)
