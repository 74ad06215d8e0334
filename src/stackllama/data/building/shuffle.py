"""Sorting what does not fit in memory: every piece deals its posts to buckets, and a bucket is read from all pieces.

    piece 0:  [bucket 0 | bucket 1 | bucket 2]     one Arrow file a piece, one record batch a bucket
    piece 1:  [bucket 0 | bucket 1 | bucket 2]
                   |
                   v  all posts of the questions that fall into bucket 0

A question and its answers fall into one bucket, by a hash of site and question, wherever their rows stand. Pieces and
buckets have about one size whatever the dump has, so memory hardly grows; both are read and written in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BUCKET_BYTES = 2 << 24
"""Bytes of a dump that a bucket holds, about: twice a usual piece."""

POSTS = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("question", pa.int64(), nullable=False),  # its own id, or that of the question it answers
        pa.field("answers", pa.bool_(), nullable=False),  # whether it is an answer
        pa.field("accepted_answer", pa.int64()),
        pa.field("title", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("length", pa.int64()),
        pa.field("votes", pa.int64(), nullable=False),
        pa.field("date", pa.string(), nullable=False),
        pa.field("owner", pa.int64()),
        pa.field("owner_name", pa.string(), nullable=False),
        pa.field("license", pa.string(), nullable=False),
        # Only preference data of other tools bring these: the ids of better and worse answer in turn, and addresses.
        pa.field("pairs", pa.list_(pa.field("element", pa.int64(), nullable=False))),
        pa.field("url", pa.string()),
        pa.field("profile_url", pa.string()),
    ]
)
"""A question or an answer, converted and cleaned, before it is joined."""

_BUCKETS = b"buckets"


def bucket_count(total: int, piece: int) -> int:
    """How many buckets dumps of `total` bytes are dealt to, in pieces of `piece` bytes."""
    return max(1, -(-total // max(BUCKET_BYTES, 2 * piece)))


def bucket_of(site: str | pa.ChunkedArray, question_N: NDArray[np.int64], buckets: int) -> NDArray[np.int32]:
    """The bucket of each question, by a hash of it and its site: one for all, or one for each."""
    return (hashed(site, question_N) % np.uint64(buckets)).astype(np.int32)


def hashed(site: str | pa.ChunkedArray, question_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of site and number (the mixer of splitmix64); of several sites each is hashed once."""
    if isinstance(site, str):
        seed_N: NDArray[np.uint64] | np.uint64 = _seed(site)
    else:
        encoded = site.combine_chunks().dictionary_encode()
        seed_N = np.array([*map(_seed, encoded.dictionary.to_pylist())], np.uint64)[encoded.indices.to_numpy()]
    mixed_N = question_N.astype(np.uint64) ^ seed_N
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))


def _seed(site: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(site.encode("utf-8", "replace"), digest_size=8).digest(), "little"))


def write_dealt(path: Path, posts: pa.Table, bucket_N: NDArray[np.int32]) -> None:
    """Write the posts of a piece, a record batch for each bucket that has any; buckets are read from the file's end."""
    order_N = np.argsort(bucket_N, kind="stable")
    dealt = posts.take(pa.array(order_N)).combine_chunks()
    numbers, starts = np.unique(bucket_N[order_N], return_index=True)
    schema = posts.schema.with_metadata({_BUCKETS: numbers.astype("<i4").tobytes()})
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for start, stop in pairwise([*starts, len(order_N)]):
            for batch in dealt.slice(start, stop - start).to_batches():
                writer.write_batch(batch)


def read_dealt(paths: Iterable[Path], bucket: int, schema: pa.Schema = POSTS) -> list[pa.Table]:
    """What each piece dealt to the bucket, in the order of the pieces; an empty table where it is nothing."""
    found = []
    options = pa.ipc.IpcReadOptions(use_threads=False)
    for path in paths:
        with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source, options=options) as reader:
            numbers = np.frombuffer(reader.schema.metadata[_BUCKETS], "<i4")
            at = int(np.searchsorted(numbers, bucket))
            there = at < len(numbers) and numbers[at] == bucket
            batches = [reader.get_batch(at)] if there else []
            found.append(pa.Table.from_batches(batches, schema=schema if not batches else None))
    return found
