"""Questions that are nearly the same text, by MinHash: a signature each, and a search that fits in little memory.

Two texts are compared by their sets of word triples. One-permutation MinHash (Li, Owen, Zhang 2012) keeps the
smallest hash in each of `BINS` ranges; bins that stay empty borrow from the next one (Shrivastava and Li 2014). The
share of bins that agree estimates the Jaccard similarity, with a standard error of 0.06 at 0.5. Texts that agree in a
whole band of bins are candidates (locality-sensitive hashing); each candidate pair is then judged by all bins. With 16
bands of 4 a pair of similarity 0.8 becomes a candidate with probability 0.9998, one of 0.5 with 0.64, one of 0.1 with
0.002. Texts of a few words share triples by chance, so they count as similar only where they have the same words in
the same order.

Everything is arithmetic on arrays over many texts at a time, and the same on every machine. The search holds one band
at a time; signatures stay on disk.

Legend: N texts, W words, K bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BINS, BANDS = 64, 16
SIMILAR = 0.5
"""Share of bins in which two texts agree, from which on they count as the same question."""
SHORT = 20
"""Words below which only the same words in the same order are the same question."""

ASKED = pa.schema({"site": pa.dictionary(pa.int32(), pa.string()), "id": pa.int64()})
"""Whose signatures a file holds, in their order."""

Signatures = NDArray[np.uint32]
Hashes = NDArray[np.uint64]

_BLOCK = 1 << 18
_EMPTY = np.uint32(0xFFFFFFFF)
# ASCII letters become lower case, other ASCII characters end a word, zero ends a text; other bytes are part of words.
_WORDS = bytes(
    0 if byte == 0 else byte if byte > 127 or chr(byte).isalnum() else 32
    for byte in b"".join(bytes([n]).lower() for n in range(256))
)
_PRIME = 0x100000001B3  # of FNV-1a; any odd number has an inverse
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def signatures(texts: Sequence[str]) -> Signatures:
    """The signature (N, K) of each text; of one that is very long, of its beginning."""
    texts = [text[:_BLOCK] for text in texts]
    found = np.empty((len(texts), BINS), np.uint32)
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size > _BLOCK or stop == len(texts):
            found[start:stop] = _signatures(texts[start:stop])
            start, size = stop, 0
    return found


def band_keys(signature_NK: Signatures) -> Hashes:
    """A hash of each band of each text, (bands, N): texts with an equal one are candidates."""
    key_NB = np.zeros((len(signature_NK), BANDS), np.uint64)
    for column_NB in np.moveaxis(signature_NK.reshape(-1, BANDS, BINS // BANDS), 2, 0):
        key_NB = _mixed(key_NB ^ column_NB)
    return np.ascontiguousarray(key_NB.T)


class Texts:
    """Texts whose signatures are worked out once, and only of those that are asked for."""

    def __init__(self, texts: pa.Array | pa.ChunkedArray) -> None:
        self._texts = texts
        self._known_N = np.zeros(len(texts), bool)
        self._signature_NK = np.empty((len(texts), BINS), np.uint32)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> str:
        text: str = self._texts[number].as_py()
        return text

    def signatures(self, number_N: NDArray[np.int64]) -> Signatures:
        """The signatures (N, K) of the texts of these numbers."""
        new = np.unique(number_N[~self._known_N[number_N]])
        if len(new):
            self._signature_NK[new] = signatures(self._texts.take(pa.array(new)).to_pylist())
            self._known_N[new] = True
        return self._signature_NK[number_N]


def _signatures(texts: Sequence[str]) -> Signatures:
    word_W, count_N = _words(texts)
    text_W = np.repeat(np.arange(len(texts)), count_N)
    short_N = count_N < SHORT
    with np.errstate(over="ignore"):
        triple = _mixed(word_W[:-2] + word_W[1:-1] * _GOLDEN + _mixed(word_W[2:]))
        inside = (text_W[2:] == text_W[:-2]) & ~short_N[text_W[2:]]
        # All words of a short text, each with its place, are one shingle.
        short_W = np.flatnonzero(short_N[text_W])
        owner_W = text_W[short_W]
        place_W = short_W - (np.cumsum(count_N) - count_N)[owner_W]
        whole_N = np.zeros(len(texts), np.uint64)
        np.add.at(whole_N, owner_W, _mixed(word_W[short_W] + place_W.astype(np.uint64) * _GOLDEN))
    shingle = np.append(triple[inside], _mixed(whole_N[short_N]))
    owner = np.append(text_W[:-2][inside], np.flatnonzero(short_N))
    signature = np.full(len(texts) * BINS, _EMPTY)
    np.minimum.at(signature, owner * BINS + (shingle >> np.uint64(58)).astype(np.int64), shingle.astype(np.uint32))
    return _dense(signature.reshape(-1, BINS))


def _words(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """A hash of every word, and how many words each text has."""
    joined = "\0".join([*texts, ""])
    if joined.count("\0") > len(texts):
        joined = "\0".join([*(text.replace("\0", " ") for text in texts), ""])
    content = joined.encode("utf-8", "replace").translate(_WORDS)
    byte = np.frombuffer(b" " + content, np.uint8)
    inside = byte > 32
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, stops = edges[::2], edges[1::2]
    powers, inverses = _powers(len(byte) + 1)
    with np.errstate(over="ignore"):
        total = np.zeros(len(byte) + 1, np.uint64)
        np.cumsum(byte * powers[: len(byte)], out=total[1:])
        word_W = _mixed((total[stops] - total[starts]) * inverses[starts])
    before_N = np.searchsorted(starts, np.flatnonzero(byte == 0))
    return word_W, np.diff(before_N, prepend=0)


_POWERS: list[Hashes] = []


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """At least so many powers of the prime, and of its inverse, modulo 2**64."""
    if not _POWERS or len(_POWERS[0]) < count:
        _POWERS[:] = [_progression(base, max(count, 2 * _BLOCK)) for base in (_PRIME, pow(_PRIME, -1, 2**64))]
    return _POWERS[0], _POWERS[1]


def _progression(base: int, count: int) -> Hashes:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(factors)


def _mixed(values: Hashes) -> Hashes:
    """Every bit of the outcome depends on every bit of the value (the mixer of splitmix64)."""
    mixed = values >> np.uint64(30)
    mixed ^= values
    with np.errstate(over="ignore"):
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _dense(signature_NK: Signatures) -> Signatures:
    """Each empty bin takes the value of the next one that is not, counted around, and a mark of how far it is."""
    empty_NK = signature_NK == _EMPTY
    # Of each bin the number of the next one that is not empty; behind the last one, counting goes on beyond the bins.
    nearest_NK = np.where(empty_NK, np.int16(2 * BINS), np.arange(BINS, dtype=np.int16))
    nearest_NK = np.minimum.accumulate(nearest_NK[:, ::-1], axis=1)[:, ::-1]
    nearest_NK = np.where(nearest_NK == 2 * BINS, nearest_NK[:, :1] + np.int16(BINS), nearest_NK)
    text_E, bin_E = np.nonzero(empty_NK)
    nearest_E = nearest_NK[text_E, bin_E].astype(np.int64)
    with np.errstate(over="ignore"):
        mark_E = (nearest_E - bin_E).astype(np.uint32) * np.uint32(0x9E3779B1)
        signature_NK[text_E, bin_E] = signature_NK[text_E, nearest_E % BINS] + mark_E
    return signature_NK


class Stack(Protocol):
    """Signatures of which some can be had by their numbers: an array, or something on disk."""

    def __getitem__(self, number_N: NDArray[np.int64], /) -> Signatures:
        """The signatures (N, K) of some texts."""


def similar_pairs(
    band_keys_B: Iterable[Hashes], signature_NK: Stack, *, together: Together, similar: float = SIMILAR
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The numbers of the texts of pairs that agree in at least the share `similar` of their bins, in lots.

    `band_keys_B` has for each band the keys (N,) of all texts; `signature_NK` may lie on disk. A text is compared with
    the first and with the previous one of those that share its key, so n copies cost 2 n comparisons; pairs for which
    `together` says that they are one cluster already are passed over.
    """
    for key_N in band_keys_B:
        order_N = np.argsort(key_N, kind="stable")
        sorted_N = key_N[order_N]
        again_N = np.flatnonzero(sorted_N[1:] == sorted_N[:-1]) + 1
        first_N = np.searchsorted(sorted_N, sorted_N[again_N])
        for start in range(0, len(again_N), _LOT):
            some = slice(start, start + _LOT)
            for place_N in (first_N[some], again_N[some] - 1):
                earlier, later = order_N[place_N], order_N[again_N[some]]
                apart = ~together(earlier, later)
                earlier, later = earlier[apart], later[apart]
                agree = (signature_NK[later] == signature_NK[earlier]).mean(axis=1)
                yield earlier[agree >= similar], later[agree >= similar]


Together = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
_LOT = 1 << 14
